"""Real benchmarks: how each one's published file becomes questions, how its answers score, how the scores are summed up.

Knows no model, and of files only what engine/exams/tables.py reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.data.aokvqa import choice, image_name
from engine.data.samples import ANSWER, letter
from engine.data.values import BadRow, said, text
from engine.data.values import field as column
from engine.data.video_r1 import posed, solved
from engine.evaluation import Z, mean, wilson
from engine.exams import scores
from engine.exams.scores import Judge
from engine.exams.tables import Media, Row, Table, cell, listed, table

ROTATION = 10**6  # MMBench asks a question again, its options rotated, under its index plus a multiple of this


@dataclass(frozen=True)
class Question:
    """kind: its type of problem. true: the true answer as `said` answers are held against it. groups: what figures are
    broken down by; a question may belong to several of one. facts: what its score needs besides."""

    id: str
    text: str
    options: tuple[str, ...]
    kind: str
    media: tuple[Media, ...]  # what is shown, in its order
    still: bool
    true: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    question: Question
    score: float


@dataclass(frozen=True)
class Protocol:
    """
    parse: a row -> its question. Errors: BadRow.
    score: what was said -> 0 to 1, with the judge that the caller has.
    summed: figures of this benchmark's own, over all questions.
    judged: it can't be scored without a judge.
    """

    parse: Callable[[Row, Table], Question | None]
    score: Callable[[str, Question, Judge | None], float]
    summed: Callable[[Sequence[Graded]], dict[str, Any]] = lambda graded: {}
    judged: bool = False


# Tables and pictures


def questions(name: str, file: str | Path, media: str | Path) -> list[Question]:
    """All questions of a benchmark's file. Errors: ConfigError naming the file and the first row that can't be used."""
    given = table(Path(file), Path(media))
    found, bad = list[Question](), list[str]()
    for where, row in given.rows:
        try:
            if not isinstance(row, dict):
                raise BadRow(f"row must hold fields, not {row!r:.40}")
            if question := PROTOCOLS[name].parse(row, given):
                found.append(question)
        except BadRow as problem:
            bad.append(f"{file}, {where}: {problem}.")
    if bad:
        raise ConfigError(f"{bad[0]} {len(bad)} of its {len(given.rows)} rows can't be used.")
    if len({each.id for each in found}) < len(found):
        raise ConfigError(f"{file}: two rows have the same name; their answers couldn't be told apart.")
    if not found:
        raise ConfigError(f"{file} holds nothing that {name} asks.")
    return found


def _name(row: Row, *columns: str) -> str:
    for each in columns:
        if row.get(each) not in (None, ""):
            return str(row[each])
    raise BadRow(f"{columns[0]} missing")


def _groups(row: Row, *columns: str) -> dict[str, tuple[str, ...]]:
    return {name: (str(row[name]),) for name in columns if row.get(name) not in (None, "")}


# Video-R1: MVBench, TempCompass, VideoMME, VideoMMMU, VSI-Bench and MMVU in its form


VIDEO_R1 = {  # how each of its types of problem is scored
    "multiple choice": scores.exact,
    "numerical": scores.numerical,
    "regression": scores.mean_relative_accuracy,
    "OCR": scores.transcription,
    "free-form": scores.rouge,
}


def _video_r1(row: Row, given: Table) -> Question:
    kind, still, options = posed(row)
    answer = text(row, "solution")
    found = ANSWER.search(answer)
    groups = {"problem_type": (kind,)} | _groups(row, "data_source")
    true = solved(found[1] if found else answer, kind, options)
    media = (given.file(text(row, "path")),)
    return Question(_name(row, "problem_id", "id"), text(row, "problem"), options, kind, media, still, true, groups)


def _video_r1_score(told: str, question: Question, judge: Judge | None) -> float:
    return VIDEO_R1[question.kind](told, question.true)


def _video_r1_summed(graded: Sequence[Graded]) -> dict[str, Any]:
    """Its two figures: mean relative accuracy of the regressions, accuracy of all else."""
    regression = [each.score for each in graded if each.question.kind == "regression"]
    rest = [each.score for each in graded if each.question.kind != "regression"]
    return {"mean_acc": figures(rest) if rest else None, "mean_mra": figures(regression) if regression else None}


# A-OKVQA


def _aokvqa(row: Row, given: Table) -> Question:
    name = image_name(row)
    inside = f"{row.get('split', 'val')}2017/{name}"  # as COCO's folders are called
    media = (given.file(inside if (given.media / inside).is_file() else name),)
    return Question(text(row, "question_id"), text(row, "question"), (), "free-form", media, True, "")


def _aokvqa_choice(row: Row, given: Table) -> Question:
    options, right = choice(row)
    asked = _aokvqa(row, given)
    return Question(asked.id, asked.text, options, "multiple choice", asked.media, True, letter(right))


def _aokvqa_direct(row: Row, given: Table) -> Question | None:
    """Questions that people found hard to answer without the choices are left out, as published."""
    if row.get("difficult_direct_answer"):
        return None
    answers = listed(column(row, "direct_answers"), "direct_answers")
    if not answers:
        raise BadRow("direct_answers is empty")
    told = tuple(said(each, "direct_answers") for each in answers)
    asked = _aokvqa(row, given)
    facts = {"answers": told}
    return Question(asked.id, asked.text, (), "free-form", asked.media, True, max(told, key=told.count), {}, facts)


# VLMEvalKit's tables: MMStar, MMBench, AI2D with options, HallusionBench with yes and no


def _optional(row: Row, given: Table) -> Question:
    """Each option keeps the letter of its column. Where a column between is empty, they stand in the question with theirs."""
    columns = [letter(i) for i in range(26)]
    offered = {name: told for name in columns if (told := cell(row, name))}
    true = cell(row, "answer").upper()
    if not true:
        raise BadRow("answer missing: a split whose answers aren't published can't be scored here")
    if offered and true not in offered:
        raise BadRow(f"answer must be one of its {len(offered)} options' letters, not {true!r:.20}")
    asked = "\n".join(part for part in (cell(row, "hint"), text(row, "question")) if part)
    groups = _groups(row, "category", "l2-category", "l2_category")
    options, facts = tuple(offered.values()), {}
    if list(offered) != columns[: len(offered)]:
        last = columns.index(max(offered))
        facts = {"offered": tuple(offered.get(name, f"\0{name}") for name in columns[: last + 1])}
        lines = "\n".join(f"{name}. {told}" for name, told in offered.items())
        asked, options = f"{asked} Options:\n{lines}", ()
    name = _name(row, "index", "id")
    return Question(name, asked, options, "multiple choice", given.shown(row), True, true, groups, facts)


def _option_score(told: str, question: Question, judge: Judge | None) -> float:
    """Where options stand within the question, their letters count: their own, or in MMStar's other form four, without their
    texts."""
    offered = question.facts.get("offered") or question.options or ("\0A", "\0B", "\0C", "\0D")
    return float(scores.option_letter(told, offered) == question.true)


def _rotated(graded: Sequence[Graded]) -> dict[str, Any]:
    """MMBench's circular accuracy: a question is right where it is right in every rotation of its options."""
    asked: dict[int, list[float]] = {}
    for each in graded:
        if each.question.id.isdigit():
            asked.setdefault(int(each.question.id) % ROTATION, []).append(each.score)
    return {"circular": figures([min(found) for found in asked.values()])} if asked else {}


