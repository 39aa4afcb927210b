"""The dashboard as a user starts it: what it finds, what it answers, to whom, and how it ends."""

import http.client
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dashboard_cases import write_run
from dashboard_server import Server

from rlvr.cli import main
from rlvr.monitor.dashboard.answers import OF_RUN
from rlvr.monitor.dashboard.guard import HEADERS, host_name
from rlvr.monitor.dashboard.page import SCRIPTS, STYLES


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "lab" / "one", 20)
    write_run(folder / "two", 8, seed=1, features={"prompts"}, finish=False)
    return folder


@pytest.fixture(scope="module")
def server(runs_dir: Path) -> Iterator[Server]:
    one = Server(runs_dir)
    yield one
    one.process.kill()
    one.process.communicate()


# ------------------------------------------------------------------------------------------------------ start and end


def test_dashboard_says_where_it_is_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    one = Server(tmp_path)
    assert one.line == f"http://127.0.0.1:{one.port}/ shows the runs in {tmp_path} (Ctrl-C ends it)\n"
    assert one.api("runs").json["runs"] == []  # an empty folder waits for runs
    idle = http.client.HTTPConnection("127.0.0.1", one.port)  # a browser keeps its connections
    idle.request("GET", "/")
    idle.getresponse().read()
    assert one.end() == (0, "")


def test_dashboard_of_no_directory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nowhere' is no directory" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port=70000: must be from 0"),
        (["--port", "-1"], "--port=-1: must be from 0"),
        (["--port", "0", "--host", "192.0.2.1"], "on 192.0.2.1 cannot be used"),
        (["--port", "0", "--host", "no such host"], "--host='no such host' is no address of this machine"),
    ],
)
def test_dashboard_that_cannot_listen_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dashboard", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_dashboard_of_a_used_port_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["dashboard", str(tmp_path), "--port", str(port)]) == 2
    assert f"--port={port} on 127.0.0.1 cannot be used" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- answers


def test_api_answers_everything_a_page_asks(server: Server) -> None:
    assert {"metrics", "histograms", "version"} == server.api("metrics").json.keys()
    found = server.api("runs").json
    assert [run["id"] for run in found["runs"]] == ["lab/one", "two"] and found["problems"] == []
    assert [run["name"] for run in found["runs"]] == ["one", "two"] and abs(found["now"] - time.time()) < 60
    for run in ("lab/one", "two"):
        for name in OF_RUN:
            parameters = {"run": run} | ({"step": 1} if name == "forks" else {})
            got = server.api(name, **parameters)
            assert got.status == (404 if (run, name) == ("two", "forks") else 200), got.body
            assert got.headers["Content-Type"] == "application/json" and isinstance(got.json, dict)
    assert server.api("tokens", run="lab/one").json == {"steps": [1, 11, 19], "recorded_steps": 3}
    assert server.api("tokens", run="lab/one", step=11).json["step"] == 11
    series = server.api("series", run="two", names="entropy/mean,reward/mean", points=4, **{"from": 1, "to": 6}).json
    assert series["step"] == [2, 4, 6] and series["series"].keys() == {"entropy/mean", "reward/mean"}
    assert server.api("prompts", run="two").json["total"] > 0


@pytest.mark.parametrize(
    ("name", "parameters", "status", "said"),
    [
        ("run", {"run": "three"}, 404, "there is no run 'three' here"),
        ("run", {"run": "../two"}, 404, "there is no run"),
        ("run", {"run": "/etc"}, 404, "there is no run"),
        ("run", {"run": "lab"}, 404, "there is no run"),
        ("run", {"run": ""}, 404, "there is no run"),
        ("run", {}, 400, "needs run=ID"),
        ("nothing", {"run": "two"}, 404, "there is no api/nothing"),
        ("tokens", {"run": "lab/one", "step": 2}, 404, "step 2 of one has no token-level records"),
        ("tokens", {"run": "lab/one", "step": "../1"}, 400, "step='../1': must be a number"),
        ("forks", {"run": "lab/one"}, 400, "step=None: must be a number"),
        ("series", {"run": "two", "points": "0"}, 400, "points='0': must be a number from 1 to 20000"),
        ("series", {"run": "two", "from": "nan"}, 400, "from='nan': must be a number, and finite"),
        ("series", {"run": "two", "from": "inf"}, 400, "from='inf': must be a number, and finite"),
        ("series", {"run": "two", "to": "-inf"}, 400, "to='-inf': must be a number, and finite"),
        ("series", {"run": "two", "to": "1e999"}, 400, "to='1e999': must be a number, and finite"),
    ],
)
def test_api_refuses_what_is_not_there(
    server: Server, name: str, parameters: dict[str, object], status: int, said: str
) -> None:
    got = server.api(name, **parameters)
    assert got.status == status and got.json.keys() == {"error"} and said in got.json["error"]


