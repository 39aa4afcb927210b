"""Messages to a chat, received by a real server: what is sent, in which order, and that no receiver harms a run."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ppo_cases import policy_trainer
from test_grpo_trainer import FixedRollouts

from rlvr.alarm import EntropyAlarm, EntropyAlarmError
from rlvr.monitor.records import read_run, read_steps
from rlvr.monitor.webhook import Webhook

PATH = "/T0/B0/s3cr3t"


class Receiver:
    """Takes every message, after it has answered `answers` in turn: a status, or seconds to be silent for."""

    def __init__(self) -> None:
        self.answers: list[int | float] = []
        self.asked: list[str] = []  # method and path of every request
        self.taken: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.asked.append(f"{self.command} {self.path}")
                receiver.headers = dict(self.headers)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = receiver.answers.pop(0) if receiver.answers else 200
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                if answer == 200:
                    receiver.taken.append(body)
                self.send_response(answer)
                if answer in (302, 307):
                    self.send_header("Location", "file:///etc/passwd" if answer == 302 else "/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}{PATH}"


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


def test_message_is_what_slack_and_discord_read(receiver: Receiver) -> None:
    one = Webhook(receiver.url, "my-run")
    said = "entropy has collapsed: Δ <!channel> & @everyone"
    one.send(7, "collapse", said)
    one.close()
    names = {"run": "my-run", "step": 7, "kind": "collapse", "message": said}
    for_slack = "my-run step 7: entropy has collapsed: Δ &lt;!channel&gt; &amp; @everyone"
    for_discord = {"content": f"my-run step 7: {said}", "allowed_mentions": {"parse": []}}
    assert receiver.taken == [{"text": for_slack, **for_discord, **names}]
    assert receiver.asked == [f"POST {PATH}"]
    assert receiver.headers["Content-Type"] == "application/json" and "rlvr" in receiver.headers["User-Agent"]


def test_messages_come_in_order_although_one_has_to_be_repeated(receiver: Receiver) -> None:
    receiver.answers = [200, 500]
    one = Webhook(receiver.url, "run", before_retry=0.05)
    for step in range(5):
        one.send(step, "other", "x")
    one.close()
    assert [message["step"] for message in receiver.taken] == [0, 1, 2, 3, 4] and len(receiver.asked) == 6


def test_long_message_fits_discord(receiver: Receiver) -> None:
    one = Webhook(receiver.url, "run")
    one.send(1, "skipped", "x" * 5000)
    one.close()
    assert len(receiver.taken[0]["content"]) <= 2000 and len(receiver.taken[0]["message"]) == 5000


def test_lost_messages_are_told_once_and_without_the_address(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [404, 404, 404, 404]
    one = Webhook(receiver.url, "run", before_retry=0.01)
    for step in (3, 4, 5):
        one.send(step, "other", "x")
    one.close()
    assert [message["step"] for message in receiver.taken] == [5]
    (told,) = caplog.messages
    assert "step 3 was not delivered (HTTP status 404)" in told and "s3cr3t" not in told and "127.0.0.1" not in told


@pytest.mark.parametrize("status", [302, 307])
def test_no_redirect_is_followed(status: int, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answers = [status, status]
    one = Webhook(receiver.url, "run", before_retry=0.01)
    one.send(1, "other", "x")
    one.close()
    assert receiver.asked == [f"POST {PATH}"] * 2 and f"HTTP status {status}" in caplog.text


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/s3cr3t", "https://nowhere.invalid/s3cr3t", "{server}"])
def test_receiver_that_is_not_there_delays_nobody(
    url: str, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [5.0] * 2
    one = Webhook(url.format(server=receiver.url), "run", timeout=0.2, before_retry=0.01)
    began = time.monotonic()
    one.send(1, "other", "x")
    assert time.monotonic() - began < 0.1
    one.close(8.0)
    assert "step 1 was not delivered" in caplog.text and "s3cr3t" not in caplog.text
    assert not receiver.taken


def test_close_waits_no_longer_than_it_may(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answers = [2.0]
    one = Webhook(receiver.url, "run", timeout=1.0)
    for step in range(3):
        one.send(step, "other", "x")
    began = time.monotonic()
    one.close(0.2)
    assert time.monotonic() - began < 0.8
    one.close(0.2)  # nothing is left to wait for
    one.send(9, "other", "y")  # a run that goes on may still speak
    one.close(3.0)
    assert [message["step"] for message in receiver.taken] == [9]


def test_flood_is_bounded(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.answers = [1.0]
    one = Webhook(receiver.url, "run", timeout=0.5, before_retry=0.01)
    for step in range(500):
        one.send(step, "other", "x")
    one.close()
    assert 90 < len(receiver.taken) <= 102 and "too many messages wait" in caplog.text


# real runs


def run(model_dir: Path, out: Path, url: str, **settings: Any) -> Any:
    own = {"alert_webhook": url, "entropy_alarm": {"high": 1.0, "patience": 2}, "num_generations": 4}
    return policy_trainer(FixedRollouts, model_dir, out, **own, **settings)


def test_alerts_of_a_real_run_are_sent(receiver: Receiver, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The tiny model's entropy is about 5 nats."""
    run(tiny_model_dir, tmp_path / "mine", receiver.url, save_strategy="steps", save_steps=4).train()
    assert [(m["run"], m["step"], m["kind"]) for m in receiver.taken] == [
        ("mine", 2, "explosion"),
        ("mine", 4, "explosion"),
    ]
    assert receiver.taken[0]["message"] == read_steps(tmp_path / "mine")[1]["alerts"][0]["message"]
    left = [path for path in (tmp_path / "mine").rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert left == []


def test_run_that_fails_says_so_last(
    receiver: Receiver, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(tiny_model_dir, tmp_path, receiver.url)
    honest = one.reward_funcs[0]

    def broken(**columns: Any) -> list[float]:
        if one.state.global_step == 2:
            raise ValueError("no\nmore")
        return honest(**columns)

    one.reward_funcs[0] = broken
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError):
        one.train()
    last = receiver.taken[-1]
    assert last["kind"] == "failed" and last["step"] == 2 and last["message"] == "the run failed: ValueError: no more"
    assert [message["kind"] for message in receiver.taken] == ["explosion", "failed"]
    assert read_run(tmp_path)["status"] == "failed" and "s3cr3t" not in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rlvr-")]


def test_alarm_that_stops_the_run_is_sent_before_it_does(
    receiver: Receiver, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(tiny_model_dir, tmp_path, receiver.url)
    one.args.alarm = one.steering.alarm = EntropyAlarm(high=1.0, patience=2, action="stop")
    with pytest.raises(EntropyAlarmError):
        one.train()
    assert [(m["step"], m["kind"]) for m in receiver.taken] == [(2, "explosion"), (1, "failed")]
    assert receiver.taken[0]["message"] in caplog.messages


def test_run_is_the_same_when_nobody_listens(tiny_model_dir: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    run(tiny_model_dir, tmp_path, "http://127.0.0.1:9/s3cr3t").train()
    assert time.monotonic() - began < 60
    assert len(read_steps(tmp_path)) == 4 and read_run(tmp_path)["status"] == "finished"
