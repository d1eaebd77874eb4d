"""The calibration cache as a format: what is read, and what is refused in which words."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.quantization.cache import Calibration, Statistics
from engine.quantization.thresholds import METHODS
from tests.support.formats import Sample, damages

SCALES = st.floats(0, exclude_min=True, allow_infinity=False)
NAMES = st.text(max_size=9)

SAMPLE = Sample(
    {
        "format": 3,
        "scales": {"image": 0.02, "conv": 1.0},
        "method": "auto",
        "images": 500,
        "images_sha256": "1" * 64,
        "model_sha256": "2" * 64,
        "preprocessing_sha256": "3" * 64,
        "versions": {"numpy": "2.4.6"},
        "empty_images": 3,
        "largest": {"float": 4.0},
        "statistics": {
            "conv": {
                "scales": {"auto": 1.0, "entropy": 0.5, "minmax": 2.0},
                "clipped": 0.25,
                "snr_db": 30.0,
            }
        },
    },
    maps=frozenset({"scales", "versions", "largest", "statistics", "statistics.conv.scales"}),
)


@given(
    st.builds(
        Calibration,
        scales=st.dictionaries(NAMES, SCALES, max_size=4),
        method=st.sampled_from(METHODS),
        images=st.integers(0, 2**64 - 1),
        versions=st.dictionaries(NAMES, NAMES, max_size=2),
        empty_images=st.integers(0, 2**64 - 1),
        largest=st.dictionaries(NAMES, st.floats(0, allow_infinity=False), max_size=2),
        statistics=st.dictionaries(
            NAMES,
            st.builds(
                Statistics,
                scales=st.fixed_dictionaries(dict.fromkeys(METHODS, SCALES)),
                clipped=st.floats(0, 1),
                snr_db=st.floats(allow_nan=False),  # infinite without an error
            ),
            max_size=2,
        ),
    )
)
def test_a_cache_comes_back(tmp_path_factory, calibration):
    path = tmp_path_factory.getbasetemp() / "any.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration


@given(damages(SAMPLE))
def test_damage_is_named_by_its_path(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(damage.document))
    with pytest.raises(EngineError) as caught:
        Calibration.load(path)
    says = damage.says
    if says.startswith("format: "):
        says = "" if "format" in damage.document else "no calibration cache, or a damaged one"
    assert str(caught.value).startswith(f"{path}: {says}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": {"image": "0.5"}}, r'scales\.image: a valid number expected, not "0\.5"'),
        ({"scales": {"image": True}}, r"scales\.image: a valid number expected, not true"),
        ({"scales": {"a/b": 0}}, r'scales\["a/b"\]: greater than 0 expected, not 0'),
        ({"method": "best"}, 'method: one of auto, entropy, .* expected, not "best"'),
        ({"images": -1}, "images: greater than or equal to 0 expected"),
        ({"images": 5.0}, r"images: a valid integer expected, not 5\.0"),
        ({"largest": {"a": -1.0}}, r"largest\.a: greater than or equal to 0 expected"),
        (
            {"statistics": {"a": {"scales": {"auto": 1.0}, "clipped": 0.0, "snr_db": 1.0}}},
            r"statistics\.a\.scales: a scale by each of auto, entropy, minmax expected",
        ),
        ({"format": 2}, "another format; make it anew: 'engine calibrate MODEL --data FOLDER -o"),
        ({"format": "2"}, "another format"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(SAMPLE.document | change))
    with pytest.raises(EngineError, match=rf"cache\.json: .*{message}"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"image": 0.02', '"image": 0.02, "image": 0.5', 'the key "image" stands twice'),
        ("0.02", "Infinity", r"scales\.image: .* expected, not Infinity"),
    ],
)
def test_numbers_and_keys_that_are_refused(tmp_path, old, new, message):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(SAMPLE.document).replace(old, new))
    with pytest.raises(EngineError, match=rf"{message}.*; no calibration cache, or a damaged one"):
        Calibration.load(path)


def test_a_tensor_without_an_error_is_infinitely_good(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(SAMPLE.document).replace("30.0", "Infinity"))
    assert Calibration.load(path).statistics["conv"].snr_db == math.inf


def test_a_scale_that_was_changed_is_told(tmp_path):
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(SAMPLE.document))
    assert Calibration.load(path).changed is None
    path.write_text(json.dumps(SAMPLE.document | {"scales": {"image": 0.02, "conv": 100.0}}))
    assert "1 of 1 scales, the first of 'conv', are not what auto" in Calibration.load(path).changed
