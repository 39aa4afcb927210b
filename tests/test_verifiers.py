"""Verifiers: what they accept as an answer, and the user's own."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr.errors import ConfigError
from rlvr.verifiers import (
    decode_entry,
    encode_entry,
    extract_answer,
    import_verifier,
    last_boxed,
    math_verifier,
    reasoning_gym_verifier,
)

OWN = """
def strict(completion, answer):
    return 1.0

def own_column(completion, answer, level):
    return level

def other_names(text, gold, **columns):
    return float(text == gold and "level" in columns)

def one_argument(completion):
    return 0.0

not_callable = 3
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_verifiers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


ENTRIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.tuples(st.integers()), inner)
        | st.sets(st.integers())
    ),
    max_leaves=10,
)


@given(ENTRIES)
def test_entry_comes_back_with_its_types(entry: Any) -> None:
    assert decode_entry(encode_entry(entry)) == entry


def test_extract_answer_prefers_tags_then_box_then_first_line() -> None:
    assert extract_answer("\n  12 \nQuestion: 3") == "12"
    assert extract_answer("so \\boxed{1} no, \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert extract_answer("\\boxed{1} <answer>2</answer> <answer>\n3\n</answer>") == "3"
    assert extract_answer("1 2\n3 4\n5 6", num_lines=2) == "1 2\n3 4"
    assert extract_answer("") == ""
    assert last_boxed("\\boxed{1} and \\boxed{2") == "1"


@given(st.text(alphabet="\\boxed{}<answer>/ \n12", max_size=60))
def test_extract_answer_is_stripped_and_never_raises(text: str) -> None:
    assert extract_answer(text) == extract_answer(text).strip()


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("72", "Thus she sold 48 + 24 = 72 clips.\n#### 72", 1.0),
        ("1,450,000", "The answer is \\boxed{1450000}.", 1.0),
        ("1450000", "Answer: $1,450,000", 1.0),
        ("\\frac{3}{4}", "so $x = 0.75$", 1.0),
        ("\\frac{3}{4}", "<answer>3/4</answer>", 1.0),
        ("\\frac{3}{4}", "<answer>\\frac{3}{4}</answer>", 1.0),
        ("2", "\\boxed{1} or \\boxed{2}", 0.0),
        ("2", "it is 3", 0.0),
        ("2", "I do not know", 0.0),
        ("2", "\\boxed{\\frac{}{}}", 0.0),
    ],
)
def test_math_verifier_on_final_answers(answer: str, completion: str, value: float) -> None:
    assert math_verifier()(completion, answer) == value


def test_math_verifier_refuses_a_reference_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="reference answer"):
        math_verifier()("\\boxed{1}", " ")


def test_reasoning_gym_verifier_binary_and_partial_credit() -> None:
    entry = encode_entry({"question": "", "answer": "tac", "metadata": {}})
    binary = reasoning_gym_verifier("spell_backward", {}, binary=True)
    partial = reasoning_gym_verifier("spell_backward", {}, binary=False)
    assert [binary(text, "tac", entry=entry) for text in ("tac", " tac \ncat", "cat", "")] == [1.0, 1.0, 0.0, 0.0]
    assert 0.0 < partial("tab", "tac", entry=entry) < 1.0


def test_own_verifier_gets_the_columns_it_has_parameters_for(own_module: None) -> None:
    assert import_verifier("own_verifiers:strict")("c", "a", level=3, other=1) == 1.0
    assert import_verifier("own_verifiers:own_column", {"level"})(completion="c", answer="a", level=3, other=1) == 3
    assert import_verifier("own_verifiers:other_names")(completion="c", answer="c", level=3) == 1.0
    with pytest.raises(
        ConfigError, match="reward='own_verifiers:own_column' wants the columns level; columns present: x"
    ):
        import_verifier("own_verifiers:own_column", {"x"})


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("own_verifiers:nothing", "cannot be imported"),
        ("no_such_module_anywhere:f", "cannot be imported"),
        ("own_verifiers:not_callable", "not a function"),
        ("__main__:f", "move it to a file"),
        ("own_verifiers:", "module:function"),
        ("own_verifiers:one_argument", "must accept"),
    ],
)
def test_own_verifier_errors_name_the_field(own_module: None, spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward=.*{says}"):
        import_verifier(spec)
