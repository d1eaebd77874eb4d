"""A page for every run: one HTML file each, which needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import numpy as np

from engine.data.coco import STATS
from engine.errors import EngineError
from engine.protocol import first_label
from engine.support.files import write_atomically
from harness.data.dataset import Dataset, known_dataset, load_map
from harness.data.transform import BadImageError, decode, read_image
from harness.errors import HarnessError
from harness.loadgen.log import ACCURACY
from harness.results import charts
from harness.results.accuracy import evaluation_of
from harness.results.compare import facts, per_cent
from harness.results.latencies import read_latencies
from harness.results.layers import read_layers
from harness.results.pictures import SCORE_THRESHOLD, draw_boxes, enlarged, to_jpeg
from harness.results.report import INDEX, OURS, Runs, as_text, facts_of, root_of
from harness.results.result import RESULT, RunResult, read_result
from harness.results.review import WORST, ClassReview, ImageReview, Review, review
from harness.results.run import SAMPLES

PAGE = "report.html"

_PICTURES = 24  # on a page: some 5 MB
_LONG_SIDE = 800
_RED, _AMBER, _GREEN = (77, 72, 229), (36, 165, 245), (88, 167, 70)  # BGR; the page's key has them
_LAYERS = 40  # of an engine: those that take most
_COMPARED = ("mAP", "AP50", "samples/s", "p50 ms", "p90 ms", "p99 ms")


@dataclass(frozen=True)
class _Run:
    """A run as the page shows it: its cells in the table, and how they changed."""

    number: int
    directory: Path
    result: RunResult
    cells: Mapping[str, str]
    changes: Mapping[str, str]

    @property
    def name(self) -> str:
        """What charts call it."""
        return f"{self.number} {self.cells['run']} {self.result.scenario}"

    @property
    def label(self) -> str:
        """What the rest of the page calls it."""
        return f"{self.name} {self.result.mode}"

    @property
    def stats(self) -> Mapping[str, float]:
        """COCOeval's numbers; none where nothing was evaluated."""
        found = (self.result.accuracy or {}).get("stats")
        return found if isinstance(found, Mapping) else {}

    @property
    def latencies(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """What the percentiles are of, and they."""
        if self.result.latency_ms:
            yield "query", self.result.latency_ms
        if self.result.batch_latency_ms:
            yield "batch", self.result.batch_latency_ms


@dataclass(frozen=True)
class _Picture:
    id: str
    review: ImageReview
    data: str | None


def render_page(
    runs: Runs, build_dir: Path, reviews: Mapping[Path, Review] = MappingProxyType({})
) -> str:
    """Make the page of one or more runs.

    Parameters
    ----------
    runs
        Not none.
    build_dir
        The build folder, in which the images of the data sets lie.
    reviews
        What is known of accuracy runs, by their folders; others are evaluated again.

    Raises
    ------
    HarnessError
        When a file of a run cannot be read, or a package is missing.
    """
    try:
        template = _template("report.html")
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise HarnessError(f"a page needs {error.name}: pip install {error.name}") from error
    shown = _shown(runs)
    latencies = {run.name: read_latencies(run.directory) for run in shown}
    known = {name: found for name, found in latencies.items() if found is not None}
    accuracies = [run for run in shown if run.stats]
    classes: dict[str, Sequence[ClassReview]] = {}
    worst: list[tuple[_Run, list[_Picture]]] = []
    notes: list[str] = []
    share = min(WORST, max(1, _PICTURES // max(1, len(accuracies))))
    for number, run in enumerate(accuracies):
        try:
            data = _dataset(run, build_dir)
            found = reviews.get(run.directory) or _review(run, data)
        except (HarnessError, EngineError) as error:
            notes.append(f"{run.label}: no classes and no images: {error}")
            continue
        if abs(run.stats.get("AP", -2.0) - found.ap) > 1e-6:
            notes.append(f"{run.label}: the annotations are others now than when it ran")
        if found.classes:
            classes[run.name] = found.classes
        if number >= _PICTURES:
            continue
        worst.append((run, list(_pictures(f"r{number}", found.worst[:share], data.image_dir))))
    names = list(dict.fromkeys(str(run.cells["run"]) for run in shown))
    html: str = template.render(
        title=f"{'Runs' if len(names) > 1 else 'Run'} {', '.join(names)}",
        columns=list(shown[0].cells),
        runs=shown,
        compared=any(change for run in shown for change in run.changes.values()),
        percentiles=list(
            dict.fromkeys(key for run in shown for _, values in run.latencies for key in values)
        ),
        plotly=_trusted(get_plotlyjs()) if known or classes else None,
        histogram=_trusted(charts.latency_histogram(known)) if known else None,
        over_time=_trusted(charts.latency_over_time(known)) if known else None,
        layers=_layers(shown),
        shown_layers=_LAYERS,
        accuracies=accuracies,
        stats=STATS,
        notes=notes,
        curves=_trusted(charts.precision_recall(classes)) if classes else None,
        bars=_trusted(charts.class_bars(classes)) if classes else None,
        worst=worst,
        threshold=SCORE_THRESHOLD,
        facts_all=facts(runs),
    )
    return html


def write_index(logs: Path) -> None:
    """Write the list of all runs in a folder, newest first, with links to their pages.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    found: list[tuple[Path, RunResult]] = []
    unreadable: list[str] = []
    for path in sorted(logs.rglob(RESULT)):
        if not path.parent.name.endswith(".partial"):
            try:
                found.append((path.parent, read_result(path)))
            except HarnessError as error:
                unreadable.append(str(error))
    found.sort(key=lambda run: run[1].finished, reverse=True)
    rows = []
    for run in _shown(found):
        page = root_of(run.directory, run.result) / PAGE
        there = page.exists() and page.is_relative_to(logs.resolve())
        link = quote(page.relative_to(logs.resolve()).as_posix()) if there else None
        rows.append((run.cells, link))
    html = _template("index.html").render(
        columns=list(rows[0][0]) if rows else [], runs=rows, unreadable=unreadable
    )
    write_atomically(logs / INDEX, html.encode())


def _trusted(html: str) -> Any:
    """HTML that is not escaped again: Plotly's own."""
    from markupsafe import Markup

    return Markup(html)  # noqa: S704


def _template(name: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("harness.results")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.globals["ours"] = _trusted(OURS)
    return environment.get_template(name)


def _shown(runs: Runs) -> list[_Run]:
    shown: list[_Run] = []
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for number, (directory, result) in enumerate(runs, start=1):
        found = facts_of(directory, result)
        before = first.setdefault((result.scenario, result.mode), found)
        # a run is told by its model, which as the twelfth column is out of most windows
        names = dict.fromkeys(["run", "model", *found])
        cells = {name: as_text(name, found[name]) for name in names}
        changes = {name: _change(before[name], found[name]) for name in _COMPARED}
        changed = {name: changes.get(name, "") for name in found}
        shown.append(_Run(number, directory, result, cells, changed))
    return shown


def _change(before: Any, after: Any) -> str:
    """Change against another run, in per cent; empty for none."""
    if before is after or not all(isinstance(one, float) for one in (before, after)):
        return ""
    return per_cent(before, after)


@dataclass(frozen=True)
class _LayerTable:
    runs: Sequence[tuple[_Run, int, float]]
    rows: Sequence[tuple[str, Sequence[float | None]]]


def _layers(runs: Sequence[_Run]) -> _LayerTable | None:
    """Layers of the runs that have them, the slowest first; with each run its batch and sum."""
    found = [(run, layers) for run in runs if (layers := read_layers(run.directory)) is not None]
    if not found:
        return None
    names = dict.fromkeys(name for _, layers in found for name in layers.ms)
    rows = [(name, [layers.ms.get(name) for _, layers in found]) for name in names]
    rows.sort(key=lambda row: -max(ms or 0.0 for ms in row[1]))
    return _LayerTable([(run, one.batch, sum(one.ms.values())) for run, one in found], rows)


def _dataset(run: _Run, build_dir: Path) -> Dataset:
    name, _, split = str(run.result.dataset.get("name")).rpartition("-")
    return known_dataset(name, split, build_dir)


def _review(run: _Run, data: Dataset) -> Review:
    if data.annotations is None:
        raise HarnessError(f"{data.name} has no annotations")
    files = load_map(run.directory / SAMPLES)
    return review(
        evaluation_of(
            run.directory / ACCURACY, data.annotations, files, first_label(run.result.engine)
        )
    )


def _pictures(prefix: str, reviews: Sequence[ImageReview], image_dir: Path) -> Iterator[_Picture]:
    for number, one in enumerate(reviews):
        if one.errors:
            yield _Picture(f"{prefix}-{number}", one, _drawn(one, image_dir))


def _drawn(image: ImageReview, image_dir: Path) -> str | None:
    """The image with what is wrong, as a data URL; None when it cannot be read."""
    import cv2

    try:
        picture = enlarged(decode(read_image(image_dir / image.file)[0]))
    except BadImageError:
        return None
    height, width = picture.shape[:2]
    if (factor := _LONG_SIDE / max(height, width)) < 1:
        size = max(1, round(factor * width)), max(1, round(factor * height))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    draw_boxes(picture, [("", box) for _, box in image.right], _GREEN)
    draw_boxes(picture, image.missed, _RED)
    draw_boxes(picture, image.false, _AMBER)
    return f"data:image/jpeg;base64,{base64.b64encode(to_jpeg(picture)).decode()}"
