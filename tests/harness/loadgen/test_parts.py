"""The sample library, the payloads and the log parser, each on its own."""

from __future__ import annotations

import itertools
import json
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from harness.errors import HarnessError
from harness.loadgen.log import DETAIL, read_detail
from harness.loadgen.qsl import SampleLibrary
from harness.loadgen.response import check_outputs, pack
from harness.loadgen.sut import Sut
from harness.results.result import latency_summary
from tests.support.harness_fakes import KEEP, FakeEngine, Memory, detect

LOADED = [7, 3, 9, 1, 0, 7, 3]  # MultiStream repeats the first samples


@pytest.fixture
def library():
    made = SampleLibrary(Memory(10), FakeEngine())
    made.load(LOADED)
    return made


def values(views):
    return [value for view in views for value in view[:, 2, 1, 3].tolist()]


@pytest.mark.parametrize("asked", [[7], [9, 1], [7, 3, 9, 1, 0], [0], LOADED])
def test_contiguous_samples_are_one_view(library, asked):
    (images,) = library.runs(asked)
    assert images[:, 0, 0, 0].tolist() == asked
    assert np.shares_memory(images, library.runs(LOADED)[0])


@settings(deadline=None)
@given(st.lists(st.sampled_from(LOADED), min_size=1, max_size=20))
def test_any_loaded_samples_in_as_few_views_as_can_be(asked):
    library = SampleLibrary(Memory(10), FakeEngine())
    library.load(LOADED)
    views = library.runs(asked)
    assert values(views) == asked
    for before, after in itertools.pairwise(views):
        start = before.ctypes.data + before.nbytes
        assert after.ctypes.data != start  # else they were one


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(1, 30))
def test_the_loaded_order_repeated_is_cut_only_at_its_end(order, batch):
    """What LoadGen asks for in Offline."""
    library = SampleLibrary(Memory(8), FakeEngine())
    library.load(order)
    samples = (order * 12)[: 3 * batch]
    for start in range(0, 3 * batch, batch):
        asked = samples[start : start + batch]
        views = library.runs(asked)
        assert values(views) == asked
        assert len(views) == (start + batch - 1) // 8 - start // 8 + 1


@pytest.mark.parametrize("asked", [[2], [7, 2], [3, 9, 2]])
def test_samples_that_are_not_loaded_are_refused(library, asked):
    with pytest.raises(LookupError):
        library.runs(asked)


def test_unloaded_samples_are_refused(library):
    library.unload(LOADED)
    with pytest.raises(LookupError):
        library.runs([7])
    library.load([2, 4])
    assert values(library.runs([4])) == [4]
    with pytest.raises(LookupError):
        library.runs([7])


def test_memory_is_the_engines_and_kept():
    """Allocating pinned memory takes long, and the old must be free before the new is taken."""
    allocated = []

    class Pinned(FakeEngine):
        def host_array(self, shape, dtype):
            assert all(array() is None for array in allocated)
            array = np.zeros(shape, dtype)
            allocated.append(weakref.ref(array))
            return array

    library = SampleLibrary(Memory(10), Pinned())
    for count in (4, 3, 4, 6, 5):
        library.load(range(count))
        assert values(library.runs(range(count))) == list(range(count))
        assert np.shares_memory(library.runs([0])[0], allocated[-1]())
        library.unload(range(count))
    assert len(allocated) == 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=9), st.data())
def test_payloads(indices, data):
    keep = data.draw(st.integers(1, 6))
    counts = np.array([data.draw(st.integers(0, keep)) for _ in indices], np.int32)
    seed = data.draw(st.integers(0, 99))
    detections = np.random.default_rng(seed).random((len(indices), keep, 7), np.float32)
    before = detections.copy()
    rows, sizes = pack(detections, counts, np.array(indices))
    payload = rows.tobytes()
    start = 0
    for index, count, size, image in zip(indices, counts, sizes, before, strict=True):
        expected = image[:count].copy()
        expected[:, 0] = index
        assert payload[start : start + size] == expected.astype("<f4").tobytes()
        start += size
    assert start == len(payload)
    np.testing.assert_array_equal(detections, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_valid_rows_must_be_finite(value):
    detections, counts = detect(np.full((2, 3, 4, 4), 2, np.float32))
    detections[1, 3, 5] = value
    pack(detections, counts, np.array([0, 1]))
    detections[1, 1, 5] = value
    with pytest.raises(EngineError, match="NaN"):
        pack(detections, counts, np.array([0, 1]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d, c: (d[:1], c),
        lambda d, c: (d, c[:1]),
        lambda d, c: (d[..., :6], c),
        lambda d, c: (d.reshape(-1, 7), c),
        lambda d, c: (d.astype(np.float16), c),
        lambda d, c: (d, c.astype(np.int64)),
        lambda d, _: (d, np.array([0, -1], np.int32)),
        lambda d, _: (d, np.array([0, KEEP + 1], np.int32)),
    ],
)
def test_outputs_out_of_the_protocol_are_refused(spoil):
    detections, counts = detect(np.zeros((2, 3, 4, 4), np.float32))
    check_outputs(detections, counts, 2)
    with pytest.raises(EngineError, match="the engine returned"):
        check_outputs(*spoil(detections, counts), 2)


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
    sut = Sut((FakeEngine(),), SampleLibrary(Memory(1), FakeEngine()), batch=1, max_wait_s=0)
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


@settings(deadline=None)
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
