"""A video file -> resized RGB frames with their exact moments, or one clear sentence about why not.

PyAV lists the packets first, without decoding them: that gives every frame's moment to the tick of the container, the
true number of frames, and what the file is. Moments are then chosen, and one of three readers decodes the frames shown
at them: decord, else OpenCV by grab and retrieve, else PyAV, which reads everything accepted here, leaves out frames
that damage has touched, and jumps from keyframe to keyframe, so that a long file is not decoded from end to end.
The first two are trusted only where they were found exact: whole files in MP4, MOV, Matroska and WebM. No reader sees
every damage: of a few wrong bytes the decoder makes a picture that looks like any other.

Knows nothing of models: frames leave as uint8, and normalising or pairing them is the backbone's business. Anamorphic
pictures are taken as they are stored; of several videos in one file the main one is read.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
MAX_RESULT_BYTES = 8 * 2**30  # of the frames handed back
BUDGET_SECONDS = 60.0  # for one file; frames decoded until then are kept
STALL_SECONDS = 20.0  # for one frame; then the next reader is tried
SEQUENTIAL = 9_000  # frames: OpenCV decodes from the start, so longer files are left to readers that jump

Pictures = Iterator[tuple[int, np.ndarray]]  # index of a frame in the order of showing, and its uint8 [H, W, 3]
Decoded = Generator["Asked | tuple[str, int, np.ndarray]"]  # first what is asked of a file; then reader, index, picture

# Demuxers that may open a file. Without the list a playlist named .mp4 would read other files, or the network. Not in
# it: those that find their streams late (MPEG, FLV), on which PyAV before 18 crashes when it is given any option.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,"
    "ogg,wav,mp3,flac,aac"  # these so that a file of sound is told from one of rubbish
)
INDEXED = ("mov", "matroska")  # jumps are exact here
STAMPED = (*INDEXED, "gif")  # every packet carries its moment; in other containers frames are counted


class VideoError(ValueError):
    """A file that can't be used. The message is one sentence for the person who gave it."""


