"""Tensors in front of libnms_opt.so, without a GPU: whose they are, layouts, messages."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_cuda.binding import Plan, prepare
from plugin_cuda.device_array import DeviceArray, device_array, head_vector
from plugin_cuda.errors import PluginError
from plugin_cuda.library import Config, Format, Level, load_library

pytest_plugins = ("tests.support.nms_library",)
pytestmark = pytest.mark.usefixtures("nms_library")
FAKE = 1 << 20  # an aligned address that is never read


def fake(shape, dtype=np.float32, **more) -> DeviceArray:
    return DeviceArray(FAKE, tuple(shape), np.dtype(dtype), **more)


def of(array) -> DeviceArray:
    """A numpy array passed off as one on a device."""
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, array.strides, 0, array)


class Interface:
    """Like numba's device arrays: the CUDA Array Interface and nothing else."""

    def __init__(self, array, strides):
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            "strides": strides,
        }


class Capsule:
    """DLPack alone, the memory of a numpy array passed off as that of a device."""

    def __init__(self, array, device=(2, 0)):
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int32, np.uint8])
def test_interfaces_are_read(dtype):
    whole = np.zeros((2, 6, 3, 5), dtype)
    for array in (whole, whole[:, 1:5], whole.transpose(0, 3, 1, 2)):
        expected = (array.ctypes.data, array.shape, array.dtype, array.strides)
        for tensor in (Interface(array, array.strides), capsule := Capsule(array)):
            found = device_array(tensor, "x")
            assert (found.pointer, found.shape, found.dtype, found.strides) == expected
            assert found.is_contiguous == array.flags.c_contiguous
        assert found.device == 0
        assert capsule.streams == [-1]  # no synchronisation
    found = device_array(Interface(whole, None), "x")
    assert found.is_contiguous
    assert found.element_strides == tuple(s // whole.itemsize for s in whole.strides)
    assert found.size == whole.nbytes


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.zeros(3, np.float32), "loc_1 is on the CPU"),
        (Capsule(np.zeros(3), (10, 0)), "loc_1 is on a DLPack device 10"),
        ([1.0, 2.0], "loc_1: a list is no tensor"),
        (Capsule(np.zeros(3, np.complex64)), "loc_1: DLPack type"),
        (DeviceArray(FAKE, (2,), np.dtype(np.float32), (6,)), "loc_1: strides"),
    ],
)
def test_what_is_no_device_tensor_is_refused_by_name(tensor, message):
    with pytest.raises(PluginError, match=message):
        device_array(tensor, "loc_1")


def test_torch_tensors_of_the_cpu_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(PluginError, match="priors is on the CPU"):
        device_array(torch.zeros(3), "priors")


