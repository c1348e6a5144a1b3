"""GSM8k-Aug as iCoT writes it: `question||<<12+7=19>> <<19*2=38>> #### 38`, one problem a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.data.files import FileSource, Rows, lines
from engine.data.samples import Sample
from engine.data.values import BadRow, answered, equations, said, written


@dataclass(frozen=True)
class Gsm8kIcotSource(FileSource):
    def index(self, path: Path) -> Rows:
        return lines(path)

    def read(self, text: bytes) -> str:
        return written(text)

    def parse(self, raw: str) -> Sample:
        for mark, before, after in (("||", "question", "chain"), ("####", "chain", "answer")):
            if raw.count(mark) != 1:
                raise BadRow(f"{before} and {after} must be separated by exactly one {mark}, not {raw.count(mark)}")
        question, rest = raw.split("||")
        if "####" in question:
            raise BadRow("question must stand before the chain and the answer")
        chain, answer = rest.split("####")
        steps = self.needed(equations(chain, "chain"), "chain")
        return Sample(None, said(question, "question"), (), steps, answered(answer), "numerical", "plain")
