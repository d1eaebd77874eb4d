"""What `engine.bench.cudnn` found, as a picture: ``python -m engine.bench cudnn-plot JSON -o PNG``.

Left, images a second over the batch size; right, every layer of the largest batch beside its floor.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import EngineError
from engine.support.documents import read_json
from engine.support.files import write_atomically

_COLOURS = {"int8_conv": "#4c72b0", "libnms_opt": "#55a868"}
_CUDNN = "#c44e52"


def plot(
    document: Annotated[Path, typer.Argument(help="JSON of engine.bench cudnn.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file to write.")],
) -> None:
    """Draw the figures of a run to a PNG file."""
    figures = read_json(document)
    batches = {int(size): found for size, found in figures["batches"].items()}
    figure, left, right = new_figure()
    _draw_speed(left, batches, figures.get("peer"))
    _draw_layers(right, max(batches), batches[max(batches)]["layers"])
    figure.suptitle(f"INT8, cuDNN engine, {figures['manifest']['gpu']}, copies and NMS included")
    save_figure(figure, output)


def new_figure() -> tuple[Any, Any, Any]:
    """Make a figure with a smaller and a larger pair of axes; return the three.

    Raises
    ------
    EngineError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineError("plotting needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    return figure, left, right


def save_figure(figure: Any, output: Path) -> None:
    """Write a figure as PNG."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(output, picture.getbuffer())


def _draw_speed(axis: Any, batches: dict[int, dict[str, Any]], peer: dict[str, Any] | None) -> None:
    sizes = sorted(batches)
    speeds = [batches[size]["images_per_s"] for size in sizes]
    axis.plot(sizes, speeds, color=_COLOURS["int8_conv"], marker="o", label="this engine")
    for size, speed in zip(sizes, speeds, strict=True):
        share = batches[size]["share_of_peak"]
        text = f"{speed:,.0f}" if share is None else f"{speed:,.0f}\n{share:.0%}"
        axis.annotate(
            text, (size, speed), textcoords="offset points", xytext=(0, 7), ha="center", size=7
        )
    if peer is not None:
        found = sorted((int(size), one) for size, one in peer["batches"].items())
        whole = [one["images_per_s"] for _, one in found]
        alone = [1e3 * size / one["network_p50_ms"] for size, one in found]
        at = [size for size, _ in found]
        axis.plot(at, whole, color="#888888", marker="s", label="torch.compile, float16")
        axis.plot(at, alone, color="#888888", linestyle=":", label="torch.compile without NMS")
    axis.set(xscale="log", ylim=(0, 1.15 * max(speeds)), xlabel="images in a batch")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_ylabel("images a second, share of the INT8 peak")
    axis.legend(frameon=False, loc="center right")


def _draw_layers(axis: Any, batch: int, layers: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for position, layer in enumerate(layers):
        kind = next((name for name in _COLOURS if layer["kernel"].startswith(name)), "cuDNN")
        colour = _COLOURS.get(kind, _CUDNN)
        label = None if kind in seen else kind
        seen.add(kind)
        axis.bar(position, layer["ms"], color=colour, label=label)
        if layer["floor_ms"] is not None:
            axis.hlines(layer["floor_ms"], position - 0.4, position + 0.4, color="black")
    axis.hlines([], 0, 0, color="black", label="floor: operations at peak, or bytes once")
    top = 1.15 * max(layer["ms"] for layer in layers)
    axis.set(xlabel="layer", ylabel=f"milliseconds for {batch} images", ylim=(0, top))
    axis.legend(frameon=False, loc="upper center", ncols=4)
