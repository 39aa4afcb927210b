"""Task settings, loaders, splits and prompts, through real reasoning-gym, real files and real math-verify."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvr.errors import ConfigError
from rlvr.tasks import Task, TaskConfig, load_task
from rlvr.tasks.gym import generate
from rlvr.tasks.names import NAMED, final_number
from rlvr.tasks.prompts import PromptFormat
from rlvr.tasks.rows import Row

ONE_DIGIT = {"max_terms": 2, "max_digits": 1}  # 2 operators x 100 pairs of digits = 200 questions


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files read here are converted in a cache of the tests' own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sums() -> Task:
    return load_task(TaskConfig(task="chain_sum", task_kwargs=ONE_DIGIT, train_size=40, heldout_size=20, num_shots=3))


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + 1?", "answer": str(i + 1), **columns} for i in range(count)]


def write_verl(path: Path, messages: list[list[dict[str, str]]], answers: list[str | None]) -> str:
    records = [
        {
            "data_source": "math_dapo",
            "prompt": prompt,
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": i},
        }
        for i, (prompt, answer) in enumerate(zip(messages, answers, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    return str(path)


def rewards(task: Task, completions: list[Any]) -> list[float | None]:
    rows = task.train.select(range(len(completions)))
    columns = {name: rows[name][:] for name in rows.column_names if name != "prompt"}
    try:
        return task.reward(prompts=rows["prompt"][:], completions=completions, completion_ids=[], **columns)
    finally:
        task.reward.pool.close()  # type: ignore[attr-defined]


def shown(prompt: str) -> list[str]:
    """The questions of a plain prompt, the last of which is asked."""
    return [part.partition("\nAnswer:")[0] for part in prompt.split("Question: ")[1:]]


def test_gym_train_heldout_and_shots_are_disjoint(sums: Task) -> None:
    assert sums.heldout is not None
    train, heldout = set(sums.train["question"]), set(sums.heldout["question"])
    shots = shown(sums.train[0]["prompt"])[:-1]
    assert (len(train), len(heldout), len(shots)) == (40, 20, 3)
    assert not train & heldout and not set(shots) & (train | heldout)
    for row in [*sums.train, *sums.heldout]:
        assert shown(row["prompt"]) == [*shots, row["question"]]


def test_gym_rewards_answers_like_the_shots_and_cuts_what_follows(sums: Task) -> None:
    right = sums.train["answer"][:3]
    said = [f" {right[0]}", f" {right[1]}\n\nQuestion: 1 + 1 =\nAnswer: 2", " I pass"]
    assert rewards(sums, said) == [1.0, 1.0, 0.0]
    assert "40 train and 20 held-out plain prompts, 3 shots; verifier reasoning_gym" in sums.describe


def test_gym_shots_and_heldout_do_not_depend_on_train_size_nor_rows_on_the_hash_seed(
    sums: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    again = generate("chain_sum", ONE_DIGIT, seed=0, count=30)
    assert sums.heldout is not None
    assert [row.question for row in again[3:23]] == sums.heldout["question"][:]
    assert [row.question for row in again[23:]] == sums.train["question"][:7]


def test_gym_generation_is_the_same_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []  # this task iterates over a set of letters
    for hash_seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        found.append(generate("isomorphic_strings", {}, seed=0, count=20))
    assert found[0] == found[1]
    assert {row.question for row in generate("isomorphic_strings", {}, seed=1, count=20)} != {
        row.question for row in found[0]
    }


def test_gym_small_space_says_how_many_there_are() -> None:
    config = TaskConfig(task="chain_sum", task_kwargs=ONE_DIGIT, train_size=1000, heldout_size=50)
    with pytest.raises(ConfigError, match=r"train_size=1000 .*has 200: train_size can be 150 at most"):
        load_task(config)


def test_gym_grid_task_keeps_its_types_in_chat() -> None:
    task = load_task(TaskConfig(task="reasoning_gym:arc_agi", train_size=2, heldout_size=0, chat=True))
    assert task.heldout is None
    assert "<answer>" in task.train[0]["prompt"][-1]["content"]
    tagged = [[{"role": "assistant", "content": f"I see. <answer>\n{a}\n</answer>"}] for a in task.train["answer"]]
    assert rewards(task, tagged) == [1.0, 1.0]  # its grids are tuples: as lists the right answer scores 0.05


def test_gym_task_without_reference_answers_refuses_shots() -> None:
    with pytest.raises(ConfigError, match="num_shots=1: graph_color has rows without a reference answer"):
        load_task(TaskConfig(task="graph_color", train_size=1, heldout_size=0, num_shots=1))


def test_file_split_is_disjoint_deterministic_and_complete(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(30))
    make = lambda **kw: load_task(TaskConfig(task=path, heldout_size=8, num_shots=2, **kw))  # noqa: E731
    task, again, other, small = make(), make(), make(task_seed=1), make(train_size=5)
    assert task.heldout is not None and small.heldout is not None and other.heldout is not None
    train, heldout, shots = (
        set(task.train["question"]),
        set(task.heldout["question"]),
        shown(task.train[0]["prompt"])[:-1],
    )
    assert train | heldout | set(shots) == {r["question"] for r in numbered(30)}
    assert len(train) + len(heldout) + len(shots) == 30
    assert task.train["prompt"][:] == again.train["prompt"][:]
    assert task.heldout["question"][:] != other.heldout["question"][:]
    assert task.heldout["prompt"][:] == small.heldout["prompt"][:]
    assert small.train["prompt"][:] == task.train["prompt"][:5]
    assert rewards(task, [f"so \\boxed{{{a}}}" for a in task.train["answer"][:3]]) == [1.0] * 3


def test_file_repeated_problems_are_merged_and_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(10) * 3)
    task = load_task(TaskConfig(task=path, heldout_size=4))
    assert (len(task.train), "20 rows repeat an earlier problem" in task.describe) == (6, True)


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_file_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(numbered(6)), path)
    elif suffix == "json":
        path.write_text(json.dumps(numbered(6)))
    else:
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in numbered(6)))
    task = load_task(TaskConfig(task=str(path), heldout_size=2))
    assert sorted(int(a) for a in task.train["answer"])[0] >= 1 and len(task.train) == 4


def test_gsm8k_from_a_local_file_takes_the_number_after_the_marks(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"Half of it is 5.\n#### 1,{i}00"} for i in range(1, 5)]
    task = load_task(TaskConfig(task="gsm8k", data_files=write_jsonl(tmp_path / "g.jsonl", rows), heldout_size=1))
    assert {*task.train["answer"]} < {"1100", "1200", "1300", "1400"}
    assert rewards(task, [f"#### {int(task.train[0]['answer']):,}", "#### 7"]) == [1.0, 0.0]
    assert final_number("no marks: 5") == "no marks: 5"


def test_verl_layout_keeps_messages_and_finds_the_nested_answer(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Think."}
    messages = [[system, {"role": "user", "content": f"What is {i} + 1?"}] for i in range(6)]
    path = write_verl(tmp_path / "verl.parquet", messages, [str(i + 1) for i in range(6)])
    task = load_task(TaskConfig(task=path, heldout_size=2, num_shots=1))
    prompt = task.train[0]["prompt"]
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[-1]["content"] == task.train[0]["question"]
    assert prompt[2]["content"].startswith("\\boxed{")
    assert rewards(task, [[{"role": "assistant", "content": task.train[0]["answer"]}]]) == [1.0]
    with pytest.raises(ConfigError, match="chat=False: a prompt has 2 messages"):
        load_task(TaskConfig(task=path, heldout_size=2, chat=False))
    with pytest.raises(ConfigError, match="system_prompt='Be brief'"):
        load_task(TaskConfig(task=path, heldout_size=2, system_prompt="Be brief"))


@pytest.mark.parametrize(
    ("name", "file"),
    [("dapo_math_17k", "dapo_math_17k_sample500.parquet"), ("gsm8k", "gsm8k_test_sample300.parquet")],
)
def test_verl_real_rows(data_dir: Path, name: str, file: str) -> None:
    task = load_task(TaskConfig(task=name, data_files=str(data_dir / file), heldout_size=50))
    assert task.heldout is not None and not {*task.train["question"]} & {*task.heldout["question"]}
    assert (
        rewards(task, [[{"role": "assistant", "content": f"\\boxed{{{a}}}"}] for a in task.train["answer"][:40]])
        == [1.0] * 40
    )


def test_own_reward_gets_the_row_and_its_columns_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def graded(completion, answer, *, level):\n    return level if completion == answer else 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_jsonl(tmp_path / "rows.jsonl", numbered(4, level=0.5, unused="x"))
    task = load_task(TaskConfig(task=path, heldout_size=1, reward="mine:graded"))
    assert rewards(task, [task.train[0]["answer"], "?"]) == [0.5, 0.0]
    assert task.reward.__name__ == "graded"
    bare = write_jsonl(tmp_path / "bare.jsonl", numbered(4))
    with pytest.raises(ConfigError, match="reward='mine:graded' wants the columns level; columns present: answer"):
        load_task(TaskConfig(task=bare, heldout_size=1, reward="mine:graded"))
    clash = write_jsonl(tmp_path / "clash.jsonl", numbered(4, completions="x", level=1))
    with pytest.raises(ConfigError, match="columns named completions"):
        load_task(TaskConfig(task=clash, heldout_size=1, reward="mine:graded"))


@pytest.mark.parametrize(
    ("records", "settings", "says"),
    [
        ([{"q": "x", "answer": "1"}], {}, "prompt_column=None: .*columns present: q, answer"),
        ([{"question": "x", "a": "1"}], {}, "answer_column=None: .*columns present: question, a"),
        (numbered(3), {"prompt_column": "text"}, "prompt_column='text' is not a column; columns present: question"),
        (numbered(3), {"answer_column": "a.b"}, "answer_column='a.b' is not a column"),
        ([*numbered(3), {"question": "x", "answer": None}, {"question": "y", "answer": " "}], {},
         "answer_column='answer' is empty in 2 of 5 rows, the first is row 4 of '.*rows.jsonl'"),
        ([*numbered(2), {"question": "", "answer": "1"}], {}, "prompt_column='question' is empty in 1 of 3 rows"),
        (numbered(5), {"heldout_size": 5}, "needs 6 distinct problems, .*has 5: lower heldout_size or num_shots"),
        (numbered(5), {"heldout_size": 2, "train_size": 4}, "train_size=4 .*train_size can be 3 at most"),
        ([], {}, "task=.*cannot be loaded|has no rows"),
        ([{"question": "x", "answer": ["1"]}], {}, "answer_column='answer' holds a list"),
        ([{"question": ["x"], "answer": "1"}], {}, "prompt_column='question' holds neither text nor"),
    ],
)  # fmt: skip
def test_file_errors_name_the_field(tmp_path: Path, records: list[Any], settings: dict[str, Any], says: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", records)
    with pytest.raises(ConfigError, match=says):
        load_task(TaskConfig(task=path, **{"heldout_size": 0, **settings}))


def test_prompt_format_templates_leave_braces_of_the_question_alone() -> None:
    layout = PromptFormat(
        prompt_template="Q: {question}\nA:", answer_template=" {answer}\n", system_prompt="S", chat=False
    )
    row, shot = Row("{x} in \\boxed{}", "1"), Row("y", "{2}")
    assert layout.build(row, [shot]) == "S\n\nQ: y\nA: {2}\nQ: {x} in \\boxed{}\nA:"
    assert layout.stop == "Q:"
    chat = dataclasses.replace(layout, chat=True)
    assert [m["role"] for m in chat.build(row, [shot])] == ["system", "user", "assistant", "user"]  # type: ignore[index]
    assert chat.stop is None


def test_named_tasks_are_what_the_hub_calls_them() -> None:
    assert {name: source.name for name, source in NAMED.items()} == {
        "gsm8k": "openai/gsm8k",
        "math_500": "HuggingFaceH4/MATH-500",
        "dapo_math_17k": "BytedTsinghua-SIA/DAPO-Math-17k",
    }


def test_import_is_light() -> None:
    code = "import sys, rlvr.tasks, rlvr.rewards; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "trl", "transformers", "datasets", "reasoning_gym", "math_verify", "sympy"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
