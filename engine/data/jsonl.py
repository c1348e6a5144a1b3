"""Samples written by hand: a JSON object a line, whether about a video, an image, several images or nothing but text.

    {"video": "clips/cups.mp4", "question": "Where is the ball?", "options": ["left", "right"],
     "steps": ["It starts left.", "The cups swap."], "answer": "B"}
    {"image": "plate.jpg", "question": "How many apples?", "chain": "Two are red.\\nOne is green.", "answer": 3}
    {"images": ["before.png", "after.png"], "question": "What is new?", "steps": [], "answer": "a lamp"}
    {"question": "What is 2 + 3, doubled?", "steps": ["2 + 3 = 5", "5 * 2 = 10"], "answer": "10"}

    video | image | images   a file, or a list of images; relative to the JSON lines' folder (or to `root`)
    question                 text; needed
    options                  2 to 26 texts without their letters, for a multiple choice
    steps                    the written chain, a text a step; or an object, {"SUMMARY": "...", ...}, for named sections
    chain                    the same as one text, a step a line; instead of steps
    answer                   text, a number, true or false; of options a letter, or one of their texts; needed
    type                     multiple choice (where there are options), numerical (where the answer is a number), regression
                             (of a number too), OCR, free-form (anything else) or as asked; it decides what is said about the
                             form of an answer
    id, note                 whatever you like; nobody reads them

A field that isn't one of these is an error, and so is <image> or <video> in the question: what is shown stands before it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import Rows, lines
from engine.data.media import FilmedSource, sampled
from engine.data.samples import TYPE_HINTS, Dialect, Sample, with_options
from engine.data.values import NUMBER, BadRow, answered, chosen, distinct, field, fitting, said, text, unlettered
from engine.footage import Footage

SHOWN = ("video", "image", "images")
FIELDS = (*SHOWN, "question", "options", "steps", "chain", "answer", "type", "id", "note")


@dataclass(frozen=True)
class JsonlSource(FilmedSource):
    """dialect: plain is for language models that know no chat; options then stand behind the question."""

    image_pixels: int = 1024 * 28 * 28  # most of one image, after resizing
    dialect: Dialect = "chat"

    @property
    def looks(self) -> dict[str, Any]:
        return super().looks | {"image_pixels": self.image_pixels}

    def index(self, path: Path) -> Rows:
        return lines(path)

    def parse(self, raw: Any) -> Sample:
        question = text(raw, "question")
        for name in raw:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, n=1)
                raise BadRow(f"{name} is no field of this format{f' (did you mean {near[0]}?)' if near else ''}")
        if found := re.search("<(image|video)>", question):
            raise BadRow(f"question has the marker {found[0]}: leave it out, what is shown stands before the question")
        options = listed(raw, "options") if "options" in raw else ()
        if len(options) == 1 or len(options) > 26:
            raise BadRow(f"options must be 2 to 26 texts, not {list(options)!r:.60}")
        distinct(options)
        if unlettered(options) != options:
            raise BadRow(f"options must be texts without their letters, not {list(options)!r:.60}")
        usual = "multiple choice" if options else "numerical" if _number(raw) else "free-form"
        kind = text(raw, "type") if "type" in raw else usual
        if kind not in TYPE_HINTS:
            raise BadRow(f"type must be one of {', '.join(TYPE_HINTS)}, not {kind!r:.40}")
        if (kind == "multiple choice") != bool(options):
            raise BadRow(f"type is {kind}, and options {'are given' if options else 'are missing'}")
        sections, steps = self._chain(raw)
        answer = answered(field(raw, "answer"))
        answer = chosen(answer, options) if options else fitting(answer, kind)
        if self.dialect == "plain":
            question, options = with_options(question, options), ()
        return Sample(self._shown(raw), question, options, steps, answer, kind, self.dialect, sections)

    def _shown(self, raw: dict) -> Footage | tuple[Footage, ...] | None:
        given = [name for name in SHOWN if name in raw]
        if len(given) > 1:
            raise BadRow(f"{given[1]} stands beside {given[0]}: a sample shows one of {', '.join(SHOWN)}")
        if not given:
            return None
        if given == ["video"]:
            return self.footage(text(raw, "video"), "video", self.sampling, still=False)
        if given == ["image"]:
            return self._image(text(raw, "image"), "image")
        names = listed(raw, "images")
        if not names:
            raise BadRow("images is empty")
        return tuple(self._image(name, f"images[{place}]") for place, name in enumerate(names))

    def _image(self, name: str, field: str) -> Footage:
        sampling = sampled("image_pixels", pixels=self.image_pixels, frames=1)
        return self.footage(name, field, sampling, still=True)

    def _chain(self, raw: dict) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(names of the sections, if they have any; steps)."""
        if "steps" in raw and "chain" in raw:
            raise BadRow("chain and steps are both given: give one of them")
        if "chain" in raw:
            if not isinstance(raw["chain"], str):
                raise BadRow(f"chain must be text, not {raw['chain']!r:.40}")
            return (), self.needed([line.strip() for line in raw["chain"].split("\n") if line.strip()], "chain")
        if isinstance(given := raw.get("steps", []), dict):
            steps = [said(step, f"steps.{name}") for name, step in given.items()]
            return tuple(given), self.needed(steps, "steps")
        return (), self.needed(listed(raw, "steps") if "steps" in raw else (), "steps")


def listed(raw: dict, name: str) -> tuple[str, ...]:
    """A field's texts. Errors: BadRow."""
    if not isinstance(raw[name], list):
        raise BadRow(f"{name} must be a list of texts, not {raw[name]!r:.40}")
    return tuple(said(each, f"{name}[{place}]") for place, each in enumerate(raw[name]))


def _number(raw: dict) -> bool:
    answer = raw.get("answer")
    if isinstance(answer, str):
        return bool(NUMBER.fullmatch(answer.strip()))
    return isinstance(answer, int | float) and not isinstance(answer, bool)
