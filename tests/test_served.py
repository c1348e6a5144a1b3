"""The page as strangers use it, without a browser: many at once, each alone, and some with bad intent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from engine import guard
from tests.load import Visitor, load
from tests.serve import ROOT, Server, decoders, served

CLIP = ROOT / "assets" / "examples" / "cups-3-2.mp4"
ASKED = ["Where is the ball at the end?", "left\nmiddle\nright", 8, False]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    with served(folder, READING=5.0, LINE=6) as opened:
        yield opened
        assert opened.calls.read_text() == ""  # no other host was asked for, whatever visitors tried


@pytest.fixture(autouse=True)
def quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """The page's own code fails nowhere; Gradio's does on nonsense, and says so in the log."""
    if "server" not in request.fixturenames or request.node.name == "test_nonsense_harms_nobody":
        yield
        return
    log = request.getfixturevalue("server").log
    before = len(log.read_text())
    yield
    assert "Traceback" not in log.read_text()[before:]


def client(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=120)


def test_everyone_is_answered(server: Server, tmp_path: Path) -> None:
    """More visitors than places in the line: answered with their own answer, told their place, or told to come back."""
    tally = asyncio.run(load(server, 9, tmp_path, rounds=2))
    assert tally.lost == []
    assert tally.overtaken == 0
    assert tally.answered + tally.left + tally.busy == tally.asked
    assert tally.answered >= 9
    assert max(tally.places) > 1
    assert tally.memory[-1] - tally.memory[0] < 150


def test_repeated_runs_take_no_more_memory(server: Server, tmp_path: Path) -> None:
    tally = asyncio.run(load(server, 1, tmp_path, rounds=12))
    assert tally.lost == []
    assert tally.memory[-1] - tally.memory[0] < 40


def test_each_visitor_is_alone(server: Server) -> None:
    """A filmed clip's truth, a reply and its states are for the session that they were made in."""

    async def scene() -> None:
        async with client(server) as both:
            one, other = [await Visitor.arrive(both, name) for name in ("one", "other")]
            filmed = await one.call("on_film", ["cups", 3, 5, None])
            assert "cups-3-5.mp4" in json.dumps(filmed)
            assert "True answer" not in json.dumps(filmed)
            assert "True answer" not in json.dumps(await other.call("on_reveal", [None]))
            assert "True answer" in json.dumps(await one.call("on_reveal", [None]))
            clip = await one.upload("one.mp4", CLIP.read_bytes())
            await one.call("on_clip", [clip, None])
            thought = await one.call("on_think", [clip, *ASKED, "", 1, None])
            assert "s-answers" in json.dumps(thought)
            assert "data:image/png" in json.dumps(await one.call("on_layer", [1, None])) or "heatmap" in json.dumps(
                thought
            )
            nothing = await other.call("on_layer", [1, None])
            assert [(plot["value"], plot["visible"]) for plot in nothing] == [(None, False)] * 2
            plain = hashlib.sha256(CLIP.read_bytes()).hexdigest()
            assert plain not in clip["path"]  # who knows a clip doesn't know its address

    asyncio.run(scene())


@pytest.mark.parametrize("how", ["cancels", "goes away"])
def test_who_leaves_makes_room(server: Server, how: str) -> None:
    """Reading hangs; its visitor leaves; the next one doesn't wait until reading is given up."""

    async def scene() -> None:
        async with client(server) as both:
            first, second = [await Visitor.arrive(both, how + name) for name in ("first", "second")]
            clip = await first.upload("a.mp4", CLIP.read_bytes())
            await second.call("think", [clip, *ASKED])
            (decoder,) = decoders(server)
            decoder.send_signal(signal.SIGSTOP)
            event = (await first.join("on_think", [clip, *ASKED, "", 1, None])).json()["event_id"]
            async for message in first.messages():
                if message["msg"] == "process_generating":
                    break  # and with it the connection
            if how == "cancels":
                given = {"session_hash": first.session, "fn_index": first.functions["on_think"], "event_id": event}
                (await both.post("/gradio_api/cancel", json=given)).raise_for_status()
            begin = time.monotonic()
            while decoder.is_running():
                assert time.monotonic() - begin < 4
                await asyncio.sleep(0.05)
            answer = await second.call("think", [clip, *ASKED])
            assert answer[0]["answer"] in ("left", "middle", "right")

    asyncio.run(scene())


def test_a_clip_that_hangs_costs_its_time_and_no_more(server: Server) -> None:
    async def scene() -> None:
        async with client(server) as alone:
            visitor = await Visitor.arrive(alone, "patient")
            clip = await visitor.upload("a.mp4", CLIP.read_bytes())
            await visitor.call("think", [clip, *ASKED])
            (decoder,) = decoders(server)
            decoder.send_signal(signal.SIGSTOP)
            with pytest.raises(RuntimeError, match=r"a\.mp4 takes longer than 5 s to open"):
                await visitor.call("think", [clip, *ASKED])
            assert (await visitor.call("think", [clip, *ASKED]))[0]["slots"] == 8

    asyncio.run(scene())


