"""`rlvr serve` and its client on the real vLLM, against the model that the server follows."""

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from engine_probe import PROMPTS, TEMPERATURE, Probe, load
from safetensors.torch import save_file
from server_cases import Server, require_in_step, serving, shared_files
from server_run import trainer

from rlvr.monitor.records import read_steps
from rlvr.rollout.cpu_engine import Sampling
from rlvr.rollout.parity import EngineMismatchError
from rlvr.rollout.server_engine import ServerEngine, ServerOptions
from rlvr.rollout.weights import merged_parameters

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


class ServerProbe(Probe):
    """What engine_probe.py measures of the engine in process, of a server."""

    def __init__(self, path: Path, url: str, **sampling: object) -> None:
        self.path, self.model = path, load(path)
        self.parameters = lambda: merged_parameters(self.model)
        drawn = Sampling(**{"max_tokens": 12, "temperature": TEMPERATURE, "seed": 5, **sampling})
        options = ServerOptions(url=url, timeout=60.0, config=self.model.config.to_dict())
        self.engine = ServerEngine(lambda: self.parameters(), drawn, options)
        self.engine.sync_weights()


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests here; its end, by SIGTERM, leaves no process."""
    before = shared_files()
    with serving(tiny_model_dir, tmp_path_factory.mktemp("serve") / "log") as one:
        yield one
    assert shared_files() <= before


@pytest.fixture
def probe(server: Server, tiny_model_dir: Path) -> ServerProbe:
    return ServerProbe(tiny_model_dir, server.url)


def test_server_agrees_with_the_model_after_each_sync_and_not_without(probe: ServerProbe) -> None:
    found = probe.syncs()  # as in test_rollout.py
    assert max(found["synced"], found["synced_again"], found["lora"]) <= 1e-4
    assert found["stale"] > 0.5 and found["other_temperature"] > 0.1 and found["lora_unmerged"] > 0.1
    assert probe.engine.num_restarts == 0
    assert shared_files() == set()


def test_draws_are_those_of_a_seed_and_siblings_differ(probe: ServerProbe) -> None:
    assert probe.draws() == {"repeated": True, "next_call_differs": True, "siblings": 8, "stopped": True}


def test_draws_follow_the_global_generator(server: Server, tiny_model_dir: Path) -> None:
    engine = ServerProbe(tiny_model_dir, server.url, seed=None).engine
    torch.manual_seed(0)
    first, state = engine.generate(PROMPTS, None, 1)[1], torch.get_rng_state()
    second = engine.generate(PROMPTS, None, 1)[1]
    torch.set_rng_state(state)  # as a run that is resumed
    assert engine.generate(PROMPTS, None, 1)[1] == second != first


def test_more_prompts_than_a_batch_takes_leave_the_engine_alive(probe: ServerProbe) -> None:
    prompts = [[i, *range(10, 120)] for i in range(3, 253)]  # 27,750 tokens, of which a batch takes 4,096
    assert len(probe.engine.generate(prompts, None, 1)[1]) == 250
    assert probe.engine.num_restarts == 0 and probe.difference() <= 1e-4


def test_an_incomplete_sync_is_refused_and_the_next_one_repairs_it(probe: ServerProbe) -> None:
    complete = probe.parameters
    probe.parameters = lambda: ((name, p) for name, p in complete() if name != "model.norm.weight")
    with pytest.raises(RuntimeError, match=r"left 1 engine weights as they were, first .'model.norm.weight'"):
        probe.engine.sync_weights()
    probe.parameters = complete
    assert probe.difference() <= 1e-4
    assert probe.engine.num_restarts == 0


def test_weights_arrive_in_parts(probe: ServerProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvr.rollout import weight_file

    probe.perturb(3)
    whole = weight_file.parts
    monkeypatch.setattr(weight_file, "parts", lambda parameters: whole(parameters, most=4096))
    assert len(list(weight_file.parts(probe.parameters()))) > 5
    probe.engine.sync_weights()
    assert probe.difference() <= 1e-4


def test_weights_of_a_server_that_was_started_again_are_replaced(probe: ServerProbe) -> None:
    probe.perturb(4)
    probe.engine.sync_weights()
    probe.engine._client.post("/update_weight_version", {"new_version": "default"})  # as a fresh one says
    assert probe.difference() <= 1e-4
    assert probe.engine.num_restarts == 1


def test_worker_loads_from_its_own_path_alone(probe: ServerProbe, tmp_path: Path) -> None:
    probe.engine.sync_weights()
    client = probe.engine._client
    own = Path(client.state()["path"])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"model.norm.weight": torch.zeros(32)}, foreign)
    for path in (str(foreign), f"{own.parent}/../{foreign}", "/etc/passwd"):
        [told] = client.post("/collective_rpc", {"method": "rlvr_load", "args": [path, True]})["results"]
        assert told["another"] and "is not where this server takes weights" in told["error"]
    own.symlink_to(foreign)
    [told] = client.post("/collective_rpc", {"method": "rlvr_load", "args": [str(own), True, "x"]})["results"]
    assert "is not a plain file of this user" in told["error"]
    assert foreign.exists() and not own.is_symlink()
    assert probe.difference() <= 1e-4  # none of it was loaded


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=slow), pytest.param("ppo", marks=slow)])
def test_server_rollouts_stay_in_step_with_the_trainer_and_stale_weights_stop_it(
    method: str, server: Server, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with closing(trainer(str(tiny_model_dir), str(tmp_path), method, server.url)) as one:
        one.train()
        steps = [record["metrics"] for record in read_steps(tmp_path)]
        assert len(steps) == 5
        require_in_step(steps)
        assert one.vllm_generation.num_restarts == 0
        one.vllm_generation.sync_weights = lambda: None
        one.args.max_steps = 20
        with pytest.raises(EngineMismatchError, match="stale weights"):
            one.train()
        assert one.state.global_step <= 3  # the first rollout is in step, the second is not
    assert shared_files() == set()


def test_bfloat16_policy_is_refused_by_a_float32_server(server: Server, tiny_model_dir: Path) -> None:
    options = ServerOptions(url=server.url, timeout=5.0, dtype="bfloat16")
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        ServerEngine(list, Sampling(max_tokens=4), options)
