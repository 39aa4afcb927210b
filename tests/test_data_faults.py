"""Rows that are not what they should be: one line names the file, the row and the column before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlvr.errors import ConfigError
from rlvr.tasks import TaskConfig, load_task

GOOD = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
ASKED = [{"role": "user", "content": "1 + 1"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_task(TaskConfig(task=str(path), heldout_size=0))
    assert "\n" not in str(error.value) and path.name in str(error.value)
    return str(error.value)


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.jsonl", lines(*GOOD) + b'{"question": "x", "ans', "line 5 is not JSON (Unterminated string"),
        ("torn.jsonl", lines(*GOOD) + b'{"que\n\n' + lines(*GOOD), "line 5 is not JSON"),
        ("list.jsonl", lines(*GOOD, [1, 2]), "line 5 is no mapping of columns"),
        ("scalar.jsonl", lines(*GOOD, 3), "line 5 is no mapping of columns"),
        ("cut.json", json.dumps(GOOD).encode()[:-9], "cut.json' is not JSON (Unterminated string starting at: line 1"),
        ("empty.jsonl", b"", "empty.jsonl' is empty"),
        ("binary.jsonl", lines(*GOOD) + b'{"question": "\xff\xfe", "answer": "1"}\n', "row 5 of"),
        ("wide.csv", b"question,answer\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("torn.parquet", b"PAR1 and nothing", "Parquet magic bytes not found"),
    ],
)
def test_file_that_cannot_be_read_says_where(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert says in refusal(path)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"answer": "1"}, "prompt_column='question' is empty in 1 of 5 rows, the first is row 5 of"),
        ({"question": None, "answer": "1"}, "prompt_column='question' is empty in 1 of 5 rows, the first is row 5"),
        ({"question": " \n", "answer": "1"}, "prompt_column='question' is empty in 1 of 5 rows"),
        ({"question": "x"}, "answer_column='answer' is empty in 1 of 5 rows, the first is row 5 of"),
        ({"question": "x", "answer": ""}, "answer_column='answer' is empty in 1 of 5 rows"),
        ({"question": "x", "answer": ["1"]}, "answer_column='answer' holds a list, not one answer, in row 5 of"),
        ({"question": 7, "answer": "1"}, "prompt_column='question' holds neither text nor a list of"),
        ({"question": [7], "answer": "1"}, "prompt_column='question' holds neither text nor a list of"),
    ],
)
def test_bad_row_among_good_ones_is_named(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*GOOD, bad))
    message = refusal(path)
    assert says in message and "row 5 of" in message


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "prompt_column='prompt' is empty in 1 of 2 rows, the first is row 2"),
        ([{"role": "user", "content": None}], "prompt_column='prompt' is empty in 1 of 2 rows"),
        ([*ASKED, {"role": "assistant", "content": "2"}], "ends with a message of the role 'assistant', not user, in"),
        ([{"role": None, "content": "x"}], "ends with a message of the role None, not user, in row 2"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "whose content is no text, in row 2"),
    ],
)
def test_bad_conversation_is_named(tmp_path: Path, messages: list[Any], says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines({"prompt": ASKED, "answer": "2"}, {"prompt": messages, "answer": "2"}))
    assert says in refusal(path)


def test_answer_that_is_a_number_in_some_rows_is_its_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*GOOD, {"question": "x", "answer": 5}, {"question": "y", "answer": 0.5}))
    rows = load_task(TaskConfig(task=str(path), heldout_size=0)).train
    answers = dict(zip(rows["question"], rows["answer"], strict=True))
    assert (answers["0 + 1"], answers["x"], answers["y"]) == ("1", "5", "0.5")
