"""What readers of files share: rows read when their turn comes, a shuffled round an epoch, held-out rows, and no training
on less than was given.

A file is gone through once before training: where its rows stand is remembered, and each must be usable. No clip or image
is opened for that. Knows no format: a reader says how a file falls into rows, and what one row becomes.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.config import ConfigError, at_least
from engine.data.samples import Sample
from engine.data.values import BadRow, as_json, written


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of a file stand. They are read again each time, so that a file may be larger than the memory."""

    path: Path
    unit: Literal["line", "sample"]
    numbers: np.ndarray  # int64 [rows]: lines count from 1, samples of a JSON list from 0
    spans: np.ndarray  # int64 [rows, 2]: first byte, and the one behind the last
    state: tuple[int, int]  # size and time of change of the file whose rows these are

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, place: int) -> str:
        return f"{self.unit} {self.numbers[place]}"

    def texts(self, places: Sequence[int]) -> Iterator[bytes]:
        """Errors: ConfigError for a file that has changed, OSError."""
        with self.path.open("rb") as file:
            if _state(file.fileno()) != self.state:
                raise ConfigError(f"{self.path} has been changed while it was in use: start again (--resume goes on).")
            for place in places:
                start, stop = map(int, self.spans[place])
                file.seek(start)
                yield file.read(stop - start)


