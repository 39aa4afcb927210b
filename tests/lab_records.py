"""Small synthetic records of the laboratory, whose answers are known."""

import itertools
import math

from scripts.lab.records import AGREEMENTS, CLASSES, Record

ESTIMATORS = ("covariance", "discriminator")


def record(name: str = "grpo", seed: int = 0, part: str = "compare", rollouts: int = 20, **changed) -> Record:
    """Entropy falls from .60 by .02 a rollout; reward is 1 - entropy."""
    entropy = changed.pop("entropy", tuple(0.60 - 0.02 * i for i in range(rollouts)))
    values = {
        "name": name,
        "part": part,
        "algorithm": "grpo",
        "seed": seed,
        "settings": {},
        "numbers": (3,),
        "entropy": entropy,
        "made": entropy,
        "reward": tuple(1 - h for h in entropy),
        "seconds": (1.0,) * len(entropy),
        "grad_norm": (1.0,) * 80,
        "update_seconds": (1.0,) * 80,
        "tokens": (700.0,) * 80,
        "pass_at": {"1": 0.5, "16": 0.8, "64": 0.9},
        "touched": {},
        "predicted": {},
        "agreement": {},
    }
    return Record(**{**values, **changed})


def watched(seed: int) -> Record:
    """The discriminator's mean is half of the measured change, the covariance's alternates against it."""
    measured = tuple(-0.01 * (i + 1) for i in range(6))
    agreement = {
        name: {kind: [value + 0.01 * seed] * 6 for kind in AGREEMENTS}
        for name, value in zip(ESTIMATORS, (0.2, 0.4), strict=True)
    }
    predicted = {"covariance": [(-1.0) ** i for i in range(6)], "discriminator": [x / 2 for x in measured]}
    by_class = dict(zip(CLASSES, ([-0.02] * 6, [0.005] * 6, [0.01] * 6, [-0.015 - 0.001 * seed] * 6), strict=True))
    return record(
        seed=seed, part="probe", by_class=by_class, measured=measured, predicted=predicted, agreement=agreement
    )


def on_its_way(seed: int, **changed) -> Record:
    """Asked after 0, 5, 10 and 15 of 20 rollouts: pass@64 is best after 10."""
    rates = {"0": (0.1, 0.80), "5": (0.3, 0.85), "10": (0.4, 0.95), "15": (0.5, 0.92)}
    stops = {count: {"1": one + 0.01 * seed, "16": 0.8, "64": many} for count, (one, many) in rates.items()}
    return record(seed=seed, stops=stops, **changed)


def exponential(seed: int, a: float = 1.2, b: float = 2.2, rollouts: int = 40) -> Record:
    """Exactly on the law."""
    entropy = tuple(0.5 * math.exp(-i / (15 + seed)) + 0.1 for i in range(rollouts))
    return record(seed=seed, entropy=entropy, reward=tuple(b - a * math.exp(h) for h in entropy))


def suite() -> list[Record]:
    """Three methods over three seeds, watched steps, two kinds of lengths, and one knob."""
    records = []
    for seed in range(3):
        plain = record(seed=seed, pass_at={"1": 0.50 + 0.01 * seed, "16": 0.80, "64": 0.90})
        held = tuple(h + 0.05 + 0.001 * seed for h in plain.entropy)
        some = {"kl_cov/selected": 0.10, "clip/high": 0.02}
        better = {"1": 0.60 + 0.012 * seed, "16": 0.80, "64": 0.90}
        worse = {"1": 0.40 + 0.01 * seed, "16": 0.80, "64": 0.90 + 0.001 * (seed - 1)}
        records += [
            plain,
            record(
                "kl-cov", seed, entropy=held, reward=plain.reward, pass_at=better, seconds=(2.0,) * 20, touched=some
            ),
            record("clip-cov", seed, reward=plain.reward, pass_at=worse),
            watched(seed),
            record(seed=seed, part="lengths", numbers=(2, 3), grad_norm=tuple(1 + 0.1 * (i % 2) for i in range(80))),
            record("c3po", seed, part="lengths", numbers=(2, 3)),
        ]
    for value, seed in itertools.product((0.3, 3.0), (0, 1)):
        entropy = tuple(0.60 - 0.02 * i + 0.01 * (value + seed) for i in range(10))
        records.append(record(f"kl-cov={value:g}", seed, part="knob", entropy=entropy))
    return records
