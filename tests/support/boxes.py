"""The IoU of boxes, written out."""

from engine.data.matching import MARGIN


def iou(a, b):
    a, b = ((box[0] - MARGIN, box[1] - MARGIN, box[2] + MARGIN, box[3] + MARGIN) for box in (a, b))
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    common = max(height, 0) * max(width, 0)
    return common / (sum((y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in (a, b)) - common)
