"""One short file a published method. Each makes five choices: layout, visibility, feedback, objectives, curriculum."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engine.config import ConfigError, build
from engine.methods.method import Method


def find(name: str) -> type[Method]:
    """A method by its file's name in this folder ("pause"), or by file and class where one holds several
    ("controls.Explicit"). A new file is found without being listed anywhere.

    Errors: ConfigError for a name without a file, or a file without that method.
    """
    file, _, wanted = name.partition(".")
    if not file.isidentifier() or find_spec(f"{__name__}.{file}") is None:
        raise ConfigError(f"There is no method {name!r}: engine/methods holds no file {file}.py.")
    module = import_module(f"{__name__}.{file}")
    made = [
        thing for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Method) and thing is not Method and thing.__module__ == module.__name__
    ]  # fmt: skip
    chosen = [thing for thing in made if not wanted or thing.__name__ == wanted]
    if len(chosen) != 1:
        names = ", ".join(f"{file}.{thing.__name__}" for thing in made) or "no method"
        raise ConfigError(f"{name!r} is not one method: engine/methods/{file}.py holds {names}.")
    return chosen[0]


def described(method: Method) -> dict[str, Any]:
    """A method as JSON: its name, as `find` takes it, and its settings."""
    kind = type(method)
    return {"name": f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}", **asdict(method)}  # type: ignore[call-overload]


def from_description(description: dict[str, Any]) -> Method:
    """Errors: ConfigError for a name or a setting that isn't known."""
    settings = dict(description)
    return build(find(str(settings.pop("name", ""))), settings, "method.")
