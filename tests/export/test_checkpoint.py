"""Weight files: every format is read, none runs code, every error names its findings."""

import os
import pickle
import pickletools
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from export.checkpoint import check_tensors, infer_config, load_model, read_checkpoint
from export.errors import ExportError
from export.unpickle import UnsafePickleError
from tests.support import ROOT, attempt

FOREIGN_MODULE = """
    import sys, types, torch
    from safetensors.torch import load_file
    from export.ssd_resnet34.config import SSDConfig
    from export.ssd_resnet34.model import SSDResNet34

    # The class lives in a module that only this process has, as models.ssd_r34 of the reference.
    for name in ("models", "models.ssd_r34"):
        sys.modules[name] = types.ModuleType(name)
    class SSD_R34(SSDResNet34):
        pass
    class Encoder:
        def __init__(self):
            import numpy
            self.boxes, self.scale = torch.ones(3, 4), numpy.float32(0.1)
    for cls in (SSD_R34, Encoder):
        cls.__module__ = "models.ssd_r34"
        setattr(sys.modules["models.ssd_r34"], cls.__name__, cls)
    model = SSD_R34(SSDConfig(400, 81, 4))
    model.load_state_dict(load_file(sys.argv[1]))
    model.encoder = Encoder()
    torch.save(model, sys.argv[2], _use_new_zipfile_serialization=sys.argv[3] == "zip")
"""


def same_weights(path: Path, model: torch.nn.Module) -> bool:
    checkpoint = read_checkpoint(path)
    expected = model.state_dict()
    return list(checkpoint.tensors) == list(expected) and all(
        torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_whole_module_of_a_class_that_is_not_here(
    small_checkpoint, small_model, tmp_path, container
):
    path = tmp_path / "resnet34-ssd1200.pytorch"
    script = textwrap.dedent(FOREIGN_MODULE)
    command = [sys.executable, "-c", script, small_checkpoint, path, container]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    with pytest.raises(ModuleNotFoundError):  # what a plain load would do
        torch.load(path, weights_only=False)
    assert same_weights(path, small_model)
    assert "models.ssd_r34" not in sys.modules


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dicts(small_model, tmp_path, zipped, wrap, prefix):
    path = tmp_path / "weights.pth"
    state = {prefix + name: tensor for name, tensor in small_model.state_dict().items()}
    content = {wrap: state, "epoch": 3} if wrap else state
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same_weights(path, small_model)


def test_half_precision_becomes_float32(small_model, tmp_path):
    half = {
        name: t.half() if t.is_floating_point() else t
        for name, t in small_model.state_dict().items()
    }
    save_file(half, tmp_path / "half.safetensors", {"ssd_config": small_model.config.to_json()})
    checkpoint = read_checkpoint(tmp_path / "half.safetensors")
    model = load_model(checkpoint, infer_config(checkpoint))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.conf[0].weight, half["conf.0.weight"].float())


class Attack:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), f"{os.name}.system"),
        (eval, ("open({!r}, 'w')",), "builtins.eval"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (getattr, (os, "sep"), "builtins.getattr"),
    ],
)
def test_malicious_pickle_is_refused_by_name(tmp_path, container, function, args, name):
    victim = tmp_path / "owned"
    args = [a.format(str(victim)) if isinstance(a, str) else a for a in args]
    if function is getattr:
        args = [Attack(__import__, "os"), "sep"]
        name = "builtins.__import__"
    path = tmp_path / "evil.pth"
    torch.save(
        {"model": {"w": torch.ones(2), "x": Attack(function, *args)}},
        path,
        _use_new_zipfile_serialization=container == "zip",
    )
    with pytest.raises(UnsafePickleError, match=name):
        read_checkpoint(path)
    assert not victim.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", [0, 70_000])
def test_torchscript_archive_is_refused(tmp_path, padding):
    """Also where trailing bytes hide the archive from one zip reader and not from another."""
    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2)), path)
    path.write_bytes(path.read_bytes() + bytes(padding))
    with pytest.raises(ExportError, match="corrupt" if padding else "TorchScript"):
        read_checkpoint(path)


