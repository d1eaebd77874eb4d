"""The compilers, CMake and TensorRT's headers that build-plugin finds, and in which order."""

from __future__ import annotations

import sys
from importlib import invalidate_caches
from pathlib import Path

import pytest

from plugin_cuda import toolchain
from plugin_cuda.build import ARCHITECTURES, plan
from plugin_cuda.errors import PluginError
from plugin_cuda.toolchain import find_cmake, find_nvcc, find_tensorrt_headers


def nvcc_stand_in(path: Path, codes=("sm_75", "sm_80", "sm_90", "sm_90a")) -> Path:
    """A program that answers the two questions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = "\\n".join(codes)
    path.write_text(
        "#!/bin/sh\n"
        f"case $1 in --version) echo 'Cuda compilation tools, release 13.7, V13.7.1' ;;\n"
        f"--list-gpu-code) printf '{listed}\\n' ;; *) exit 1 ;; esac\n"
    )
    path.chmod(0o755)
    return path


def headers_of(folder: Path, version: str) -> Path:
    """A folder like TensorRT's include."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "NvInferRuntime.h").touch()
    (folder / "NvInferVersion.h").write_text(version)
    return folder


TENSORRT_10_0 = "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 0 //!< minor\n"
TENSORRT_11_4 = (
    "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 4\n"
    "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< major\n"
)
TENSORRT_8_6 = "#define NV_TENSORRT_MAJOR 8\n#define NV_TENSORRT_MINOR 6\n"


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine with no compiler, no CMake and no headers."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDACXX", "TENSORRT_INCLUDE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(toolchain, "_TOOLKIT", tmp_path / "cuda" / "nvcc")
    monkeypatch.setattr(toolchain, "_SYSTEM_HEADERS", (str(tmp_path / "include"),))
    for name in [name for name in sys.modules if name.split(".")[0] in ("nvidia", "kernel_lens")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


# Tools


def test_no_compiler(bare):
    with pytest.raises(PluginError, match=r"no CUDA compiler.*pip install 'ssd-resnet34-trt\[pl"):
        find_nvcc()


def test_order_of_compilers(bare, monkeypatch):
    """From the last resort to the first choice."""
    places = [
        bare / "site" / "nvidia" / "cu12" / "bin" / "nvcc",
        bare / "site" / "nvidia" / "cu13" / "bin" / "nvcc",
        bare / "cuda" / "nvcc",
        bare / "bin" / "nvcc",
    ]
    for place in places:
        nvcc_stand_in(place)
        assert find_nvcc() == toolchain.Nvcc(place, "13.7", (75, 80, 90))
    named = nvcc_stand_in(bare / "own" / "my-nvcc")
    monkeypatch.setenv("CUDACXX", str(named))
    assert find_nvcc().path == named
    monkeypatch.setenv("CUDACXX", str(bare / "none"))
    with pytest.raises(PluginError, match=r"CUDACXX=.*none: no such compiler"):
        find_nvcc()


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n", "no program"])
def test_compiler_that_is_none(bare, text):
    nvcc_stand_in(bare / "bin" / "nvcc").write_text(text)
    with pytest.raises(PluginError, match="is no nvcc that works"):
        find_nvcc()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (None, r"CMake not found; 3\.24 or later"),
        ("cmake version 3.22.1", r"cmake is 3\.22; CMake 3\.24 or later is needed"),
        ("hello", "cmake is of no version; CMake"),
    ],
)
def test_cmake_that_does_not_do(bare, says, message):
    if says is not None:
        program = nvcc_stand_in(bare / "bin" / "cmake")
        program.write_text(f"#!/bin/sh\necho {says}\n")
    with pytest.raises(PluginError, match=message):
        find_cmake()


def test_cmake_beside_python_is_found(bare):
    program = nvcc_stand_in(bare / "cmake")  # in the folder of sys.executable
    program.write_text("#!/bin/sh\necho cmake version 4.0.2\n")
    assert find_cmake() == program


# TensorRT's headers


def test_order_of_headers(bare, monkeypatch):
    assert find_tensorrt_headers() is None
    system = headers_of(bare / "include", TENSORRT_8_6)
    assert find_tensorrt_headers() is None  # too old for getCreators
    headers_of(system, TENSORRT_10_0)
    assert find_tensorrt_headers() == toolchain.TensorRTHeaders(system, "10.0")
    packaged = headers_of(bare / "site" / "kernel_lens" / "include" / "tensorrt", TENSORRT_11_4)
    (bare / "site" / "kernel_lens" / "__init__.py").write_text("raise ImportError('torch')")
    invalidate_caches()
    assert find_tensorrt_headers() == toolchain.TensorRTHeaders(packaged, "11.4")
    own = headers_of(bare / "own", TENSORRT_10_0)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(own))
    assert find_tensorrt_headers().path == own


@pytest.mark.parametrize("version", [None, TENSORRT_8_6, "", "#define NV_TENSORRT_MAJOR x\n"])
def test_wrong_headers_are_an_error(bare, monkeypatch, version):
    folder = bare / "own"
    if version is not None:
        headers_of(folder, version)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(folder))
    with pytest.raises(PluginError, match=r"TENSORRT_INCLUDE_DIR=.*own: no NvInferRuntime\.h of"):
        find_tensorrt_headers()


# Architectures


def test_default_is_what_nvcc_knows(bare):
    codes = ["sm_50", "sm_75", "sm_88", "sm_90", "sm_120", "sm_121", "sm_130"]
    nvcc_stand_in(bare / "bin" / "nvcc", codes)
    nvcc_stand_in(bare / "bin" / "cmake").write_text("#!/bin/sh\necho cmake version 3.24.0\n")
    found = plan(bare / "out", None)
    assert (found.real, found.virtual) == ((75, 90, 120, 121), 121)
    assert found.architectures == "sm_75 sm_90 sm_120 sm_121 compute_121"
    asked = plan(bare / "out", [120, 88, 120])
    assert (asked.real, asked.virtual) == ((88, 120), None)
    with pytest.raises(
        PluginError, match=r"nvcc 13\.7 makes no code for architecture 81; it knows"
    ):
        plan(bare / "out", [90, 81])


def test_every_default_architecture_is_one_of_the_compiler():
    try:
        nvcc = find_nvcc()
    except PluginError as error:
        pytest.skip(str(error))
    if nvcc.version.startswith("13."):
        assert set(ARCHITECTURES) <= set(nvcc.architectures)
