"""Pictures to an H.264 mp4 that browsers play. Knows nothing of worlds."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

# Colours of small clips are BT.601, but a player only knows if it is told; without it they shift in some.
_BT601 = {"colorspace": "smpte170m", "color_primaries": "smpte170m", "color_trc": "smpte170m", "color_range": "tv"}
_OPTIONS = {"crf": "20", "preset": "medium", **_BT601}


def film(frames: Iterable[np.ndarray], path: str | os.PathLike[str], width: int, height: int, fps: int) -> None:
    """Encode uint8 RGB frames [height, width, 3] at `fps` into `path`, which appears only when it is whole.

    Raises ValueError, in one sentence, for a folder that isn't there, odd sides, or a frame rate below 1.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"Clips are mp4 files; end the name {path.name!r} in .mp4.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {str(path.parent)!r}; create it first.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; give the clip a name of its own.")
    if width % 2 or height % 2 or min(width, height) < 16:
        raise ValueError(f"H.264 wants even sides of at least 16 pixels, not {width}x{height}.")
    if fps < 1:
        raise ValueError(f"A clip needs at least one frame a second, not {fps}.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _encode(frames, partial, width, height, fps)
        os.replace(partial, path)
    except PermissionError as error:
        raise ValueError(f"May not write to {str(path)!r}; choose another folder.") from error
    finally:
        partial.unlink(missing_ok=True)


def _encode(frames: Iterable[np.ndarray], path: Path, width: int, height: int, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
