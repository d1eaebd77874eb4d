"""ONNX Runtime with libnms_opt.so behind the heads: everything that needs no GPU.

For the session, GPU memory is memory of the host, the CUDA provider that of the CPU, and
libnms_opt.so the function body of NMS_OPT_TRT: what it does with addresses, shapes and sizes of
batches is real.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import engine.backends.onnxruntime.engine as whole
import engine.backends.split as parts
from engine.backends.cuda import Gpu
from engine.backends.onnxruntime import cuda, session
from engine.backends.split import UnsplitError, split
from engine.errors import EngineError
from engine.load import load_engine
from graph_surgery.replace import insert_nms
from plugin_cuda.errors import PluginError
from plugin_cuda.library import FLOAT16, FLOAT32, load_library
from tests.support.fake_gpus import FakeRuntime
from tests.support.host_stream import HostStream, array_at, pinned
from tests.support.int8_models import write_int8
from tests.support.retina_graphs import Retina, retina

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module", params=["fp32", "int8", "int8+fp16"])
def detector(request, surgered, tmp_path_factory):
    if request.param == "fp32":
        return surgered
    float_type = "fp16" if request.param.endswith("fp16") else "fp32"
    path = tmp_path_factory.mktemp("int8") / f"small.{float_type}.onnx"
    return write_int8(surgered, path, float_type)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A library that takes everything; 64 bytes of workspace an image."""
    path = tmp_path / "libnms_opt.so"
    path.write_bytes(b"stand-in")
    for module in (parts, cuda):
        monkeypatch.setattr(module, "workspace_size", lambda _config, batch, _library: 64 * batch)
    monkeypatch.setattr(parts, "load_library", object)
    monkeypatch.setattr(cuda, "library_path", lambda: path)
    return path


def images_for(model, count, seed=0):
    batch = np.random.default_rng(seed).standard_normal((count, 3, 400, 400), np.float32)
    kind = model.graph.input[0].type.tensor_type.elem_type
    return batch if kind == onnx.TensorProto.FLOAT else np.rint(batch * 16).astype(np.int8)


def open_cpu(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])


def node_of(model):
    (node,) = [node for node in model.graph.node if node.op_type == "NMS_OPT_TRT"]
    return node


# ---- the split


def test_heads_are_those_of_the_whole_model(detector, library):
    model = onnx.load(detector)
    found = split(model)
    node = node_of(model)
    names = list(node.input[:-1])
    assert list(found.heads) == names
    images = images_for(model, 2)
    heads = open_cpu(found.network).run(names, {"image": images})
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    expected = open_cpu(marked).run(names, {"image": images})
    for (shape, dtype), head, reference in zip(found.heads.values(), heads, expected, strict=True):
        assert head.shape == (2, *shape)
        assert head.dtype == dtype
        np.testing.assert_allclose(head, reference, rtol=2e-3, atol=2e-3)


def test_the_network_holds_nothing_of_the_node(detector, library):
    model = onnx.load(detector)
    network = split(model).network
    onnx.checker.check_model(network)
    assert {node.domain for node in network.graph.node} == {""}
    assert not network.functions
    assert node_of(model).input[-1] not in {tensor.name for tensor in network.graph.initializer}
    assert {p.key: p.value for p in network.metadata_props} == {
        p.key: p.value for p in model.metadata_props
    }
    (batch, *_) = network.graph.input[0].type.tensor_type.shape.dim
    assert not batch.HasField("dim_value")


def test_functions_of_the_network_stay(surgered, library):
    model = onnx.load(surgered)
    expected = split(model).network
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    body = onnx.helper.make_node("Relu", ["x"], ["y"])
    opset = onnx.helper.make_opsetid("", 18)
    model.functions.append(onnx.helper.make_function("my", "F", ["x"], ["y"], [body], [opset]))
    model.opset_import.append(onnx.helper.make_opsetid("my", 1))
    relu.op_type, relu.domain = "F", "my"
    network = split(onnx.shape_inference.infer_shapes(model)).network
    assert [(one.domain, one.name) for one in network.functions] == [("my", "F")]
    feed = {"image": images_for(model, 1)}
    both = (open_cpu(one).run(None, feed) for one in (expected, network))
    for a, b in zip(*both, strict=True):
        np.testing.assert_array_equal(a, b)


