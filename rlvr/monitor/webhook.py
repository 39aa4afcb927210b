"""Sends what a run has to tell to a chat, beside the run: no failure and no delay of the receiver reaches it."""

import contextlib
import json
import logging
import threading
import urllib.error
import urllib.request
from collections import deque
from html import escape
from typing import Any
from urllib.parse import urlsplit

from rlvr import __version__
from rlvr.errors import ConfigError

logger = logging.getLogger(__name__)

TIMEOUT, BEFORE_RETRY, GRACE = 10.0, 1.0, 3.0  # seconds
MOST_WAITING, MOST_CHARACTERS = 100, 1900  # messages; Discord takes 2000 characters


def check_webhook(url: str, name: str = "alert_webhook") -> None:
    """Raises: ConfigError, which does not show the address, for what is no http or https URL of a host.

    name: what holds it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(
            f"{name}=<hidden> is no http or https URL such as https://hooks.example.org/abc, without user and "
            "password in it: copy it again from Slack, Discord or your own receiver"
        )


class Webhook:
    """POSTs messages as JSON, one after the other, from a thread that lives while there is something to send.

    A message is {"text", "content", "allowed_mentions", "run", "step", "kind", "message"}; Slack shows `text`, where
    &, < and > are escaped, Discord `content`, which notifies nobody by name. One that is not taken is tried once more;
    the first that is lost is told in the log, without the address, which is a secret.
    No redirect is followed: the address is all that anybody has agreed to.

    url: of `check_webhook`.   run: its name.   timeout: of each operation on the socket.   Both in seconds.
    """

    def __init__(self, url: str, run: str, *, timeout: float = TIMEOUT, before_retry: float = BEFORE_RETRY) -> None:
        self._url, self._run = url, run
        self._timeout, self._before_retry = timeout, before_retry
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: deque[dict[str, Any]] = deque()
        self._given_up = threading.Event()
        self._told = False

    def send(self, step: int, kind: str, message: str) -> None:
        """Returns at once. Beyond 100 messages that wait, new ones are lost."""
        text = f"{self._run} step {step}: {message}"[:MOST_CHARACTERS]
        names = {"run": self._run, "step": step, "kind": kind, "message": message}
        with self._lock:
            full = len(self._waiting) >= MOST_WAITING
            if not full:
                shown = {"text": escape(text, quote=False), "content": text, "allowed_mentions": {"parse": []}}
                self._waiting.append(shown | names)
            if self._thread is None:
                queue = (self._waiting, self._given_up)
                thread = threading.Thread(target=self._work, args=queue, name="rlvr-webhook", daemon=True)
                with contextlib.suppress(RuntimeError):  # no more threads: what waits is sent with the next message
                    thread.start()
                    self._thread = thread
        if full:
            self._tell_lost(step, "too many messages wait")

    def close(self, seconds: float = GRACE) -> None:
        """Give what waits so many seconds, then give it up. `send` may be called again afterwards."""
        thread = self._thread
        if thread is None:
            return
        thread.join(seconds)
        with self._lock:
            self._given_up.set()
            self._waiting, self._given_up, self._thread = deque(), threading.Event(), None

    def _work(self, waiting: deque[dict[str, Any]], given_up: threading.Event) -> None:
        while True:
            with self._lock:
                if not waiting:
                    if self._waiting is waiting:
                        self._thread = None
                    return
                message = waiting.popleft()
            reason = "the run has ended" if given_up.is_set() else self._post(message)
            if reason and not given_up.wait(self._before_retry):
                reason = self._post(message)
            if reason:
                self._tell_lost(message["step"], reason)

    def _post(self, message: dict[str, Any]) -> str:
        """Why it was not taken, "" if it was."""
        headers = {"Content-Type": "application/json", "User-Agent": f"rlvr/{__version__}"}
        request = urllib.request.Request(self._url, json.dumps(message).encode(), headers, method="POST")
        try:
            self._opener.open(request, timeout=self._timeout).close()
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP status {error.code}"
        except Exception as error:  # whose text may hold the address
            return type(getattr(error, "reason", error)).__name__
        return ""

    def _tell_lost(self, step: int, reason: str) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                "alert_webhook: a message of step %d was not delivered (%s); the run goes on, and further ones that "
                "are lost are not told",
                step,
                reason,
            )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """None makes the redirect an error."""