def _hallusion(row: Row, given: Table) -> Question:
    """VLMEvalKit's table, whose index ends in set, figure and question; or the published JSON, with fields for them."""
    if "gt_answer" in row:
        places = [str(column(row, name)) for name in ("set_id", "figure_id", "question_id")]
        part = (text(row, "category"), text(row, "subcategory"))
        name, true = "_".join([*part, *places]), {"0": "No", "1": "Yes"}.get(str(row["gt_answer"]))
        seen = str(row.get("visual_input", "1")) != "0"
        media = given.shown(row) if seen else ()
    else:
        name = _name(row, "index")
        places = name.split("_")[3:6]
        part = (text(row, "category"), text(row, "l2-category"))
        true, media = scores.yes_or_no(cell(row, "answer")) or None, given.shown(row)
    if len(places) != 3:
        raise BadRow(f"index must be like VD_figure_0_0_0_1, not {name!r:.40}")
    if true is None:
        raise BadRow("the answer must be yes or no (gt_answer: 1 or 0)")
    groups = {"category": (part[0],), "subcategory": (part[1],)}
    asked = f"{text(row, 'question')} Please answer yes or no."
    facts = {"figure": (*part, places[0], places[1]), "asked": (*part, places[0], places[2])}
    return Question(name, asked, (), "free-form", media, True, true, groups, facts)


def _hallusion_summed(graded: Sequence[Graded]) -> dict[str, Any]:
    """aAcc: all answers; fAcc: figures about which all was answered right; qAcc: questions right for every figure."""

    def all_right(by: str) -> dict[str, Any]:
        found: dict[Any, list[float]] = {}
        for each in graded:
            found.setdefault(each.question.facts[by], []).append(each.score)
        return figures([min(part) for part in found.values()])

    return {"aAcc": figures([g.score for g in graded]), "fAcc": all_right("figure"), "qAcc": all_right("asked")}


