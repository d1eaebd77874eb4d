"""libint8_conv.so without a GPU: the arrangement of the stem's weights, and what is refused."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugin_cuda.errors import PluginError
from plugin_cuda.int8_conv import conv3x3, load_conv_library, stem, stem_weight

CONV = {"x": 16, "weight": 16, "multiplier": 16, "bias": 16, "y": 16}
STEM = CONV | {"pool_multiplier": 1.0}


@pytest.fixture(scope="module")
def library(plugin_libraries):
    return load_conv_library(plugin_libraries / "libint8_conv.so")


@given(seed=st.integers(0, 2**32 - 1))
def test_stem_weight_is_the_same_convolution(seed):
    """One output of the 7x7 filter is the arranged filter over 4x4 blocks of 2x2 pixels."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-128, 128, (64, 3, 7, 7), np.int8)
    image = rng.integers(-128, 128, (3, 8, 8)).astype(np.int64)  # 7x7 from (1, 1)
    expected = np.einsum("kcrs,crs->k", weight.astype(np.int64), image[:, 1:, 1:])
    blocks = np.zeros((4, 4, 16), np.int64)
    for row in range(8):
        for column in range(8):
            for channel in range(3):
                place = 4 * channel + row % 2 * 2 + column % 2
                blocks[row // 2, column // 2, place] = image[channel, row, column]
    arranged = stem_weight(weight)
    assert arranged.dtype == np.int8
    np.testing.assert_array_equal(
        np.einsum("krsb,rsb->k", arranged.astype(np.int64), blocks), expected
    )


@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 3, 7, 6), np.int8), ((16, 3, 7, 7), np.int8), ((64, 3, 7, 7), float)]
)
def test_stem_weight_refuses(shape, dtype):
    with pytest.raises(PluginError, match=r"stem weights are .*; int8 \[64, 3, 7, 7\] expected"):
        stem_weight(np.zeros(shape, dtype))


@pytest.mark.parametrize(
    ("sizes", "pointers", "message"),
    [
        ((0, 8, 8, 64, 64), {}, "a shape that the kernel does not take"),
        ((1, 8, 0, 64, 64), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 96, 64), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 64, 96), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 128, 64), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 256, 0), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 256, 1 << 17), {}, "a shape that the kernel does not take"),
        ((1, 8, 8, 128, 256), {"x": 0}, "a pointer is null"),
        ((1, 8, 8, 64, 192), {"y": 24}, "a pointer is not aligned to 16 bytes"),
        ((1, 8, 8, 256, 64), {"residual": 8}, "a pointer is not aligned to 16 bytes"),
    ],
)
def test_conv3x3_refuses(library, sizes, pointers, message):
    with pytest.raises(PluginError, match=f"int8_conv_3x3: {message}"):
        conv3x3(*sizes, **(CONV | pointers), library=library)(0)


@pytest.mark.parametrize(
    ("sizes", "pointers", "message"),
    [
        ((1, 6, 8), {}, "a shape that the kernel does not take"),
        ((1, 8, 2), {}, "a shape that the kernel does not take"),
        ((1, 8, 8), {"bias": 0}, "a pointer is null"),
    ],
)
def test_stem_refuses(library, sizes, pointers, message):
    with pytest.raises(PluginError, match=f"int8_conv_stem: {message}"):
        stem(*sizes, **(STEM | pointers), library=library)(0)


def test_a_size_that_c_would_cut_short(library):
    with pytest.raises(PluginError, match=r"batch=4294967297 does not fit in 32 bits"):
        conv3x3(2**32 + 1, 8, 8, 64, 64, **CONV, library=library)


def test_library_that_is_not_there(tmp_path):
    with pytest.raises(PluginError, match=r"not found: build it with build-plugin for archit"):
        load_conv_library(tmp_path / "libint8_conv.so")


def test_library_of_another_kind(plugin_libraries):
    with pytest.raises(PluginError, match=r"is no libint8_conv\.so that can be loaded"):
        load_conv_library(plugin_libraries / "libnms_opt.so")


def test_unknown_status_has_words(library):
    words = ctypes.cast(library.int8_conv_status_string(999), ctypes.c_char_p).value
    assert words == b"unknown status"
