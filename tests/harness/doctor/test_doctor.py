"""``harness doctor`` in environments that lack this or that, and what it counts."""

import json
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from harness.doctor import doctor, resources
from harness.doctor.doctor import parse_smi
from harness.doctor.packages import PROJECT, declared_packages
from harness.doctor.probes import Gpu
from harness.download import openimages
from tests.support import ROOT, command

OPTIONAL = {"torch", "onnxscript", "safetensors", "cuda-bindings", "tensorrt-rtx-cu13", "cmake"}


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory):
    """The project's packages without the metadata that an editable install leaves beside them."""
    folder = tmp_path_factory.mktemp("checkout")
    packages = [part.parent for part in ROOT.glob("*/__init__.py")]
    for part in (*packages, ROOT / "data_maps"):
        (folder / part.name).symlink_to(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCTOR_CHECKOUT", str(folder))
        yield folder


def run_doctor(python=sys.executable, *arguments, **environment):
    """Output of `harness doctor`; it always ends with exit code 0."""
    checkout = os.environ["DOCTOR_CHECKOUT"]
    done = subprocess.run(
        [python, "-m", "harness", "doctor", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": checkout, "COLUMNS": "150", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def report_of(python=sys.executable, **environment):
    report = json.loads(run_doctor(python, "--json", **environment))
    report["abilities"] = {one["name"]: one for one in report["abilities"]}
    return report


def closure(names):
    """Distributions that these need, themselves included, without any extra."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for text in found[name].requires or []:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                todo.append(one.name)
    return found.values()


def interpreter(folder, names, *, project):
    """A virtual environment that holds some of this one's packages and nothing else."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    distributions = list(closure(names))
    for one in distributions:
        for top in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(one.locate_file(top)))
    if project:
        places = [Path(one.locate_file("")) for one in metadata.distributions(name=PROJECT)]
        (info,) = {info for place in places for info in place.glob("ssd_resnet34_trt-*.dist-info")}
        (site / info.name).symlink_to(info)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def dependencies_alone(tmp_path_factory):
    """Python with the project's dependencies and none of its extras."""
    wanted = [Requirement(text) for text in metadata.requires(PROJECT)]
    names = [one.name for one in wanted if one.marker is None]
    return interpreter(tmp_path_factory.mktemp("plain") / "venv", names, project=True)


@pytest.mark.slow
def test_here(tmp_path):
    """What it says of this environment is what pip, git and the system say."""
    (tmp_path / "bin").mkdir()
    report = report_of(BUILD_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True,
        check=True,
    )
    versions = {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
    packages = [one for group in report["packages"].values() for one in group]
    assert {"numpy", "onnxruntime", "torch"} <= {one["name"] for one in packages}
    for one in packages:
        installed = versions.get(one["name"], versions.get(one["name"].replace("-", "_")))
        assert one["installed"] == installed, one["name"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert report["project"]["commit"].startswith(head.stdout.strip())
    assert report["project"]["executable"] == sys.executable
    for name in ("export-onnx", "harness", "engine onnxruntime, cpu"):
        assert report["abilities"][name]["state"] == "works", report["abilities"][name]
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    assert report["resources"]["disk_free"] == pytest.approx(free, rel=0.05)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < report["resources"]["memory_available"] < memory
    assert report["resources"]["memory_total"] <= memory


@pytest.mark.slow
def test_dependencies_alone(dependencies_alone, tmp_path):
    """Every optional part is reported as missing, each with the command that installs it."""
    report = report_of(dependencies_alone, BUILD_DIR=str(tmp_path), PATH="/usr/bin:/bin")
    assert all(one["fits"] for one in report["packages"][""])
    missing = {one["name"] for group in report["packages"].values() for one in group}
    assert {
        one["name"]
        for group in report["packages"].values()
        for one in group
        if not one["installed"]
    } >= OPTIONAL & missing
    abilities = report["abilities"]
    assert abilities["harness"]["state"] == "works", abilities["harness"]
    assert abilities["engine onnxruntime, cpu"]["state"] == "works"
    extras = {"export-onnx": "export", "engine tensorrt-rtx": "rtx"}
    for name, extra in extras.items():
        assert abilities[name]["state"] == "no"
        assert abilities[name]["fix"] == f"pip install '{PROJECT}[{extra}]'"
        assert extra in metadata.metadata(PROJECT).get_all("Provides-Extra")
    assert abilities["libnms_opt.so"]["state"] == "no"
    assert str(tmp_path) in abilities["libnms_opt.so"]["detail"]
    assert abilities["export-onnx"]["fix"] in report["next_step"]


@pytest.mark.slow
@pytest.mark.parametrize("project", [True, False])
def test_next_to_nothing(tmp_path, project):
    """Even without ONNX Runtime, OpenCV and LoadGen it runs, and says what to install."""
    names = ["typer", "rich", "numpy", "packaging", "pydantic"]
    python = interpreter(tmp_path / "venv", names, project=project)
    report = report_of(python)
    for name in ("harness", "export-onnx", "engine onnxruntime, cpu", "engine tensorrt-rtx"):
        assert report["abilities"][name]["state"] == "no"
    assert report["next_step"].startswith("Install ")
    assert "pip install -e ." in report["next_step"]
    assert bool(report["packages"]) == project
    if project:
        assert report["next_step"].split()[1].partition(">")[0] in metadata.requires(PROJECT)[0]


CUDA = """
from types import SimpleNamespace
def cudaDriverGetVersion(): return 0, 12040
def cudaGetDeviceCount(): return 0, 2
def cudaSetDevice(index): return 0,
def cudaGetDeviceProperties(index):
    name = b"NVIDIA H100 80GB HBM3".ljust(256, b"\\0")
    return 0, SimpleNamespace(name=name, major=9, minor=index, totalGlobalMem=85 * 10**9)
"""


def package(folder, name, text):
    place = folder.joinpath(*name.split("."))
    place.mkdir(parents=True, exist_ok=True)
    for parent in (place, *place.parents):
        if parent == folder:
            break
        (parent / "__init__.py").touch()
    (place / "__init__.py").write_text(text)


@pytest.mark.slow
def test_gpus_and_a_library_that_aborts(dependencies_alone, tmp_path):
    """The GPUs are those of the CUDA bindings; a crash in a probe is a line of the report."""
    package(tmp_path, "cuda.bindings.runtime", CUDA)
    package(tmp_path, "tensorrt", "import os, sys\nsys.stderr.write('lost\\n')\nos.abort()")
    package(tmp_path, "torch", "raise OSError('libgone.so: cannot open shared object file')")
    report = report_of(
        dependencies_alone, PYTHONPATH=f"{tmp_path}:{ROOT}", BUILD_DIR=str(tmp_path / "b")
    )
    assert report["gpus"]["cuda"] == "12.4"
    assert report["gpus"]["devices"] == [
        {"name": "NVIDIA H100 80GB HBM3", "compute_capability": c, "memory_bytes": 85 * 10**9}
        for c in ("9.0", "9.1")
    ]
    abilities = report["abilities"]
    assert abilities["engine tensorrt"]["state"] == "no"
    assert "SIGABRT" in abilities["engine tensorrt"]["detail"]
    assert "libgone.so" in abilities["export-onnx"]["detail"]
    assert "onnxruntime-gpu" in abilities["engine onnxruntime, cuda"]["fix"]


@pytest.mark.slow
def test_table(dependencies_alone, tmp_path):
    """GPUs by nvidia-smi where there are no bindings; the tables hold what the JSON does."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '570.86.15, 8.9, 23034, NVIDIA L4'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    output = run_doctor(dependencies_alone, PATH=path, BUILD_DIR=str(tmp_path / "b"))
    for text in ("NVIDIA L4", "8.9", "22 GiB", "[export]", "libnms_opt.so", "4.32 MB", "Next: "):
        assert text in output
    assert Path("/sys/module/nvidia/version").exists() or "570.86.15" in output
    for one in metadata.requires(PROJECT):
        assert Requirement(one).name in output or Requirement(one).name == PROJECT


NAME = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)


@given(st.lists(st.tuples(NAME, st.sampled_from(["7.5", "9.0"]), st.integers(0, 10**7))))
def test_smi_lists_every_gpu(gpus):
    text = "".join(f"580.1, {capability}, {mib}, {name}\n" for name, capability, mib in gpus)
    driver, found = parse_smi(text)
    assert driver == ("580.1" if gpus else None)
    assert list(found) == [Gpu(name, capability, mib * 2**20) for name, capability, mib in gpus]


@given(st.text())
def test_smi_may_print_anything(text):
    driver, found = parse_smi(text)
    assert len(found) <= len(text.splitlines())
    assert (driver is None) == (not found)


@pytest.mark.parametrize("text", ["No devices were found", "580.1, [N/A], [N/A], NVIDIA Thor"])
def test_smi_without_figures(text):
    assert parse_smi(text) == (None, ())


def test_probe_that_hangs(monkeypatch, tmp_path):
    package(tmp_path, "mlperf_loadgen", "import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.5)
    assert doctor._probe("loadgen", tmp_path) == {"error": "no answer within 0.5 s"}


def distribution(folder, name, version):
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    )


def test_versions_that_do_not_do(monkeypatch, tmp_path):
    for name, version in (("polygraphy", "0.1"), ("typer", "of today"), ("rich", "99.0rc1")):
        distribution(tmp_path, name, version)
    monkeypatch.syspath_prepend(tmp_path)
    found = {one.name: one for one in declared_packages()[""]}
    assert (found["polygraphy"].installed, found["polygraphy"].fits) == ("0.1", False)
    assert not found["typer"].fits
    assert found["rich"].fits
    assert found["numpy"].fits


def test_onnxruntime_gpu_stands_in(monkeypatch, tmp_path):
    """It holds the same module; the project must not call for the other one, too."""
    distribution(tmp_path, PROJECT, "1")
    info = next(tmp_path.glob("*.dist-info"))
    with info.joinpath("METADATA").open("a") as file:
        file.write("Requires-Dist: onnxruntime>=1.20\nRequires-Dist: absent-package\n")
    distribution(tmp_path, "onnxruntime-gpu", "1.21")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (runtime, absent) = declared_packages()[""]
    assert (runtime.name, runtime.installed, runtime.fits) == ("onnxruntime-gpu", "1.21", True)
    assert (absent.installed, absent.fits) == (None, False)


def test_needs_are_those_of_the_data():
    """Counts of the map files, sizes of the arrays, the demo's image size."""

    def images(name):
        return len((ROOT / "data_maps" / name).read_text().splitlines())

    sizes = {one.what: one.size for one in resources.NEEDS}
    int8, fp32 = np.zeros((3, 1200, 1200), np.int8), np.zeros((3, 1200, 1200), np.float32)
    val, cal = images("coco/val_map.txt"), images("coco/cal_map.txt")
    assert sizes["COCO validation set, INT8"] == val * int8.nbytes
    assert sizes["COCO calibration set, FP32"] == cal * fp32.nbytes
    (full,) = (size for what, size in sizes.items() if "COCO validation set, FP32" in what)
    assert full == val * fp32.nbytes
    small = np.zeros((3, 800, 800), np.int8).nbytes
    assert (
        sizes["Open Images calibration set, FP32"] == images("openimages/cal_map.txt") * 4 * small
    )
    assert sizes["Open Images validation set, INT8"] == openimages._VAL_IMAGES * small
    (downloaded,) = (size for what, size in sizes.items() if what.startswith("Open Images: "))
    pictures = openimages._VAL_IMAGES + images("openimages/cal_map.txt")
    room = pictures * openimages._IMAGE_SIZE + openimages._TEXT_SIZE
    assert room <= downloaded < 1.01 * room
    demo = images("demo/val_map.txt") + images("demo/cal_map.txt")
    arrays = demo * np.zeros((3, 400, 400), np.float32).nbytes
    assert arrays < sizes["demo, both sets preprocessed"] < 1.25 * arrays


def test_disk_is_counted_together(monkeypatch, tmp_path):
    """What is there is not needed again, and the room for a step is what earlier ones leave."""
    every = [one for one in resources.NEEDS if one.kind == "disk"]
    disk = [one for one in every if one.dataset in (None, "coco")]
    free = sum(one.size for one in disk[:3])
    usage = resources.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)

    def enough():
        found = resources.find_resources(tmp_path / "build").balance
        return [one.enough for one in found if one.need in disk]

    assert enough() == [True] * 3 + [False] * (len(disk) - 3)
    images = tmp_path / "build" / "preprocessed_data" / "coco-cal" / "float32_1200x1200"
    images.mkdir(parents=True)
    with (images / "0.npy").open("wb") as file:
        file.truncate(disk[3].size)  # a sparse file
    assert enough() == [True] * 4 + [False] * (len(disk) - 4)
    made = tmp_path / "build" / "preprocessed_data" / "coco-val" / "int8_1200x1200-0123456789ab"
    made.mkdir(parents=True)
    made.with_name("int8_1200x1200").symlink_to(made.name)
    with (made / "0.npy").open("wb") as file:
        file.truncate(disk[4].size // 2)  # which the link is no second time
    assert enough() == [True] * 4 + [False] * (len(disk) - 4)
    with (made / "0.npy").open("wb") as file:
        file.truncate(disk[4].size)
    assert enough() == [True] * 5 + [False] * (len(disk) - 5)
    # another benchmark's files take no room of these: it needs that of its own, and the demo's
    disk = [one for one in every if one.dataset in (None, "openimages")]
    usage = usage._replace(free=sum(one.size for one in disk[:-1]))
    assert enough() == [True] * (len(disk) - 1) + [False]


@pytest.mark.slow
def test_next_steps(monkeypatch, tmp_path):
    """Where all works: first the demo, then the data of COCO, then nothing."""
    monkeypatch.chdir(ROOT)
    usage = resources.shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor, "_probe", lambda *_: {"detail": "fine", "limit": None})
    monkeypatch.setattr(doctor, "find_spec", lambda _: True)
    monkeypatch.setattr(doctor, "_gpus", lambda _: doctor.Gpus("580.1", "13.0", (), "test"))
    assert doctor.examine(tmp_path).next_step == "Run the demo: make demo"
    monkeypatch.chdir(tmp_path)
    assert doctor.examine(tmp_path).next_step == f"Run the demo: make demo, in {ROOT}"
    monkeypatch.setattr(doctor, "_ROOT", tmp_path)
    assert doctor.examine(tmp_path).next_step.startswith("Fetch COCO")
    monkeypatch.chdir(ROOT)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "ssd-resnet34-demo.nms.onnx").touch()
    step = doctor.examine(tmp_path).next_step
    # room for all but the float validation set, which the benchmark does not need
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=50 * 10**9))
    assert doctor.examine(tmp_path).next_step == step
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=10 * 10**9))
    assert "no room for COCO" in doctor.examine(tmp_path).next_step
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
    for words in step.partition(": ")[2].split(" && "):
        command(*words.split(), "--help")
    # of a data set that is being fetched, the room is missed
    (tmp_path / "data" / "openimages" / "validation" / "data").mkdir(parents=True)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage._replace(free=50 * 10**9))
    step = doctor.examine(tmp_path).next_step
    assert "no room for Open Images validation set, INT8" in step
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
    assert doctor.examine(tmp_path).next_step.startswith("Nothing is missing")
    (tmp_path / "data" / "coco" / "val2017").mkdir(parents=True)
    assert doctor.examine(tmp_path).next_step.startswith("Nothing is missing")


def test_build_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    found = resources.find_resources(tmp_path / "file" / "build")
    assert not found.writable
    assert found.disk_free > 0
