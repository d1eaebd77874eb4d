"""Which images, in which order: map files, and where the images of a data set lie."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from engine.data.coco import load_annotations, positions_by_name
from engine.protocol import InputSpec
from harness.benchmarks import DEFAULT
from harness.errors import HarnessError

MAPS = Path("data_maps")
"""Folder of the map files, one folder per data set; relative to where the commands run."""

SHIPPED = Path(__file__).with_name("shipped")
"""What is looked for here where the folder of the commands does not have it."""


@dataclass(frozen=True)
class _Place:
    """Where a data set's images and annotations lie, below its own folder, and their input.

    `remedy` is for messages: what to do where they are not there.
    """

    val: str = "val"
    cal: str = "cal"
    annotations: str = "instances_val.json"
    image_size: int = 1200
    root: Path | None = None  # None: its folder in data/ of the build folder
    first_label: int = 1
    remedy: str = ""
    made_map: str | None = None  # split whose map the download makes, in the data set's folder


_PLACES = {
    "coco": _Place(
        "val2017",
        "train2017",
        "instances_val2017.json",
        remedy="`harness download data` fetches it",
    ),
    "demo": _Place(
        image_size=400,
        root=Path("demo") / "data",
        remedy="it is in the project's folder: work there",
    ),
    # as MLPerf Inference's openimages.py and openimages_calibration.py leave it
    "openimages": _Place(
        *("validation/data", "calibration/data", "openimages-mlperf.json"),
        image_size=800,
        first_label=0,
        remedy="`harness download data --benchmark retinanet` fetches it",
        made_map="val",
    ),
}
"""Those of the benchmarks; all others are as the fields' own values say."""

BENCHMARK_SETS = tuple(_PLACES)


@dataclass(frozen=True)
class Dataset:
    """One split of a data set.

    Attributes
    ----------
    name
        ``<data set>-<split>``, for instance ``coco-val``.
    image_dir
        Folder that holds the images of the map.
    map_file
        One file name per line; the line order is the sample order.
    annotations
        COCO instances JSON; None for a split without ground truth.
    image_size
        Height and width of the network input that the data set is meant for.
    first_label
        Label of the first category in a log that does not say: 0, as that of RetinaNet, or 1.
    remedy
        What to do where its map or images are not there, for messages.
    """

    name: str
    image_dir: Path
    map_file: Path
    annotations: Path | None
    image_size: int = _Place.image_size
    first_label: int = _Place.first_label
    remedy: str = "restore them"


def known_dataset(name: str, split: str, build_dir: Path) -> Dataset:
    """Return the place of a data set's split.

    Parameters
    ----------
    name
        ``coco`` or ``openimages`` (downloaded to ``data/NAME`` in `build_dir`; the map of Open
        Images' validation split is made there), ``demo`` (in the project's folder), or any other
        with map files in ``data_maps/<name>``, as `harness dataset add` makes them: its images lie
        in ``data/<name>/val`` and ``data/<name>/cal`` of `build_dir`, its annotations in
        ``data/<name>/annotations/instances_val.json``.
    split
        ``val`` or ``cal``.
    build_dir
        The build folder. Map files and demo data lie relative to where the commands run, and maps
        in the package, too, those of the commands' folder first.

    Raises
    ------
    HarnessError
        Unknown name or split.
    """
    if split not in ("val", "cal"):
        raise HarnessError(f"unknown split {split!r}; the splits are val and cal")
    if name not in _PLACES and name not in (there := known_names()):
        raise HarnessError(
            f"unknown data set {name!r}; `harness dataset add` makes one of your images; there "
            f"are: {', '.join(there)}"
        )
    place = _PLACES.get(name, _Place())
    root = place.root or build_dir / "data" / name
    return Dataset(
        name=f"{name}-{split}",
        image_dir=root / (place.val if split == "val" else place.cal),
        map_file=_map_file(root if split == place.made_map else MAPS / name, split),
        annotations=root / "annotations" / place.annotations if split == "val" else None,
        image_size=place.image_size,
        first_label=place.first_label,
        remedy=_remedy(name, split, root),
    )