@given(
    st.tuples(*[st.integers(1, 5)] * 4),
    st.integers(0, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_a_layout_is_read_as_the_header_defines_it(shape, padding, offset, nhwc):
    """Every element is where the formula of nms_opt_format puts it."""
    n, c, h, w = shape
    if nhwc:
        stored = np.zeros((n, h, w, c + offset + padding), np.int16)
        array = stored[..., offset : offset + c].transpose(0, 3, 1, 2)
    else:
        array = np.zeros(shape, np.int16)
    vector = head_vector(of(array), "x")
    rows = -(-c // vector)
    for index in np.ndindex(shape):
        image, channel, cell = index[0], index[1], index[2] * w + index[3]
        element = ((image * rows + channel // vector) * h * w + cell) * vector + channel % vector
        assert element * 2 == np.dot(index, array.strides)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 8, 3, 5))[:, :4],  # channels of a larger NCHW tensor
        np.zeros((2, 4, 3, 6))[..., :5],
        np.zeros((2, 4, 6, 5))[:, :, ::2],
        np.zeros((2, 3, 5, 4)).transpose(0, 3, 1, 2)[..., ::2],
        np.zeros((4, 4, 3, 5))[::2],
        np.zeros((2, 3, 5, 8)).transpose(0, 3, 1, 2)[:, ::2],
        np.zeros((2, 3, 4, 5)).transpose(0, 2, 1, 3),
        np.zeros((2, 4, 3, 5))[:, :, ::-1],
        np.broadcast_to(np.zeros((1, 4, 3, 5)), (2, 4, 3, 5)),
    ],
)
def test_other_layouts_are_refused_by_name(array):
    with pytest.raises(PluginError, match=r"conf_2 .* neither NCHW nor NHWC"):
        head_vector(of(array), "conf_2")


OPTIONS = {
    "num_classes": 3,
    "background_class": 0,
    "top_k": 5,
    "keep_top_k": 7,
    "confidence_threshold": 0.5,
    "nms_threshold": 0.5,
}


def heads(**changes) -> dict[str, object]:
    """Two levels, 2x3 with 4 anchors and 1x1 with 6, batch 2: arguments of `prepare`."""
    arguments = {
        "loc": [fake((2, 16, 2, 3)), fake((2, 24, 1, 1))],
        "conf": [fake((2, 12, 2, 3)), fake((2, 18, 1, 1))],
        "priors": fake((2, 120)),
    }
    for name, value in changes.items():
        kind, _, level = name.partition("_")
        if level:
            arguments[kind][int(level)] = value
        else:
            arguments[kind] = value
    return arguments | OPTIONS


def test_a_plan_says_what_the_tensors_are():
    row = 40  # merged: 16 + 12 channels and padding
    strides = (2 * 3 * row * 2, 2, 3 * row * 2, row * 2)
    arguments = heads(
        loc_0=fake((2, 16, 2, 3), np.float16, strides=strides),
        conf_0=replace(fake((2, 12, 2, 3), np.float16, strides=strides), pointer=FAKE + 32),
        conf_1=fake((2, 18, 1, 1), np.int8),
    )
    plan = prepare(**arguments, conf_scales=[1.0, 0.25])
    assert plan.config == Config(
        **OPTIONS,
        levels=(
            Level(2, 3, 4, Format(1, row), Format(1, row, 1.0)),
            Level(1, 1, 6, Format(0), Format(2, 1, 0.25)),
        ),
    )
    assert (plan.batch, plan.loc, plan.conf) == (2, (FAKE, FAKE), (FAKE + 32, FAKE))
    assert (plan.priors, plan.device) == (FAKE, None)
    three = prepare(**heads(priors=fake((2, 120, 1), device=3)))
    assert three.device == 3


def test_attributes_of_version_2_are_handed_on():
    ours = {"level_top_k": 50, "clip_before_nms": True, "bbox_xform_clip": 4.125}
    config = prepare(**heads() | {"top_k": 100} | ours).config
    assert (config.top_k, config.level_top_k) == (100, 50)
    assert (config.clip_before_nms, config.bbox_xform_clip) == (1, 4.125)
    with pytest.raises(PluginError, match=r"NMS_OPT_TRT: top_k .* not num_levels times as much"):
        prepare(**heads() | ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loc_1": fake((2, 24, 1))}, r"loc_1 has shape \[2, 24, 1\]"),
        ({"loc_1": fake((2, 26, 1, 1))}, r"loc_1 has shape \[2, 26, 1, 1\]"),
        ({"loc_1": fake((2, 3, 1, 1))}, r"loc_1 has shape \[2, 3, 1, 1\]"),
        ({"loc_1": fake((3, 24, 1, 1))}, r"loc_1 has shape \[3, .* not \[2, 24, 1, 1\]"),
        ({"conf_0": fake((2, 12, 3, 2))}, r"conf_0 .* not \[2, 12, 2, 3\]"),
        ({"conf_0": fake((2, 16, 2, 3))}, r"conf_0 .* not \[2, 12, 2, 3\]"),
        ({"conf_0": fake((2, 12, 2, 3), np.float64)}, "conf_0 is float64"),
        ({"conf_0": fake((2, 12, 2, 3), ">f4")}, "conf_0 is >f4"),
        ({"loc_0": fake((2, 16, 2, 3), np.int8)}, "loc_0 is int8, not one of float32, float16"),
        ({"loc_0": fake((2, 16, 2, 3), strides=(4, 4, 4, 4))}, "loc_0 .* neither"),
        ({"loc": []}, "0 loc tensors, but 2 conf"),
        ({"loc": [], "conf": []}, "no head tensors"),
        ({"priors": fake((2, 124))}, r"priors is float32\[2, 124\], not float32\[2, 120\]"),
        ({"priors": fake((2, 120), np.float16)}, "priors is float16"),
        ({"priors": fake((2, 120), strides=(4, 8))}, "priors .* not contiguous"),
        (
            {"loc_0": fake((2, 16, 2, 3), device=1), "conf_1": fake((2, 18, 1, 1), device=0)},
            "conf_1 is on CUDA device 0, others on 1",
        ),
        ({"conf_0": np.zeros((2, 12, 2, 3))}, "conf_0 is on the CPU"),
        ({"conf_1": fake((2, 18, 1, 1), np.int8)}, "conf_scales"),
    ],
)
def test_a_wrong_head_is_refused_by_name(changes, message):
    with pytest.raises(PluginError, match=message):
        prepare(**heads(**changes))


