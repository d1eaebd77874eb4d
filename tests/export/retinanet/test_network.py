"""RetinaNet's names, anchors and head tensors, against golden data and PyTorch."""

import hashlib
import json

import numpy as np
import pytest
import torch

from export.errors import ExportError
from export.onnx_export import fold_batch_norms
from export.retinanet.anchors import anchors, pixel_anchors
from export.retinanet.config import RetinaNetConfig
from export.retinanet.model import RetinaNet
from tests.support.retinanet import SMALL, formula_weights
from tests.support.retinanet_golden import reference

MLPERF = RetinaNetConfig()


def weights(state) -> dict[str, torch.Tensor]:
    """Without the counters of batches, which frozen norms do not have."""
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def test_state_dict_is_the_references(golden):
    with torch.device("meta"):
        state = weights(RetinaNet(MLPERF).state_dict())
    expected = json.loads(reference(golden, "state_dict.json").read_text())
    assert [(name, list(t.shape), str(t.dtype)) for name, t in state.items()] == [
        (entry["name"], entry["shape"], f"torch.{entry['dtype']}") for entry in expected
    ]


@pytest.mark.parametrize("height, width", [(800, 800), (256, 256), (200, 264)])
def test_anchors_are_the_references(golden, height, width):
    data = np.load(reference(golden, "anchors.npz"))
    config = MLPERF.resized(height, width)
    levels = pixel_anchors(config)
    assert [len(level.reshape(-1, 4)) for level in levels] == data[f"n_{height}x{width}"].tolist()
    assert config.feature_shapes == tuple(map(tuple, data[f"fmap_{height}x{width}"].tolist()))
    by_cell = [level.transpose(1, 2, 0, 3).reshape(-1, 4) for level in levels]
    np.testing.assert_array_equal(np.concatenate(by_cell), data[f"a_{height}x{width}"])
    fractions = anchors(config) * (width, height, width, height)
    np.testing.assert_array_equal(
        fractions.astype(np.float32), np.concatenate([level.reshape(-1, 4) for level in levels])
    )


@pytest.mark.parametrize("config", [MLPERF, SMALL, RetinaNetConfig(200, 264, 3, 16, 1, 16, 8)])
def test_config_predicts_the_head_tensors(config):
    """The configuration's arithmetic, against PyTorch's own convolutions."""
    with torch.device("meta"):
        loc, conf = RetinaNet(config)(torch.zeros(2, 3, *config.image_shape))
    assert [(t.shape[1] // 4, *t.shape[2:]) for t in loc] == list(config.levels)
    assert [t.shape[1] for t in conf] == [9 * config.num_classes] * 5
    assert config.num_priors == len(anchors(config))


@pytest.mark.parametrize(
    "fields", [{"image_height": 16, "image_width": 16}, {"image_width": 5000}, {"num_classes": 0}]
)
def test_config_refuses(fields):
    with pytest.raises(ExportError):
        RetinaNetConfig(**fields)


def test_json():
    assert RetinaNetConfig.from_json(SMALL.to_json()) == SMALL
    with pytest.raises(ExportError, match="RetinaNetConfig"):
        RetinaNetConfig.from_json('{"image_size": 800}')


@pytest.mark.slow
def test_full_size_by_formula_weights(golden):
    """Sampled outputs of the heads, of all levels, with norms folded into convolutions."""
    data = np.load(reference(golden, "forward.npz"))
    model = RetinaNet(MLPERF)
    state = {n: formula_weights(n, tuple(t.shape)) for n, t in weights(model.state_dict()).items()}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in state.values())).hexdigest()
    assert digest == str(data["weights_sha256"])
    model.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()}, strict=False)
    image = np.random.RandomState(7).rand(1, 3, 800, 800).astype(np.float32) * 4 - 2
    with torch.inference_mode():
        loc, conf = fold_batch_norms(model)(torch.from_numpy(image))
    for kind, levels in (("reg", loc), ("cls", conf)):
        found = [levels[level][0, c, y, x].item() for level, c, y, x in data[f"{kind}_raw"]]
        largest = np.abs(found - data[f"{kind}_value64"]).max()
        assert largest <= 1e-4 * data[f"{kind}_std"], kind
