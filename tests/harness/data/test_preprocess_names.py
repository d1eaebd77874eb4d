"""A set keeps its images whatever is made later, and the name leads to the newest."""

from __future__ import annotations

import errno
import fcntl
import operator
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.preprocessed import load_preprocessed
from engine.errors import EngineError
from engine.protocol import InputSpec
from harness.data import preprocess as module
from harness.data.preprocess import preprocess
from harness.errors import HarnessError
from harness.lock import locked
from tests.support.image_sets import SPEC, make_dataset, run
from tests.support.photos import photo, reference

pytestmark = pytest.mark.slow  # each starts a process or two

A, B = (InputSpec("image", (3, 96, 128), "int8", scale) for scale in (0.02, 0.05))


def steps(image: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(reference(image, 96, 128) / np.float32(scale)), -127, 127)


def folders(root: Path) -> set[str]:
    return {path.name for path in root.glob("out*") if path.is_dir() and not path.is_symlink()}


def test_images_for_another_model_leave_an_open_set_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a test that runs: INT8 images of another scale look whole, and give another mAP."""
    image = photo(40, 50)
    dataset = make_dataset(tmp_path, {"a.png": image})
    run(dataset, tmp_path / "out", A)
    read = load_preprocessed(tmp_path / "out", A)
    first = read.directory
    made = run(dataset, tmp_path / "out", B)
    assert (read.load([0])[0] == steps(image, 0.02)).mean() > 0.999
    assert (made.load([0])[0] == steps(image, 0.05)).mean() > 0.999
    assert (tmp_path / "out").resolve() == made.directory
    assert folders(tmp_path) == {first.name, made.directory.name}
    assert f"kept {first}, which is being read" in capsys.readouterr().out
    del read
    run(dataset, tmp_path / "out", B)
    assert folders(tmp_path) == {made.directory.name}
    assert f"removed {first}" in capsys.readouterr().out


def test_an_image_that_was_replaced_is_refused(tmp_path: Path) -> None:
    run(make_dataset(tmp_path, {"a.png": photo(40, 50), "b.png": photo(50, 40)}), tmp_path / "out")
    opened = load_preprocessed(tmp_path / "out", SPEC)
    opened.load([0, 1])
    path = opened.directory / "b.png.npy"
    os.utime(path, ns=(1, 1))
    opened.load([0])
    with pytest.raises(EngineError, match=r"b\.png\.npy was written since"):
        opened.load([1])


def test_the_new_set_shares_what_is_unchanged(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {f"{n}.png": photo(40, 50, n) for n in range(3)})
    old = run(dataset, tmp_path / "out")
    files = {name: (old.directory / f"{name}.npy").stat().st_ino for name in old.files}
    cv2.imwrite(str(dataset.image_dir / "1.png"), photo(44, 55, 9))
    new = run(dataset, tmp_path / "out")
    assert new.directory != old.directory
    same = {n for n in new.files if (new.directory / f"{n}.npy").stat().st_ino == files[n]}
    assert same == {"0.png", "2.png"}
    np.testing.assert_allclose(old.load([1])[0], reference(photo(40, 50, 1), 96, 128), atol=1e-5)


def test_without_hard_links_all_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path, {f"{n}.png": photo(40, 50, n) for n in range(2)})
    run(dataset, tmp_path / "out")

    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    (dataset.image_dir / "1.png").touch()
    made = run(dataset, tmp_path / "out")
    np.testing.assert_allclose(made.load([0])[0], reference(photo(40, 50, 0), 96, 128), atol=1e-5)


def test_the_same_made_again_is_another_set(tmp_path: Path) -> None:
    """What reads the first, as a test that runs, goes on with it."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    first = run(dataset, tmp_path / "out")
    second = run(dataset, tmp_path / "out", overwrite=True)
    assert second.directory.name == f"{first.directory.name}.2"
    np.testing.assert_array_equal(first.load([0]), second.load([0]))


