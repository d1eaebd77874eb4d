"""Writes the demo data set: JPEG pictures, COCO annotations and map files.

``python -m demo.make_dataset`` rewrites what the repository ships; with ``--yardstick FOLDER`` it
makes the larger set by which INT8 is judged, which the repository does not hold.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
import typer

from demo.categories import CATEGORIES
from demo.glyphs import ATLAS, Atlas, DemoError
from demo.scenes import Scene, scenes, stream

IMAGES = {"val": 120, "cal": 64}
"""Pictures per split."""
YARDSTICK = {"choose": 1000, "judge": 1000}
"""Pictures per half of the yardstick: what methods are chosen by, and what they are judged by."""
MIN_PER_CATEGORY = 5
_FIRST_ID = {"val": 1007, "cal": 500009, "choose": 1000003, "judge": 2000003}
_ID_STEP = 13  # COCO's image ids have gaps; so have these


def image_id(split: str, index: int) -> int:
    """COCO image id of picture ``index`` of a split; the file name is its twelve digits."""
    return _FIRST_ID[split] + _ID_STEP * index


def _polygons(mask: npt.NDArray[np.uint8]) -> list[list[float]]:
    """Outline a mask as COCO polygons, flat lists of x, y in pixels."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        outline = cv2.approxPolyDP(contour, 1.0, True).reshape(-1)
        if len(outline) < 6:  # a sliver: COCO's polygons have three corners or more
            x, y, w, h = cv2.boundingRect(contour)
            outline = np.array([x, y, x + w, y, x + w, y + h, x, y + h])
        polygons.append([float(v) for v in outline])
    return polygons


def _run_lengths(mask: npt.NDArray[np.uint8]) -> dict[str, list[int]]:
    """COCO's uncompressed RLE: runs down the columns, starting with a run of zeros."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"counts": [0, *runs] if flat[0] else runs, "size": list(mask.shape)}


def annotate(scene: Scene, image: int, first_id: int) -> list[dict[str, Any]]:
    """Describe a scene's objects as COCO annotations.

    Parameters
    ----------
    scene
        The scene.
    image
        COCO image id.
    first_id
        Annotation id of the first object; the others follow.

    Returns
    -------
    One dictionary per object: polygons for single objects, run lengths for crowds.
    """
    records = []
    for index, box in enumerate(scene.boxes.tolist()):
        mask = (scene.owner == index + 1).view(np.uint8)
        crowd = bool(scene.crowd[index])
        records.append(
            {
                "id": first_id + index,
                "image_id": image,
                "category_id": CATEGORIES[scene.classes[index]].id,
                "bbox": box,
                "area": float(scene.areas[index]),
                "iscrowd": int(crowd),
                "segmentation": _run_lengths(mask) if crowd else _polygons(mask),
            }
        )
    return records


def make_split(split: str, atlas: Atlas, count: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Compose the first ``count`` pictures of a split.

    Parameters
    ----------
    split
        "val", "cal", "choose" or "judge".
    atlas
        Pictures of the categories.
    count
        Number of pictures; those of a smaller count are the first of a larger one.

    Returns
    -------
    files, annotations
        File name to JPEG bytes, and the COCO annotation file's content.
    """
    generator = scenes(stream(split), atlas)
    files: dict[str, bytes] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = next(generator)
        identifier = image_id(split, index)
        name = f"{identifier:012d}.jpg"
        options = [cv2.IMWRITE_JPEG_QUALITY, scene.quality]
        files[name] = cv2.imencode(".jpg", scene.image, options)[1].tobytes()
        height, width = scene.image.shape[:2]
        images.append(
            {"id": identifier, "file_name": name, "width": width, "height": height, "license": 1}
        )
        annotations += annotate(scene, identifier, len(annotations) + 1)
    return files, {
        "info": {"description": f"SSD-ResNet34 demo data set, {split}", "version": "1.0"},
        "licenses": [
            {
                "id": 1,
                "name": "Apache License 2.0",
                "url": "https://www.apache.org/licenses/LICENSE-2.0",
            }
        ],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": c.supercategory, "id": c.id, "name": c.name} for c in CATEGORIES
        ],
    }


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream_:
        stream_.write(content)
    partial = Path(stream_.name)
    partial.chmod(0o644)
    partial.replace(path)


app = typer.Typer(add_completion=False)


@app.command()
def make_dataset(
    atlas: Annotated[Path, typer.Option(help="pictures, from python -m demo.glyphs")] = ATLAS,
    out: Annotated[Path, typer.Option("-o", "--out", help="data folder")] = Path("demo/data"),
    maps: Annotated[Path, typer.Option(help="folder of the map files")] = Path("data_maps/demo"),
    yardstick: Annotated[
        Path | None,
        typer.Option(help="folder for the two halves of the yardstick, made instead"),
    ] = None,
) -> None:
    """Write the validation and the calibration pictures, annotations and map files."""
    pictures = Atlas.load(atlas)
    if yardstick is not None:
        out, maps = yardstick, yardstick
    for split, count in (IMAGES if yardstick is None else YARDSTICK).items():
        files, annotations = make_split(split, pictures, count)
        objects = annotations["annotations"]
        if split == "val":  # shipped, so that it must do for every category
            seen = Counter(o["category_id"] for o in objects if not o["iscrowd"])
            rare = [c.name for c in CATEGORIES if seen[c.id] < MIN_PER_CATEGORY]
            if rare:
                raise DemoError(f"fewer than {MIN_PER_CATEGORY} objects of: {', '.join(rare)}")
        if split != "cal":
            text = json.dumps(annotations, separators=(",", ":"))
            _write(out / "annotations" / f"instances_{split}.json", text.encode())
        for name, content in files.items():
            _write(out / split / name, content)
        _write(maps / f"{split}_map.txt", "".join(f"{name}\n" for name in files).encode())
        size = sum(map(len, files.values())) / 1e6
        crowds = sum(o["iscrowd"] for o in objects)
        print(f"{split}: {count} pictures, {size:.2f} MB, {len(objects)} objects, {crowds} crowds")


def main() -> None:
    """Run the command; a DemoError becomes one line and exit code 2."""
    try:
        app()
    except DemoError as error:
        print(f"make_dataset: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
