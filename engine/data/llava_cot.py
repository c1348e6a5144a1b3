"""LLaVA-CoT-100k: JSON lines of {id, image, conversations}, answers in four sections.

Each question with its answer is a sample of its own, without the turns before it, as Heima trains on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import Rows, json_rows
from engine.data.media import PicturedSource
from engine.data.samples import Sample
from engine.data.values import BadRow, field, said, text

SECTIONS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
SECTION = re.compile(r"<([A-Z_]+)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class LlavaCotSource(PicturedSource):
    """A sample's steps are the sections before the conclusion, which is its answer."""

    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parts(self, raw: Any) -> list[tuple[str, Any]]:
        """(its name, (row, which of its turns)): as many as a conversation has questions, and at least one."""
        spoken = raw.get("conversations") if isinstance(raw, dict) else None
        count = max(1, (len(spoken) + 1) // 2) if isinstance(spoken, list) else 1
        return [(f"turn {turn}" if count > 1 else "", (raw, turn)) for turn in range(count)]

    def parse(self, raw: tuple[Any, int]) -> Sample:
        row, turn = raw
        image = self.image(text(row, "image"), "image")
        spoken = field(row, "conversations")
        pair = spoken[2 * turn : 2 * turn + 2] if isinstance(spoken, list) else []
        if [part.get("from") for part in pair if isinstance(part, dict)] != ["human", "gpt"]:
            raise BadRow("conversations must hold a human's question, then gpt's answer")
        asked, told = (text(part, "value") for part in pair)
        *steps, answer = sections(told)
        question = said(asked.replace("<image>", ""), "value")
        return Sample(image, question, (), self.needed(steps, "value"), answer, "as asked", sections=SECTIONS[:-1])


def sections(told: str) -> list[str]:
    """The texts of the four sections, in their order. Errors: BadRow unless each is there once, and nothing else."""
    for name in SECTIONS:
        for mark in (f"<{name}>", f"</{name}>"):
            if told.count(mark) != 1:
                raise BadRow(f"value must have one {mark}, not {told.count(mark)}")
    found = SECTION.findall(told)
    names = [name for name, _ in found]
    if unknown := [name for name in names if name not in SECTIONS]:
        raise BadRow(f"value has an unknown section <{unknown[0]}>")
    if names != list(SECTIONS):
        raise BadRow(f"value must have the sections {', '.join(SECTIONS)} one after another, not {', '.join(names)}")
    if rest := SECTION.sub("", told).strip():
        raise BadRow(f"value has {rest!r:.60} outside its sections")
    return [said(content, f"<{name}>") for name, content in found]
