"""When the entropy alarm speaks, and what it sets off in a real run."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_grpo_trainer import trainer

from rlvr import GRPOConfig
from rlvr.alarm import Alert, EntropyAlarm, EntropyAlarmError, steps_outside
from rlvr.errors import ConfigError
from rlvr.monitor.records import alerts_of, read_run, read_steps
from rlvr.surrogates import PpoClip
from rlvr.trainers.steering import Steering

THERMOSTAT = {"lever": "entropy_bonus.coef", "low": 6.0, "high": 7.0, "lowest": 0.0, "highest": 1.0, "rate": 0.1}


def test_steps_outside_counts_in_a_row_and_by_side() -> None:
    outside, seen = 0, []
    for value in (0.5, 0.1, 0.1, 0.5, 2.0, 2.0, 0.1):
        outside = steps_outside(outside, value, 0.2, 1.0)
        seen.append(outside)
    assert seen == [0, -1, -2, 0, 1, 2, -1]


def test_message_comes_after_patience_and_then_ever_more_rarely() -> None:
    alarm = EntropyAlarm(low=0.2, high=1.0, patience=3)
    spoken = [n for n in range(1, 50) if alarm.message(-n, 0.1)]
    assert spoken == [3, 6, 12, 24, 48]
    assert alarm.message(-3, 0.1) == "entropy has collapsed: 0.1000 nats, below 0.2 for 3 steps"
    assert alarm.message(3, 1.5) == "entropy has exploded: 1.5000 nats, above 1 for 3 steps"
    assert alarm.message(0, 0.5) is None


@pytest.mark.parametrize(
    ("alarm", "told"),
    [
        ({"low": 2.0, "high": 1.0}, "low=2.0, high=1.0"),
        ({"action": "panic"}, "action='panic'"),
        ({"patience": 0}, "patience=0"),
        ({"lowest": 1}, "lowest"),
        ("loud", "entropy_alarm='loud'"),
        ({"action": "thermostat"}, "no thermostat to set off"),
    ],
)
def test_alarm_settings_are_checked_before_a_model_is_loaded(alarm: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="entropy_alarm") as raised:
        GRPOConfig(output_dir=str(tmp_path), entropy_alarm=alarm)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_alarm_warns_of_a_run_above_its_limit(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tiny model's entropy is about 5 nats."""
    one = trainer(tiny_model_dir, tmp_path, entropy_alarm={"high": 1.0, "patience": 2})
    one.train()
    said = [record.get("alerts", []) for record in read_steps(tmp_path)]
    assert [len(alerts) for alerts in said] == [0, 1, 0, 1]
    assert said[1][0]["kind"] == "explosion"
    assert re.fullmatch(r"entropy has exploded: 4\.\d+ nats, above 1 for 2 steps", said[1][0]["message"])
    assert said[1][0]["message"] in caplog.text
    assert [record["metrics"]["entropy/outside"] for record in read_steps(tmp_path)] == [1, 2, 3, 4]
    assert read_run(tmp_path)["status"] == "finished"


def test_alarm_stops_a_collapsed_run_before_its_weights_move_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model_dir, tmp_path, entropy_alarm={"low": 9.0, "patience": 3, "action": "stop"})
    with pytest.raises(EntropyAlarmError, match="entropy has collapsed"):
        one.train()
    assert [record["step"] for record in read_steps(tmp_path)] == [1, 2]
    run = read_run(tmp_path)
    assert run["status"] == "failed" and run["error"].startswith("EntropyAlarmError: entropy has collapsed")


def test_alarm_sets_off_the_thermostat_that_waited_for_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = trainer(
        tiny_model_dir,
        tmp_path,
        controls=[{"name": "entropy_bonus", "coef": 0.01}],
        thermostat=THERMOSTAT,
        entropy_alarm={"low": 6.0, "patience": 2, "action": "thermostat"},
    )
    one.train()
    (alert,) = alerts_of(read_steps(tmp_path)[1])
    assert alert.kind == "collapse" and alert.message.endswith("for 2 steps; the thermostat begins to act")
    values = [record["metrics"].get("thermostat/value") for record in read_steps(tmp_path)]
    assert values[0] is None  # at its start
    assert 0.01 < values[1] < values[2] < values[3]


def test_alarm_state_goes_through_a_checkpoint() -> None:
    alarm = EntropyAlarm(low=0.2, patience=3)
    one, again = (Steering((), PpoClip(), None, alarm) for _ in range(2))
    for _ in range(2):
        one.observe(0.1)
    again.load_state_dict(one.state_dict())
    assert again.observe(0.1) == {"entropy/outside": -3.0}
    assert again.alerts == [Alert("collapse", "entropy has collapsed: 0.1000 nats, below 0.2 for 3 steps")]
    assert not one.alerts
    assert math.isinf(EntropyAlarm().high)
