"""Which runs the suite makes, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .base import BaseSettings
from .methods import ALL, AT_EQUAL_COMPUTE, METHODS, REFERENCE, Method, control
from .runs import LabRun

BASES = {(3,): BaseSettings(), (2, 3): BaseSettings(numbers=(2, 3))}
STOP_EVERY = 10  # rollouts, of GRPO: what it would have been, stopped there
BUDGET_TOKENS = 400  # of about 545 in a step of the task with two or three numbers
# Seconds on one idle core of the machine of LOG.md's entry; only the progress bar's estimate hangs on them.
ROLLOUT = {"grpo": 0.35, "ppo": 0.65}
SAMPLE = 6.0 / (256 * 64)  # of a held-out evaluation, on 256 prompts
PROBED = 0.52  # a rollout whose four steps are watched
START, BASE = 1.0, 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """methods: compared, GRPO among them.   seeds: of the comparison.   rollouts: of a run of the comparison.
    samples: of each of 256 held-out prompts.   knob_seeds, knob_rollouts: of runs with another setting of a knob,
    at least.
    probe_rollouts, length_rollouts: of the runs that watch steps, and of those whose lengths vary.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    rollouts: int
    samples: int
    knob_methods: tuple[str, ...]
    knob_seeds: tuple[int, ...]
    knob_rollouts: int
    probe_rollouts: int
    length_rollouts: int


FULL = Size(
    methods=tuple(METHODS),
    seeds=(0, 1, 2, 3, 4),
    rollouts=100,
    samples=64,
    knob_methods=tuple(name for name in METHODS if METHODS[name].knob),
    knob_seeds=(0, 1, 2, 3, 4),
    knob_rollouts=20,
    probe_rollouts=30,
    length_rollouts=30,
)
QUICK = Size(
    methods=("grpo", "clip-cov", "kl-cov", "thermostat"),
    seeds=(0, 1, 2),
    rollouts=40,
    samples=16,
    knob_methods=("kl-cov",),
    knob_seeds=(0,),
    knob_rollouts=40,
    probe_rollouts=20,
    length_rollouts=0,
)


def plan(size: Size) -> list[LabRun]:
    """The runs, the comparison first: what is interrupted has answered the main questions."""
    compared = [
        replace(_run(ALL[name], name, "compare", seed, size.rollouts), samples=size.samples, stops=_stops(name, size))
        for seed in size.seeds
        for name in size.methods
    ]
    watched = {"probe_sequences": 64, "probe_every": 1}
    probed = [
        LabRun(name="grpo", part="probe", seed=seed, settings=watched, rollouts=size.probe_rollouts, samples=0)
        for seed in size.seeds
        if size.probe_rollouts
    ]
    lengths = [
        LabRun(
            name=name,
            part="lengths",
            seed=seed,
            settings=settings,
            rollouts=size.length_rollouts,
            numbers=(2, 3),
            samples=0,
        )
        for seed in size.seeds
        for name, settings in (("grpo", {}), ("c3po", control("token_budget", tokens=BUDGET_TOKENS)))
        if size.length_rollouts
    ]
    return [*compared, *probed, *lengths, *_turned(size)]


def _stops(name: str, size: Size) -> tuple[int, ...]:
    if name == REFERENCE:
        return tuple(range(0, size.rollouts, STOP_EVERY))
    return (size.rollouts * AT_EQUAL_COMPUTE[name] // 100,) if name in AT_EQUAL_COMPUTE else ()


def _turned(size: Size) -> list[LabRun]:
    """Runs with other values of the knobs; the methods' own values are read out of the comparison."""
    runs = []
    for name in size.knob_methods:
        method = METHODS[name]
        assert method.knob is not None
        for value, settings in method.knob.settings.items():
            turned = Method(title=name, settings=settings, claim="", source="", algorithm=method.algorithm)
            rollouts = max(size.knob_rollouts, method.knob.rollouts)
            runs += [_run(turned, f"{name}={value:g}", "knob", seed, rollouts) for seed in size.knob_seeds]
    return runs


def _run(method: Method, name: str, part: str, seed: int, rollouts: int) -> LabRun:
    return LabRun(
        name=name,
        part=part,
        algorithm=method.algorithm,
        seed=seed,
        settings=method.settings,
        rollouts=rollouts,
        samples=0,
    )


def seconds(run: LabRun, prompts: int = 256) -> float:
    """What the run takes alone on one core, about."""
    rollout = PROBED if run.settings.get("probe_sequences") else ROLLOUT[run.algorithm]
    return START + run.rollouts * rollout + (1 + len(run.stops)) * run.samples * prompts * SAMPLE


def bases_needed(runs: Sequence[LabRun]) -> list[BaseSettings]:
    """Without repetition, in the order in which runs want them."""
    return [BASES[numbers] for numbers in dict.fromkeys(run.numbers for run in runs)]
