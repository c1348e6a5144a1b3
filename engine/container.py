"""What a video file holds, told by its packets without decoding them, or one clear sentence about why it can't be read.

That gives every frame's moment to the tick of the container, the true number of frames, and what the file is. Anamorphic
pictures are taken as they are stored; of several videos in one file the main one is read. Knows nothing of who decodes it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame

MAX_BYTES = 2 * 2**30  # of the file
MAX_PIXELS = 8192 * 8192  # of one source picture
MAX_ASPECT = 200  # longer side over shorter side
MAX_HOURS = 6.0
MAX_FRAMES = 2**21  # that a file may hold: six hours at 97 a second

# Demuxers that may open a file. Without the list a playlist named .mp4 would read other files, or the network. Not in
# it: those that find their streams late (MPEG, FLV), on which PyAV before 18 crashes when it is given any option.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,"
    "ogg,wav,mp3,flac,aac"  # these so that a file of sound is told from one of rubbish
)
# How a picture of each demuxer begins, unless it moves. FFmpeg itself goes by a file's name too, and takes a photograph, or a
# name with a mark such as ? in it, for one of a numbered series, which would read other files.
PICTURES = {
    "jpeg_pipe": rb"\xff\xd8\xff",
    "png_pipe": rb"\x89PNG\r\n\x1a\n(?!.*acTL)",
    "webp_pipe": rb"RIFF....WEBP(?!VP8X.*ANIM)",
    "bmp_pipe": rb"BM....\0\0\0\0",
    "gif": rb"GIF8[79]a",
}
HEAD_BYTES = 2**16  # by which a picture is told
READABLE = "a whole MP4, MOV, WebM, MKV, AVI or GIF file, or a JPEG, PNG, WebP or BMP picture"
INDEXED = ("mov", "matroska")  # jumps are exact here
STAMPED = (*INDEXED, "gif")  # every packet carries its moment; in other containers frames are counted


class VideoError(ValueError):
    """A file that can't be used. The message is one sentence for the person who gave it."""


@dataclass(frozen=True, eq=False)
class Source:
    """What the packets of a file say about it."""

    path: Path
    kind: str  # name of the container
    simple: bool  # in a form on which decord and OpenCV, which count frames, are exact
    stream: int  # index of the video stream in the file
    stamped: bool  # frames are found by their stamps, else by counting
    stamps: np.ndarray  # int64 [N], ascending, in ticks
    times: np.ndarray  # float64 [N], the same in seconds from the first
    keys: np.ndarray  # int64 [K], stamps of the keyframes, where jumps to them are exact
    duration: float
    fps: float
    width: int
    height: int
    turns: int  # quarter turns, counter-clockwise, that put the stored picture upright
    notices: tuple[str, ...]

    @property
    def still(self) -> bool | None:
        """Whether it is a picture rather than a film; None for a GIF and a film of one picture, which may be either."""
        if self.kind.endswith("_pipe"):
            return True
        return None if self.kind == "gif" or len(self.stamps) == 1 else False

    @property
    def slack(self) -> float:
        """Seconds by which a moment may miss a frame's start: Matroska rounds its stamps to milliseconds."""
        return min(1e-3, 0.25 / self.fps)