def test_priors_and_attributes_are_the_nodes(detector, library):
    model = onnx.load(detector)
    found = split(model)
    node = node_of(model)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    (priors,) = [t for t in model.graph.initializer if t.name == node.input[-1]]
    np.testing.assert_array_equal(found.priors, numpy_helper.to_array(priors))
    config = found.config
    assert config.num_classes == values["numClasses"]
    assert config.background_class == values["backgroundLabelId"]
    assert config.top_k == values["topK"]
    assert config.keep_top_k == values["keepTopK"]
    assert config.confidence_threshold == values["confidenceThreshold"]
    assert config.nms_threshold == values["nmsThreshold"]
    assert config.sigmoid == values["confSigmoid"]
    assert len(config.levels) == values["numLayers"]
    assert config.num_priors * 4 == found.priors.shape[1]
    shapes = [shape for shape, _ in found.heads.values()]
    for index, level in enumerate(config.levels):
        loc, conf = shapes[index], shapes[index + len(config.levels)]
        assert loc == (4 * level.anchors, level.height, level.width)
        assert conf == (values["numClasses"] * level.anchors, level.height, level.width)
        half = "fp16" in detector.name
        for form in (level.loc, level.conf):
            assert (form.dtype, form.vector) == (FLOAT16 if half else FLOAT32, 1)


def test_attributes_of_version_2_are_the_nodes(library):
    kind = Retina(height=64, width=64)
    model = insert_nms(retina(kind)).model
    found = split(model).config
    assert (found.level_top_k, found.top_k) == (kind.most, 3 * kind.most)
    assert (found.clip_before_nms, found.sigmoid, found.background_class) == (1, 1, -1)
    assert found.bbox_xform_clip == pytest.approx(kind.bound)
    assert found.num_priors == sum(len(part) for part in kind.anchors())


def test_a_sigmoid_node(surgered, library):
    model = onnx.load(surgered)
    for attribute in node_of(model).attribute:
        attribute.i = {"confSigmoid": 1, "confSoftmax": 0}.get(attribute.name, attribute.i)
    assert split(model).config.sigmoid == 1


def test_graphs_that_cannot_be_split(exported, surgered, library):
    with pytest.raises(UnsplitError, match="no NMS_OPT_TRT node; run 'graph-surgery nms'"):
        split(onnx.load(exported))
    more = onnx.load(surgered)
    more.graph.output.append(onnx.ValueInfoProto(name=node_of(more).input[0]))
    with pytest.raises(UnsplitError, match="does not end in NMS_OPT_TRT: its outputs are det"):
        split(more)
    lacking = onnx.load(surgered)
    del node_of(lacking).attribute[0]
    with pytest.raises(UnsplitError, match="lacks these attributes"):
        split(lacking)


