"""The parameters of the page's API, as its documentation tells them. Values are handed on as they were given: what is wrong with
them is for those to say who are called. Knows Gradio, and neither models nor the page's looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.components.api_component import Api
from gradio_client.utils import is_file_obj_with_meta

EXAMPLE = {"path": "assets/examples/cups-3-2.mp4", "meta": {"_type": "gradio.FileData"}}
NO_FILE = "The clip must be an uploaded file: send handle_file(path) from gradio_client."


def parameter(label: str, about: str, kind: dict[str, Any], example: Any, default: Any = None) -> Api:
    """One parameter. kind: its JSON schema; default: None where it must be given."""
    made = Api(default, kind | {"additional_description": about}, label)
    made.example_payload = lambda: example  # type: ignore[method-assign]  # of a subclass Gradio writes a stub to the disk
    return made


def path_of(given: object) -> str | None:
    """The path of a file that was uploaded before, which Gradio has seen to. Errors: ValueError with a sentence."""
    if given is None:
        return None
    if not isinstance(given, dict) or not is_file_obj_with_meta(given):
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


def to_think(clip: gr.Video, most: int, usual: int) -> list[Api]:
    """The parameters of a question. clip: a component that takes the same files; most, usual: pauses."""
    whole_number, text = {"type": "integer"}, {"type": "string"}
    return [
        parameter("Clip", "A video, GIF or picture.", clip.api_info(), EXAMPLE),
        parameter("Question", "What to answer.", text, "Where is the ball at the end?"),
        parameter(
            "Options", "One a line, 2 to 26 of them; empty for an open question.", text, "left\nmiddle\nright", ""
        ),
        parameter("Pauses", f"Number of silent thinking slots, 0 to {most}.", whole_number, usual, usual),
        parameter("Chain", "Whether to answer by a written chain of thought too.", {"type": "boolean"}, True, True),
    ]


def to_film(families: Sequence[str], most: int, last: int) -> list[Api]:
    """The parameters of a new clip. most: steps; last: the largest seed."""
    whole_number, choice = {"type": "integer"}, {"type": "string", "enum": [*families]}
    return [
        parameter("World", f"One of {', '.join(families)}.", choice, families[0], families[0]),
        parameter("Steps", f"Number of steps, 1 to {most}.", whole_number, 4, 4),
        parameter("Seed", f"0 to {last}; the same three always make the same clip.", whole_number, 7, 7),
    ]