def test_a_set_under_the_name_itself_gets_a_name_of_its_own(tmp_path: Path) -> None:
    """As they were made before; it is not made again."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    made = run(dataset, tmp_path / "first")
    written = (made.directory / "a.png.npy").stat().st_mtime_ns
    shutil.copytree(made.directory, tmp_path / "out")
    taken = run(dataset, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (taken.directory / "a.png.npy").stat().st_mtime_ns == written


def test_what_is_no_set_is_left_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    for name in ("images", "map.txt"):
        with pytest.raises(HarnessError, match=f"{name} is there and holds no preprocessed images"):
            run(dataset, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert run(dataset, tmp_path / "empty").files == ("a.png",)


def test_a_link_to_another_disk_stays(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/set")
    made = run(dataset, tmp_path / "out")
    assert made.directory.parent == tmp_path / "disk"
    assert (tmp_path / "out").readlink() == Path("disk/set")
    assert load_preprocessed(tmp_path / "out", SPEC).directory == made.directory


def test_a_set_in_the_making_is_left_alone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.jpg": photo(40, 50, 1)})
    out = tmp_path / "out"
    with (
        locked(out, file=tmp_path / "out.lock"),
        pytest.raises(HarnessError, match="/out is in use by process"),
    ):
        run(dataset, out)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("call", ["shutil.rmtree", "remove_others"])
def test_a_set_is_held_to_the_end(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its folder is gone, as there was nothing to do, or has got its name."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    if call == "shutil.rmtree":
        run(dataset, tmp_path / "out")
    refused = []
    real = operator.attrgetter(call)(module)

    def with_a_second(*arguments):
        monkeypatch.setattr(f"harness.data.preprocess.{call}", real)
        real(*arguments)
        with pytest.raises(HarnessError, match="is in use by process"):
            run(dataset, tmp_path / "out")
        refused.append(True)

    monkeypatch.setattr(f"harness.data.preprocess.{call}", with_a_second)
    assert run(dataset, tmp_path / "out").files == ("a.png",)
    assert refused == [True]


@pytest.mark.parametrize("name", ["itself", "link"])
def test_a_finished_set_is_not_written_again(name: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    made = run(dataset, tmp_path / "out").directory
    (tmp_path / "mine").symlink_to(made)
    before = sorted(tmp_path.rglob("*"))
    path = made if name == "itself" else tmp_path / "mine"
    with pytest.raises(
        HarnessError, match=f"{made} is a finished set.* name {tmp_path}/out, which"
    ):
        run(dataset, path, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert load_preprocessed(tmp_path / "out", SPEC).directory == made


def test_a_name_like_that_of_a_set_is_a_name(tmp_path: Path) -> None:
    """As one with a date; what has another name beside it leaves it alone."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    dated = tmp_path / "out-202611301200"
    run(dataset, dated)
    run(dataset, tmp_path / "out")
    run(dataset, tmp_path / "out", overwrite=True)
    assert load_preprocessed(dated, SPEC).files == ("a.png",)
    run(dataset, dated)


def test_without_locks_nothing_is_removed_that_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    first = run(dataset, tmp_path / "out").directory
    second = run(dataset, tmp_path / "out", overwrite=True).directory
    assert folders(tmp_path) == {first.name, second.name}
    said = capsys.readouterr()
    assert f"kept {first}: its file system has no locks" in said.out
    assert "has no locks; out.lock.held stands for one" in said.err


def test_what_was_made_for_another_scale_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted for B, then made for A: the images of B lie in the same folder."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50), "bad.png": photo(8, 8)})
    run(dataset, tmp_path / "out", A)
    (dataset.image_dir / "bad.png").write_bytes(b"")
    with pytest.raises(HarnessError, match="1 of 2 images"):
        run(dataset, tmp_path / "out", B)
    made = run(dataset, tmp_path / "out", A, skip_bad=True)
    assert (made.load([0])[0] == steps(photo(40, 50), 0.02)).mean() > 0.999


def test_the_hint_names_the_data_set(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    command = "harness preprocess MODEL --dataset demo --val_only"
    named = type(dataset)("demo-val", dataset.image_dir, dataset.map_file, None)
    preprocess(
        named,
        A,
        tmp_path / "out",
        workers=1,
        overwrite=False,
        skip_bad=False,
        progress=False,
        say=print,
    )
    with pytest.raises(EngineError, match=f"engine takes 0.05.*run `{command}`"):
        load_preprocessed(tmp_path / "out", B)
    with pytest.raises(EngineError, match=f"holds no preprocessed images; run `{command}` first"):
        load_preprocessed(tmp_path / "none", B, "demo-val")


def test_a_set_for_calibration_is_made_with_cal_only(tmp_path: Path) -> None:
    """Whatever the set was that does not do, and those that are near are named."""
    dataset = make_dataset(tmp_path, {"a.png": photo(40, 50)})
    run(type(dataset)("traffic-val", dataset.image_dir, dataset.map_file, None), tmp_path / "out")
    spec = InputSpec("image", (3, 24, 24), "float32")
    command = "harness preprocess MODEL --dataset {} --cal_only"
    with pytest.raises(EngineError, match=f"takes .*; run `{command.format('traffic')}`$"):
        load_preprocessed(tmp_path / "out", spec, split="cal")
    fp32 = command.format("traffic").replace("--cal_only", "--val_only --formats fp32")
    with pytest.raises(EngineError, match=f"takes .*; run `{fp32}`$"):
        load_preprocessed(tmp_path / "out", spec)
    for place in (tmp_path / "none", tmp_path):
        said = f"run `{command.format('NAME')}` first; there are sets in {tmp_path / 'out'}"
        with pytest.raises(EngineError, match=said):
            load_preprocessed(place, spec, split="cal")


def test_a_folder_of_the_user_that_is_called_like_a_set_stays(tmp_path):
    dataset = make_dataset(tmp_path, {"a.png": np.zeros((9, 9, 3), np.uint8)})
    mine = tmp_path / "out-202611301200"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    run(dataset, tmp_path / "out")
    run(dataset, tmp_path / "out", overwrite=True)
    assert (mine / "precious.txt").read_text() == "mine"
    left = [path.name for path in tmp_path.glob("out-*") if path != mine]
    assert len(left) == 1  # what the link was before is gone


def test_a_loop_of_links_and_no_name_are_one_line(tmp_path):
    dataset = make_dataset(tmp_path, {"a.png": np.zeros((9, 9, 3), np.uint8)})
    (tmp_path / "l1").symlink_to("l2")
    (tmp_path / "l2").symlink_to("l1")
    with pytest.raises(HarnessError, match="a loop of links"):
        run(dataset, tmp_path / "l1")
    with pytest.raises(HarnessError, match="name a folder"):
        run(dataset, Path("/"))
