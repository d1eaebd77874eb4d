r"""libnms_opt.so against its peers on one GPU: ``python -m plugin_cuda.bench -o nms.json``.

Everything is measured in one run: every batch and load, our kernels as a CUDA graph and as plain
launches, both peers, and the floor: the bytes of the heads at the bandwidth of a copy. Times are
those of single runs by CUDA events, on inputs that are not in the L2 cache.

Counters of each kernel, by Nsight Compute, on one plain run of each load at a batch size:

    ncu --set full --kernel-name 'regex:clear|filter|cut|suppress|merge' \
      python -m plugin_cuda.bench --profile 64
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from plugin_cuda.bench.environment import environment
from plugin_cuda.bench.loads import (
    DETECTORS,
    FORMS,
    SSD_RESNET34,
    Detector,
    Form,
    Golden,
    HeadSet,
    candidates,
    head_bytes,
    load_golden,
    load_priors,
    make_set,
    num_sets,
)
from plugin_cuda.bench.peers import MultiPass, agreement, retinanet_detections, torch_detections
from plugin_cuda.bench.plot import plot
from plugin_cuda.bench.timing import captured, copy_bandwidth, measure
from plugin_cuda.binding import Plan, Run
from plugin_cuda.errors import PluginError
from plugin_cuda.files import whole

GRAPH, LAUNCHES, MULTIPASS, TORCH = "nms_opt graph", "nms_opt launches", "multi-pass", "torch"
PEER_FORMS = {Form("float32", "NCHW"), Form("float16", "NCHW")}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON file to write; with --plot the PNG.")
    ] = None,
    *,
    detector: Annotated[
        Literal["ssd-resnet34", "retinanet"], typer.Option(help="Whose heads.")
    ] = "ssd-resnet34",
    golden: Annotated[
        Path,
        typer.Option(
            help="Folder of nms_1.npz, nms_3.npz and default_boxes.npz, or of retinanet/."
        ),
    ] = Path("../shared/golden"),
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw this JSON file; measure nothing.")
    ] = None,
    profile: Annotated[
        int | None, typer.Option(min=1, help="Run our kernels at this batch, for a profiler.")
    ] = None,
) -> None:
    """Measure NMS_OPT_TRT on this GPU."""
    if profile is not None:
        _profile(golden, DETECTORS[detector], profile)
        return
    if output is None:
        raise PluginError("-o FILE says where the figures go")
    if not output.parent.is_dir():
        raise PluginError(f"{output.parent}: no such folder")
    if plot_file is not None:
        try:
            document = json.loads(plot_file.read_text())
        except (OSError, ValueError) as error:
            raise PluginError(f"{plot_file}: not the JSON of a run: {error}") from error
        plot(document, output)
        return
    _check_gpu()
    heads = DETECTORS[detector]
    priors = load_priors(golden, heads)
    bandwidth = copy_bandwidth()
    rows = []
    for load in heads.cases:
        image = load_golden(golden, heads, load)
        for form in FORMS:
            for batch in heads.batches:
                row = {"load": load, "candidates": candidates(image)}
                row |= _measure(image, form, batch, priors, bandwidth)
                rows.append(row)
                typer.echo(_line(row))
    document = environment() | {
        "detector": detector,
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
    }
    with whole(output) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")


def _check_gpu() -> None:
    try:
        import cupy  # noqa: F401
        import torch
        import torchvision  # noqa: F401
    except ImportError as error:
        raise PluginError(f"the benchmark needs torch, torchvision and cupy: {error}") from error
    if not torch.cuda.is_available():
        raise PluginError("the benchmark needs a GPU; PyTorch finds none")


def _bind(plan: Plan) -> tuple[Run, Any]:
    """Bind a plan to outputs and a workspace of its own; return the detections, too."""
    import torch

    rows = torch.empty((plan.batch, plan.config.keep_top_k, 7), device="cuda")
    count = torch.empty(plan.batch, dtype=torch.int32, device="cuda")
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="cuda")
    return plan.bind(rows, count, workspace), rows


def _launch(run: Run) -> None:
    """Enqueue a run on torch's current stream, in a capture that which is captured."""
    import torch

    run(torch.cuda.current_stream().cuda_stream)