def legacy_file(path: Path, program: bytes) -> None:
    """A file of the old container whose object is an arbitrary pickle program."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join([*parts, program, pickle.dumps([], 2)]))


def test_pickle_cannot_change_a_function_or_write_a_source_patch(tmp_path):
    """BUILD on a function, then a module record whose source differs, made torch.load write."""
    program = pickletools.optimize(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(}}X\x08\x00\x00\x00"
        b"__name__X\x05\x00\x00\x00ownedstb0}."
    )
    legacy_file(tmp_path / "w.pth", program)
    name = torch._utils._rebuild_tensor_v2.__name__
    with pytest.raises(ExportError):
        read_checkpoint(tmp_path / "w.pth")
    assert torch._utils._rebuild_tensor_v2.__name__ == name
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"(ios\nsystem\n.", "no tensor in it"),  # INST without arguments only makes an object
        (b"(X\x02\x00\x00\x00lsios\nsystem\n.", r"calls (posix|nt|os)\.system"),  # INST
        (b"(cos\nsystem\nX\x02\x00\x00\x00lso.", r"calls (posix|nt|os)\.system"),  # OBJ
        (b"cos\nsystem\n(X\x02\x00\x00\x00lst\x81.", "not an|holds|no tensor"),  # NEWOBJ
        (b"(X\x04\x00\x00\x00evilK\x01tQ.", "saved as 'evil'"),  # persistent id
        (b"\x82\x01.", "corrupt"),  # EXT1
    ],
)
def test_every_way_of_calling_is_closed(tmp_path, program, message):
    legacy_file(tmp_path / "w.pth", b"\x80\x02" + program)
    with pytest.raises(ExportError, match=message):
        read_checkpoint(tmp_path / "w.pth")


class Odd:
    """Pickled with whatever attributes a test gives it."""


def test_module_trees_that_are_none(tmp_path):
    shared = Odd()
    for _ in range(40):  # 2^40 names from 40 objects
        parent = Odd()
        parent._modules = {"a": shared, "b": shared}
        shared = parent
    cycle = Odd()
    cycle._modules = {"a": cycle}
    listed = Odd()
    listed._parameters = [1, 2]
    for tree, message in ((shared, "modules"), (cycle, "modules"), (listed, "corrupt")):
        torch.save(tree, tmp_path / "w.pth")
        with pytest.raises(ExportError, match=message):
            read_checkpoint(tmp_path / "w.pth")


class Thnn:
    """What every module of torch 1.1 and before pickled as its ``_backend``."""

    def __reduce__(self):
        from torch.nn.backends.thnn import _get_thnn_function_backend

        return _get_thnn_function_backend, ()


@pytest.mark.filterwarnings("ignore")
def test_module_of_an_old_torch(tmp_path, monkeypatch):
    """The old container stores the sources of the classes, which differ from today's."""
    source = torch.serialization.get_source_lines_and_file

    def older(*args):
        lines, number, file = source(*args)
        return ["# as an older torch had it\n", *lines], number, file

    monkeypatch.setattr(torch.serialization, "get_source_lines_and_file", older)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    for module in model.modules():
        module._backend = Thnn()
    torch.save(model, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert same_weights(tmp_path / "w.pth", model)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "legacy.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.3, 0.999])
def test_truncated_file(small_checkpoint, small_model, tmp_path, suffix, keep):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        path.write_bytes(small_checkpoint.read_bytes())
    else:
        torch.save(small_model.state_dict(), path, _use_new_zipfile_serialization=suffix == "pth")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ExportError, match=r"truncated|unknown format"):
        read_checkpoint(path)


