"""The text format of TensorRT's calibration caches."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.quantization.cache import Calibration, parse_trt


@given(
    st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1).filter(
            lambda name: name.strip() and len(name.splitlines()) == 1
        ),
        st.floats(2.0**-100, 2.0**100, width=32),
        min_size=1,
        max_size=5,
    )
)
def test_trt_text_comes_back(scales) -> None:
    calibration = Calibration(scales, "minmax", 1, "", "", "", {}, 0, (), {}, {})
    assert parse_trt(calibration.to_trt()) == scales


@given(st.text(max_size=60) | st.text(max_size=40).map(lambda t: f"TRT-1-Entropy\n{t}"))
def test_trt_parser_never_fails_otherwise(text) -> None:
    try:
        scales = parse_trt(text)
    except EngineError as error:
        assert "line " in str(error)
    else:
        for name, scale in scales.items():
            assert f"{name}: {struct.pack('>f', scale).hex()}".lower() in text.lower()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1"),
        ("scales\nimage: 3caa54fc", "line 1"),
        ("TRT-8001-EntropyCalibration2\nimage 3caa54fc", "line 2"),
        ("TRT-8001-EntropyCalibration2\n\nimage: 3caa54f", "line 3"),
        ("TRT-8001-EntropyCalibration2\na: 3caa54fc\na: 3caa54fc", "second scale for 'a'"),
        ("TRT-8001-EntropyCalibration2\na: 7fc00000", "scale nan"),
        ("TRT-8001-EntropyCalibration2\na: 80000000", "scale -0.0"),
    ],
)
def test_bad_trt_text(text, problem) -> None:
    with pytest.raises(EngineError, match=problem):
        parse_trt(text)
