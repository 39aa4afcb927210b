"""Run in a process of its own by test_rollout.py: measures the real vLLM engine against the model it follows.

python engine_probe.py OUT.json TIED_MODEL UNTIED_MODEL
torchrun ... engine_probe.py OUT_DIR ranks MODEL
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

from rlvr.rollout.cpu_engine import CpuEngine, EngineOptions, Sampling
from rlvr.rollout.weights import merged_parameters

ROOT = Path(__file__).resolve().parents[1]
TEMPERATURE = 0.7
PROMPTS = [[5, 9, 20, 33, 7], [40, 41, 42], list(range(10, 80)), [5, 9, 20, 33, 7]]


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
