"""Checkpoint choice: what is sampled and measured, and the command as a user runs it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from rlvr.cli import main
from rlvr.errors import ConfigError
from rlvr.trainers.checkpoint_choice import ChoiceConfig, find_checkpoints
from rlvr.trainers.checkpoint_ranking import verdict
from rlvr.trainers.checkpoint_sampling import InverseCdf, Samples, completion_entropy, load_model, read_prompts, sample

TASK = ["--task", "chain_sum", "--verifier_workers", "1", "--prompts", "3", "--samples", "2", "--max-tokens", "4"]


@pytest.fixture(scope="module")
def scaled_dir(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder of three checkpoints that differ in the scale of the final norm, so in that of their logits."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sft")
    for step, scale in ((9, 0.5), (10, 1.0), (100, 4.0)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model.model.norm.weight.data *= scale
        shutil.copytree(tiny_model_dir, folder / f"checkpoint-{step}")
        model.save_pretrained(folder / f"checkpoint-{step}")
    return folder


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_completion_entropy_is_that_of_a_loop_over_the_logits(tiny_model_dir, temperature):
    model = load_model(tiny_model_dir).double()
    prompt, completions = [5, 9, 40], [[7, 8, 3], [100], [2, 60, 61, 62, 4]]
    found = completion_entropy(model, prompt, completions, temperature)
    for sequence, total in zip(completions, found.tolist(), strict=True):
        expected = 0.0
        for t in range(len(sequence)):
            with torch.no_grad():
                z = model(torch.tensor([[*prompt, *sequence[:t]]])).logits[0, -1]
            p = torch.softmax(z / temperature, -1)
            expected -= float((p * p.log()).sum())
        assert total == pytest.approx(expected, abs=1e-10)


def test_completion_entropy_does_not_depend_on_how_the_rows_are_cut(tiny_model_dir, monkeypatch):
    model = load_model(tiny_model_dir).double()
    completions = [[7, 8, 3], [100], [2, 60, 61, 62, 4]]
    whole = completion_entropy(model, [5, 9, 40], completions, 1.0)
    monkeypatch.setattr("rlvr.trainers.checkpoint_sampling.MAX_LOGITS", 1)
    monkeypatch.setattr("rlvr.trainers.checkpoint_sampling.CHUNK", 2)
    torch.testing.assert_close(completion_entropy(model, [5, 9, 40], completions, 1.0), whole, rtol=0, atol=1e-10)


def test_inverse_cdf_draws_each_token_as_often_as_its_probability_says():
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0, -math.inf])
    count = 4000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5)[:, None] / count  # evenly spaced: no luck in the shares
    ids = torch.zeros(count, 3, dtype=torch.int64)
    chosen = InverseCdf(draws, 3, 0.5)(ids, logits.expand(count, -1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=5) / count
    expected = torch.softmax(logits.double() / 0.5, -1)
    assert shares[1] == shares[4] == 0
    assert float((shares - expected).abs().max()) <= 1 / count


def test_inverse_cdf_never_draws_an_impossible_token_at_the_ends():
    draws = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(2, -1)
    assert InverseCdf(draws, 1, 1.0)(torch.zeros(2, 1, dtype=torch.int64), logits).argmax(-1).tolist() == [1, 2]


def sampled(path: Path, batch_size: int = 64, seed: int = 0) -> Samples:
    reader = read_prompts(path, ["What is 1 + 1?", "Hi", "a longer prompt than these"], None)
    return sample(load_model(path), reader, samples=4, max_tokens=6, temperature=1.0, batch_size=batch_size, seed=seed)


def test_sample_is_the_same_in_any_batches_and_differs_by_seed(tiny_model_dir):
    whole = sampled(tiny_model_dir)
    assert sampled(tiny_model_dir, batch_size=5).texts == whole.texts
    assert sampled(tiny_model_dir, seed=1).texts != whole.texts
    assert len(set(whole.texts)) > 6, "completions of a prompt have draws of their own"


def test_sample_uses_the_same_random_numbers_for_every_checkpoint(tiny_model_dir, tmp_path):
    """A tiny change of the weights leaves nearly all tokens as they were, which fresh draws would not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model.norm.weight.data *= 1.0001
    shutil.copytree(tiny_model_dir, tmp_path / "near")
    model.save_pretrained(tmp_path / "near")
    assert (
        sum(a == b for a, b in zip(sampled(tiny_model_dir).texts, sampled(tmp_path / "near").texts, strict=True)) >= 11
    )


