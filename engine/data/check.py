"""What a data file holds and what is wrong with it, told before a run is. Recognises the formats by their fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from engine.config import ConfigError
from engine.container import VideoError
from engine.data.aokvqa import AokvqaSource, MultimodalCoconutSource
from engine.data.coconut_json import CoconutSource
from engine.data.codi_json import CodiSource
from engine.data.files import ONE_OBJECT, FileSource
from engine.data.gsm8k_icot import Gsm8kIcotSource
from engine.data.jsonl import JsonlSource
from engine.data.llava_cot import LlavaCotSource
from engine.data.media import MediaSource
from engine.data.samples import Sample, letter
from engine.data.values import NUMBER, BadRow, NoFile
from engine.data.video_r1 import VideoR1Source
from engine.footage import Footage


class Format(NamedTuple):
    """marks: fields that a row of this format has and no row of those behind it in the table; none where it is told otherwise."""

    reader: type[FileSource]
    marks: frozenset[str] = frozenset()


# By the name that each has in a configuration; the first whose marks a row has is taken.
FORMATS = {
    "video_r1": Format(VideoR1Source, frozenset({"problem", "process", "solution"})),
    "llava_cot": Format(LlavaCotSource, frozenset({"conversations"})),
    "aokvqa": Format(AokvqaSource, frozenset({"rationales", "image_id"})),
    "multimodal_coconut": Format(MultimodalCoconutSource, frozenset({"image_path", "steps"})),
    "codi_json": Format(CodiSource, frozenset({"question", "cot"})),
    "coconut_json": Format(CoconutSource, frozenset({"steps", "edges"})),  # ProsQA's, also as JSON lines
    "jsonl": Format(JsonlSource),
    "gsm8k_icot": Format(Gsm8kIcotSource),
}
LOOKED_AT = 20  # rows that a format is told by


@dataclass(frozen=True)
class Fault:
    where: str
    says: str  # begins with the field's name


@dataclass
class Report:
    """What `check` found. Three figures a row are fewest, median, most, over the rows that can be used."""

    file: str
    format: str
    rows: int = 0
    usable: int = 0
    shown: Counter[str] = field(default_factory=Counter)  # video, image, images or text
    steps: tuple[float, float, float] | None = None
    without_steps: int = 0
    options: tuple[float, float, float] | None = None  # of those that have any
    answers: Counter[str] = field(default_factory=Counter)  # letter, number, yes or no, words
    types: Counter[str] = field(default_factory=Counter)
    missing_media: int = 0  # rows that name a file which isn't there
    media_read: int = 0
    broken_media: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.faults

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"faults": [asdict(fault) for fault in self.faults], "clean": self.clean}

    def as_text(self, most: int = 20) -> str:
        """`most`: faults that are written out."""
        kinds = {"shown": self.shown, "types": self.types, "answers": self.answers}
        told = [f"{self.file}: {self.format}, {self.rows} rows, {self.usable} of them usable"]
        told += [f"  {name}: {', '.join(f'{kind} {n}' for kind, n in found.most_common())}" for name, found in kinds.items() if found]  # fmt: skip
        for name, three in (("steps", self.steps), ("options", self.options)):
            if three:
                told.append(f"  {name} a row: {three[0]:g} to {three[2]:g}, median {three[1]:g}")
        counts = {"rows without steps": self.without_steps, "rows whose media are missing": self.missing_media}
        told += [f"  {name}: {count}" for name, count in counts.items() if count]
        if self.media_read:
            told.append(f"  media read: {self.media_read}, of which {self.broken_media} are broken")
        told.append(f"{len(self.faults)} faults" if self.faults else "no faults")
        told += [f"  {fault.where}: {fault.says}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            told.append(f"  and {len(self.faults) - most} more (--json lists all)")
        return "\n".join(told)


def recognised(file: str) -> str:
    """The name of the format that a file's first rows have. Errors: ConfigError for none, or a file that can't be read."""
    source = CoconutSource(file, split="test")
    rows = list(islice(source.raw(), LOOKED_AT))
    with source.path.open("rb") as stream:
        head = stream.read(65536).lstrip(b" \t\r\n\xef\xbb\xbf")
    if b"||" in head and not head.startswith((b"{", b"[")):
        return "gsm8k_icot"
    fields = [set(row) for _, row in rows if isinstance(row, dict)]
    for name, known in FORMATS.items():
        if known.marks and any(known.marks <= row for row in fields):
            return name
    if any({"question", "answer"} & row for row in fields):
        return "coconut_json" if head.startswith(b"[") else "jsonl"
    if not fields:
        _, _, where, problem = next(source.each())
        raise ConfigError(f"{file}, {where}: {problem}.")
    if len(fields) == 1 and any(isinstance(value, list | dict) for value in rows[0][1].values()):
        raise ConfigError(f"{file} {ONE_OBJECT}.")
    raise ConfigError(f"{file} has none of the formats that are known ({', '.join(FORMATS)}): --format NAME names one.")


def check(source: FileSource, name: str, media: int = 0) -> Report:
    """Goes through the whole file. Opens none of its media, but `media` of them, spread over the file.

    Errors: ConfigError for a file that can't be read.
    """
    report = Report(str(source.path), name)
    steps, options, places = list[int](), list[int](), list[tuple[str, Footage]]()
    for _, _, where, found in source.each():
        report.rows += 1
        if isinstance(found, BadRow):
            report.missing_media += isinstance(found, NoFile)
            report.faults.append(Fault(where, str(found)))
            continue
        report.usable += 1
        report.shown[shown(found)] += 1
        report.types[found.problem_type] += 1
        report.answers[kind_of_answer(found)] += 1
        report.without_steps += not found.steps
        steps.append(len(found.steps))
        if found.options:
            options.append(len(found.options))
        if media:
            places += [(where, each) for each in found.visuals if isinstance(each, Footage)]
    report.steps, report.options = _three(steps), _three(options)
    for place in np.unique(np.linspace(0, len(places) - 1, min(media, len(places))).round().astype(int)).tolist():
        where, footage = places[place]
        report.media_read += 1
        try:
            footage.frames(footage.sampling)
        except VideoError as error:
            report.broken_media += 1
            report.faults.append(Fault(where, f"media can't be used: {error}"))
    return report


def reader(file: str, name: str = "", root: str = "", without_steps: bool = False, most_steps: int = 64) -> tuple[FileSource, str]:  # fmt: skip
    """The reader of a file, as training would have it, and its format's name. Errors: ConfigError."""
    if name and name not in FORMATS:
        raise ConfigError(f"There is no format {name!r}: {', '.join(FORMATS)}.")
    name = name or recognised(file)
    given: dict[str, Any] = {"file": file, "without_steps": without_steps, "most_steps": most_steps, "held_out": 0}
    kind = FORMATS[name].reader
    if root and not issubclass(kind, MediaSource):
        raise ConfigError(f"root: {name} names no clips or images.")
    if root:
        given["root"] = root
    return kind(**given), name


def shown(sample: Sample) -> str:
    if len(sample.visuals) != 1:
        return "images" if sample.visuals else "text"
    (visual,) = sample.visuals
    return "image" if isinstance(visual, Footage) and visual.still else "video"


def kind_of_answer(sample: Sample) -> str:
    answer = sample.answer
    if sample.problem_type == "multiple choice" or answer in [letter(place) for place in range(8)]:
        return "letter"
    if NUMBER.fullmatch(answer):
        return "number"
    return "yes or no" if answer.lower() in ("yes", "no", "true", "false") else "words"


def _three(counts: Sequence[int]) -> tuple[float, float, float] | None:
    return (min(counts), float(median(counts)), max(counts)) if counts else None
