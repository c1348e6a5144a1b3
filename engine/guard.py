"""What stands before the page's server: which requests get in, what every answer says to browsers, how long files stay.

An ASGI middleware. Knows some of Gradio's addresses, but not Gradio, and nothing of what the page does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

# Addresses at which Gradio fetches from other hosts, records, or edits, and the 32 MB with which a clip would be trimmed: a page
# like this has no use for them.
REFUSED = re.compile(
    r"/(proxy=|file[=/]\w+:|deep_link|process_recording|component_server|monitoring|run-history|vibe|dev/|static/ffmpeg/)"
)
LARGEST_CALL = 2**20  # bytes of a request that is no upload
FORM = 2**16  # bytes that a form may put around its file
UPLOADS = ("/upload", "/gradio_api/upload")
FULL = "The page holds as many clips as it can for now: try again in an hour, or use an example."
LENGTH = "Say how long the request is (Content-Length)."
LINGER = 5.0  # seconds for which a refused upload may go on
# A page may run its own scripts (Gradio's need eval), ask nothing of other hosts, and be framed by its Space alone.
CONTENT = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self' https://huggingface.co https://*.huggingface.co https://*.hf.space"
)
HEADERS = {
    "content-security-policy": CONTENT,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}

Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]


class Guard:
    """Refuses in a sentence what the page has no use for, what is too large, and uploads while the disk's share is full."""

    def __init__(self, app: Callable[..., Any], folder: Path, largest: int, most: int) -> None:
        """folder: where uploads go; largest: bytes of one upload; most: bytes of the whole folder."""
        self.app, self.folder, self.largest, self.most = app, folder, largest, most
        self.coming = 0  # bytes of uploads that were let in and aren't finished

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        status, sentence = self.refusal(scope)
        if not status and uploads(scope):
            await self.upload(scope, receive, guarded)
            return
        if not status and scope["method"] == "POST":
            receive, body = await heard(receive)
            if body is None:
                status, sentence = 413, too_large(LARGEST_CALL)
            elif fetches(body):
                status, sentence = 403, "This page fetches nothing from elsewhere: upload the clip."
        if status:
            await refuse(status, sentence.encode(), receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    async def upload(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Lets an upload in if there is room for it beside those that are still coming."""
        length = int(dict(scope["headers"])[b"content-length"])
        taken = await asyncio.to_thread(lambda: sum(size for _, size, _ in held(self.folder)))
        if taken + self.coming + length > self.most:
            await refuse(507, FULL.encode(), receive, send)
            return
        self.coming += length
        try:
            await self.app(scope, receive, send)
        finally:
            self.coming -= length

    def refusal(self, scope: dict[str, Any]) -> tuple[int, str]:
        """Status and sentence for a request that doesn't get in; status 0 for one that does."""
        path = scope["path"]
        if REFUSED.search(path):
            return 403, "This page doesn't offer that."
        headers = dict(scope["headers"])
        if b"transfer-encoding" in headers and scope["method"] not in ("GET", "HEAD"):
            return 411, LENGTH  # be it that a length stands beside it: a server follows the chunks
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return 0, ""
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411, LENGTH
        largest, form = (self.largest, FORM) if uploads(scope) else (LARGEST_CALL, 0)
        if int(length) > largest + form:
            return 413, too_large(largest)
        return 0, ""


async def refuse(status: int, sentence: bytes, receive: Receive, send: Send) -> None:
    """Answers, and throws away what is still being sent: who is cut off while sending doesn't get to read the answer."""
    kind = [
        (b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(sentence)).encode()),
        (b"connection", b"close"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": sentence, "more_body": True})

    async def rest() -> None:
        while (await receive()).get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), LINGER)
    await send({"type": "http.response.body", "body": b""})


def uploads(scope: dict[str, Any]) -> bool:
    return scope["method"] == "POST" and scope["path"].removeprefix(scope.get("root_path", "")) in UPLOADS


def too_large(largest: int) -> str:
    return f"That is too large: at most {largest / 2**20:g} MB are taken."


async def heard(receive: Receive) -> tuple[Receive, bytes | None]:
    """What lets a request's whole body be received once more, and the body; None as soon as it is longer than a call may be,
    whatever length it declares."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > LARGEST_CALL:
            return receive, None
    whole = bytes(body)
    waiting = [{"type": "http.request", "body": whole, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again, whole


def fetches(body: bytes) -> bool:
    """Whether a file of this call is an address, which Gradio would fetch."""

    def found(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(found, value))
        if not isinstance(value, dict):
            return False
        return "://" in str(value.get("path", "")) or any(map(found, value.values()))

    try:
        return found(json.loads(body or b"null"))
    except (ValueError, RecursionError):
        return False  # nor does Gradio understand it


def held(folder: Path) -> list[tuple[float, int, Path]]:
    """The folder's files with all below it: when each was last written or moved, its bytes, its path."""
    found = []
    for place, _, names in os.walk(folder):  # Python 3.11's rglob fails on a folder that is gone meanwhile
        for path in map(Path(place).joinpath, names):
            with suppress(OSError):  # gone meanwhile
                facts = path.stat()
                found.append((max(facts.st_mtime, facts.st_ctime), facts.st_size, path))
    return found


def sweep(folder: Path, life: float, most: int) -> int:
    """Deletes files older than `life` seconds, then the oldest until no more than `most` bytes are left. -> how many."""
    files = sorted(held(folder), reverse=True)
    kept, deleted, now = 0, 0, time.time()
    for written, size, path in files:
        kept += size
        if now - written > life or kept > most:
            with suppress(OSError):  # one that can't be deleted keeps no other
                path.unlink(missing_ok=True)
                deleted += 1
                if path.parent != folder:
                    path.parent.rmdir()  # if it is empty now
    return deleted


def sweeping(
    folder: Path, life: float, most: int, every: float
) -> Callable[[Any], AbstractAsyncContextManager[None]]:  # fmt: skip
    """A server's lifespan during which the folder is swept every so many seconds."""

    async def work() -> None:
        while True:
            await asyncio.sleep(every)
            with suppress(OSError):  # of this time; the next one may do better
                await asyncio.to_thread(sweep, folder, life, most)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
