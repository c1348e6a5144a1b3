"""What the benchmarks share: the model, medians of tasks run in turns, peak memory, multiply-adds, the samples, the growth
with a size.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.backbones import small
from engine.backbones.base import SPECIAL_TOKENS
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.data.worlds import texts
from engine.layout import Frames, Packed

ROUNDS = 7


def untrained(tokens: Sequence[str] = SPECIAL_TOKENS) -> Qwen25VL:
    """The small model before it has learnt anything, read from a folder, as every model that is used is."""
    with tempfile.TemporaryDirectory() as folder:
        small.fresh(small.tokenizer(texts(300))).save(folder)
        return Qwen25VL.load(folder, tokens=tokens)


def medians(*tasks: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each task, run in turns; the first round, in which caches fill, does not count."""
    taken: list[list[float]] = [[] for _ in tasks]
    for _ in range(rounds):
        for task, times in zip(tasks, taken):
            began = time.perf_counter()
            task()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in taken]


def alone(task: Callable[..., Any], *given: Any) -> Any:
    """What a task gives in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, given)


def peak(task: Callable[[], Any]) -> float:
    """Megabytes resident at most during a task, beyond those before it. Linux only; ask in a process of its own."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    task()
    return _resident("VmHWM") - before


def _resident(which: str) -> float:
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told[which].split()[0]) / 1024


def line(name: str, size: str, ours: float, other: float, limit: float | None, unit: str, **more: Any) -> dict[str, Any]:  # fmt: skip
    return {"name": name, "size": size, "ours": ours, "other": other, "ratio": other / ours, "limit": limit, "unit": unit, **more}  # fmt: skip


def growth(name: str, of: str, sizes: Sequence[int], task: Callable[[int], Callable[[], Any]], unit: str) -> dict[str, Any]:  # fmt: skip
    """How a cost grows: seconds at the smallest and at the largest size, and the exponent fitted to all of them.

    Here `limit` is the ratio of the sizes: what a cost would grow by that is proportional to them.
    """
    seconds = medians(*(task(size) for size in sizes), rounds=5)
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    return line(name, f"growth with {of}, {sizes[0]} to {sizes[-1]}", seconds[0], seconds[-1], sizes[-1] / sizes[0], unit, exponent=exponent)  # fmt: skip


def heavy(backbone: Qwen25VL, steps: tuple[str, ...] = (), slices: int = 14) -> Sample:
    """A video of `slices` x 72 tokens (14: 1,008), with a short question."""
    count = slices * backbone.vision_config.temporal_patch_size
    frames = np.random.default_rng(0).integers(0, 256, (count, 224, 252, 3), dtype=np.uint8)
    return Sample(backbone.cut(Frames(frames, 0.5)), "What is it?", ("one", "two"), steps, "A")


def matrices(backbone: Qwen25VL) -> int:
    """Multiply-adds of one token in the language model's matrices."""
    return sum(p.numel() for p in backbone.model.model.language_model.layers.parameters() if p.dim() == 2)


def tokens_work(backbone: Qwen25VL, tokens: int, seen: float) -> float:
    """Multiply-adds of a forward over `tokens` tokens that see `seen` others each: matrices, and attention's two products."""
    text = backbone.model.config.text_config
    return tokens * (matrices(backbone) + 2 * text.num_hidden_layers * text.hidden_size * seen)


def vision_work(backbone: Qwen25VL, packed: Packed) -> float:
    vision = backbone.model.config.vision_config
    weights = sum(p.numel() for p in backbone.model.model.visual.parameters() if p.dim() >= 2)
    patches = [(math.prod(grid), grid[1] * grid[2]) for grid in packed.grids]
    return float(sum(n * (weights + 2 * vision.depth * vision.hidden_size * slice_) for n, slice_ in patches))


def work(backbone: Qwen25VL, packed: Packed) -> float:
    """Multiply-adds of one forward, vision and the head's supervised rows included."""
    text = backbone.model.config.text_config
    batch, length = packed.ids.shape
    supervised = sum(len(rows.row) for rows in packed.branches.values())
    head = supervised * text.hidden_size * text.vocab_size
    return tokens_work(backbone, batch * length, length) + head + vision_work(backbone, packed)
