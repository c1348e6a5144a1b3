"""Plotly figures of what the slots hold and do. Readable on light and dark: see-through grounds, neutral ink, opaque cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.insight import similarity
from engine.insight.estimates import Estimate

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK = "#767676"
FONT = "Inter, ui-sans-serif, system-ui, sans-serif"
OPPOSITE, UNRELATED, HALF, SAME = "#e07b1a", "#e6e6ee", "#b4b1f5", "#4338ca"
LINES = ("#6366f1", "#e07b1a", "#0d9488", "#db2777", "#767676", "#0284c7", "#a16207", "#9333ea")
DASHES = ("solid", "dash", "dot", "dashdot")  # of lines, each once all colours are used up
NAMED = len(LINES)  # as many lines have their names in a legend
PATTERNS = ("", "/", "x", ".")  # and of bars
MOST_NUMBERS = 10  # columns up to which a cell has room for its number


def slots(states: Tensor, layer: int, chosen: int) -> Figure:
    """Heatmap of slot x slot cosine in one layer, the chosen slot's row framed; colours mean the same in every layer.

    states: [layers + 1, slots, dim], layer: 0 = embeddings, chosen: from 0.
    """
    cosine = similarity.between_slots(states)
    figure = _heatmap(cosine[layer], cosine, 1, "slot %{y}, slot %{x}", "slot", "slot")
    _frame(figure, (0.5, states.shape[1] + 0.5), (chosen + 0.5, chosen + 1.5))
    figure.update_xaxes(tickvals=_ticks(states.shape[1]), constrain="domain")
    figure.update_yaxes(tickvals=_ticks(states.shape[1]), constrain="domain", constraintoward="top", scaleanchor="x")
    return figure


def steps(states: Tensor, written: Tensor, chosen: int) -> Figure:
    """Heatmap, slot x written step: cosine of a slot's state with the one at the step's end, in one layer.

    states: [slots, dim], written: [steps, dim], chosen: the slot whose row is framed, from 0.
    """
    cosine = similarity.between(states[None], written[None])[0]
    figure = _heatmap(cosine, cosine, 1, "slot %{y}, step %{x}", "written step", "slot")
    _frame(figure, (0.5, len(written) + 0.5), (chosen + 0.5, chosen + 1.5))
    figure.update_xaxes(tickvals=_ticks(len(written)))
    return figure.update_yaxes(tickvals=_ticks(len(states)))


def teacher(states: Tensor, answer: Tensor, teacher_state: Tensor, chosen: int) -> Figure:
    """Heatmap, layer x slot: cosine with the written chain's state at the answer, the chosen slot's column framed.

    The last column is the silent answer's own state, which training drew to it.
    states: [layers + 1, slots, dim], answer and teacher_state: [layers + 1, dim], chosen: from 0.
    """
    count = states.shape[1]
    cosine = similarity.with_state(torch.cat([states, answer[:, None]], dim=1), teacher_state)
    figure = _heatmap(cosine, cosine, 0, "layer %{y}, %{customdata}", "slot", "layer")
    figure.update_traces(customdata=[_named(count)] * len(cosine))
    if count:
        _frame(figure, (chosen + 0.5, chosen + 1.5), (-0.5, len(cosine) - 0.5))
    shown = [i for i in _ticks(count) if i <= count - count // 8]  # leaves room for the last column's name
    figure.update_xaxes(tickvals=[*shown, count + 1], ticktext=[*map(str, shown), "answer"])
    return figure


def _frame(figure: Figure, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Draws a frame around the cells of the chosen slot."""
    figure.add_shape(type="rect", x0=x[0], x1=x[1], y0=y[0], y1=y[1], line={"color": OPPOSITE, "width": 2})


def _named(count: int) -> list[str]:
    """The slots in words, then the answer behind them."""
    return [*(f"slot {number}" for number in range(1, count + 1)), "answer"]


