"""What readers of files share: a shuffled round an epoch, held-out rows, and no training on less than was given.

Knows no format: a reader says how a file falls into entries, and what one entry becomes.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from engine.config import ConfigError
from engine.data.samples import Sample

Row = TypeVar("Row")
Entry = tuple[str, Any]  # where it stands ("line 3"), and what stands there


class BadRow(ValueError):
    """Why a row can't be used; begins with the field's name."""


@dataclass(frozen=True)
class FileSource(ABC, Generic[Row]):
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

    @abstractmethod
    def entries(self, path: Path) -> list[Entry]:
        """All rows of a file, unread. Errors: OSError, ConfigError."""

    @abstractmethod
    def parse(self, raw: Any) -> Row:
        """Errors: BadRow."""

    @abstractmethod
    def sample(self, row: Row) -> Sample:
        """What training and tests are given."""

    @cached_property
    def rows(self) -> list[Row]:
        """Errors: ConfigError naming the file and the first row and field that can't be used."""
        rows, bad = list[Row](), list[str]()
        path, entries = self._part()
        for where, raw in entries:
            try:
                rows.append(self.parse(raw))
            except BadRow as problem:
                bad.append(f"{path}, {where}: {problem}.")
        if len(bad) > self.leave_out:
            more = f"{len(bad)} of its {len(entries)} rows can't be used; leave_out: {len(bad)} goes on without them."
            raise ConfigError(f"{bad[0]} {more}")
        if not rows:
            raise ConfigError(f"{path} holds nothing to use for {self.split}.")
        return rows

    def _part(self) -> tuple[Path, list[Entry]]:
        separate = bool(self.validation_file)
        path = Path(self.validation_file if separate and self.split == "validation" else self.file)
        try:
            entries = self.entries(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"Can't read {path if path.name else 'the data (set its file)'}: {error}.") from None
        if separate or self.split == "test":
            return path, entries
        if len(entries) <= self.held_out:
            raise ConfigError(f"{path} has {len(entries)} rows: there must be more than {self.held_out} (held_out).")
        if self.split == "train":
            return path, entries[: len(entries) - self.held_out]
        if not self.held_out:
            raise ConfigError(f"{path} is all for training: set held_out or validation_file for the validation.")
        return path, entries[-self.held_out :]

    def __call__(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.rows))
        if self.split == "train":
            place = int(_shuffled(self.seed, epoch, len(self.rows))[place])
        return self.sample(self.rows[place])

    def needed(self, steps: Sequence[str], field: str) -> tuple[str, ...]:
        """The steps, if there are neither fewer than the split needs nor more than the limit. Errors: BadRow."""
        if not steps and self.split == "train" and not self.without_steps:
            raise BadRow(f"{field} holds no steps (without_steps: true is for methods that need none)")
        if len(steps) > self.most_steps:
            raise BadRow(f"{field} holds {len(steps)} steps, more than {self.most_steps} (most_steps)")
        return tuple(steps)


class TextSource(FileSource[Sample]):
    """Rows that are samples as soon as they are read."""

    def sample(self, row: Sample) -> Sample:
        return row


@lru_cache(maxsize=2)  # an epoch asks for one order again and again, and shuffling a large file takes milliseconds
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def lines(path: Path) -> list[Entry]:
    """The lines of a text file that hold anything; the first is line 1."""
    text = path.read_text(encoding="utf-8")
    return [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def json_rows(path: Path) -> list[Entry]:
    """A JSON list (its first is sample 0), or JSON lines. Errors: ConfigError for a file that is neither."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return [(f"sample {number}", row) for number, row in enumerate(_json(text, str(path)))]
    return [(where, _json(line, f"{path}, {where}")) for where, line in lines(path)]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}.") from None


def field(raw: Any, name: str) -> Any:
    """Errors: BadRow for a row without it."""
    if not isinstance(raw, dict):
        raise BadRow(f"row must hold fields, not {raw!r:.40}")
    if name not in raw:
        raise BadRow(f"{name} missing")
    return raw[name]


def text(raw: Any, name: str) -> str:
    """A field's text, without space around it. Errors: BadRow for a missing field, another type, or no text."""
    return said(field(raw, name), name)


def said(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, not {value!r:.40}")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    return value.strip()


def answered(value: Any, name: str = "answer") -> str:
    """Text, a number, yes or no (as True or False); thousands are written without commas, as answers are compared."""
    answer = said(str(value) if isinstance(value, bool | int | float) else value, name)
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer


def equations(chain: str, name: str) -> tuple[str, ...]:
    """`<<12+7=19>> <<19*2=38>>` -> each with its brackets. Errors: BadRow for anything between them."""
    if rest := re.sub(r"<<[^<>]+>>", "", chain).strip():
        raise BadRow(f"{name} has {rest!r:.60} outside <<...>>")
    return tuple(re.findall(r"<<[^<>]+>>", chain))
