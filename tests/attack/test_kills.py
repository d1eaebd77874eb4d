"""What counts as half a file, and a few kills; `make attack` has more."""

import json

import cv2
import numpy as np
import pytest

from tests.attack.kills import attack, half_files


def test_half_files_are_found(tmp_path):
    """Each is whole, then cut."""
    (tmp_path / "folder.partial").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    whole = {
        "a.json": json.dumps({"a": list(range(9))}).encode(),
        "b.jpg": cv2.imencode(".jpg", picture)[1].tobytes(),
        "c.txt": b"one\ntwo\n",
        "d.toml": b'[system]\nbenchmark = "ssd-resnet34"\ncpu = ""\n[default]\nengine = "cudnn"\n',
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert half_files(tmp_path, {}) == {}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        (tmp_path / f"{name}.12.tmp").write_bytes(content[:5])
        (tmp_path / "folder.partial" / name).write_bytes(content[:5])
    assert half_files(tmp_path, {}).keys() == whole.keys()
    before = {"a.json": (tmp_path / "a.json").read_bytes(), "b.jpg": whole["b.jpg"]}
    assert half_files(tmp_path, before).keys() == whole.keys() - {"a.json"}  # b.jpg was overwritten


@pytest.mark.slow
def test_kills_leave_nothing_half():
    wrong: list[str] = []
    killed = 0
    for name, found in attack(2, 1, wrong.append):
        assert sum(found.values()) == 2, name
        killed += found["killed"]
    assert wrong == [] and killed
