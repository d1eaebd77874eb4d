"""The address of a mirror in the place of the usual host."""

from __future__ import annotations

import pytest

from harness.download.files import apply_mirror
from harness.errors import HarnessError


@pytest.mark.parametrize(
    ("mirror", "expected"),
    [
        (None, "http://images.cocodataset.org/zips/val2017.zip"),
        ("https://mirror.example", "https://mirror.example/zips/val2017.zip"),
        ("http://mirror.example:8080/coco/", "http://mirror.example:8080/coco/zips/val2017.zip"),
    ],
)
def test_mirror_takes_the_place_of_the_host(mirror, expected):
    assert apply_mirror("http://images.cocodataset.org/zips/val2017.zip", mirror) == expected


@pytest.mark.parametrize(
    "mirror",
    [
        "mirror.example",
        "ftp://mirror.example",
        "file:///data",
        "https://",
        "http://[x",
        "http://h:p",
        "http://user:word@mirror.example",
        "http://mirror.example/?q=1",
    ],
)
def test_mirrors_that_are_none(mirror):
    with pytest.raises(HarnessError, match=r"--mirror .*give an address such as"):
        apply_mirror("http://images.cocodataset.org/x", mirror)
