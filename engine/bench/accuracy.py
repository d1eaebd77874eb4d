"""mAP of forms of a detector, and how sure it is: ``python -m engine.bench accuracy FP32.onnx …``.

All run in ONNX Runtime on the same images; each is held against the first by the paired bootstrap
of `engine.data.bootstrap`. The images are those of `harness preprocess`: the yardstick of
``python -m demo.make_dataset --yardstick``, to which `harness dataset add` gives a name, or others.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from engine.comparison.compare import load_truth
from engine.data.bootstrap import SAMPLES, draws, interval
from engine.data.coco import coco_evaluation
from engine.data.preprocessed import PreprocessedSet, load_preprocessed, quantize_images
from engine.load import load_engine
from engine.model import load_detector
from engine.support.environment import circumstances, now
from engine.support.files import write_json


def detect(model: Path, images: PreprocessedSet) -> NDArray[np.float32]:
    """Detections of a model in ONNX Runtime on all images of a float32 set.

    Returns
    -------
    float32 [R, 7]
        Rows as `engine.data.coco.coco_evaluation` takes them.
    """
    engine = load_engine("onnxruntime", model)
    first_label = load_detector(model).first_label
    session = engine.session()
    found = []
    for index in range(len(images.files)):
        image = images.load([index]).astype(np.float32, copy=False)
        rows, counts = session.infer(quantize_images(image, engine.input_spec))
        found.append(rows[0, : counts[0]])
        found[-1][:, 0] = index
        found[-1][:, 6] += 1 - first_label
    return np.concatenate(found)


def bench(
    models: Annotated[list[Path], typer.Argument(help="FP32 .onnx, then forms of it.")],
    *,
    val: Annotated[Path, typer.Option(help="Float32 validation images.")],
    annotations: Annotated[Path, typer.Option(help="COCO annotations of those.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write.")],
    images: Annotated[int | None, typer.Option(min=1, help="Take the first N images.")] = None,
) -> None:
    """Measure the mAP of every model and its ratio to the first one's, and write them to a file."""
    judged = load_preprocessed(val, load_detector(models[0]).input)
    judged = replace(judged, files=judged.files[:images])
    truth = load_truth(annotations, judged.files)
    document: dict[str, Any] = {
        **circumstances("numpy", "onnx", "onnxruntime"),
        "images": len(judged.files),
        "annotations": annotations.name,
        "samples": SAMPLES,
        "models": {},
    }
    reference = None
    for model in models:
        found = coco_evaluation(truth.content, truth.images, detect(model, judged))
        drawn = draws(found)
        reference = drawn if reference is None else reference
        document["models"][model.name] = {
            "calibration_method": load_detector(model).metadata.get("calibration_method"),
            "AP": round(float(found.stats[0]), 4),
            **{key: round(value, 4) for key, value in asdict(interval(reference, drawn)).items()},
        }
        typer.echo(f"{model.name}: {document['models'][model.name]}")
        write_json(output, document | {"finished": now()})