@dataclass(frozen=True)
class FileSource(ABC):
    """A sample is decided by (seed, index): each epoch is one shuffled round through the rows of its split.

    split: train = all but what is held out; validation = `validation_file`, or else what is held out; test = the whole
    file. Only train is shuffled, and only there every row needs steps: a problem without them can still be tested on.
    leave_out: so many rows that can't be used may be left out; one more is an error. By default all must be usable.
    """

    file: str = ""
    validation_file: str = ""
    seed: int = 0
    held_out: int = 0  # rows at the file's end, for validation where that has no file of its own
    split: Literal["train", "validation", "test"] = "train"
    without_steps: bool = False
    most_steps: int = 64
    leave_out: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, "seed", "held_out", "most_steps", "leave_out")

    @property
    def looks(self) -> dict[str, Any]:
        """How clips and images are looked at, for the folder of a model that was trained so; in rows of text there are none."""
        return {}

    @abstractmethod
    def index(self, path: Path) -> Rows:
        """Where the rows of a file stand. Errors: OSError, ConfigError."""

    @abstractmethod
    def parse(self, raw: Any) -> Sample:
        """Errors: BadRow."""

    def read(self, text: bytes) -> Any:
        """What stands in a row. Errors: BadRow."""
        return as_json(written(text))

    def parts(self, raw: Any) -> list[tuple[str, Any]]:
        """The samples that a row holds: what each is called in it, and what `parse` is given."""
        return [("", raw)]

    @property
    def path(self) -> Path:
        """The file of its split."""
        return Path(self.validation_file if self.validation_file and self.split == "validation" else self.file)

    def raw(self) -> Iterator[tuple[int, Any]]:
        """What stands in each row of the split: (row, what `parts` is given, or what is wrong). Errors: ConfigError."""
        places = range(*self._span)
        for place, text in zip(places, self._rows.texts(places)):
            try:
                yield place, self.read(text)
            except BadRow as problem:
                yield place, problem

    def each(self) -> Iterator[tuple[int, int, str, Sample | BadRow]]:
        """Every sample of the split in the file's order: (row, which of its samples, where, the sample or what is wrong).

        Errors: ConfigError for a file that can't be read.
        """
        for place, row in self.raw():
            where = self._rows.where(place)
            if isinstance(row, BadRow):
                yield place, 0, where, row
                continue
            for number, (name, raw) in enumerate(self.parts(row)):
                try:
                    found: Sample | BadRow = self.parse(raw)
                except BadRow as problem:
                    found = problem
                yield place, number, f"{where}, {name}" if name else where, found

    @cached_property
    def samples(self) -> np.ndarray:
        """int64 [samples, 2]: each one's row, and which of the row's samples it is.

        Errors: ConfigError naming the file and the first row and field that can't be used.
        """
        good, bad = list[tuple[int, int]](), 0
        for place, number, _, found in self.each():
            if isinstance(found, BadRow):
                bad += 1
            else:
                good.append((place, number))
        if bad > self.leave_out:
            raise ConfigError(self._refusal())
        if not good:
            raise ConfigError(f"{self.path} holds nothing to use for {self.split}.")
        return np.array(good, np.int64)

    def _refusal(self) -> str:
        """The first row of the file that can't be used, and how many can't, so that `leave_out` is right for both its splits."""
        parts: list[FileSource] = [self]
        if self.held_out and not self.validation_file and self.split != "test":
            parts = [replace(self, split="train"), replace(self, split="validation")]
        found = [(where, each) for part in parts for _, _, where, each in part.each()]
        bad = [f"{where}: {each}" for where, each in found if isinstance(each, BadRow)]
        return (
            f"{self.path}, {bad[0]}. {len(bad)} of its {len(found)} rows can't be used; leave_out: {len(bad)} goes on "
            "without them."
        )

    def __len__(self) -> int:
        """Samples in one round. Errors: ConfigError for a file that can't be used."""
        return len(self.samples)

    def __call__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self))
        if self.split == "train":
            place = int(_shuffled(self.seed, epoch, len(self))[place])
        row, number = map(int, self.samples[place])
        (text,) = self._rows.texts([row])
        name, raw = self.parts(self.read(text))[number]
        where = f"{self.path}, {self._rows.where(row)}" + (f", {name}" if name else "")
        return replace(self.parse(raw), where=where)

    @cached_property
    def _rows(self) -> Rows:
        try:
            return self.index(self.path)
        except OSError as error:
            name = self.path if self.path.name else "the data (set its file)"
            raise ConfigError(f"Can't read {name}: {error}.") from None

    @property
    def _span(self) -> tuple[int, int]:
        """The first row of the split, and the one behind its last."""
        count = len(self._rows)
        if self.validation_file or self.split == "test":
            return 0, count
        if self.held_out and count <= self.held_out:
            raise ConfigError(f"{self.path} has {count} rows: there must be more than {self.held_out} (held_out).")
        if self.split == "train":
            return 0, count - self.held_out
        if not self.held_out:
            raise ConfigError(f"{self.path} has no rows held out: set held_out or validation_file for the validation.")
        return count - self.held_out, count

    def needed(self, steps: Sequence[str], field: str) -> tuple[str, ...]:
        """The steps, if there are neither fewer than the split needs nor more than the limit. Errors: BadRow."""
        if not steps and self.split == "train" and not self.without_steps:
            raise BadRow(f"{field} holds no steps (without_steps: true is for methods that need none)")
        if len(steps) > self.most_steps:
            raise BadRow(f"{field} holds {len(steps)} steps, more than {self.most_steps} (most_steps)")
        return tuple(steps)


@lru_cache(maxsize=2)  # an epoch asks for one order again and again, and shuffling a large file takes milliseconds
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _state(file: int | Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


# How files begin that aren't text in UTF-8: what is packed and by what it is unpacked, and the encodings with their marks, or
# with JSON's first one. A longer beginning stands before a shorter one.
PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"[\0": "UTF-16LE", b"{\0": "UTF-16LE", b"\0[": "UTF-16BE", b"\0{": "UTF-16BE",
}  # fmt: skip
ONE_OBJECT = "is one JSON object, not a list or a row a line: give the list of its rows alone"


def expect_text(path: Path) -> None:
    """Errors: ConfigError for a file that isn't text in UTF-8, saying what it is and how it becomes that; OSError."""
    with path.open("rb") as file:
        head = file.read(8)
    for begins, (kind, tool) in PACKED.items():
        if head.startswith(begins):
            raise ConfigError(f"{path} is compressed ({kind}): unpack it first ({tool} {path.name}).")
    if head.startswith(b"PAR1"):
        raise ConfigError(f"{path} is a Parquet file: write it as JSON lines first (`datasets` has to_json).")
    for begins, encoding in ENCODINGS.items():
        if head.startswith(begins):
            raise ConfigError(f"{path} is {encoding}: write it as UTF-8 first (iconv -f {encoding} -t UTF-8).")


