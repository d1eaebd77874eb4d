"""What `engine.bench.plans` found: ``python -m engine.bench tensorrt-plot JSON -o PNG``.

Left, images a second over the batch size; right, every layer of the largest batch in both engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.bench.cudnn_plot import new_figure, save_figure
from engine.errors import EngineError
from engine.support.documents import read_json

_LINES = {
    "cudnn": ("engine cudnn", "#4c72b0", "o", "-"),
    "tensorrt": ("engine tensorrt", "#dd8452", "s", "-"),
    "plan": ("the plan alone, no copies", "#dd8452", "", ":"),
}


def plot(
    document: Annotated[Path, typer.Argument(help="JSON of engine.bench tensorrt.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")],
) -> None:
    """Draw the figures of a run to a PNG file."""
    figures = read_json(document)
    batches = {int(size): found for size, found in figures["batches"].items()}
    if not all("layers" in found for found in batches.values()) or not batches:
        raise EngineError(f"{document}: no times of layers; the run was cut off")
    figure, left, right = new_figure()
    _draw_speed(left, batches)
    _draw_layers(right, max(batches), batches[max(batches)]["layers"])
    version = next(iter(figures["plans"].values()))["version"]
    figure.suptitle(
        f"INT8 on one {figures['manifest']['gpu']}: engine cudnn and TensorRT {version}"
    )
    save_figure(figure, output)


def _draw_speed(axis: Any, batches: dict[int, dict[str, Any]]) -> None:
    sizes = sorted(batches)
    for key, (label, colour, marker, line) in _LINES.items():
        speeds = [batches[size][key]["images_per_s"] for size in sizes]
        axis.plot(sizes, speeds, color=colour, marker=marker, linestyle=line, label=label)
    for size in sizes:
        speed, ratio = (
            batches[size]["cudnn"]["images_per_s"],
            batches[size]["cudnn_over_tensorrt"],
        )
        place = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "size": 7}
        axis.annotate(f"{speed:,.0f}\n{ratio:.2f}x", (size, speed), **place)
    top = max(found["cudnn"]["images_per_s"] for found in batches.values())
    axis.set(xscale="log", ylim=(0, 1.2 * top), xlabel="images in a batch")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_ylabel("images a second; ratio of the two engines")
    axis.legend(frameon=False, loc="lower right")


def _draw_layers(axis: Any, batch: int, layers: list[dict[str, Any]]) -> None:
    for shift, key in ((-0.2, "cudnn"), (0.2, "tensorrt")):
        label, colour, *_ = _LINES[key]
        at = [position + shift for position in range(len(layers))]
        axis.bar(at, [layer[f"{key}_ms"] for layer in layers], 0.4, color=colour, label=label)
    for position, layer in enumerate(layers):
        if layer["floor_ms"] is not None:
            axis.hlines(layer["floor_ms"], position - 0.4, position + 0.4, color="black")
    axis.hlines([], 0, 0, color="black", label="floor: operations at peak, or bytes once")
    top = 1.15 * max(max(layer["cudnn_ms"], layer["tensorrt_ms"]) for layer in layers)
    axis.set(
        xlabel="step of engine cudnn", ylabel=f"milliseconds for {batch} images", ylim=(0, top)
    )
    axis.legend(frameon=False, loc="upper center", ncols=3)
