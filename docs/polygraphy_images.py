"""Images with detections for ``polygraphy run --data-loader-script docs/polygraphy_images.py``.

Four of the first float32 set that ``harness preprocess`` has left in the build folder.
"""

import os
from pathlib import Path

import numpy as np


def load_data():
    """Yield the feed of each image."""
    build = Path(os.environ.get("BUILD_DIR", "build"))
    folder = sorted((build / "preprocessed_data").glob("*-val/float32_*"))[0]
    for path in sorted(folder.glob("*.npy"))[:4]:
        yield {"image": np.load(path)[None]}
