"""CODI's format, {question, cot, answer}, as a JSON list or JSON lines: GSM8k-Aug, GSM8k-Aug-NL, CommonsenseQA, StrategyQA.

GSM8k-Aug: "<<600*30/100=180>> <<600*10/100=60>>" and "360", a step each `<<...>>`. GSM8k-Aug-NL: the same in words, a step a
sentence; a calculator's notes among them, as in GSM8k itself, are left out. CommonsenseQA: the choices stand in the question,
and the answer is a letter. StrategyQA: the answer is true or false. An answer may stand behind "####".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.files import FileSource, Rows, json_rows
from engine.data.samples import Sample
from engine.data.values import BadRow, answered, equations, field, text

# Where a sentence ends: not in 3.5, nor after the number of a list's item ("1. "), nor after a title.
SENTENCE = re.compile(
    r"\s*\n\s*|(?<=[.!?])(?<!^\d\.)(?<![.!?]\s\d\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\bMrs\.)(?<!\b(?:e\.g|i\.e|U\.S)\.)[ \t]+",
    re.MULTILINE,
)


@dataclass(frozen=True)
class CodiSource(FileSource):
    def index(self, path: Path) -> Rows:
        return json_rows(path)

    def parse(self, raw: Any) -> Sample:
        chain = field(raw, "cot")
        if not isinstance(chain, str):
            raise BadRow(f"cot must be text, not {chain!r:.40}")
        alone = chain.lstrip().startswith("<<")
        found = equations(chain, "cot") if alone else sentences(re.sub(r"<<[^<>]*>>", "", chain))
        answer = field(raw, "answer")
        if isinstance(answer, str):
            answer = answer.rpartition("####")[2]
        steps = self.needed(found, "cot")
        return Sample(None, text(raw, "question"), (), steps, answered(answer), "free-form", "plain")


def sentences(chain: str) -> tuple[str, ...]:
    return tuple(SENTENCE.split(chain.strip())) if chain.strip() else ()