def lines(path: Path) -> Rows:
    """The lines of a text file that hold anything; the first is line 1. Errors: ConfigError for a file without any, or of
    another kind; OSError."""
    expect_text(path)
    state, numbers, spans, start = _state(path), [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(b" \t\r\n\xef\xbb\xbf"):
                numbers.append(number)
                spans.append((start, start + len(line)))
            start += len(line)
    if not spans:
        raise ConfigError(f"{path} holds no rows.")
    if is_object(path, *spans[0]):
        raise ConfigError(f"{path} {ONE_OBJECT}.")
    return Rows(path, "line", np.array(numbers, np.int64), np.array(spans, np.int64).reshape(-1, 2), state)


def json_rows(path: Path) -> Rows:
    """The elements of a JSON list (its first is sample 0), or JSON lines. Errors: ConfigError for a list without an end, or
    a file without rows or of another kind; OSError."""
    if not is_list(path):
        return lines(path)
    expect_text(path)
    state = _state(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        try:
            spans = np.array(list(_elements(text)), np.int64).reshape(-1, 2)
        except ValueError as problem:
            raise ConfigError(f"{path} is not valid JSON: {problem}.") from None
    if not len(spans):
        raise ConfigError(f"{path} holds no rows.")
    return Rows(path, "sample", np.arange(len(spans)), spans, state)


def is_list(path: Path) -> bool:
    """Does the file begin as a JSON list? Errors: OSError."""
    with path.open("rb") as file:
        while block := file.read(4096):
            if begun := block.lstrip(b" \t\r\n\xef\xbb\xbf"):
                return begun.startswith(b"[")
    return False


def is_object(path: Path, start: int, stop: int) -> bool:
    """Is the file a single JSON object over several lines, of which the first stands from `start` to `stop`? The whole is
    read only where that line is the beginning of one. Errors: OSError."""
    with path.open("rb") as file:
        file.seek(start)
        if not _begins_object(file.read(stop - start)):
            return False
        file.seek(start)
        try:
            return isinstance(as_json(written(file.read())), dict)
        except BadRow:
            return False


def _begins_object(line: bytes) -> bool:
    """Is it JSON of an object that has no end, rather than a whole row, or a broken one?"""
    text = line.decode("utf-8-sig", errors="replace").strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


# What a JSON list falls apart at: texts, and objects that hold no other objects, as a whole, which is three times as fast as
# mark by mark; and what opens, closes and divides.
TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
FLAT = rb'[^"{}\[\]]*(?:' + TEXT + rb'[^"{}\[\]]*)*'
WHOLE = rb'\{[^"{}\[\]]*(?:(?:' + TEXT + rb"|\[" + FLAT + rb'\])[^"{}\[\]]*)*\}'
MARK = re.compile(WHOLE + rb"|" + TEXT + rb"|[\[\]{},]", re.DOTALL)


def _elements(text: bytes | mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where the elements of the list begin and end; whether each is valid is seen when it's read. Errors: ValueError."""
    depth = start = found = 0
    for mark in MARK.finditer(text):
        place = mark.start()
        kind = text[place : place + 1] if mark.end() == place + 1 else b'"'
        if kind in b"[{":
            depth += 1
            start = place + 1 if depth == 1 else start
        elif kind in b"]}":
            depth -= 1
            if depth == 0:
                if found or text[start:place].strip():
                    yield start, place
                if rest := text[place + 1 : place + 100].strip():
                    raise ValueError(f"{rest.decode(errors='replace')!r:.40} stands behind the end of the list")
                return
        elif kind == b"," and depth == 1:
            yield start, place
            start, found = place + 1, found + 1
    raise ValueError("the list has no end")
