"""Tiny test files, made with PyAV. Every frame carries its number as a row of bars, so that a wrong frame shows."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 12
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"preset": "ultrafast"}, "libsvtav1": {"preset": "12"}}


def numbered(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: bar b is white where bit b of the number is set; the top line is red."""
    bars = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).repeat(width // BITS)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : len(bars)] = 255 * bars[:, None]
    picture[: height // 4] = (255, 0, 0)
    return picture


def number(picture: np.ndarray) -> int:
    """The number that `numbered` drew, at whatever size it is now."""
    step = picture.shape[1] / (picture.shape[1] // BITS * BITS / BITS) if picture.shape[1] < 2 * BITS else None
    assert step is None, "too small to tell the bars apart"
    line = picture[picture.shape[0] * 3 // 4, :, 1].astype(int)
    return sum(int(line[int((bit + 0.5) * len(line) / BITS)] > 127) << bit for bit in range(BITS))


def encoder(*names: str) -> str | None:
    """The first of these encoders that this PyAV has."""
    return next((name for name in names if name in av.codecs_available and _encodes(name)), None)


def _encodes(name: str) -> bool:
    try:
        return av.Codec(name, "w").is_encoder
    except av.codec.codec.UnknownCodecError:
        return False


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
    with av.open(str(path), "w") as container:
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


def remux(source: Path, target: Path, turn: int = 0, shift: int = 0, **options: str) -> Path:
    """The same packets in another file, turned by `turn` degrees and later by `shift` ticks."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        if turn:
            stream.set_display_rotation(turn)
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                new.mux(packet)
    return target


def sound(path: Path) -> Path:
    """A file that holds a second of silence and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
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


def huge_picture(path: Path, width: int = 20_000, height: int = 20_000) -> Path:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path
