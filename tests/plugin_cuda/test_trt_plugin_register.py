"""libnmsoptplugin_register.so: opened in processes with and without a TensorRT.

TensorRT is a stand-in, fake_nvinfer.cpp, whose registry has the layout of the headers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import ROOT

PLUGIN, REGISTER = "libnmsoptplugin.so", "libnmsoptplugin_register.so"
PLUGINS = "NMS_OPT_TRT 1 NMS_OPT_TRT 2"
"""Names and versions."""

PRELUDE = """
import ctypes, os, sys
from _ctypes import dlclose
def open_library(path, mode=os.RTLD_LOCAL):
    return ctypes.CDLL(str(path), os.RTLD_NOW | mode)
fake, register, *rest = sys.argv[1:]
"""


@dataclass(frozen=True)
class TensorRT:
    """The stand-in of this major version, and the folder of our libraries."""

    library: Path
    major: int
    plugins: Path

    def run(self, script: str, *rest: object, folder: Path | None = None, **environment: str):
        """Run a script in a process of its own; the register library is that of `folder`."""
        register = (folder or self.plugins) / REGISTER
        arguments = [self.library, register, *rest]
        command = [sys.executable, "-c", PRELUDE + script + "\nprint('alive')", *arguments]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=register.parent,
            env={**os.environ, **environment},
        )
        *lines, last = done.stdout.splitlines() or [""]
        assert (done.returncode, last) == (0, "alive"), done.stderr
        return lines, done.stderr.splitlines()


@pytest.fixture(scope="module")
def trt(trt_plugin_library, tmp_path_factory) -> TensorRT:
    from plugin_cuda.toolchain import find_nvcc, find_tensorrt_headers

    headers = find_tensorrt_headers()
    major = int(headers.version.partition(".")[0])
    library = tmp_path_factory.mktemp("tensorrt") / f"libnvinfer.so.{major}"
    compile_fake(library, find_nvcc().path, headers.path)
    return TensorRT(library, major, trt_plugin_library.parent)


def compile_fake(library: Path, nvcc: Path, headers: Path) -> None:
    flags = ["-std=c++17", "-cudart=none", "-Xcompiler=-Wall,-Wextra,-fPIC,-fno-gnu-unique"]
    flags += ["-isystem", headers, "--shared", "-Xlinker=-soname", f"-Xlinker={library.name}"]
    source = ROOT / "tests" / "support" / "fake_nvinfer.cpp"
    subprocess.run([nvcc, *flags, source, "-o", library, "-ldl"], check=True, capture_output=True)


@pytest.fixture
def copied(trt, tmp_path) -> Path:
    """Another folder with our two libraries, of a name that printf would not print."""
    folder = tmp_path / "50% %s off"
    folder.mkdir()
    for name in (PLUGIN, REGISTER):
        shutil.copy(trt.plugins / name, folder / name)
    return folder


def registered(folder: Path) -> list[str]:
    """What the stand-in prints when it took the plugin of a folder."""
    return [f"{folder / PLUGIN}: {PLUGINS}"]


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_registers(trt, mode):
    """However TensorRT was opened: Triton and Python do not make its symbols global."""
    script = f"open_library(fake, os.{mode}); open_library(register)"
    assert trt.run(script) == (registered(trt.plugins), [])


def test_registers_with_a_tensorrt_under_another_name(trt, tmp_path):
    """Linked into the program, for one, or renamed: its symbols are global, or not found."""
    from plugin_cuda.toolchain import find_nvcc, find_tensorrt_headers

    library = tmp_path / "libserver.so"
    compile_fake(library, find_nvcc().path, find_tensorrt_headers().path)
    script = "open_library(rest[0], os.RTLD_GLOBAL); open_library(register)"
    assert trt.run(script, library) == (registered(trt.plugins), [])


def test_the_tensorrt_of_its_major_version_goes_first(trt):
    """Another one, with global symbols, is in the process, too."""
    if (other := rtx_library()) is None:
        pytest.skip("needs TensorRT-RTX")
    script = "open_library(rest[0], os.RTLD_GLOBAL); open_library(fake); open_library(register)"
    assert trt.run(script, other) == (registered(trt.plugins), [])


def test_opened_again(trt):
    """It is registered once and stays so, be all libraries closed in between."""
    script = """
open_library("libstdc++.so.6")  # stays for ever, with the library that brings it
handles = [open_library(fake)._handle] + [open_library(register)._handle for _ in range(2)]
for handle in reversed(handles):
    dlclose(handle)
