"""One run as a page of its own, that needs neither a server nor the net. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import __version__
from engine.ask import Reply
from engine.insight import plots
from engine.page import cards, panels
from engine.page.cards import Truth, text

LOOKS = Path(__file__).parents[2] / "assets" / "style.css"
GROUND = """:root{color-scheme:light dark;--border-color-primary:#8884;--block-background-fill:transparent;--neutral-50:Canvas;
--neutral-100:#8882;--neutral-500:#6b6b74;--neutral-800:#8884;--neutral-950:Canvas;--neutral-400:#a1a1aa;
--body-text-color:CanvasText}body{font:16px/1.55 Inter,ui-sans-serif,system-ui,sans-serif;max-width:920px;margin:32px auto;
padding:0 16px;background:Canvas!important;color:CanvasText}h1,h2{letter-spacing:-.02em;line-height:1.2}h2{margin-top:44px}
.s-truth,.s-answers,.s-compared,.s-thoughts,.s-slot,.s-strip,.s-lead{margin:14px 0}ol,h3{margin-bottom:0}
.js-plotly-plot :is(.xtick,.ytick,.infolayer,.colorbar,.legend) text{fill:var(--s-quiet)!important}
small{color:var(--s-quiet)}@media(prefers-color-scheme:dark){:root{--s-quiet:#a1a1aa;--s-accent:#a5b4fc;--s-accent-soft:#1e1b4b80;--s-right:#4ade80;
--s-wrong:#f87171;--s-warn:#fbbf24;--s-warn-soft:#78350f33;--s-error-soft:#7f1d1d33}}"""


def page(reply: Reply, truth: Truth | None, shown: Mapping[str, Any], layer: int) -> str:
    """shown: what stands on the page for the chosen slot and layer, HTML and figures, by name."""
    asked = reply.settings
    options = "".join(f"<li>{text(option)}</li>" for option in asked["options"])
    settings = ", ".join(f"{name} {asked[name]}" for name in ("model", "pauses", "frames", "frame_size", "reader"))
    inside = reply.inside
    parts = [
        ("What it thought", panels.THOUGHT, shown["thoughts"] + shown["words"]),
        ("Where it looked", panels.LOOKED, _drawn(shown.get("looked")) + panels.STRIP + shown.get("strip", "")),
        (
            "Does it matter?",
            panels.MATTERS,
            panels.matters(reply) + _drawn(shown.get("changed")) + panels.meanings(inside),
        ),
        ("How many thoughts?", panels.MANY, panels.many(reply) + _drawn(_by_number(reply))),
        ("Under the hood", panels.HOOD, _hood(reply, shown, layer) + shown.get("lens", "") + panels.collapsed(inside)),
    ]
    body = "".join(f"<h2>{title}</h2>{panels.lead(sentence)}{inner}" for title, sentence, inner in parts)
    told = cards.true_answer(truth, reply) if truth else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sotto: one clip, thought about in silence</title><style>{LOOKS.read_text(encoding='utf-8')}{GROUND}</style>"
        f"<script>{_plotly()}</script><h1>Sotto: one clip, thought about in silence</h1>"
        f"<p><b>{text(asked['question'])}</b></p><ol type='A'>{options}</ol><p><small>{text(settings)}</small></p>"
        f"{told}{cards.notices(reply)}{shown['answers']}{shown['compared']}{body}"
        f"<p><small>Sotto {__version__}</small></p></html>"
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _drawn(figure: Any) -> str:
    if figure is None:
        return ""
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})


def _by_number(reply: Reply) -> Any:
    fewer = reply.inside.fewer if reply.inside else ()
    return plots.by_number(fewer, [option.text for option in reply.options]) if fewer else None


def _hood(reply: Reply, shown: Mapping[str, Any], layer: int) -> str:
    named = {
        "slots": f"Slot by slot, in layer {layer}",
        "steps": "Slots against the written steps, in the same layer",
        "teacher": "Layer by layer, against the written chain's answer",
        "way": "The slots' way through the layers",
    }
    below = {"teacher": cards.teacher_note(reply)}
    drawn = {name: _drawn(shown[name]) + below.get(name, "") for name in named if shown[name] is not None}
    return "".join(f"<h3>{named[name]}</h3>{figure}" for name, figure in drawn.items())
