"""The doctor's look at TensorRT's parts and at Triton servers, with libraries made here."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from engine.backends.tensorrt import parts as tensorrt_parts
from engine.backends.tensorrt.parts import find_parts, loaded_library
from harness.triton.server import server_backends


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A libnvinfer of 10.15.1 in a folder, and a TensorRT of the same version."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "nvinfer.c", tmp_path / "libnvinfer.so.10"
    source.write_text("int getInferLibVersion(void) { return 101501; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setattr(tensorrt_parts, "loaded_library", lambda _: library)
    monkeypatch.setattr(tensorrt_parts, "library_path", lambda: tmp_path / "libnms_opt.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    return tmp_path


def parts(version="10.15.1.29", capability="9.0"):
    found = find_parts(SimpleNamespace(__version__=version), capability)
    return "; ".join(found.found), "; ".join(found.lacking)


def test_an_empty_installation(place):
    found, lacking = parts()
    assert "bindings 10.15.1.29; libnvinfer 10.15.1 (" in found
    assert "no lean runtime (--version-compatible is refused)" in found
    assert "no libnvinfer_builder_resource, so 'engine build' fails" in lacking
    assert "libnmsoptplugin.so, so 'engine build' is refused" in lacking


@pytest.mark.parametrize(
    ("files", "capability", "said"),
    [
        (["_sm90.so.10.15.1", "_sm90.so.10", "_ptx.so.10.15.1"], "9.0", ""),
        ([".so.10.6.0"], "8.9", ""),
        (["_ptx.so.10.15.1", "_sm80.so.10.15.1"], "9.0", "no builder resources for 9.0"),
        (["_ptx.so.10.15.1"], None, ""),
    ],
)
def test_builder_resources_of_this_gpu(place, files, capability, said):
    for name in files:
        (place / f"libnvinfer_builder_resource{name}").touch()
    found, lacking = parts(capability=capability)
    assert ("builder resources for" in lacking) == bool(said)
    assert said in lacking
    assert found.count("sm90") == ("_sm90.so.10" in files)


def test_versions_that_do_not_fit(place):
    _, lacking = parts("10.6.0")
    assert "bindings 10.6.0 with libnvinfer 10.15.1: install one version" in lacking


def test_libraries_of_this_process():
    assert loaded_library("libpython") or loaded_library("libc.so")
    assert loaded_library("libnvinfer_of_nobody.so") is None


def test_backends_of_a_server(tmp_path):
    """Those beside the command, or in the folder that a script names."""
    for name in ("python", "tensorrt"):
        folder = tmp_path / "backends" / name
        folder.mkdir(parents=True)
        (folder / f"libtriton_{name}.so").write_bytes(
            b"\0libnvinfer.so.10\0" if name == "tensorrt" else b"\0"
        )
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin" / "tritonserver"
    server.write_bytes(b"\x7fELF")
    script = tmp_path / "elsewhere"
    script.write_text(f'#!/bin/sh\nexec x --backend-directory="{tmp_path}/backends" "$@"\n')
    for command in (server, script):
        assert server_backends(command) == {"python": "", "tensorrt": "for TensorRT 10"}
