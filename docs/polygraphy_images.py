"""Images with detections for ``polygraphy run --data-loader-script docs/polygraphy_images.py``.

Four of the first float32 validation set in the build folder, or of the folder that IMAGES names.
"""

import os
from pathlib import Path

import numpy as np


def load_data():
    """Yield the feed of each image."""
    build = Path(os.environ.get("BUILD_DIR", "build"))
    sets = sorted((build / "preprocessed_data").glob("*-val/float32_*"))
    folder = Path(os.environ.get("IMAGES") or sets[0])
    for path in sorted(folder.glob("*.npy"))[:4]:
        yield {"image": np.load(path)[None]}
