"""result.json as a format: what is read, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.loadgen.settings import SCENARIOS
from harness.results.result import RESULT, RunResult, read_result
from tests.support.formats import JSON, Sample, damages

TEXT = st.text(max_size=9)
FIGURES = st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
ANYTHING = st.dictionaries(TEXT, JSON, max_size=3)

SAMPLE = Sample(
    {
        "benchmark": "ssd-resnet34",
        "scenario": "Offline",
        "mode": "PerformanceOnly",
        "metric": "samples per second",
        "value": 960.5,
        "valid": True,
        "samples_per_second": 960.5,
        "latency_ms": {"p99": 12.5},
        "batch_latency_ms": {"p50": 8.0},
        "errors": ["none"],
        "warnings": ["a session was lost"],
        "accuracy": {"mAP": 0.2},
        "pictures": "pictures",
        "dataset": {"name": "coco-val", "samples": 5000},
        "engine": {"backend": "onnxruntime", "devices": ["cpu"]},
        "settings": {"batch_size": 8},
        "versions": {"python": "3.11.7"},
        "command": "harness run",
        "commit": "1" * 40,
        "finished": "2026-01-01T00:00:00+00:00",
        "lost_devices": ["cuda:1 (GPU-1)"],
    },
    maps=frozenset(
        {
            *("latency_ms", "batch_latency_ms", "accuracy", "dataset", "engine", "settings"),
            "versions",
        }
    ),
    anything=frozenset({"accuracy", "dataset", "engine", "settings"}),
    nullable=frozenset({"value", "valid", "samples_per_second", "accuracy", "pictures", "commit"}),
    optional=frozenset({"lost_devices"}),
)


NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        RunResult,
        scenario=st.sampled_from(list(SCENARIOS)),
        mode=st.sampled_from(["PerformanceOnly", "TEST01"]),
        latency_ms=FIGURES,
        batch_latency_ms=FIGURES,
        value=NUMBER,
        accuracy=st.none() | ANYTHING,
        dataset=ANYTHING,
        engine=ANYTHING,
        settings=ANYTHING,
        versions=st.dictionaries(TEXT, TEXT, max_size=3),
    ).map(lambda one: replace(one, samples_per_second=one.value))
)
def test_a_result_comes_back(tmp_path_factory, result):
    folder = tmp_path_factory.getbasetemp()
    result.write(folder)
    assert read_result(folder / RESULT) == result


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "Online"}, "scenario 'Online' is unknown"),
        ({"value": 1000.0}, "value is 1000.0, but samples_per_second 960.5"),
        ({"mode": "AccuracyOnly", "value": 0.9}, "value is 0.9, but accuracy.mAP 0.2"),
        ({"mode": "AccuracyOnly", "accuracy": None}, "value is 960.5, but accuracy.mAP None"),
        ({"mode": "AccuracyOnly", "value": None}, "value is None, but accuracy.mAP 0.2"),
    ],
)
def test_a_figure_that_is_told_in_two_ways_is_refused(changes, message, tmp_path):
    path = tmp_path / RESULT
    path.write_text(json.dumps({**SAMPLE.document, **changes}))
    with pytest.raises(HarnessError, match=f"{re.escape(f'{path}: {message}')}; it is not a"):
        read_result(path)


@given(damages(SAMPLE))
def test_damage_is_named_by_its_path(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(json.dumps(damage.document))
    with pytest.raises(HarnessError) as caught:
        read_result(path)
    assert str(caught.value).startswith(f"{path}: {damage.says}")
    assert str(caught.value).endswith("; it is not a result of 'harness run'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "an object expected"),
        ("{", "not JSON"),
        ('{"mode": 1, "mode": 2}', "stands twice"),
        ("[" * 100_000, "in each other"),
    ],
)
def test_what_is_no_document(tmp_path, text, message):
    path = tmp_path / RESULT
    path.write_text(text)
    with pytest.raises(HarnessError, match=rf"result\.json: .*{message}.*; it is not a result"):
        read_result(path)
    with pytest.raises(HarnessError, match=r"none\.json: cannot read it: No such file"):
        read_result(tmp_path / "none.json")
