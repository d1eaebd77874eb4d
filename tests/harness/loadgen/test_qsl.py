"""The sample library: views of what is loaded."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.loadgen.qsl import SampleLibrary
from tests.support.harness_fakes import FakeEngine, Memory

LOADED = [7, 3, 9, 1, 0, 7, 3]  # MultiStream repeats the first samples


@pytest.fixture
def library():
    made = SampleLibrary(Memory(10), (FakeEngine(),))
    made.load(LOADED)
    return made


def values(views):
    return [value for view in views for value in view[:, 2, 1, 3].tolist()]


@pytest.mark.parametrize("asked", [[7], [9, 1], [7, 3, 9, 1, 0], [0], LOADED])
def test_contiguous_samples_are_one_view(library, asked):
    (images,) = library.runs(asked)
    assert images[:, 0, 0, 0].tolist() == asked
    assert np.shares_memory(images, library.runs(LOADED)[0])


@given(st.lists(st.sampled_from(LOADED), min_size=1, max_size=20))
def test_any_loaded_samples_in_as_few_views_as_can_be(asked):
    library = SampleLibrary(Memory(10), (FakeEngine(),))
    library.load(LOADED)
    views = library.runs(asked)
    assert values(views) == asked
    for before, after in itertools.pairwise(views):
        start = before.ctypes.data + before.nbytes
        assert after.ctypes.data != start  # else they were one


@given(st.permutations(range(8)), st.integers(1, 30))
def test_the_loaded_order_repeated_is_cut_only_at_its_end(order, batch):
    """What LoadGen asks for in Offline."""
    library = SampleLibrary(Memory(8), (FakeEngine(),))
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

    library = SampleLibrary(Memory(10), (Pinned(),))
    for count in (4, 3, 4, 6, 5):
        library.load(range(count))
        assert values(library.runs(range(count))) == list(range(count))
        assert np.shares_memory(library.runs([0])[0], allocated[-1]())
        library.unload(range(count))
    assert len(allocated) == 2


def test_more_samples_than_memory():
    """LoadGen's 64 and a batch are what is in memory."""
    engine = FakeEngine()
    engine.host_array = lambda shape, dtype: np.empty((10**9, *shape), dtype)
    with pytest.raises(HarnessError, match=r"10 samples of .* GB do not fit in memory; .* --batch"):
        SampleLibrary(Memory(10), [engine]).load(range(10))
