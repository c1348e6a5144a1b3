"""Plotly figures of the slots' hidden states. Readable on light and dark: see-through grounds, neutral ink, opaque cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.insight import similarity

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK = "#767676"
FONT = "Inter, ui-sans-serif, system-ui, sans-serif"
OPPOSITE, UNRELATED, HALF, SAME = "#e07b1a", "#e6e6ee", "#b4b1f5", "#4338ca"
MOST_NUMBERS = 10  # columns up to which a cell has room for its number


def slots(states: Tensor, layer: int) -> Figure:
    """Heatmap of slot x slot cosine in one layer; colours mean the same in every layer.

    states: [layers + 1, slots, dim], layer: 0 = embeddings.
    """
    cosine = similarity.between_slots(states)
    figure = _heatmap(cosine[layer], cosine, 1, "slot %{y}, slot %{x}", "slot", "slot")
    figure.update_xaxes(tickvals=_ticks(states.shape[1]), constrain="domain")
    figure.update_yaxes(tickvals=_ticks(states.shape[1]), constrain="domain", constraintoward="top", scaleanchor="x")
    return figure


def teacher(states: Tensor, answer: Tensor, teacher_state: Tensor) -> Figure:
    """Heatmap, layer x slot: cosine with the written chain's state at the answer.

    The last column is the silent answer's own state, which training drew to it.
    states: [layers + 1, slots, dim], answer and teacher_state: [layers + 1, dim].
    """
    count = states.shape[1]
    cosine = similarity.with_state(torch.cat([states, answer[:, None]], dim=1), teacher_state)
    figure = _heatmap(cosine, cosine, 0, "layer %{y}, slot %{x}", "slot", "layer")
    shown = [i for i in _ticks(count) if i <= count - count // 8]  # leaves room for the last column's name
    figure.update_xaxes(tickvals=[*shown, count + 1], ticktext=[*map(str, shown), "answer"])
    return figure


def _ticks(count: int) -> list[int]:
    """Slot numbers to write at an axis: each, or about eight."""
    return list(range(1, count + 1, max(1, -(-count // 8))))


def _heatmap(cosine: Tensor, every: Tensor, first_row: int, hover: str, x_title: str, y_title: str) -> Figure:
    """cosine: [rows, columns]; every: all the values that share its colours, which begin at -1 or, where none is
    negative, just below the lowest."""
    from plotly.graph_objects import Figure, Heatmap

    values, low = cosine.numpy().round(4), float(every.min()) if every.numel() else 0.0
    low = -1.0 if low < 0 else min(int(10 * low) / 10, 0.9)
    colours = [OPPOSITE, UNRELATED, HALF, SAME] if low < 0 else [UNRELATED, HALF, SAME]
    stops = [0.0, 0.5, 0.75, 1.0] if low < 0 else [0.0, 0.5, 1.0]
    rows, columns = values.shape
    trace: dict[str, Any] = {
        "z": values.tolist(), "x": list(range(1, columns + 1)), "y": list(range(first_row, first_row + rows)),
        "zmin": low, "zmax": 1, "colorscale": list(zip(stops, colours)), "xgap": int(columns <= 16), "ygap": int(rows <= 16),
        "hovertemplate": f"{hover}: %{{z:.2f}}<extra></extra>",
        "colorbar": {
            "title": {"text": "cosine", "side": "right"}, "thickness": 8, "outlinewidth": 0, "xpad": 6,
            "tickvals": [-1, 0, 1] if low < 0 else [low, 1],
        },
    }  # fmt: skip
    if columns <= MOST_NUMBERS and rows <= MOST_NUMBERS:
        said = [[f"{v:.2f}".replace("0.", ".", 1).replace("1.00", "1") for v in row] for row in values.tolist()]
        trace |= {"text": said, "texttemplate": "%{text}", "textfont": {"size": 10}}
    axis = {"showgrid": False, "zeroline": False, "fixedrange": True, "tickangle": 0, "ticks": ""}
    return Figure(
        [Heatmap(**trace)],
        {
            "template": "none", "height": 330, "margin": {"l": 40, "r": 8, "t": 8, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": INK, "size": 12, "family": FONT},
            "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}},
            "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}, "autorange": "reversed", "dtick": 1},
        },
    )  # fmt: skip
