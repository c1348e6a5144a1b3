"""The parameters of the page's API, as its documentation tells them. Values are handed on as they were given: what is wrong with
them is for those to say who are called. Knows what Gradio's calls hold, but neither Gradio, models nor the page's looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FILE = {"_type": "gradio.FileData"}  # by which Gradio knows the files of a call
EXAMPLE = {"path": "assets/examples/cups-3-2.mp4", "meta": FILE}
NO_FILE = "The clip must be an uploaded file: send handle_file(path) from gradio_client."


@dataclass(frozen=True)
class Parameter:
    """kind: its JSON schema; default: None where it must be given."""

    label: str
    about: str
    kind: Mapping[str, Any]
    example: Any
    default: Any = None

    @property
    def schema(self) -> dict[str, Any]:
        return {**self.kind, "additional_description": self.about}


def path_of(given: object) -> str | None:
    """The path of a file that was uploaded before, which Gradio has seen to. Errors: ValueError with a sentence."""
    if given is None:
        return None
    if not isinstance(given, dict) or not isinstance(given.get("path"), str) or given.get("meta") != FILE:
        raise ValueError(NO_FILE)
    return str(given["path"])


def whole(name: str, given: object, least: int, most: int) -> int:
    """Errors: ValueError with a sentence for anything but a whole number between the two."""
    if isinstance(given, bool) or not isinstance(given, int | float) or given % 1 != 0 or not least <= given <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, not {str(given)[:40]!r}.")
    return int(given)


def words(name: str, given: object) -> str:
    """Errors: ValueError with a sentence for anything but text, or nothing."""
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{name} must be text, not {str(given)[:40]!r}.")
    return given or ""


def to_think(clip: Mapping[str, Any], most: int, usual: int) -> list[Parameter]:
    """The parameters of a question. clip: the JSON schema of a file; most, usual: pauses."""
    whole_number, text = {"type": "integer"}, {"type": "string"}
    return [
        Parameter("Clip", "A video, GIF or picture.", clip, EXAMPLE),
        Parameter("Question", "What to answer.", text, "Where is the ball at the end?"),
        Parameter(
            "Options", "One a line, 2 to 26 of them; empty for an open question.", text, "left\nmiddle\nright", ""
        ),
        Parameter("Pauses", f"Number of silent thinking slots, 0 to {most}.", whole_number, usual, usual),
        Parameter("Chain", "Whether to answer by a written chain of thought too.", {"type": "boolean"}, True, True),
    ]


def to_film(families: Sequence[str], most: int, last: int) -> list[Parameter]:
    """The parameters of a new clip. most: steps; last: the largest seed."""
    whole_number, choice = {"type": "integer"}, {"type": "string", "enum": [*families]}
    return [
        Parameter("World", f"One of {', '.join(families)}.", choice, families[0], families[0]),
        Parameter("Steps", f"Number of steps, 1 to {most}.", whole_number, 4, 4),
        Parameter("Seed", f"0 to {last}; the same three always make the same clip.", whole_number, 7, 7),
    ]
