"""The methods that are compared: their settings here, their main knob, and what the papers say of them.

Where the paper's setting would do nothing in this setting (a fraction of 2e-4 is less than one token of a step of 704)
the setting is scaled until it acts, which `scaled` says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Settings = Mapping[str, Any]
REFERENCE = "grpo"
BAND = (0.35, 0.45)  # nats, that the thermostats hold
PPO = {"critic_learning_rate": 3e-4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """field: as the page calls it.   own: the method's value.   settings: the trainer's fields by other values.
    rollouts: of its runs at least, if it acts only later.
    """

    field: str
    own: float
    settings: Mapping[float, Settings]
    rollouts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """title: on the page.   settings: fields of the trainer's configuration.   claim: what the paper says, at its
    scale.   source: where that stands.   recipe: the paper's own setting, a file in recipes/.   scaled: how the
    setting here departs from the paper's, empty if it does not.
    """

    title: str
    settings: Settings
    claim: str
    source: str
    recipe: str = ""
    scaled: str = ""
    algorithm: str = "grpo"
    knob: Knob | None = None


def control(name: str, **options: Any) -> Settings:
    return {"controls": [{"name": name, **options}]}


HIGHER = {"surrogate": {"name": "ppo_clip", "low": 0.2, "high": 0.28}}


def clip(high: float) -> Settings:
    return {"surrogate": {"name": "ppo_clip", "low": 0.2, "high": high}}


def hold(lever: str, options: Settings, lowest: float, highest: float, band: tuple[float, float] = BAND) -> Settings:
    """A thermostat that holds entropy in the band by a hyper-parameter of the control, starting from `lowest`.

    A run has only some 400 steps, so its gain is three times the default; chosen on seed 0.
    """
    name, _, field = lever.partition(".")
    thermostat = {"lever": lever, "low": band[0], "high": band[1], "lowest": lowest, "highest": highest}
    return {**control(name, **options, **{field: lowest}), "thermostat": {**thermostat, "gain": 3.0, "rate": 0.2}}


def knob(field: str, own: float, others: tuple[float, float], settings: Any, rollouts: int = 0) -> Knob:
    """settings: of a value, makes the trainer's fields."""
    return Knob(field=field, own=own, settings={value: settings(value) for value in others}, rollouts=rollouts)


def steer(form: str, min_weight: float) -> Settings:
    floor = {"floor": 0.02} if form == "released" else {}
    return {**HIGHER, **control("steer", form=form, min_weight=min_weight, **floor)}


STEER = "GRPO 44.2, Clip-Cov 45.7, STEER 48.6: average of six math sets, Qwen2.5-Math-7B"
CUI = "arXiv 2505.22617, Table 2"
SCALED_BAND = "band of this setting; ours, no paper"

