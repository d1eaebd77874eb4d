"""Importing TensorRT-RTX, with its library and with plugins."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.backends.tensorrt.log import polygraphy_log
from engine.backends.tensorrt.module import import_tensorrt
from engine.backends.tensorrt.plugins import load_plugins
from engine.errors import EngineError
from tests.support import attempt
from tests.support.rtx_plans import NEEDS_RTX

pytestmark = NEEDS_RTX


def test_error_of_the_plugin_is_the_cause():
    """Where TensorRT hands its logger to plugins, its own errors stand around theirs."""
    from polygraphy.logger import G_LOGGER

    cause = "NMS_OPT_TRT: attribute topK = 0 is not in 1..1024"
    with polygraphy_log("error") as errors:
        for text in ("before", cause, "after"):
            G_LOGGER.error(text)
    assert errors.first("?") == errors.last("?") == cause


def test_library_without_creators_for_this_tensorrt(trt, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "empty.c", tmp_path / "empty.so"
    source.write_text(
        "void* const* getCreators(int* n) { *n = 0; return 0; }\n"
        "void setLoggerFinder(void* finder) { (void)finder; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(EngineError, match="registered none of its plugins"):
        load_plugins(trt, [library])


def test_library_is_named_without_a_trace():
    """The folder of links is gone with the process, and the environment is as it was."""
    script = (
        "import os; before = dict(os.environ)\n"
        "from engine.backends.tensorrt import module as m\n"
        "m.import_tensorrt('tensorrt-rtx'); m.import_tensorrt('tensorrt-rtx')\n"
        "assert dict(os.environ) == before\n"
        "print(*[links.name for links in m._links])"
    )
    done = attempt("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensorrt-rtx-") <= 1  # 0 once the wheel has the name itself
    for folder in done.stdout.split():
        assert not Path(folder).exists()


def test_package_was_imported_too_early():
    script = (
        "import pathlib, tensorrt_rtx_libs\n"
        "folder = pathlib.Path(tensorrt_rtx_libs.__file__).parent\n"
        "if (folder / 'libtensorrt_rtx.so').exists(): raise SystemExit(3)\n"
        "from engine.backends.tensorrt.module import EngineError, import_tensorrt\n"
        "try: import_tensorrt('tensorrt-rtx')\n"
        "except EngineError as error: print(error)"
    )
    done = attempt("-c", script)
    if done.returncode == 3:
        pytest.skip("this wheel has the name")
    assert "before the engine could put its library names right" in done.stdout, done.stderr


def test_one_process_uses_one_of_the_two(trt, monkeypatch):
    import polygraphy.backend.trt  # noqa: F401

    class Other:
        __version__ = "10.16.1"

    monkeypatch.setitem(sys.modules, "tensorrt", Other)
    with pytest.raises(EngineError, match="TensorRT or TensorRT-RTX, not both"):
        import_tensorrt("tensorrt")
    Other.__version__ = "10.5.0"
    with pytest.raises(EngineError, match=r"tensorrt 10\.5\.0 is too old: 10\.6 or later"):
        import_tensorrt("tensorrt")
