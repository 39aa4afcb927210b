"""The thermostat as a controller, on entropies that are given and on a plant that collapses without it."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvr.controls import ClipCov, KlCov
from rlvr.controls.entropy import AdaptiveEntropy, EntropyBonus
from rlvr.errors import ConfigError
from rlvr.surrogates import Cispo, PpoClip
from rlvr.thermostat import Thermostat, ThermostatState
from rlvr.trainers.steering import Steering, find_lever

BAND = Thermostat(lever="kl_cov.coef", low=0.3, high=0.5, lowest=0.0, highest=10.0)
entropies = st.lists(st.floats(0, 3), min_size=1, max_size=60)


@pytest.mark.parametrize("direction", [+1, -1])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_thermostat_starts_where_the_lever_stands(scale: str, direction: int) -> None:
    one = replace(BAND, scale=scale, lowest=0.01, highest=10.0)  # type: ignore[arg-type]
    for value in (0.01, 0.1, 3.0, 10.0):
        assert one.value(one.start(value, direction), direction) == pytest.approx(value, rel=1e-12)
    with pytest.raises(ValueError, match=r"kl_cov.coef=11.0 lies outside \[lowest=0.01, highest=10.0\]"):
        one.start(11.0, direction)


def test_thermostat_moves_one_step_as_the_formula_says() -> None:
    one = replace(BAND, gain=1.0, integral_gain=0.1, rate=1.0)
    state = one.step(ThermostatState(0.5, 0.5), 0.2)  # e = 0.1
    assert state.integral == pytest.approx(0.51)
    assert state.position == pytest.approx(0.61)
    state = one.step(state, 0.7)  # e = -0.2
    assert state.integral == pytest.approx(0.49)
    assert state.position == pytest.approx(0.29)


@given(entropies)
def test_thermostat_stays_in_range_and_within_its_rate(trace: list[float]) -> None:
    one = replace(BAND, gain=5.0, integral_gain=1.0, rate=0.07)
    state = one.start(4.0, 1)
    for entropy in trace:
        after = one.step(state, entropy)
        assert 0 <= after.position <= 1
        assert abs(after.position - state.position) <= 0.07 + 1e-12
        assert one.lowest <= one.value(after, 1) <= one.highest
        state = after


@given(st.floats(0.3, 0.5))
def test_thermostat_inside_the_band_does_nothing(entropy: float) -> None:
    state = BAND.start(2.0, 1)
    assert BAND.step(state, entropy) == state


def test_thermostat_winds_nothing_up_at_a_limit() -> None:
    state = BAND.start(2.0, 1)
    for _ in range(1000):
        state = BAND.step(state, 0.1)
    assert state.position == 1.0
    state = BAND.step(state, 0.6)
    assert state.position < 1.0  # 1000 steps of integral would need 2000 of these to unwind


def plant(thermostat: Thermostat | None, direction: int, value: float, steps: int = 600) -> list[float]:
    """Entropy that decays by 1 % a step, and that the lever pushes up: the shape of a collapsing run."""
    entropy, trace = 0.9, []
    state = thermostat.start(value, direction) if thermostat else None
    for _ in range(steps):
        push = value if direction > 0 else 10 - value
        entropy = max(0.0, entropy * 0.99 + 1e-3 * push)
        trace.append(entropy)
        if thermostat and state:
            state = thermostat.step(state, entropy)
            value = thermostat.value(state, direction)
    return trace


@pytest.mark.parametrize(("direction", "value"), [(+1, 0.0), (-1, 10.0), (+1, 10.0)])
def test_thermostat_holds_a_band_that_constants_leave(direction: int, value: float) -> None:
    held = plant(BAND, direction, value)
    assert all(0.28 <= entropy <= 0.52 for entropy in held[-300:])
    free = plant(None, direction, value)
    assert not 0.3 <= free[-1] <= 0.5


def test_thermostat_alarms_on_both_sides_and_starts_anew_inside() -> None:
    one = replace(BAND, patience=3)
    state, said = one.start(0.0, 1), []
    for entropy in (0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4, 0.6, 0.6, 0.2, 0.6, 0.6, 0.6):
        state = one.step(state, entropy)
        said.append((state.outside, one.alarm(state, entropy)))
    assert [outside for outside, _ in said] == [-1, -2, -3, -4, -5, -6, 0, 1, 2, -1, 1, 2, 3]
    spoken = [i for i, (_, text) in enumerate(said) if text]
    assert spoken == [2, 5, 12]
    assert "below the band [0.3, 0.5] for 3 steps" in str(said[2][1])
    assert "above the band" in str(said[12][1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("low", 0.6),
        ("low", -0.1),
        ("high", float("inf")),
        ("highest", 0.0),
        ("lever", "kl_cov"),
        ("gain", -1.0),
        ("rate", 0.0),
        ("patience", 0),
        ("scale", "cubic"),
    ],
)
def test_bad_thermostats_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        replace(BAND, **{field: value})
    with pytest.raises(ValueError, match=r"lowest=0\.0: must be positive on a log scale"):
        replace(BAND, scale="log")


def test_thermostat_refuses_an_entropy_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="entropy=nan"):
        BAND.step(BAND.start(1.0, 1), float("nan"))


def test_steering_moves_the_control_and_goes_on_from_its_state() -> None:
    controls = (ClipCov(), KlCov(coef=1.0))
    one, other = (Steering(controls, PpoClip(), BAND) for _ in range(2))
    for entropy in (0.2, 0.1, 0.25, 0.4):
        told = one.observe(entropy)
    assert one.controls["kl_cov"].coef == told["thermostat/value"] > 1.0  # type: ignore[attr-defined]
    assert one.controls["clip_cov"] == ClipCov()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for entropy in (0.2, 0.9):
        assert one.observe(entropy) == other.observe(entropy)
    assert one.controls == other.controls


def test_state_of_another_lever_or_range_is_not_mistaken_for_ours() -> None:
    one = Steering((KlCov(),), PpoClip(), BAND)
    for _ in range(20):
        one.observe(0.0)
    reached = one.controls["kl_cov"].coef  # type: ignore[attr-defined]
    assert reached > 2
    wider = Steering((KlCov(),), PpoClip(), replace(BAND, highest=100.0))
    wider.load_state_dict(one.state_dict())
    assert wider.controls["kl_cov"].coef == pytest.approx(reached)  # type: ignore[attr-defined]
    narrower = Steering((KlCov(),), PpoClip(), replace(BAND, highest=2.0))
    narrower.load_state_dict(one.state_dict())
    assert narrower.controls["kl_cov"].coef == 2.0  # type: ignore[attr-defined]
    other = Steering((KlCov(), EntropyBonus()), PpoClip(), replace(BAND, lever="entropy_bonus.coef", highest=1.0))
    with pytest.warns(UserWarning, match=r"moved kl_cov\.coef, which starts afresh"):
        other.load_state_dict(one.state_dict())
    assert other.controls == {"kl_cov": KlCov(), "entropy_bonus": EntropyBonus()}
    without = Steering((KlCov(coef=0.5),), PpoClip())
    with pytest.warns(UserWarning, match="nothing moves it now"):
        without.load_state_dict(one.state_dict())
    assert without.controls["kl_cov"] == KlCov(coef=0.5)


def test_adaptive_entropy_goes_on_where_it_was_or_says_why_not() -> None:
    one = Steering((AdaptiveEntropy(target=0.5, delta=0.001),), PpoClip())
    for _ in range(3):
        one.observe(0.1)
    again = Steering((AdaptiveEntropy(target=0.5, delta=0.001),), PpoClip())
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert again.controls == one.controls
    with pytest.raises(ConfigError, match=r"adaptive_entropy cannot go on from its checkpoint: coef=0\.003"):
        Steering((AdaptiveEntropy(max_coef=0.001),), PpoClip()).load_state_dict(one.state_dict())


def test_steering_moves_the_surrogate() -> None:
    one = Steering((), PpoClip(high=0.2), replace(BAND, lever="surrogate.high", lowest=0.1, highest=0.4))
    for _ in range(50):
        one.observe(0.0)
    assert one.surrogate == PpoClip(high=0.4)
    again = Steering((), PpoClip(high=0.2), one.thermostat)
    again.load_state_dict(one.state_dict())
    assert again.surrogate == one.surrogate


def test_levers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean kl_cov\.coef"):
        find_lever(replace(BAND, lever="kl_cov.coeff"), (KlCov(),), PpoClip())
    with pytest.raises(ConfigError, match="nothing to move"):
        find_lever(BAND, (), Cispo())


def test_state_is_plain() -> None:
    state = BAND.step(BAND.start(1.0, 1), 0.1)
    assert ThermostatState(**json.loads(json.dumps(asdict(state)))) == state
