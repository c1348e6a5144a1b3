"""Eight fed-back latents: a cached step each, against a loop that computes the whole prefix anew for each of them.

Both encode the clip once. The limit counts multiply-adds of matrices and attention at the benchmark's own shapes, vision
included: what the cache would give if time were proportional to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import masks
from engine.backbones.qwen2_5_vl import Qwen25VL
from engine.data.samples import Sample
from engine.data.worlds import WorldsSource
from engine.layout import Packed, pack
from engine.methods.coconut import Coconut
from engine.methods.method import Outcome, run
from tests.bench.measure import growth, heavy, line, medians, tokens_work, untrained, work

METHOD = Coconut(c_thought=1, max_latent_stage=8, schedule="constant")  # eight latents, and the whole chain behind them


def bench() -> list[dict[str, Any]]:
    backbone = untrained(Coconut.tokens)
    source = WorldsSource()
    clips = [source(i) for i in range(16)]
    video = [heavy(backbone, clips[0].steps)]
    return [
        row(backbone, "embedded, 16 clips, 8 latents, training step", clips, training=True),
        row(backbone, "embedded, 1 clip, 8 latents, forward", clips[:1], training=False),
        row(backbone, "1,008 video tokens, 8 latents, training step", video, training=True),
        row(backbone, "1,008 video tokens, 8 latents, forward", video, training=False),
        growth("loop", "latents", (2, 4, 8, 16, 32), lambda n: thinking(backbone, clips[:1], n), "seconds a forward"),
    ]


def row(backbone: Qwen25VL, size: str, samples: Sequence[Sample], training: bool) -> dict[str, Any]:
    packed = packed_for(backbone, samples, METHOD)
    backbone.model.train(training)

    def ours() -> None:
        finish(run(backbone, packed))

    def other() -> None:
        finish(Outcome(packed, recomputed(backbone, packed), backbone))

    def finish(out: Outcome) -> None:
        backbone.model.zero_grad(set_to_none=True)
        loss, _ = METHOD.loss(out)
        if training:
            loss.backward()

    with torch.set_grad_enabled(training):
        cached, uncached = medians(ours, other)
    limit = recomputed_work(backbone, packed) / work(backbone, packed)
    return line("loop", size, cached, uncached, limit, "seconds a step, forward and backward" if training else "seconds a forward")  # fmt: skip


def packed_for(backbone: Qwen25VL, samples: Sequence[Sample], method: Coconut) -> Packed:
    rng = np.random.default_rng(0)
    return pack([method.layout(sample, rng) for sample in samples], backbone.encode, backbone.pad)


def thinking(backbone: Qwen25VL, samples: Sequence[Sample], latents: int) -> Callable[[], None]:
    """A forward with so many latents, all else equal."""
    packed = packed_for(backbone, samples, replace(METHOD, max_latent_stage=latents))
    assert len(columns(packed)) == latents

    def task() -> None:
        with torch.no_grad():
            run(backbone, packed)

    return task


def columns(packed: Packed) -> list[int]:
    """Where latents are fed."""
    return packed.latents.any(0).nonzero()[:, 0].tolist()


def recomputed(backbone: Qwen25VL, packed: Packed) -> tuple[Tensor, ...]:
    """The same states without a cache."""
    embeds = backbone.embed(packed)
    mask = masks.additive(masks.visible(packed), embeds.dtype)
    for column in columns(packed):
        seen = slice(column)
        states = backbone.forward(embeds[:, seen], packed.positions[..., seen], mask[:, :, seen, seen])
        fed = torch.where(packed.latents[:, column, None], states.last[:, -1], embeds[:, column])
        embeds = torch.cat([embeds[:, seen], fed[:, None], embeds[:, column + 1 :]], dim=1)
    return backbone.forward(embeds, packed.positions, mask).hidden


def recomputed_work(backbone: Qwen25VL, packed: Packed) -> float:
    """Multiply-adds of the loop's forward."""
    prefixes = sum(tokens_work(backbone, n, n) for n in columns(packed))  # as many tokens as stand before the latent
    return work(backbone, packed) + len(packed.ids) * prefixes
