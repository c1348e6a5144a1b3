"""The page in a process of its own on a free port: the shipped model where there is one, else an untrained one."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from engine.methods.method import META
from engine.models import SMALL

ROOT = Path(__file__).resolve().parents[1]
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
    pid: int


def untrained(folder: Path) -> Path:
    """A small model of the shipped kind that knows nothing, with everything that stands beside its weights."""
    from engine.backbones import small
    from engine.data.worlds import texts
    from train.publish import bounds

    backbone = small.fresh(small.tokenizer(texts(200), 400), layers=3)
    backbone.save(folder)
    method = {"name": "pause", "pauses": [4, 12]}
    meta = {"name": "untrained", "method": method, "pauses": [4, 12], "sampling": {"fps": 4.0, "pixels": 84 * 56}}
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    bounds(backbone, 24, 24).save(folder)
    return folder


@contextmanager
def served(folder: Path, **settings: object) -> Iterator[Server]:
    """The page, open. settings: constants of app.py that are to be others; folder: for all that it leaves."""
    (folder / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    changes = "".join(f"app.{name} = {value!r}; " for name, value in settings.items())
    command = [sys.executable, "-c", f"import app, sys; {changes}sys.exit(app.main())"]
    if not (SMALL / "pause").is_dir():
        command += ["--model", str(untrained(folder / "model"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, calls, visitors = folder / "log", folder / "calls", folder / "visitors"
    calls.touch()
    visitors.mkdir()
    own = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "SOTTO_CALLS": str(calls), "TMPDIR": str(visitors)}
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL_ID", "ADAPTER_ID")} | own
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=environment, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{port}", log, calls, process.pid)
    try:
        opened(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def decoders(server: Server) -> list[psutil.Process]:
    """The processes in which the page reads its visitors' files."""
    children = psutil.Process(server.pid).children()
    return [child for child in children if "engine.sandbox" in " ".join(child.cmdline())]


def opened(server: Server, process: subprocess.Popen, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(server.url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"The page didn't open: {server.log.read_text()[-2000:]}")