METHODS: dict[str, Method] = {
    "grpo": Method(
        title="GRPO",
        settings={},
        claim="the reference",
        source="arXiv 2402.03300",
        recipe="grpo.yaml",
        scaled="learning rate 1e-4, since the model is small",
    ),
    "clip-higher": Method(
        title="clip-higher",
        settings=clip(0.28),
        source="arXiv 2503.14476, as quoted",
        recipe="clip_higher.yaml",
        claim="AIME24 36 to 38 of Qwen2.5-32B, entropy is held",
        knob=knob("high", 0.28, (0.24, 0.4), clip),
    ),
    "clip-cov": Method(
        title="Clip-Cov",
        settings=control("clip_cov", fraction=0.02),
        source=CUI,
        recipe="clip_cov.yaml",
        claim="average of seven sets 38.6 to 40.4 (7B), 45.8 to 50.3 (32B)",
        scaled="fraction 0.02 for 2e-4",
        knob=knob("fraction", 0.02, (0.005, 0.08), lambda x: control("clip_cov", fraction=x)),
    ),
    "kl-cov": Method(
        title="KL-Cov",
        settings=control("kl_cov", fraction=0.2, coef=1.0),
        source=CUI,
        recipe="kl_cov.yaml",
        claim="average of seven sets 38.6 to 40.6 (7B), 45.8 to 52.2 (32B)",
        scaled="fraction 0.2 for 2e-3",
        knob=knob("coef", 1.0, (0.3, 3.0), lambda x: control("kl_cov", fraction=0.2, coef=x)),
    ),
    "steer": Method(
        title="STEER (theorem)",
        settings=steer("theorem", 0.7),
        claim=STEER,
        source="arXiv 2510.10150",
        recipe="steer.yaml",
        scaled="no dual clip",
        knob=knob("min_weight", 0.7, (0.3, 0.9), lambda x: steer("theorem", x)),
    ),
    "steer-released": Method(
        title="STEER (released)",
        settings=steer("released", 0.8),
        claim=STEER,
        source="zz-haooo/STEER",
        recipe="steer.yaml",
        scaled="maximum of the rollout, not of a micro-batch; no dual clip",
        knob=knob("min_weight", 0.8, (0.3, 0.5), lambda x: steer("released", x)),
    ),
    "steer-full": Method(
        title="STEER (full)",
        settings=steer("full", 0.7),
        claim="none as such",
        source="form of arXiv 2602.03392",
        knob=knob("min_weight", 0.7, (0.3, 0.9), lambda x: steer("full", x)),
    ),
    "clip-b": Method(
        title="Clip_B",
        settings=control("clip_b", mu=1.0),
        source="arXiv 2602.03392",
        recipe="clip_b.yaml",
        claim="AIME24 avg@32 16.88 to 19.69, pass@32 50.00 to 56.67 (7B)",
        scaled="mu 1 for 2.5, which masks nothing on this base",
        knob=knob("mu", 1.0, (0.7, 1.5), lambda x: control("clip_b", mu=x)),
    ),
    "clip-v": Method(
        title="Clip_V",
        settings=control("clip_v", mu=2.0, max_fraction=0.02),
        source="arXiv 2602.03392",
        claim="AIME25 pass@K 50.00 to 56.67 (7B)",
        recipe="clip_v.yaml",
        scaled="mu 2 for 8.5, share 0.02 for 1e-4, which mask nothing on this base",
        knob=knob("max_fraction", 0.02, (0.005, 0.05), lambda x: control("clip_v", mu=2.0, max_fraction=x)),
    ),
    "high-entropy": Method(
        title="80/20",
        settings={**HIGHER, **control("high_entropy", fraction=0.2)},
        source="arXiv 2506.01939",
        claim="AIME24 +7.71 (32B), +5.21 (14B), comparable (8B) over DAPO",
        recipe="high_entropy.yaml",
        knob=knob("fraction", 0.2, (0.1, 0.5), lambda x: {**HIGHER, **control("high_entropy", fraction=x)}),
    ),
    "bonus": Method(
        title="entropy bonus",
        settings=control("entropy_bonus", coef=0.1),
        source="arXiv 2505.22617",
        claim="0.005 stable without a gain, 0.01 explodes",
        recipe="entropy_bonus.yaml",
        scaled="coefficient 0.1",
        knob=knob("coef", 0.1, (0.03, 0.3), lambda x: control("entropy_bonus", coef=x)),
    ),
    "adaptive-bonus": Method(
        title="adaptive bonus",
        settings=control("adaptive_entropy", target=0.35, delta=0.002, max_coef=0.3),
        claim="holds entropy at the target; part of 57.8 to 72.8 (32B)",
        source="arXiv 2505.22312",
        recipe="adaptive_entropy.yaml",
        scaled="target 0.35 for 0.2, delta 0.002 for 1e-4, at most 0.3 for 0.005",
        knob=knob(
            "target", 0.35, (0.2, 0.45), lambda x: control("adaptive_entropy", target=x, delta=0.002, max_coef=0.3), 50
        ),
    ),
    "entropy-advantage": Method(
        title="entropy-shaped advantage",
        settings={**HIGHER, **control("entropy_advantage", alpha=0.4, kappa=2.0)},
        source="arXiv 2506.14758",
        claim="AIME25 pass@256 50.0 to 53.3 with GRPO, pass@1 +3.8 with PPO",
        recipe="entropy_advantage.yaml",
        knob=knob("alpha", 0.4, (0.1, 1.6), lambda x: {**HIGHER, **control("entropy_advantage", alpha=x, kappa=2.0)}),
    ),
    "c3po": Method(
        title="C3PO",
        settings=control("token_budget", tokens=528),
        source="arXiv 2506.14731",
        claim="steadier gradients and step times; no comparison in numbers",
        recipe="c3po.yaml",
        scaled="budget of three quarters of a step, neither entropy term nor KL",
        knob=knob("tokens", 528, (352, 660), lambda x: control("token_budget", tokens=int(x))),
    ),
    "thermostat": Method(
        title="thermostat",
        settings=hold("entropy_bonus.coef", {}, 0.0, 1.0),
        claim="ours: holds the band",
        source="no paper",
        recipe="thermostat.yaml",
        scaled=SCALED_BAND,
        knob=knob(
            "low", 0.35, (0.25, 0.45), lambda x: hold("entropy_bonus.coef", {}, 0.0, 1.0, (x, round(x + 0.1, 2))), 50
        ),
    ),
    "ppo": Method(
        title="PPO",
        algorithm="ppo",
        settings=PPO,
        source="arXiv 1707.06347",
        claim="no comparison with GRPO in numbers",
        recipe="ppo.yaml",
        scaled="critic's learning rate 3e-4",
        knob=knob("critic_learning_rate", 3e-4, (1e-4, 1e-3), lambda x: {"critic_learning_rate": x}),
    ),
}

# Rollouts that fit into the time of 100 of GRPO's, for the methods of which a rollout takes over 1.1 times as long.
AT_EQUAL_COMPUTE = {"ppo": 54, "bonus": 85, "adaptive-bonus": 87, "thermostat": 88}

# Of earlier experiments (LOG.md); no part of the suite: --methods makes them.
EXTRA: dict[str, Method] = {
    name: Method(title=name, settings=settings, claim="", source="LOG.md", algorithm=algorithm)
    for name, algorithm, settings in (
        ("bonus-1.0", "grpo", control("entropy_bonus", coef=1.0)),
        ("thermostat-kl-cov", "grpo", hold("kl_cov.coef", {"fraction": 0.2}, 0.0, 10.0)),
        ("ppo-no-groups", "ppo", {**PPO, "num_generations": 1}),
        ("ppo-shared", "ppo", {"critic": "shared", "critic_learning_rate": 1e-3}),
        ("ppo-kl-cov", "ppo", {**PPO, **control("kl_cov", fraction=0.2, coef=1.0)}),
        ("ppo-warmup", "ppo", {**PPO, "critic_warmup_steps": 40}),
    )
}
ALL = {**METHODS, **EXTRA}
