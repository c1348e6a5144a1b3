"""The whole replacement test of one clip behind its cached prefix, against one full forward of the same prompt, and against
the usual way: every change in a full forward of its own.

The limit counts multiply-adds of matrices and attention at the benchmark's own shapes, vision included. The forward's time
over that of the test is `ratio`: above 1, all the changes together cost less than one answer's forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine import generate
from engine.backbones import small
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample, context
from engine.data.worlds import WorldsSource, texts
from engine.insight import replace as matter
from engine.layout import Frames, Layout, marker, pack
from engine.methods.controls import Silent
from engine.methods.method import run
from tests.bench.packed import medians, work

METHOD = Silent(8)


def bench() -> list[dict[str, Any]]:
    backbone = small.fresh(small.tokenizer(texts(300)), layers=12)
    clip = WorldsSource(difficulties=(6, 6))(0)
    frames = np.random.default_rng(0).integers(0, 256, (28, 224, 252, 3), dtype=np.uint8)
    heavy = Sample(
        backbone.cut(Frames(frames, 0.5)), "What is it?", ("one", "two"), (), "A"
    )  # 14 slices of 8 x 9 tokens
    rows = [row(backbone, "embedded clip of 6 steps", clip), row(backbone, "1,008 video tokens", heavy)]
    return [line for pair in rows for line in pair]


@torch.no_grad()
def row(backbone: Qwen25VL, size: str, sample: Sample) -> list[dict[str, Any]]:
    thinking, letters, marked = METHOD.thinking(8), ("A", "B"), matter.marks(METHOD)
    thoughts = generate.think(backbone, [sample], thinking)
    own = matter.held(backbone, thoughts)
    count = len(matter.changes(own, {"another clip's": own}))
    line = (context(sample), *thinking, marker("<ANS>"), marker("<answer>"))
    whole = pack([Layout({"line": line})], backbone.encode, backbone.pad)

    def ours() -> None:
        changed = matter.changes(matter.held(backbone, thoughts), {"another clip's": own})
        matter.probabilities(backbone, thoughts, changed, letters, marked)

    def forward() -> None:
        backbone.logits(run(backbone, whole).hidden[-1][:, -1])

    ours_seconds, forward_seconds = medians(backbone, ours, forward)
    text = backbone.model.config.text_config
    matrices = sum(p.numel() for p in backbone.model.model.language_model.layers.parameters() if p.dim() == 2)
    behind = matrices + 2 * text.num_hidden_layers * text.hidden_size * whole.ids.shape[1]  # multiply-adds of one token
    limit = work(backbone, whole) / (count * 2 * behind)
    made = {"name": "interventions", "ours": ours_seconds, "unit": f"seconds for {count} changes of one clip"}
    return [
        made | {"size": f"{size}: one forward over all changes", "other": forward_seconds, "ratio": forward_seconds / ours_seconds, "limit": limit},
        made | {"size": f"{size}: a forward a change over all changes", "other": count * forward_seconds, "ratio": count * forward_seconds / ours_seconds, "limit": count * limit},
    ]  # fmt: skip
