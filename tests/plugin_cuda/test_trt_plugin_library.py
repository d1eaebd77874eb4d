"""libnmsoptplugin.so: types, formats, shapes and runs, asked for by a driver in C++."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from graph_surgery.nms_function import NmsAttributes
from tests.support.nms_cases import LEVELS, SIGMOID, SSD, plane, with_attributes
from tests.support.nms_oracle import nms_opt
from tests.support.nms_tolerance import check_same, undecided
from tests.support.plugin_cases import (
    heads,
    make,
    profile,
)
from tests.support.plugin_driver import (
    CHW32,
    FLOAT,
    HALF,
    HWC,
    HWC8,
    HWC16,
    LINEAR,
    TYPE_INT8,
    TYPE_INT32,
    fixed,
)


def test_outputs(driver):
    plugin = make(driver, replace(SSD, keepTopK=37))
    assert plugin.output_types(13) == [FLOAT, TYPE_INT32]
    shapes = [tensor.dims.d[: tensor.dims.nbDims] for tensor in heads(SSD, LEVELS, -1)[:13]]
    assert plugin.output_shapes(shapes) == [[-1, 37, 7], [-1]]
    shapes = [[5, *shape[1:]] for shape in shapes[:12]] + shapes[12:]
    assert plugin.output_shapes(shapes) == [[5, 37, 7], [5]]
    assert driver.messages() == ""


def test_wrong_number_of_tensors(driver):
    plugin, tensors = make(driver), heads(SSD, LEVELS, 1)
    for wrong in (tensors[1:], [tensors[0], *tensors]):
        inputs = len(wrong) - 2
        shapes = [tensor.dims.d[: tensor.dims.nbDims] for tensor in wrong[:inputs]]
        every = [fixed(tensor) for tensor in wrong]
        assert plugin.output_types(inputs) is None
        assert plugin.output_shapes(shapes) is None
        assert not plugin.supports(0, wrong)
        assert not plugin.configure(every)
        assert not plugin.shape_change(wrong)
        assert driver.messages().count(f"{inputs} inputs and 2 outputs, expected 13") == 5
    assert plugin.output_types(13, 1) is None
    assert "13 inputs and 1 outputs" in driver.messages()
    assert plugin.output_shapes([[1, 2, 3]] * 13) is None
    assert "loc_0 has 3 dimensions" in driver.messages()


FORMATS = {
    FLOAT: {LINEAR, CHW32, HWC},
    HALF: {LINEAR, CHW32, HWC8, HWC16},
    TYPE_INT8: {LINEAR, CHW32, HWC16},
}
"""Those that NvInferRuntime.h allows for the type and that convolutions on tensor cores write."""


def test_every_combination_of_type_and_format(driver):
    """Accepted: one format for all loc, one for all conf; priors and outputs as they are."""
    plugin = make(driver)
    for kind in range(12):
        for layout in range(14):
            tensor = (kind, layout)
            good = kind in FORMATS and layout in FORMATS[kind]
            tensors = heads(SSD, LEVELS, 1, loc=tensor, conf=tensor, scale=0.5)
            is_float = good and kind != TYPE_INT8
            assert plugin.supports(0, tensors) == plugin.supports(5, tensors) == is_float, tensor
            assert plugin.supports(6, tensors) == plugin.supports(11, tensors) == good, tensor
            tensors = heads(SSD, LEVELS, 1)
            for position, right in ((12, FLOAT), (13, FLOAT), (14, TYPE_INT32)):
                tensors[position].type, tensors[position].format = tensor
                expected = tensor == (right, LINEAR)
                assert plugin.supports(position, tensors) == expected, tensor
    assert driver.messages() == ""


def test_levels_do_not_mix(driver):
    plugin = make(driver)
    tensors = heads(SSD, LEVELS, 1, loc=(HALF, HWC8), conf=(FLOAT, CHW32))
    assert all(plugin.supports(position, tensors) for position in range(15))
    for position, other in ((3, (HALF, LINEAR)), (5, (FLOAT, HWC)), (7, (FLOAT, LINEAR))):
        changed = heads(SSD, LEVELS, 1, loc=(HALF, HWC8), conf=(FLOAT, CHW32))
        changed[position].type, changed[position].format = other
        assert not plugin.supports(position, changed)


def test_the_answer_hangs_on_earlier_tensors_alone(driver):
    plugin = make(driver)
    for position in range(15):
        tensors = heads(SSD, LEVELS, 1, loc=(HALF, HWC8), conf=(HALF, LINEAR))
        for later in tensors[position + 1 :]:
            later.type, later.format = 99, 99
        assert plugin.supports(position, tensors)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_int8_needs_a_scale(driver, scale):
    tensors = heads(SSD, LEVELS, 1, conf=(TYPE_INT8, CHW32), scale=scale)
    assert not make(driver).supports(6, tensors)


def test_combinations_stay_below_the_limit_of_tensorrt(driver):
    combinations = (len(FORMATS[FLOAT]) + len(FORMATS[HALF])) * sum(map(len, FORMATS.values()))
    assert combinations <= driver.c.driver_format_limit(make(driver).pointer)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_accepted_format_configures(driver, kind):
    """The kernels take it, too, and need the same workspace for the largest batch."""
    plugin, sizes = make(driver), set()
    for layout in FORMATS[kind]:
        loc = (FLOAT, LINEAR) if kind == TYPE_INT8 else (kind, layout)
        tensors = heads(SSD, LEVELS, 64, loc=loc, conf=(kind, layout), scale=0.1)
        assert plugin.configure(profile(tensors, 1, 8, 64)), driver.messages()
        assert plugin.shape_change(tensors), driver.messages()
        sizes.add(plugin.workspace(profile(tensors, 1, 8, 64)))
        sizes.add(plugin.workspace([fixed(tensor) for tensor in tensors]))
    assert len(sizes) == 1
    assert driver.messages() == ""


def test_workspace_is_that_of_the_kernels(driver, plugin_libraries):
    from plugin_cuda.library import Config, Format, Level, load_library, workspace_size

    levels = tuple(Level(h, w, a, Format(0), Format(0)) for a, h, w in LEVELS)
    config = Config(81, 0, 200, 200, 0.05, 0.5, levels)
    kernels = load_library(plugin_libraries / "libnms_opt.so")
    tensors = heads(SSD, LEVELS, 64)
    for most in (1, 7, 64):
        found = make(driver).workspace(profile(tensors, 1, 1, most))
        assert found == workspace_size(config, most, kernels)


def changed(position, *, dims=None, index=None, value=None):
    def change(tensors):
        if index is not None:
            tensors[position].dims.d[index] = value
        if dims is not None:
            tensors[position].dims.nbDims = dims

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(2, dims=3), "loc_2 has 3 dimensions, expected 4"),
        (changed(9, dims=5), "conf_3 has 5 dimensions, expected 4"),
        (changed(1, index=0, value=2), "loc_1 is a batch of 2, loc_0 one of 1"),
        (changed(0, index=0, value=0), "loc_0: its dimension 0 is 0"),
        (changed(0, index=2, value=51), "loc_0 has 51 x 50 cells, conf_0 50 x 50"),
        (changed(11, index=3, value=4), "loc_5 has 3 x 3 cells, conf_5 3 x 4"),
        (changed(3, index=1, value=25), "loc_3 has 25 channels, not 4 for each of 1..32 anchors"),
        (changed(3, index=1, value=132), "loc_3 has 132 channels, not 4 for each of 1..32 anchors"),
        (changed(3, index=1, value=20), "conf_3 has 486 channels, expected 405: 5 anchors, as lo"),
        (changed(6, index=1, value=320), "conf_0 has 320 channels, expected 324: 4 anchors"),
        (changed(12, index=1, value=60516), "and 60516 values a plane, expected [2, 60520, 1]"),
        (changed(12, index=0, value=1), "priors have 3 dimensions"),
        (changed(12, dims=2), "priors have 2 dimensions"),
        (changed(12, index=2, value=4), "expected [2, 60520, 1]: four for each of the 15130"),
        (changed(4, index=2, value=2**31), "loc_4: its dimension 2 is 2147483648"),
    ],
)
def test_shapes_that_contradict(driver, change, message):
    plugin, tensors = make(driver), heads(SSD, LEVELS, 1)
    change(tensors)
    assert not plugin.configure([fixed(tensor) for tensor in tensors])
    assert message in driver.messages()
    assert not plugin.shape_change(tensors)
    assert message in driver.messages()
    assert plugin.workspace([fixed(tensor) for tensor in tensors]) == 0
    assert message in driver.messages()
    assert not plugin.enqueue(tensors, [0] * 13, [0] * 2, 0, 0)
    assert message in driver.messages()


def test_huge_maps_are_refused(driver):
    """More priors than 64 bits count."""
    attributes = replace(SSD, numLayers=8, inputOrder=(0, 8, 16))
    tensors = heads(attributes, [(32, 1, 1)] * 8, 1)
    for tensor in tensors[:16]:
        tensor.dims.d[2] = tensor.dims.d[3] = 2**31 - 1
    assert not make(driver, attributes).configure([fixed(tensor) for tensor in tensors])
    assert "too many priors" in driver.messages()


def test_only_the_batch_is_dynamic(driver):
    tensors = profile(heads(SSD, LEVELS, 4), 1, 2, 4)
    tensors[8].min.d[2] = 12
    assert not make(driver).configure(tensors)
    assert "input 8: its dimension 2 is dynamic; only the batch may be" in driver.messages()


def test_the_kernels_refuse_in_their_own_words(driver):
    """A batch beyond NMS_OPT_MAX_BATCH."""
    assert not make(driver).configure(profile(heads(SSD, LEVELS, 65536), 1, 1, 65536))
    assert "NMS_OPT_TRT: " in driver.messages()


# On a GPU


def packed(tensor: np.ndarray, layout: int) -> np.ndarray:
    """[N, C, H, W] as the format lays it out; padding holds what must not be read as data."""
    width = {LINEAR: 1, CHW32: 32, HWC8: 8, HWC16: 16, HWC: 1}[layout]
    n, c, h, w = tensor.shape
    padding = -c % width
    fill = 127 if tensor.dtype == np.int8 else np.nan
    whole = np.pad(tensor, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=fill)
    if layout == LINEAR:
        return whole
    if layout == CHW32:
        rows = whole.reshape(n, -1, width, h, w)
        return np.ascontiguousarray(rows.transpose(0, 1, 3, 4, 2))
    return np.ascontiguousarray(whole.transpose(0, 2, 3, 1))


@dataclass(frozen=True)
class Problem:
    """Head tensors of each level, joined ones as the oracle wants them, priors."""

    attributes: NmsAttributes
    levels: list
    loc: list
    conf: list
    priors: np.ndarray
    scale: float

    def joined(self):
        def join(parts, rows):
            flat = [np.float32(part).reshape(len(part), rows, -1) for part in parts]
            return np.concatenate(flat, axis=2)

        conf = [
            part * np.float32(self.scale) if part.dtype == np.int8 else part for part in self.conf
        ]
        return join(self.loc, 4), join(conf, self.attributes.numClasses)


def random_problem(attributes, levels, batch, loc_type, conf_type) -> Problem:
    rng = np.random.default_rng(3)
    count = sum(a * h * w for a, h, w in levels)
    low = rng.uniform(0, 0.8, (count, 2))
    priors = plane(np.concatenate([low, low + rng.uniform(0.05, 0.4, (count, 2))], axis=1))
    loc = [rng.normal(size=(batch, 4 * a, h, w)).astype(loc_type) for a, h, w in levels]
    classes, scale = attributes.numClasses, 0.125
    conf = [rng.normal(size=(batch, classes * a, h, w)) * 2.5 for a, h, w in levels]
    if conf_type == np.int8:
        conf = [np.clip(np.rint(part / scale), -127, 127).astype(np.int8) for part in conf]
    else:
        conf = [part.astype(conf_type) for part in conf]
    return Problem(attributes, levels, loc, conf, priors, scale)


NP_TYPES = {FLOAT: np.float32, HALF: np.float16, TYPE_INT8: np.int8}
LOC_AND_CONF = [
    *(((kind, a), (kind, a)) for kind in (FLOAT, HALF) for a in sorted(FORMATS[kind])),
    *(((FLOAT, LINEAR), (TYPE_INT8, a)) for a in sorted(FORMATS[TYPE_INT8])),
    ((HALF, HWC8), (TYPE_INT8, CHW32)),
    ((HALF, LINEAR), (FLOAT, CHW32)),
    ((FLOAT, HWC), (HALF, HWC16)),
]


VERSION_2 = {
    **SIGMOID,
    "backgroundLabelId": -1,
    "levelTopK": 30,
    "topK": 90,
    "clipBeforeNms": 1,
    "bboxXformClip": 0.1,
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "values", [{}, SIGMOID, VERSION_2], ids=["softmax", "sigmoid", "version 2"]
)
@pytest.mark.parametrize(("loc", "conf"), LOC_AND_CONF)
def test_enqueue_equals_the_oracle(driver, loc, conf, values):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    levels, batch = [(4, 6, 5), (6, 3, 3), (3, 1, 1)], 3
    usual = {"numClasses": 11, "topK": 40, "keepTopK": 60, "confidenceThreshold": 0.1}
    attributes = with_attributes(levels, **(usual | values))
    problem = random_problem(attributes, levels, batch, NP_TYPES[loc[0]], NP_TYPES[conf[0]])
    plugin = make(driver, attributes)
    tensors = heads(attributes, levels, batch, loc=loc, conf=conf, scale=problem.scale)
    assert plugin.configure([fixed(tensor) for tensor in tensors]), driver.messages()
    assert plugin.shape_change(tensors), driver.messages()

    host = [
        *(packed(part, loc[1]) for part in problem.loc),
        *(packed(part, conf[1]) for part in problem.conf),
        problem.priors,
    ]
    inputs = [torch.from_numpy(np.ascontiguousarray(part)).cuda() for part in host]
    detections = torch.full((batch, attributes.keepTopK, 7), torch.nan, device="cuda")
    numbers = torch.full((batch,), -7, dtype=torch.int32, device="cuda")
    size = plugin.workspace([fixed(tensor) for tensor in tensors])
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    runs = []
    for _ in range(2):
        started = plugin.enqueue(
            tensors,
            [part.data_ptr() for part in inputs],
            [detections.data_ptr(), numbers.data_ptr()],
            workspace.data_ptr(),
            stream.cuda_stream,
        )
        assert started, driver.messages()
        stream.synchronize()
        runs.append((detections.cpu().numpy(), numbers.cpu().numpy()))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*runs, strict=True))
    all_loc, all_conf = problem.joined()
    expected = nms_opt(attributes, problem.priors, all_loc, all_conf, levels)
    assert expected[1].min() > 10  # there is something to compare
    check_same(
        runs[0],
        expected,
        lambda n: undecided(all_loc[n], all_conf[n], problem.priors, attributes, levels),
    )
    assert driver.messages() == ""


@pytest.mark.gpu
def test_failing_run_says_why(driver):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensors = heads(SSD, LEVELS, 1)
    assert not make(driver).enqueue(tensors, [0] * 13, [0] * 2, 0, 0)
    assert "NMS_OPT_TRT: " in driver.messages()