def assumed(name: str) -> str:
    """Say of the data set that is taken where none is named that it is; empty for others."""
    if name != DEFAULT.dataset:
        return ""
    others = ", ".join(one for one in known_names() if one != name)
    return f"{name} is what is taken without --dataset NAME, others are: {others}"


def _remedy(name: str, split: str, data: Path) -> str:
    """What makes a data set whole, or which other one could be meant."""
    if place := _PLACES.get(name):
        return "; ".join(filter(None, (place.remedy, assumed(name))))
    if split == "val":
        links = "--images DIR --annotations FILE"
    else:
        annotations = data / "annotations" / "instances_val.json"
        links = f"{_as_added(data / 'val', annotations)} --calibration-images DIR"
    add = f"`harness dataset add {name} {links} --force` adds them"
    without = f"; without INT8: `harness preprocess MODEL --dataset {name} --val_only`"
    return add + without if split == "cal" else add


def _as_added(images: Path, annotations: Path) -> str:
    """Options that add what the links of a data set point to, so that they can be copied."""
    places = (("--images", images, "DIR"), ("--annotations", annotations, "FILE"))
    return " ".join(
        f"{option} {shlex.quote(str(link.resolve())) if link.exists() else word}"
        for option, link, word in places
    )


def again_with_model(dataset: Dataset, model: Path) -> str:
    """Command that adds a validation split, again, with its categories in a model's order.

    One of a benchmark stays as it is, and is added under a name to choose.
    """
    name, annotations = dataset.name.rpartition("-")[0], dataset.annotations
    options = _as_added(dataset.image_dir, annotations or Path())
    if name in _PLACES:
        return f"harness dataset add NAME {options} --model {shlex.quote(str(model))}"
    if (cal := dataset.image_dir.with_name("cal")).exists():
        options += f" --calibration-images {shlex.quote(str(cal.resolve()))}"
    return f"harness dataset add {name} {options} --model {shlex.quote(str(model))} --force"


def check_map(dataset: Dataset) -> tuple[str, ...]:
    """Names of a data set's images; see `load_map`.

    Raises
    ------
    HarnessError
        It has none of this split, or a map that is damaged.
    """
    if dataset.map_file.exists():
        return load_map(dataset.map_file)
    name, _, split = dataset.name.rpartition("-")
    what = "calibration images, which INT8 needs" if split == "cal" else "validation images"
    raise HarnessError(
        f"data set {name} has no {what} (map file {dataset.map_file} not found); {dataset.remedy}"
    )


def check_images(dataset: Dataset) -> None:
    """Make sure that a data set has images before something is made for them.

    Raises
    ------
    HarnessError
        No map, no image folder, or a folder that has not one of the images; says where they are, if
        in another folder near it.
    """
    names = check_map(dataset)
    data_set = f"of the data set {dataset.name.rpartition('-')[0] or dataset.name}"
    if not dataset.image_dir.is_dir():
        raise HarnessError(
            f"image folder {dataset.image_dir} {data_set} not found; {dataset.remedy}"
        )
    if not any((dataset.image_dir / name).exists() for name in names):
        found = where_else(dataset.image_dir, names)
        raise HarnessError(
            f"image folder {dataset.image_dir} {data_set} has none of its {len(names)} images, the "
            f"first is {names[0]}; {found or dataset.remedy}"
        )


def where_else(folder: Path, missing: Sequence[str]) -> str:
    """Say where images lie that are not where their names say; empty: nowhere near.

    Looked at are the sub-folders of `folder`, and `folder` itself for names with sub-folders.
    """
    wanted: dict[str, list[str]] = {}
    for name in missing:
        wanted.setdefault(name.rpartition("/")[2], []).append(name)
    below = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.name in wanted and path.is_file()
    ]
    found: dict[str, str] = {}
    for place in below:
        alike = wanted[place.rpartition("/")[2]]
        whole = [name for name in alike if place.endswith(f"/{name}")]
        if whole or len(alike) == 1:
            found.setdefault((whole or alike)[0], place)
    if not found:
        return ""
    name, place = next(iter(found.items()))
    said = f"{len(found)} of them are found elsewhere in that folder, {name} as {place}"
    inner = {place.removesuffix(name) for name, place in found.items()}
    if len(inner) == 1 and (one := inner.pop()).endswith("/"):
        return f"{said}: move them up, or take {folder / one} as the image folder"
    return f"{said}: move them, or write their folders into the names in annotations and map"


