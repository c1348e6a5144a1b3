"""The page on a free port, and a Chromium that opens it. The shipped model where there is one, else an untrained one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from engine import worlds
from engine.ask import SMALL
from tests.browser.find import find_browser

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
# Runs inside the server, and notes every host that it would talk to but itself.
WATCH = """
import os, socket
def watched(name, real, where):
    def call(*args, **kwargs):
        host = where(args)
        if host not in (None, "", "localhost", "0.0.0.0", "::1") and not str(host).startswith("127."):
            with open(os.environ["SOTTO_CALLS"], "a") as calls:
                print(name, host, file=calls)
        return real(*args, **kwargs)
    return call
socket.getaddrinfo = watched("getaddrinfo", socket.getaddrinfo, lambda args: args[0])
class Watched(socket.socket):
    connect = watched("connect", socket.socket.connect, lambda args: args[1][0] if isinstance(args[1], tuple) else None)
socket.socket = Watched
"""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    calls: Path  # hosts other than itself that the server asked for, a line each


def untrained(folder: Path) -> Path:
    """A small model of the shipped kind that knows nothing, with everything that stands beside its weights."""
    from engine import ask, familiarity
    from engine.backbones import small
    from engine.data.worlds import WorldsSource, texts

    backbone = small.fresh(small.tokenizer(texts(200), 400), layers=3)
    backbone.save(folder)
    meta = {"name": "untrained", "pauses": [4, 12], "sampling": {"fps": 4.0, "pixels": 84 * 56}}
    (folder / ask.META).write_text(json.dumps(meta), encoding="utf-8")
    known, held_out = ([source(i).visual for i in range(24)] for source in (WorldsSource(), WorldsSource("validation")))
    questions = sorted({worlds.make(family, 1, 0, "fresh").question for family in worlds.FAMILIES})
    familiarity.fit(backbone, known, held_out, questions).save(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    command = [sys.executable, str(ROOT / "app.py")]
    if not (SMALL / "pause").is_dir():
        command += ["--model", str(untrained(folder / "model"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Server(f"http://127.0.0.1:{port}", folder / "log", folder / "calls")
    served.calls.touch()
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "SOTTO_CALLS": str(served.calls), "GRADIO_TEMP_DIR": str(folder / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "MODEL_ID"} | own
    with served.log.open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait(served, process)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def wait(served: Server, process: subprocess.Popen, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(served.url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"The page didn't open: {served.log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = find_browser()
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, chromium: Browser, server: Server) -> Iterator[Page]:
    """The open page. A test chooses its looks by parametrizing this fixture with options of `new_context`.

    Afterwards: nothing was asked of any other host, and the server's log has no traceback of this test.
    """
    options = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    context = chromium.new_context(**options)
    context.set_default_timeout(30_000)
    opened = context.new_page()
    outside: list[str] = []
    before = len(server.log.read_text())
    opened.on("request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else outside.append(r.url))
    opened.goto(server.url)
    opened.wait_for_selector("#think")
    yield opened
    context.close()
    assert not outside
    assert "Traceback" not in server.log.read_text()[before:]
