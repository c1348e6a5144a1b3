"""Three readers of a file's frames, and which of them is trusted with it.

decord, else OpenCV by grab and retrieve, else PyAV, which reads everything accepted here, leaves out frames that damage has
touched, and jumps from keyframe to keyframe, so that a long file is not decoded from end to end. The first two are trusted
only where they were found exact: whole files in MP4, MOV, Matroska and WebM. No reader sees every damage: of a few wrong
bytes the decoder makes a picture that looks like any other. Knows neither moments nor sizes.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from engine.container import STAMPED, Source, frames_of, opened

STALL_SECONDS = 20.0  # for one frame; then the next reader is tried
SEQUENTIAL = 9_000  # frames: OpenCV decodes from the start, so longer files are left to readers that jump
Pictures = Iterator[tuple[int, np.ndarray]]  # index of a frame in the order of showing, and its uint8 [H, W, 3]


class Broken(Exception):
    """A reader gave up on a file."""


def readers(source: Source) -> list[tuple[str, Callable[[Source, list[int]], Pictures]]]:
    """The reader for a file, and PyAV as its second chance."""
    for name, module, reader, most in (
        ("decord", "decord", by_decord, math.inf),
        ("OpenCV", "cv2", by_opencv, SEQUENTIAL),
    ):
        try:
            if source.simple and len(source.times) <= most:
                importlib.import_module(module)
                return [(name, reader), ("PyAV", by_pyav)]
        except (ImportError, OSError, RuntimeError):  # no wheel for this machine, or one that doesn't load
            continue
    return [("PyAV", by_pyav)]


def by_decord(source: Source, wanted: list[int]) -> Pictures:
    """Raises Broken where it counts other frames than the file holds."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(str(source.path), ctx=decord.cpu(0))
    starts = video.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)  # from float32
    same = np.allclose(starts[1:] - starts[0], source.times[wanted], rtol=1e-6, atol=source.slack)
    if len(video) != len(source.times) or not same:  # frames that VP8 and edit lists hide shift its count
        raise Broken
    for index in wanted:
        picture = video[index].asnumpy()
        if picture.shape[2] != 3:  # of pictures at most 16 wide it makes nonsense
            raise Broken
        yield index, picture


def by_opencv(source: Source, wanted: list[int]) -> Pictures:
    """Stops where a frame was lost."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    video, start, chosen = cv2.VideoCapture(str(source.path), cv2.CAP_FFMPEG), None, set(wanted)
    for index in range(wanted[-1] + 1):
        if not video.grab():
            return
        moment = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        start = moment if start is None else start
        if abs(moment - start - source.times[index]) > source.slack:  # a frame was lost, and with it the count
            return
        if index in chosen:
            yield index, video.retrieve()[1][..., ::-1]


def by_pyav(source: Source, wanted: list[int]) -> Pictures:
    """Leaves out frames that damage has touched."""
    with opened(source.path) as container:
        stream = container.streams[source.stream]
        stream.thread_type = "AUTO"
        recovers = source.kind in STAMPED  # without stamps, nobody knows how many frames the damage took
        frames, index, chosen = frames_of(container.demux(stream), recovers), -1, set(wanted)
        for target in wanted:
            if target <= index:
                continue
            keys = source.keys[source.keys <= source.stamps[target]]
            if len(keys) and keys[-1] > source.stamps[max(index, 0)]:
                container.seek(int(keys[-1]), stream=stream)
                frames = frames_of(container.demux(stream), recovers)
            for frame, sound in frames:
                index = index + 1
                if source.stamped and frame.pts is not None:
                    index = int(np.searchsorted(source.stamps, frame.pts, side="right")) - 1
                if index in chosen and sound:
                    chosen.remove(index)
                    yield index, np.rot90(frame.to_ndarray(format="rgb24"), source.turns)
                if index >= target:
                    break


def ahead(pictures: Pictures, deadline: float) -> Pictures:
    """The same, drawn in a thread of its own, so that a decoder that hangs can be left behind. Raises Broken."""
    items: queue.Queue = queue.Queue(maxsize=1)  # a 4K picture is 25 MB
    left = threading.Event()

    def work() -> None:
        try:
            for item in pictures:
                items.put(item)
                if left.is_set():
                    return
            items.put(None)
        except Exception as error:  # three libraries, each with its own ways to fail
            items.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (item := items.get(timeout=max(0.0, min(STALL_SECONDS, deadline - time.monotonic())))) is not None:
            if isinstance(item, Exception):
                raise Broken from item
            yield item
    except queue.Empty:
        raise Broken from None
    finally:
        left.set()
        while not items.empty():
            items.get_nowait()
