"""Grey images, the detector that tells how grey they are, and the command that runs it."""

from __future__ import annotations

import json

import cv2
import numpy as np
import onnx
import onnx.parser

from tests.support import attempt

GREYS = [10, 40, 20, 50, 30, 60]  # image i is grey; its one object has label grey / 10
BOX = [0.25, 0.125, 0.75, 0.5]  # ymin, xmin, ymax, xmax of every object
CATEGORY_IDS = [1, 2, 4, 8, 16, 90]


def grey_detector(path):
    """ONNX: one detection at BOX, its label the grey value / 10, found again from channel 0."""
    mean, std = 0.485, 0.229  # ImageNet's, of the red channel
    fields = ", ".join(map(str, (*BOX, 0.9)))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18]>
        grey (float[batch,3,8,8] image)
            => (float[batch,1,7] detections, int32[batch] num_detections)
        <int64[2] axes = {{1, 2}}, int64 zero = {{0}}, int64 step = {{1}}, int64[1] one = {{1}},
         int64[1] five = {{5}},
         float gain = {{{std * 255 / 10}}}, float offset = {{{mean * 255 / 10}}},
         float[1,5] fields = {{{fields}}}>
        {{
            red = Gather <axis = 1> (image, zero)
            level = ReduceMean <keepdims = 0> (red, axes)
            scaled = Mul (level, gain)
            value = Add (scaled, offset)
            label = Round (value)
            column = Unsqueeze (label, one)
            batch = Shape (label)
            images = Squeeze (batch)
            numbers = Range (zero, images, step)
            index = Cast <to = 1> (numbers)
            first = Unsqueeze (index, one)
            wide = Concat <axis = 0> (batch, five)
            boxes = Expand (fields, wide)
            row = Concat <axis = 1> (first, boxes, column)
            detections = Unsqueeze (row, one)
            num_detections = ConstantOfShape <value = int32[1] {{1}}> (batch)
        }}""")
    onnx.save(model, path)


def grey_dataset(images, annotations):
    """Write an image of each grey, and their annotations; returns the images' names."""
    images.mkdir(parents=True)
    entries, objects = [], []
    for number, grey in enumerate(GREYS):
        height, width = 20 + number, 40 - number
        name = f"{number:012d}.png"
        cv2.imwrite(str(images / name), np.full((height, width, 3), grey, np.uint8))
        entries.append({"id": 1000 - number, "file_name": name, "height": height, "width": width})
        top, left, bottom, right = BOX
        box = [left * width, top * height, (right - left) * width, (bottom - top) * height]
        objects.append(
            {
                "id": number + 1,
                "image_id": 1000 - number,
                "category_id": CATEGORY_IDS[grey // 10 - 1],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
    categories = [{"id": number, "name": f"grey {number}"} for number in CATEGORY_IDS]
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(
        json.dumps({"images": entries, "annotations": objects, "categories": categories})
    )
    return [entry["file_name"] for entry in entries]


def harness(place, *arguments, **more):
    """The command that users call, in a folder of its own; it never shows a traceback."""
    environment = {"COLUMNS": "200", "BUILD_DIR": "build", **more}
    done = attempt("-m", "harness", *arguments, cwd=place, **environment)
    assert "Traceback" not in done.stderr
    return done
