"""Models with data in a file beside them."""

import numpy as np


def changed(outside, folder):
    """A copy of the same model file with other data: the first weight is another."""
    path = folder / "model.onnx"
    path.write_bytes(outside.read_bytes())
    data = bytearray(outside.with_name("w.bin").read_bytes())
    data[:4] = np.float32(0.75).tobytes()
    (folder / "w.bin").write_bytes(data)
    return path