def test_sample_ignores_the_checkpoints_own_sampling_settings_except_end_tokens(tiny_model_dir, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(tiny_model_dir, odd)
    settings = json.loads((odd / "generation_config.json").read_text())
    (odd / "generation_config.json").write_text(
        json.dumps({**settings, "do_sample": True, "top_k": 1, "repetition_penalty": 9.0})
    )
    assert sampled(odd).texts == sampled(tiny_model_dir).texts
    (odd / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": list(range(259))}))
    assert sampled(odd).length.tolist() == [1] * 12 and not sampled(odd).truncated.any()


def test_sample_ends_at_the_stop_token_and_is_not_cut_then(tiny_model_dir):
    def sampled_until(stop: str | None) -> Samples:
        reader = read_prompts(tiny_model_dir, ["Hi", "What is 1 + 1?"], stop)
        model = load_model(tiny_model_dir)
        return sample(model, reader, samples=16, max_tokens=12, temperature=1.0, batch_size=64, seed=0)

    free = sampled_until(None)
    letter = max("abcdefghijklmnopqrstuvwxyz", key=lambda c: sum(c in text for text in free.texts))
    ended = sampled_until(letter)
    holds = [letter in text for text in free.texts]
    assert any(holds) and not all(holds)
    for i, text in enumerate(free.texts):
        if holds[i]:
            assert ended.texts[i] == text.partition(letter)[0] + letter and not ended.truncated[i]
            assert ended.length[i] <= free.length[i] and ended.entropy[i] <= free.entropy[i] + 1e-6
        else:
            assert (ended.texts[i], ended.length[i], ended.truncated[i]) == (text, free.length[i], free.truncated[i])


# --- the command -----------------------------------------------------------------------------------------------------


def test_select_checkpoint_measures_ranks_and_writes(scaled_dir, tmp_path, capsys):
    output = tmp_path / "ranking.json"
    words = ["select-checkpoint", str(scaled_dir), *TASK, "--output", str(output)]
    assert main([*words, "--band", "0.5", "4.0"]) == 0
    first = capsys.readouterr()
    record = json.loads(output.read_text())
    ranking = record["ranking"]
    entropies = {Path(row["checkpoint"]).name: row["entropy"] for row in ranking}
    assert entropies["checkpoint-9"] > entropies["checkpoint-10"] > entropies["checkpoint-100"] > 0
    assert [row["verdict"] for row in ranking] == [verdict(row["entropy"], (0.5, 4.0)) for row in ranking]
    assert record["task"]["task"] == "chain_sum" and set(ranking[0]["pass_at_k"]) == {"1", "2"}
    assert [f"[{i}/3] {scaled_dir}/checkpoint-{step}" in first.err for i, step in ((1, 9), (2, 10), (3, 100))] == [
        True
    ] * 3
    for row in ranking:
        assert f"{row['entropy']:.3f} ± {row['entropy_ci95']:.3f}" in first.out
    assert main([*words, "--band", "0.5", "4.0"]) == 0
    assert capsys.readouterr().out == first.out


def test_select_checkpoint_judges_with_the_tasks_verifier(tiny_model_dir, capsys):
    words = ["select-checkpoint", *TASK, "--reward", "tests.toy_verifiers:share_of_ascii", str(tiny_model_dir)]
    assert main([*words, "--pass-reward", "0.01"]) == 0
    some = capsys.readouterr().out.splitlines()[4].split()
    assert main([*words, "--pass-reward", "0.0"]) == 0
    every = capsys.readouterr().out.splitlines()[4].split()
    assert every[-1] == "1.00" and some[:4] == every[:4] and 0 < float(some[-1]) <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CKPT", "--tsak", "chain_sum"], "flag='--tsak' is not known; did you mean --task"),
        (["CKPT"], "task is not set"),
        (["CKPT", "--task", "chain_summ"], "task='chain_summ' is not known"),
        (["CKPT", "--task", "chain_sum", "--task_kwargs", '{"terms": 1}'], "task_kwargs='terms' is not known"),
        (["CKPT", "--task", "chain_sum", "--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["CKPT", "--task", "chain_sum", "--samples", "0"], "samples=0 must be at least 1"),
        (["CKPT", "--task", "chain_sum", "--prompts", "1"], "prompts=1 is too few"),
        (["CKPT", "--task", "chain_sum", "--temperature", "0"], "temperature=0.0 must be above 0"),
        (["CKPT", "--task", "chain_sum", "--band", "0.5", "0.3"], "band=0.5 0.3 must be two numbers"),
        (["CKPT", "--task", "chain_sum", "--stop", "ab"], "stop='ab' is 2 tokens"),
        (
            ["CKPT", "--task", "chain_sum", "--output", "/no/such/x.json"],
            "output='/no/such/x.json' lies in a directory",
        ),
        (["CKPT", "--task", "chain_sum", "CKPT"], "belongs to no flag"),
        (["--task", "chain_sum"], "the following arguments are required: CKPT"),
        (["/no/such/dir", "--task", "chain_sum"], "CKPT='/no/such/dir' is not a directory"),
        (["EMPTY", "--task", "chain_sum"], "holds no checkpoint"),
    ],
)
def test_select_checkpoint_refuses_bad_input_in_one_line_before_a_model_is_loaded(
    words, message, tiny_model_dir, tmp_path, capsys
):
    broken, empty = tmp_path / "broken", tmp_path / "empty"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"")  # loading it would fail with a message of its own
    empty.mkdir()
    places = {"CKPT": str(broken), "EMPTY": str(empty)}
    assert main(["select-checkpoint", *(places.get(word, word) for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and message in captured.err


def test_read_prompts_needs_a_tokenizer_and_for_messages_a_chat_template(tiny_model_dir, tmp_path):
    messages = [[{"role": "user", "content": "Hi"}]]
    reader = read_prompts(tiny_model_dir, messages, None)
    assert reader.tokenizer.decode(reader.prompt_ids[0]) == "user: Hi\nassistant: "
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model_dir, plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        read_prompts(plain, messages, None)
    for path in plain.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        read_prompts(plain, ["Hi"], None)


def test_find_checkpoints_in_natural_order_each_once(scaled_dir, tiny_model_dir):
    numbered = [scaled_dir / f"checkpoint-{step}" for step in (9, 10, 100)]
    assert find_checkpoints([str(scaled_dir)]) == numbered
    assert find_checkpoints([f"{scaled_dir}/checkpoint-*", str(scaled_dir), str(numbered[1])]) == numbered
    assert find_checkpoints([str(tiny_model_dir), str(numbered[2])]) == [tiny_model_dir, numbered[2]]


def test_find_checkpoints_takes_the_final_model_beside_its_checkpoints(scaled_dir, tmp_path):
    for name in ("", "checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").touch()
        (tmp_path / name / "model.safetensors").touch()
    assert find_checkpoints([str(tmp_path)]) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-10", tmp_path]


def test_find_checkpoints_names_one_whose_weights_are_missing(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / "checkpoint-1" / "adapter_config.json").touch()
    (tmp_path / "checkpoint-1" / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"checkpoint-2' has no config\.json with weights"):
        find_checkpoints([str(tmp_path)])


def test_choice_config_is_frozen_and_has_the_papers_band():
    assert ChoiceConfig().band == [0.3, 0.5]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ChoiceConfig().samples = 3
