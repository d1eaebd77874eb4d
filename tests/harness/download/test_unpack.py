"""Unpacking: chosen files of zip archives, good, damaged and malicious."""

from __future__ import annotations

import shutil
import zipfile
from hashlib import sha256

import pytest

from harness.download.unpack import unpack
from harness.errors import HarnessError


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def content_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_unpacked_size_is_looked_at_before_unpacking(tmp_path, monkeypatch):
    class Usage:
        free = 5000

    make_zip(tmp_path / "a.zip", {"fits": bytes(5000), "too large": bytes(5001)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(HarnessError, match="needed"):
        unpack(tmp_path / "a.zip", ["too large"], tmp_path)
    assert not (tmp_path / "too large").exists()
    unpack(tmp_path / "a.zip", ["fits"], tmp_path)


def test_nothing_of_an_archive_leaves_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    link = zipfile.ZipInfo("val2017/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("../out.jpg", f"{tmp_path}/absolute.jpg", "val2017/../../up.jpg", "val2017/a"):
            archive.writestr(name, "x")
        archive.writestr(link, str(tmp_path / "target"))
    unpack(tmp_path / "a.zip", ["val2017/a", "val2017/link.jpg"], folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "in"]
    assert not (folder / "val2017" / "link.jpg").is_symlink()
    assert content_of(folder) == {
        "val2017/a": b"x",
        "val2017/link.jpg": str(tmp_path / "target").encode(),
    }


def test_unpacking_goes_on_where_it_stopped(tmp_path):
    members = {f"f{number}": b"%d" % number * 99 for number in range(5)}
    make_zip(tmp_path / "a.zip", members)
    (tmp_path / "x").mkdir()

    def interrupt(done, total):
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a.zip", list(members), tmp_path / "x", interrupt)
    first = {path.name: path.stat().st_ino for path in (tmp_path / "x").iterdir()}
    assert sorted(first) == ["f0", "f1", "f2"]
    digests = unpack(tmp_path / "a.zip", list(members), tmp_path / "x")
    assert content_of(tmp_path / "x") == members
    assert {name: (tmp_path / "x" / name).stat().st_ino for name in first} == first
    assert digests == {name: sha256(content).hexdigest() for name, content in members.items()}


def test_damaged_archives(tmp_path):
    content = bytes(range(256)) * 40
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:  # stored, so that one byte is one
        archive.writestr("a", content)
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[:500] + b"!" + whole[501:])
    with pytest.raises(HarnessError, match=r"a\.zip is no intact zip file .*CRC"):
        unpack(tmp_path / "a.zip", ["a"], tmp_path)
    (tmp_path / "a.zip").write_bytes(whole[:-30])
    with pytest.raises(HarnessError, match="no intact zip file"):
        unpack(tmp_path / "a.zip", ["a"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
