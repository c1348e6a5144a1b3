"""A-OKVQA, and the form that Multimodal CoCoNuT trains on: {image_path, question, steps, answer}.

Its authors' words are kept: the choices stand in the question, each rationale is a step, the choice's text is the answer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.data.coconut_json import problem
from engine.data.files import BadRow, Rows, field, json_rows, said, text
from engine.data.media import PicturedSource
from engine.data.samples import Sample
from engine.footage import Footage


@dataclass(frozen=True)
class MultimodalCoconutSource(PicturedSource):
    """Reads what `prepare` writes."""

    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        return replace(problem(self, raw), visual=self.image(text(raw, "image_path"), "image_path"))


@dataclass(frozen=True)
class AokvqaSource(PicturedSource):
    """Reads the published annotations; `root` is a folder of COCO's images (train2017, say)."""

    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        row = rewritten(raw)
        number = field(raw, "image_id")
        if not isinstance(number, int):
            raise BadRow(f"image_id must be a number, not {number!r:.40}")
        return replace(problem(self, row), visual=self.image(f"{number:012d}.jpg", "image_id"))


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
    rows = []
    for sample in (source(place) for place in range(len(source))):
        (image,) = (shown for shown in sample.visuals if isinstance(shown, Footage))
        seen = os.path.relpath(image.path.absolute(), target.absolute().parent)
        row = {"image_path": seen, "question": sample.question, "steps": list(sample.steps), "answer": sample.answer}
        rows.append(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(target.name + ".unfinished")
    made.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(made, target)
    return len(rows)


def prepare_all(given: str, out: str, images: str = "", leave_out: int = 0) -> dict[str, int]:
    """Prepares one file of annotations, or a folder with the published train and val -> samples of each file written.

    given: a file, and `out` is one too; or a folder, and so is `out`. images: COCO's folder with train2017 and val2017, or
    one of these (default: the annotations' folder). Errors: ConfigError, OSError.
    """
    source, target = Path(given), Path(out)
    if not source.is_dir():
        found = {source: target}
    else:
        splits = {split: source / f"aokvqa_v1p0_{split}.json" for split in ("train", "val")}
        found = {path: target / f"{split}.json" for split, path in splits.items() if path.is_file()}
        if not found:
            raise ConfigError(f"{source} holds neither aokvqa_v1p0_train.json nor aokvqa_v1p0_val.json: name a file.")
    written = {}
    for path, place in found.items():
        whole = AokvqaSource(str(path), split="test", leave_out=leave_out)
        pictures = Path(images) if images else path.parent
        if (inner := pictures / f"{_split(whole)}2017").is_dir():
            pictures = inner
        written[str(place)] = prepare(replace(whole, root=str(pictures)), place)
    return written


def _split(source: AokvqaSource) -> str:
    """The split that the first row says it is of."""
    for _, raw in source.raw():
        return str(raw.get("split", "")) if isinstance(raw, dict) else ""
    return ""
