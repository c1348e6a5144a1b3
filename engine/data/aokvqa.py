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
from engine.data.files import Rows, json_rows
from engine.data.media import PicturedSource
from engine.data.samples import Sample
from engine.data.values import BadRow, distinct, field, said, text
from engine.folders import write_whole
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
        return replace(problem(self, row), visual=self.image(image_name(raw), "image_id"))


def image_name(raw: Any) -> str:
    """COCO's name of an annotation's image. Errors: BadRow."""
    number = field(raw, "image_id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise BadRow(f"image_id must be a number, not {number!r:.40}")
    return f"{number:012d}.jpg"


def choice(raw: Any) -> tuple[tuple[str, ...], int]:
    """An annotation's choices, and which of them is right. Errors: BadRow."""
    choices, right = field(raw, "choices"), field(raw, "correct_choice_idx")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 26:
        raise BadRow(f"choices must be a list of 2 to 26, not {choices!r:.40}")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        raise BadRow(f"correct_choice_idx must be one of 0 to {len(choices) - 1}, not {right!r:.40}")
    texts = tuple(said(each, f"choices[{place}]") for place, each in enumerate(choices))
    distinct(texts, "choices")
    return texts, right


def rewritten(raw: Any) -> dict[str, Any]:
    """An annotation's {question, steps, answer}. Errors: BadRow."""
    choices, right = choice(raw)
    reasons = field(raw, "rationales")
    if not isinstance(reasons, list):
        raise BadRow(f"rationales must be a list, not {reasons!r:.40}")
    offered = ", ".join(f"{place}: {each}" for place, each in enumerate(choices))
    steps = [said(reason, f"rationales[{place}]") for place, reason in enumerate(reasons)]
    named = [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]
    return {
        "question": f"{text(raw, 'question')} The choices are {offered}.",
        "steps": named if len(steps) > 1 else [f"Let me think about this: {step}" for step in steps],
        "answer": choices[right],
    }


def prepare(source: AokvqaSource, out: str | os.PathLike[str]) -> int:
    """Writes a split in Multimodal CoCoNuT's form, images as seen from the new file's folder -> number of samples.

    Errors: ConfigError for annotations that can't be used or a folder's place, OSError for one that can't be written to.
    """
    target = Path(out)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file to write.")
    rows = []
    for sample in (source(place) for place in range(len(source))):
        (image,) = (shown for shown in sample.visuals if isinstance(shown, Footage))
        seen = os.path.relpath(image.path.absolute(), target.absolute().parent)
        row = {"image_path": seen, "question": sample.question, "steps": list(sample.steps), "answer": sample.answer}
        rows.append(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(rows, indent=1, ensure_ascii=False))
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
