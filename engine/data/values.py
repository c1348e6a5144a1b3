"""What one row holds: its texts, numbers, answers and options, each checked. Knows neither files nor formats."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from engine.data.samples import letter


class BadRow(ValueError):
    """Why a row can't be used; begins with the field's name."""


class NoFile(BadRow):
    """A row names a clip or an image that isn't there."""


NUMBER = re.compile(r"-?[\d,]*\.?\d+")  # as an answer is written


def written(text: bytes) -> str:
    """Errors: BadRow."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"row is not UTF-8 text (byte {error.start} of it): write the file as UTF-8 first (iconv -f LATIN1 -t UTF-8, if it "
            "is Latin-1)"
        ) from None


def as_json(text: str) -> Any:
    """Errors: BadRow."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"row is not valid JSON: {error}") from None


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
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} contains an unpaired surrogate (\\ud800 to \\udfff), which no tokenizer takes") from None
    return value.strip()


def answered(value: Any, name: str = "answer") -> str:
    """Text, a number, yes or no (as True or False); thousands are written without commas, as answers are compared."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"{name} must be a finite number, not {value}")
    answer = said(str(value) if isinstance(value, bool | int | float) else value, name)
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer) else answer


def number(text: str) -> float | None:
    """A whole text as one number, thousands with commas or without; None for anything else."""
    try:
        found = float(text.replace(",", ""))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def fitting(answer: str, kind: str, name: str = "answer") -> str:
    """The answer, if it's of the kind that a type of problem has. Errors: BadRow."""
    if kind in ("numerical", "regression") and number(answer) is None:
        raise BadRow(f"{name} must be a number for a {kind} problem, not {answer!r:.40}")
    return answer


# Behind its letter an option's text, which is none where it's an abbreviation's next letter ("A.D.") or another's ("A:B").
LETTERED = re.compile(r"([A-Z])[.:)](?:\s+|(?![A-Z]\b))")


def unlettered(options: Sequence[str], name: str = "options") -> tuple[str, ...]:
    """Options without their letters where each begins with its own ("A. left", "B. right"), else as they are.

    Errors: BadRow for letters that stand at each other's places, of which nobody knows which an answer means.
    """
    found = [LETTERED.match(option) for option in options]
    begun = [each[1] for each in found if each]
    own = [letter(place) for place in range(len(options))]
    if begun == own:
        return tuple(option[each.end() :] for option, each in zip(options, found, strict=True) if each)
    if len(set(begun)) == len(options) and set(begun) & set(own):
        place = next(place for place, each in enumerate(begun) if each != own[place])
        raise BadRow(f"{name}[{place}] begins with the letter {begun[place]}, and stands where {own[place]} does")
    return tuple(options)


def distinct(options: Sequence[str], name: str = "options") -> None:
    """Errors: BadRow for two options that are the same."""
    texts = [answered(option, name) for option in options]
    for place, each in enumerate(texts):
        if (first := texts.index(each)) < place:
            raise BadRow(f"{name}[{first}] and {name}[{place}] are the same ({options[place]!r:.40})")


def chosen(answer: str, options: Sequence[str], name: str = "answer") -> str:
    """The letter of the option that the answer names by its letter or its text. Errors: BadRow."""
    letters = [letter(place) for place in range(len(options))]
    texts = [answered(option) for option in options]
    if answer in letters and (answer not in texts or texts.index(answer) == letters.index(answer)):
        return answer
    if answer in texts and answer not in letters:
        return letters[texts.index(answer)]
    if answer in texts:
        raise BadRow(f"{name} {answer!r} is the letter of one option and the text of another")
    raise BadRow(f"{name} must be a letter from A to {letters[-1]} or the text of an option, not {answer!r:.40}")


def equations(chain: str, name: str) -> tuple[str, ...]:
    """`<<12+7=19>> <<19*2=38>>` -> each with its brackets. Errors: BadRow for anything between them."""
    if rest := re.sub(r"<<[^<>]+>>", "", chain).strip():
        raise BadRow(f"{name} has {rest!r:.60} outside <<...>>")
    return tuple(re.findall(r"<<[^<>]+>>", chain))