def test_page_and_its_files_are_served(server: Server) -> None:
    page = server.ask("/")
    assert page.status == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    for name in (*STYLES, *SCRIPTS):
        assert f'"static/{name}"'.encode() in page.body
        got = server.ask(f"/static/{name}")
        kind = "css" if name.endswith("css") else "javascript"
        assert got.status == 200 and got.headers["Content-Type"] == f"text/{kind}; charset=utf-8" and got.body


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/static/../server.py",
            "/static/..%2fserver.py",
            "/static/%2e%2e/page.py",
            "/static/",
            "/static/index.html",
        ),
        *("/static//etc/passwd", "/etc/passwd", "/api/", "/x", "/api/run/x"),
    ],
)
def test_nothing_else_becomes_a_path(server: Server, target: str) -> None:
    got = server.ask(target)
    assert got.status == 404 and "error" in got.json


def test_files_are_kept_by_a_browser_until_they_change(server: Server) -> None:
    first = server.ask("/static/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = server.ask("/static/app.js", If_None_Match=first.headers["ETag"])
    assert (again.status, again.body) == (304, b"") and again.headers["ETag"] == first.headers["ETag"]
    assert server.ask("/static/app.js", If_None_Match='"other"').status == 200


def test_answers_are_compressed_for_who_takes_that(server: Server) -> None:
    plain, packed = server.ask("/api/metrics"), server.ask("/api/metrics", Accept_Encoding="gzip")
    assert packed.headers["Content-Encoding"] == "gzip" and len(packed.body) < len(plain.body) / 3


# -------------------------------------------------------------------------------------------------------------- guard


@pytest.mark.parametrize(
    "target", ["/", "/api/runs", "/api/run?run=x", "/static/app.js", "/nothing", "/static/style.css"]
)
def test_every_answer_has_the_headers_that_guard_it(server: Server, target: str) -> None:
    got = server.ask(target)
    for name, value in HEADERS.items():
        assert got.headers[name] == value
    assert "default-src 'none'" in got.headers["Content-Security-Policy"]
    assert "script-src 'self';" in got.headers["Content-Security-Policy"]
    assert not any(name.lower().startswith("access-control") for name in got.headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("target", ["/", "/api/runs", "/static/app.js", "/nothing"])
def test_nothing_but_reading_is_known(server: Server, target: str, method: str) -> None:
    got = server.ask(target, method)
    assert got.status == 405 and got.headers["Allow"] == "GET, HEAD" and "only reads" in got.json["error"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("localhost.", 200),
        ("evil.example:{port}", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("", 403),
    ],
)
def test_requests_under_another_name_are_refused(server: Server, host: str, status: int) -> None:
    got = server.ask("/api/runs", host=host.format(port=server.port))
    assert got.status == status
    if status == 403:
        assert "runs" not in got.json and got.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Example.COM:80", "example.com"),
        ("[0:0::1]:80", "::1"),
        ("[::1", ""),
        ("[::1]x", ""),
        ("a:b", ""),
        ("a:80:80", ""),
        ("a:", ""),
    ],
)
def test_host_name_is_read_without_its_port(header: str, name: str) -> None:
    assert host_name(header) == name


def test_dashboard_for_everybody_warns_and_answers_under_any_name(runs_dir: Path) -> None:
    one = Server(runs_dir, "--host", "0.0.0.0")
    assert one.line.startswith(f"http://localhost:{one.port}/ ")
    assert one.ask("/api/runs", host="training.example").status == 200
    status, said = one.end()
    assert status == 0 and said.startswith("WARNING: --host 0.0.0.0: whoever reaches this machine can read prompts")
