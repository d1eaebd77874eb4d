"""What a batch has to be."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import EngineError
from engine.protocol import InputSpec, check_batch

SPEC = InputSpec("image", (3, 4, 4), "int8", 0.1)


def runs(*shapes, dtype=np.int8):
    return [np.zeros(shape, dtype) for shape in shapes]


def test_images_of_all_runs_count():
    assert check_batch(runs((8, 3, 4, 4), (1, 3, 4, 4), (7, 3, 4, 4)), SPEC, 16) == 16
    assert check_batch(runs((1000, 3, 4, 4)), SPEC) == 1000


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (runs((17, 3, 4, 4)), "a batch of 17 images, the engine takes 1 to 16"),
        (runs((16, 3, 4, 4), (1, 3, 4, 4)), "a batch of 17 images"),
        (runs((1, 3, 4, 4), dtype=np.float32), "images are float32, the engine takes int8"),
        (runs((0, 3, 4, 4)), r"the shape \(0, 3, 4, 4\), the engine takes \(N >= 1, 3, 4, 4\)"),
        (runs((1, 3, 4, 5)), "the shape"),
        (runs((2, 3, 4, 4), (1, 3, 4, 5)), "the shape"),
        (runs((3, 4, 4)), "the shape"),
        ([], "a batch without images"),
    ],
)
def test_batch_that_the_engine_does_not_take(images, message):
    with pytest.raises(EngineError, match=message):
        check_batch(images, SPEC, 16)


def test_words_of_a_backend():
    with pytest.raises(EngineError, match="images are int16, the model takes int8"):
        check_batch(runs((1, 3, 4, 4), dtype=np.int16), SPEC, taker="model")
    with pytest.raises(EngineError, match=r"^a batch of 2 images, but one is all$"):
        check_batch(runs((2, 3, 4, 4)), SPEC, 1, too_large="but one is all")
