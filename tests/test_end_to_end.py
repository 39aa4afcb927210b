"""The recipe as a user runs it: one command, a run directory, a checkpoint; killed and resumed; refused before
work.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlvr.monitor.records import read_evals, read_run, read_steps, read_tokens, token_steps

ROOT = Path(__file__).parents[1]


def config(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model),
        "dtype": "float32",
        "task": "chain_sum",
        "task_kwargs": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "train_size": 40,
        "heldout_size": 4,
        "reward": "toy_verifiers:share_of_ascii",
        "verifier_workers": 1,
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "num_generations_eval": 2,
        "max_completion_length": 6,
        "num_iterations": 2,
        "max_steps": 8,
        "save_steps": 2,
        "learning_rate": 1.0e-4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "controls": [{"name": "kl_cov", "fraction": 0.1}],
        **changes,
    }


def start(settings: dict[str, Any], folder: Path, *flags: str) -> "subprocess.Popen[str]":
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [
        sys.executable,
        str(ROOT / "recipes" / "grpo.py"),
        "--config",
        str(path),
        *flags,
    ]
    log = open(folder / "log.txt", "a")  # noqa: SIM115  the process owns it
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, cwd=ROOT, env=environment)


def run(settings: dict[str, Any], folder: Path, *flags: str) -> tuple[int, str]:
    code = start(settings, folder, *flags).wait(timeout=300)
    return code, (folder / "log.txt").read_text()


def test_recipe_trains_records_and_saves(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, log = run(config(tiny_model_dir, out), tmp_path)
    assert code == 0, log
    steps = read_steps(out)
    assert [step["step"] for step in steps] == list(range(1, 9))
    for step in steps:
        metrics = step["metrics"]
        assert 0 < metrics["entropy/mean"] < 5.6  # log of the vocabulary of 259
        assert metrics["policy/tokens"] > 0 and metrics["time/update"] > 0
        # 8 completions of at most 6 tokens: a tenth of the tokens, at least one
        assert 1 / 48 <= metrics["kl_cov/selected"] <= 0.1
    assert [step["metrics"]["policy/drift"] > 0 for step in steps] == [
        False,
        True,
    ] * 4  # 0 on a rollout's first update
    assert {"heldout/reward", "heldout/reward_ci95"} <= read_evals(out)[0]["metrics"].keys()
    assert [record["step"] for record in read_evals(out)] == [0, 8]
    assert read_run(out)["status"] == "finished"
    recorded = read_run(out)["config"]
    assert recorded["task_kwargs"]["max_digits"] == 1 and recorded["num_iterations"] == 2 and "lora_r" in recorded
    assert token_steps(out) == [1, 3, 5, 7]  # each rollout once, at its first update
    row = read_tokens(out, 1)[0]
    assert len(row["entropy"]) == len(row["tokens"]) == len(row["token_ids"]) == len(row["drift"])
    assert "one step =" in log and "held-out reward" in log
    assert (out / "report.html").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    text = tokenizer.decode(model.generate(**tokenizer("1 + 1 =", return_tensors="pt"), max_new_tokens=4)[0])
    assert text.startswith("1 + 1 =")


def test_killed_run_resumes_without_losing_or_doubling_a_record(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = config(tiny_model_dir, out, max_steps=30, save_steps=3, heldout_size=0)
    process = start(settings, tmp_path)
    deadline = time.time() + 240
    while len(read_steps(out)) < 5 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_after = len(read_steps(out))
    assert 5 <= killed_after < 30
    assert read_run(out)["status"] == "running"

    code, log = run({**settings, "max_steps": 12}, tmp_path)  # without the flag it is refused, and nothing is touched
    assert code != 0 and "already holds a run" in log and len(read_steps(out)) == killed_after

    code, log = run({**settings, "max_steps": killed_after + 6}, tmp_path, "--resume_from_checkpoint")
    assert code == 0, log
    assert [step["step"] for step in read_steps(out)] == list(range(1, killed_after + 7))
    tokens = [json.dumps(row["sequence"]) + str(step) for step in token_steps(out) for row in read_tokens(out, step)]
    assert len(tokens) == len(set(tokens))
    resumed = read_run(out)["resumed"]
    assert len(resumed) == 1 and resumed[0]["step"] % 3 == 0 and resumed[0]["step"] <= killed_after

    # It is finished now: resuming once more trains nothing and still saves and reports.
    (out / "model" / "model.safetensors").unlink()
    code, log = run({**settings, "max_steps": killed_after + 6}, tmp_path, "--resume_from_checkpoint")
    assert code == 0, log
    assert len(read_steps(out)) == killed_after + 6
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"controls": ["klcov"]}, ("controls", "klcov", "kl_cov")),
        ({"contrlos": ["kl_cov"]}, ("contrlos", "controls")),
        ({"optim": "adamzz"}, ("adamzz", "adamw_torch")),
        ({}, ("model_name_or_path", "no-model")),
        ({"task": "chain_sums"}, ("task", "chain_sums", "chain_sum")),
        ({"num_iterations": 1}, ("kl_cov", "num_iterations")),
        ({"top_entropy_quantile": 0.2}, ("top_entropy_quantile", "0.2", "controls")),
        ({"per_device_train_batch_size": 6}, ("per_device_train_batch_size", "6", "4 and 8")),
        ({"max_completion_length": 0}, ("max_completion_length", "0", "at least 1")),
        ({"reward": "no_such_module:verify"}, ("reward", "no_such_module")),
        ({"train_size": 1}, ("train_dataset", "1 rows", "2 prompts")),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_loaded(
    changes: dict[str, Any],
    parts: tuple[str, ...],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    from rlvr import GRPOConfig, GRPOTrainer
    from rlvr.errors import ConfigError
    from rlvr.trainers.launch import parse_arguments, train

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", load)
    path = tmp_path / "recipe.yaml"
    model = tiny_model_dir if changes else tmp_path / "no-model"
    path.write_text(yaml.safe_dump(config(model, tmp_path / "run", **changes)))
    with pytest.raises(ConfigError) as error:
        train(GRPOTrainer, *parse_arguments(GRPOConfig, ["--config", str(path)]))
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists()
