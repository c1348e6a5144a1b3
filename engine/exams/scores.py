"""What an answer scores, from 0 to 1, by the rules of the published benchmarks. Pure functions; knows no model, no file.

Where a benchmark asks a language model to find the answer in what was said, these rules find it instead, so that a score
needs no network; a judge for answers that rules can't score is whatever function the caller has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from engine.data.samples import letter
from engine.data.values import number

Judge = Callable[[str, str, str], float]  # (question, what was said, what is true) -> 0 to 1
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEEDS_ROUGE = "Free-form answers are scored by ROUGE: pip install rouge-score."


# Video-R1


def exact(said: str, true: str) -> float:
    return float(said.strip() == true.strip())


def numerical(said: str, true: str) -> float:
    """Equal at two decimals. A whole number for a decimal one, or the other way round, is wrong."""
    if bool(set(".,") & set(said)) != bool(set(".,") & set(true)):
        return 0.0
    ours, theirs = number(said), number(true)
    return float(ours is not None and theirs is not None and round(ours, 2) == round(theirs, 2))


def mean_relative_accuracy(said: str, true: str) -> float:
    """The share of the ten thresholds t = 0.5, 0.55 .. 0.95 for which |said - true| / |true| < 1 - t.

    In float32 as published, which decides what lies on a threshold.
    """
    ours, theirs = number(said), number(true)
    if ours is None or theirs is None:
        return 0.0
    said_, true_ = torch.tensor(ours), torch.tensor(theirs)
    error = (said_ - true_).abs() / (true_.abs() + 1e-8)
    return int((error < 1 - torch.arange(0.5, 0.975, 0.05)).sum()) / 10


def edits(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(theirs) + 1))
    for i, mine in enumerate(ours, 1):
        before, row = row, [i]
        for j, yours in enumerate(theirs, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (mine != yours)))
    return row[-1]


def transcription(said: str, true: str) -> float:
    """1 - the word error rate, from 0."""
    words = true.split()
    return max(0.0, 1 - edits(said.split(), words) / max(1, len(words)))


def rouge(said: str, true: str) -> float:
    """The mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, words stemmed. Errors: ValueError without rouge-score."""
    found = _rouge().score(true, said)
    return sum(each.fmeasure for each in found.values()) / len(found)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise ValueError(NEEDS_ROUGE) from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


# A-OKVQA


def direct_answer(said: str, answers: Sequence[str]) -> float:
    """A third for each of the ten people who gave this answer, up to 1."""
    return min(1.0, sum(said.strip().lower() == answer.strip().lower() for answer in answers) / 3)


# VLMEvalKit's rules, by which LLaVA-CoT and Heima are scored


def option_letter(said: str, options: Sequence[str]) -> str:
    """The option that was meant: the only option's letter among the words, else the only option whose text was said, else "".

    An A in a sentence of more than three words is an article.
    """
    letters = [letter(i) for i in range(len(options))]
    words = said.translate(MARKS).split()
    found = [each for each in letters if each in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    low = said.lower()
    told = [each for each, option in zip(letters, options, strict=True) if option.strip().lower() in low]
    return told[0] if len(told) == 1 else ""


def yes_or_no(said: str) -> str:
    """Yes or No where one of the words was said and the other wasn't; else ""."""
    words = set(re.findall(r"[a-z]+", said.lower()))
    found = {"yes", "no"} & words
    return found.pop().title() if len(found) == 1 else ""


# MathVista


def math_answer(said: str, choices: Sequence[str], answer_type: str, precision: int) -> str:
    """What was said, as MathVista writes answers: a choice's text, a whole number, a number of so many decimals, or text.

    A choice that isn't named is the one whose spelling is nearest; of several numbers the last counts.
    """
    if not said.strip():
        return ""
    if choices:
        if picked := option_letter(said, choices):
            return choices[ord(picked) - ord("A")]
        return min(choices, key=lambda choice: edits(said.strip(), choice))
    if answer_type not in ("integer", "float"):
        return said.strip()
    numbers = [each for each in NUMBER.findall(said) if any(map(str.isdigit, each))]
    found = number(numbers[-1]) if numbers else None
    if found is None:
        return ""
    return str(int(found)) if answer_type == "integer" else str(round(found, precision))
