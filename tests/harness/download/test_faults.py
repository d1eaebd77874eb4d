"""A transfer through any run of faults: the file as the server has or had it, or none."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.download import transfer
from harness.download.transfer import fetch
from tests.support.http_files import answers, chunked, running_site, serve

PATH = "/model.bin"
FAULTS = st.one_of(
    st.builds(lambda cut: ("cut", cut), st.integers(0, 5000)),
    st.builds(lambda code: ("status", code), st.sampled_from([500, 503, 429])),
    st.sampled_from([("change", None), ("shift", None), ("chunked", 1000)]),
)


def versions_of(length):
    """Endless contents of the same length."""
    generator = np.random.default_rng(length)
    while True:
        yield generator.bytes(length)


def fault(kind, value, site, versions, seen):
    def change(handler):
        serve(handler, cut=len(site.files[PATH]) // 2)
        site.files[PATH] = next(versions)
        seen.append(site.files[PATH])

    return {
        "cut": lambda handler: serve(handler, cut=value),
        "status": answers(value),
        "shift": lambda handler: serve(handler, shift=1, cut=10),
        "chunked": chunked(cut=value),
        "change": change,
    }[kind]


@given(
    length=st.integers(1, 5000),
    faults=st.lists(FAULTS, max_size=5),
    if_range=st.booleans(),
    ranges=st.booleans(),
)
@settings(max_examples=40)
def test_any_run_of_faults_ends_with_the_file(length, faults, if_range, ranges):
    versions = versions_of(length)
    seen = [next(versions)]
    with (
        pytest.MonkeyPatch.context() as patch,
        running_site() as site,
        tempfile.TemporaryDirectory() as folder,
    ):
        patch.setattr(transfer, "WAITS", (0.0,) * 10)  # a change may cost two tries
        patch.setenv("no_proxy", "127.0.0.1")
        site.files[PATH], site.if_range, site.ranges = seen[0], if_range, ranges
        site.faults[PATH] = [fault(*one, site, versions, seen) for one in faults]
        target = Path(folder) / "model.bin"
        fetch(site.url + PATH, target, notify=lambda _: None)
        assert target.read_bytes() in seen  # never a mixture or a piece
        assert list(Path(folder).iterdir()) == [target]
