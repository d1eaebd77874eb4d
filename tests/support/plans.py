"""Detections of engines, and how many of two lists agree."""

from __future__ import annotations

import numpy as np

from engine.data.matching import match_detections


def detections(engine, images, batch=8):
    session = engine.session()
    found = []
    for begin in range(0, len(images), batch):
        rows, counts = session.infer(images[begin : begin + batch])
        found += [image[:count].copy() for image, count in zip(rows, counts, strict=True)]
    session.close()
    return found


def matched(first, second, min_iou):
    """Share of the detections of both sides that have a partner, and their score differences."""
    pairs = [match_detections(a, b, min_iou) for a, b in zip(first, second, strict=True)]
    total = sum(map(len, first)) + sum(map(len, second))
    assert total > 4 * len(first)  # images with detections
    both = 2 * sum(len(found.pairs) for found in pairs)
    return both / total, np.concatenate([found.score_difference for found in pairs])
