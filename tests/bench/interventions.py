"""The whole replacement test of one clip behind its cached prefix, against one full forward of the same prompt, and against
the usual way: every change in a full forward of its own.

The limit counts multiply-adds of matrices and attention at the benchmark's own shapes, vision included. The forward's time
over that of the test is `ratio`: above 1, all the changes together cost less than one answer's forward.
"""

from __future__ import annotations

from typing import Any

import torch

from engine import generate
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample, context
from engine.data.worlds import WorldsSource
from engine.insight import replace as matter
from engine.layout import Layout, Packed, marker, pack
from engine.methods.controls import Silent
from engine.methods.method import run
from tests.bench.measure import heavy, line, medians, tokens_work, untrained, work

METHOD = Silent(8)
LETTERS = ("A", "B")


def bench() -> list[dict[str, Any]]:
    backbone = untrained()
    clip = WorldsSource(difficulties=(6, 6))(0)
    samples = {"embedded clip of 6 steps": clip, "1,008 video tokens": heavy(backbone)}
    return [made for size, sample in samples.items() for made in (*replacement(backbone, size, sample), sweep(backbone, size, sample))]  # fmt: skip


@torch.no_grad()
def replacement(backbone: Qwen25VL, size: str, sample: Sample) -> list[dict[str, Any]]:
    thoughts = generate.think(backbone, [sample], METHOD.thinking(8))
    own = matter.held(backbone, thoughts)
    count = len(matter.changes(own, {"another clip's": own}))
    whole = prompt(backbone, sample, 8)

    def ours() -> None:
        changed = matter.changes(matter.held(backbone, thoughts), {"another clip's": own})
        matter.probabilities(backbone, thoughts, changed, LETTERS, matter.marks(METHOD))

    together, forward = medians(ours, lambda: backbone.logits(run(backbone, whole).hidden[-1][:, -1]))
    limit = work(backbone, whole) / tokens_work(backbone, 2 * count, whole.ids.shape[1])
    unit = f"seconds for {count} changes of one clip"
    return [
        line("interventions", f"{size}: one forward over all changes", together, forward, limit, unit),
        line("interventions", f"{size}: a forward a change over all changes", together, count * forward, count * limit, unit),
    ]  # fmt: skip


@torch.no_grad()
def sweep(backbone: Qwen25VL, size: str, sample: Sample) -> dict[str, Any]:
    """The answer behind 0 to 8 slots from one prefill, against a whole forward for each number."""
    wholes = [prompt(backbone, sample, count) for count in range(9)]

    def ours() -> None:
        thoughts = generate.think(backbone, [sample], METHOD.thinking(8))
        matter.probabilities(backbone, thoughts, matter.first_ones(8), LETTERS, matter.marks(METHOD))

    def other() -> None:
        for whole in wholes:
            backbone.logits(run(backbone, whole).hidden[-1][:, -1])

    together, apart = medians(ours, other)
    length = wholes[-1].ids.shape[1]
    limit = sum(work(backbone, whole) for whole in wholes) / (work(backbone, wholes[-1]) + tokens_work(backbone, 18, length))  # fmt: skip
    return line("interventions", f"{size}: 9 separate runs over one sweep of N", together, apart, limit, "seconds for N = 0 to 8")  # fmt: skip


def prompt(backbone: Qwen25VL, sample: Sample, slots: int) -> Packed:
    """All that stands before the silent answer's letter."""
    before = (context(sample), *METHOD.thinking(slots), marker("<ANS>"), marker("<answer>"))
    return pack([Layout({"line": before})], backbone.encode, backbone.pad).to(backbone.device)
