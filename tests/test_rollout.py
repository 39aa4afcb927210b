"""Rollout: weights as the engine names them, how far engine and trainer are apart, and the real vLLM on a CPU.

The engine runs in a child process (this file as a script), because vLLM changes the process that imports it; the child
measures and prints numbers, the tests here judge them.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlvr.errors import ConfigError
from rlvr.rollout import cpu_engine
from rlvr.rollout.cpu_engine import CpuEngine, EngineOptions, Sampling, require_vllm
from rlvr.rollout.parity import EngineMismatchError, check_parity, default_tolerance, measure_mismatch
from rlvr.rollout.weights import merged_parameters
from rlvr.types import LocalReduce

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.7
PROMPTS = [[5, 9, 20, 33, 7], [40, 41, 42], list(range(10, 80)), [5, 9, 20, 33, 7]]

# ------------------------------------------------------------------------------------------------ parity


def test_mismatch_by_hand() -> None:
    trainer = torch.tensor([-1.0, -2.0, -3.0])
    engine = torch.tensor([-1.5, -2.0, -2.0])  # delta = 0.5, 0, -1
    got = measure_mismatch(trainer, engine).metrics()
    assert got["mismatch/abs_logp_mean"] == pytest.approx(1.5 / 3, abs=1e-12)
    assert got["mismatch/abs_logp_max"] == 1.0
    k3 = (math.exp(0.5) - 1 - 0.5) + 0 + (math.exp(-1) - 1 + 1)
    assert got["mismatch/kl"] == pytest.approx(k3 / 3, abs=1e-12)
    assert got["mismatch/ratio_mean"] == pytest.approx((math.exp(0.5) + 1 + math.exp(-1)) / 3, abs=1e-12)
    assert got["mismatch/ratio_min"] == pytest.approx(math.exp(-1), abs=1e-12)
    assert got["mismatch/ratio_max"] == pytest.approx(math.exp(0.5), abs=1e-12)


def test_mismatch_does_not_depend_on_how_tokens_are_cut() -> None:
    torch.manual_seed(0)
    trainer, engine = torch.randn(2, 50, dtype=torch.float64)
    engine[3] = torch.nan
    whole = measure_mismatch(trainer, engine)
    parts = [measure_mismatch(trainer[i:j], engine[i:j]) for i, j in ((0, 7), (7, 7), (7, 50))]
    added = (parts[0] + parts[1] + parts[2]).reduced(LocalReduce())
    assert torch.allclose(added.sums, whole.sums, rtol=0, atol=1e-12)
    assert torch.equal(added.maxima, whole.maxima)
    assert (whole.num_tokens, whole.num_nonfinite) == (49, 1)


def test_mismatch_of_no_token_is_neutral() -> None:
    empty = measure_mismatch(torch.empty(0), torch.empty(0))
    assert empty.metrics() == {}
    check_parity(empty, 0.1, step=0)
    with pytest.raises(ValueError, match="one shape"):
        measure_mismatch(torch.zeros(2), torch.zeros(3))


def test_check_parity_accepts_rounding_and_stops_at_a_difference() -> None:
    logps = torch.tensor([-1.0, -2.0])
    check_parity(measure_mismatch(logps, logps + 9e-5), default_tolerance("float32"), step=3)
    with pytest.raises(EngineMismatchError, match=r"step 3: .*0\.2 nats.*stale weights.*mismatch_tolerance"):
        check_parity(measure_mismatch(logps, logps + 0.2), default_tolerance("bfloat16"), step=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_check_parity_stops_at_what_is_not_finite(bad: float) -> None:
    logps = torch.tensor([-1.0, -2.0])
    broken = torch.tensor([-1.0, bad])
    with pytest.raises(EngineMismatchError, match="1 of 2 sampled tokens"):
        check_parity(measure_mismatch(logps, broken), 0.1, step=0)
    with pytest.raises(EngineMismatchError):
        check_parity(measure_mismatch(broken, logps), 0.1, step=0)


def test_default_tolerance_knows_its_dtypes() -> None:
    assert default_tolerance("float32") < default_tolerance("bfloat16") == default_tolerance("float16")
    with pytest.raises(ValueError, match="dtype='int8'"):
        default_tolerance("int8")


# ------------------------------------------------------------------------------------------------ weights


def with_lora(model: nn.Module, **settings: object) -> nn.Module:
    """A LoRA model whose B is random, so that the adapters matter."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **settings}))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return peft_model.eval()


