"""A study written out: JSON, CSV, figures, and one HTML page that needs nothing else. Runs no model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.insight import plots
from engine.insight.estimates import Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Models = Mapping[str, Mapping[str, Any]]  # a model's figures, as `study` gives them
Part = tuple[str, str, str, "Figure"]  # a file's name, a title, what it shows and what not, the figure
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
    parts = drawn(models)
    for name, _, _, figure in parts:
        figure.write_json(out / "figures" / f"{name}.json")
    (out / "report.html").write_text(page(settings, models, parts), encoding="utf-8")
    return ["insight.json", "insight.csv", "report.html", *(f"figures/{name}.json" for name, *_ in parts)]


def leaves(figures: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, Estimate]]:
    """Every estimate within, by its place: "replacement / zeros / accuracy"."""
    if isinstance(figures, Mapping) and "value" in figures:
        yield " / ".join(where), dict(figures)
    elif isinstance(figures, Mapping | list):
        for key, inner in figures.items() if isinstance(figures, Mapping) else enumerate(figures):
            yield from leaves(inner, (*where, str(key)))


def drawn(models: Models) -> list[Part]:
    """The figures, with the sentences that belong to them."""
    first, whole = next(iter(models.items()))
    layers = range(len(whole["collapse"]["cosine"]))

    def of(pick: Any) -> dict[str, Any]:
        return {name: pick(model) for name, model in models.items()}

    def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
        return [row[key] for row in rows]

    changes = of(lambda m: {name: row["accuracy"] for name, row in m["replacement"].items()})
    same = of(lambda m: {name: row["same_answer"] for name, row in m["replacement"].items()})
    follows = of(lambda m: {name: row["follows"] for name, row in m["replacement"].items() if "follows" in row})
    by_slots = of(lambda m: m["how_many"]["by_slots"])
    fewer = range(max(len(rows) for rows in by_slots.values()))
    parts: list[Part] = [
        ("replacement", "Does it matter?", "Share of right answers when the slots hold something else, or nothing. If nothing changes, the slots do not matter for the answer.", plots.dots(changes, "right answers, share")),
        ("same-answer", "Does the answer change?", "Share of clips whose answer stays the same under each change, right or wrong.", plots.dots(same, "same answer, share")),
        ("follows", "Does the answer follow the slots?", "With the slots of another clip, or of the same clip with one event changed: share of clips that give that clip's answer. This shows cause, not just correlation.", plots.dots(follows, "answers that follow, share")),
        ("how-many", "How many thoughts?", "Right answers with only the first slots, from one prefill. A model that was trained with one number may do badly with any other.", plots.curves({name: column(rows, "accuracy") for name, rows in by_slots.items()}, fewer, "slots", "right answers, share")),
        ("confidence", "How sure is it?", "Mean probability of the likeliest option. To be sure is not to be right.", plots.curves({name: column(rows, "confidence") for name, rows in by_slots.items()}, fewer, "slots", "confidence, probability")),
        ("think-aloud", "Thinking aloud only when unsure", "Right answers by the confidence below which the chain is written out after all.", plots.curves({name: column(m["how_many"]["think_aloud"], "accuracy") for name, m in models.items()}, column(whole["how_many"]["think_aloud"], "threshold"), "threshold, probability", "right answers, share")),
        ("think-aloud-tokens", "What that costs", "Tokens written at the same thresholds.", plots.curves({name: column(m["how_many"]["think_aloud"], "tokens") for name, m in models.items()}, column(whole["how_many"]["think_aloud"], "threshold"), "threshold, probability", "tokens a clip")),
        ("probe", "Is the end of the story in the slots?", "Right answers of a linear probe for the last state, in each layer's best slot, on clips that it did not learn from. That it can be read does not mean that it is used; compare the controls, and what is right by chance (held against other clips of the family).", plots.curves({f"{name}{tail}": m["probe"]["end"][kind]["best"] for name, m in models.items() if "end" in m["probe"] for kind, tail in (("right", ""), ("shuffled", ", by chance"))}, layers, "layer", "right, share")),
        ("lens", "What would each layer say?", "How often the likeliest of the world's words is the last state, in each layer's best slot, by the logit lens and the tuned lens.", plots.curves({f"{name}, {kind}": lens["named"]["end"]["right"]["best"] for name, m in models.items() for kind, lens in m["lens"].items()}, layers, "layer", "right, share")),
        ("lens-distance", "How far is each layer from the end?", "Divergence between what a layer would say and what the model says. The lower, the better the lens.", plots.curves({f"{name}, {kind}": lens["divergence"] for name, m in models.items() for kind, lens in m["lens"].items()}, layers, "layer", "nats")),
    ]  # fmt: skip
    units = {"cosine": "cosine", "effective_rank": "directions", "norm": "mean embedding lengths", "distance": "distance", "centre": "distance"}  # fmt: skip
    titles = {"cosine": "Are the slots alike?", "effective_rank": "How many directions do they use?", "norm": "How long are they?", "distance": "How far apart are they?", "centre": "How far from the vocabulary?"}  # fmt: skip
    for measure, unit in units.items():
        lines = of(lambda m, measure=measure: m["collapse"][measure])  # type: ignore[misc]
        parts.append((f"collapse-{measure}", titles[measure], "Collapsed slots are alike, use one direction, and lie close together; that alone does not say that they are useless.", plots.curves(lines, layers, "layer", unit)))  # fmt: skip
    slots = [f"{i + 1}" for i in range(whole["slots"])]
    if "looked" in whole:
        moments = whole["looked"]["moments"]
        chosen = moments[max(moments, key=int)]
        steps = ["start", *(str(i) for i in range(1, len(chosen[0]) - 1)), "end"]
        rows = [*slots, *["answer"] * (len(chosen) > len(slots))][: len(chosen)]
        parts.append(("looked", "Where did it look?", f"{first}: mean attention of each slot to the moments of the longest clips. Attention says where information could come from, not what was used.", plots.cells(torch.tensor(chosen)[: len(rows)], steps, rows, "moment (step)", "slot", "attention")))  # fmt: skip
    if "spoken" in whole:
        named = torch.tensor(whole["spoken"]["alone"]["names"])
        steps = ["start", *(str(i) for i in range(1, named.shape[1] - 2)), "last", "none"]
        parts.append(("alone", "What does each slot say alone?", f"{first}: which true step each slot names best when nothing else is seen. It was trained to speak from all slots together.", plots.cells(named, steps, slots, "true step", "slot", "share of clips")))  # fmt: skip
    return parts


def page(settings: Mapping[str, Any], models: Models, parts: Sequence[Part]) -> str:
    """One HTML page with everything in it, plotly's own code too."""
    chosen = ", ".join(f"{escape(str(key))}: {escape(str(value))}" for key, value in settings.items())
    words = "".join(
        f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in model['in_words'])}</ul>"
        for name, model in models.items()
    )
    shown = []
    for i, (_, title, sentence, figure) in enumerate(parts):
        drawing = figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displayModeBar": False, "responsive": True})  # fmt: skip
        shown.append(f"<h2>{escape(title)}</h2><p>{escape(sentence)}</p>{drawing}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sotto: what the thoughts hold</title><style>{STYLE}</style><h1>What the thoughts hold, and whether they "
        f"matter</h1><p><small>{chosen}. Bars are 95 % intervals.</small></p>{words}{''.join(shown)}{_table(models)}</html>"
    )


def _table(models: Models) -> str:
    """The replacement test in numbers."""
    keys = ("accuracy", "gain", "same_answer", "distance", "follows")
    head = "".join(f"<th>{name}</th>" for name in ("model", "change", *(key.replace("_", " ") for key in keys)))
    rows = []
    for name, model in models.items():
        for change, row in model["replacement"].items():
            told = [
                f"{row[k]['value']:.3f} ({row[k]['low']:.3f} to {row[k]['high']:.3f})" if k in row else "" for k in keys
            ]
            rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in (name, change, *told)) + "</tr>")
    return f"<h2>The replacement test in numbers</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
