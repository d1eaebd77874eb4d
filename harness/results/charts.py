"""The charts of a page, by Plotly, as pieces of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from harness.results.latencies import Latencies
from harness.results.review import ClassReview

_COLOURS = ("#3b82c4", "#e07b39", "#2a9d6f", "#b565c7", "#b8941f", "#d1495b", "#4aa3a3", "#8a8a8a")
"""Told apart on white and on black."""

_RECALLS = [number / 100 for number in range(101)]


def latency_histogram(runs: Mapping[str, Latencies]) -> str:
    """Share of a run's latencies in each bin; runs by their names."""
    traces = [
        _line(name, number, run.edges_ms, [*_shares(run), 0.0], shape="hv", fill="tozeroy")
        for number, (name, run) in enumerate(runs.items())
    ]
    return _html("latency_histogram", traces, "latency (ms)", "share (%)", xaxis={"type": "log"})


def _shares(run: Latencies) -> list[float]:
    total = sum(run.counts) or 1
    return [round(100 * count / total, 4) for count in run.counts]


def latency_over_time(runs: Mapping[str, Latencies]) -> str:
    """Median, 99th percentile and maximum of what was done in each span of time."""
    traces: list[dict[str, Any]] = []
    for number, (name, run) in enumerate(runs.items()):
        quiet = {"showlegend": False, "legendgroup": name}
        dots = {"mode": "markers", "marker": {"size": 4, "opacity": 0.7}}
        traces += [
            {**_line(name, number, run.seconds, run.p50_ms), "legendgroup": name},
            {**_line(name, number, run.seconds, run.p99_ms, dash="dot"), **quiet},
            {**_line(name, number, run.seconds, run.max_ms), **quiet, **dots},
        ]
    return _html(
        "latency_over_time",
        traces,
        "time since the first query (s)",
        "latency (ms)",
        yaxis={"type": "log"},
    )


def class_bars(runs: Mapping[str, Sequence[ClassReview]]) -> str:
    """AP of each class."""
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _text(name),
            "y": [_text(one.name) for one in classes],
            "x": [round(one.ap, 4) for one in classes],
            "customdata": [[one.truths, round(one.ap50, 4)] for one in classes],
            "hovertemplate": "%{y}: AP %{x}, AP50 %{customdata[1]}, %{customdata[0]} objects",
            "marker": {"color": _COLOURS[number % len(_COLOURS)]},
        }
        for number, (name, classes) in enumerate(runs.items())
    ]
    most = max((len(classes) for classes in runs.values()), default=0)
    yaxis = {"autorange": "reversed", "dtick": 1, "type": "category"}
    height = 150 + most * (10 + 6 * len(runs))
    return _html(
        "class_bars", traces, "AP", "", yaxis=yaxis, xaxis={"range": [0, 1]}, height=height
    )


def precision_recall(runs: Mapping[str, Sequence[ClassReview]]) -> str:
    """Precision over recall at IoU 0.50: the mean of the classes, or one to be chosen."""
    names = list(dict.fromkeys(one.name for classes in runs.values() for one in classes))
    traces: list[dict[str, Any]] = []
    shown: list[str | None] = []  # the class of each trace; None: the mean
    for number, (run, classes) in enumerate(runs.items()):
        means = np.mean([one.precision for one in classes], axis=0).round(4).tolist()
        for name, precision in [(None, means), *((one.name, one.precision) for one in classes)]:
            line = _line(run, number, _RECALLS, precision)
            traces.append({**line, "visible": name is None})
            shown.append(name)
    buttons = [
        {
            "label": "mean of all classes" if name is None else _text(name),
            "method": "restyle",
            "args": ["visible", [one == name for one in shown]],
        }
        for name in (None, *names)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    fixed = {"range": [0, 1.02]}
    return _html(
        "precision_recall",
        traces,
        "recall",
        "precision",
        xaxis=fixed,
        yaxis=fixed,
        updatemenus=[menu],
    )


def _text(name: str) -> str:
    """A name as it is: Plotly takes some of HTML, and the entities of its brackets."""
    return escape(name, quote=False)


def _line(
    name: str, number: int, x: Sequence[float], y: Sequence[float], fill: str = "none", **line: str
) -> dict[str, Any]:
    colour = _COLOURS[number % len(_COLOURS)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _text(name),
        "x": list(x),
        "y": list(y),
        "fill": fill,
        "line": {"color": colour, "width": 1.5, **line},
    }


def _html(
    name: str,
    traces: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
    height: int = 320,
    **layout: Any,
) -> str:
    """One figure, without Plotly itself; its JSON has no character that HTML knows."""
    from plotly.io import to_html

    common = {"automargin": True, "gridcolor": "rgba(128,128,128,0.3)", "zeroline": False}
    figure = {
        "data": list(traces),
        "layout": {
            "xaxis": {"title": {"text": x}, **common, **(xaxis or {})},
            "yaxis": {"title": {"text": y}, **common, **(yaxis or {})},
            "height": height + 20 * len({trace["name"] for trace in traces}),
            "margin": {"l": 10, "r": 10, "t": 30, "b": 10},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "showlegend": True,
            "legend": {"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
            **layout,
        },
    }
    html: str = to_html(
        figure,
        config={"displayModeBar": False, "responsive": True},
        include_plotlyjs=False,
        full_html=False,
        validate=False,
        div_id=name,
    )
    return html
