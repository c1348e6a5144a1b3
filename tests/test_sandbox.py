"""engine/sandbox.py: the same frames from a process of its own, which may hang, die, swell or lie without harm."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import sandbox
from engine.container import VideoError
from engine.sandbox import Sandbox
from engine.video import Sampling, read
from tests import media

PLAIN = Sampling(pixels=96 * 64, factor=4)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media.write(tmp_path_factory.mktemp("sandbox") / "clip.mp4", count=240, g="24", preset="fast")


@pytest.fixture
def box() -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.close()


def test_it_reads_as_one_reads_at_home(box: Sandbox, mp4: Path, tmp_path: Path) -> None:
    files = [
        mp4,
        media.damage(mp4, tmp_path / "hurt.mp4", 0.5, 300),
        media.write(tmp_path / "a.gif", "gif", pixels="rgb8"),
    ]
    worker = box.idle[0]
    for path in files:
        here, there = read(path, PLAIN), box.read(path, PLAIN)
        assert np.array_equal(here.frames, there.frames)
        assert np.array_equal(here.times, there.times)
        names = ("duration", "fps", "size", "reader", "asked", "notices", "sampling", "spacing")
        assert [getattr(here, name) for name in names] == [getattr(there, name) for name in names]
    assert box.idle == [worker]  # one for all
    assert worker.served == 3


def test_refusals_are_the_same_sentences(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_bytes(b"This is only text.\n" * 500)
    for path in (tmp_path / "text.mp4", tmp_path / "none.mp4", tmp_path, media.huge_picture(tmp_path / "huge.png")):
        said = []
        for reader in (read, box.read):
            with pytest.raises(VideoError) as refused:
                reader(path, PLAIN)
            said.append(str(refused.value))
        assert said[0] == said[1]
    assert len(box.idle) == 1  # and it serves on


def test_a_worker_that_hangs_is_killed(box: Sandbox, mp4: Path) -> None:
    worker = box.idle[0]
    os.kill(worker.process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(VideoError, match=r"clip.mp4 takes longer than 0.3 s to open"):
        box.read(mp4, PLAIN, 0.3)
    assert time.monotonic() - begin < 10
    assert worker.process.returncode == -signal.SIGKILL
    assert len(box.read(mp4, PLAIN).frames) == 40  # another has taken its place


def test_a_visitor_who_leaves_ends_the_work(box: Sandbox, mp4: Path) -> None:
    worker, left = box.idle[0], threading.Event()
    os.kill(worker.process.pid, signal.SIGSTOP)
    threading.Timer(0.3, left.set).start()
    begin = time.monotonic()
    with pytest.raises(VideoError):
        box.read(mp4, PLAIN, 60, left)
    assert time.monotonic() - begin < 10
    assert worker.process.returncode == -signal.SIGKILL


def test_a_worker_that_dies_leaves_its_frames(box: Sandbox, mp4: Path) -> None:
    worker = box.idle[0]

    def dying(*asked: object) -> Iterator:
        for place, item in enumerate(worker.decode(*asked, threading.Event())):
            if place == 3:
                worker.process.kill()
            yield item

    large = media.write(mp4.with_name("large.mp4"), count=48, size=(1280, 720))  # more than a pipe holds
    clip = read(large, PLAIN, 60, dying)
    assert 3 <= len(clip.frames) < clip.asked == 8
    assert f"{len(clip.frames)} of the 8 frames asked for could be read" in clip.notices[0]
    assert not worker.ready


def test_a_worker_that_died_while_it_waited_costs_nothing(box: Sandbox, mp4: Path) -> None:
    box.idle[0].process.kill()
    box.idle[0].process.wait()
    assert len(box.read(mp4, PLAIN).frames) == 40


def test_memory_is_limited(tmp_path: Path) -> None:
    media.huge_picture(tmp_path / "large.png", 8000, 8000, depth=16, whole=True)  # within all limits but this one
    small, large = Sandbox(2**30), Sandbox()
    try:
        with pytest.raises(VideoError) as refused:
            small.read(tmp_path / "large.png", PLAIN)
        assert len(str(refused.value)) < 200
        assert large.read(tmp_path / "large.png", PLAIN).size == (8000, 8000)
    finally:
        small.close()
        large.close()


def test_a_worker_has_no_secrets_and_writes_no_files(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker = sandbox.Worker(sandbox.MEMORY)
    try:
        worker.decode("/none.mp4", PLAIN, 5, threading.Event()).close()
        with pytest.raises(VideoError):
            read(
                "/none.mp4", PLAIN, 20, lambda *asked: worker.decode(*asked, threading.Event())
            )  # its limits are set by now
        assert b"secret" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
        assert resource.prlimit(worker.process.pid, resource.RLIMIT_FSIZE) == (0, 0)
        assert resource.prlimit(worker.process.pid, resource.RLIMIT_CORE) == (0, 0)
        assert resource.prlimit(worker.process.pid, resource.RLIMIT_AS) == (sandbox.MEMORY, sandbox.MEMORY)
    finally:
        worker.close()


def test_a_worker_is_light(mp4: Path) -> None:
    code = (
        "import sys; from engine.sandbox import decode, Sampling;"
        f"assert len(list(decode({str(mp4)!r}, Sampling(), 60))) > 20; sys.exit(len({{'torch', 'gradio'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_fresh_worker_takes_over_in_time(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "FILES", 2)
    box = Sandbox()
    workers = []
    for _ in range(3):
        workers.append(box.idle[0] if box.idle else None)
        box.read(mp4, PLAIN)
    assert workers[0] is workers[1]
    assert workers[2] is None
    assert workers[0].process.returncode is not None
    box.close()


def test_several_threads_have_workers_of_their_own(box: Sandbox, mp4: Path, tmp_path: Path) -> None:
    other = media.write(tmp_path / "other.mp4", count=24)
    found: list[tuple[int, int]] = []

    def work(path: Path, frames: int) -> None:
        for _ in range(3):
            found.append((frames, len(box.read(path, PLAIN).frames)))

    threads = [threading.Thread(target=work, args=given) for given in ((mp4, 40), (other, 4), (mp4, 40))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(wanted == got for wanted, got in found)


def test_a_worker_goes_when_the_page_does(mp4: Path) -> None:
    code = (
        "import os, signal; from engine.sandbox import *; box = Sandbox();"
        f"box.read({str(mp4)!r}, Sampling()); print(box.idle[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pid, until = int(told.stdout), time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.1)


ASKED = {
    "name": "a.mp4", "width": 4, "height": 4, "duration": 1.0, "fps": 1.0, "moments": [0.0], "shown": [0], "times": [0.0],
    "spacing": None, "notices": [], "still": False,
}  # fmt: skip
PICTURE = {"reader": "PyAV", "index": 0, "shape": [4, 4]}


@pytest.mark.parametrize(
    "said",
    [
        [],
        ["nonsense"],
        [[]],
        [None],
        ["x" * 2**21],
        [{"name": "a.mp4"}],
        [ASKED | {"width": -4}, PICTURE, b"\0" * 48, {"ready": True}],
        [ASKED | {"width": 10**9}],
        [ASKED | {"shown": [0] * 9}],
        [ASKED | {"times": "now"}],
        [ASKED, PICTURE | {"shape": [10**6, 10**6]}],
        [ASKED, PICTURE | {"shape": [-4, -4]}, b"\0" * 48],
        [ASKED, PICTURE | {"shape": "large"}],
        [ASKED, PICTURE | {"index": 7}, b"\0" * 48, {"ready": True}],
        [ASKED, PICTURE | {"index": []}, b"\0" * 48],
        [ASKED, PICTURE, b"\0" * 20],
        [ASKED, {"index": 0}, {"ready": True}],
        [ASKED, {"error": "no"}, {"ready": "maybe"}],
        [{"error": 7}, {"ready": True}],
    ],
)
def test_a_worker_that_lies_is_not_believed(box: Sandbox, said: list) -> None:
    """As one would that a hostile file had taken over: whatever it says, there is a sentence, or less than was asked."""
    worker = box.idle.pop()
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() + b"\n" for part in said]
    worker.orders, worker.answers = io.BytesIO(), io.BytesIO(b"".join(parts))
    with pytest.raises(VideoError) as refused:
        read("a.mp4", PLAIN, 20, lambda *asked: worker.decode(*asked, threading.Event()))
    assert str(refused.value).count("\n") == 0
    worker.close()
