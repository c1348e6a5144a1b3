"""engine/guard.py: what gets in, and how long files stay."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from engine import guard
from engine.guard import Guard, fetches, held, sweep, sweeping


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"data": [{"path": "http://example.com/a.mp4"}]}, True),
        ({"data": [[{"video": {"path": "HTTPS://example.com"}}]]}, True),
        ({"clip": {"path": "ftp://example.com"}}, True),
        ({"data": [{"path": "/tmp/a.mp4"}, "What is http://example.com?", "path"]}, False),
        ({"data": []}, False),
        (None, False),
    ],
)
def test_addresses_in_place_of_files_are_found(body: object, found: bool) -> None:
    assert fetches(json.dumps(body).encode()) == found


def test_escapes_hide_no_address() -> None:
    assert fetches(b'{"data": [{"p\\u0061th": "\\u0068ttp:\\/\\/example.com"}]}')
    assert not fetches(b"")
    assert not fetches(b"[" * 100_000)


def test_old_files_go_and_then_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for name, size in (("a/old.mp4", 10), ("b/mid.mp4", 40), ("c/new.mp4", 40), ("left", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
        time.sleep(0.02)  # a file's last change can't be set back
    assert sweep(tmp_path, 3600, 100) == 0
    assert sweep(tmp_path, 3600, 60) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "left", "new.mp4"]
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    assert sweep(tmp_path, 3600, 100) == 2
    assert os.listdir(tmp_path) == []
    assert sweep(tmp_path / "none", 1, 1) == 0


def asked(
    folder: Path, headers: dict[str, str], parts: Iterable[bytes], method: str = "POST", path: str = "queue/join"
) -> tuple[int, bytes]:
    """A call through the guard, its body in parts -> the answer's status, and all that the page got to read of it."""
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})
    told, got = [], bytearray()

    async def receive() -> dict[str, Any]:
        return waiting.pop(0)

    async def send(message: dict[str, Any]) -> None:
        told.append(message)

    async def page(scope: dict[str, Any], receive: guard.Receive, send: guard.Send) -> None:
        more = True
        while more:
            message = await receive()
            got.extend(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200})

    scope = {
        "type": "http", "method": method, "path": f"/gradio_api/{path}",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    asyncio.run(Guard(page, folder, 2**20, 2**30)(scope, receive, send))
    return told[0]["status"], bytes(got)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_what_comes_in_chunks_is_refused_whatever_it_declares(tmp_path: Path, method: str) -> None:
    """A server that hears both headers follows the chunks."""
    both = {"content-length": "9", "transfer-encoding": "chunked"}
    assert asked(tmp_path, both, [b"{}"], method) == (411, b"")


def test_a_call_is_counted_as_it_comes(tmp_path: Path) -> None:
    """Less was declared than is sent; what is longer than a call may be never reaches the page."""
    part, declared = bytes(2**18), {"content-length": "9"}
    assert asked(tmp_path, declared, [part] * 4) == (200, part * 4)
    assert asked(tmp_path, declared, [*[part] * 4, b"x"]) == (413, b"")
    assert asked(tmp_path, {"content-length": str(2**20 + 1)}, []) == (413, b"")


@pytest.mark.parametrize("path", ["queue/join", "run/upload", "call/upload", "upload/x"])
def test_no_other_address_passes_for_that_of_uploads(tmp_path: Path, path: str) -> None:
    fetched = json.dumps({"data": [{"path": "http://example.com/a.mp4"}]}).encode()
    assert asked(tmp_path, {"content-length": str(len(fetched))}, [fetched], path=path) == (403, b"")
    assert asked(tmp_path, {"content-length": str(2**20 + 1)}, [], path=path) == (413, b"")


def test_uploads_that_come_together_share_the_room(tmp_path: Path) -> None:
    """What is still coming counts, until it has come or was broken off."""
    let_in = 0
    told: list[int | None] = []
    scope = {
        "type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"content-length", b"200")],
    }  # fmt: skip

    async def page(scope: dict[str, Any], receive: guard.Receive, send: guard.Send) -> None:
        nonlocal let_in
        let_in += 1
        await asyncio.sleep(0.2)
        raise ConnectionError("broken off")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        told.append(message.get("status"))

    async def scene() -> None:
        guarded = Guard(page, tmp_path, 2**20, 300)
        for _ in range(2):
            calls = (guarded(scope, receive, send) for _ in range(5))
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(each, ConnectionError) for each in found) == 1

    asyncio.run(scene())
    assert let_in == 2
    assert told.count(507) == 8


def test_a_folder_that_vanishes_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.mp4").write_bytes(b"12")
    scandir = os.scandir

    def listed(place: Any) -> Any:
        if Path(place).name == "b":
            raise FileNotFoundError(place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", listed)
    assert sorted(path.parent.name for _, _, path in held(tmp_path)) == ["a", "c"]


def test_a_file_that_stays_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12")
    unlink = Path.unlink

    def gone(path: Path, missing_ok: bool = False) -> None:
        if path.name == "b":
            raise PermissionError(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", gone)
    assert sweep(tmp_path, -1, 100) == 2
    assert os.listdir(tmp_path) == ["b"]


def test_sweeping_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[int] = []

    def fails(*given: Any) -> int:
        times.append(1)
        raise PermissionError("not now")

    monkeypatch.setattr(guard, "sweep", fails)

    async def scene() -> None:
        async with sweeping(tmp_path, 1, 1, 0.01)(None):
            begin = time.monotonic()
            while len(times) < 3:
                assert time.monotonic() - begin < 10
                await asyncio.sleep(0.01)

    asyncio.run(scene())
