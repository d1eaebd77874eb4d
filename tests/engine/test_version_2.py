"""NMS_OPT_TRT of version 2: run by ONNX Runtime on a CPU, refused by name where it is not run."""

from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest

from engine.backends.cudnn import engine as cudnn
from engine.backends.tensorrt.build import Plugin, _require_plugin, wanted_plugin
from engine.errors import EngineError
from engine.load import load_engine
from engine.model import load_detector
from graph_surgery.replace import insert_nms
from tests.support import attempt
from tests.support.graphs import nms_node
from tests.support.retina_graphs import Retina, retina

KIND = Retina(height=64, width=64)
UNKNOWN = r"NMS_OPT_TRT version 2 \(levelTopK, clipBeforeNms, bboxXformClip\) is not known to "


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("retina") / "retina.nms.onnx"
    onnx.save(insert_nms(retina(KIND)).model, path)
    return path


def test_onnx_runtime_runs_it(file):
    engine = load_engine("onnxruntime", file, device="cpu")
    rng = np.random.default_rng(3)
    images = (0.15 * rng.normal(size=(2, 3, 64, 64))).astype(np.float32)
    detections, count = engine.session().infer(images)
    assert detections.shape == (2, KIND.keep, 7)
    assert (count > 0).all()
    assert engine.manifest["keep_top_k"] == KIND.keep
    assert engine.manifest["first_label"] == 0
    assert load_detector(file).keep_top_k == KIND.keep


def test_tensorrt_wants_its_own_plugin(file):
    """So a library that knows version 1 alone is refused by name."""
    assert wanted_plugin(load_detector(file)) == Plugin("2", "", KIND.keep)
    trt = MagicMock()
    trt.get_plugin_registry().get_creator = lambda _, version, __: version == "1" or None
    with pytest.raises(EngineError, match=r"NMS_OPT_TRT \(version 2\) is not registered"):
        _require_plugin(trt, load_detector(file), wanted_plugin(load_detector(file)))


def test_cudnn_refuses_it(file, monkeypatch):
    monkeypatch.setattr(cudnn, "import_cudnn", MagicMock)
    monkeypatch.setattr(cudnn, "use_gpu", MagicMock())
    with pytest.raises(
        EngineError, match=UNKNOWN + "the engine cudnn; use --engine onnxruntime or"
    ):
        cudnn.load(file)


def test_a_file_for_a_plugin_keeps_the_node_alone(file, tmp_path):
    done = attempt("-m", "graph_surgery", "nms", file, tmp_path / "p.onnx", "--plugin-only")
    assert done.returncode == 0, done.stderr
    whole, alone = onnx.load(file), onnx.load(tmp_path / "p.onnx")
    assert (len(whole.functions), len(alone.functions)) == (1, 0)
    assert nms_node(alone) == nms_node(whole)
