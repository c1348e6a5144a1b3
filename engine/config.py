"""Dataclass configurations from YAML files and command lines. Unknown keys are errors that suggest the nearest known one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A sentence for the person who wrote the configuration."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a mapping. Errors: ConfigError for a missing file, broken YAML, or anything but a mapping."""
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Can't read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or a number that can't be, text that is none
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(loaded).__name__}.")
    return loaded


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Makes the dataclass `kind` from a mapping, nested ones too, with every type checked."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    made = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(known)}."
            raise ConfigError(f"Unknown key {where + str(key)!r}.{hint}")
        made[key] = convert(value, hints[key], f"{where}{key}")
    try:
        return kind(**made)
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in made and _required(f)]  # type: ignore[arg-type]
        raise ConfigError(f"Missing: {', '.join(where + name for name in missing)}.") from None


def _required(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is MISSING and field.default_factory is MISSING


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type `hint`. Strings are parsed, so that YAML's 1e-3 and command lines work too."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = ConfigError(f"{name} = {value!r}: expected {_spell(hint)}.")
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            if type(None) in args:
                return None
            raise wrong
        choices = [choice for choice in args if choice is not type(None)]
        if len(choices) == 1:
            return convert(value, choices[0], name)
        for choice in choices:
            try:
                return convert(value, choice, name)
            except ConfigError:
                continue
        raise wrong
    if origin is Literal:
        if value is False and "no" in args:  # YAML reads a bare no as false
            return "no"
        if value in args:
            return value
        raise wrong
    if origin is tuple:
        items = [v.strip() for v in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise wrong
        if args[-1] is Ellipsis:
            return tuple(convert(v, args[0], name) for v in items)
        if len(items) != len(args):
            raise wrong
        return tuple(convert(v, a, name) for v, a in zip(items, args, strict=True))
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise wrong
        return build(hint, value, f"{name}.")  # type: ignore[arg-type]
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise wrong
    if hint in (int, float):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if isinstance(value, bool) or (hint is int and not number.is_integer()):
            raise wrong
        if hint is int and isinstance(value, int | str):
            with suppress(ValueError):
                return int(value)  # a float holds 53 bits
        return hint(number)
    if hint in (str, dict) and isinstance(value, hint):
        return value
    raise wrong


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        count = len(get_args(hint))
        return "a list of values" if Ellipsis in get_args(hint) else f"{count} values, such as {','.join('4' * count)}"
    return str(hint).removeprefix("<class '").removesuffix("'>")


def at_least(least: int, settings: object, *names: str, where: str = "") -> None:
    """Errors: ConfigError for the first of these settings that is smaller, or no number. where: what stands before its name."""
    for name in names:
        if not (value := getattr(settings, name)) >= least:
            raise ConfigError(f"{where}{name} is {value}: it must be {least} or more.")


def shard_of(text: str) -> tuple[int, int]:
    """i/n -> (i, n): the i-th of n, from 1. Errors: ConfigError."""
    part, _, whole = text.partition("/")
    if not (part.isdecimal() and whole.isdecimal() and 1 <= int(part) <= int(whole)):
        raise ConfigError(f"--shard {text}: write it as 1/4, the first of four.")
    return int(part), int(whole)


def function_of(place: str, name: str) -> Callable[..., Any]:
    """MODULE:FUNCTION -> the function. name: of the setting. Errors: ConfigError."""
    module, _, called = place.partition(":")
    try:
        found = getattr(import_module(module), called)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name} {place}: {error}. Write it as MODULE:FUNCTION, a module that Python finds."
        ) from None
    if not callable(found):
        raise ConfigError(f"{name} {place} isn't a function.")
    return found
