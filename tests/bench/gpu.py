"""A full-size Qwen2.5-VL-7B with random weights on one GPU: training steps, their share of the card's peak and their memory
beside the plan's, writing, and the replacement test. Absolute figures; nothing here needs weights or a network.

The share of the peak counts what must be computed: matrix products, and attention between tokens that see each other. With
gradient checkpointing a layer's second forward is counted too, as the card computes it.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from engine import adapters, generate, masks
from engine.adapters import Lora
from engine.backbones import qwen2_5_vl
from engine.backbones.qwen2_5_vl import Qwen25VL, register_attention, whole_patches
from engine.data.samples import Sample, context
from engine.layout import Layout, Packed, pack
from engine.methods.method import run
from engine.methods.pause import PauseDistillation
from engine.plan import CARDS, Card, Plan, Pretended, shape
from engine.recipe import Training, optimizers
from engine.recompute import recompute_layers
from tests.bench.interventions import replacement
from tests.bench.measure import heavy, line
from tests.bench.packed import divided, separate_loss

NAME = "Qwen/Qwen2.5-VL-7B-Instruct"
CHAIN = ("so " * 80,)  # 60 tokens as the plan counts them: a short chain, so that the video dominates
METHOD = PauseDistillation()
SLICES = {"1,008": 14, "4,032": 56, "8,064": 112}  # video tokens -> slices of 72


class Wordless(Pretended):
    """The plan's tokenizer, which can't spell what a model without training writes either."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""


def bench(name: str = NAME, device: str = "cuda", slices: dict[str, int] = SLICES) -> Iterator[dict[str, Any]]:
    backbone, card = untrained(name, device), card_of(device)
    first, fewest = next(iter(slices.items()))
    backbone.model.requires_grad_(False).to(torch.bfloat16)
    short = heavy(backbone, (), fewest)
    yield from written(backbone, card, f"{first} video tokens", short)
    yield from replacement(backbone, f"7B, {first} video tokens", short)
    for size, count in slices.items():
        yield vision(backbone, f"{size} video tokens", heavy(backbone, (), count))
    backbone.model.float().train()
    recompute_layers(backbone.model)
    lora = adapters.attach(backbone, Lora(targets=("attention", "mlp")))
    learning = learner(backbone)
    for size, count in slices.items():
        samples = [heavy(backbone, CHAIN, count)] * (2 if count == fewest else 1)
        yield from trained(backbone, card, f"LoRA, {len(samples)} x {size} video tokens", samples, learning)
    lora.unload()
    backbone.model.requires_grad_(True)
    if card.memory > 100e9:  # weights, gradients, autocast's copies; AdamW's state would need a second card
        samples = [heavy(backbone, CHAIN, fewest)] * 2
        yield from trained(
            backbone, card, f"all weights, no optimizer, 2 x {first} video tokens", samples, lambda: None
        )


def card_of(device: str) -> Card:
    named = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return next(card for name, card in CARDS.items() if name in named)


def untrained(name: str, device: str) -> Qwen25VL:
    """Weights in float32, as for training."""
    register_attention()
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            shape(name), attn_implementation=dict(Qwen25VL.attention)
        )
    whole_patches(model)
    return Qwen25VL(model, Wordless())


def learner(backbone: Qwen25VL) -> Callable[[], None]:
    steppers = optimizers(Training(), backbone.model)

    def step() -> None:
        for each in steppers:
            each.step()
            each.zero_grad(set_to_none=True)

    return step


