"""A training step of the pause method: one packed forward and backward against three separate ones, in time and memory.

The limit counts multiply-adds of matrices and attention at the benchmark's own shapes, vision included: what packing
would give if time were proportional to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine import worlds
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.layout import Layout, Packed, pack
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from tests.bench.measure import ROUNDS, alone, growth, heavy, line, medians, peak, untrained, work
from tests.rows import only

UNIT = "seconds a step, forward and backward"


def bench() -> list[dict[str, Any]]:
    backbone = untrained()
    backbone.model.train()
    source = WorldsSource()
    records = [worlds.make(worlds.FAMILIES[i % 3], 4, i, "train") for i in range(16)]
    embedded = [source(i) for i in range(16)]
    step = (records[0].steps[0].text,)
    return [
        row(backbone, "embedded, 16 clips", embedded),
        row(backbone, "1,008 video tokens, short text", [heavy(backbone, step)]),
        row(backbone, "4,032 video tokens, short text", [heavy(backbone, step, 56)], rounds=3),
        memory("1,008 video tokens, short text", step),
        growth("packed", "frames", (8, 16, 32, 64), lambda n: stepped(backbone, [heavy(backbone, step, n // 4)]), UNIT),
        growth("packed", "slots", (8, 16, 32, 64), lambda n: stepped(backbone, embedded[:4], n), UNIT),
        growth("packed", "clips a batch", (2, 4, 8, 16), lambda n: stepped(backbone, embedded[:n]), UNIT),
    ]


def stepped(backbone: Qwen25VL, samples: Sequence[Sample], slots: int = 8) -> Callable[[], None]:
    """A packed training step on these samples."""
    method = PauseDistillation(pauses=(slots, slots))
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    together = pack(layouts, backbone.encode, backbone.pad)

    def task() -> None:
        backbone.model.zero_grad(set_to_none=True)
        method.loss(run(backbone, together))[0].backward()

    return task


def row(backbone: Qwen25VL, size: str, samples: Sequence[Sample], rounds: int = ROUNDS) -> dict[str, Any]:
    method = PauseDistillation()
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    together, apart = pack(layouts, backbone.encode, backbone.pad), divided(backbone, layouts)
    ours, separate = medians(stepped(backbone, samples), separately(backbone, samples), rounds=rounds)
    limit = sum(work(backbone, p) for p in apart) / work(backbone, together)
    return line("packed", size, ours, separate, limit, UNIT)


def memory(size: str, steps: tuple[str, ...]) -> dict[str, Any]:
    """The most that a step takes beyond the model and its inputs. The limit counts rows, as most of what is kept is theirs."""
    ours, other = alone(peaked, stepped, steps), alone(peaked, separately, steps)
    backbone = untrained()
    layouts = [PauseDistillation().layout(heavy(backbone, steps), np.random.default_rng(0))]
    rows = pack(layouts, backbone.encode, backbone.pad).ids.numel()
    limit = sum(p.ids.numel() for p in divided(backbone, layouts)) / rows
    return line("packed", f"{size}: peak memory", ours, other, limit, "megabytes")


def peaked(way: Callable[[Qwen25VL, Sequence[Sample]], Callable[[], None]], steps: tuple[str, ...]) -> float:
    backbone = untrained()
    backbone.model.train()
    return peak(way(backbone, [heavy(backbone, steps)]))


def divided(backbone: Qwen25VL, layouts: Sequence[Layout]) -> list[Packed]:
    """A pack for each branch."""
    names = layouts[0].branches
    return [pack([only(layout, name) for layout in layouts], backbone.encode, backbone.pad) for name in names]


def separately(backbone: Qwen25VL, samples: Sequence[Sample]) -> Callable[[], None]:
    """The same step in three passes."""
    method = PauseDistillation()
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    apart = divided(backbone, layouts)

    def task() -> None:
        backbone.model.zero_grad(set_to_none=True)
        separate_loss(backbone, method, layouts, apart).backward()

    return task


def separate_loss(
    backbone: Qwen25VL, method: PauseDistillation, layouts: list[Layout], apart: list[Packed]
) -> torch.Tensor:
    """The same loss from three passes, each with its own vision encoding."""
    from engine.objectives import hidden_distance

    speak, answer, teacher = (run(backbone, p).branch(name) for p, name in zip(apart, layouts[0].branches))
    student, sample = answer.predicting("answer")
    taught, _ = teacher.predicting("answer")
    return (
        method.decode * speak.cross_entropy() + method.answer * answer.cross_entropy() + teacher.cross_entropy()
        + method.distil * hidden_distance(student, taught, sample, len(layouts), method.form)
    )  # fmt: skip
