"""Pickles and archives that would take memory or time out of proportion are refused."""

from __future__ import annotations

import pickle
import struct
import zipfile

import pytest
import torch

from export.checkpoint import read_checkpoint
from export.errors import ExportError


def archive(path, program, compression=zipfile.ZIP_STORED, **records):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", program)
        for key, data in records.items():
            file.writestr(f"a/data/{key}", data)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(key, numel, size):
    """The operations that make a float32 tensor."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage + b"J" + struct.pack("<i", numel) + b"tQ")
        + b"K\x00(J"
        + (struct.pack("<i", size) + b"t(K\x01t\x89}tR")
    )


DOUBLED = b"K\x01" + b"2\x86" * 40  # a tuple of itself and itself, 40 times
DEEP = b")" + b"\x85" * 200


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}r\xff\xff\xff\x7f.", "numbers an object 2147483647 after"),
        (b"}p2000000000\n.", "numbers an object 2000000000 after"),
        (b"}" + DOUBLED + b"K\x01s.", "more than 4000000 operations"),
        (b"}(" + DOUBLED + b"K\x01u.", "more than 4000000 operations"),
        (b"}" + DEEP + b"K\x01s.", "nested deeper than 100"),
        (b"}" + b"N0" * 2_000_001 + b".", "more than 4000000 operations"),
        (
            b"}" + b"".join(b"cos\nf%d\n0" % number for number in range(10_001)) + b".",
            "more than 10000 names",
        ),
        (b"}q\x00" + text("model") + b"h\x00s.", "nested deeper than 8 around"),
        (b"ctorch\nSize\n]" + b"(" + b"K\x01" * 100 + b"e\x85R.", "100 dimensions"),
        (b"}" + text("a" * 1001) + tensor("0", 4, 4) + b"s.", "a name of 1001 characters"),
    ],
)
def test_programs(tmp_path, program, message):
    archive(tmp_path / "w.pth", b"\x80\x02" + program, **{"0": bytes(16)})
    with pytest.raises(ExportError, match=message):
        read_checkpoint(tmp_path / "w.pth")


def test_names_that_share_one_storage(tmp_path):
    """1,500 tensors of 1 MiB out of a file of little more than that."""
    one = tensor("0", 2**18, 2**18)
    rows = b"".join(text(f"n{number}") + one for number in range(1500))
    archive(tmp_path / "w.pth", b"\x80\x02}(" + rows + b"u.", **{"0": bytes(2**20)})
    with pytest.raises(ExportError, match="1500 tensors of 1572864000 bytes in a file of"):
        read_checkpoint(tmp_path / "w.pth")


def test_two_names_of_one_tensor_share_it(tmp_path):
    shared = torch.rand(3)
    torch.save({"a": shared, "b": shared, "c": shared[1:]}, tmp_path / "w.pth")
    found = read_checkpoint(tmp_path / "w.pth").tensors
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["c"], shared[1:])


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    program = b"\x80\x02}" + text("a") + tensor("0", 2**22, 2**22) + b"s."
    archive(tmp_path / "w.pth", program, zipfile.ZIP_DEFLATED, **{"0": bytes(2**24)})
    with pytest.raises(ExportError, match=r"an archive of \d+ bytes that unpacks to 1677"):
        read_checkpoint(tmp_path / "w.pth")


class Odd:
    """Pickled with whatever attributes a test gives it."""


def test_modules_whose_names_grow(tmp_path):
    """A module in itself under a long name, and parameters that many modules share."""
    long, wide = Odd(), Odd()
    long._modules = {"a" * 900: long}
    shared = dict.fromkeys(map(str, range(1000)), torch.ones(1))
    wide._modules = {}
    for number in range(1000):
        wide._modules[str(number)] = child = Odd()
        child._parameters = shared
    for tree, message in ((long, r"a name of \d+ characters"), (wide, "more than 100000 tensors")):
        torch.save(tree, tmp_path / "w.pth")
        with pytest.raises(ExportError, match=message):
            read_checkpoint(tmp_path / "w.pth")


def test_pickles_of_the_old_container_are_counted(tmp_path):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    (tmp_path / "w.pth").write_bytes(b"".join([*parts, b"\x80\x02}r\xff\xff\xff\x7f."]))
    with pytest.raises(ExportError, match="numbers an object"):
        read_checkpoint(tmp_path / "w.pth")
