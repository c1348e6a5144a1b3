"""A benchmark's file as rows, and what they show.

A file is a table: a JSON list, JSON lines, a JSON mapping of names to rows, or TSV with a head. Pictures lie in a folder, or
in the table itself in base64, as VLMEvalKit ships them. Knows no benchmark.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.data.files import expect_text, is_list, json_rows
from engine.data.values import BadRow, as_json, written

Row = Mapping[str, Any]
Media = Path | bytes  # a file, or a picture itself
Entry = tuple[str, Any]  # where a row stands ("line 3"), and what stands there
REFERENCE = 64  # characters: a shorter picture is the index of the row that holds it


@dataclass(frozen=True)
class Table:
    """The rows of a file, and the folder of its pictures and clips."""

    path: Path
    media: Path
    rows: tuple[Entry, ...]
    pictures: Mapping[str, Any]  # those that stand in the table, by their rows' index

    def file(self, name: str) -> Path:
        """Errors: BadRow for a file that isn't there, so that no run ends over it hours later."""
        path = self.media / name
        if not path.is_file():
            raise BadRow(f"names no file ({path})")
        return path

    def shown(self, row: Row) -> tuple[Media, ...]:
        """A row's pictures: one or a list of them in `image_path`, `image`, `imagename` or `filename`, each a file's name or,
        in `image`, what stands there in base64, maybe at another row. None for a row without any. Errors: BadRow."""
        name = next((name for name in ("image_path", "image", "imagename", "filename") if row.get(name)), "")
        if not name:
            return ()
        given = self.pictures.get(str(row[name]), row[name])
        several = isinstance(given, list) or str(given).startswith("[")
        return tuple(self._picture(str(each)) for each in (listed(given, name) if several else [given]))

    def _picture(self, given: str) -> Media:
        if len(given) <= 512 and (self.media / given).is_file():
            return self.media / given
        if len(given) <= REFERENCE or Path(given[:256]).suffix:
            raise BadRow(f"names no file ({self.media / given[:200]})")
        try:
            return base64.b64decode(given, validate=True)
        except binascii.Error:
            raise BadRow(f"holds neither a file's name nor a picture in base64: {given[:40]!r}") from None


def table(path: Path, media: Path) -> Table:
    """Errors: ConfigError for a file that can't be read, or is none of the forms above."""
    try:
        expect_text(path)
        rows = _tsv(path) if path.suffix.lower() == ".tsv" else _json_table(path)
    except (OSError, csv.Error) as error:
        raise ConfigError(f"Can't read {path}: {error}.") from None
    if not rows:
        raise ConfigError(f"{path} holds no rows.")
    held = {}
    for _, row in rows:
        if isinstance(row, dict) and len(str(row.get("image") or "")) > REFERENCE:
            held[str(row.get("index"))] = row["image"]
    return Table(path, media, tuple(rows), held)


def _json_table(path: Path) -> list[Entry]:
    """A list; a mapping of names to rows, which become their ids; or a row a line. Errors: ConfigError, OSError."""
    if named := _mapping(path):
        return [(f"sample {name}", {"id": name} | row) for name, row in named.items()]
    rows = json_rows(path)
    texts = rows.texts(range(len(rows)))
    return [_entry(path, rows.where(place), text) for place, text in enumerate(texts)]


def _mapping(path: Path) -> dict[str, dict[str, Any]] | None:
    """What a file holds that is a mapping of names to rows; None for any other file. Errors: OSError."""
    if is_list(path):
        return None
    try:
        found = as_json(written(path.read_bytes()))
    except BadRow:  # a row a line; each says what is wrong with it
        return None
    return found if isinstance(found, dict) and all(isinstance(row, dict) for row in found.values()) else None


def _entry(path: Path, where: str, text: bytes) -> Entry:
    """Errors: ConfigError."""
    try:
        return where, as_json(written(text))
    except BadRow as problem:
        raise ConfigError(f"{path}, {where}: {problem}.") from None


def _tsv(path: Path) -> list[Entry]:
    before = csv.field_size_limit(sys.maxsize)  # of the whole process; a picture is longer than it allows
    try:
        return [(f"row {place}", row) for place, row in enumerate(csv.DictReader(_lines(path), delimiter="\t"), 1)]
    finally:
        csv.field_size_limit(before)


def _lines(path: Path) -> Iterator[str]:
    """Errors: ConfigError, OSError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield written(line)
            except BadRow as problem:
                raise ConfigError(f"{path}, line {number}: {problem}.") from None


def listed(given: Any, name: str) -> list[Any]:
    """A list, which in a table is written out. Errors: BadRow."""
    if isinstance(given, str) and given.startswith("["):
        with suppress(ValueError, SyntaxError):
            given = ast.literal_eval(given)
    if not isinstance(given, list):
        raise BadRow(f"{name} must be a list, not {given!r:.40}")
    return given


def cell(row: Row, name: str) -> str:
    """What stands in a table's column, be it the number 0; "" for nothing, as pandas and others write it."""
    value = row.get(name)
    told = "" if value is None else str(value).strip()
    return "" if told == "nan" else told
