"""Decodes strangers' files in a process that has little to lose: limited memory and time, no secrets, no file to write.

A worker starts in a fraction of a second (it imports no torch) and serves one file after another. It is killed when one
takes too long or its visitor leaves; then the frames that came are kept, or a sentence says that there are none. It
tells what it found in JSON and raw bytes, never in pickles. Knows neither the page nor models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.config import build
from engine.container import MAX_PIXELS, VideoError
from engine.video import BUDGET_SECONDS, Asked, Clip, Decoded, Sampling, decode, read

MEMORY = 3 * 2**30  # bytes of addresses that a worker may have
FILES = 200  # that a worker reads before a fresh one takes over
LONGEST = 2**20  # bytes of a message, pictures apart
KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment; the rest may hold secrets


class Sandbox:
    """Workers waiting for files. May be called from several threads; each file has a worker of its own."""

    def __init__(self, memory: int = MEMORY) -> None:
        self.memory = memory
        self.idle = [Worker(memory)]

    def read(
        self, path: str | Path, sampling: Sampling, seconds: float = BUDGET_SECONDS, left: threading.Event | None = None
    ) -> Clip:
        """As `video.read`, in a worker, which is killed when `left` is set. Raises VideoError."""
        worker = self._free()
        try:
            return read(path, sampling, seconds, partial(worker.decode, left=left or threading.Event()))
        finally:
            if worker.ready and worker.served < FILES:
                self.idle.append(worker)
            else:
                worker.close()

    def _free(self) -> Worker:
        with suppress(IndexError):
            worker = self.idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
        return Worker(self.memory)

    def close(self) -> None:
        while self.idle:
            self.idle.pop().close()


class Worker:
    """One process. `ready`: it has done all that it was asked for, and nothing of it goes on."""

    def __init__(self, memory: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.sandbox", str(memory)],
            cwd=Path(__file__).parents[1],
            env={name: os.environ[name] for name in KEPT if name in os.environ} | {"MALLOC_ARENA_MAX": "2"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the page, which lets its workers go
        )
        assert self.process.stdin
        assert isinstance(self.process.stdout, BufferedReader)
        self.orders, self.answers = self.process.stdin, self.process.stdout
        self.served, self.ready = 0, True

    def decode(self, path: str | Path, sampling: Sampling, seconds: float, left: threading.Event) -> Decoded:
        """As `video.decode`. If the worker dies, the file ends there; before it has begun, VideoError is raised."""
        self.served, self.ready = self.served + 1, False
        deadline, over = time.monotonic() + seconds, threading.Event()
        threading.Thread(target=self._watch, args=(deadline + 1, left, over), daemon=True).start()
        asked, refusal = None, None
        try:
            order = {"path": str(Path(path).absolute()), "sampling": asdict(sampling), "seconds": seconds}
            self.orders.write(json.dumps(order).encode() + b"\n")
            self.orders.flush()
            for told, picture in self._told():
                if "error" in told:
                    refusal = VideoError(told["error"])
                elif asked is None:
                    asked = checked(build(Asked, told))
                    yield asked
                elif picture is not None and told["index"] in asked.shown:
                    yield str(told["reader"]), told["index"], picture
        except (OSError, KeyError, TypeError, ValueError):  # it died, or said what it never should
            self.ready = False
        finally:
            over.set()
        if refusal or asked is None:
            why = f"takes longer than {seconds:g} s to open" if time.monotonic() > deadline else "can't be decoded"
            raise refusal or VideoError(f"{Path(path).name} {why}: give another file.")

    def _told(self) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
        """The messages about one file, pictures with those that announce them. Raises ValueError where they break off."""
        while True:
            told = json.loads(self.answers.readline(LONGEST))
            if not isinstance(told, dict):
                raise ValueError(told)
            if "ready" in told:
                self.ready = told["ready"] is True
                return
            picture = None
            if "shape" in told:
                height, width = told["shape"]
                if not 0 < height * width <= MAX_PIXELS:
                    raise ValueError(told)
                picture = np.empty((height, width, 3), np.uint8)
                if self.answers.readinto(picture.reshape(-1).data) < picture.nbytes:
                    raise ValueError(told)
            yield told, picture

    def _watch(self, until: float, left: threading.Event, over: threading.Event) -> None:
        while not over.wait(0.1):
            if left.is_set() or time.monotonic() > until:
                self.process.kill()
                return

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def checked(asked: Asked) -> Asked:
    """Raises ValueError for what no file can say."""
    if not len(asked.moments) == len(asked.shown) == len(asked.times) > 0 < asked.width * asked.height <= MAX_PIXELS:
        raise ValueError(asked)
    return asked


# What runs in the worker.


def serve(orders: BinaryIO, answers: BinaryIO) -> None:
    """Decodes one file after another; ends with the page, or when a file has left something behind that goes on."""

    def tell(told: dict[str, Any], picture: np.ndarray | None = None) -> None:
        answers.write(json.dumps(told).encode() + b"\n")
        if picture is not None:
            answers.write(np.ascontiguousarray(picture).reshape(-1).data)
        answers.flush()

    ready = True
    while ready and (line := orders.readline()):
        order = json.loads(line)
        limit("RLIMIT_CPU", int(time.process_time() + order["seconds"] * (os.cpu_count() or 1)) + 10, forever=False)
        try:
            for item in decode(order["path"], Sampling(**order["sampling"]), order["seconds"]):
                if isinstance(item, Asked):
                    tell(asdict(item))
                else:
                    reader, index, picture = item
                    tell({"reader": reader, "index": index, "shape": picture.shape[:2]}, picture)
        except VideoError as error:
            tell({"error": str(error)})
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        for thread in others:
            thread.join(0.5)
        ready = not any(thread.is_alive() for thread in others)  # a reader may hang, and was left behind
        tell({"ready": ready})


def limit(name: str, most: int, forever: bool = True) -> None:
    """Bounds a resource where the system can; `forever`: so that it can't be raised again."""
    with suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (most, most if forever else resource.getrlimit(kind)[1]))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    limit("RLIMIT_AS", int(sys.argv[1]))
    limit("RLIMIT_FSIZE", 0)
    limit("RLIMIT_CORE", 0)
    for library in ("av", "cv2", "decord"):  # now, rather than while someone waits
        with suppress(ImportError, OSError, RuntimeError):
            __import__(library)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