def test_nobody_passes_the_line(server: Server) -> None:
    for name in ("think", "on_think", "film"):
        for way in ("run", "api"):
            answer = httpx.post(f"{server.url}/gradio_api/{way}/{name}", json={"data": [None, *ASKED]})
            assert answer.status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=http://example.com/a.mp4",
        "gradio_api/file=https%3A%2F%2Fexample.com/a.mp4",
        "gradio_api/file/http://example.com/a.mp4",
        "gradio_api/proxy=http://example.com/",
        "static/ffmpeg/ffmpeg-core.wasm",
        "gradio_api/deep_link?session_hash=one",
        "monitoring",
        "monitoring/summary",
        "gradio_api/vibe-code",
    ],
)
def test_what_the_page_has_no_use_for_is_refused(server: Server, path: str) -> None:
    answer = httpx.get(f"{server.url}/{path}")
    assert answer.status_code == 403
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "clip", [{"path": "http://example.com/a.mp4"}, {"path": "https://example.com/a.mp4", "url": "x"}]
)
def test_no_clip_is_fetched(server: Server, clip: dict) -> None:
    data = [clip | {"meta": {"_type": "gradio.FileData"}}, *ASKED]
    for path, body in (
        ("queue/join", {"data": data, "fn_index": 1, "session_hash": "x"}),
        ("call/think", {"data": data}),
        ("call/v2/think", {"clip": data[0]}),
        ("run/think", {"data": data}),
        ("run/upload", {"data": data[:1], "fn_index": 1}),
    ):
        answer = httpx.post(f"{server.url}/gradio_api/{path}", json=body)
        assert answer.status_code == 403
        assert "upload the clip" in answer.text


def test_every_answer_tells_browsers_to_be_careful(server: Server) -> None:
    for path in ("", "config", "gradio_api/info", "theme.css", "gradio_api/file=/etc/passwd", "nowhere"):
        headers = httpx.get(f"{server.url}/{path}").headers
        assert {name: headers.get(name) for name in guard.HEADERS} == guard.HEADERS
    assert "default-src 'self'" in guard.CONTENT
    assert "connect-src 'self'" in guard.CONTENT


def test_too_much_is_refused_before_it_is_sent(server: Server) -> None:
    address = urlsplit(server.url)
    for head, status in (
        ("POST /gradio_api/upload HTTP/1.1\r\nContent-Length: 9999999999", b"413"),
        ("POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 9999999", b"413"),
        ("POST /gradio_api/upload HTTP/1.1\r\nTransfer-Encoding: chunked", b"411"),
        ("POST /gradio_api/upload HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked", b"411"),
        ("POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked", b"411"),
    ):
        with socket.create_connection((address.hostname, address.port), timeout=30) as line:
            line.sendall(f"{head}\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n\r\n".encode())
            assert line.recv(100).startswith(b"HTTP/1.1 " + status)
    with socket.create_connection((address.hostname, address.port), timeout=30) as line:
        line.sendall(
            f"POST /gradio_api/queue/join HTTP/1.1\r\nContent-Length: 9999999\r\nHost: {address.netloc}\r\n\r\n".encode()
        )
        for _ in range(10):  # who sends on all the same is told too, rather than cut off
            time.sleep(0.05)
            line.sendall(bytes(100_000))
        assert b"at most 1 MB" in line.recv(10_000)


def test_nonsense_harms_nobody(server: Server) -> None:
    bodies: list[bytes] = [
        b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"data": 7}', b'{"data": []}', b'{"data": [null], "fn_index": 9999}',
        b'{"data": [[[[]]]], "fn_index": -1, "session_hash": "x"}', b"[" * 100_000, b'{"session_hash": 7}',
    ]  # fmt: skip
    for path in ("queue/join", "call/think", "call/film", "cancel", "upload", "run/think"):
        for body in bodies:
            kind = {"content-type": "application/json"}
            answer = httpx.post(f"{server.url}/gradio_api/{path}", content=body, headers=kind)
            assert not any(word in answer.text for word in ("Traceback", str(ROOT), "site-packages"))
    assert httpx.get(f"{server.url}/gradio_api/queue/status").json()["queue_size"] == 0
    assert httpx.get(server.url).status_code == 200


def test_clips_are_deleted_after_their_time(tmp_path: Path) -> None:
    """Whole ones, and what a broken-off upload has left; then the page says so. All are gone when the page is closed."""
    with served(tmp_path, MINUTE=0.1, LIFE=2, UPLOADS=2**20) as server:
        visitors = tmp_path / "visitors"

        async def scene() -> None:
            async with client(server) as alone:
                visitor = await Visitor.arrive(alone, "late")
                clip = await visitor.upload("late.mp4", CLIP.read_bytes())
                assert Path(clip["path"]).is_file()
                assert Path(clip["path"]).is_relative_to(visitors)
                address = urlsplit(server.url)
                with socket.create_connection((address.hostname, address.port)) as line:
                    head = "POST /gradio_api/upload HTTP/1.1\r\nContent-Length: 500000\r\nHost: here\r\n"
                    part = (
                        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
                        + b"a" * 300_000
                    )
                    line.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode() + part)
                    await asyncio.sleep(1)
                begin = time.monotonic()
                while [path for path in visitors.glob("sotto-*/**/*") if path.is_file()]:
                    assert time.monotonic() - begin < 30
                    await asyncio.sleep(0.2)
                assert (await alone.get(f"/gradio_api/file={clip['path']}")).status_code == 403
                with pytest.raises(RuntimeError, match="The clip is gone"):
                    await visitor.call("think", [clip, *ASKED])
                with pytest.raises(httpx.HTTPStatusError, match="507"):
                    await visitor.upload("large.mp4", bytes(2**20 + 1))

        asyncio.run(scene())
        (own,) = visitors.glob("sotto-*")
        assert own.stat().st_mode & 0o77 == 0  # nobody else on this machine looks in
    assert list(visitors.glob("sotto-*")) == []
