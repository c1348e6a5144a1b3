"""A-OKVQA, and the form that Multimodal CoCoNuT trains on: {image_path, question, steps, answer}.

Its authors' words are kept: the choices stand in the question, each rationale is a step, the choice's text is the answer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.coconut_json import problem
from engine.data.files import BadRow, Entry, field, json_rows, said, text
from engine.data.pictured import Pictured, PicturedSource


@dataclass(frozen=True)
class MultimodalCoconutSource(PicturedSource):
    """Reads what `prepare` writes."""

    def entries(self, path: Path) -> list[Entry]:
        return json_rows(path)

    def parse(self, raw: Any) -> Pictured:
        return Pictured(problem(self, raw), self.image(text(raw, "image_path"), "image_path"))


@dataclass(frozen=True)
class AokvqaSource(PicturedSource):
    """Reads the published annotations; `root` is a folder of COCO's images (train2017, say)."""

    def entries(self, path: Path) -> list[Entry]:
        return json_rows(path)

    def parse(self, raw: Any) -> Pictured:
        row = rewritten(raw)
        number = field(raw, "image_id")
        if not isinstance(number, int):
            raise BadRow(f"image_id must be a number, not {number!r:.40}")
        return Pictured(problem(self, row), self.image(f"{number:012d}.jpg", "image_id"))


def rewritten(raw: Any) -> dict[str, Any]:
    """An annotation's {question, steps, answer}. Errors: BadRow."""
    choices, right, reasons = field(raw, "choices"), field(raw, "correct_choice_idx"), field(raw, "rationales")
    for name, value in (("choices", choices), ("rationales", reasons)):
        if not isinstance(value, list):
            raise BadRow(f"{name} must be a list, not {value!r:.40}")
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise BadRow(f"correct_choice_idx must be one of 0 to {len(choices) - 1}, not {right!r:.40}")
    offered = ", ".join(f"{place}: {said(choice, f'choices[{place}]')}" for place, choice in enumerate(choices))
    steps = [said(reason, f"rationales[{place}]") for place, reason in enumerate(reasons)]
    named = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    return {
        "question": f"{text(raw, 'question')} The choices are {offered}.",
        "steps": named if len(steps) > 1 else [f"Let me think about this: {step}" for step in steps],
        "answer": choices[right].strip(),
    }


def prepare(source: AokvqaSource, out: str | os.PathLike[str]) -> int:
    """Writes a split in Multimodal CoCoNuT's form, images as seen from the new file's folder -> number of samples.

    Errors: ConfigError for annotations that can't be used, OSError for a place that can't be written to.
    """
    target = Path(out)
    rows = [
        {
            "image_path": os.path.relpath(row.image.absolute(), target.absolute().parent),
            "question": row.sample.question,
            "steps": list(row.sample.steps),
            "answer": row.sample.answer,
        }
        for row in source.rows
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return len(rows)
