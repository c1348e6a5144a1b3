"""Coconut's format: a JSON list of {question, steps, answer}, for GSM8k, ProntoQA and ProsQA. Other keys are ignored, except
media and options, which would be lost: rows with them are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import FileSource, Rows, json_rows
from engine.data.samples import Sample
from engine.data.values import BadRow, answered, field, said, text

BEYOND_TEXT = ("video", "image", "images", "image_path", "options")


@dataclass(frozen=True)
class CoconutSource(FileSource):
    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        if isinstance(raw, dict) and (lost := [name for name in BEYOND_TEXT if name in raw]):
            raise BadRow(
                f"{lost[0]} would be lost: this format is text alone. jsonl, a JSON object a line, has clips, images and "
                "options; multimodal_coconut has image_path"
            )
        return problem(self, raw)


def problem(source: FileSource, raw: Any) -> Sample:
    """A row's sample. Coconut writes a chain that isn't known as one empty step. Errors: BadRow."""
    steps = field(raw, "steps")
    if not isinstance(steps, list):
        raise BadRow(f"steps must be a list, not {steps!r:.40}")
    known = () if steps == [""] else tuple(said(step, f"steps[{place}]") for place, step in enumerate(steps))
    answer = answered(field(raw, "answer"))
    return Sample(None, text(raw, "question"), (), source.needed(known, "steps"), answer, "free-form", "plain")
