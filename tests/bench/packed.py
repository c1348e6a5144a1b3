"""A training step of the pause method: one packed forward and backward against three separate ones.

The limit counts multiply-adds of matrices and attention at the benchmark's own shapes, vision included: what packing
would give if time were proportional to them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine import worlds
from engine.backbones import small
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource, texts
from engine.layout import Frames, Layout, Packed, pack
from engine.methods.method import run
from engine.methods.pause import PauseDistillation

ROUNDS = 7


def bench() -> list[dict[str, Any]]:
    words = small.tokenizer(texts(300))
    backbone = small.fresh(words)
    backbone.model.train()
    source = WorldsSource()
    records = [worlds.make(worlds.FAMILIES[i % 3], 4, i, "train") for i in range(16)]
    embedded = [source(i) for i in range(16)]
    frames = np.random.default_rng(0).integers(0, 256, (28, 224, 252, 3), dtype=np.uint8)
    video = backbone.cut(Frames(frames, 0.5))  # 14 slices of 8 x 9 tokens
    heavy = [Sample(video, "What is it?", ("one", "two"), (records[0].steps[0].text,), "A")]
    return [row(backbone, "embedded, 16 clips", embedded), row(backbone, "1,008 video tokens, short text", heavy)]


def row(backbone: Qwen25VL, size: str, samples: Sequence[Sample]) -> dict[str, Any]:
    method = PauseDistillation()
    layouts = [method.layout(sample, np.random.default_rng(0)) for sample in samples]
    together = pack(layouts, backbone.encode, backbone.pad)
    apart = [
        pack([layout.only(name) for layout in layouts], backbone.encode, backbone.pad) for name in layouts[0].branches
    ]

    def ours() -> None:
        method.loss(run(backbone, together))[0].backward()

    def other() -> None:
        separate_loss(backbone, method, layouts, apart).backward()

    first, second = medians(backbone, ours, other)
    limit = sum(work(backbone, p) for p in apart) / work(backbone, together)
    return {
        "name": "packed", "size": size, "ours": first, "other": second, "ratio": second / first, "limit": limit,
        "unit": "seconds a step, forward and backward",
    }  # fmt: skip


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


def medians(backbone: Qwen25VL, *tasks: Callable[[], None]) -> list[float]:
    """Median seconds of each task, run in turns."""
    taken: list[list[float]] = [[] for _ in tasks]
    for _ in range(ROUNDS):
        for task, times in zip(tasks, taken):
            backbone.model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            task()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in taken]


def work(backbone: Qwen25VL, packed: Packed) -> float:
    """Multiply-adds of one forward: matrices x tokens, and attention's two products, language model and vision."""
    text, vision = backbone.model.config.text_config, backbone.model.config.vision_config
    language = backbone.model.model.language_model
    matrices = sum(p.numel() for p in language.layers.parameters() if p.dim() == 2)
    batch, length = packed.ids.shape
    attention = 2 * text.num_hidden_layers * text.hidden_size * length
    total = batch * length * (matrices + attention)
    supervised = sum(len(rows.row) for rows in packed.branches.values())
    total += supervised * text.hidden_size * text.vocab_size
    seen = sum(p.numel() for p in backbone.model.model.visual.parameters() if p.dim() >= 2)
    for time_, height, width in packed.grids:
        patches = time_ * height * width
        total += patches * (seen + 2 * vision.depth * vision.hidden_size * height * width)
    return float(total)
