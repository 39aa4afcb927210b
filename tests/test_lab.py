"""The laboratory: its verifier is exact, its problems are split cleanly, and the product's trainer runs in it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_steps
from scripts.lab.base import BaseSettings, base_model, encoded, new_model, tokenizer, train
from scripts.lab.countdown import IDS, VOCABULARY, all_solutions, draw, reward, split, verify
from scripts.lab.experiments import BAND, METHODS, lab_run
from scripts.lab.results import Band, result
from scripts.lab.runs import UPDATES, LabRun, config, perform

ROOT = Path(__file__).parents[1]
NUMBERS, TARGET = (7, 3, 12), 22
SOLUTION = "7 + 3 = 10 10 + 12 = 22 <eos>"


def sample(count: int = 300):
    return draw(all_solutions(), count, np.random.default_rng(0))


def test_every_solution_is_verified():
    solutions = sample()
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


def test_base_training_lowers_the_loss():
    settings = BaseSettings(right_steps=40, wrong_steps=0, batch=16)
    losses = list(train(new_model(0), settings))
    assert losses[0] == pytest.approx(np.log(len(VOCABULARY)), abs=0.2)  # uniform over the vocabulary
    assert np.mean(losses[-5:]) < losses[0] - 0.5


def test_base_settings_with_other_values_lie_elsewhere():
    assert BaseSettings().path == BaseSettings(seed=0).path != BaseSettings(seed=1).path


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
    small = {"max_steps": 2, "per_device_train_batch_size": 16, "num_generations_eval": 1}
    return LabRun(name="tiny", settings={**small, **settings}, rollouts=1)


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


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_valid_settings(name: str):
    """Controls and thermostats are built when the configuration is made."""
    wanted = METHODS[name]
    args = config(lab_run(name, 0))
    assert [control.name for control in args.control_list] == [c["name"] for c in wanted.get("controls", [])]
    assert (args.thermostat_config is not None) == ("thermostat" in wanted)
    assert args.updates_per_rollout == UPDATES


def test_result_by_hand(tmp_path: Path):
    """20 rollouts of 2 steps; entropy falls by .02 per rollout and .01 within it, reward is linear in it."""
    for step in range(1, 41):
        made, entropy = step % 2 == 1, 0.60 - 0.02 * ((step - 1) // 2)
        metrics = {"entropy/mean": entropy + (0.005 if made else -0.005), "time/rollout": float(made)}
        append(tmp_path / "steps.jsonl", step, metrics | {"reward/mean": 1 - entropy})
    append(tmp_path / "evals.jsonl", 40, {f"heldout/pass_at_{k}": k / 16 for k in (1, 8, 16)})
    found = result(tmp_path, 2, Band(0.30, 0.391))
    # Rollout i has entropy .60 - .02 i. At 10 % two are over: .60 and .58; then the last five of 5, 10 and 20.
    assert found.entropy == pytest.approx((0.59, 0.56, 0.46, 0.26), abs=1e-12)
    # Of rollouts 10 to 19, with .40, .38, ... .22, those with .38 to .30 lie inside.
    assert found.inside == 0.5
    assert found.reward == pytest.approx(1 - 0.31, abs=1e-12)  # the mean of .40, .38, ... .22 is .31
    assert found.pass_at == {"1": 1 / 16, "8": 0.5, "16": 1.0}
    assert found.r2_linear == pytest.approx(1.0, abs=1e-12) and found.r2 < 1 - 1e-6
    assert found.explained is None


def append(path: Path, step: int, metrics: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "metrics": metrics}) + "\n")


def numbers(path: Path) -> list[dict[str, float]]:
    """What was measured, without the times."""
    steps = [record["metrics"].items() for record in read_steps(path)]
    return [{name: value for name, value in step if not name.startswith("time/")} for step in steps]


@pytest.fixture
def trained_base(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base model; kept between runs of the tests, since it takes minutes."""
    monkeypatch.chdir(ROOT)
    return base_model(BaseSettings()).resolve()


@pytest.mark.slow
def test_runs_repeat_bit_by_bit(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured = []
    for again in ("first", "second"):
        monkeypatch.chdir(tmp_path)
        run = replace(lab_run("thermostat-kl-cov", 0), name=again, rollouts=5)
        measured.append(numbers(perform(run, trained_base)))
    assert measured[0] == measured[1]


@pytest.mark.slow
def test_collapse_is_real_and_covariance_controls_slow_it(
    trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    found = {
        name: result(perform(lab_run(name, 0), trained_base), UPDATES, BAND) for name in ("grpo", "clip-cov", "kl-cov")
    }
    plain = found["grpo"]
    assert plain.entropy[-1] < 0.20 and plain.reward > 0.65 and plain.r2 > 0.95
    for name in ("clip-cov", "kl-cov"):
        assert found[name].entropy[-1] - plain.entropy[-1] > 0.02


@pytest.mark.slow
def test_a_critic_earns_no_less_than_groups(trained_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At equal samples, up to what seeds differ by; values explain something that prompts and a constant do not."""
    monkeypatch.chdir(tmp_path)
    grpo, ppo = (result(perform(lab_run(name, 0), trained_base), UPDATES, BAND) for name in ("grpo", "ppo-no-groups"))
    assert ppo.reward > grpo.reward - 0.03 and ppo.entropy[-1] < 0.20
    assert ppo.explained is not None and ppo.explained > 0.05
