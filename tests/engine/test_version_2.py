"""NMS_OPT_TRT of version 2: run by ONNX Runtime on a CPU, refused by name by all that cannot."""

from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest

from engine.backends.cudnn import engine as cudnn
from engine.backends.split import UnsplitError, split
from engine.backends.tensorrt.build import wanted_plugin
from engine.errors import EngineError
from engine.load import load_engine
from engine.model import load_detector
from graph_surgery.replace import insert_nms
from tests.support import attempt
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


def test_tensorrt_refuses_it(file):
    with pytest.raises(EngineError, match=UNKNOWN + ".*TensorRT plugin; use --engine onnxruntime"):
        wanted_plugin(load_detector(file))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_command_refuses_it_in_one_line(file, backend, tmp_path):
    done = attempt("-m", "engine", "build", file, "--backend", backend, "-o", tmp_path / "plan")
    assert done.returncode == 2
    assert "version 2" in done.stderr
    assert done.stderr.count("\n") == 1


def test_cudnn_refuses_it(file, monkeypatch):
    monkeypatch.setattr(cudnn, "import_cudnn", MagicMock)
    monkeypatch.setattr(cudnn, "use_gpu", MagicMock())
    with pytest.raises(EngineError, match=UNKNOWN + ".*cudnn needs; use --engine onnxruntime"):
        cudnn.load(file)


def test_the_cuda_split_refuses_it(file):
    """So that ONNX Runtime runs the definition on the GPU, and says why."""
    with pytest.raises(UnsplitError, match=UNKNOWN + r"libnms_opt\.so"):
        split(load_detector(file).model)


def test_no_file_for_a_plugin_is_written(file, tmp_path):
    done = attempt("-m", "graph_surgery", "nms", file, tmp_path / "p.onnx", "--plugin-only")
    assert done.returncode == 2
    assert "is known to no plugin" in done.stderr
    assert not (tmp_path / "p.onnx").exists()