def _ticks(count: int) -> list[int]:
    """Slot numbers to write at an axis: each, or about eight."""
    return list(range(1, count + 1, max(1, -(-count // 8))))


def _heatmap(cosine: Tensor, every: Tensor, first_row: int, hover: str, x_title: str, y_title: str) -> Figure:
    """cosine: [rows, columns]; every: all the values that share its colours, which begin at -1 or, where none is
    negative, just below the lowest."""
    from plotly.graph_objects import Heatmap

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
        said = [[_short_number(v) for v in row] for row in values.tolist()]
        trace |= {"text": said, "texttemplate": "%{text}", "textfont": {"size": 10}}
    figure = _figure([Heatmap(**trace)], x_title, y_title)
    figure.update_yaxes(autorange="reversed", dtick=1)
    return figure


def _short_number(value: float) -> str:
    """A cosine in as little room as a cell has: .07, -.40, 1 (and never a negative nothing)."""
    return f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1).replace("1.00", "1")


def curves(lines: Mapping[str, Sequence[Estimate]], at: Sequence[float], x_title: str, y_title: str) -> Figure:
    """A line a name, a point a place of `at`, with 95 % intervals; whole places are written whole."""
    from plotly.graph_objects import Scatter

    traces = [
        Scatter(x=list(at), name=name, mode="lines+markers", line=line, **_interval("y", points))
        for (name, points), line in zip(lines.items(), _lines(len(lines)))
    ]
    figure = _figure(traces, x_title, y_title, grid=True)
    if all(isinstance(place, int) for place in at):
        figure.update_xaxes(tickvals=list(at[:: max(1, -(-len(at) // 14))]))
    return figure


def dots(groups: Mapping[str, Mapping[str, Estimate]], x_title: str) -> Figure:
    """A row a name within the groups, a colour a group, with 95 % intervals."""
    from plotly.graph_objects import Scatter

    traces = [
        Scatter(
            y=list(points), name=name, mode="markers", orientation="h", marker={"color": colour, "size": 9},
            **_interval("x", list(points.values())),
        )
        for (name, points), colour in zip(groups.items(), _colours(len(groups)))
    ]  # fmt: skip
    figure = _figure(traces, x_title, "", grid=True)
    rows = max(map(len, groups.values()), default=0)
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    return figure.update_layout(height=110 + 24 * rows, scattermode="group")


def cells(values: Tensor, x: Sequence[str], y: Sequence[str], x_title: str, y_title: str, unit: str) -> Figure:
    """Heatmap from 0, a name a column and a row. values: [rows, columns]."""
    from plotly.graph_objects import Heatmap

    trace = Heatmap(
        z=values.double().numpy().round(4).tolist(), x=list(x), y=list(y), zmin=0, colorscale=[UNRELATED, HALF, SAME],
        xgap=1, ygap=1, hovertemplate=f"{y_title} %{{y}}, {x_title} %{{x}}: %{{z:.3f}}<extra></extra>",
        colorbar={"title": {"text": unit, "side": "right"}, "thickness": 8, "outlinewidth": 0, "xpad": 6},
    )  # fmt: skip
    figure = _figure([trace], x_title, y_title)
    figure.update_xaxes(type="category")
    return figure.update_yaxes(type="category", autorange="reversed", automargin=True)


def looked(frames: Tensor, seconds: float, moments: Sequence[tuple[float, float]], chosen: int) -> Figure:
    """Attention of each slot, and of the answer, to the clip's moments, the true steps' beginnings marked and numbered.

    frames: [rows, slices], each `seconds` long; the last row is the answer's. moments: (start, end) of each step, or none.
    """
    from plotly.graph_objects import Heatmap

    count, slices = len(frames) - 1, frames.shape[1]
    names = [*map(str, range(1, count + 1)), "answer"]
    trace = Heatmap(
        z=frames.double().numpy().round(5).tolist(), x=[round((i + 0.5) * seconds, 4) for i in range(slices)], y=names,
        zmin=0, colorscale=[UNRELATED, HALF, SAME], xgap=1, ygap=1,
        customdata=[[name] * slices for name in _named(count)],
        hovertemplate="%{customdata}, %{x:.2f} s: %{z:.1%}<extra></extra>",
        colorbar={"title": {"text": "share of attention", "side": "right"}, "tickformat": ".0%", "thickness": 8, "outlinewidth": 0, "xpad": 6},
    )  # fmt: skip
    figure = _figure([trace], "time in the clip, s", "slot")
    figure.update_yaxes(type="category", autorange="reversed")
    for number, (start, _) in enumerate(moments):
        figure.add_vline(x=start, line={"color": OPPOSITE, "width": 1, "dash": "dot"})
        if number:
            figure.add_annotation(
                x=start, y=1, yref="paper", yanchor="bottom", xanchor="left", text=str(number + 1), showarrow=False
            )
    _frame(figure, (0, slices * seconds), (chosen - 0.5, chosen + 0.5))
    return figure.update_layout(margin={"l": 56, "r": 8, "t": 22, "b": 44})


def changed(changes: Mapping[str, Sequence[float]], options: Sequence[str], chosen: int) -> Figure:
    """The options' probabilities under each change of the slots, stacked; the row without the chosen slot is bold."""
    from plotly.graph_objects import Bar

    mine = f"without slot {chosen + 1}"
    rows = [f"<b>{name}</b>" if name == mine else name for name in changes]
    traces = [
        Bar(
            y=rows, x=[round(row[i], 5) for row in changes.values()], name=f"{chr(65 + i)} {_short(option)}",
            orientation="h", marker={"color": colour, "pattern": {"shape": PATTERNS[i // len(LINES) % len(PATTERNS)]}},
            hovertemplate="%{y}, %{fullData.name}: %{x:.1%}<extra></extra>",
        )
        for i, (option, colour) in enumerate(zip(options, _colours(len(options))))
    ]  # fmt: skip
    figure = _figure(traces, "probability", "")
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    figure.update_xaxes(range=[0, 1])
    return figure.update_layout(
        barmode="stack", legend_traceorder="normal", bargap=0.25, height=110 + 22 * len(rows), margin_t=30
    )


def by_number(fewer: Sequence[Sequence[float]], options: Sequence[str]) -> Figure:
    """The options' probabilities with the first slots only. fewer: [slots + 1][options]"""
    from plotly.graph_objects import Scatter

    traces = [
        Scatter(
            x=list(range(len(fewer))), y=[round(row[i], 5) for row in fewer], name=f"{chr(65 + i)} {_short(option)}",
            mode="lines+markers", line=line, hovertemplate="%{x} slots, %{fullData.name}: %{y:.1%}<extra></extra>",
        )
        for i, (option, line) in enumerate(zip(options, _lines(len(options))))
    ]  # fmt: skip
    figure = _figure(traces, "slots", "probability", grid=True)
    figure.update_xaxes(tickvals=[0, *_ticks(len(fewer) - 1)])
    figure.update_yaxes(range=[0, 1.02])
    return figure.update_layout(margin_t=30)


def _short(words: str) -> str:
    """As plotly takes words as they are: no markup, and not longer than a legend has room for."""
    words = words if len(words) <= 18 else words[:17] + "…"
    return words.replace("&", "&amp;").replace("<", "&lt;")


def way(states: Tensor, chosen: int) -> Figure:
    """The path of the slots' directions through the layers in the plane that shows most of it, the chosen slot's in full
    strength: of states as they are, their length would be most, and that of the last layer the final norm's.

    states: [layers + 1, slots, dim], chosen: from 0.
    """
    from plotly.graph_objects import Scatter

    points, shares = similarity.path(similarity.directions(states))
    traces = [
        Scatter(
            x=line[:, 0].tolist(), y=line[:, 1].tolist(), name=f"slot {slot}", mode="lines+markers",
            line=look | {"width": 3 if slot == chosen + 1 else 1.5}, opacity=1 if slot == chosen + 1 else 0.45,
            marker={"size": [4] * (len(line) - 1) + [9]},
            hovertemplate=f"slot {slot}, layer %{{pointNumber}}<extra></extra>",
        )
        for slot, (line, look) in enumerate(zip(points.transpose(0, 1), _lines(points.shape[1])), 1)
    ]  # fmt: skip
    first, second = (f"component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares.tolist(), 1))
    figure = _figure(traces, first, second, grid=True)
    figure.update_yaxes(automargin=True)
    return figure.update_layout(showlegend=len(traces) <= NAMED)


def _colours(count: int) -> list[str]:
    return [LINES[i % len(LINES)] for i in range(count)]


def _lines(count: int) -> list[dict[str, Any]]:
    """Looks of lines, no two of up to 32 alike."""
    return [{"color": c, "dash": DASHES[i // len(LINES) % len(DASHES)]} for i, c in enumerate(_colours(count))]


def _interval(axis: str, points: Sequence[Estimate]) -> dict[str, Any]:
    """Values along an axis with what reaches to their intervals' ends."""
    bars = {
        "type": "data", "symmetric": False, "thickness": 1, "width": 2,
        "array": [p["high"] - p["value"] for p in points], "arrayminus": [p["value"] - p["low"] for p in points],
    }  # fmt: skip
    return {axis: [p["value"] for p in points], f"error_{axis}": bars}


def _figure(traces: Sequence[Any], x_title: str, y_title: str, grid: bool = False) -> Figure:
    from plotly.graph_objects import Figure

    axis = {
        "showgrid": grid, "gridcolor": "rgba(128,128,128,.2)", "zeroline": False, "fixedrange": True, "tickangle": 0, "ticks": "",
    }  # fmt: skip
    return Figure(
        list(traces),
        {
            "template": "none", "height": 330, "margin": {"l": 48 if grid else 40, "r": 8, "t": 8, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": INK, "size": 12, "family": FONT}, "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            "xaxis": {**axis, "title": {"text": x_title, "standoff": 8}},
            "yaxis": {**axis, "title": {"text": y_title, "standoff": 8}},
        },
    )  # fmt: skip
