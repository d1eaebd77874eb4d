"""build-plugin: what it builds, how it fails, and what the libraries hold."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plugin_cuda import toolchain
from plugin_cuda.build import CONVOLUTIONS, build, plan
from plugin_cuda.cli import app
from tests.support import ROOT, attempt

STUB = """
#include "nms_opt.h"
__global__ void nothing() {}
int32_t nms_opt_version(void) { return NMS_OPT_VERSION; }
const char* nms_opt_status_string(int32_t) { return "stub"; }
int32_t nms_opt_workspace_size(const nms_opt_config*, int32_t, size_t*) { return 0; }
int32_t nms_opt_run(const nms_opt_config*, int32_t, const void* const*, const void* const*,
                    const float*, float*, int32_t*, void*, size_t, nms_opt_stream stream) {
  nothing<<<1, 1, 0, reinterpret_cast<cudaStream_t>(stream)>>>();
  return 0;
}
"""


# The command


def run_command(*arguments, root=ROOT, **environment):
    return attempt("-m", "plugin_cuda", *arguments, cwd=root, PYTHONPATH=str(root), **environment)


@pytest.fixture(scope="module")
def stub(tmp_path_factory, plugin_libraries):
    """A copy of the package, elsewhere, whose sources compile in no time."""
    root = tmp_path_factory.mktemp("installed")
    ignored = shutil.ignore_patterns("__pycache__", "bench*")
    shutil.copytree(ROOT / "plugin_cuda", root / "plugin_cuda", ignore=ignored)
    (root / "plugin_cuda" / "src" / "nms_opt.cu").write_text(STUB)
    for name in ("conv/int8_conv", "src/int8_layers"):
        library = Path(name).name
        text = f'#include "{library}.h"\nint32_t {library}_version(void) {{ return 1; }}\n'
        (root / "plugin_cuda" / f"{name}.cu").write_text(text)
    for source in (root / "plugin_cuda" / "tensorrt").glob("*.cpp"):
        source.write_text("")
    return root


def files_of(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_help_is_quick_to_import():
    script = (
        "import sys, plugin_cuda.cli\n"
        "print(*({'numpy', 'torch', 'plugin_cuda.build'} & set(sys.modules)))"
    )
    done = attempt("-c", script)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert "--arch" in run_command("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm80"], "--arch sm80: numbers with commas between expected, as 80,90"),
        (["--arch", "80,,90"], "--arch 80,,90: numbers"),
        (["--arch", ""], "--arch : numbers"),
        (["--arch", "-80"], "--arch -80: numbers"),
        (["--arch", "٨٠"], "numbers with commas"),
        (["--arch", "12345"], "makes no code for architecture 12345; it knows"),
    ],
)
def test_nonsense_architectures(plugin_libraries, tmp_path, arguments, message):
    done = run_command(*arguments, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("build-plugin: error: ")
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_builds_where_it_is_told_and_nowhere_else(stub, tmp_path):
    """In the default folder; the second build has nothing to do."""
    before = files_of(stub)
    done = run_command("--arch", "90,80", root=stub, BUILD_DIR=str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert files_of(stub) == before
    library = tmp_path / "b" / "plugins" / "libnms_opt.so"
    assert re.search(r"^libnms_opt\.so +[\d.]+ MB  sm_80 sm_90$", done.stdout, re.MULTILINE)
    assert ctypes.CDLL(str(library)).nms_opt_version() == 2
    first = library.stat()
    again = run_command("--arch", "90,80", root=stub, BUILD_DIR=str(tmp_path / "b"))
    assert again.stdout == done.stdout
    assert library.stat().st_mtime_ns == first.st_mtime_ns


def test_without_headers_the_plugin_is_left_out(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("plugin_cuda.build.find_tensorrt_headers", lambda: None)
    monkeypatch.setattr("plugin_cuda.build._SOURCES", stub / "plugin_cuda")
    done = CliRunner().invoke(app, ["--arch", "90", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("left out: libnmsoptplugin.so, for no headers of TensorRT 10 or later")
    assert "set TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h" in last
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(".cmake", "libint8_conv.so", "libint8_layers.so", "libnms_opt.so")
    }


def test_convolutions_are_for_one_architecture(stub, tmp_path):
    done = run_command("--arch", "80", "-o", tmp_path / "out", root=stub)
    assert done.returncode == 0, done.stderr
    assert "int8_conv" not in done.stdout
    assert not (tmp_path / "out" / "libint8_conv.so").exists()
    done = run_command("--arch", "80,90", "-o", tmp_path / "out", root=stub)
    assert re.search(r"^libint8_conv\.so +[\d.]+ MB  sm_90a$", done.stdout, re.MULTILINE)


def test_wrong_headers_in_the_environment(plugin_libraries, tmp_path):
    done = run_command("-o", tmp_path / "out", TENSORRT_INCLUDE_DIR=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("build-plugin: error: TENSORRT_INCLUDE_DIR=")


def test_sources_and_flags_that_change(stub, tmp_path, monkeypatch):
    """A changed file is compiled again; other flags get a new build tree."""
    source, out = stub / "plugin_cuda" / "src" / "nms_opt.cu", tmp_path / "out"
    found = ["--arch", "90", "-o", out]
    assert run_command(*found, root=stub).returncode == 0
    library = out / "libnms_opt.so"
    old = ctypes.CDLL(str(library))
    source.write_text(STUB.replace("return NMS_OPT_VERSION", "return 77"))
    try:
        assert run_command(*found, root=stub).returncode == 0
        new = shutil.copy(library, tmp_path / "copy.so")  # one path is loaded once
        assert ctypes.CDLL(str(new)).nms_opt_version() == 77
        assert old.nms_opt_version() == 2  # the one in use is not written over
        source.write_text(STUB.replace("return NMS_OPT_VERSION", "return SEVEN"))
        assert run_command(*found, root=stub, CUDAFLAGS="-DSEVEN=7").returncode == 0
        new = shutil.copy(library, tmp_path / "copy2.so")
        assert ctypes.CDLL(str(new)).nms_opt_version() == 7
    finally:
        source.write_text(STUB)


def test_compile_error_is_shown(stub, tmp_path):
    source = stub / "plugin_cuda" / "src" / "nms_opt.cu"
    source.write_text(f"{STUB}\n#error broken on purpose\n")
    try:
        done = run_command("--arch", "90", "-o", tmp_path / "out", root=stub)
    finally:
        source.write_text(STUB)
    assert done.returncode == 2
    *lines, last = done.stderr.splitlines()
    assert any("nms_opt.cu" in line and "broken on purpose" in line for line in lines)
    assert re.match(r"build-plugin: error: the build with nvcc \d+\.\d+ \(.*\) failed; the l", last)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "libnms_opt.so").exists()


def test_folder_that_cannot_be_written(plugin_libraries, tmp_path):
    (tmp_path / "file").touch()
    done = run_command("--arch", "90", "-o", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write the libraries there: Not a directory" in done.stderr


# The libraries


def exports(library: Path) -> set[str]:
    command = ["nm", "-D", "--defined-only", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.split()[-1] for line in text.splitlines()}


def needed(library: Path) -> set[str]:
    command = ["readelf", "-d", library]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"NEEDED.*\[(.*?)\.so", text))


NO_GPU_NEEDED = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "libpthread", "librt"}
LOADER = {"ld-linux-x86-64", "ld-linux-aarch64"}


def test_kernels_library(plugin_libraries):
    library = plugin_libraries / "libnms_opt.so"
    header = (ROOT / "plugin_cuda" / "include" / "nms_opt.h").read_text()
    declared = set(re.findall(r"^NMS_OPT_API .*?(nms_opt_\w+)\(", header, re.MULTILINE))
    assert len(declared) == 4
    assert exports(library) == declared
    assert needed(library) <= NO_GPU_NEEDED | LOADER
    version = int(re.search(r"#define NMS_OPT_VERSION (\d+)", header)[1])
    assert ctypes.CDLL(str(library)).nms_opt_version() == version


def test_trt_plugin_library(trt_plugin_library):
    """It has what trtexec --dynamicPlugins and Triton look for, and needs nothing of theirs."""
    assert exports(trt_plugin_library) == {"getCreators", "nmsOptTrtHeaders", "setLoggerFinder"}
    assert needed(trt_plugin_library) <= NO_GPU_NEEDED | LOADER
    ctypes.CDLL(str(trt_plugin_library), os.RTLD_NOW)


def test_register_library(trt_plugin_library):
    """It links to no TensorRT, and is not taken for a plugin library itself."""
    library = trt_plugin_library.with_name("libnmsoptplugin_register.so")
    assert exports(library) == set()
    assert needed(library) <= NO_GPU_NEEDED | LOADER


def test_code_is_for_what_was_asked(plugin_libraries):
    program = shutil.which("cuobjdump", path=f"{toolchain.search_path()}:/usr/local/cuda/bin")
    if program is None:
        pytest.skip("needs cuobjdump")
    for name in {*plugin_libraries.glob("*.so")} - {*plugin_libraries.glob("*_register.so")}:
        text = subprocess.run(
            [program, "--list-elf", "--list-ptx", name], check=True, capture_output=True, text=True
        ).stdout
        expected = {"sm_90a"} if name.name == CONVOLUTIONS else {"sm_80", "sm_90"}
        assert set(re.findall(r"\.(sm_\d+a?)\.", text)) == expected


def test_build_returns_what_is_there(plugin_libraries):
    """The command's folder again, by the function."""
    todo = plan(plugin_libraries, [80, 90])
    expected = 3 if todo.headers is None else 5
    assert [path.is_file() for path in build(todo)] == [True] * expected
