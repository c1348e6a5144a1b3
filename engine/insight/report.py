"""A study written out: JSON, CSV, figures, and one HTML page that needs nothing else. Runs no model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.insight.estimates import Estimate
from engine.insight.figures import SAID, Models, drawn

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Part = tuple[str, str, "Figure"]  # a title, what it shows and what not, the figure
STYLE = """:root{color-scheme:light dark}body{font:16px/1.55 Inter,ui-sans-serif,system-ui,sans-serif;max-width:920px;
margin:32px auto;padding:0 16px}h1,h2{letter-spacing:-.02em;line-height:1.2}h2{margin-top:48px}small{color:#767676}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}td,th{padding:4px 10px;text-align:left;
border-bottom:1px solid #8884;white-space:nowrap}"""


def write(out: Path, settings: Mapping[str, Any], models: Models) -> list[str]:
    """Writes everything into a folder -> the files' names. Errors: OSError."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    told = {"settings": settings, "models": models}
    (out / "insight.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    with (out / "insight.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["model", "figure", "value", "low", "high", "n"])
        for name, figures in models.items():
            table.writerows(
                [name, where, *(one[k] for k in ("value", "low", "high", "n"))] for where, one in leaves(figures)
            )
    figures = drawn(models)
    for name, figure in figures.items():
        figure.write_json(out / "figures" / f"{name}.json")
    parts = [(*SAID[name], figure) for name, figure in figures.items()]
    (out / "report.html").write_text(page(settings, models, parts), encoding="utf-8")
    return ["insight.json", "insight.csv", "report.html", *(f"figures/{name}.json" for name in figures)]


def leaves(figures: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Estimate]]:
    """Every estimate within, by its place: "replacement / zeros / accuracy"."""
    if isinstance(figures, Mapping) and "value" in figures:
        yield " / ".join(where), dict(figures)
    elif isinstance(figures, Mapping | list):
        for key, inner in figures.items() if isinstance(figures, Mapping) else enumerate(figures):
            yield from leaves(inner, (*where, str(key)))


def page(settings: Mapping[str, Any], models: Models, parts: Sequence[Part]) -> str:
    """One HTML page with everything in it, plotly's own code too."""
    chosen = escape(", ".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()))
    words = "".join(
        f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in model['in_words'])}</ul>"
        for name, model in models.items()
    )
    shown = []
    for i, (title, sentence, figure) in enumerate(parts):
        drawing = figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displayModeBar": False, "responsive": True})  # fmt: skip
        shown.append(f"<h2>{escape(title)}</h2><p>{escape(sentence)}</p>{drawing}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sotto: what the thoughts hold</title><style>{STYLE}</style><h1>What the thoughts hold, and whether they "
        f"matter</h1><p><small>{chosen}. Bars are 95 % intervals.</small></p>{words}{''.join(shown)}{_table(models)}</html>"
    )


def _table(models: Models) -> str:
    """The replacement test in numbers."""
    keys = ("accuracy", "gain", "same_answer", "distance", "follows", "follows_letter")
    head = "".join(f"<th>{name}</th>" for name in ("model", "change", *(key.replace("_", " ") for key in keys)))
    rows = []
    for name, model in models.items():
        for change, row in model["replacement"].items():
            told = [
                f"{row[k]['value']:.3f} ({row[k]['low']:.3f} to {row[k]['high']:.3f})" if k in row else "" for k in keys
            ]
            rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in (name, change, *told)) + "</tr>")
    return f"<h2>The replacement test in numbers</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
