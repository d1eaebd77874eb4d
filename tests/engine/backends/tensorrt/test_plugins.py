"""Plugin libraries that can be used, and that cannot, with a stand-in for TensorRT."""

from __future__ import annotations

import _ctypes
from copy import copy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from engine.backends.tensorrt.plugins import headers_version, load_plugins
from engine.errors import EngineError
from plugin_cuda.toolchain import find_tensorrt_headers


class FakeCreator:
    """A creator; `kind` is its interface."""

    plugin_version, plugin_namespace = "1", ""

    def __init__(self, name, kind="V3ONE"):
        self.name = name
        self.interface_info = SimpleNamespace(kind=f"PLUGIN CREATOR_{kind}")


class FakeTensorRT(ModuleType):
    """A registry without an order, which takes a library's creators, or none."""

    __version__ = "10.16"

    def __init__(self, new, there=()):
        super().__init__("tensorrt")
        self.there, self.new = list(there), new

    @property
    def all_creators(self):  # objects of their own at every call, as in TensorRT's bindings
        return sorted((copy(one) for one in self.there), key=lambda one: one.name)

    def get_plugin_registry(self):
        return self

    def load_library(self, path):
        self.there += self.new
        return path if self.new else None

    def deregister_library(self, handle):
        assert handle
        for one in self.new:
            self.there.remove(one)


def test_plugin_library_that_cannot_be_used(tmp_path, monkeypatch):
    trt = FakeTensorRT([])
    with pytest.raises(EngineError, match="no such plugin library"):
        load_plugins(trt, [tmp_path / "none.so"])
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(EngineError, match=r"cannot load the plugin library: .*text\.so"):
        load_plugins(trt, [text])
    with pytest.raises(EngineError, match="exports no getCreators"):
        load_plugins(trt, [Path(_ctypes.__file__)])  # a shared library, but no plugin
    monkeypatch.setattr("engine.backends.tensorrt.plugins._check_library", lambda *_: None)
    with pytest.raises(EngineError, match="registered none of its plugins"):
        load_plugins(trt, [text])
    old = FakeTensorRT([FakeCreator("NMS_OPT_TRT", "V1")])
    with pytest.raises(EngineError, match="has the interface 'PLUGIN CREATOR_V1'"):
        load_plugins(old, [text])
    assert old.all_creators == []


def test_the_new_plugin_is_found_wherever_it_stands(tmp_path, monkeypatch):
    """As in TensorRT 10.6, where ours came twelfth of forty, among some of older interfaces."""
    monkeypatch.setattr("engine.backends.tensorrt.plugins._check_library", lambda *_: None)
    monkeypatch.setattr("engine.backends.tensorrt.plugins._loaded", set())
    built_in = [FakeCreator("EfficientNMS_TRT", "V1"), FakeCreator("RNNTEncoderPlugin", "V1")]
    trt = FakeTensorRT([FakeCreator("NMS_OPT_TRT")], built_in)
    load_plugins(trt, [tmp_path / "any.so"])
    again = FakeTensorRT([], [*built_in, FakeCreator("NMS_OPT_TRT")])
    with pytest.raises(EngineError, match="registered none of its plugins"):
        load_plugins(again, [tmp_path / "other.so"])


def test_plugin_of_other_headers(trt_plugin_library):
    """The library tells its headers; another major version than runs is refused with both."""
    built = headers_version(trt_plugin_library)
    assert built.startswith(find_tensorrt_headers().version)
    major = int(built.partition(".")[0])
    trt = FakeTensorRT([FakeCreator("NMS_OPT_TRT")])
    trt.__version__ = f"{major + 1}.2.0"
    with pytest.raises(
        EngineError, match=rf"headers of TensorRT {built}, but TensorRT {major + 1}"
    ):
        load_plugins(trt, [trt_plugin_library])
    assert headers_version(Path(_ctypes.__file__)) is None
