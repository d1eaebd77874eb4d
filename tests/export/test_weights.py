"""What training scripts save: the weights are found in it, what lies beside them is left alone."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import functools
import logging
import pathlib
import random
import types
import uuid

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from export.checkpoint import check_tensors, infer_config, read_checkpoint
from export.errors import ExportError
from export.unpickle import UnsafePickleError


class Colour(enum.Enum):
    RED = 1


class Outer:
    class Inner:
        """Pickled by its name in another class."""

    def method(self):
        """Pickled as an attribute of an object."""


class Point(collections.namedtuple("Point", "x y")):
    pass


class Table(dict):
    """A dict of a class of the training script's own."""


class Averaged:
    """An object with a module in it, as the EMA of many training scripts."""

    def __init__(self, model):
        self.ema, self.decay = model, functools.partial(pow, 0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def training():
    """An optimizer, schedulers and a scaler that have made a step."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20]),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ]
    model(torch.ones(1, 3, 9, 9)).sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer,
        "optimizer_state": optimizer.state_dict(),
        "schedulers": [one.state_dict() for one in schedulers],
        "scheduler": schedulers[0],
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


BESIDE = {
    "collections": [
        collections.Counter("abca"),
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1]),
        collections.deque([1, 2], maxlen=3),
        collections.ChainMap({"a": 1}),
        types.SimpleNamespace(a=1),
        argparse.Namespace(lr=0.1, data=pathlib.PosixPath("/data")),
        Table(a=1),
        {1, 2},
        frozenset({3}),
        Point(1, 2),
        slice(1, 2),
        range(3),
        1j,
        bytearray(b"a"),
    ],
    "paths": [pathlib.PosixPath("/a"), pathlib.PurePosixPath("b"), pathlib.PureWindowsPath("c:/")],
    "numpy": [
        np.float32(1),
        np.float64(0.1),
        np.ones(3),
        np.array(["a"], object),
        np.dtype("f4"),
        np.bool_(1),
        np.random.default_rng(0),
        np.random.RandomState(0).get_state(),
    ],
    "torch": [
        torch.device("cpu"),
        torch.float32,
        torch.strided,
        torch.Size([1, 2]),
        torch.complex(torch.ones(2), torch.ones(2)),
        torch.eye(3).to_sparse(),
        torch.get_rng_state(),
        nn.functional.relu,
        torch.nn.init.kaiming_normal_,
    ],
    "dates": [
        datetime.datetime.now(datetime.UTC),
        datetime.timedelta(1),
        datetime.date(2020, 1, 1),
    ],
    "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=3)],
    "functions": [
        functools.partial(print, 1, sep=""),
        len,
        Outer().method,
        "".join,
        logging.getLogger("train"),
        Outer.Inner(),
        Colour.RED,
        {Colour.RED: 1},
        random.getstate(),
        random.Random(3),  # noqa: S311
        Exception("a"),
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("protocol", "zipped"), [(2, True), (4, True), (2, False)])
def test_nothing_beside_the_weights_is_made_or_refused(tmp_path, protocol, zipped):
    path, state = tmp_path / "w.pth", network().state_dict()
    for beside in ({name: values} for name, values in {**BESIDE, "run": training()}.items()):
        torch.save(
            {**beside, "model": state},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        found = read_checkpoint(path)
        assert found.entry == f"its entry model, not read: {next(iter(beside))}"
        assert list(found.tensors) == list(state)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())


def prefixed(prefix, **more):
    return {f"{prefix}{name}": one for name, one in network().state_dict().items()} | more


def compiled_part():
    state = network().state_dict()
    return {name.replace("0.", "0._orig_mod.", 1): one for name, one in state.items()}


@pytest.mark.parametrize(
    ("entry", "saved"),
    [
        ("model", lambda: {"epoch": 3, "model": network(), "ema": None}),
        ("model", lambda: {"model": network().state_dict(), "ema": network().state_dict()}),
        ("model_state_dict", lambda: {"epoch": 3, "model_state_dict": network().state_dict()}),
        ("state_dict", lambda: {"state_dict": prefixed("module."), "best": torch.ones(1)}),
        ("ema.ema", lambda: {"ema": Averaged(network()), "updates": 7}),
        ("ema.module", lambda: {"ema": {"module": network().state_dict(), "n": 3}}),
        ("model.state_dict", lambda: {"model": {"state_dict": network().state_dict()}}),
        ("net", lambda: {"net": network().state_dict(), "accuracy": 0.9}),
        ("of_mine", lambda: {"of_mine": network().state_dict(), "at": {"a": 1}}),
        ("of_mine", lambda: Table(of_mine=network(), epoch=3)),
        ("", lambda: nn.DataParallel(network())),
        ("", lambda: torch.compile(network()).state_dict()),
        ("", lambda: prefixed("module._orig_mod.")),
        ("", lambda: prefixed("_orig_mod.module.")),
        ("", compiled_part),
        ("", lambda: AveragedModel(network()).state_dict()),
        ("", lambda: network().state_dict() | {"epoch": 3, "name": "ssd", "best": 0.3}),
        ("", lambda: Table(network().state_dict())),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_are_found(tmp_path, entry, saved):
    path = tmp_path / "w.pth"
    torch.save(saved(), path)
    found, expected = read_checkpoint(path), network().state_dict()
    assert found.entry.partition(",")[0] == (f"its entry {entry}" if entry else "")
    assert set(found.tensors) == set(expected)
    assert all(torch.equal(found.tensors[name], one) for name, one in expected.items())


def test_parameters_with_attributes(tmp_path):
    model = network()
    model[0].weight.decay = 0.1
    torch.save(model, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth").tensors
    assert torch.equal(found["0.weight"], model[0].weight)


def test_which_weights_are_meant_is_not_guessed(tmp_path):
    torch.save({"a": network(), "b": network().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(ExportError, match="weights under a, b: say with --entry which are meant"):
        read_checkpoint(tmp_path / "w.pth")


def test_an_entry_of_several_is_chosen(tmp_path):
    """Of those of YOLO, timm and DeepSpeed, and of one whose name has dots."""
    plain, averaged = network().state_dict(), {n: t + 1 for n, t in network().state_dict().items()}
    for key, value, entry in (
        ("ema", averaged, "ema"),
        ("state_dict_ema", averaged, "state_dict_ema"),
        ("model_ema", {"module": averaged, "n": 3}, "model_ema"),
        ("model_ema", {"module": averaged, "n": 3}, "model_ema.module"),
        ("a.b", averaged, "a.b"),
    ):
        torch.save({"epoch": 3, "model": plain, key: value}, tmp_path / "w.pth")
        first = read_checkpoint(tmp_path / "w.pth")
        assert torch.equal(first.tensors["0.weight"], plain["0.weight"])
        assert first.entry.endswith(f"; --entry takes other weights: {key}")
        chosen = read_checkpoint(tmp_path / "w.pth", entry=entry)
        assert chosen.keys.startswith(entry)
        assert chosen.tensors.keys() == averaged.keys()
        assert torch.equal(chosen.tensors["0.weight"], averaged["0.weight"])
    with pytest.raises(ExportError, match="no entry emma in it; those that hold weights: model, a"):
        read_checkpoint(tmp_path / "w.pth", entry="emma")
    torch.save(network(), tmp_path / "w.pth")
    with pytest.raises(ExportError, match="no entry _modules in it"):
        read_checkpoint(tmp_path / "w.pth", entry="_modules")
    save_file(plain, tmp_path / "w.safetensors")
    with pytest.raises(ExportError, match="has no entries; leave out --entry"):
        read_checkpoint(tmp_path / "w.safetensors", entry="ema")


def optimizer():
    found = torch.optim.Adam(network().parameters())
    for parameter in found.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    found.step()
    return found.state_dict()


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        (dict, "nothing"),
        (lambda: None, "nothing"),
        (lambda: [torch.ones(1)], "a list"),
        (lambda: {"epoch": 3, "optimizer": optimizer()}, r"epoch \(int\), optimizer \(dict\)"),
        (optimizer, r"state \(dict\), param_groups \(list\)"),
        (lambda: {"model": {}, "epoch": 3}, r"model \(empty dict\), epoch \(int\)"),
        (lambda: {"ema": None}, r"ema \(NoneType\)"),
        (lambda: {str(n): n for n in range(12)}, r"0 \(int\), .*9 \(int\) and 2 more"),
    ],
)
def test_what_is_there_instead_of_weights(tmp_path, saved, found):
    torch.save(saved(), tmp_path / "w.pth")
    with pytest.raises(ExportError, match=f"no weights in it; it holds {found}; needed is a state"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"a": pathlib.PosixPath("/a")}, UnsafePickleError, "calls pathlib.PosixPath to make a"),
        ({"a": np.float32(1)}, UnsafePickleError, "to make a, which no weights need"),
        ({"a": Outer.Inner()}, ExportError, r"'a' is no tensor, but a .*Outer\.Inner"),
        ({"a": {"b": 1}}, ExportError, "'a' is no tensor"),
        ({3: torch.ones(1)}, ExportError, "a int is no name of a tensor"),
        ({pathlib.PosixPath("/a"): torch.ones(1)}, ExportError, "a pathlib.PosixPath is no name"),
        ({"a\x1b[2J": torch.ones(1)}, ExportError, r"'a\\x1b\[2J' is no name of a tensor"),
    ],
)
def test_placeholders_are_no_weights(tmp_path, more, error, message):
    torch.save(network().state_dict() | more, tmp_path / "w.pth")
    with pytest.raises(error, match=message):
        read_checkpoint(tmp_path / "w.pth")


def test_what_is_not_the_models_is_listed_in_part(tmp_path):
    torch.save({f"n{number}": torch.ones(1) for number in range(3000)}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(ExportError, match=r"\n  and \d+ more$"):
        check_tensors(found, infer_config(found))
