"""Sixteen frames of a minute of 1080p, cut for the model: our reader against the plain decord loop with transformers' own
image processor, and our resizing and cutting against the processor's on the same frames.

Each way runs in a process of its own, so that its resident memory can be told. The limit is the time of decoding alone,
with nothing resized or cut: `other` over it.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.measure import alone, line

FRAMES, PIXELS = 16, 128 * 28 * 28
SECONDS, FPS, SIZE = 60, 24, (1920, 1080)


def bench() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = film(Path(folder) / "long.mp4")
        ways: dict[str, Callable[[Path], None]] = {"ours": ours, "other": decord_loop, "decoding": decoding}
        found = {name: alone(measured, way, path) for name, way in ways.items()}
    (seconds, memory), (other, more), (floor, _) = (found[name] for name in ways)
    read = line("video", "16 of 1,440 frames of 1080p, file to patches", seconds, other, other / floor, "seconds", frames_per_second=FRAMES / seconds, megabytes=memory, other_megabytes=more)  # fmt: skip
    return [read, *cutting()]


def film(path: Path) -> Path:
    """A minute in which a square crosses a still, noisy ground."""
    import av

    ground = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # fmt: skip
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "g": "48"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for i in range(SECONDS * FPS):
            picture = ground.copy()
            picture[400:600, i : i + 200] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def ours(path: Path) -> None:
    from engine.backbones.qwen2_5_vl import cut_patches
    from engine.layout import Frames
    from engine.video import Sampling, read

    clip = read(path, Sampling(frames=FRAMES, pixels=PIXELS))
    cut_patches(Frames(clip.frames, clip.seconds_per_frame), 14, 2, 2)


def decord_loop(path: Path) -> None:
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    pictures = decoded(path)
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=PIXELS)
    processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="np")


def decoding(path: Path) -> None:
    decoded(path)


def decoded(path: Path) -> np.ndarray:
    from decord import VideoReader

    reader = VideoReader(str(path), num_threads=1)
    return reader.get_batch(np.linspace(0, len(reader) - 1, FRAMES).astype(int).tolist()).asnumpy()


def measured(way: Callable[[Path], None], path: Path) -> tuple[float, float]:
    """Median seconds of three runs after a first, and the most megabytes that were resident."""
    way(path)
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        way(path)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cutting() -> list[dict[str, Any]]:
    """The same decoded frames resized and cut, normalisation included."""
    import torch
    from PIL import Image
    from transformers import Qwen2VLImageProcessorPil

    from engine.backbones.pixels import normalised
    from engine.backbones.qwen2_5_vl import cut_patches
    from engine.layout import Frames
    from engine.video import resize, smart_size
    from tests.bench.measure import medians

    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE[1], SIZE[0], 3), dtype=np.uint8)
    pictures = [Image.fromarray(frame) for frame in frames]
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=PIXELS)
    height, width = smart_size(SIZE[1], SIZE[0], 28, PIXELS)

    def ours() -> torch.Tensor:
        return normalised(cut_patches(Frames(resize(frames, height, width), 0.5), 14, 2, 2).patches)

    mine, theirs = medians(ours, lambda: processor(images=pictures, return_tensors="pt"), rounds=4)
    return [line("video", "16 decoded 1080p frames to patches: processor over ours", mine, theirs, None, "seconds", frames_per_second=FRAMES / mine)]  # fmt: skip