def test_a_library_that_is_missing_or_refuses(surgered, library, monkeypatch, tmp_path):
    def refuse(*_):
        raise PluginError("NMS_OPT_TRT: too many classes")

    monkeypatch.setattr(parts, "workspace_size", refuse)
    with pytest.raises(UnsplitError, match="too many classes"):
        split(onnx.load(surgered))
    monkeypatch.setattr(parts, "load_library", load_library)
    monkeypatch.setenv("NMS_OPT_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(UnsplitError, match=r"none\.so not found: build it with build-plugin"):
        split(onnx.load(surgered))


# ---- which way is taken


@pytest.fixture
def pretend_cuda(monkeypatch):
    """The CUDA provider seems to be there and is the CPU's; a GPU seems to be there."""
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setitem(session._PROVIDERS, "cuda", CPU)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(cuda, "runtime", lambda: None)
    monkeypatch.setattr(cuda, "use_gpu", lambda _: Gpu("G", "9.0"))
    FakeRuntime("NVIDIA H200").stand_in(monkeypatch)

    def open_without_options(source, model, provider, options, threads, *, entries):
        assert options == {**cuda.CUDA_OPTIONS, "device_id": "0"}
        assert not entries
        return session.open_session(source, model, provider, {}, threads)

    monkeypatch.setattr(cuda, "open_session", open_without_options)


def test_with_the_library_the_graph_is_split(surgered, library, pretend_cuda, caplog):
    engine = load_engine("onnxruntime", surgered, device="cuda")
    assert isinstance(engine, cuda.SplitEngine)
    assert engine.manifest["nms"] == "libnms_opt.so"
    assert engine.manifest["gpu"] == "G"
    assert engine.manifest["provider_options"] == dict(cuda.CUDA_OPTIONS)
    assert engine.manifest["running_on"]["uuid"].startswith("GPU-")
    assert engine.max_batch is None
    assert engine.input_spec == load_engine("onnxruntime", surgered).input_spec
    assert not caplog.messages


@pytest.mark.parametrize("lack", ["library", "bindings", "node"])
@pytest.mark.usefixtures("library", "pretend_cuda")
def test_else_the_whole_graph_runs_and_a_line_says_why(
    lack, exported, surgered, monkeypatch, caplog
):
    model, reason = surgered, "cuda-bindings"
    if lack == "library":
        reason = "build-plugin"

        def missing():
            raise PluginError("libnms_opt.so not found: build it with build-plugin")

        monkeypatch.setattr(parts, "load_library", missing)
    elif lack == "bindings":

        def missing():
            raise EngineError("pip install cuda-bindings")

        monkeypatch.setattr(cuda, "runtime", missing)
    else:
        model, reason = exported, "graph-surgery nms"
    engine = load_engine("onnxruntime", model, device="cuda")
    assert isinstance(engine, whole.OnnxRuntimeEngine)
    assert engine.manifest["nms"] == "ONNX Runtime"
    (line,) = caplog.messages
    assert str(model) in line
    assert "slow" in line
    assert reason in line
    assert "\n" not in line


def test_errors_are_errors_not_another_way(surgered, library, pretend_cuda, monkeypatch):
    with pytest.raises(EngineError, match="unknown device 'cuda:x'; choose one of: cpu, cuda"):
        load_engine("onnxruntime", surgered, device="cuda:x")

    def no_gpu(_):
        raise EngineError("no CUDA device 0 can be used")

    monkeypatch.setattr(cuda, "use_gpu", no_gpu)
    with pytest.raises(EngineError, match="no CUDA device 0"):
        load_engine("onnxruntime", surgered, device="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", list)
    with pytest.raises(EngineError, match="install onnxruntime-gpu"):
        load_engine("onnxruntime", surgered, device="cuda")


# ---- the session, on memory of the host


@pytest.fixture
def host_session(library, monkeypatch):
    """Make a session of a model file on the host; the node's function body is the kernel."""
    monkeypatch.setattr(cuda, "Stream", HostStream)
    monkeypatch.setattr(cuda, "pinned", pinned)
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")

    def make(path, fixed_batch=None):
        model = onnx.load(path)
        found = split(model)
        names = list(found.heads)
        node = node_of(model)
        tail = open_cpu(onnx.utils.Extractor(model).extract_model(names, list(node.output)))

        class BodyPlan:
            def __init__(self, *given):
                config, batch, loc, conf, priors, library = given
                assert (config, library) == (found.config, found.library)
                np.testing.assert_array_equal(
                    array_at(priors, found.priors.shape, np.float32), found.priors
                )
                self.batch, self.addresses = batch, (*loc, *conf)

            def bind(self, detections, counts, workspace):
                assert workspace.size >= 64 * self.batch
                assert detections.shape == (self.batch, found.config.keep_top_k, 7)

                def run(stream):
                    assert stream == 1
                    feeds = {
                        name: array_at(address, (self.batch, *shape), dtype)
                        for address, (name, (shape, dtype)) in zip(
                            self.addresses, found.heads.items(), strict=True
                        )
                    }
                    rows, used = tail.run(list(node.output), feeds)
                    array_at(detections.pointer, detections.shape, detections.dtype)[:] = rows
                    array_at(counts.pointer, counts.shape, counts.dtype)[:] = used

                return run

        monkeypatch.setattr(cuda, "Plan", BodyPlan)

        def open_network(user_compute_stream):
            assert user_compute_stream == "1"
            return open_cpu(found.network)

        spec = load_engine("onnxruntime", path).input_spec
        return cuda.SplitSession(found, spec, fixed_batch, open_network), model

    before = HostStream.open_streams
    yield make
    assert HostStream.open_streams == before


def test_session_of_changing_batches(detector, host_session):
    session, model = host_session(detector)
    reference = load_engine("onnxruntime", detector).session()
    for seed, count in enumerate((2, 1, 3, 2)):  # grows, shrinks, grows
        images = images_for(model, count, seed)
        session.submit([images[:1], images[1:]] if count > 1 else [images])
        for actual, expected in zip(session.result(), reference.infer(images), strict=True):
            assert actual.dtype == expected.dtype
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, atol=2e-3)
    session.close()