def timed(device: torch.device, task: Callable[[], Any], rounds: int = 3) -> float:
    """Median seconds, the first round left out. What `peak` tells begins here."""
    taken = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        task()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    """The most bytes allocated since `timed` began; on a CPU, by the process in all its time."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def dense() -> Iterator[None]:
    """No pack is long enough for flex attention."""
    kept, qwen2_5_vl.LONG = qwen2_5_vl.LONG, 10**9
    yield
    qwen2_5_vl.LONG = kept


@contextmanager
def eager() -> Iterator[None]:
    """No chain is long enough for a graph."""
    kept, generate.WORTH_A_GRAPH = generate.WORTH_A_GRAPH, 10**9
    yield
    generate.WORTH_A_GRAPH = kept


def trained(
    backbone: Qwen25VL, card: Card, size: str, samples: Sequence[Sample], update: Callable[[], None]
) -> list[dict[str, Any]]:
    """One step, packed under a block mask, against the same under a dense mask, and against three passes."""
    layouts = [METHOD.layout(sample, np.random.default_rng(i)) for i, sample in enumerate(samples)]
    together = pack(layouts, backbone.encode, backbone.pad).to(backbone.device)
    apart = [packed.to(backbone.device) for packed in divided(backbone, layouts)]
    kind = backbone.device.type

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def task() -> None:
            with torch.autocast(kind, torch.bfloat16):
                total = loss()
            total.backward()
            update()
            backbone.model.zero_grad(set_to_none=True)

        return task

    packed_step = step(lambda: METHOD.loss(run(backbone, together))[0])
    separate_step = step(lambda: separate_loss(backbone, METHOD, layouts, apart))
    ours, memory = timed(backbone.device, packed_step), peak(backbone.device)
    separate, memory_apart = timed(backbone.device, separate_step), peak(backbone.device)
    with dense():
        under_mask = timed(backbone.device, packed_step)
    flops, planned = needed(backbone, together), plan_of(backbone, together)
    unit = "seconds a step, bf16 autocast, gradient checkpointing"
    told = {
        "tokens_per_second": together.ids.numel() / ours, "tflops": flops / 1e12, "share_of_peak": flops / ours / card.half,
        "memory_gb": memory / 1e9, "memory_planned_gb": sum(planned.memory(1, False).values()) / 1e9,
        "seconds_planned": planned.seconds(card, 0.4), "tflops_planned": planned.flops / 1e12,
    }  # fmt: skip
    limit = sum(needed(backbone, packed) for packed in apart) / flops
    return [
        line("gpu", f"{size}: three passes over packed", ours, separate, limit, unit, **told),
        line("gpu", f"{size}: peak memory", memory / 1e9, memory_apart / 1e9, None, "gigabytes, weights included"),
        line("gpu", f"{size}: dense mask over block mask", ours, under_mask, None, unit),
    ]


def plan_of(backbone: Qwen25VL, packed: Packed) -> Plan:
    config = Training(batch=len(packed.ids), accumulate=1, precision="bf16", gradient_checkpointing=True)
    return Plan(config, backbone, nn.ModuleDict(), packed, False)


def needed(backbone: Qwen25VL, packed: Packed) -> float:
    """The plan's FLOPs, with attention's for the pairs alone that see each other."""
    made = plan_of(backbone, packed)
    batch, length = packed.ids.shape
    pairs = float(masks.visible(packed).sum())
    backward = made._backward(backbone.model)
    language = made.language
    return made.flops - language.flops(0, batch * length**2 - pairs, backward, True)


@torch.no_grad()
def vision(backbone: Qwen25VL, size: str, sample: Sample) -> dict[str, Any]:
    """All windows of one length in one call of the attention, against transformers' call for each."""
    packed = pack([Layout({"line": (context(sample),)})], backbone.encode, backbone.pad).to(backbone.device)
    config = backbone.vision_config
    ours = timed(backbone.device, lambda: backbone.look(packed))
    config._attn_implementation = "sdpa"
    other = timed(backbone.device, lambda: backbone.look(packed))
    config._attn_implementation = "runs"
    return line("gpu", f"{size}: vision, a call a window over a call a length", ours, other, None, "seconds")


@torch.no_grad()
def written(backbone: Qwen25VL, card: Card, size: str, sample: Sample, tokens: int = 128) -> list[dict[str, Any]]:
    """A chain behind a prefill, its steps as one graph against its steps one operator after another; and the silent answer."""
    start = generate.think(backbone, [sample], ())
    slots = METHOD.thinking(8)
    parameters = (
        sum(p.numel() for p in backbone.model.model.language_model.parameters()) + backbone.model.lm_head.weight.numel()
    )
    weights = parameters - backbone.model.get_input_embeddings().weight.numel()
    floor = tokens * 2 * weights / card.bandwidth  # every weight is read once a token

    def chain() -> generate.Written:
        return generate.explicit(backbone, start, tokens)

    def silent() -> generate.Written:
        return generate.answer(backbone, generate.think(backbone, [sample], slots), METHOD.marks, 4)

    def explicit() -> generate.Written:
        return generate.explicit(backbone, generate.think(backbone, [sample], ()), tokens)

    graphed = timed(backbone.device, chain)
    with eager():
        plain = timed(backbone.device, chain)
    quick, whole = timed(backbone.device, silent), timed(backbone.device, explicit)
    return [
        line("gpu", f"{size}: writing, operator by operator over one graph a token", graphed, plain, plain / floor, f"seconds for {tokens} tokens", share_of_bandwidth=floor / graphed, tokens_per_second=tokens / graphed),
        line("gpu", f"{size}: chain of {tokens} tokens over silent answer of 4", quick, whole, tokens / 4, "seconds, vision and prefill included"),
    ]  # fmt: skip
