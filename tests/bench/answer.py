"""From a shipped clip to its answer on the shipped model: the silent answer against the written chain, end to end and in the
model alone; and what share of the silent answer each part takes.

The limit counts tokens that are emitted one after another: what silence would give if nothing else took time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from engine import ask, generate
from engine.data.samples import Sample, context
from engine.layout import Frames, Layout, pack
from engine.video import Clip, read
from tests.bench.measure import line, medians

EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"


@torch.no_grad()
def bench() -> list[dict[str, Any]]:
    rows = []
    model = ask.load(device="cpu")
    for name in ("cups-3-2", "cups-5-4"):
        truth = json.loads((EXAMPLES / f"{name}.json").read_text())
        rows += of(model, EXAMPLES / f"{name}.mp4", truth["question"], truth["options"])
    return rows


def of(model: ask.Model, path: Path, question: str, options: list[str]) -> list[dict[str, Any]]:
    backbone, method = model.backbone, model.method
    slots = method.trained_slots

    def look() -> Clip:
        return read(path, model.sampling)

    def sample(clip: Clip) -> Sample:
        return Sample(Frames(clip.frames, clip.seconds_per_frame), question, tuple(options), (), "")

    def think(asked: Sample) -> generate.Thoughts:
        return generate.think(backbone, [asked], method.thinking(slots), method.feedback(model.companions))

    def silent(asked: Sample) -> generate.Written:
        return generate.answer(backbone, think(asked), method.marks, method.longest)

    def explicit(asked: Sample) -> generate.Written:
        return generate.explicit(backbone, generate.think(backbone, [asked], ()))

    asked = sample(look())
    said, written = silent(asked).tokens[0], explicit(asked).tokens[0]
    thoughts = think(asked)
    whole, chain, silent_only, explicit_only = medians(
        lambda: silent(sample(look())), lambda: explicit(sample(look())), lambda: silent(asked), lambda: explicit(asked)
    )
    packed = pack([Layout({"think": (context(asked),)})], backbone.encode, backbone.pad)
    reading, cutting, seeing, before, thinking, answering = medians(
        look,
        lambda: pack([Layout({"think": (context(asked),)})], backbone.encode, backbone.pad),
        lambda: backbone.encode_patches(packed.patches, packed.grids),
        lambda: generate.think(backbone, [asked], ()),
        lambda: think(asked),
        lambda: generate.answer(backbone, thoughts, method.marks, method.longest),
    )
    parts = {
        "reading the file": reading, "cutting and packing": cutting, "vision": seeing, "prefill": before - cutting - seeing,
        "slots": thinking - before, "answer": answering,
    }  # fmt: skip
    limit = written / said
    rows = [
        line("answer", f"{path.stem}, end to end: written chain over silent", whole, chain, limit, f"seconds; {written} tokens over {said}"),
        line("answer", f"{path.stem}, model alone: written chain over silent", silent_only, explicit_only, limit, f"seconds; {written} tokens over {said}"),
    ]  # fmt: skip
    shares = [line("answer", f"{path.stem}: whole silent answer over {part}", taken, whole, None, "seconds") for part, taken in parts.items()]  # fmt: skip
    return rows + shares
