"""A page of plots of the runs below a directory, for a browser on this machine; it reads, and changes nothing."""

import hashlib
import ipaddress
import logging
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlvr.errors import ConfigError
from rlvr.monitor.dashboard.answers import BadQuestion, NotThere, answer
from rlvr.monitor.dashboard.catalog import Catalog
from rlvr.monitor.dashboard.guard import Guard
from rlvr.monitor.dashboard.page import KINDS, SCRIPTS, STYLES, served_page, static_text
from rlvr.monitor.payloads.numbers import to_json

PORT = 7860
SWITCH = 0.0005  # seconds that the thread which reads in the background may keep an answer waiting
ANY_HOST = ("0.0.0.0", "::", "")

logger = logging.getLogger("rlvr.dashboard")


def dashboard(runs_dir: str | Path, host: str = "127.0.0.1", port: int = PORT) -> None:
    """Serve the page until Ctrl-C.   port: 0 takes a free one.

    Raises: ConfigError if there is no such directory, or if nothing can listen there.
    """
    catalog = Catalog(runs_dir)
    try:
        with _listen(host, port) as listening:
            address, listened, *_ = listening.getsockname()
            shown = "localhost" if host in ANY_HOST else f"[{host}]" if ":" in host else host
            if not ipaddress.ip_address(address).is_loopback:
                said = f"--host {host}: whoever reaches this machine can read prompts and completions"
                print(f"WARNING: {said}", file=sys.stderr)
            print(f"http://{shown}:{listened}/ shows the runs in {runs_dir} (Ctrl-C ends it)", flush=True)
            sys.setswitchinterval(SWITCH)
            catalog.start()
            config = uvicorn.Config(
                app(catalog, None if host in ANY_HOST else [host]),
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=1,
            )
            uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # which uvicorn raises again once all is closed
        pass
    finally:
        catalog.stop()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise ConfigError(f"--port={port}: must be from 0 (any that is free) to 65535")
    try:
        kind, *_, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(kind, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--host={host!r} is no address of this machine ({error.strerror}); try 127.0.0.1"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--port={port} on {host} cannot be used ({error.strerror}); choose another --port, 0 takes a free one"
        ) from error
    return listening


def app(catalog: Catalog, hosts: list[str] | None) -> Guard:
    """The application.   hosts: names that it answers under beside those of this machine; None for any."""
    files = {name: KINDS[name.rpartition(".")[2]] for name in (*STYLES, *SCRIPTS)}

    def page(request: Request) -> Response:
        return _text(request, served_page(), "text/html; charset=utf-8")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            return _said(f"there is no static/{name}", 404)
        return _text(request, static_text(name), files[name])

    def api(request: Request) -> Response:
        return _answer(catalog, request)

    routes = [Route("/", page), Route("/static/{name:path}", static), Route("/api/{name}", api)]
    middleware = [Middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)]
    inner = Starlette(routes=routes, middleware=middleware, exception_handlers={404: _not_found, 500: _failed})
    return Guard(inner, hosts)  # around all of it, its own failures too


def _answer(catalog: Catalog, request: Request) -> Response:
    """Runs in a thread of its own, as every route does that is no coroutine."""
    name = request.path_params["name"]
    try:
        with catalog.first():
            body = answer(catalog, name, request.query_params)
    except NotThere as error:
        return _said(str(error), 404)
    except BadQuestion as error:
        return _said(str(error), 400)
    except FileNotFoundError as error:
        return _said(f"{error.filename} is no longer there", 404)
    except ConfigError as error:
        logger.warning("%s", error)
        return _said(str(error), 500)
    except Exception as error:
        logger.exception("%s failed", request.url)
        return _said(f"api/{name} failed: {type(error).__name__}: {error}", 500)
    return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")


def _said(message: str, status: int) -> Response:
    return Response(to_json({"error": " ".join(message.split())}), status, media_type="application/json")


def _not_found(request: Request, error: Exception) -> Response:
    return _said(f"there is nothing at {request.url.path}", 404)


def _failed(request: Request, error: Exception) -> Response:
    return _said(f"{request.url.path} failed: {type(error).__name__}: {error}", 500)


def _text(request: Request, text: str, kind: str) -> Response:
    """A file of the page, which a browser may keep and has to ask for again."""
    body = text.encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=kind)
