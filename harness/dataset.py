"""Which images, in which order: map files and the two data sets the project knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.coco import load_annotations
from harness.errors import HarnessError

_COCO_FOLDERS = {"val": "val2017", "cal": "train2017"}


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
    """

    name: str
    image_dir: Path
    map_file: Path
    annotations: Path | None


def known_dataset(name: str, split: str, build_dir: Path) -> Dataset:
    """Return the place of a data set's split.

    Parameters
    ----------
    name
        ``coco`` (downloaded to `build_dir`) or ``demo`` (shipped with the project).
    split
        ``val`` or ``cal``.
    build_dir
        The build folder. Map files and demo data lie relative to the repository root, which is
        where the commands run.

    Raises
    ------
    HarnessError
        Unknown name or split.
    """
    if split not in ("val", "cal"):
        raise HarnessError(f"unknown split {split!r}; the splits are val and cal")
    map_file = Path("data_maps") / name / f"{split}_map.txt"
    if name == "coco":
        data = build_dir / "data" / "coco"
        image_dir = data / _COCO_FOLDERS[split]
        annotations = data / "annotations" / "instances_val2017.json"
    elif name == "demo":
        data = Path("demo") / "data"
        image_dir = data / split
        annotations = data / "annotations" / "instances_val.json"
    else:
        raise HarnessError(f"unknown data set {name!r}; the data sets are coco and demo")
    return Dataset(
        name=f"{name}-{split}",
        image_dir=image_dir,
        map_file=map_file,
        annotations=annotations if split == "val" else None,
    )


def load_map(path: Path) -> tuple[str, ...]:
    """Read a map file: one image file name per line.

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
        Missing, unreadable or empty file; a blank line, a path instead of a file name, or a name
        that occurs twice. Names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise HarnessError(f"map file {path} not found; run from the repository root") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"map file {path} cannot be read: {error}") from error
    if not lines:
        raise HarnessError(f"map file {path} is empty; it needs one image file name per line")
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            raise HarnessError(f"{path}, line {number}: blank line; remove it")
        if "/" in name or "\\" in name or name in (".", ".."):
            raise HarnessError(
                f"{path}, line {number}: {name!r} is a path; a map holds bare file names"
            )
        if name in first_line:
            raise HarnessError(
                f"{path}, line {number}: {name!r} stands in line {first_line[name]} already"
            )
        first_line[name] = number
    return tuple(first_line)


def category_names(annotations: Path) -> tuple[str, ...]:
    """Return the category names; the label of a detection is its position here plus 1.

    Raises
    ------
    EngineError
        The annotation file is missing or damaged.
    """
    return tuple(str(entry["name"]) for entry in load_annotations(annotations)["categories"])