@settings(max_examples=40)
@given(position=st.integers(0, 2**16), value=st.integers(0, 255), container=st.booleans())
def test_damaged_pickle_is_an_error_or_a_checkpoint(tmp_path, position, value, container):
    """One changed byte never ends in anything but an ExportError or a state dict."""
    path = tmp_path / "damaged.pth"
    torch.save(
        {"a": torch.ones(3), "b": torch.zeros(2, 2)}, path, _use_new_zipfile_serialization=container
    )
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        assert read_checkpoint(path).tensors
    except ExportError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "content", [b"GIF89a", b"", pickle.dumps({"a": 1}), b"version https://git-lfs"]
)
def test_unknown_format(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ExportError, match="unknown format"):
        read_checkpoint(tmp_path / "w.pth")


def test_plain_zip_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ExportError, match="corrupt"):
        read_checkpoint(tmp_path / "w.pth")


def test_missing_file_and_foreign_content(tmp_path):
    with pytest.raises(ExportError, match="No such file"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(ExportError, match="'epoch' is no tensor"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save([torch.ones(1)], tmp_path / "w.pth")
    with pytest.raises(ExportError, match="holds a list"):
        read_checkpoint(tmp_path / "w.pth")


def test_every_problem_is_listed_with_the_nearest_name(small_model, tmp_path):
    state = dict(small_model.state_dict())
    state["backbone.layer1.0.weight"] = state.pop("model.layer1.0.weight")
    state["conf.3.bias"] = torch.zeros(7)
    state["loc.1.bias"] = torch.full_like(state["loc.1.bias"], float("nan"))
    del state["additional_blocks.4.2.bias"], state["model.layer1.1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(ExportError) as caught:
        check_tensors(checkpoint, small_model.config)
    text = str(caught.value)
    assert "in 5 points" in text
    assert "missing model.layer1.0.weight [4, 3, 7, 7]" in text
    assert "missing additional_blocks.4.2.bias [16]" in text
    assert "unexpected backbone.layer1.0.weight" in text
    assert "nearest expected: model.layer1.0.weight" in text
    assert "wrong shape conf.3.bias: [7], expected [486]" in text
    assert "not finite loc.1.bias: 24 of 24" in text


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "model.layer1.0.weight",
            torch.zeros(7, 3, 7, 7),
            r"model\.layer1\.0\.weight: \[7, 3, 7, 7\]",
        ),
        ("conf.0.bias", torch.zeros(3), r"wrong shape conf\.0\.bias: \[3\], expected \[324\]"),
        (
            "loc.0.bias",
            torch.zeros(16, dtype=torch.int8),
            "not floating point loc.0.bias: torch.int8",
        ),
    ],
)
def test_tensors_that_tell_the_configuration_may_be_wrong(
    small_model, tmp_path, name, tensor, message
):
    torch.save({**small_model.state_dict(), name: tensor}, tmp_path / "w.pth")
    checkpoint = read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(ExportError, match=message):
        check_tensors(checkpoint, infer_config(checkpoint))


def test_foreign_configuration_in_the_metadata(tmp_path):
    for text in ('{"image_size": 1e400}', '{"width": 7.9}', '{"width": true}'):
        save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", {"ssd_config": text})
        with pytest.raises(ExportError, match=r"w\.safetensors: ssd_config in its metadata"):
            read_checkpoint(tmp_path / "w.safetensors")


def test_command_errors_are_short_and_without_traceback(small_checkpoint, tmp_path):
    (tmp_path / "there.onnx").touch()
    for output, message in [
        (tmp_path / "there.onnx", "exists already"),
        (tmp_path / "no" / "a.onnx", "no such folder"),
    ]:
        done = attempt("-m", "export", "--weights", small_checkpoint, "-o", output)
        assert done.returncode == 2
        assert done.stderr.startswith("export-onnx: error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = attempt("-m", "export", "--weights", tmp_path / "none", "-o", tmp_path / "a.onnx")
    assert done.returncode == 2
    assert "cannot read the weights" in done.stderr
    assert (tmp_path / "there.onnx").stat().st_size == 0
