"""`doctor --memory`: against a server of this test's own, and where none answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.commands import probing
from lib_async_lowvram.commands.common import CommandError
from lib_async_lowvram.commands.doctor_memory import ask, pictures, table
from lib_async_lowvram.webui.memory_report import memory_of

MB = 1 << 20
STATUS = {
    "networks": {
        "text": {"peak_weight_bytes": 100 * MB, "peak_activation_bytes": 7 * MB, "weight_bytes": 235 * MB, "pinned_bytes": 235 * MB},
        "unet": {"peak_weight_bytes": 300 * MB, "peak_activation_bytes": None, "weight_bytes": 1640 * MB, "pinned_bytes": 900 * MB},
    },
    "preview": {"peak_weight_bytes": 32 * MB},
}


class Server(ThreadingHTTPServer):
    code, body = 200, b""
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.code)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        found.body = json.dumps({"memory": memory_of(STATUS)}).encode()
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "REPEATS", 1)
    monkeypatch.setattr(probing, "LAUNCHES", 1)
    monkeypatch.setenv("ASYNC_LOWVRAM_SIM_CAPACITY", "1.2e9")


def test_what_a_webui_has_measured(url: str, server: Server, tmp_path, capsys) -> None:
    out = tmp_path / "doctor.json"
    assert main(["doctor", "--device", "simulated", "--memory", "--url", url + "/", "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert server.asked == ["/async-lowvram/status"]
    rows = {line.split("  ")[1]: line.split()[-8:] for line in printed if line.startswith("  ") and " MB" in line}
    assert rows["text encoder"] == ["100", "MB", "7", "MB", "235", "MB", "235", "MB"]
    assert [line for line in printed if line.startswith("  UNet ") and "1640 MB" in line and " - " in line]
    assert max(map(len, printed)) <= 120
    assert json.loads(out.read_text())["memory"]["webui"]["UNet"]["device_weights"] == 300 * MB


def test_regions_and_what_is_not_known() -> None:
    lines = table({**memory_of(STATUS), "process": {"host_peak": None}})
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["text encoder", "UNet", "previews"]
    assert lines[-1] == "the WebUI's process: not known here"
    assert table({"process": {"host_peak": 3 * MB}})[-1].endswith("at most 3 MB of main memory")


@pytest.mark.parametrize(
    ("code", "body", "says"),
    [
        (404, b"", "without this extension"),
        (401, b"", "password"),
        (500, b"", "answered 500"),
        (200, b"<html>", "not this extension"),
        (200, b"[]", "not this extension"),
        (200, b"{}", "older"),
        (200, b'{"memory": 3}', "older"),
        (200, b"\xff\xfe", "not this extension"),
    ],
)
def test_what_answers_is_something_else(url: str, server: Server, code: int, body: bytes, says: str) -> None:
    server.code, server.body = code, body
    with pytest.raises(CommandError, match=says):
        ask(url)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1", "7860", "http://[", "http://127.0.0.1:1", "http://127.0.0.1:x"])
def test_nobody_answers_there(address: str, capsys) -> None:
    """Where the user said where it is, that is an error; else it is a line of the report."""
    assert main(["doctor", "--device", "simulated", "--memory", "--url", address]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert address in line


def test_without_a_webui(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("lib_async_lowvram.commands.doctor.DEFAULT_URL", "http://127.0.0.1:1")
    assert main(["doctor", "--device", "simulated", "--memory"]) == 0
    printed = capsys.readouterr().out
    assert "no WebUI answers at http://127.0.0.1:1" in printed and "2048x2048" in printed


def test_what_large_pictures_take() -> None:
    room = 700 * MB
    found = {(each["unet"], each["side"]): each for each in pictures(room)}
    assert set(found) == {(unet, side) for unet in ("sd15", "sdxl") for side in (512, 1024, 2048)}
    for (_, side), each in found.items():
        assert each["whole_bytes"] == pytest.approx(found["sd15", 512]["whole_bytes"] * (side / 512) ** 2, rel=0.2)
        assert each["tiled_bytes"] <= room
    large = found["sd15", 2048]
    assert large["whole_bytes"] > room and large["tiles"] > 1 and large["calls_per_step"] >= 1
    assert pictures(1)[2]["tiled_bytes"] > 1  # nothing fits: said, not hidden
