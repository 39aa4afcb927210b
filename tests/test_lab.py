"""The laboratory: its verifier is exact, its problems are split cleanly, and the product's trainer runs in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlvr.errors import ConfigError
from rlvr.monitor.records import read_evals, read_steps
from scripts.lab.base import BaseSettings, encoded, new_model, tokenizer, train
from scripts.lab.countdown import IDS, VOCABULARY, all_solutions, draw, reward, split, verify
from scripts.lab.results import Band, result
from scripts.lab.runs import UPDATES, LabRun, perform

NUMBERS, TARGET = (7, 3, 12), 22


def sample(count: int = 300):
    return draw(all_solutions(), count, np.random.default_rng(0))


def test_every_solution_is_verified():
    solutions = sample()
    completions = [[IDS[word] for word in text.split()] for text in solutions.completions()]
    assert reward(solutions.prompts(), completions) == [1.0] * len(solutions)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("7 + 3 = 10 10 + 12 = 22 <eos>", 1.0),
        ("3 + 12 = 15 7 + 15 = 22 <eos>", 1.0),
        ("7 + 3 = 10 10 + 12 = 22", 0.0),  # does not end
        ("7 + 3 = 10 10 + 12 = 22 22", 0.0),
        ("7 + 3 = 11 11 + 12 = 23 <eos>", 0.0),  # 7 + 3 is not 11
        ("7 + 3 = 10 10 + 3 = 13 <eos>", 0.0),  # 3 is used twice, 12 never
        ("7 + 7 = 14 14 + 12 = 26 <eos>", 0.0),
        ("10 + 0 = 10 10 + 12 = 22 <eos>", 0.0),  # neither 10 nor 0 is given
        ("12 + 3 = 15 15 - 7 = 8 <eos>", 0.0),  # sound arithmetic, wrong goal
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


def test_verify_allows_a_number_as_often_as_it_is_given():
    assert verify("5 + 5 = 10 10 + 5 = 15 <eos>".split(), (5, 5, 5), 15) == 1.0
    assert verify("5 + 5 = 10 10 + 5 = 15 <eos>".split(), (5, 5, 4), 15) == 0.0


def test_verify_refuses_negative_results():
    assert verify("3 - 7 = -4 12 + -4 = 8 <eos>".split(), NUMBERS, 8) == 0.0


def test_verify_changes_with_every_word():
    """Any other word in any place of a solution makes it wrong."""
    solution = "7 + 3 = 10 10 + 12 = 22 <eos>".split()
    for place in range(len(solution)):
        for word in set(VOCABULARY) - {solution[place]}:
            assert verify([*solution[:place], word, *solution[place + 1 :]], NUMBERS, TARGET) == 0.0


def test_reward_ignores_padding_after_the_end():
    ids = [IDS[word] for word in "7 + 3 = 10 10 + 12 = 22 <eos> <pad> 5".split()]
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
