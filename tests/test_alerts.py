"""Alerts: their kinds in the records, the alarm of an engine that drifts away, and the settings of all of them."""

import copy
import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from ppo_cases import policy_trainer
from test_grpo_trainer import FixedRollouts

from rlvr import GRPOConfig, PPOConfig
from rlvr.alarm import KINDS, Alert, MismatchAlarm
from rlvr.errors import ConfigError
from rlvr.monitor import Recorder, format_summary, summarize
from rlvr.monitor.records import alerts_of, read_run, read_steps
from rlvr.surrogates import PpoClip
from rlvr.thermostat import Thermostat
from rlvr.trainers.launch import parse_arguments
from rlvr.trainers.steering import Steering

SECRET = "https://hooks.example.org/T0/B0/s3cr3t"


# records


def test_alert_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind='loud': must be one of collapse, .*other"):
        Alert("loud", "hear, hear")


def test_alerts_are_read_as_they_were_recorded(tmp_path: Path) -> None:
    told = [Alert(kind, f"of {kind}") for kind in KINDS]
    Recorder(tmp_path).record_step(1, {"entropy/mean": 1.0}, alerts=told)
    (record,) = read_steps(tmp_path)
    assert record["alerts"] == [{"kind": kind, "message": f"of {kind}"} for kind in KINDS]
    assert alerts_of(record) == told


@pytest.mark.parametrize("entry", ["as it was", {"kind": "of a later release", "message": "as it was"}])
def test_alerts_without_a_known_kind_are_other(entry: Any) -> None:
    assert alerts_of({"alerts": [entry]}) == [Alert("other", "as it was")]
    assert alerts_of({}) == []


def test_summary_counts_alerts_by_kind_in_one_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record_step(1, {"entropy/mean": 1.0})
    assert not any(line.startswith("alerts") for line in format_summary(summarize(tmp_path)).splitlines())
    recorder.record_step(2, {"entropy/mean": 1.0}, alerts=[Alert("stall", "a"), Alert("collapse", "b")])
    recorder.record_step(3, {"entropy/mean": 1.0}, alerts=[Alert("collapse", "c")])
    lines = [line for line in format_summary(summarize(tmp_path)).splitlines() if line.startswith("alerts")]
    assert [line.split() for line in lines] == [["alerts", "3:", "2", "collapse,", "1", "stall"]]


# what steering says


def test_thermostat_and_alarms_speak_under_their_kinds() -> None:
    thermostat = Thermostat(lever="surrogate.high", low=0.5, high=0.6, lowest=0.1, highest=0.4, patience=1)
    one = Steering((), PpoClip(), thermostat, None, MismatchAlarm(limit=0.1, patience=1))
    one.observe(0.4, 0.2)
    assert [alert.kind for alert in one.alerts] == ["mismatch", "thermostat"]
    one.observe(0.55, 0.05)
    assert one.alerts == []


# mismatch


def test_mismatch_is_told_after_patience_and_then_ever_more_rarely() -> None:
    one = Steering((), PpoClip())
    spoken = [n for n in range(1, 50) if (one.observe(1.0, 0.02), one.alerts)[1]]
    assert spoken == [5, 10, 20, 40]
    one.observe(1.0, 0.01)  # at the limit: no more
    assert [bool((one.observe(1.0, 0.0123), one.alerts)[1]) for _ in range(5)] == [False] * 4 + [True]
    (alert,) = one.alerts
    assert alert.kind == "mismatch" and "KL 0.0123 nats, above 0.01 for 5 steps" in alert.message


def test_mismatch_that_was_not_measured_neither_counts_nor_ends_the_count() -> None:
    one = Steering((), PpoClip(), mismatch_alarm=MismatchAlarm(patience=2))
    told = [bool((one.observe(math.nan, kl), one.alerts)[1]) for kl in (0.02, math.nan, 0.02, math.nan)]
    assert told == [False, False, True, False]


def test_infinite_mismatch_is_above_the_limit() -> None:
    one = Steering((), PpoClip(), mismatch_alarm=MismatchAlarm(patience=2))
    told = [bool((one.observe(1.0, kl), one.alerts)[1]) for kl in (0.02, math.inf, 0.0)]
    assert told == [False, True, False]


