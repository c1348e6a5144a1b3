"""A study written out: JSON, CSV, figures, and one HTML page that needs nothing else. Runs no model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.insight.estimates import Estimate
from engine.insight.figures import SAID, UNITS, drawn
from engine.insight.replace import meant
from engine.insight.study import Models

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Part = tuple[str, str, str, "Figure"]  # a file's name, a title, what it shows and what not, the figure
STYLE = """:root{color-scheme:light dark}body{font:16px/1.55 Inter,ui-sans-serif,system-ui,sans-serif;max-width:1120px;
margin:32px auto;padding:0 16px}h1,h2{letter-spacing:-.02em;line-height:1.2}h2{margin-top:48px}small{color:#767676}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{padding:4px 7px;text-align:left;
border-bottom:1px solid #8884;white-space:nowrap}"""


def write(out: Path, settings: Mapping[str, Any], models: Models, beside: Sequence[str]) -> list[str]:
    """Writes everything into a folder -> the files' names. beside: sentences on the models together. Errors: OSError."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    told = {"settings": settings, "beside_controls": list(beside), "models": models}
    (out / "insight.json").write_text(json.dumps(told, indent=1, allow_nan=False), encoding="utf-8")
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
    parts = [(name, *SAID[name], figure) for name, figure in figures.items()]
    (out / "report.html").write_text(page(settings, models, beside, parts), encoding="utf-8")
    return ["insight.json", "insight.csv", "report.html", *(f"figures/{name}.json" for name in figures)]


def leaves(figures: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Estimate]]:
    """Every estimate within, by its place: "replacement / zeros / accuracy"."""
    if isinstance(figures, Mapping) and "value" in figures:
        yield " / ".join(where), dict(figures)
    elif isinstance(figures, Mapping | list):
        for key, inner in figures.items() if isinstance(figures, Mapping) else enumerate(figures):
            yield from leaves(inner, (*where, str(key)))


def page(settings: Mapping[str, Any], models: Models, beside: Sequence[str], parts: Sequence[Part]) -> str:
    """One HTML page with everything in it, plotly's own code too."""
    chosen = escape(", ".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()))
    words = "".join(f"<h3>{escape(name)}</h3>{_list(model['in_words'])}" for name, model in models.items())
    if beside:
        words += f"<h3>Beside the controls</h3>{_list(beside)}"
    shown = []
    for i, (name, title, sentence, figure) in enumerate(parts):
        config = {
            "responsive": True, "displaylogo": False, "modeBarButtons": [["toImage"]],
            "toImageButtonOptions": {"format": "svg", "filename": name},
        }  # fmt: skip
        drawing = figure.to_html(full_html=False, include_plotlyjs=i == 0, config=config)
        shown.append(f"<h2>{escape(title)}</h2><p>{escape(sentence)}</p>{drawing}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sotto: what the thoughts hold</title><style>{STYLE}</style><h1>What the thoughts hold, and whether they "
        f"matter</h1><p><small>{chosen}. Bars are 95 % intervals. The camera at a figure's corner saves it as SVG; the numbers "
        f"are in insight.json and insight.csv.</small></p>{words}{''.join(shown)}{_tables(models)}</html>"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _tables(models: Models) -> str:
    """The replacement test, what each change is, and the last layer's collapse, in numbers."""
    keys = ("accuracy", "gain", "same_answer", "distance", "follows", "follows_letter")
    rows: dict[tuple[str, ...], list[str]] = {
        (name, change): [_told(row.get(key)) for key in keys]
        for name, model in models.items() for change, row in model["replacement"].items()
    }  # fmt: skip
    changes = meant(change for _, change in rows)
    replaced = _table(("model", "change", *(key.replace("_", " ") for key in keys)), rows)
    held: dict[tuple[str, ...], list[str]] = {
        (name,): [_told(m["collapse"][measure][-1]) if measure in m["collapse"] else "" for measure in UNITS]
        for name, m in models.items()
    }  # fmt: skip
    collapsed = _table(("model", *(f"{m.replace('_', ' ')} ({unit})" for m, unit in UNITS.items())), held)
    return (
        f"<h2>The replacement test in numbers</h2>{replaced}"
        f"{_list([f'{name}: {said}' for name, said in changes.items()])}"
        f"<h2>Collapse in the last layer, in numbers</h2>{collapsed}"
    )


def _told(one: Estimate | None) -> str:
    return "" if one is None else f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _table(head: Sequence[str], rows: Mapping[tuple[str, ...], Sequence[str]]) -> str:
    lines = [[*names, *told] for names, told in rows.items()]
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{cells}</table>"
