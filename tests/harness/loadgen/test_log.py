"""LoadGen's logs, whole, cut and damaged."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import EngineError
from harness.errors import HarnessError
from harness.loadgen.log import DETAIL, read_detail
from harness.loadgen.qsl import SampleLibrary
from harness.loadgen.sut import Sut
from harness.results.result import latency_summary
from tests.support.harness_fakes import FakeEngine, Memory


def line(key, value, *, error=False, warning=False):
    metadata = {"is_error": error, "is_warning": warning}
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": metadata}) + "\n"


def test_detail_log(tmp_path):
    path = tmp_path / DETAIL
    path.write_text(
        line("result_validity", "INVALID")
        + line("effective_target_qps", 1)
        + line("effective_target_qps", 20.5)
        + line("error_runtime", "Ending early", error=True)
        + line("warning_generic_message", "allocation", warning=True)
        + line("result_min_duration_met", False)
        + line("early_stopping_met", True)
        + line("result_99.90_percentile_latency_ns", 1500000)
        + line("num_errors", 1)
    )
    detail = read_detail(path)
    assert detail.valid is False
    assert detail.effective == {"target_qps": 20.5}
    assert detail.errors == ("error_runtime: Ending early",)
    assert detail.complaints == (
        "error_runtime: Ending early",
        "the minimum duration was not reached",
    )
    assert detail.latency_ms == {"p99.9": 1.5}


@pytest.mark.parametrize("error", [True, False])
def test_a_valid_run_with_an_error_is_not_valid(tmp_path, error):
    (tmp_path / DETAIL).write_text(
        line("result_validity", "VALID") + line("anything", "went wrong", error=error)
    )
    assert read_detail(tmp_path / DETAIL).valid is not error


def test_the_first_error_is_the_one_that_counts():
    """Later ones follow from it."""
    sut = Sut((FakeEngine(),), SampleLibrary(Memory(1), (FakeEngine(),)), batch=1, max_wait_s=0)
    for number in range(3):
        sut.fail(EngineError(str(number)))
    assert str(sut.failure) == "0"


@given(cut=st.integers(1, 60))
def test_a_cut_detail_log_is_refused(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / DETAIL
    text = line("power_begin", "now") + line("power_end", "now")
    path.write_text(text[: -1 - cut])
    with pytest.raises(HarnessError, match="line 2: not a complete LoadGen log line"):
        read_detail(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"key": "a", "key": "b"}', 'the key "key" stands twice'),
        ("[" * 100_000, "in each other"),
    ],
)
def test_a_line_that_is_no_document(entry, message, tmp_path):
    path = tmp_path / DETAIL
    path.write_text(line("power_begin", "now") + f":::MLLOG {entry}\n")
    with pytest.raises(HarnessError, match=f"line 2: not a complete .*{message}") as caught:
        read_detail(path)
    assert len(str(caught.value).splitlines()) == 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_log_or_an_error(content):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DETAIL
        path.write_bytes(b":::MLLOG " + content)
        try:
            read_detail(path)
        except HarnessError as error:
            assert str(path) in str(error)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200))
def test_latency_percentiles_are_values_that_occurred(seconds):
    summary = latency_summary(tuple(seconds))
    ordered = sorted(seconds)
    for percent in (50, 90, 99):
        at_least = ordered[-(-percent * len(ordered) // 100) - 1]
        assert summary[f"p{percent}"] == pytest.approx(at_least * 1000, abs=1e-5)
    assert summary["max"] == pytest.approx(ordered[-1] * 1000, abs=1e-5)
