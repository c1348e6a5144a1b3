"""Runs' answers -> the table's cells, who leads whom, and Markdown, CSV and JSON. Knows no model and trains nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation import Z, mean, wilson
from engine.folders import write_whole

Cell = Mapping[str, Any]
COLUMNS = (
    "method", "world", "k", "seeds", "problems", "accuracy", "low", "high", "generated_tokens", "slots", "seconds",
    "training_seconds", "against", "lead", "lead_low", "lead_high", "cosine", "effective_rank", "centre", "operator",
    "by_chance",
)  # fmt: skip


def tabulate(against: Mapping[str, str], results: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Cell]:
    """A cell for each method, world and number of steps k (and "all"), over the method's seeds.

    against: each method, in the table's order, and its control, if it has one. results: a method's runs, a seed each, with
    answers by column.
    accuracy: the mean over seeds, with Wilson's interval for so many problems, however many seeds answered them. lead: in
    accuracy, over the control on the same problems, with its interval; None without a control.
    """
    whole: list[dict[str, Any]] = []
    answers: dict[tuple[str, str, str], np.ndarray] = {}  # correct or not, [seeds, problems]
    for method, control in against.items():
        runs = [result for name, result in results if name == method]
        columns = runs[0]["answers"] if runs else {"world": [], "k": []}
        labels = list(zip(columns["world"], map(str, columns["k"]), strict=True))
        for world in dict.fromkeys(world for world, _ in labels):
            for k in ["all", *sorted({k for w, k in labels if w == world}, key=int)]:
                chosen = [i for i, (w, own) in enumerate(labels) if w == world and k in ("all", own)]
                correct, tokens, seconds = (
                    np.array([[run["answers"][name][i] for i in chosen] for run in runs], dtype=float)
                    for name in ("correct", "generated_tokens", "seconds")
                )
                answers[method, world, k] = correct
                whole.append({
                    "method": method, "world": world, "k": k, "seeds": len(runs), "problems": len(chosen),
                    "accuracy": correct.mean(), "interval": wilson(correct.mean() * len(chosen), len(chosen)),
                    "by_seed": correct.mean(1).tolist(), "slots": runs[0]["slots"],
                    "generated_tokens": tokens.mean(), "seconds": seconds.mean(),
                    "training_seconds": mean([run["training_seconds"] for run in runs]), "against": control,
                    "held": over_seeds([run["held"].get(world, {}) for run in runs]) if k == "all" else {},
                })  # fmt: skip
    for cell in whole:
        ours, theirs = (answers.get((name, cell["world"], cell["k"])) for name in (cell["method"], cell["against"]))
        cell["lead"] = None if ours is None or theirs is None else lead(ours.mean(0) - theirs.mean(0))
    return list(whole)


def over_seeds(runs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {
        name: None if value is None else mean([run[name] or 0.0 for run in runs]) for name, value in runs[0].items()
    }


def lead(differences: np.ndarray) -> list[float]:
    """Mean difference over problems, and its 95 % interval."""
    spread = Z * differences.std() / len(differences) ** 0.5
    return [differences.mean(), differences.mean() - spread, differences.mean() + spread]


def verdict(cell: Cell) -> str:
    """How a method stands against its control, in words."""
    if cell["lead"] is None:
        return ""
    points, low, high = (100 * each for each in cell["lead"])
    word = "wins" if points > 0 else "**loses**" if points < 0 else "equals"
    doubt = "; may be chance" if points and low <= 0 <= high else ""
    return f"{word} {points:+.1f} ({low:+.1f} to {high:+.1f}{doubt}) against {cell['against']}"


def markdown(said: Mapping[str, int], whole: Sequence[Cell]) -> str:
    lines = [
        f"Every row starts from the same checkpoint and learns from {said['samples_seen']} samples. Each is tested on the "
        f"same {said['samples_tested']} problems, none of them trained on; k is the number of steps. Intervals: 95 %. "
        "¹: one seed; the others' figures are means over their seeds, and their intervals don't know how much seeds differ. "
        "Generated tokens are emitted one after another, "
        f"thoughts that are fed back among them. Seconds: a problem's share of a batch of {said['batch']}."
    ]
    for world in dict.fromkeys(cell["world"] for cell in whole):
        own = [cell for cell in whole if cell["world"] == world]
        all_k = [cell for cell in own if cell["k"] == "all"]
        ks = [k for k in dict.fromkeys(cell["k"] for cell in own) if k != "all"]
        lines += ["", f"## {world}", "", *ruled(
            "method", "accuracy, %", "by seed", *[f"k = {k}" for k in ks], "generated tokens", "slots", "seconds",
            "training seconds", "against its control",
        )]  # fmt: skip
        for cell in all_k:
            by_k = [percent(other) for k in ks for other in own if (other["method"], other["k"]) == (cell["method"], k)]
            lines.append(joined(
                cell["method"] + "¹" * (cell["seeds"] == 1), percent(cell), by_seed(cell), *by_k,
                f"{cell['generated_tokens']:.1f}", cell["slots"], f"{cell['seconds']:.4f}", f"{cell['training_seconds']:.0f}", verdict(cell),
            ))  # fmt: skip
        if held := [cell for cell in all_k if cell["held"]]:
            lines += ["", *ruled(
                "what the slots hold", "slots", "accuracy, %", "cosine of two", "effective rank",
                "distance to the vocabulary's centre", "lens names its step's operator, %", "another problem's, %",
            )]  # fmt: skip
        for cell in held:
            found = cell["held"]
            shares = ("" if found[name] is None else f"{100 * found[name]:.1f}" for name in ("operator", "by_chance"))
            lines.append(joined(
                cell["method"] + "¹" * (cell["seeds"] == 1), cell["slots"], percent(cell), f"{found['cosine']:.2f}",
                f"{found['effective_rank']:.2f}", f"{found['centre']:.1f}", *shares,
            ))  # fmt: skip
    return "\n".join(lines) + "\n"


def joined(*columns: object) -> str:
    return f"| {' | '.join(map(str, columns))} |"


def ruled(*heads: str) -> list[str]:
    return [joined(*heads), joined(*["---"] * len(heads))]


def percent(cell: Cell) -> str:
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def by_seed(cell: Cell) -> str:
    return " ".join(f"{100 * accuracy:.1f}" for accuracy in cell["by_seed"]) if cell["seeds"] > 1 else ""


def write(place: Path, said: Mapping[str, int], whole: Sequence[Cell]) -> None:
    """`place` with .json, .md and .csv behind it."""
    sheet = io.StringIO(newline="")
    rows = csv.DictWriter(sheet, COLUMNS, extrasaction="ignore")
    rows.writeheader()
    for cell in whole:
        bounds = dict(zip(("low", "high"), cell["interval"], strict=True))
        leads = dict(zip(("lead", "lead_low", "lead_high"), cell["lead"] or ("", "", ""), strict=True))
        rows.writerow({**cell, **bounds, **leads, **cell["held"]})
    texts = {
        "json": json.dumps({**said, "cells": whole}, indent=1),
        "md": markdown(said, whole),
        "csv": sheet.getvalue(),
    }
    for kind, text in texts.items():
        write_whole(place.with_name(f"{place.name}.{kind}"), text)
