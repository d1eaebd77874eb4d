"""COCO mAP of a demo checkpoint in plain PyTorch: ``python -m demo.evaluate CHECKPOINT``."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer

from demo.categories import CATEGORIES
from demo.glyphs import DemoError
from export.architecture import Network
from export.checkpoint import infer_config, load_model, read_checkpoint
from export.errors import ExportError

DATA = Path(__file__).with_name("data")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet channel mean and deviation of RGB in 0..1, as torchvision's models use them."""
_BATCH = 8


def _load(path: Path, shape: tuple[int, int]) -> torch.Tensor:
    """Read and preprocess a picture as the benchmark does: float32 [3, height, width]."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DemoError(
            f"{path}: cannot read the picture; make it with python -m demo.make_dataset"
        )
    rgb = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
    resized = cv2.resize(rgb, shape[::-1], interpolation=cv2.INTER_LINEAR)
    normalised = (resized / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(normalised.astype(np.float32).transpose(2, 0, 1))


@torch.inference_mode()
def detect(model: Network, data: Path, device: torch.device) -> list[dict[str, Any]]:
    """Detections on the validation pictures, as a COCO results list."""
    images = json.loads((data / "annotations" / "instances_val.json").read_text())["images"]
    postprocess = model.postprocess().to(device)
    model.eval()
    results = []
    for start in range(0, len(images), _BATCH):
        part = images[start : start + _BATCH]
        batch = [_load(data / "val" / i["file_name"], model.config.image_shape) for i in part]
        detections, counts = postprocess(*model(torch.stack(batch).to(device)))
        for image, rows, count in zip(part, detections.cpu(), counts.tolist(), strict=True):
            for _, top, left, bottom, right, score, label in rows[:count].tolist():
                x, y = left * image["width"], top * image["height"]
                w, h = right * image["width"] - x, bottom * image["height"] - y
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": CATEGORIES[int(label) - postprocess.background].id,
                        "bbox": [x, y, w, h],
                        "score": score,
                    }
                )
    return results


def coco_map(results: list[dict[str, Any]], annotations: Path) -> dict[str, float]:
    """COCO box metrics: "mAP" (IoU 0.50:0.95), "AP50", "AP75", "APs", "APm", "APl"."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ("mAP", "AP50", "AP75", "APs", "APm", "APl")
    if not results:
        return dict.fromkeys(names, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(v) for name, v in zip(names, evaluation.stats[:6], strict=True)}


def evaluate(model: Network, data: Path, device: torch.device) -> dict[str, float]:
    """COCO metrics of a model on the validation pictures under ``data``; see `coco_map`."""
    results = detect(model, data, device)
    return coco_map(results, data / "annotations" / "instances_val.json")


app = typer.Typer(add_completion=False)


@app.command()
def command(
    checkpoint: Annotated[Path, typer.Argument(help="weights, .safetensors")],
    data: Annotated[Path, typer.Option(help="folder of the demo data set")] = DATA,
) -> None:
    """Print the COCO metrics of a checkpoint on the demo validation pictures."""
    weights = read_checkpoint(checkpoint)
    model = load_model(weights, infer_config(weights))
    for name, value in evaluate(model, data, torch.device("cpu")).items():
        print(f"{name:5} {value:.4f}")


def main() -> None:
    """Run the command; a user error becomes one line and exit code 2."""
    try:
        app()
    except (DemoError, ExportError) as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