def _measure(
    image: Golden, form: Form, batch: int, priors: Any, bandwidth: float
) -> dict[str, Any]:
    """Measure everything on one load, form and batch."""
    import torch

    detector = image.detector
    number = num_sets(detector, form, batch)
    sets = [make_set(image, form, batch, seed) for seed in range(number)]
    plans = [heads.plan(priors) for heads in sets]
    bound = [_bind(plan) for plan in plans]

    launches = [partial(_launch, run) for run, _ in bound]
    for call in launches:
        call()
    torch.cuda.synchronize()
    pool = _graph_pool()
    found = {
        GRAPH: measure([captured(call, pool) for call in launches], seconds=0.25),
        LAUNCHES: measure(launches, seconds=0.25),
    }
    checks = {}
    if form in PEER_FORMS:
        in_torch = retinanet_detections
        if detector is SSD_RESNET34:
            in_torch = torch_detections
            found[MULTIPASS], checks[MULTIPASS] = _multi_pass(sets, priors, bound[0][1])
        found[TORCH] = measure(
            [partial(in_torch, heads, priors) for heads in sets], seconds=0.4, ahead=False
        )
        checks[TORCH] = agreement(bound[0][1], in_torch(sets[0], priors))
    size = head_bytes(detector, form, batch)
    floor = 1e6 * size / bandwidth
    ours = found[GRAPH].median
    return {
        "batch": batch,
        "dtype": form.dtype,
        "layout": form.layout,
        "sets": len(sets),
        "head_bytes": size,
        "workspace_bytes": plans[0].workspace_bytes,
        "floor_us": floor,
        "microseconds": {
            name: asdict(times)
            | {"per_image": times.median / batch, "over_floor": times.median / floor}
            for name, times in found.items()
        },
        "peer_over_ours": {name: found[name].median / ours for name in checks},
        "rows_that_agree": checks,
    }


def _graph_pool() -> Any:
    """Memory that graphs share which never run at the same time."""
    import torch

    cuda: Any = torch.cuda  # it has no types
    return cuda.graph_pool_handle()


def _multi_pass(sets: list[HeadSet], priors: Any, ours: Any) -> tuple[Any, float]:
    """Time the multi-pass peer as a CUDA graph, and compare its rows on the first set with ours."""
    import torch

    peers = [MultiPass(heads, priors) for heads in sets]
    for _ in range(2):
        peers[0].run()
    torch.cuda.synchronize()
    rows = [image[image[:, 6] >= 0, 1:] for image in peers[0].detections]
    share = agreement(ours, rows)
    pool = _graph_pool()
    return measure([captured(peer.run, pool) for peer in peers], seconds=0.25), share


def _line(row: dict[str, Any]) -> str:
    """One row as text."""
    times = "  ".join(f"{name} {t['median']:.1f}" for name, t in row["microseconds"].items())
    return (
        f"{row['load']}, {row['dtype']} {row['layout']}, batch {row['batch']}: floor "
        f"{row['floor_us']:.1f}  {times} us; agreement {row['rows_that_agree']}"
    )


def _profile(golden: Path, detector: Detector, batch: int) -> None:
    """One plain run of each load and form."""
    import torch

    _check_gpu()
    priors = load_priors(golden, detector)
    for load in detector.cases:
        for form in FORMS:
            heads = make_set(load_golden(golden, detector, load), form, batch, 0)
            run, _ = _bind(heads.plan(priors))
            _launch(run)
            torch.cuda.synchronize()


def main() -> None:
    """Run the command; a user error is one line and exit code 2."""
    try:
        app()
    except PluginError as error:
        typer.echo(f"nms-bench: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
