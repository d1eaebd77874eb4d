"""Runs of libnms_opt.so: memory, CUDA graphs, streams, addresses, tensors of array libraries.

``-k every_path`` selects small cases that reach every path of the kernels, for compute-sanitizer.
"""

import numpy as np
import pytest

from tests.support.nms_cases import (
    LEVELS,
    SIGMOID,
    SSD,
    make_model,
    plane,
    random_heads,
    run,
    with_attributes,
)
from tests.support.nms_tolerance import check_same, undecided

torch = pytest.importorskip("torch")
from plugin_cuda.binding import prepare  # noqa: E402
from plugin_cuda.errors import PluginError  # noqa: E402
from tests.support.nms_device import (  # noqa: E402
    FORMS,
    HALF,
    NCHW,
    Bound,
    Form,
    Heads,
    in_form,
    quantize,
    run_kernel,
    split,
)

pytest_plugins = ("tests.support.nms_library",)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("nms_library"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def golden_heads(golden):
    """Priors, deltas and logits of the three golden images."""
    priors = plane(np.load(golden / "default_boxes.npz")["ltrb"])
    files = [np.load(golden / f"nms_{i}.npz") for i in (1, 2, 3)]
    return priors, *(np.stack([file[name] for file in files]) for name in ("loc", "conf"))


@pytest.mark.parametrize("form", [HALF, Form("padded", "int8", "float16")], ids=str)
def test_runs_are_bit_identical_whatever_memory_held(golden_heads, form):
    priors, loc, conf = golden_heads
    which = np.arange(9) % 3
    heads = in_form(form, (LEVELS, priors, loc[which], conf[which]))[0]
    bound = Bound(heads.plan(SSD))
    first, number = bound().result()
    for garbage in (0xFF, 0x00, 0x7F, None, None):
        bound.spoil(garbage)
        again, count = bound().result()
        assert again.tobytes() == first.tobytes()
        assert count.tolist() == number.tolist()
    again, _ = bound().result()  # the workspace as the last run left it
    assert again.tobytes() == first.tobytes()


def test_a_cuda_graph_replays_on_changed_inputs(golden_heads):
    priors, loc, conf = golden_heads
    made = [
        in_form(HALF, (LEVELS, priors, loc[which], conf[which]))[0] for which in ([0, 1], [2, 0])
    ]
    expected = [run_kernel(SSD, heads) for heads in made]
    contents = [[buffer.clone() for buffer in heads.buffers] for heads in made]
    bound = Bound(made[0].plan(SSD))
    bound().result()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
    for content, (detections, count) in (*zip(contents, expected, strict=True),) * 2:
        for buffer, data in zip(made[0].buffers, content, strict=True):
            buffer.copy_(data)
        bound.spoil(None)
        graph.replay()
        actual = bound.result()
        assert actual[0].tobytes() == detections.tobytes()
        assert actual[1].tolist() == count.tolist()


def test_two_streams_at_once(golden_heads):
    priors, loc, conf = golden_heads
    made = [
        in_form(HALF, (LEVELS, priors, loc[which], conf[which]))[0]
        for which in ([0, 1, 2], [2, 2, 1])
    ]
    expected = [run_kernel(SSD, heads) for heads in made]
    bounds = [Bound(heads.plan(SSD)) for heads in made]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    for _ in range(20):
        for bound, stream in zip(bounds, streams, strict=True):
            bound(stream)
    for bound, (detections, count) in zip(bounds, expected, strict=True):
        actual = bound.result()
        assert actual[0].tobytes() == detections.tobytes()
        assert actual[1].tolist() == count.tolist()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_heads_at_addresses_aligned_to_their_type_alone(form):
    levels = [(4, 5, 5), (6, 3, 3), (2, 8, 8)]
    attributes = with_attributes(levels, numClasses=21, topK=50, keepTopK=100)
    _, priors, loc, conf = random_heads(levels, 21, 3)
    heads = in_form(form, (levels, priors, loc, conf))[0]
    scales = [level.conf.scale for level in heads.levels]
    stored = quantize(conf, levels)[0] if form.conf == "int8" else conf.astype(form.conf)
    shifted = Heads((levels, priors, loc, stored), form, scales=scales, shifted=True)
    assert all(address % 16 for address in shifted.loc)
    for one, other in zip(
        run_kernel(attributes, heads), run_kernel(attributes, shifted), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_pointer_between_elements_is_refused(golden_heads):
    priors, loc, conf = golden_heads
    heads = in_form(HALF, (LEVELS, priors, loc[:1], conf[:1]))[0]
    heads.conf[3] += 1
    with pytest.raises(PluginError, match="align"):
        Bound(heads.plan(SSD))()


class DlpackOnly:
    """A tensor of a library that has DLPack and no CUDA Array Interface."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def as_cupy(tensor):
    cupy = pytest.importorskip("cupy")
    return cupy.asarray(tensor)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "merged"])
@pytest.mark.parametrize("library", [lambda tensor: tensor, DlpackOnly, as_cupy])
def test_tensors_of_array_libraries(golden_heads, library, memory):
    priors, loc, conf = golden_heads
    expected = run_kernel(SSD, in_form(HALF, (LEVELS, priors, loc, conf))[0])
    heads = []
    for pair in zip(split(loc, LEVELS), split(conf, LEVELS), strict=True):
        tensors = [torch.from_numpy(part).cuda() for part in pair]
        if memory == "channels_last":
            tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
        elif memory == "merged":
            channels = tensors[0].shape[1]
            merged = torch.cat([*tensors, tensors[0][:, :4]], dim=1)
            merged = merged.to(memory_format=torch.channels_last)
            tensors = [merged[:, :channels], merged[:, channels:-4]]
        heads.append([library(t) for t in tensors])
    plan = prepare(
        [pair[0] for pair in heads],
        [pair[1] for pair in heads],
        library(torch.from_numpy(priors).cuda()),
        num_classes=81,
        background_class=0,
        top_k=200,
        keep_top_k=200,
        confidence_threshold=0.05,
        nms_threshold=0.5,
    )
    assert plan.device == torch.cuda.current_device()
    actual = Bound(plan)().result()
    assert actual[0].tobytes() == expected[0].tobytes()
    assert actual[1].tolist() == expected[1].tolist()


SMALL = [(1, 35, 35), (4, 1, 1)]
PATHS = {  # levels, classes, images, attributes, options of random_heads
    "few candidates": (SMALL, 5, 2, {}, {"background": 3.0}),
    "full lists": (SMALL, 5, 2, {"topK": 20, "confidenceThreshold": 1e-4}, {"background": -9.0}),
    "all priors": (SMALL, 5, 2, {"topK": 300, "keepTopK": 40, "confidenceThreshold": 0.0}, {}),
    "sigmoid": (SMALL, 5, 2, {"topK": 50, "keepTopK": 50, **SIGMOID}, {}),
    "nothing": (SMALL, 5, 2, {}, {"background": 40.0}),
    "more than the lists and the spill hold": (
        [(2, 32, 32)],
        41,
        1,
        {"topK": 20, "confidenceThreshold": 0.0, "backgroundLabelId": -1},
        {"spread": 1.0},
    ),
    "many slots": (SMALL, 5, 84, {}, {}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "form",
    [NCHW, HALF, Form("padded", "float16", "float16"), Form("chw4", "int8", "float32")],
    ids=str,
)
def test_every_path(form, path):
    """Small enough for compute-sanitizer.

    Memory is left as allocated, so that initcheck sees reads of what no kernel wrote.
    """
    levels, classes, images, attributes, options = PATHS[path]
    attributes = with_attributes(levels, numClasses=classes, **attributes)
    case = random_heads(levels, classes, images, **options)
    heads, (_, priors, loc, conf) = in_form(form, case)
    bound = Bound(heads.plan(attributes), spoiled=False)
    first = bound().result()
    again = bound().result()
    assert again[0].tobytes() == first[0].tobytes()
    assert first[1].tolist() == again[1].tolist()
    assert (first[1] > 0).all() == (path != "nothing")
    expected = run(make_model(attributes, levels, priors), levels, loc, conf)
    check_same(first, expected, lambda n: undecided(loc[n], conf[n], priors, attributes))
