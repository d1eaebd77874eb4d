"""harness download: the benchmark's files from a local server, on disks in every state."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from hashlib import md5, sha256
from pathlib import Path

import pytest

from harness.benchmarks import DEFAULT
from harness.download import coco as coco_files
from harness.download import transfer
from harness.download.download import check_demo, download_data, download_models
from harness.download.record import RECORD, load_record, sole_download
from harness.errors import HarnessError
from harness.lock import LOCK
from tests.support import ROOT
from tests.support.http_files import answers, broken, running_site, serve, stalls, wait_until

VAL = {f"{number:012d}.jpg": b"val image %d" % number * 999 for number in (9, 3, 7, 5)}
CAL = {f"{number:012d}.jpg": b"cal image %d" % number * 500 for number in range(1, 13)}
INSTANCES = b'{"images": [], "annotations": [], "categories": []}'
VAL_ZIP, ANNOTATIONS_ZIP = "/zips/val2017.zip", "/annotations/annotations_trainval2017.zip"
PTH = "/record/3236545/files/resnet34-ssd1200.pytorch"
ONNX = "/record/3228411/files/resnet34-ssd1200.onnx"


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


def described_as(remote, content):
    """The catalogue's entry, for the small file that the test's server has instead."""
    known = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    return dataclasses.replace(remote, **known, unpacked=0 if not remote.unpacked else 1000)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A server with small files under the names of the real ones; the repository's maps."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0))
    maps = tmp_path / "place" / "data_maps" / "coco"
    maps.mkdir(parents=True)
    (maps / "val_map.txt").write_text("\n".join(VAL))
    (maps / "cal_map.txt").write_text("\n".join(CAL))
    monkeypatch.chdir(tmp_path / "place")
    images = make_zip(
        tmp_path / "v.zip", {"val2017/": b"", **{f"val2017/{k}": v for k, v in VAL.items()}}
    )
    instances = {f"annotations/instances_{split}.json": INSTANCES for split in ("val2017", "x")}
    annotations = make_zip(tmp_path / "a.zip", instances)
    with running_site() as site:
        site.files = {VAL_ZIP: images, ANNOTATIONS_ZIP: annotations, PTH: b"p" * 999, ONNX: b"o"}
        site.files |= {f"/train2017/{name}": content for name, content in CAL.items()}
        for name, content in (("IMAGES", images), ("ANNOTATIONS", annotations)):
            known = described_as(getattr(coco_files, name), content)
            monkeypatch.setattr(coco_files, name, known)
        yield site


COCO = Path("build/data/coco")
MODELS = Path("build/models/ssd-resnet34")


def coco(site):
    notes = []
    done = download_data(DEFAULT, Path("build"), site.url, notes.append)
    return [item.new for item in done], notes


def content_of(folder):
    """Path to content of everything below a folder, without what the command keeps for itself."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (RECORD, LOCK)
    }


WHOLE = {
    "annotations/instances_val2017.json": INSTANCES,
    **{f"val2017/{name}": content for name, content in VAL.items()},
    **{f"train2017/{name}": content for name, content in CAL.items()},
}


def test_coco_is_put_where_the_data_set_looks(site):
    assert coco(site) == ([1, 4, 12], [])
    assert content_of(COCO) == WHOLE  # neither archives nor parts are left
    record = load_record(COCO)
    assert {name: record[name] for name in WHOLE} == {
        name: sha256(content).hexdigest() for name, content in WHOLE.items()
    }


def test_second_run_asks_the_server_nothing(site):
    coco(site)
    site.requests.clear()
    assert coco(site) == ([0, 0, 0], [])
    assert site.requests == []


def test_missing_files_come_back_and_nothing_else_is_touched(site):
    coco(site)
    lost = [COCO / "val2017" / next(iter(VAL)), COCO / "train2017" / next(iter(CAL))]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in COCO.rglob("*.jpg")}
    site.requests.clear()
    assert coco(site) == ([0, 1, 1], [])
    assert sorted(site.paths()) == [f"/train2017/{lost[1].name}", VAL_ZIP]
    assert content_of(COCO) == WHOLE
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("name", WHOLE)
def test_changed_file_on_the_disk_is_refused_by_name(site, name):
    coco(site)
    (COCO / name).write_bytes(b"other")
    with pytest.raises(HarnessError, match=f"{name} is not the file that belongs there"):
        coco(site)
    assert (COCO / name).read_bytes() == b"other"


def test_changed_file_on_the_server_is_refused_by_name(site):
    coco(site)
    name = next(iter(CAL))
    (COCO / "train2017" / name).unlink()
    site.files[f"/train2017/{name}"] += b"!"
    with pytest.raises(HarnessError, match=f"{name} is not the expected"):
        coco(site)
    assert not (COCO / "train2017" / name).exists()


def test_changed_archive_is_refused_by_name(site):
    site.files[VAL_ZIP] = site.files[VAL_ZIP][:-1] + b"!"
    with pytest.raises(HarnessError, match=r"not the expected val2017\.zip"):
        coco(site)
    assert list(COCO.glob("val2017*")) == []


