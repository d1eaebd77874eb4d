"""Images of the demo set, for tests of engines on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

from tests.support import ROOT
from tests.support.calibrated import SPEC


def demo_images(count, size=400):
    """Images of the demo set, as a network takes them: float32 [count, 3, size, size]."""
    pytest.importorskip("cv2")
    from harness.data.transform import preprocess_image

    paths = sorted((ROOT / "demo" / "data" / "val").glob("*.jpg"))[:count]
    if len(paths) < count:
        pytest.skip("the demo images are not there")
    spec = replace(SPEC, shape=(3, size, size))
    images = np.empty((len(paths), *spec.shape), np.float32)
    for path, image in zip(paths, images, strict=True):
        preprocess_image(path, spec, image)
    return images
