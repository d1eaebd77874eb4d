"""A pytest plugin: the fixture that builds libnms_opt.so and shows it to the binding."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nms_library(request):
    """libnms_opt.so: that of NMS_OPT_LIBRARY where it is set, else built now."""
    if named := os.environ.get("NMS_OPT_LIBRARY"):
        yield Path(named)
        return
    path = request.getfixturevalue("plugin_libraries") / "libnms_opt.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NMS_OPT_LIBRARY", str(path))
        yield path