def test_files_put_there_by_hand_are_recorded_and_used(site):
    for name, content in WHOLE.items():
        (COCO / name).parent.mkdir(parents=True, exist_ok=True)
        (COCO / name).write_bytes(content)
    new, notes = coco(site)
    assert new == [0, 0, 0]
    assert site.requests == []
    assert len(notes) == 3
    assert "3 more found" in notes[1]
    (COCO / "val2017" / next(iter(VAL))).write_bytes(b"changed since")
    with pytest.raises(HarnessError, match="belongs there"):
        coco(site)


def test_file_in_the_way_of_the_archives_is_refused(site):
    name = list(VAL)[1]
    (COCO / "val2017").mkdir(parents=True)
    (COCO / "val2017" / name).write_bytes(b"somebody's")
    with pytest.raises(HarnessError, match=f"{name} is not the val2017/{name} of"):
        coco(site)
    assert (COCO / "val2017" / name).read_bytes() == b"somebody's"
    (COCO / "val2017" / name).unlink()
    site.requests.clear()
    coco(site)
    assert VAL_ZIP not in site.paths()  # the archive is still there
    assert content_of(COCO) == WHOLE


def test_archive_put_there_by_hand_is_used(site):
    COCO.mkdir(parents=True)
    (COCO / "val2017.zip").write_bytes(site.files[VAL_ZIP])
    coco(site)
    assert VAL_ZIP not in site.paths()
    assert content_of(COCO) == WHOLE


@pytest.mark.parametrize("status", [403, 404, 405])
def test_server_that_gives_no_single_images(site, status):
    for name in CAL:
        site.faults[f"/train2017/{name}"] = [answers(status)]
    with pytest.raises(HarnessError, match=f"answers {status}.*train2017.zip, 18 GB.*--mirror"):
        coco(site)
    assert not any("train2017.zip" in path for path in site.paths())
    assert content_of(COCO) == {k: v for k, v in WHOLE.items() if not k.startswith("train2017")}


def test_images_that_arrived_before_a_failure_are_kept(site):
    last = list(CAL)[-1]
    site.faults[f"/train2017/{last}"] = [answers(404)]
    with pytest.raises(HarnessError, match=last):
        coco(site)
    kept = set(content_of(COCO)) & {f"train2017/{name}" for name in CAL}
    assert {name for name in load_record(COCO) if name.startswith("train")} == kept
    assert coco(site) == ([0, 0, len(CAL) - len(kept)], [])
    assert content_of(COCO) == WHOLE


def test_first_refusal_ends_the_waits_for_the_others(site, monkeypatch):
    monkeypatch.setattr(transfer, "WAITS", (5.0,))
    first, *others = (f"/train2017/{name}" for name in CAL)
    site.faults = {first: [answers(404)], **{path: [answers(503)] for path in others}}
    with pytest.raises(HarnessError, match="404"):
        coco(site)
    assert all(site.paths().count(path) < 2 for path in others)


