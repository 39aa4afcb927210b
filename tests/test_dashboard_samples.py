"""What a page is told of sampled tokens and of prompts: by hand, or against the records themselves."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboard_cases import write_run
from test_dashboard_payloads import look, plain

from rlvr.errors import ConfigError
from rlvr.monitor import Recorder, read_tokens
from rlvr.monitor.groups import Groups, prompt_id
from rlvr.monitor.payloads.prompts import PromptTable, prompts_payload
from rlvr.monitor.payloads.tokens import forks_payload, tokens_payload


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one", 60)


# ------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_the_sample(run_dir: Path) -> None:
    found = plain(tokens_payload(run_dir, 31))
    assert found["step"] == 31 and found["recorded"] == len(found["rows"]) == 6
    for shown, row in zip(found["rows"], read_tokens(run_dir, 31), strict=True):
        assert shown["tokens"] == row["tokens"] and shown["prompt"] == row["prompt"] and shown["length"] == 120
        assert shown["estimator"] == "discriminator" and shown["omitted"] == 0
        for name in ("entropy", "logps", "weight", "covariance", "predicted", "advantages", "values", "rollout_logps"):
            assert shown[name] == pytest.approx(row[name], rel=1e-5)
        assert shown["controls"] == {name: row[f"control:{name}"] for name in ("clip_cov", "kl_cov")}
        assert shown["keep"] == row["keep"]


def test_tokens_beyond_a_limit_are_counted(run_dir: Path) -> None:
    found = plain(tokens_payload(run_dir, 31, max_tokens=10, max_rows=3, max_prompt=5, digits=2))
    rows = read_tokens(run_dir, 31)
    assert found["recorded"] == 6
    assert [row["reward"] for row in found["rows"]] == [0, 0, 1]  # lowest to highest, evenly
    for shown in found["rows"]:
        row = rows[shown["sequence"]]
        assert shown["length"] == 120 and shown["omitted"] == 110 and shown["prompt"] == "Solve …"
        assert shown["tokens"] == row["tokens"][:10] and shown["completion"] == "".join(row["tokens"][:10])
        assert all(len(shown[name]) == 10 for name in ("entropy", "keep", "values"))
        assert shown["entropy"] == pytest.approx(row["entropy"][:10], rel=0.051)


def test_tokens_of_an_old_run_have_fewer_columns(tmp_path: Path) -> None:
    Recorder(tmp_path).record_tokens(
        3, {"prompt": ["p", "q"], "completion": ["a", "b"], "rollout_logps": [None, None]}
    )
    first, _ = plain(tokens_payload(tmp_path, 3))["rows"]
    assert first == {"prompt": "p", "completion": "a", "length": 0, "omitted": 0, "tokens": [], "controls": {}}
    assert plain(forks_payload(tmp_path, 3)) == {"tokens": [], "threshold": None}


def test_tokens_of_a_damaged_file_are_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "step-000003.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ConfigError, match=r"step-000003.parquet is damaged \(.*\); delete it"):
        tokens_payload(tmp_path, 3)
    with pytest.raises(FileNotFoundError):
        tokens_payload(tmp_path, 4)


def test_forks_by_hand(tmp_path: Path) -> None:
    """10 tokens, the 2 with most entropy: "so" at 5 and 3; it also stands once at 1, and once unknown."""
    tokens = [["so", "a", "b", "so", "a"], ["b", "so", "a", "b", "a", "so"]]
    entropy = [[5.0, 0.1, 0.2, 1.0, 2.0], [0.3, 3.0, 0.1, 0.1, 0.0, math.nan]]
    Recorder(tmp_path).record_tokens(1, {"tokens": tokens, "entropy": entropy})
    assert plain(forks_payload(tmp_path, 1)) == {
        "tokens": [{"token": "so", "count": 2, "mean_entropy": 3.0, "share_forking": 0.666667}],
        "threshold": 3.0,
    }


@pytest.mark.parametrize(
    ("entropy", "threshold", "count"),
    [
        ([0.0] * 9, None, 0),
        ([0.0] * 9 + [0.25], 0.25, 1),  # a fifth would be two
        ([0.5] * 4 + [0.1] * 6, 0.5, 4),  # equal at the limit
        ([2.0, 1.23456, 1.23454, *[0.1] * 7], 1.234, 3),
        ([2.0, 1.23412, 1.2339, *[0.1] * 7], 1.234, 2),
    ],
)
def test_forks_reach_a_threshold_above_zero(
    entropy: list[float], threshold: float | None, count: int, tmp_path: Path
) -> None:
    Recorder(tmp_path).record_tokens(1, {"tokens": [["a"] * len(entropy)], "entropy": [entropy]})
    found = plain(forks_payload(tmp_path, 1))
    assert found["threshold"] == threshold and sum(row["count"] for row in found["tokens"]) == count


@pytest.mark.parametrize("digits", [4, 6])
def test_forks_are_those_that_reach_the_threshold_on_the_page(digits: int, run_dir: Path) -> None:
    """In a dashboard, and at least those in a report, which has fewer digits."""
    found = forks_payload(run_dir, 31)
    rows = plain(tokens_payload(run_dir, 31, digits=digits))["rows"]
    underlined = sum(value >= found["threshold"] for row in rows for value in row["entropy"])
    counted = sum(row["count"] for row in found["tokens"])
    assert 144 <= counted <= underlined <= counted + (digits == 4) and counted <= 146


def test_forks_are_the_most_frequent_of_the_uncertain_fifth(run_dir: Path) -> None:
    pairs = [p for row in read_tokens(run_dir, 31) for p in zip(row["tokens"], row["entropy"], strict=True)]
    found = plain(forks_payload(run_dir, 31))
    ranked = [pair for pair in pairs if pair[1] >= found["threshold"]]
    assert len(pairs) // 5 <= len(ranked) <= len(pairs) // 5 + 2
    found = found["tokens"]
    assert {row["token"]: row["count"] for row in found} == Counter(token for token, _ in ranked)
    assert [row["count"] for row in found] == sorted((row["count"] for row in found), reverse=True)


# ------------------------------------------------------------------------------------------------------------- prompts


def prompts_of(run_dir: Path) -> Any:
    table = PromptTable(run_dir)
    table.refresh()
    return plain(prompts_payload(table, look(run_dir).table))


def test_prompts_by_hand(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record_step(1, {"reward/zero_variance_groups": 0.25})
    recorder.record_groups(1, Groups(["a", "b", "c", "d"], [8, 4, 0, 0], [8, 8, 8, 0], [1, 0.5, 0, math.nan]))
    recorder.record_step(2, {"reward/zero_variance_groups": 0.25})
    recorder.record_step(3, {"reward/zero_variance_groups": 0.75})
    recorder.record_groups(3, Groups(["b", "a", "c", "b"], [8, 0, 0, 6], [8, 8, 4, 8], [1, 0, 0, 0.5]))
    found = prompts_of(tmp_path)
    assert (found["total"], found["solved"], found["partly"], found["never"], found["omitted"]) == (4, 0, 2, 1, 0)
    assert found["unscored"] == 1
    rows = {row["text"]: row for row in found["prompts"]}
    assert [row["text"] for row in found["prompts"]] == ["b", "a", "c", "d"]  # rate .75 first, then who is met most
    assert rows["b"] == {
        "id": prompt_id("b"),
        "text": "b",
        "seen": 3,
        "passed": 18,
        "scored": 24,
        "state": "partly",
        "points": [[1, 0.5], [3, 1.0], [3, 0.75]],
    }
    assert rows["a"]["state"] == "partly" and rows["c"]["state"] == "never"
    assert rows["d"]["state"] == "unscored" and rows["d"]["points"] == []
    assert found["step"] == [1, 3] and found["zero_variance"] == [0.25, 0.75]
    assert found["all_passed"] == [0.333333, 0.25] and found["some_passed"] == [0.333333, 0.25]
    assert found["none_passed"] == [0.333333, 0.5]


def test_prompts_are_read_on_and_read_anew(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    table = PromptTable(tmp_path)
    for step in range(1, 5):
        recorder.record_step(step, {})
        recorder.record_groups(step, Groups([f"p{step}", "same"], [step, 1], [8, 8], [0.5, 0.5]))
        table.refresh()
        assert table.groups[0].tolist() == [n for n in range(1, step + 1) for _ in (0, 1)]
    assert len(table.ids) == 5 and table.texts[prompt_id("p4")] == "p4"
    Recorder.resume(tmp_path, 2)
    table.refresh()
    assert table.groups[0].tolist() == [1, 1, 2, 2] and len(table.ids) == len(table.texts) == 3


def test_prompts_of_many_rollouts_come_in_few_columns(tmp_path: Path) -> None:
    """700 rollouts of a prompt each in columns of 3; a prompt that is met often shows at most 60 of its visits."""
    ids = [["often", f"once-{n}"] for n in range(700)]
    records = [
        {"step": n + 1, "prompts": i, "passed": [n % 9, 0], "scored": [8, 8], "reward": [0, 0]}
        for n, i in enumerate(ids)
    ]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = prompts_of(tmp_path)
    assert found["total"] == 701 and found["omitted"] == 201 and len(found["prompts"]) == 500
    assert len(found["step"]) == 234 and found["step"][:2] == [3, 6] and found["step"][-1] == 700
    often = next(row for row in found["prompts"] if row["id"] == "often")
    assert len(often["points"]) == 60 and often["points"][-1][0] == 700 and often["text"] == ""
    shares = np.array([found[name] for name in ("all_passed", "some_passed", "none_passed")])
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)
    assert found["zero_variance"] == [None] * 234


@pytest.mark.parametrize(
    ("counts", "listed"),
    [
        ((600, 600, 600, 600), (167, 167, 166, 0)),
        ((0, 2000, 50, 0), (0, 450, 50, 0)),
        ((2000, 100, 2000, 9), (200, 100, 200, 0)),
        ((10, 20, 30, 900), (10, 20, 30, 440)),
        ((0, 0, 0, 900), (0, 0, 0, 500)),
    ],
)
def test_prompts_of_no_state_take_the_places_of_another(
    counts: tuple[int, ...], listed: tuple[int, ...], tmp_path: Path
) -> None:
    outcomes = {"solved": (8, 8), "partly": (4, 8), "never": (0, 8), "unscored": (0, 0)}
    kinds = [state for state, count in zip(outcomes, counts, strict=True) for _ in range(count)]
    passed, scored = zip(*(outcomes[state] for state in kinds), strict=True)
    ids = [f"p{n}" for n in range(len(kinds))]
    line = {"step": 1, "prompts": ids, "passed": passed, "scored": scored, "reward": [0] * len(ids)}
    (tmp_path / "groups.jsonl").write_text(json.dumps(line) + "\n")
    found = prompts_of(tmp_path)
    assert tuple(found[state] for state in outcomes) == counts
    shown = Counter(row["state"] for row in found["prompts"])
    got = tuple(shown[state] for state in outcomes)
    assert sorted(got) == sorted(listed) and all(abs(a - b) <= 1 for a, b in zip(got, listed, strict=True))
    assert found["omitted"] == sum(counts) - sum(listed)


def test_prompts_of_a_damaged_file_are_an_error(tmp_path: Path) -> None:
    whole = '{"step": 1, "prompts": ["a"], "passed": [1], "scored": [1], "reward": [1]}\n'
    (tmp_path / "groups.jsonl").write_text(whole + whole.replace("[1]", "[1, 2]", 1) + whole)
    with pytest.raises(ConfigError, match=r"groups.jsonl line 2 is damaged"):
        prompts_of(tmp_path)