def known_names() -> list[str]:
    """Names of the data sets with maps, sorted."""
    return sorted({path.name for maps in (MAPS, SHIPPED / MAPS) for path in maps.glob("*/")})


def _map_file(folder: Path, split: str) -> Path:
    own = folder / f"{split}_map.txt"
    shipped = SHIPPED / own
    return shipped if shipped.exists() and not own.exists() else own


def preprocessed_dir(build_dir: Path, dataset: Dataset, spec: InputSpec) -> Path:
    """Where the preprocessed images of a data set for an engine's input lie by default."""
    _, height, width = spec.shape
    return build_dir / "preprocessed_data" / dataset.name / f"{spec.dtype}_{height}x{width}"


def check_annotated(dataset: Dataset) -> None:
    """Make sure that the annotations, where there are any, know every image of the map.

    Raises
    ------
    EngineError
        The annotation file is damaged.
    HarnessError
        An image of the map is not in it.
    """
    if dataset.annotations is None or not dataset.annotations.exists():
        return
    images = load_annotations(dataset.annotations)["images"]
    known = positions_by_name(images, dataset.annotations)
    missing = [name for name in check_map(dataset) if name not in known]
    if missing:
        raise HarnessError(
            f"{dataset.annotations} lacks {len(missing)} images of {dataset.map_file}, the first "
            f"is {missing[0]}; a map and its annotations belong together"
        )


def load_map(path: Path) -> tuple[str, ...]:
    """Read a map file: one image file name per line, perhaps in a sub-folder.

    Parameters
    ----------
    path
        UTF-8 text file.

    Returns
    -------
    tuple of str
        File names in line order, which is the order of sample indices.

    Raises
    ------
    HarnessError
        Missing, unreadable or empty file; a blank line, a name that leads out of the image folder,
        or one that occurs twice. Names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a mark
    except FileNotFoundError:
        raise HarnessError(
            f"map file {path} not found; `harness dataset add` writes the maps of your images, "
            "`harness download data` those of a benchmark that are not shipped"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"map file {path} cannot be read: {error}") from error
    # not splitlines(): U+2028, NEL and others may stand in a file name
    lines = text.removesuffix("\n").split("\n")
    if not text:
        raise HarnessError(f"map file {path} is empty; it needs one image file name per line")
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip(" \t\r")
        if not name:
            raise HarnessError(f"{path}, line {number}: blank line; remove it")
        check_image_name(name, f"{path}, line {number}")
        if name in first_line:
            raise HarnessError(
                f"{path}, line {number}: {name!r} stands in line {first_line[name]} already"
            )
        first_line[name] = number
    return tuple(first_line)


def check_image_name(name: str, where: str) -> None:
    """Make sure that an image's name, with ``/`` between its parts, stays in the image folder.

    Raises
    ------
    HarnessError
        It does not, is empty, or has control characters.
    """
    control = any(unicodedata.category(character) == "Cc" for character in name)
    if control or any(part in ("", ".", "..") for part in name.split("/")):
        raise HarnessError(
            f"{where}: {name!a} is no name of an image; names are relative to the image folder, "
            "without '..'"
        )
    if "\\" in name or PureWindowsPath(name).drive:
        raise HarnessError(f"{where}: {name!a} is a path of Windows; write / between folders")


def category_names(annotations: Path) -> tuple[str, ...]:
    """Return the category names; the label of a detection is its position here plus 1.

    Raises
    ------
    EngineError
        The annotation file is missing or damaged.
    """
    return tuple(str(entry["name"]) for entry in load_annotations(annotations)["categories"])