def test_a_fixed_batch_is_filled_up(surgered, host_session, tmp_path):
    model = onnx.load(surgered)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    fixed = tmp_path / "fixed.onnx"
    onnx.save(model, fixed)
    session, _ = host_session(fixed, fixed_batch=3)
    images = images_for(model, 2)
    detections, counts = session.infer(images)
    expected, _ = load_engine("onnxruntime", surgered).session().infer(images)
    assert counts.shape == (2,)
    np.testing.assert_allclose(detections, expected, atol=1e-5)
    with pytest.raises(EngineError, match="batch of 4 images, but the model's batch is fixed at 3"):
        session.infer(images_for(model, 4))
    session.close()


def test_halves_of_infer(surgered, host_session):
    session, model = host_session(surgered)
    with pytest.raises(EngineError, match="no batch was submitted"):
        session.result()
    images = images_for(model, 1)
    expected, _ = session.infer(images)
    session.submit([images])
    with pytest.raises(EngineError, match="was not taken"):
        session.submit([images])
    np.testing.assert_array_equal(session.result()[0], expected)
    with pytest.raises(EngineError, match="images are float64"):
        session.infer(images.astype(np.float64))
    session.close()


@pytest.mark.parametrize("culprit", ["network", "kernel"])
def test_a_failure_is_one_line_and_the_session_goes_on(culprit, surgered, host_session):
    session, model = host_session(surgered)
    images = images_for(model, 1)
    expected, _ = session.infer(images)

    def fail(*_):
        raise (RuntimeError("bad\nluck") if culprit == "network" else PluginError("bad luck"))

    with pytest.MonkeyPatch.context() as patch:
        if culprit == "network":
            patch.setattr(session._network, "run_with_iobinding", fail)
        else:
            patch.setitem(session._passes, 1, cuda._Pass(session._passes[1].network, fail))
        with pytest.raises(EngineError, match="bad luck"):
            session.infer(images)
    np.testing.assert_array_equal(session.infer(images)[0], expected)
    session.close()


def test_a_session_that_does_not_open_leaves_no_stream(surgered, library, monkeypatch):
    monkeypatch.setattr(cuda, "Stream", HostStream)
    before = HostStream.open_streams

    def refuse(**_):
        raise EngineError("refused")

    spec = load_engine("onnxruntime", surgered).input_spec
    with pytest.raises(EngineError, match="refused"):
        cuda.SplitSession(split(onnx.load(surgered)), spec, None, refuse)
    assert HostStream.open_streams == before
