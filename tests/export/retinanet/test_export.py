"""RetinaNet's weights to ONNX: what is read, what is inferred, and the proof of the export."""

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

import export.retinanet.postprocess
from export.agreement import compare_with_onnxruntime
from export.checkpoint import infer_config, load_model, read_checkpoint
from export.errors import ExportError
from export.onnx_export import Detector, export_detector
from export.retinanet.config import RetinaNetConfig
from export.retinanet.model import RetinaNet
from tests.support import attempt, command
from tests.support.retinanet import SMALL, random_model


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


@pytest.fixture(scope="module")
def detector_and_onnx(model):
    detector = Detector(model).eval()
    return detector, export_detector(detector)


def renamed(state):
    """The names that torchvision gives since 0.13."""
    names = {}
    for name, tensor in state.items():
        new = re.sub(r"(inner|layer)_blocks\.(\d)", r"\1_blocks.\2.0", name)
        new = re.sub(r"_head\.conv\.(\d)", lambda m: f"_head.conv.{int(m[1]) // 2}.0", new)
        names[new] = tensor
    return names


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("names", [dict, renamed])
def test_checkpoints(model, tmp_path, names, frozen):
    """Both spellings of names, with and without counters; the detector is told by the names."""
    state = model.state_dict()
    if frozen:
        state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    path = tmp_path / "model.pth"
    torch.save({"model": names(state), "epoch": 3}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.architecture.name == "retinanet"
    config = infer_config(checkpoint, (128, 160))
    assert config == SMALL
    loaded = load_model(checkpoint, config).state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_resnet_without_groups(tmp_path):
    config = RetinaNetConfig(128, 128, 5, width=8, groups=1, group_width=8, fpn_channels=8)
    torch.save(renamed(RetinaNet(config).state_dict()), tmp_path / "model.pth")
    checkpoint = read_checkpoint(tmp_path / "model.pth")
    assert infer_config(checkpoint, (128, 128)) == config


def test_wrong_checkpoints(model, small_model, tmp_path):
    state = model.state_dict()
    broken = {n: t for n, t in state.items() if "bbox_reg" not in n}
    torch.save(broken, tmp_path / "broken.pth")
    checkpoint = read_checkpoint(tmp_path / "broken.pth")
    with pytest.raises(ExportError, match=r"missing head.regression_head.bbox_reg.weight \[36"):
        load_model(checkpoint, infer_config(checkpoint))
    twice = state | {
        "backbone.fpn.inner_blocks.0.0.bias": state["backbone.fpn.inner_blocks.0.bias"]
    }
    torch.save(twice, tmp_path / "twice.pth")
    with pytest.raises(ExportError, match="two names"):
        read_checkpoint(tmp_path / "twice.pth")
    torch.save(small_model.state_dict(), tmp_path / "ssd.pth")
    with pytest.raises(ExportError, match="no model 'yolo'; there are: ssd-resnet34, retinanet"):
        read_checkpoint(tmp_path / "ssd.pth", "yolo")
    other = read_checkpoint(tmp_path / "ssd.pth", "retinanet")
    with pytest.raises(ExportError, match=r"missing backbone\.body\.conv1\.weight"):
        load_model(other, infer_config(other))


def test_check_accepts_the_export(detector_and_onnx):
    agreement = compare_with_onnxruntime(*detector_and_onnx)
    assert agreement.detections > 1000


def _tamper(model: onnx.ModelProto, op_type: str, position: int, value: float) -> onnx.ModelProto:
    """Put another constant into the last node of a type that has one there."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    known = {tensor.name: tensor for tensor in changed.graph.initializer}
    *_, node = (
        n for n in changed.graph.node if n.op_type == op_type and n.input[position] in known
    )
    old = onnx.numpy_helper.to_array(known[node.input[position]])
    tensor = onnx.numpy_helper.from_array(np.full_like(old, value), "other")
    changed.graph.initializer.append(tensor)
    node.input[position] = "other"
    return changed


def _clip(model: onnx.ModelProto, position: int, value: float) -> onnx.ModelProto:
    """Move a bound of the boxes (0, 1), or that of dw and dh."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    (node,) = (
        n for n in changed.graph.node if n.op_type == "Clip" and bool(n.input[1]) == (position == 1)
    )
    changed.graph.initializer.append(
        onnx.numpy_helper.from_array(np.array(value, np.float32), "bound")
    )
    node.input[position] = "bound"
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda model: _tamper(model, "NonMaxSuppression", 3, 0.48),
        lambda model: _tamper(model, "NonMaxSuppression", 4, 0.055),
        lambda model: _clip(model, 2, 4.2),
        lambda model: _clip(model, 1, -0.01),
    ],
    ids=["overlap", "threshold", "bound of dw and dh", "clip"],
)
def test_check_notices_a_wrong_graph(detector_and_onnx, change):
    detector, model = detector_and_onnx
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(detector, change(model))


def test_check_notices_another_cut(detector_and_onnx, monkeypatch):
    monkeypatch.setattr(export.retinanet.postprocess, "LEVEL_TOP_K", 900)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(*detector_and_onnx)


def test_check_notices_another_order_of_levels(detector_and_onnx, monkeypatch):
    """Of equal scores in two levels the finer comes first."""
    topk = export.retinanet.postprocess.stable_topk

    def later_first(values, k):
        top, index = topk(values.flip(-1), k)
        return top, values.shape[-1] - 1 - index

    monkeypatch.setattr(export.retinanet.postprocess, "stable_topk", later_first)
    with pytest.raises(ExportError, match="has no equal in"):
        compare_with_onnxruntime(*detector_and_onnx)


@pytest.mark.slow
def test_command(model, tmp_path):
    weights, output = tmp_path / "small.safetensors", tmp_path / "small.onnx"
    save_file(model.state_dict(), weights, {"retinanet_config": SMALL.to_json()})
    (tmp_path / "names.txt").write_text("".join(f"thing {n}\n" for n in range(12)))
    done = command("export", "--weights", weights, "-o", output, "--names", tmp_path / "names.txt")
    assert "guessed" not in done.stdout
    assert "PyTorch and ONNX Runtime agree" in done.stdout
    loaded = onnx.load(output)
    onnx.checker.check_model(loaded, full_check=True)
    metadata = {entry.key: entry.value for entry in loaded.metadata_props}
    assert RetinaNetConfig.from_json(metadata["retinanet_config"]) == SMALL
    assert metadata["class_names"].count("thing") == 12
    assert {node.domain for node in loaded.graph.node} == {""}
    assert "BatchNormalization" not in {node.op_type for node in loaded.graph.node}
    session = ort.InferenceSession(output, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(3).normal(size=(3, 3, 128, 160)).astype(np.float32)
    together = session.run(None, {"image": images})
    assert [part.shape for part in together] == [(3, 300, 7), (3,)]
    with torch.inference_mode():
        _, wanted = model.postprocess()(*model(torch.from_numpy(images)))
    assert together[1].tolist() == wanted.tolist()
    assert together[1].min() > 0
    alone = session.run(None, {"image": images[1:2]})
    np.testing.assert_allclose(alone[0][0, :, 1:], together[0][1, :, 1:], atol=1e-4)
    refused = attempt("-m", "export", "--weights", weights, "-o", output, "--image-size", "12x")
    assert refused.returncode == 2
    message = "export-onnx: error: --image-size 12x: neither SIDE nor HEIGHTxWIDTH\n"
    assert refused.stderr == message
