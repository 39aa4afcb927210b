"""The laboratory: its verifier is exact, its problems are split cleanly, and the product's trainer runs in it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_steps
from scripts.lab.base import BaseSettings, encoded, new_model, tokenizer, train
from scripts.lab.countdown import (
    COMPLETION_LENGTH,
    IDS,
    VOCABULARY,
    all_solutions,
    draw,
    draw_prompts,
    reward,
    split,
    verify,
)
from scripts.lab.methods import ALL, AT_EQUAL_COMPUTE, METHODS
from scripts.lab.plan import BASE, BASES, FULL, QUICK, plan, seconds
from scripts.lab.pool import conduct
from scripts.lab.records import read_others, read_record
from scripts.lab.runs import HELD_OUT_PROMPTS, UPDATES, LabRun, config, finished, perform

NUMBERS, TARGET = (7, 3, 12), 22
SOLUTION = "7 + 3 = 10 10 + 12 = 22 <eos>"


def sample(count: int = 300, numbers: int = 3):
    return draw(all_solutions(numbers), count, np.random.default_rng(0))


@pytest.mark.parametrize("numbers", [2, 3])
def test_every_solution_is_verified(numbers: int):
    solutions = sample(numbers=numbers)
    completions = [[IDS[word] for word in text.split()] for text in solutions.completions()]
    assert reward(solutions.prompts(), completions) == [1.0] * len(solutions)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (SOLUTION, 1.0),
        ("3 + 12 = 15 7 + 15 = 22 <eos>", 1.0),
        ("7 + 3 = 10 10 + 12 = 22", 0.0),  # does not end
        ("7 + 3 = 10 10 + 12 = 22 22", 0.0),
        ("7 + 3 = 11 11 + 12 = 23 <eos>", 0.0),  # 7 + 3 is not 11
        ("7 + 3 = 10 10 + 3 = 13 <eos>", 0.0),  # 3 is used twice, 12 never
        ("7 + 7 = 14 14 + 12 = 26 <eos>", 0.0),
        ("10 + 0 = 10 10 + 12 = 22 <eos>", 0.0),  # neither 10 nor 0 is given
        ("12 + 3 = 15 15 - 7 = 8 <eos>", 0.0),  # sound arithmetic, wrong goal
        ("3 - 7 = -4 12 + 10 = 22 <eos>", 0.0),  # no number is negative
        ("7 : 3 = 10 10 + 12 = 22 <eos>", 0.0),
        ("7 + 3 > 10 10 + 12 = 22 <eos>", 0.0),
        ("7 + 3 = 10 <eos>", 0.0),
        ("7 + 3 = 10 10 + 12 = 22 <pad>", 0.0),
        ("<eos>", 0.0),
        ("", 0.0),
    ],
)
def test_verify_by_hand(completion, right):
    assert verify(completion.split(), NUMBERS, TARGET) == right


@pytest.mark.parametrize(("numbers", "right"), [((5, 5, 5), 1.0), ((5, 5, 4), 0.0)])
def test_verify_allows_a_number_as_often_as_it_is_given(numbers, right):
    completion = "5 + 5 = 10 10 + 5 = 15 <eos>"
    assert verify(completion.split(), numbers, 15) == right


@pytest.mark.parametrize(
    ("completion", "right"),
    [("3 * 4 = 12 <eos>", 1.0), ("4 * 3 = 12 <eos>", 1.0), ("3 + 4 = 7 <eos>", 0.0), ("3 * 4 = 12", 0.0)],
)
def test_verify_of_two_numbers(completion, right):
    assert verify(completion.split(), (3, 4), 12) == right


def test_two_and_three_numbers_make_lengths_vary():
    prompts = draw_prompts(False, (2, 3), 400, np.random.default_rng(0))
    lengths = [len(prompt.split()) for prompt in prompts]
    assert set(lengths) == {5, 6}
    assert lengths.count(5) == pytest.approx(200, abs=40)  # four standard deviations
    words = {len(text.split()) for numbers in (2, 3) for text in sample(numbers=numbers).completions()}
    assert words == {6, COMPLETION_LENGTH}


def test_verify_changes_with_every_word():
    """Any other word in any place of a solution makes it wrong."""
    solution = SOLUTION.split()
    for place in range(len(solution)):
        for word in set(VOCABULARY) - {solution[place]}:
            assert verify([*solution[:place], word, *solution[place + 1 :]], NUMBERS, TARGET) == 0.0


def test_reward_ignores_padding_after_the_end():
    ids = [IDS[word] for word in f"{SOLUTION} <pad> 5".split()]
    assert reward(["7 3 12 > 22 :"], [ids]) == [1.0]


def test_solutions_are_all_there_and_held_out_problems_are_no_training_problems():
    def problems(held_out: bool) -> set[tuple[int, ...]]:
        found = split(held_out)
        sorted_numbers = np.sort(found.numbers, axis=1).tolist()
        return {(*numbers, target) for numbers, target in zip(sorted_numbers, found.targets.tolist(), strict=True)}

    training, held_out = problems(False), problems(True)
    assert (len(training), len(held_out)) == (5741, 566)
    assert not training & held_out
    assert len(split(False)) + len(split(True)) == len(all_solutions())


def test_tokenizer_gives_a_word_a_token_and_returns_the_text():
    words, solutions = tokenizer(), sample()
    for text in (*solutions.prompts(), *solutions.completions()):
        ids = words.encode(text)
        assert ids == [IDS[word] for word in text.split()]
        assert words.decode(ids) == text


def test_encoded_is_what_the_tokenizer_says():
    prompts = sample().prompts()
    assert torch.equal(encoded(prompts), tokenizer()(prompts, return_tensors="pt").input_ids)


@pytest.mark.parametrize("numbers", [(3,), (2, 3)])
def test_base_training_lowers_the_loss(numbers: tuple[int, ...]):
    settings = BaseSettings(right_steps=40, wrong_steps=0, batch=16, numbers=numbers)
    losses = list(train(new_model(0), settings))
    assert losses[0] == pytest.approx(np.log(len(VOCABULARY)), abs=0.2)  # uniform over the vocabulary
    assert np.mean(losses[-5:]) < losses[0] - 0.5


def test_base_settings_with_other_values_lie_elsewhere():
    assert BaseSettings().path == BaseSettings(seed=0).path != BaseSettings(seed=1).path
    assert BaseSettings(numbers=(2, 3)).path != BaseSettings().path
    assert BaseSettings().path.name == "d34fadb2"  # a base that takes minutes is not made again


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    new_model(0).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_base_is_an_ordinary_checkpoint(untrained: Path):
    model, words = AutoModelForCausalLM.from_pretrained(untrained), AutoTokenizer.from_pretrained(untrained)
    prompts = ["7 3 12 > 22 :"]
    ids = model.generate(**words(prompts, return_tensors="pt"), do_sample=False, max_new_tokens=3)
    assert ids[0, :6].tolist() == encoded(prompts)[0].tolist()


def tiny_run(**settings) -> LabRun:
    small = {"max_steps": 2, "per_device_train_batch_size": 16, "probe_sequences": 4}
    return LabRun(name="tiny", settings={**small, **settings}, rollouts=1, samples=1)


def test_run_is_recorded_and_not_repeated(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = perform(tiny_run(), untrained)
    records = read_steps(path)
    assert len(records) == 2
    # An untrained model is nearly uniform over the vocabulary, and never right.
    assert records[0]["metrics"]["entropy/mean"] == pytest.approx(np.log(len(VOCABULARY)), abs=0.1)
    assert records[0]["metrics"]["reward/mean"] == read_evals(path)[-1]["metrics"]["heldout/reward"] == 0.0
    before = (path / "steps.jsonl").read_bytes()
    assert (perform(tiny_run(), untrained) / "steps.jsonl").read_bytes() == before
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        perform(tiny_run(learning_rate=1.0), untrained)


def test_held_out_problems_on_the_way_change_nothing_in_the_training(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    plain = replace(tiny_run(max_steps=8), rollouts=2)
    asked = replace(plain, name="asked", stops=(0, 1), samples=4)
    steps = []
    for run in (plain, asked):
        perform(run, untrained)
        metrics = [step["metrics"].items() for step in read_steps(run.path)]
        steps.append([{k: v for k, v in step if not k.startswith("time/")} for step in metrics])
    assert steps[0] == steps[1] and len(steps[0]) == 8
    record = read_record(asked)
    assert list(record.stops) == ["0", "1"] and record.stops["1"].keys() == {"1", "2", "4"}
    assert read_record(plain).stops == {} and len(record.pass_at) == 3


def test_a_run_without_its_last_evaluation_is_not_finished(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run = replace(tiny_run(), stops=(0,))
    path = perform(run, untrained)
    assert finished(run)
    whole = (path / "evals.jsonl").read_text().splitlines()
    (path / "evals.jsonl").write_text(whole[0] + "\n")
    assert len(whole) == 2 and not finished(run)


def test_interrupted_run_starts_again(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run()
    perform(run, untrained)
    whole = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**whole, "status": "running"}))
    assert not finished(run)
    perform(run, untrained)
    assert finished(run) and len(read_steps(run.path)) == 2


def test_record_holds_what_was_run(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run(learning_rate=1e-3, warmup_steps=0)
    perform(run, untrained)
    record, steps = read_record(run), read_steps(run.path)
    metrics = [step["metrics"] for step in steps]
    assert record.entropy == pytest.approx([sum(m["entropy/mean"] for m in metrics) / 2])
    assert record.seconds == pytest.approx([sum(m["time/step"] for m in metrics)])
    assert record.reward == (0.0,) and record.pass_at == {"1": 0.0}
    assert len(record.made) == 1 and len(record.grad_norm) == 2


def test_other_runs_are_read_by_their_names(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tiny_run(controls=[{"name": "kl_cov", "fraction": 0.1}])
    perform(run, untrained)
    for name in ("kl-cov-seed3", "grpo-seed3", "unknown-seed3", "kl-cov-seedx"):
        shutil.copytree(run.path, tmp_path / "others" / name)
    (tmp_path / "others/grpo-seed3/run.json").write_text('{"status": "running"}')
    (found,) = read_others(tmp_path / "others")
    assert (found.name, found.seed, found.prompts) == ("kl-cov", 3, HELD_OUT_PROMPTS)
    assert found.entropy == read_record(run).entropy
    assert "kl_cov" in json.dumps(found.settings)


@pytest.mark.slow
def test_pool_makes_what_is_missing_and_says_what_failed(
    untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    BASES[(3,)].path.parent.mkdir(parents=True)
    shutil.copytree(untrained, BASES[(3,)].path)
    good = tiny_run()
    bad = replace(tiny_run(num_generations=1), name="bad")
    assert list(conduct([good, bad], 1)) == ["compare-bad-seed0"]
    assert finished(good) and not finished(bad)
    before = (good.path / "steps.jsonl").stat().st_mtime_ns
    assert list(conduct([good, bad], 1)) == ["compare-bad-seed0"]
    assert (good.path / "steps.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        conduct([tiny_run(learning_rate=1.0)], 1)


@pytest.mark.parametrize("name", ALL)
def test_methods_are_valid_settings(name: str):
    """Controls and thermostats are built when the configuration is made, for every value of a knob too."""
    method = ALL[name]
    turned = method.knob.settings.values() if method.knob else ()
    for wanted in (method.settings, *turned):
        args = config(LabRun(name=name, algorithm=method.algorithm, settings=wanted))
        assert [control.name for control in args.control_list] == [c["name"] for c in wanted.get("controls", [])]
        assert (args.thermostat_config is not None) == ("thermostat" in wanted)
        assert args.updates_per_rollout == UPDATES


@pytest.mark.parametrize("name", METHODS)
def test_methods_recipes_are_there(name: str):
    recipe = METHODS[name].recipe
    assert not recipe or (Path(__file__).parents[1] / "recipes" / recipe).exists()


@pytest.mark.parametrize(("size", "minutes", "bases"), [(FULL, 60, 2), (QUICK, 5, 0)])
def test_plan_fits_into_its_time(size, minutes: int, bases: int):
    """On two cores, where two runs at once take 1.17 times as long as one alone (LOG.md).   bases: to be made, too."""
    runs = plan(size)
    assert len({run.path for run in runs}) == len(runs)
    assert (sum(map(seconds, runs)) + bases * BASE) * 1.17 / 2 / 60 < minutes


def test_plan_compares_every_method_over_five_seeds_and_turns_every_knob():
    runs = plan(FULL)
    assert len({run.seed for run in runs if run.part == "compare"}) >= 5
    assert {run.name for run in runs if run.part == "compare"} == set(METHODS)
    turned = {run.name.partition("=")[0] for run in runs if run.part == "knob"}
    assert turned == set(METHODS) - {"grpo"}
    asked = {run.name: run.stops for run in runs if run.part == "compare" and run.stops}
    assert asked.pop("grpo") == tuple(range(0, 100, 10))
    assert asked == {name: (rollouts,) for name, rollouts in AT_EQUAL_COMPUTE.items()}
    for name in turned:
        assert len({METHODS[name].knob.own, *METHODS[name].knob.settings}) == 3