def inspect(path: str | Path, deadline: float, seconds: float) -> Source:
    """List the packets of a file, decoding one picture only; refuse in one sentence what can't be read."""
    import av

    path = checked(path)
    rows, first, end = [], None, 0.0  # [N] (pts, dts, length, is a keyframe, is hidden); a picture; seconds
    try:
        with opened(path) as container:
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not videos:
                raise VideoError(f"{path.name} holds only sound or text: give a file with a video in it.")
            stream = max(videos, key=lambda s: s == container.streams.best("video"))
            index, tick, rate, stored = stream.index, stream.time_base, float(stream.average_rate or 0), stream.frames
            kind, declared = container.format.name.split(",")[0], (container.duration or 0) / 1e6
            check_limits(path, stream.codec_context.width, stream.codec_context.height, declared)
            for packet in container.demux():  # sound too: together they end where the file says, or it was cut off
                if time.monotonic() > deadline:
                    raise VideoError(f"{path.name} takes longer than {seconds:g} s to open: give a smaller one.")
                length = packet.duration or 0
                if packet.pts is not None:
                    end = max(end, float((packet.pts + length) * packet.time_base))
                if packet.stream_index == index:
                    first = first or next((frame for frame, _ in frames_of([packet])), None)
                    if packet.size:
                        rows.append((packet.pts, packet.dts, length, packet.is_keyframe, packet.is_discard))
                    if len(rows) > MAX_FRAMES:
                        raise VideoError(f"{path.name} holds more than {MAX_FRAMES} pictures: give a shorter one.")
    except av.error.FFmpegError:  # at the start: no video; later: what came before is used
        pass
    if first is None:
        raise VideoError(f"{path.name} can't be read or is cut off: give {READABLE}.")

    notices = []
    if kind.endswith("_pipe") and len(rows) > 1:  # a phone's photograph has previews and maps of depth behind it
        notices.append(f"Of the {len(rows)} pictures in the file the first is read.")
        rows = rows[:1]
    stamped = (kind in STAMPED or kind.endswith("_pipe")) and all(row[0] is not None for row in rows)
    if stamped:  # frames that an edit list hides serve others only; a stamp standing twice is a VP8 frame never shown
        table = {pts: length for pts, _, length, _, hidden in rows if not hidden}
    else:  # frames are shown in the rhythm in which they are decoded
        table = {dts: length for _, dts, length, _, _ in rows if dts is not None}
    if not table:
        raise VideoError(f"{path.name} does not say when its pictures are shown: export it again.")
    stamps = np.array(sorted(table), np.int64)
    times = (stamps - stamps[0]).astype(np.float64) * tick.numerator / tick.denominator
    lengths = np.array([table[stamp] for stamp in stamps.tolist()]) * float(tick)
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else rate or 1.0
    fps = rate if abs(rate - fps) < 0.01 * fps else float(fps)
    duration, turns = float(times[-1] + (lengths[-1] or 1 / fps)), round(first.rotation / 90)
    width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
    check_limits(path, width, height, duration)

    missing = max(declared - end, (stored - len(rows)) / fps)
    if kind in (*INDEXED, "avi") and missing > max(0.25, 3 / fps):
        notices.append(f"The file says that it lasts {end + missing:.2f} s, but it is cut off after {end:.2f} s.")
    holes = np.flatnonzero((lengths[:-1] > 0) & (np.diff(times) - lengths[:-1] > 0.5) & stamped)
    if len(holes):
        where = f"{times[holes[0]] + lengths[holes[0]]:.2f} s and {times[holes[0] + 1]:.2f} s"
        more = f", nor in {len(holes) - 1} other places" if len(holes) > 1 else ""
        notices.append(f"No picture is stored between {where}{more}; the one before stands for that time.")
    indexed = [(row[0], row[3]) for row in rows] if stamped and kind in INDEXED else []
    order, key = np.array(indexed, np.int64).reshape(-1, 2).T  # stamps as decoded, and whether a keyframe has them
    newest = np.maximum.accumulate(np.where(key, order, np.iinfo(np.int64).min))
    # decord jumps wrongly where a keyframe is decoded before frames that are shown before it, as HEVC often has it
    simple = bool(indexed) and bool((order >= newest).all()) and len(videos) == 1 and not turns
    keys = np.sort(order[key > 0])
    return Source(
        path, kind, simple, index, stamped, stamps, times, keys, duration, fps, width, height, turns, tuple(notices),
    )  # fmt: skip


def checked(path: str | Path) -> Path:
    """The absolute path of a plain, readable file of a reasonable size."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise VideoError("There is no video yet: give the path of a file.")
    path = Path(path).absolute()
    try:
        size, plain = path.stat().st_size, path.is_file()
        if plain:
            path.open("rb").close()
    except PermissionError:
        raise VideoError(f"{path.name}: permission denied: make it readable, or give another file.") from None
    except (OSError, ValueError):  # missing, a name too long, a zero byte in the name
        raise VideoError(f"There is no file {path.name[:80]!r}: check the path.") from None
    if not plain:
        what = "a folder" if path.is_dir() else "not a regular file"
        raise VideoError(f"{path.name or path} is {what}: give a video file.")
    if not 0 < size <= MAX_BYTES:
        what = f"has {size / 2**30:.1f} GB; at most {MAX_BYTES / 2**30:g} are read" if size else "is empty"
        raise VideoError(f"{path.name} {what}: give another file.")
    return path


def check_limits(path: Path, width: int, height: int, seconds: float) -> None:
    if not 0 < width * height <= MAX_PIXELS:  # FFmpeg says 0 where it refuses
        side = math.isqrt(MAX_PIXELS)
        raise VideoError(f"{path.name} has frames of unknown size, or larger than {side} x {side}.")
    if max(width, height) >= MAX_ASPECT * min(width, height):
        raise VideoError(f"{path.name} has frames of {width} x {height}: the aspect ratio is too extreme.")
    if seconds > MAX_HOURS * 3600:
        raise VideoError(f"{path.name} lasts {seconds / 3600:.1f} hours: at most {MAX_HOURS:g} are read.")


def opened(path: Path) -> InputContainer:
    import av

    limits = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    return av.open(str(path), format=picture_kind(path), options=limits, metadata_errors="replace")


def picture_kind(path: Path) -> str | None:
    """The demuxer of a file that begins as a picture does; None for any other, whose demuxer FFmpeg finds."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return next((kind for kind, begins in PICTURES.items() if re.match(begins, head, re.DOTALL)), None)


def frames_of(packets: Iterable[Packet], recovers: bool = True) -> Iterator[tuple[VideoFrame, bool]]:
    """Frames in the order of showing, and whether each is sound: after damage, none is before the next keyframe."""
    import av

    sound = True
    for packet in packets:
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            sound = False
            continue
        for frame in frames:
            sound = not frame.is_corrupt and (sound or bool(frame.key_frame and recovers))
            yield frame, sound