def test_what_the_library_refuses_is_said_in_its_words():
    with pytest.raises(PluginError, match="NMS_OPT_TRT: top_k"):
        prepare(**heads() | {"top_k": 0})
    with pytest.raises(PluginError, match="NMS_OPT_TRT: num_levels"):
        prepare(
            **heads(
                loc=[fake((1, 4, 1, 1))] * 9, conf=[fake((1, 3, 1, 1))] * 9, priors=fake((2, 36))
            )
        )
    with pytest.raises(PluginError, match="conf_scales"):
        prepare(**heads(), conf_scales=[1.0, 1.0])
    with pytest.raises(PluginError, match="1 conf_scales, but 2"):
        prepare(**heads(conf_1=fake((2, 18, 1, 1), np.int8)), conf_scales=[1.0])


def outputs(plan, **changes):
    return {
        "detections": fake((2, 7, 7)),
        "num_detections": fake((2,), np.int32),
        "workspace": fake((plan.workspace_bytes,), np.uint8),
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detections": fake((2, 8, 7))}, r"detections is float32\[2, 8, 7\]"),
        ({"detections": fake((2, 7, 7), strides=(4, 8, 56))}, "detections .* not contiguous"),
        ({"num_detections": fake((2,), np.int64)}, "num_detections is int64"),
        ({"workspace": fake((64,), np.float32)}, "workspace has 256 bytes, [0-9]+ are needed"),
        ({"workspace": fake((1 << 20,), strides=(8,))}, "workspace .* not contiguous"),
        ({"workspace": fake((1 << 24,), device=1)}, "workspace is on CUDA device 1, others on 0"),
    ],
)
def test_wrong_outputs_are_refused_by_name(changes, message):
    plan = prepare(**heads(priors=fake((2, 120), device=0)))
    assert plan.bind(**outputs(plan))
    with pytest.raises(PluginError, match=message):
        plan.bind(**outputs(plan, **changes))


class Recorder:
    """Stands in for the library where a run would need a GPU."""

    def __init__(self):
        self.calls, self.status = [], 0

    def __getattr__(self, name):
        return getattr(load_library(), name)

    def nms_opt_run(self, *arguments):
        self.calls.append(arguments)
        return self.status


def test_a_run_is_one_call_with_the_given_addresses():
    recorder = Recorder()
    plan = replace(prepare(**heads()), library=recorder)
    moved = replace(fake((2, 7, 7)), pointer=FAKE + 1024)
    run = plan.bind(**outputs(plan, detections=moved))
    assert recorder.calls == []
    run(77)
    [(config, batch, loc, conf, priors, detections, numbers, workspace, size, stream)] = (
        recorder.calls
    )
    assert (config.contents.num_levels, config.contents.levels[1].anchors) == (2, 6)
    assert (batch, list(loc), list(conf), stream) == (2, [FAKE] * 2, [FAKE] * 2, 77)
    assert [p.value for p in (priors, numbers, workspace)] == [FAKE] * 3
    assert detections.value == FAKE + 1024
    assert size.value >= plan.workspace_bytes
    recorder.status = 13
    with pytest.raises(PluginError, match="NMS_OPT_TRT: a pointer is null"):
        run(77)


def test_raw_addresses_and_their_number():
    config = Config(**OPTIONS, levels=(Level(2, 3, 4, Format(1, 32), Format(2, 32, 0.1)),))
    assert Plan(config, 2, (FAKE,), (FAKE,), FAKE).workspace_bytes > 0
    with pytest.raises(PluginError, match="1 levels, but 2 loc and 1 conf"):
        Plan(config, 2, (FAKE, FAKE), (FAKE,), FAKE)
