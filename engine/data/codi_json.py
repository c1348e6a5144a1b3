"""CODI's format, {question, cot, answer}, as a JSON list or JSON lines: GSM8k-Aug, GSM8k-Aug-NL, CommonsenseQA, StrategyQA.

A chain of `<<...>>` has one step each; a chain in words has one a sentence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import BadRow, Entry, TextSource, answered, equations, field, json_rows, text
from engine.data.samples import Sample

# Where a sentence ends: not in 3.5, nor after the number of a list's item ("1. "), nor after a title.
SENTENCE = re.compile(
    r"\s*\n\s*|(?<=[.!?])(?<!^\d\.)(?<![.!?]\s\d\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)[ \t]+", re.MULTILINE
)


@dataclass(frozen=True)
class CodiSource(TextSource):
    def entries(self, path: Path) -> list[Entry]:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        chain = field(raw, "cot")
        if not isinstance(chain, str):
            raise BadRow(f"cot must be text, not {chain!r:.40}")
        found = equations(chain, "cot") if "<<" in chain else sentences(chain)
        answer = field(raw, "answer")
        if isinstance(answer, str):
            answer = answer.rpartition("####")[2]
        steps = self.needed(found, "cot")
        return Sample(None, text(raw, "question"), (), steps, answered(answer), "free-form", "plain")


def sentences(chain: str) -> tuple[str, ...]:
    return tuple(SENTENCE.split(chain.strip())) if chain.strip() else ()
