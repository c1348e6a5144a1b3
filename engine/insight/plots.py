"""Plotly figures of the slots' hidden states. Readable on light and dark: see-through backgrounds, neutral ink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.insight import similarity

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, GRID = "#767676", "rgba(128,128,128,0.25)"
# Opposite, unrelated, the same: no cosine is lost against either background.
COLOURS = [[0.0, "#d9730d"], [0.5, "rgba(128,128,128,0.14)"], [0.75, "#a5a3f0"], [1.0, "#4338ca"]]


def layer_name(layer: int) -> str:
    return "embeddings" if layer == 0 else f"layer {layer}"


def slots(states: Tensor, layer: int) -> Figure:
    """Heatmap of slot x slot cosine in one layer. states: [layers + 1, slots, dim], layer: 0 = embeddings."""
    cosine = similarity.between_slots(states[layer : layer + 1])[0]
    names = [str(i + 1) for i in range(len(cosine))]
    figure = _heatmap(cosine, names, names, "slot %{y} and slot %{x}", "slot", "slot")
    figure.update_yaxes(scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    return figure


def teacher(states: Tensor, answer: Tensor, teacher_state: Tensor) -> Figure:
    """Heatmap, layer x slot: cosine with the written chain's state at the answer.

    The last column is the silent answer's own state, which training drew to it.
    states: [layers + 1, slots, dim], answer and teacher_state: [layers + 1, dim].
    """
    columns = torch.cat([states, answer[:, None]], dim=1)
    cosine = similarity.with_state(columns, teacher_state)
    names = [str(i + 1) for i in range(states.shape[1])] + ["answer"]
    return _heatmap(cosine, names, [str(i) for i in range(len(cosine))], "layer %{y}, %{x}", "slot", "layer")


def _heatmap(cosine: Tensor, x: list[str], y: list[str], hover: str, x_title: str, y_title: str) -> Figure:
    from plotly.graph_objects import Figure, Heatmap

    bar: dict[str, Any] = {
        "title": {"text": "cosine", "side": "right"}, "thickness": 8, "outlinewidth": 0, "tickvals": [-1, 0, 1],
        "xpad": 6,
    }  # fmt: skip
    trace = Heatmap(
        z=cosine.numpy().round(4).tolist(), x=x, y=y, zmin=-1, zmax=1, colorscale=COLOURS, colorbar=bar,
        xgap=1, ygap=1, hovertemplate=f"{hover}: %{{z:.2f}}<extra></extra>",
    )  # fmt: skip
    axis = {"showgrid": False, "zeroline": False, "type": "category", "linecolor": GRID, "fixedrange": True}
    return Figure(
        [trace],
        {
            "template": "none",
            "height": 320,
            "margin": {"l": 46, "r": 8, "t": 8, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": INK, "size": 12},
            "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}},
            "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}, "autorange": "reversed"},
        },
    )
