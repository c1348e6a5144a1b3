"""Many visitors at once: everyone is answered with their own answer, or told their place, or that the page is busy.

python -m tests.load --visitors 50 --minutes 3      # under load; prints figures as JSON, exit 1 if anybody was lost
python -m tests.load --visitors 1 --minutes 60      # a soak: memory before and after
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
import psutil

from engine import worlds
from tests.serve import Server, served

PATIENCE = 300.0  # seconds after which a request counts as lost


@dataclass
class Tally:
    """What became of the requests."""

    visitors: int
    asked: int = 0
    answered: int = 0
    busy: int = 0  # told that the line is full
    left: int = 0  # went away while they waited
    lost: list[str] = field(default_factory=list)  # no answer, an error, or somebody else's answer
    overtaken: int = 0  # places in the line that grew
    seconds: list[float] = field(default_factory=list)  # from asking to the answer
    places: list[int] = field(default_factory=list)  # that were told
    memory: list[float] = field(default_factory=list)  # MB of the page and its workers, each second

    def told(self) -> dict[str, Any]:
        cuts = quantiles(self.seconds, n=100) if len(self.seconds) > 1 else self.seconds * 99
        return {
            "visitors": self.visitors, "asked": self.asked, "answered": self.answered, "busy": self.busy,
            "left": self.left, "lost": self.lost, "overtaken": self.overtaken, "places_told": len(self.places),
            "furthest_place": max(self.places, default=0),
            "seconds": {f"p{p}": round(cuts[p - 1], 2) for p in (50, 90, 99)} if cuts else None,
            "memory_mb": {"first": self.memory[0], "last": self.memory[-1], "most": max(self.memory)},
        }  # fmt: skip


@dataclass
class Visitor:
    """One browser's session with the page, in Gradio's own protocol."""

    client: httpx.AsyncClient
    session: str
    functions: dict[str, int]  # number by name

    @classmethod
    async def arrive(cls, client: httpx.AsyncClient, session: str) -> Visitor:
        config = (await client.get("/config")).json()
        return cls(client, session, {d["api_name"]: d["id"] for d in config["dependencies"] if d["api_name"]})

    async def upload(self, name: str, content: bytes) -> dict[str, Any]:
        """The file as components take it."""
        sent = await self.client.post("/gradio_api/upload", files={"files": (name, content, "video/mp4")})
        sent.raise_for_status()
        return {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    async def join(self, function: str, data: list[Any]) -> httpx.Response:
        asked = {"data": data, "fn_index": self.functions[function], "session_hash": self.session}
        return await self.client.post("/gradio_api/queue/join", json=asked)

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What the page says until it has no more to say."""
        asked = {"session_hash": self.session}
        async with self.client.stream("GET", "/gradio_api/queue/data", params=asked) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data: "):
                    message = json.loads(line.removeprefix("data: "))
                    if message["msg"] == "close_stream":
                        return
                    yield message

    async def call(self, function: str, data: list[Any]) -> list[Any]:
        """The function's outputs. Errors: RuntimeError with what the page says."""
        joined = await self.join(function, data)
        if joined.status_code != 200:
            raise RuntimeError(f"{joined.status_code} {joined.text[:200]}")
        outputs: list[Any] = []
        async for message in self.messages():
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RuntimeError(str(message["output"].get("error")))
                outputs = message["output"]["data"]
        return outputs


def own_clip(number: int, folder: Path) -> tuple[worlds.Record, bytes]:
    """Every visitor films a clip of their own."""
    record = worlds.make(worlds.FAMILIES[number % 3], 1 + number % 4, number, "fresh")
    path = folder / f"visitor-{number}.mp4"
    worlds.write(record, path, width=168, height=112)
    return record, path.read_bytes()


