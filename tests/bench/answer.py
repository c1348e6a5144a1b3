"""From a shipped clip to its answer on the shipped model: the silent answer against the written chain, end to end and in the
model alone; and what share of the silent answer each part takes.

The limit counts tokens that are emitted one after another: what silence would give if nothing else took time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from engine import generate, models
from engine.data.samples import Sample, context
from engine.layout import Frames, Layout, pack
from engine.video import Clip, read
from tests.bench.measure import heavy, line, medians

EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


@torch.no_grad()
def bench() -> list[dict[str, Any]]:
    rows = []
    model = models.load(device="cpu")
    for name in ("cups-3-2", "cups-5-4"):
        truth = json.loads((EXAMPLES / f"{name}.json").read_text())
        rows += of(model, EXAMPLES / f"{name}.mp4", truth["question"], truth["options"])
    return [*rows, model_alone(model, "1,008 video tokens", heavy(model.backbone))]


def of(model: models.Model, path: Path, question: str, options: list[str]) -> list[dict[str, Any]]:
    backbone, method = model.backbone, model.method

    def look() -> Clip:
        return read(path, model.sampling)

    def sample(clip: Clip) -> Sample:
        return Sample(Frames(clip.frames, clip.seconds_per_frame), question, tuple(options), (), "")

    asked = sample(look())
    said, written = silent(model, asked).tokens[0], explicit(model, asked).tokens[0]
    thoughts = think(model, asked)
    whole, chain = medians(lambda: silent(model, sample(look())), lambda: explicit(model, sample(look())))
    packed = pack([Layout({"think": (context(asked),)})], backbone.encode, backbone.pad)
    reading, cutting, seeing, before, thinking, answering = medians(
        look,
        lambda: pack([Layout({"think": (context(asked),)})], backbone.encode, backbone.pad),
        lambda: backbone.encode_patches(packed.patches, packed.grids),
        lambda: generate.think(backbone, [asked], ()),
        lambda: think(model, asked),
        lambda: generate.answer(backbone, thoughts, method.marks, method.longest),
    )
    parts = {
        "reading the file": reading, "cutting and packing": cutting, "vision": seeing, "prefill": before - cutting - seeing,
        "slots": thinking - before, "answer": answering,
    }  # fmt: skip
    rows = [
        line("answer", f"{path.stem}, end to end: written chain over silent", whole, chain, written / said, f"seconds; {written} tokens over {said}"),
        model_alone(model, path.stem, asked),
    ]  # fmt: skip
    shares = [line("answer", f"{path.stem}: whole silent answer over {part}", taken, whole, None, "seconds", share=taken / whole) for part, taken in parts.items()]  # fmt: skip
    return rows + shares


def model_alone(model: models.Model, size: str, asked: Sample) -> dict[str, Any]:
    said, written = silent(model, asked).tokens[0], explicit(model, asked).tokens[0]
    ours, other = medians(lambda: silent(model, asked), lambda: explicit(model, asked))
    return line("answer", f"{size}, model alone: written chain over silent", ours, other, written / said, f"seconds; {written} tokens over {said}")  # fmt: skip


def think(model: models.Model, asked: Sample) -> generate.Thoughts:
    slots = model.method.thinking(model.method.trained_slots)
    return generate.think(model.backbone, [asked], slots, model.method.feedback(model.companions))


def silent(model: models.Model, asked: Sample) -> generate.Written:
    return generate.answer(model.backbone, think(model, asked), model.method.marks, model.method.longest)


def explicit(model: models.Model, asked: Sample) -> generate.Written:
    return generate.explicit(model.backbone, generate.think(model.backbone, [asked], ()))