registry = open_library(fake)
open_library(register)
print(registry.fakeNvinferPlugins())
"""
    assert trt.run(script) == ([*registered(trt.plugins), "2"], [])


def test_path_is_its_own(trt, copied):
    """Relative paths and odd names reach TensorRT as they are."""
    script = f"open_library(fake); open_library('./{REGISTER}')"
    assert trt.run(script, folder=copied) == ([f"./{PLUGIN}: {PLUGINS}"], [])
    script = "open_library(fake); open_library(register)"
    assert trt.run(script, folder=copied) == (registered(copied), [])
    environment = {"LD_LIBRARY_PATH": str(copied)}
    script = f"open_library(fake); open_library('{REGISTER}')"
    assert trt.run(script, folder=trt.plugins, **environment) == (registered(copied), [])


@pytest.mark.parametrize("preload", ["", "RTLD_LOCAL"])
def test_without_tensorrt(trt, tmp_path, preload):
    """None in the process, or one of another major version that keeps its symbols.

    The one that the linker would find is not loaded: the program's own may be another.
    """
    other = tmp_path / f"libnvinfer.so.{trt.major + 1}"
    if preload:
        from plugin_cuda.toolchain import find_nvcc, find_tensorrt_headers

        compile_fake(other, find_nvcc().path, find_tensorrt_headers().path)
    script = "open_library(rest[0])\n" * bool(preload) + "open_library(register)"
    assert trt.run(script, other, LD_LIBRARY_PATH=str(trt.library.parent)) == (
        [],
        [
            f"NMS_OPT_TRT: not registered: this process has not loaded libnvinfer.so.{trt.major}, "
            "which has to come first"
        ],
    )


@pytest.mark.parametrize("version", [8601, 10701, -1, 0])
def test_other_major_version(trt, version):
    """TensorRT 8.6.1, TensorRT-RTX 1.7.1 and nonsense; the registry is not touched."""
    script = "open_library(fake); open_library(register)"
    assert trt.run(script, FAKE_NVINFER_VERSION=str(version)) == ([], [refused(trt, version)])


@pytest.mark.parametrize("step", [-1, 0, 1])
def test_every_minor_version_of_the_major_one(trt, step):
    script = "open_library(fake); open_library(register)"
    for version in (10000 * (trt.major + step), 10000 * (trt.major + step) + 9999):
        lines, errors = trt.run(script, FAKE_NVINFER_VERSION=str(version))
        if step == 0:
            assert (lines, errors) == (registered(trt.plugins), [])
        else:
            assert (lines, errors) == ([], [refused(trt, version)])


def refused(trt: TensorRT, version: int) -> str:
    return (
        f"NMS_OPT_TRT: not registered: getInferLibVersion() of this process is {version}, this "
        f"library is for TensorRT {trt.major}"
    )


def rtx_library() -> Path | None:
    spec = find_spec("tensorrt_rtx_libs")
    folders = (spec and spec.submodule_search_locations) or ()
    return next(
        (path for folder in folders for path in Path(folder).glob("libtensorrt_rtx.so.*")), None
    )


def test_tensorrt_rtx_is_refused(trt):
    """The real one: its registry has the layout of TensorRT 11, its versions are its own."""
    if (library := rtx_library()) is None:
        pytest.skip("needs TensorRT-RTX")
    script = """
version = open_library(rest[0], os.RTLD_GLOBAL).getInferLibVersion()
open_library(register)
print(version)
"""
    lines, errors = trt.run(script, library)
    assert errors == [refused(trt, int(lines[0]))]


@pytest.mark.parametrize("damage", [None, b"", b"no library"])
def test_plugin_that_cannot_be_loaded(trt, copied, damage):
    """Missing or no library: one line, and the process goes on."""
    (copied / PLUGIN).unlink()
    if damage is not None:
        (copied / PLUGIN).write_bytes(damage)
    script = "open_library(fake); open_library(register)"
    assert trt.run(script, folder=copied) == ([f"{copied / PLUGIN}:"], [not_loaded(copied)])


def test_second_copy(trt, copied):
    """A plugin of that name is there already."""
    script = "open_library(fake); open_library(register); open_library(rest[0])"
    lines, errors = trt.run(script, copied / REGISTER)
    assert lines == [*registered(trt.plugins), f"{copied / PLUGIN}:"]
    assert errors == [not_loaded(copied)]


def not_loaded(folder: Path) -> str:
    return (
        f"NMS_OPT_TRT: not registered: {folder / PLUGIN} is missing or damaged, or a plugin of "
        "that name was registered before"
    )
