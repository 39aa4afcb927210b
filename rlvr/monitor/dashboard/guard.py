"""Who may ask the dashboard, and what a browser may do with its answers."""

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlvr.monitor.dashboard.page import policy
from rlvr.monitor.payloads.numbers import to_json

LOCAL = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Content-Security-Policy": policy(),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Refuses requests under another name than the server's own, and adds HEADERS to every answer.

    A page of somebody else whose name is made to lead here (DNS rebinding) asks under its own name.
    hosts: names to answer under beside those of this machine; None for any.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] | None) -> None:
        self._app = app
        self._hosts = None if hosts is None else {_plain(host) for host in (*LOCAL, *hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        host = Headers(scope=scope).get("host", "")
        if self._hosts is not None and host_name(host) not in self._hosts:
            said = {"error": f"Host={host!r} is not this server's name; ask under http://localhost"}
            await Response(to_json(said), 403, media_type="application/json")(scope, receive, guarded)
            return
        if scope["method"] not in ("GET", "HEAD"):
            said = {"error": f"{scope['method']} is not known here: the dashboard only reads"}
            await Response(to_json(said), 405, {"Allow": "GET, HEAD"}, media_type="application/json")(
                scope, receive, guarded
            )
            return
        await self._app(scope, receive, guarded)


def host_name(header: str) -> str:
    """The name in a Host header, without its port; "" if it is none."""
    text = header.strip()
    if text.startswith("["):
        name, found, rest = text[1:].partition("]")
        return _plain(name) if found and (not rest or _is_port(rest)) else ""
    name, found, port = text.partition(":")
    return "" if found and not _is_port(f":{port}") else _plain(name)


def _is_port(text: str) -> bool:
    return text[:1] == ":" and text[1:].isascii() and text[1:].isdigit()


def _plain(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")