def test_infinite_rewards_are_told_ever_more_rarely_also_after_a_checkpoint() -> None:
    one, again = Steering((), PpoClip()), Steering((), PpoClip())
    spoken = [n for n in range(1, 20) if (one.observe(1.0, infinite=n), one.alerts)[1]]
    assert spoken == [1, 2, 4, 8, 16]
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    again.observe(1.0)
    assert not again.alerts
    told = [(again.observe(1.0, infinite=3), again.alerts)[1] for _ in range(13)]
    (alert,) = told.pop()
    assert not any(told) and alert.kind == "reward" and "3 rewards of a step are infinite" in alert.message
    assert alert.message.endswith("in 32 steps so far")


def test_infinite_rewards_of_an_evaluation_are_not_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = policy_trainer(FixedRollouts, tiny_model_dir, tmp_path, num_generations=4, max_steps=1)
    honest = one.reward_funcs[0]

    def reward(**columns: Any) -> list[float]:
        return honest(**columns) if one.model.training else [math.inf] * len(columns["prompts"])

    one.reward_funcs[0] = reward
    one.evaluate(one.train_dataset.select(range(2)))
    assert one.alerts == []
    one.train()
    assert read_steps(tmp_path)[0].get("alerts") is None


def test_mismatch_alarm_can_be_off(tmp_path: Path) -> None:
    for off in (0, 0.0, None):
        limit = GRPOConfig(output_dir=str(tmp_path), mismatch_alarm=off, bf16=False, use_cpu=True).mismatch_limit
        assert not any(
            (one := Steering((), PpoClip(), None, None, limit)).observe(1.0, 9.0) and one.alerts for _ in "x"
        )


def test_mismatch_state_goes_through_a_checkpoint() -> None:
    one, again = Steering((), PpoClip()), Steering((), PpoClip())
    for _ in range(4):
        one.observe(1.0, 0.02)
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    again.observe(1.0, 0.02)
    assert [alert.kind for alert in again.alerts] == ["mismatch"] and not one.alerts
    older = one.state_dict()
    del older["alarm"]["apart"]  # of a checkpoint that knew no such alarm
    again.load_state_dict(older)
    again.observe(1.0, 0.02)
    assert not again.alerts


