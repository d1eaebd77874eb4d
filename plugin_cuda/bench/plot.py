"""Time per image over the batch size, from the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plugin_cuda.errors import PluginError
from plugin_cuda.files import whole

_LINES = {  # (implementation, dtype, layout): label, colour, marker
    ("torch", "float16", "NCHW"): ("PyTorch, batched_nms", "#888888", "s"),
    ("multi-pass", "float16", "NCHW"): ("multi-pass, CUDA graph", "#c44e52", "^"),
    ("nms_opt graph", "float32", "NCHW"): ("nms_opt, FP32", "#8172b3", "D"),
    ("nms_opt graph", "float16", "NCHW"): ("nms_opt, FP16", "#4c72b0", "o"),
    ("nms_opt graph", "int8", "NHWC"): ("nms_opt, INT8, NHWC", "#55a868", "v"),
}


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the document of a run to a PNG file.

    Raises
    ------
    PluginError
        When matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PluginError("plotting needs matplotlib: pip install matplotlib") from error
    loads = list(dict.fromkeys(row["load"] for row in document["rows"]))
    figure = Figure(figsize=(5.2 * len(loads), 5), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for axis, load in zip(axes, loads, strict=True):
        rows = [row for row in document["rows"] if row["load"] == load]
        _draw(axis, rows)
        axis.set_title(f"{load} an image")
        axis.set_xlabel("images in a batch")
    axes[0].set_ylabel("microseconds per image")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"SSD-ResNet34 detections from the heads, {document['gpu']}")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    for (name, dtype, layout), (label, colour, marker) in _LINES.items():
        chosen = [r for r in rows if (r["dtype"], r["layout"]) == (dtype, layout)]
        batches = [row["batch"] for row in chosen]
        times = [row["microseconds"][name] for row in chosen]
        axis.plot(
            batches, [t["per_image"] for t in times], color=colour, marker=marker, label=label
        )
        low, high = (
            [t[q] / b for t, b in zip(times, batches, strict=True)] for q in ("p10", "p90")
        )
        axis.fill_between(batches, low, high, color=colour, alpha=0.2, linewidth=0)
        if (name, dtype) == ("nms_opt graph", "float16"):
            floor = [row["floor_us"] / row["batch"] for row in chosen]
            axis.plot(
                batches, floor, color="black", linestyle="--", label="floor, FP16 heads read once"
            )
            for batch, t in zip(batches, times, strict=True):
                axis.annotate(
                    f"{t['per_image']:.3g}",
                    (batch, t["per_image"]),
                    textcoords="offset points",
                    xytext=(0, 8),
                    bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    batches = sorted({row["batch"] for row in rows})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.grid(visible=True, which="major", alpha=0.3)