def load(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits_with(state: dict[str, Tensor], path: Path, ids: Tensor) -> Tensor:
    model = load(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model(ids).logits.detach()


def test_merged_parameters_of_a_plain_model_are_its_parameters(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    assert [(n, id(p)) for n, p in merged_parameters(model)] == [(n, id(p)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_merged_lora_is_the_lora_model_and_leaves_it_alone(tiny_model_dir: Path, settings: dict) -> None:
    torch.manual_seed(0)
    model = with_lora(load(tiny_model_dir), **settings)
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = dict(merged_parameters(model))
    assert set(merged) == set(dict(load(tiny_model_dir).named_parameters()))
    assert [name for name, _ in merged_parameters(model)] == list(merged)  # also when each tensor is dropped at once
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model(ids).logits
    assert (logits_with(merged, tiny_model_dir, ids) - expected).abs().max() < 1e-4
    assert (load(tiny_model_dir)(ids).logits - expected).abs().max() > 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merged_parameters_may_be_left_early(tiny_model_dir: Path) -> None:
    model = with_lora(load(tiny_model_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    iterator = merged_parameters(model)
    for _ in range(4):
        next(iterator)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    del iterator
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_adapting_one_of_two_tied_embeddings_is_refused(tiny_model_dir: Path, settings: dict) -> None:
    with pytest.raises(ConfigError, match="tied embeddings"):
        list(merged_parameters(with_lora(load(tiny_model_dir), **settings)))


def test_partitioned_parameters_are_refused() -> None:
    model = nn.Linear(3, 2)
    model.weight.data = torch.empty(0)
    model.weight.ds_id, model.weight.ds_numel = 0, 6
    with pytest.raises(RuntimeError, match="weight is partitioned by ZeRO stage 3"):
        list(merged_parameters(model))


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sampling(max_tokens=0), "max_tokens=0"),
        (lambda: Sampling(max_tokens=8, temperature=0.0), "temperature=0.0"),
        (lambda: Sampling(max_tokens=8, extra={"n": 8, "seed": 1}), r"\['n', 'seed'\]"),
        (lambda: EngineOptions(dtype="float16"), "dtype='float16'"),
        (lambda: EngineOptions(block_size=16), "block_size=16"),
        (lambda: CpuEngine("x", list, Sampling(max_tokens=64), EngineOptions(max_model_len=64)), "max_model_len=64"),
    ],
)
def test_bad_settings_say_their_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_missing_vllm_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed") as caught:
        require_vllm()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ the real engine


@pytest.fixture(scope="module")
def measured(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the child process measured, per checkpoint."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    untied = _save_untied(tiny_model_dir, tmp_path_factory.mktemp("tiny-qwen2"))
    out = tmp_path_factory.mktemp("measured") / "out.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(out), str(tiny_model_dir), str(untied)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(out.read_text())


BOTH = pytest.mark.parametrize("kind", ["tied", "untied"])


@BOTH
def test_engine_agrees_with_the_model_after_each_sync(measured: dict, kind: str) -> None:
    assert measured[kind]["synced"] <= 1e-4
    assert measured[kind]["synced_again"] <= 1e-4


@BOTH
def test_engine_without_sync_is_found_out(measured: dict, kind: str) -> None:
    assert measured[kind]["stale"] > 0.5
    assert measured[kind]["other_temperature"] > 0.1


@BOTH
def test_engine_samples_from_a_merged_lora_model(measured: dict, kind: str) -> None:
    assert measured[kind]["lora_unmerged"] > 0.1
    assert measured[kind]["lora"] <= 1e-4


def test_engine_refuses_an_incomplete_sync(measured: dict) -> None:
    assert "left 1 engine weights as they were, first ['model.norm.weight']" in measured["untied"]["incomplete"]


def test_engine_refuses_prompts_that_vllm_would_cut_short(measured: dict) -> None:
    assert "raise vllm_max_model_length" in measured["untied"]["too_long"]


def test_seeded_calls_repeat_and_siblings_differ(measured: dict) -> None:
    assert measured["untied"]["repeated"]
    assert measured["untied"]["next_call_differs"]
    assert measured["untied"]["siblings"] == 8


def test_stop_token_ends_the_completion_and_stays_in_it(measured: dict) -> None:
    assert measured["untied"]["stopped"]


def test_engine_leaves_the_training_process_as_it_was(measured: dict) -> None:
    for kind in ("tied", "untied"):
        assert measured[kind]["environment"] == []
        assert measured[kind]["threads"] == [1, 2, 1]
        assert measured[kind]["generators_kept"]
        assert measured[kind]["process_group_after_close"] is False


@pytest.mark.slow
def test_engine_of_each_rank_keeps_the_process_group(tiny_model_dir: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, str(tmp_path), "ranks", str(tiny_model_dir)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["sum"] for rank in ranks] == [2.0, 2.0]  # of ones, after the engines are closed
    assert [rank["local_world_size"] for rank in ranks] == ["2", "2"]
    assert max(rank["synced"] for rank in ranks) <= 1e-4


def _save_untied(tied: Path, path: Path) -> Path:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tied)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Probe:
    """One engine in the child process, following whichever model it is told to."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load(path)
        self.parameters: Callable[[], Iterable[tuple[str, Tensor]]] = lambda: merged_parameters(self.model)
        sampling = Sampling(max_tokens=12, temperature=TEMPERATURE, seed=5)
        options = EngineOptions(max_model_len=128, kv_cache_gib=0.05)
        self.engine = CpuEngine(path, lambda: self.parameters(), sampling, options)

    def difference(self, temperature: float = TEMPERATURE) -> float:
        """Largest |engine - model| log-prob of sampled tokens, nats; prompts of all calls are the same."""
        _, completions, rollout, _ = self.engine.generate(PROMPTS, None, 1)
        worst = 0.0
        for prompt, ids, logps in zip(PROMPTS, completions, rollout, strict=True):
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            worst = max(worst, float((expected - torch.tensor(logps)).abs().max()))
        return worst

    def perturb(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def syncs(self) -> dict:
        got: dict = {}
        self.perturb(1)
        got["stale"] = self.difference()
        self.engine.sync_weights()
        got["synced"] = self.difference()
        got["other_temperature"] = self.difference(temperature=1.0)
        self.perturb(2)
        self.engine.sync_weights()
        got["synced_again"] = self.difference()
        self.model = with_lora(self.model)
        got["lora_unmerged"] = self.difference()
        self.engine.sync_weights()
        got["lora"] = self.difference()
        return got

    def draws(self) -> dict:
        call = self.engine.num_calls
        first = self.engine.generate([PROMPTS[0]] * 8, None, 8)[1]
        second = self.engine.generate([PROMPTS[0]] * 8, None, 8)[1]
        self.engine.num_calls = call
        again = self.engine.generate([PROMPTS[0]] * 8, None, 8)[1]
        stop = first[0][2]
        self.engine.sampling = Sampling(max_tokens=12, seed=5, extra={"stop_token_ids": [stop]})
        stopped = self.engine.generate([PROMPTS[0]] * 32, None, 8)[1]
        ends = [ids for ids in stopped if stop in ids]
        return {
            "repeated": first == again,
            "next_call_differs": first != second,
            "siblings": len({tuple(ids) for ids in first}),
            "stopped": bool(ends) and all(ids.index(stop) == len(ids) - 1 for ids in ends),
        }

    def refusals(self) -> dict:
        got = {}
        complete = self.parameters
        self.parameters = lambda: ((name, p) for name, p in complete() if name != "model.norm.weight")
        try:
            self.engine.sync_weights()
        except RuntimeError as error:
            got["incomplete"] = str(error)
        try:
            self.engine.generate([[5] * 120], None, 1)
        except ValueError as error:
            got["too_long"] = str(error)
        return got


def _measure(path: Path) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    environment, generator = dict(os.environ), torch.get_rng_state()
    probe = Probe(path)
    kept = torch.equal(generator, torch.get_rng_state())
    leaked = {name for name in os.environ if os.environ[name] != environment.get(name)} | set(environment) - set(
        os.environ
    )
    threads = [torch.get_num_threads()]
    torch.set_num_threads(2)  # vLLM makes this a no-op
    threads.append(torch.get_num_threads())
    torch.set_num_threads(1)
    got = probe.syncs() | probe.draws() | probe.refusals()
    threads.append(torch.get_num_threads())
    probe.engine.close()
    probe.engine.close()
    return got | {
        # torch names its compile cache in the environment by itself.
        "environment": sorted(n for n in leaked if not n.startswith("VLLM_") and n != "TORCHINDUCTOR_CACHE_DIR"),
        "threads": threads,
        "generators_kept": kept,
        "process_group_after_close": torch.distributed.is_initialized(),
    }


def _measure_rank(path: Path) -> tuple[int, dict]:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=100))
    rank = torch.distributed.get_rank()
    probe = Probe(path)
    probe.perturb(rank)
    probe.engine.sync_weights()
    got: dict = {"synced": probe.difference()}
    if rank == 0:  # unequal work: no rank may wait for another inside the engine
        probe.difference()
    probe.engine.close()
    one = torch.ones(1)
    torch.distributed.all_reduce(one)
    got |= {"sum": one.item(), "local_world_size": os.environ["LOCAL_WORLD_SIZE"]}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return rank, got


if __name__ == "__main__":
    out = Path(sys.argv[1])
    if sys.argv[2] == "ranks":
        rank, result = _measure_rank(Path(sys.argv[3]))
        (out / f"{rank}.json").write_text(json.dumps(result))
    else:
        kinds = zip(("tied", "untied"), sys.argv[2:], strict=True)
        out.write_text(json.dumps({kind: _measure(Path(path)) for kind, path in kinds}))
