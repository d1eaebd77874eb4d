"""Which engines are loaded for --device and --devices, and what is next to a GPU."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.cuda import gpu_index
from harness.errors import HarnessError
from harness.loadgen import numa
from harness.loadgen.numa import cpus_near, gpu_cpus, parse_cpu_list, running_on
from harness.results import devices as module
from harness.results.devices import load_engines, parse_devices

HERE = os.sched_getaffinity(0)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_numbers_of_gpus(numbers):
    assert parse_devices(", ".join(map(str, numbers))) == tuple(numbers)


@pytest.mark.parametrize("text", ["", "0,", "a", "-1", "0;1", "1.5", "٣", "cuda:0"])
def test_what_is_no_list_of_gpus(text):
    with pytest.raises(HarnessError, match="numbers of GPUs expected"):
        parse_devices(text)


@given(st.text(alphabet="0123456789, a-", max_size=8))
def test_any_text_is_a_list_of_gpus_or_one_line(text):
    try:
        found = parse_devices(text)
    except HarnessError as error:
        assert "\n" not in str(error)
    else:
        assert found
        assert len(set(found)) == len(found)


def test_a_gpu_given_twice():
    with pytest.raises(HarnessError, match="'1,0,1' names a GPU twice; see --streams"):
        parse_devices("1,0,1")


@pytest.mark.parametrize(
    ("device", "devices", "loaded"),
    [
        (None, None, [None]),
        ("cuda:1", None, ["cuda:1"]),
        (None, (0,), ["cuda:0"]),
        ("cuda", (2, 0), ["cuda:2", "cuda:0"]),
    ],
)
def test_an_engine_for_each_device(device, devices, loaded, monkeypatch, tmp_path):
    def load(backend, model, *, device, threads, max_batch):
        assert (backend, model, threads, max_batch) == ("tensorrt", tmp_path, 3, 8)
        return SimpleNamespace(manifest={"device": device})

    monkeypatch.setattr(module, "load_engine", load)
    engines = load_engines(
        "tensorrt", tmp_path, device=device, devices=devices, threads=3, max_batch=8
    )
    assert [engine.manifest["device"] for engine in engines] == loaded


@pytest.mark.parametrize(
    ("dtype", "manifest", "said"),
    [
        ("int8", {"provider": "CPUExecutionProvider"}, True),
        ("int8", {"provider": "CPUExecutionProvider", "target": "cpu"}, False),
        ("float32", {"provider": "CPUExecutionProvider"}, False),
        ("int8", {"provider": "CUDAExecutionProvider"}, False),
        ("int8", {}, False),
    ],
)
def test_a_slow_form_of_int8_is_said(dtype, manifest, said, monkeypatch, caplog):
    engine = SimpleNamespace(manifest=manifest, input_spec=SimpleNamespace(dtype=dtype))
    monkeypatch.setattr(module, "load_engine", lambda *_, **__: engine)
    load_engines("onnxruntime", Path("model.onnx"), device=None, devices=None, threads=None)
    assert ("--target cpu' writes is faster" in caplog.text) == said


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_numbers_are_of_gpus_alone(device, tmp_path):
    with pytest.raises(HarnessError, match=f"but the device is {device}"):
        load_engines("onnxruntime", tmp_path, device=device, devices=(0,), threads=None)


@pytest.mark.parametrize(
    ("device", "index"),
    [("cuda", 0), ("cuda:3", 3), ("cuda:12", 12), ("cpu", None), ("cuda:", None), ("cuda:٣", None)],
)
def test_gpu_index(device, index):
    assert gpu_index(device) == index


# ---- NUMA


@given(st.sets(st.integers(0, 300)), st.randoms())
def test_cpu_lists(cpus, random):
    """Written in any mixture of single numbers and ranges."""
    parts, rest = [], sorted(cpus)
    while rest:
        length = 1
        while length < len(rest) and rest[length] == rest[0] + length and random.random() < 0.8:
            length += 1
        parts.append(f"{rest[0]}-{rest[length - 1]}" if length > 1 else str(rest[0]))
        del rest[:length]
    random.shuffle(parts)
    assert parse_cpu_list(",".join(parts) + "\n") == cpus


@pytest.fixture
def machine(tmp_path):
    """A sysfs of two nodes that share this machine's CPUs, and a GPU on one of them."""
    one = min(HERE)

    def make(gpu_node, nodes=({one}, set(range(300)) - {one}, set())):
        for number, cpus in enumerate(nodes):
            folder = tmp_path / "devices/system/node" / f"node{number}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(",".join(map(str, sorted(cpus))) + "\n")
        gpu = tmp_path / "bus/pci/devices/0000:1b:00.0"
        gpu.mkdir(parents=True)
        (gpu / "numa_node").write_text(f"{gpu_node}\n")
        return tmp_path

    return make


def test_cpus_of_a_gpus_node(machine):
    sys = machine(0)
    assert cpus_near("0000:1b:00.0", sys) == {min(HERE)}
    assert cpus_near("0000:1c:00.0", sys) == set()


def test_only_cpus_that_may_be_used(machine):
    assert cpus_near("0000:1b:00.0", machine(1)) == HERE - {min(HERE)}


@pytest.mark.parametrize("node", [-1, 2, 7])
def test_an_unknown_node_and_one_of_memory_alone_have_none(machine, node):
    assert cpus_near("0000:1b:00.0", machine(node)) == set()


def test_one_node_makes_no_difference(machine, monkeypatch):
    monkeypatch.setattr("engine.backends.cuda.pci_bus_id", lambda _: "0000:1b:00.0")
    monkeypatch.setattr(numa, "_SYS", machine(0, nodes=(HERE, set())))
    assert gpu_cpus("cuda:0") is None


def test_gpu_cpus_asks_cuda_where_the_gpu_is(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "engine.backends.cuda.pci_bus_id", lambda index: asked.append(index) or "0000:1b:00.0"
    )
    monkeypatch.setattr(numa, "_SYS", machine(0))
    assert gpu_cpus("cuda:3") == {min(HERE)}
    assert asked == [3]
    assert gpu_cpus("cpu") is None


def test_only_the_thread_stays_on_the_cpus():
    seen = []

    def work():
        with running_on(frozenset({min(HERE)})):
            seen.append(os.sched_getaffinity(0))
        seen.append(os.sched_getaffinity(0))
        with running_on(None):
            seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [{min(HERE)}, HERE, HERE]
    assert os.sched_getaffinity(0) == HERE