# MathVista and MMVet


def _mathvista(row: Row, given: Table) -> Question:
    options = tuple(map(str, listed(row.get("choices") or [], "choices")))
    kind = _name(row, "answer_type")
    try:
        precision = int(float(row.get("precision") or 0))
    except (ValueError, OverflowError):
        precision = 0  # "nan" in tables
    true = _name(row, "answer")
    if options and true not in options:
        raise BadRow(f"answer must be one of its choices, not {true!r:.40}")
    groups = _groups(row, "task", "question_type")
    unit = cell(row, "unit")
    asked = text(row, "question") + (f" (Unit: {unit})" if unit not in ("", "None") else "")
    problem = "multiple choice" if options else "numerical" if kind in ("integer", "float") else "free-form"
    facts = {"answer_type": kind, "precision": precision}
    name = _name(row, "index", "pid", "id")
    return Question(name, asked, options, problem, given.shown(row), True, true, groups, facts)


def _mathvista_score(told: str, question: Question, judge: Judge | None) -> float:
    """By rule; with a judge, what is neither choice nor number is judged."""
    if judge and question.kind == "free-form":
        return judged(told, question, judge)
    found = scores.math_answer(told, question.options, question.facts["answer_type"], question.facts["precision"])
    return scores.exact(found, question.true)


def _mmvet(row: Row, given: Table) -> Question:
    needs = row.get("capability") or row.get("category") or ()
    parts = needs.split(",") if isinstance(needs, str) else needs
    groups = {"capability": tuple(str(part).strip() for part in parts)}
    name = _name(row, "index", "question_id", "id")
    true = text(row, "answer")
    return Question(name, text(row, "question"), (), "free-form", given.shown(row), True, true, groups)


def judged(told: str, question: Question, judge: Judge | None) -> float:
    """Errors: ValueError for a judge that fails, or says anything but 0 to 1."""
    if judge is None:
        raise ValueError("These answers need a judge: name a function of your own with --judge MODULE:FUNCTION.")
    try:
        score = float(judge(question.text, told, question.true))
    except Exception as error:  # whatever the caller's own function raises
        raise ValueError(f"The judge failed on {question.id}: {error or type(error).__name__}.") from error
    if not 0 <= score <= 1:
        raise ValueError(f"The judge gave {question.id} {score}; it must give 0 to 1.")
    return score


CHOSEN = Protocol(_optional, _option_score)
PROTOCOLS: dict[str, Protocol] = {
    "video-r1": Protocol(_video_r1, _video_r1_score, _video_r1_summed),
    "aokvqa-choice": Protocol(_aokvqa_choice, _option_score),
    "aokvqa-direct": Protocol(_aokvqa_direct, lambda told, q, judge: scores.direct_answer(told, q.facts["answers"])),
    "mmstar": CHOSEN,
    "ai2d": CHOSEN,
    "mmbench": Protocol(_optional, _option_score, _rotated),
    "hallusionbench": Protocol(
        _hallusion, lambda told, q, judge: float(scores.yes_or_no(told) == q.true), _hallusion_summed
    ),
    "mathvista": Protocol(_mathvista, _mathvista_score),
    "mmvet": Protocol(_mmvet, judged, judged=True),
}


# Figures


def figures(found: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval and count. Of shares of right answers the interval is Wilson's; of scores between, a normal one."""
    share = mean(found)
    if all(score in (0, 1) for score in found):
        low, high = wilson(round(sum(found)), len(found))
    else:
        spread = math.sqrt(sum((score - share) ** 2 for score in found) / max(1, len(found) - 1) / len(found))
        low, high = max(0.0, share - Z * spread), min(1.0, share + Z * spread)
    return {"score": share, "interval": [low, high], "n": len(found)}


def summary(name: str, graded: Sequence[Graded]) -> dict[str, Any]:
    """All questions, the benchmark's own figures, and those of each group."""
    by: dict[str, dict[str, list[float]]] = {}
    for each in graded:
        for group, values in each.question.groups.items():
            for value in values:
                by.setdefault(group, {}).setdefault(value, []).append(each.score)
    whole = {group: {value: figures(found) for value, found in sorted(part.items())} for group, part in by.items()}
    return figures([each.score for each in graded]) | PROTOCOLS[name].summed(graded) | {"by": whole}