def test_disk_that_fills_up(site, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("harness.download.unpack.write_atomically", full)
    with pytest.raises(HarnessError, match="No space left on device; BUILD_DIR"):
        coco(site)


def test_small_files_come_several_at_once(site):
    together = threading.Barrier(4)

    def meet(handler):
        together.wait(20)  # breaks, and the connection with it, unless four come together
        serve(handler)

    for name in CAL:
        site.faults[f"/train2017/{name}"] = [meet]
    assert coco(site) == ([1, 4, 12], [])


def test_disk_space_is_looked_at_first(site, monkeypatch):
    big = dataclasses.replace(coco_files.IMAGES, unpacked=10**15)
    monkeypatch.setattr(coco_files, "IMAGES", big)
    with pytest.raises(HarnessError, match=r"1,000,000,\d+ MB needed"):
        coco(site)
    assert site.requests == []


def test_map_that_names_what_the_archive_lacks(site):
    with Path("data_maps/coco/val_map.txt").open("a") as file:
        file.write("\nmine.jpg\n")
    with pytest.raises(HarnessError, match=r"val2017\.zip holds no val2017/mine\.jpg"):
        coco(site)


def test_two_downloads_into_one_folder(site):
    with sole_download(COCO), pytest.raises(HarnessError, match="coco is in use by"):
        coco(site)
    coco(site)


def test_folder_that_cannot_be_made(site):
    Path("build").write_text("a file")
    with pytest.raises(HarnessError, match=r"build/.*Not a directory.*BUILD_DIR"):
        coco(site)


def models(site):
    notes = []
    first, second = DEFAULT.models
    known = dataclasses.replace(DEFAULT, models=(first, described_as(second, b"o")))
    done = download_models(known, Path("build"), site.url, notes.append)
    return [item.new for item in done], notes


def test_models(site):
    site.faults[PTH] = [broken(100)]
    assert models(site)[0] == [1, 1]
    assert content_of(MODELS) == {
        "resnet34-ssd1200.pytorch": b"p" * 999,
        "resnet34-ssd1200.onnx": b"o",
    }
    site.requests.clear()
    assert models(site) == ([0, 0], [])
    assert site.requests == []


def test_model_without_known_hash_is_held_to_the_first_one(site):
    models(site)
    path = MODELS / "resnet34-ssd1200.pytorch"
    path.write_bytes(b"own weights")
    with pytest.raises(HarnessError, match=rf"resnet34-ssd1200\.pytorch is not .*{RECORD}"):
        models(site)
    path.unlink()
    site.files[PTH] = b"q" * 999
    with pytest.raises(HarnessError, match=r"not the expected resnet34-ssd1200\.pytorch"):
        models(site)
    assert not path.exists()


def test_model_of_which_an_md5_alone_is_known(site):
    """Checked on arrival, and of a file put there by hand; the SHA-256 is recorded as well."""
    first, *_ = DEFAULT.models
    right = dataclasses.replace(first, md5=md5(b"p" * 999, usedforsecurity=False).hexdigest())
    known = dataclasses.replace(DEFAULT, models=(right,))
    path = MODELS / first.name

    def get():
        return [one.new for one in download_models(known, Path("build"), site.url, print)]

    site.files[PTH] = b"q" * 999
    with pytest.raises(HarnessError, match=r"not the expected resnet34-ssd1200\.pytorch: its MD5"):
        get()
    assert not path.exists()
    path.write_bytes(b"own weights")
    with pytest.raises(HarnessError, match=r"belongs there: its MD5 .* download it again$"):
        get()
    assert load_record(MODELS) == {}
    path.unlink()
    site.files[PTH] = b"p" * 999
    assert get() == [1]
    assert get() == [0]
    assert load_record(MODELS) == {path.name: sha256(b"p" * 999).hexdigest()}
    path.write_bytes(b"own weights")
    with pytest.raises(HarnessError, match=r"belongs there: its SHA-256"):
        get()


def test_model_that_the_server_does_not_have(site):
    del site.files[ONNX]
    with pytest.raises(HarnessError, match=r"404.*put the file at build/.*ssd1200\.onnx yourself"):
        models(site)
    (MODELS / "resnet34-ssd1200.onnx").write_bytes(b"o")
    assert models(site)[0] == [0, 0]


def test_known_hash_outweighs_the_record(site):
    models(site)
    (MODELS / "resnet34-ssd1200.onnx").write_bytes(b"other")
    record = load_record(MODELS) | {"resnet34-ssd1200.onnx": sha256(b"other").hexdigest()}
    (MODELS / RECORD).write_text(json.dumps(record))
    with pytest.raises(HarnessError, match=r"onnx is not the file that belongs there"):
        models(site)


def command(place, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "download", *arguments],
        cwd=place,
        env={**environment, "PYTHONPATH": str(ROOT), "BUILD_DIR": "build", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_command_killed_and_run_again(site):
    site.files[PTH] = bytes(range(250)) * 8000
    site.faults[PTH] = [stalls(1_500_000)]
    part = MODELS / "resnet34-ssd1200.pytorch.part"
    process = command(".", "model", "--mirror", site.url)
    try:
        wait_until(lambda: part.exists() and part.stat().st_size > 1_000_000)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    arrived = part.stat().st_size
    assert sorted(content_of(MODELS)) == [part.name, f"{part.name}.json"]
    again = command(".", "model", "--mirror", site.url)
    output, errors = again.communicate(timeout=60)
    assert (MODELS / "resnet34-ssd1200.pytorch").read_bytes() == site.files[PTH]
    assert site.requests[1][1]["Range"] == f"bytes={arrived}-"
    # the test's ONNX file is not the official one, which this process knows
    assert again.returncode == 2
    assert output == ""
    assert errors.splitlines()[-1].startswith(f"harness: error: {site.url}{ONNX}: ")
    assert "has 1 bytes, not 80363696" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_demo_set_is_used_where_it_lies(tmp_path, monkeypatch):
    process = command(ROOT, "data", "--demo")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    counts = [
        len((ROOT / f"data_maps/demo/{s}_map.txt").read_text().split()) for s in ("val", "cal")
    ]
    assert f"demo/data/val: {counts[0]} files" in output
    assert f"demo/data/cal: {counts[1]} files" in output
    shutil.copytree(ROOT / "demo" / "data", tmp_path / "demo" / "data")
    shutil.copytree(ROOT / "data_maps", tmp_path / "data_maps")
    monkeypatch.chdir(tmp_path)
    check_demo()
    lost = sorted(Path("demo/data/cal").iterdir())[5]
    lost.unlink()
    with pytest.raises(HarnessError, match=f"{lost} is missing or damaged; .* restore it"):
        check_demo()
    lost.write_bytes(b"")
    with pytest.raises(HarnessError, match=f"{lost} is missing or damaged"):
        check_demo()


def test_demo_takes_no_mirror():
    process = command(ROOT, "data", "--demo", "--mirror", "http://127.0.0.1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("harness: error: --demo")
