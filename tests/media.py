"""Tiny test files, made with PyAV. Every frame carries its number as a row of bars, so that a wrong frame shows."""

from __future__ import annotations

import os
import random
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 12
QUIET = {
    "libx265": {"x265-params": "log-level=none"},
    "libx264": {"preset": "ultrafast"},
    "libsvtav1": {"preset": "6", "crf": "5"},
}


def numbered(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: bar b is white where bit b of the number is set; the top line is red."""
    bars = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).repeat(width // BITS)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : len(bars)] = 255 * bars[:, None]
    picture[: height // 4] = (255, 0, 0)
    return picture


def number(picture: np.ndarray) -> int:
    """The number that `numbered` drew, at whatever size it is now."""
    line = picture[picture.shape[0] * 3 // 4, :, 1].astype(int)
    return sum(int(line[int((bit + 0.5) * len(line) / BITS)] > 127) << bit for bit in range(BITS))


def encoder(*names: str) -> str | None:
    """The first of these encoders that this PyAV has."""
    for name in names:
        try:
            return av.Codec(name, "w").name
        except av.codec.codec.UnknownCodecError:
            continue
    return None


@contextmanager
def unhurried() -> Iterator[None]:
    """SVT-AV1 makes root's thread, and so whatever that starts later, a real-time one, which nothing else gets past."""
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(os.sched_get_priority_min(before)))


def write(
    path: Path,
    codec: str = "libx264",
    count: int = 48,
    fps: int = 24,
    size: tuple[int, int] = (96, 64),
    pixels: str = "yuv420p",
    stamps: Sequence[int] | None = None,
    tick: Fraction = Fraction(1, 1000),
    **options: str,
) -> Path:
    """A video of `count` numbered frames; `stamps` are their moments in ticks, where they are not evenly spaced."""
    os.environ.setdefault("SVT_LOG", "0")
    with unhurried(), av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:  # the same bytes each time
        stream = container.add_stream(codec, rate=fps, options={**QUIET.get(codec, {}), **options})
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if stamps is not None:
            stream.codec_context.time_base = tick
        for place in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(place, *size), "rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[place], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def remux(source: Path, target: Path, shift: int = 0, **options: str) -> Path:
    """The same packets in another file, later by `shift` ticks."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                new.mux(packet)
    return target


def joined(parts: Sequence[Path], target: Path) -> Path:
    """The packets of several files, one after another, in one stream that is like the first file's."""
    with av.open(str(target), "w") as new:
        stream, shift = None, 0
        for part in parts:
            with av.open(str(part)) as old:
                stream = stream or new.add_stream_from_template(old.streams.video[0])
                end = shift
                for packet in old.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                        end = max(end, packet.pts + packet.duration)
                        new.mux(packet)
                shift = end
    return target


def declared(source: Path, target: Path, count: int) -> Path:
    """The same AVI, whose header says that it has so many pictures."""
    data = bytearray(source.read_bytes())
    for header, place in ((b"avih", 24), (b"strh", 40)):
        struct.pack_into("<I", data, data.index(header) + place, count)
    target.write_bytes(data)
    return target


def turn(source: Path, target: Path, degrees: int) -> Path:
    """The same MP4 with a matrix that says: show it turned counter-clockwise by `degrees`."""
    data, cosine, sine = (
        bytearray(source.read_bytes()),
        {90: 0, 180: -1, -90: 0}[degrees],
        {90: 1, 180: 0, -90: -1}[degrees],
    )
    matrix = (cosine << 16, -sine << 16, 0, sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, *matrix)
    target.write_bytes(data)
    return target


def sound(path: Path, cover: bool = False) -> Path:
    """A file that holds a second of silence and no film, at most the picture on the cover."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
            shown = av.VideoFrame.from_ndarray(numbered(0), "rgb24").reformat(format="yuvj420p")
            container.mux([*picture.encode(shown), *picture.encode()])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def damage(source: Path, target: Path, where: float, count: int) -> Path:
    """The same file with `count` random bytes from the fraction `where` of it on."""
    data, start = bytearray(source.read_bytes()), int(source.stat().st_size * where)
    data[start : start + count] = random.Random(0).randbytes(count)
    target.write_bytes(data)
    return target


def huge_picture(path: Path, width: int = 20_000, height: int = 20_000, depth: int = 8, whole: bool = False) -> Path:
    """A PNG of a few bytes that claims to be enormous, and is if `whole`. depth: bits of each of its four channels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" * (1 + width * depth // 2)
    packer = zlib.compressobj(1)
    rows = b"".join([*(packer.compress(row) for _ in range(height if whole else 1)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, 6, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path
