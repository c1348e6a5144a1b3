"""Video-R1's format as samples: a JSON list of {problem, options, problem_type, data_type, path, process, solution}."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import Rows, json_rows
from engine.data.media import FilmedSource
from engine.data.samples import ANSWER, THOUGHTS, Sample, letter
from engine.data.values import BadRow, chosen, distinct, fitting, said, text, unlettered

TYPES = ("multiple choice", "numerical", "OCR", "free-form", "regression")


@dataclass(frozen=True)
class VideoR1Source(FilmedSource):
    """`file` is Video-R1-COT-165k.json; its images are read at the size of its frames."""

    held_out: int = 256

    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        kind, still, options = posed(raw)
        footage = self.footage(text(raw, "path"), "path", self.sampling, still)
        thoughts, answer = between(THOUGHTS, raw, "process", "think"), between(ANSWER, raw, "solution", "answer")
        steps = self.needed((thoughts,) if thoughts else (), "process")
        return Sample(footage, text(raw, "problem"), options, steps, solved(answer, kind, options), kind)


def posed(raw: Any) -> tuple[str, bool, tuple[str, ...]]:
    """A row's type of problem, whether it shows an image, its options without their letters; as in the published prompts,
    none are shown but for a multiple choice. Errors: BadRow."""
    kind, data = text(raw, "problem_type"), text(raw, "data_type")
    if kind not in TYPES:
        raise BadRow(f"unknown problem_type {kind!r}")
    if data not in ("image", "video"):
        raise BadRow(f"data_type must be image or video, not {data!r:.40}")
    return kind, data == "image", offered(raw) if kind == "multiple choice" else ()


def offered(raw: Any) -> tuple[str, ...]:
    """The options of a multiple choice, without their letters. Errors: BadRow."""
    given = raw.get("options") or []
    if not isinstance(given, list) or not 2 <= len(given) <= 26:
        raise BadRow(f"options must be a list of 2 to 26 for a multiple choice, not {given!r:.40}")
    told = unlettered([said(each, f"options[{place}]") for place, each in enumerate(given)])
    options = tuple(said(each, f"options[{place}]") for place, each in enumerate(told))
    distinct(options)
    return options


def solved(answer: str, kind: str, options: tuple[str, ...]) -> str:
    """A row's answer: of options the letter, whether that was given or a text. Errors: BadRow."""
    answer = said(answer, "solution")
    if options and answer not in map(letter, range(len(options))):
        return chosen(answer, options, "solution")
    return fitting(answer, kind, "solution")


def between(tags: re.Pattern[str], raw: Any, name: str, tag: str) -> str:
    """What stands between a field's tags, and nothing may stand outside. Errors: BadRow."""
    found = tags.fullmatch(text(raw, name))
    if not found:
        raise BadRow(f"{name} must be <{tag}>...</{tag}>, not {raw[name]!r:.40}")
    return found[1]
