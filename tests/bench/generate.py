"""Writing a chain behind a cached prefill, against computing the whole sequence anew for every token; and a batch of sixteen
clips against sixteen times one.

Both loops encode the clip once. The limit of the first counts multiply-adds; that of the second is what a batch would give
if a call cost the same at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine import generate, masks
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample, context
from engine.data.worlds import WorldsSource
from engine.layout import Layout, Packed, pack
from tests.bench.measure import growth, heavy, line, medians, tokens_work, untrained, vision_work

TOKENS = 64
UNIT = f"seconds for {TOKENS} tokens"


def bench() -> list[dict[str, Any]]:
    backbone = untrained()
    source = WorldsSource(difficulties=(6, 6))
    clips = [source(i) for i in range(16)]
    video = heavy(backbone)
    return [
        row(backbone, "embedded clip of 6 steps", clips[0]),
        row(backbone, "1,008 video tokens", video),
        batched(backbone, clips),
        growth("generate", "tokens written", (16, 32, 64, 128), lambda n: lambda: write(backbone, [video], n), "seconds"),
        growth("generate", "clips a batch", (2, 4, 8, 16), lambda n: lambda: write(backbone, clips[:n], 32), "seconds for 32 tokens"),
    ]  # fmt: skip


def write(backbone: Qwen25VL, samples: Sequence[Sample], tokens: int) -> list[list[int]]:
    """Prefill and `tokens` greedy tokens; an untrained model does not end its turn before."""
    return generate.explicit(backbone, generate.think(backbone, samples, ()), tokens).ids


def row(backbone: Qwen25VL, size: str, sample: Sample) -> dict[str, Any]:
    packed = pack([Layout({"line": (context(sample),)})], backbone.encode, backbone.pad)
    ours, other = medians(lambda: write(backbone, [sample], TOKENS), recomputing(backbone, packed), rounds=4)
    length = packed.ids.shape[1]
    seen = vision_work(backbone, packed)
    limit = (seen + sum(tokens_work(backbone, length + i, length + i) for i in range(TOKENS))) / (
        seen + tokens_work(backbone, length, length) + tokens_work(backbone, TOKENS - 1, length + TOKENS / 2)
    )
    return line("generate", f"{size}: no cache over cache", ours, other, limit, UNIT)


def recomputing(backbone: Qwen25VL, packed: Packed) -> Callable[[], None]:
    """The same greedy tokens without a cache."""

    @torch.no_grad()
    def task() -> None:
        embeds, positions = backbone.embed(packed), packed.positions
        for _ in range(TOKENS):
            length = embeds.shape[1]
            mask = masks.additive(torch.ones(1, length, length, dtype=torch.bool).tril(), embeds.dtype)
            token = backbone.logits(backbone.forward(embeds, positions, mask).last[:, -1]).argmax(-1)
            embeds = torch.cat([embeds, backbone.embed_ids(token[:, None])], dim=1)
            positions = torch.cat([positions, positions[..., -1:].amax(0, keepdim=True).expand(len(positions), -1, -1) + 1], dim=-1)  # fmt: skip

    return task


def batched(backbone: Qwen25VL, clips: Sequence[Sample]) -> dict[str, Any]:
    def other() -> None:
        for clip in clips:
            write(backbone, [clip], 32)

    together, apart = medians(lambda: write(backbone, clips, 32), other, rounds=4)
    return line("generate", f"{len(clips)} clips one by one over one batch", together, apart, len(clips), "seconds for 32 tokens each")  # fmt: skip