async def ask(visitor: Visitor, asked: list[Any], leaves: bool, tally: Tally) -> dict[str, Any] | None:
    """One request to its end -> the answer; None where the page is busy, or the visitor leaves it waiting."""
    joined = await visitor.join("think", asked)
    if joined.status_code == 503:
        tally.busy += 1
        return None
    joined.raise_for_status()
    place = 10**9
    async for message in visitor.messages():
        if message["msg"] == "estimation" and message["rank"] is not None:
            tally.places.append(message["rank"] + 1)
            tally.overtaken += message["rank"] > place
            place = message["rank"]
        if leaves:
            tally.left += 1
            return None
        if message["msg"] == "process_completed" and message["success"]:
            return message["output"]["data"][0]
    raise RuntimeError(f"no answer, but {message}")


async def visit(
    client: httpx.AsyncClient, number: int, folder: Path, until: float, rounds: int, tally: Tally, patience: float
) -> None:
    """Asks about one clip again and again; every answer must be the first one, and to this visitor's own question."""
    chance = random.Random(number)
    visitor = await Visitor.arrive(client, f"visitor{number}")
    record, content = await asyncio.to_thread(own_clip, number, folder)
    clip = await visitor.upload(f"visitor-{number}.mp4", content)
    question, first = f"{record.question} ({number})", None
    asked = [clip, question, "\n".join(record.options), 4 + number % 5, number % 2 == 0]
    done = 0
    while done < rounds and time.monotonic() < until:
        begin = time.monotonic()
        tally.asked += 1
        try:
            answer = await asyncio.wait_for(ask(visitor, asked, bool(done) and chance.random() < 0.1, tally), patience)
        except (httpx.HTTPError, TimeoutError, asyncio.TimeoutError, RuntimeError) as error:
            tally.lost.append(f"visitor {number}: {type(error).__name__} {error}")
            answer = None
        if answer:
            tally.answered += 1
            tally.seconds.append(time.monotonic() - begin)
            told = {name: answer[name] for name in ("answer", "options", "thoughts", "settings", "slots")}
            first = first or told
            if told != first or (told["settings"]["question"], told["slots"]) != (question, 4 + number % 5):
                tally.lost.append(f"visitor {number} got another's answer: {told}")
        done += 1
        await asyncio.sleep(chance.uniform(0, 1))


def megabytes(pid: int) -> float:
    """Resident memory of a process and its children."""
    process = psutil.Process(pid)
    return round(sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]) / 2**20, 1)


async def load(
    server: Server, visitors: int, folder: Path, seconds: float = 1e9, rounds: int = 10**9, patience: float = PATIENCE
) -> Tally:
    """Lets visitors in, all at once, for so many seconds or rounds each. Afterwards nobody is left in the line."""
    tally = Tally(visitors)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # else one may close as it is used again
    async with httpx.AsyncClient(base_url=server.url, timeout=patience, limits=limits) as client:
        await visit(client, 10**6, folder, 1e12, 2, Tally(1), patience)  # warm before memory is first measured
        until = time.monotonic() + seconds

        async def watch() -> None:
            while True:
                tally.memory.append(megabytes(server.pid))
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(visit(client, i, folder, until, rounds, tally, patience) for i in range(visitors)))
        watching.cancel()
        for _ in range(100):  # those who left are noticed within a moment
            waiting = (await client.get("/gradio_api/queue/status")).json()["queue_size"]
            if not waiting:
                break
            await asyncio.sleep(0.1)
        else:
            tally.lost.append(f"{waiting} places are still taken")
        tally.memory.append(megabytes(server.pid))
    return tally


def main() -> int:
    known = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    known.add_argument("--visitors", type=int, default=50)
    known.add_argument("--minutes", type=float, default=3)
    known.add_argument("--patience", type=float, default=PATIENCE, help="seconds after which a request counts as lost")
    options = known.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
        began = time.monotonic()
        tally = asyncio.run(
            load(server, options.visitors, Path(folder), 60 * options.minutes, patience=options.patience)
        )
        traces = server.log.read_text().count("Traceback")
        print(
            json.dumps(tally.told() | {"wall_seconds": round(time.monotonic() - began), "tracebacks": traces}, indent=1)
        )
    return 1 if tally.lost or tally.overtaken or traces else 0


if __name__ == "__main__":
    sys.exit(main())