class _Broken(Exception):
    """A reader gave up on a file."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a clip, and how large.

    `frames` takes exactly that many, at i * duration / frames. Otherwise `fps` takes the moments 0, 1/fps, 2/fps ...
    below the duration; a count outside min_frames..max_frames is held to that bound and spread evenly. With neither,
    max_frames are spread evenly, or fewer where the clip has fewer. Each moment gets the frame shown at it.
    `pixels` bounds one resized frame, whose sides are multiples of `factor`; `size` instead says (height, width) outright,
    or leaves frames as they are stored. Raises ValueError.
    """

    fps: float | None = 4.0
    frames: int | None = None
    min_frames: int = 4
    max_frames: int = 64
    pixels: int = 84 * 56
    factor: int = 28
    size: tuple[int, int] | Literal["stored"] | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "min_frames", "max_frames", "pixels", "factor"):
            value = getattr(self, name)
            if not ((isinstance(value, Integral) and int(value) >= 1) or (name == "frames" and value is None)):
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.fps is not None and not (isinstance(self.fps, Real) and 1e-6 <= self.fps <= 1000):
            raise ValueError(f"fps must be a number above 0 and at most 1000, not {self.fps!r}.")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames ({self.min_frames}) must not exceed max_frames ({self.max_frames}).")
        if self.pixels < self.factor**2:
            raise ValueError(f"pixels must be at least factor squared ({self.factor**2}), not {self.pixels}.")
        if (self.frames or self.max_frames) * self.pixels * 3 > MAX_RESULT_BYTES:
            raise ValueError("So many frames of so many pixels would fill the memory: ask for fewer of either.")

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames stored in this size get."""
        if self.size == "stored":
            return height, width
        return self.size or smart_size(height, width, self.factor, self.pixels)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one file, and how they were come by. `asked` frames were wanted; fewer means `notices` says why."""

    frames: np.ndarray  # uint8 [frames, height, width, 3], RGB, upright, resized
    times: np.ndarray  # float64 [frames], seconds at which each of them starts, from the start of the file's first
    duration: float  # seconds, of the pictures that the file holds
    fps: float  # of the source, on average
    size: tuple[int, int]  # (width, height) of the source, upright
    reader: str
    asked: int
    notices: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    spacing: float | None = None  # seconds between two asked moments; None: as `times` has it

    @property
    def seconds_per_frame(self) -> float:
        """Seconds between two frames: what was asked for, where that is known; times follow it to within a frame."""
        if self.spacing is not None:
            return self.spacing
        return float(self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else self.duration


@dataclass(frozen=True)
class Asked:
    """What is asked of one file, and what it says of itself. In JSON's own types, so that a process can tell another."""

    name: str
    width: int  # upright
    height: int
    duration: float
    fps: float
    moments: tuple[float, ...]  # seconds, one an asked frame
    shown: tuple[int, ...]  # index of the frame shown at each, in the order of showing
    times: tuple[float, ...]  # seconds at which each of those starts
    spacing: float | None
    notices: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Source:
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
    def slack(self) -> float:
        """Seconds by which a moment may miss a frame's start: Matroska rounds its stamps to milliseconds."""
        return min(1e-3, 0.25 / self.fps)


def decode(path: str | Path, sampling: Sampling, seconds: float = BUDGET_SECONDS) -> Decoded:
    """What is asked of the file at `path`, then its pictures as they are stored, for `seconds` at most.

    Where a reader fails, the next one begins again. Raises VideoError.
    """
    deadline = time.monotonic() + seconds
    source = _inspect(path, deadline, seconds)
    moments, spacing, notices = _moments(source, sampling)
    shown = np.searchsorted(source.times, moments + source.slack, side="right") - 1  # [asked] index of each frame
    yield Asked(
        source.path.name, source.width, source.height, source.duration, source.fps, tuple(moments.tolist()),
        tuple(shown.tolist()), tuple(source.times[shown].tolist()), spacing, source.notices + notices,
    )  # fmt: skip
    wanted = np.unique(shown).tolist()
    for name, reader in _readers(source):
        count = 0
        try:
            for index, picture in _ahead(reader(source, wanted), deadline):
                yield name, index, picture
                count += 1
        except _Broken:
            pass
        if count == len(wanted) or time.monotonic() >= deadline:
            return


def read(
    path: str | Path,
    sampling: Sampling = Sampling(),
    seconds: float = BUDGET_SECONDS,
    decode: Callable[[str | Path, Sampling, float], Decoded] = decode,
) -> Clip:
    """Frames of the file at `path`, chosen by `sampling`. Frames decoded within `seconds` are kept.

    decode: who decodes; `engine.sandbox` has one for files of strangers.
    Raises VideoError, whose message is meant for users.
    """
    deadline = time.monotonic() + seconds
    with closing(decode(path, sampling, seconds)) as decoded:
        asked = next(decoded)
        assert isinstance(asked, Asked)
        height, width = sampling.fit(asked.height, asked.width)
        frames: dict[int, np.ndarray] = {}
        used = ""
        for name, index, picture in decoded:  # type: ignore[misc]
            if name != used:  # PyAV comes last and leaves damaged frames out, so its frames replace those of another
                frames, used = {}, name
            frames[index] = resize(picture[None], height, width)[0]

    late = time.monotonic() >= deadline
    if not frames:
        why = f"takes longer than {seconds:g} s to read" if late else "is damaged: none of it could be decoded"
        raise VideoError(f"{asked.name} {why}; give another file.")
    kept = np.isin(asked.shown, list(frames))  # [asked]
    notices = asked.notices
    if not kept.all():
        lost = np.array(asked.moments)[~kept]
        damage = f"the file is damaged between {lost[0]:.2f} s and {lost[-1]:.2f} s"
        why = f"reading was stopped after {seconds:g} s" if late else damage
        notices += (f"{kept.sum()} of the {len(kept)} frames asked for could be read: {why}.",)
    return Clip(
        np.stack([frames[index] for index in asked.shown if index in frames]), np.array(asked.times)[kept],
        asked.duration, asked.fps, (asked.width, asked.height), used, len(kept), notices, sampling, asked.spacing,
    )  # fmt: skip


def resize(frames: np.ndarray, height: int, width: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> np.ndarray:
    """uint8 [frames, H, W, 3] -> uint8 [frames, height, width, 3]: antialiased and rounded to uint8, as the image
    processors of transformers do it."""
    import torch
    import torch.nn.functional as F

    if frames.shape[1:3] == (height, width):
        return frames
    pictures = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # [frames, 3, H, W]
    pictures = F.interpolate(pictures, (height, width), mode=mode, antialias=True)
    return np.ascontiguousarray(pictures.permute(0, 2, 3, 1).numpy())


def smart_size(height: int, width: int, factor: int, pixels: int) -> tuple[int, int]:
    """Qwen's smart_resize: (height, width) in multiples of `factor` with about the same shape, at least factor**2 and
    at most `pixels` pixels; only very long pictures get more, because no side goes below `factor`."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"A picture of {width} x {height} is too long: one side may be {MAX_ASPECT} times the other.")
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > pixels:
        shrink = math.sqrt(height * width / pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < factor**2:
        grow = math.sqrt(factor**2 / (height * width))
        tall, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return tall, wide


def _moments(source: _Source, sampling: Sampling) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Moments to look at in seconds, the distance between two of them, and what the user should know about them."""
    duration, stored = source.duration, len(source.times)
    notices: tuple[str, ...] = ()
    if stored == 1:
        spacing = duration if sampling.fps is None else 1 / sampling.fps
        return np.zeros(1), spacing, ("The file holds a single picture, so nothing moves in it.",)
    if sampling.frames is not None:
        count = sampling.frames
        if count > stored:
            notices = (f"The clip has only {stored} frames, so some of the {count} asked for are repeats.",)
    elif sampling.fps is None:
        count = min(sampling.max_frames, stored)
    else:
        natural = max(1, math.ceil((duration - source.slack) * sampling.fps))
        count = min(max(natural, sampling.min_frames), sampling.max_frames)
        if count == natural:
            return np.arange(count) / sampling.fps, 1 / sampling.fps, ()
        asked = f"{sampling.fps:g} frames a second of a clip of {duration:.2f} s would be {natural}"
        notices = (f"{asked}; {count} spread evenly over it were taken instead.",)
    return np.arange(count) * (duration / count), duration / count, notices


def _inspect(path: str | Path, deadline: float, seconds: float) -> _Source:
    """List the packets of a file, decoding one picture only; refuse in one sentence what can't be read."""
    import av

    path = _checked(path)
    rows, first, end = [], None, 0.0  # [N] (pts, dts, length, is a keyframe, is hidden); a picture; seconds
    try:
        with _open(path) as container:
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not videos:
                raise VideoError(f"{path.name} holds only sound or text: give a file with a video in it.")
            stream = max(videos, key=lambda s: s == container.streams.best("video"))
            index, tick, rate, stored = stream.index, stream.time_base, float(stream.average_rate or 0), stream.frames
            kind, declared = container.format.name.split(",")[0], (container.duration or 0) / 1e6
            _check_limits(path, stream.codec_context.width, stream.codec_context.height, declared)
            for packet in container.demux():  # sound too: together they end where the file says, or it was cut off
                if time.monotonic() > deadline:
                    raise VideoError(f"{path.name} takes longer than {seconds:g} s to open: give a smaller one.")
                length = packet.duration or 0
                if packet.pts is not None:
                    end = max(end, float((packet.pts + length) * packet.time_base))
                if packet.stream_index == index:
                    first = first or next((frame for frame, _ in _frames([packet])), None)
                    if packet.size:
                        rows.append((packet.pts, packet.dts, length, packet.is_keyframe, packet.is_discard))
                    if len(rows) > MAX_FRAMES:
                        raise VideoError(f"{path.name} holds more than {MAX_FRAMES} pictures: give a shorter one.")
    except av.error.FFmpegError:  # at the start: no video; later: what came before is used
        pass
    if first is None:
        raise VideoError(f"{path.name} can't be read or is cut off: give a whole MP4, MOV, WebM, MKV, AVI or GIF file.")

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
    _check_limits(path, width, height, duration)

    notices = []
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
    return _Source(
        path, kind, simple, index, stamped, stamps, times, keys, duration, fps, width, height, turns, tuple(notices),
    )  # fmt: skip


def _checked(path: str | Path) -> Path:
    """The absolute path of a plain, readable file of a reasonable size."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise VideoError("There is no video yet: give the path of a file.")
    path = Path(path).absolute()
    try:
        size, plain = path.stat().st_size, path.is_file()
        if plain:
            path.open("rb").close()
    except PermissionError:
        raise VideoError(f"{path.name} may not be read: give permission, or another file.") from None
    except (OSError, ValueError):  # missing, a name too long, a zero byte in the name
        raise VideoError(f"There is no file {path.name[:80]!r}: check the path.") from None
    if not plain:
        what = "a folder" if path.is_dir() else "no plain file"
        raise VideoError(f"{path.name or path} is {what}: give a video file.")
    if not 0 < size <= MAX_BYTES:
        what = f"has {size / 2**30:.1f} GB; at most {MAX_BYTES / 2**30:g} are read" if size else "is empty"
        raise VideoError(f"{path.name} {what}: give another file.")
    return path


def _check_limits(path: Path, width: int, height: int, seconds: float) -> None:
    if not 0 < width * height <= MAX_PIXELS:  # FFmpeg says 0 where it refuses
        side = math.isqrt(MAX_PIXELS)
        raise VideoError(f"{path.name} has pictures of no known size, or of more than {side} x {side}.")
    if max(width, height) >= MAX_ASPECT * min(width, height):
        raise VideoError(f"{path.name} has pictures of {width} x {height}: too long for their height or width.")
    if seconds > MAX_HOURS * 3600:
        raise VideoError(f"{path.name} lasts {seconds / 3600:.1f} hours: at most {MAX_HOURS:g} are read.")


def _open(path: Path) -> InputContainer:
    import av

    limits = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", "max_pixels": str(MAX_PIXELS)}
    return av.open(str(path), options=limits, metadata_errors="replace")


def _frames(packets: Iterable[Packet], recovers: bool = True) -> Iterator[tuple[VideoFrame, bool]]:
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


def _readers(source: _Source) -> list[tuple[str, Callable[[_Source, list[int]], Pictures]]]:
    """The reader for a file, and PyAV as its second chance."""
    for name, module, reader, most in (("decord", "decord", _decord, math.inf), ("OpenCV", "cv2", _opencv, SEQUENTIAL)):
        try:
            if source.simple and len(source.times) <= most:
                importlib.import_module(module)
                return [(name, reader), ("PyAV", _pyav)]
        except (ImportError, OSError, RuntimeError):  # no wheel for this machine, or one that doesn't load
            continue
    return [("PyAV", _pyav)]


def _decord(source: _Source, wanted: list[int]) -> Pictures:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(str(source.path), ctx=decord.cpu(0))
    starts = video.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)  # from float32
    same = np.allclose(starts[1:] - starts[0], source.times[wanted], rtol=1e-6, atol=source.slack)
    if len(video) != len(source.times) or not same:  # frames that VP8 and edit lists hide shift its count
        raise _Broken
    for index in wanted:
        picture = video[index].asnumpy()
        if picture.shape[2] != 3:  # of pictures at most 16 wide it makes nonsense
            raise _Broken
        yield index, picture


def _opencv(source: _Source, wanted: list[int]) -> Pictures:
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


def _pyav(source: _Source, wanted: list[int]) -> Pictures:
    with _open(source.path) as container:
        stream = container.streams[source.stream]
        stream.thread_type = "AUTO"
        recovers = source.kind in STAMPED  # without stamps, nobody knows how many frames the damage took
        frames, index, chosen = _frames(container.demux(stream), recovers), -1, set(wanted)
        for target in wanted:
            if target <= index:
                continue
            keys = source.keys[source.keys <= source.stamps[target]]
            if len(keys) and keys[-1] > source.stamps[max(index, 0)]:
                container.seek(int(keys[-1]), stream=stream)
                frames = _frames(container.demux(stream), recovers)
            for frame, sound in frames:
                index = index + 1
                if source.stamped and frame.pts is not None:
                    index = int(np.searchsorted(source.stamps, frame.pts, side="right")) - 1
                if index in chosen and sound:
                    chosen.remove(index)
                    yield index, np.rot90(frame.to_ndarray(format="rgb24"), source.turns)
                if index >= target:
                    break


def _ahead(pictures: Pictures, deadline: float) -> Pictures:
    """The same, drawn in a thread of its own, so that a decoder that hangs can be left behind. Raises _Broken."""
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
                raise _Broken from item
            yield item
    except queue.Empty:
        raise _Broken from None
    finally:
        left.set()
        while not items.empty():
            items.get_nowait()