class NoisyEngine(FixedRollouts):
    """Its log-probs are a fifth of a nat from the trainer's and more: a uniform guess."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        completions, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        source = random.Random(0)
        return completions, [[-5.0 + source.random() for _ in ids] for ids in completions]


def test_mismatch_of_a_real_run_is_recorded_and_survives_resuming(tiny_model_dir: Path, tmp_path: Path) -> None:
    def train(out: str, checkpoint: bool, **settings: Any) -> None:
        own = {"num_generations": 4, "mismatch_tolerance": 1e6, "lr_scheduler_type": "constant"}
        saves = {"save_strategy": "steps", "save_steps": 3}
        one = policy_trainer(NoisyEngine, tiny_model_dir, tmp_path / out, **own, **saves, **settings)
        one.train(resume_from_checkpoint=checkpoint)

    train("whole", False, max_steps=6)
    steps = read_steps(tmp_path / "whole")
    assert all(record["metrics"]["mismatch/kl"] > 0.01 for record in steps)
    assert [[alert.kind for alert in alerts_of(record)] for record in steps] == [[], [], [], [], ["mismatch"], []]
    train("cut", False, max_steps=3)
    train("cut", True, max_steps=6)
    assert [r.get("alerts") for r in read_steps(tmp_path / "cut")] == [r.get("alerts") for r in steps]


# settings


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mismatch_alarm": -0.1}, "mismatch_alarm=-0.1: must be a number of nats, or 0"),
        ({"mismatch_alarm": math.inf}, "mismatch_alarm=inf"),
        ({"mismatch_alarm": True}, "mismatch_alarm=True"),
        ({"stall_alarm": math.nan}, "stall_alarm=nan: must be a number of seconds, or 0"),
        ({"stall_alarm": "10 min"}, "stall_alarm='10 min'"),
        ({"alert_webhook": "ftp://example.org/s3cr3t"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": "https://"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": "hooks.example.org/s3cr3t"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": "https://user:s3cr3t@example.org"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": "https://example.org:s3cr3t/"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": "https://example.org/s3cr3t\n"}, "alert_webhook=<hidden>"),
        ({"alert_webhook": 3}, "alert_webhook=<hidden>"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(
    config: Any, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        config(output_dir=str(tmp_path), **settings)
    assert str(raised.value).startswith(told) and "\n" not in str(raised.value) and "s3cr3t" not in str(raised.value)


def test_webhook_is_in_no_text_and_no_pickle_of_the_configuration(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), alert_webhook=SECRET, bf16=False, use_cpu=True, report_to="none")
    assert args.alert_webhook == SECRET
    for text in (str(args), repr(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert "s3cr3t" not in text
    dumped = pickle.dumps(args)
    assert b"s3cr3t" not in dumped
    assert pickle.loads(dumped).to_dict() == {**args.to_dict(), "alert_webhook": None}


def test_webhook_stays_with_copies_of_the_configuration(tmp_path: Path) -> None:
    args = GRPOConfig(output_dir=str(tmp_path), alert_webhook=SECRET, bf16=False, use_cpu=True, report_to="none")
    for other in (copy.copy(args), copy.deepcopy(args)):
        assert other is not args and other.alert_webhook == SECRET and other.to_dict() == args.to_dict()
        assert pickle.loads(pickle.dumps(other)).alert_webhook is None
    assert copy.deepcopy(args).model_init_kwargs is not args.model_init_kwargs or args.model_init_kwargs is None


def test_webhook_is_taken_from_the_environment_where_it_is_not_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none"}
    monkeypatch.setenv("RLVR_ALERT_WEBHOOK", SECRET)
    assert GRPOConfig(**own).alert_webhook == SECRET and "s3cr3t" not in str(GRPOConfig(**own))
    assert GRPOConfig(alert_webhook="https://example.org", **own).alert_webhook == "https://example.org"
    monkeypatch.setenv("RLVR_ALERT_WEBHOOK", "")
    assert GRPOConfig(**own).alert_webhook is None
    monkeypatch.setenv("RLVR_ALERT_WEBHOOK", "ftp://s3cr3t")
    with pytest.raises(ConfigError, match=r"^RLVR_ALERT_WEBHOOK=<hidden> is no http") as raised:
        GRPOConfig(**own)
    assert "s3cr3t" not in str(raised.value)


@pytest.mark.parametrize("flag", [["--alert_webhook", SECRET], [f"--alert-webhook={SECRET}"]])
def test_webhook_on_a_command_line_that_wandb_stores_is_refused(flag: list[str], tmp_path: Path) -> None:
    own = ["--task", "chain_sum", "--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu", "--report_to"]
    with pytest.raises(ConfigError, match="RLVR_ALERT_WEBHOOK, or alert_webhook in the YAML") as raised:
        parse_arguments(GRPOConfig, [*own, "wandb", *flag])
    assert "\n" not in str(raised.value) and "s3cr3t" not in str(raised.value)
    assert parse_arguments(GRPOConfig, [*own, "none", *flag])[1].alert_webhook == SECRET
    (tmp_path / "recipe.yaml").write_text(f"alert_webhook: {SECRET}\n")
    in_yaml = ["--config", str(tmp_path / "recipe.yaml"), *own, "wandb"]
    assert parse_arguments(GRPOConfig, in_yaml)[1].alert_webhook == SECRET


def test_webhook_is_in_no_help_and_no_error_of_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"alert_webhook: {SECRET}\n")
    with pytest.raises(SystemExit):
        parse_arguments(GRPOConfig, ["--config", str(path), "--help"])
    shown = capsys.readouterr().out
    assert "RLVR_ALERT_WEBHOOK" in shown and "s3cr3t" not in shown
    for content, told in (
        (f'seed: 1\nalert_webhook: "{SECRET}\n', "line 3, column 1 is no YAML"),
        (f"alert_webhook: {SECRET}\n  a: b\n", "line 2, column 4 is no YAML"),
        (f"alert_webhook: {SECRET}\x01\n", "it is no text in UTF-8"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError) as raised:
            parse_arguments(GRPOConfig, ["--config", str(path)])
        assert str(raised.value) == f"config={str(path)!r} cannot be read: {told}"
        assert raised.value.__suppress_context__


def test_webhook_is_not_recorded_by_new_or_resumed_runs(tmp_path: Path) -> None:
    Recorder(tmp_path, {"lr": 1e-6, "alert_webhook": SECRET})
    Recorder.resume(tmp_path, 0, {"lr": 1e-6, "alert_webhook": SECRET + "2", "args": {"alert_webhook": SECRET}})
    assert "s3cr3t" not in (tmp_path / "run.json").read_text()
    assert read_run(tmp_path)["config"]["alert_webhook"] == "<redacted>"
