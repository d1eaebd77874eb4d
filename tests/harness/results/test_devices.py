"""Which engines are loaded for --device and --devices, and what is next to a GPU."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.cuda import check, describe_gpu, gpu_index, use_gpu
from engine.errors import EngineError, SessionLostError
from engine.manifest import save_engine
from harness.cli.main import main
from harness.errors import HarnessError
from harness.loadgen import numa
from harness.loadgen.numa import cpus_near, gpu_cpus, parse_cpu_list, running_on
from harness.results import devices as module
from harness.results.devices import load_engines, parse_devices
from tests.support.fake_gpus import Code, FakeRuntime
from tests.support.manifests import PLAN, manifest

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


def test_all_gpus_are_those_that_the_driver_tells(monkeypatch):
    FakeRuntime(*["NVIDIA H200"] * 3).stand_in(monkeypatch)
    assert parse_devices("all") == (0, 1, 2)
    assert str(describe_gpu(2)) == (
        "cuda:2 (NVIDIA H200, GPU-00000000-0000-0000-0000-000000000002)"
    )
    assert describe_gpu(2).identity == {
        "index": 2,
        "name": "NVIDIA H200",
        "uuid": "GPU-00000000-0000-0000-0000-000000000002",
        "pci": "0000:02:00.0",
    }


@pytest.mark.parametrize(
    "command",
    [
        ["run", "model.onnx", "--engine", "cudnn"],
        ["make", "run", "--benchmarks", "ssd-resnet34-demo"],
        ["tune", "--device", "cuda", "--engine", "cudnn"],
    ],
    ids=lambda words: words[0],
)
def test_all_of_no_gpus_is_one_line(command, monkeypatch, capsys, tmp_path):
    FakeRuntime().stand_in(monkeypatch)
    words = ["harness", *command, "--devices=all", f"--build-dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == (
        "harness: error: devices 'all': there is none here: CUDA: no CUDA-capable device is "
        "detected (cudaErrorNoDevice)\n"
    )


def test_gpus_of_another_model_are_refused_each_by_name(monkeypatch, tmp_path):
    FakeRuntime("NVIDIA H200", "NVIDIA A10", "NVIDIA H200", "NVIDIA L4").stand_in(monkeypatch)
    monkeypatch.setattr(module, "load_engine", pytest.fail)
    with pytest.raises(HarnessError) as caught:
        load_engines("cudnn", tmp_path, device=None, devices=(0, 1, 2, 3), threads=None)
    said = str(caught.value)
    first, _, others = said.partition("is the first")
    assert "cuda:0 (NVIDIA H200, GPU-" in first
    assert "cuda:1 (NVIDIA A10, GPU-" in others
    assert "cuda:3 (NVIDIA L4, GPU-" in others
    assert "cuda:2" not in said
    assert "\n" not in said


@pytest.mark.parametrize("gpu", ["NVIDIA H200", None])
def test_a_plan_of_another_gpu_is_refused_before_the_run(gpu, monkeypatch, tmp_path):
    """By the model, or by the compute capabilities that it was built for ahead of time."""
    FakeRuntime(*["NVIDIA H100 NVL"] * 2, capability=(8, 6)).stand_in(monkeypatch)
    said = manifest(gpu=gpu, compute_capabilities=("9.0",) if gpu is None else ("8.6",))
    save_engine(tmp_path / "model.engine", PLAN, said)
    trt = SimpleNamespace(__version__=said.version)
    monkeypatch.setattr("engine.backends.tensorrt.engine.import_tensorrt", lambda _: trt)
    monkeypatch.setattr("engine.backends.tensorrt.engine.deserialize", pytest.fail)
    built = "gpu NVIDIA H200, here it is NVIDIA H100 NVL"
    if gpu is None:
        built = "compute_capabilities 9.0, here it is 8.6"
    with pytest.raises(EngineError, match=f"model.engine: built for {built}; build it again"):
        load_engines(
            "tensorrt", tmp_path / "model.engine", device=None, devices=(0, 1), threads=None
        )


@pytest.mark.parametrize("name", ["cudaErrorECCUncorrectable", "cudaErrorUnknown"])
def test_a_broken_gpu_loses_its_session(name, monkeypatch):
    runtime = FakeRuntime("NVIDIA H200").stand_in(monkeypatch)
    runtime.failing = Code(999, name)
    with pytest.raises(SessionLostError, match=rf"device 0 can be used: CUDA: .* \({name}\)"):
        use_gpu(0)


@pytest.mark.parametrize("name", ["cudaErrorIllegalAddress", "cudaErrorLaunchFailure"])
def test_what_a_program_may_have_done_itself_ends_the_run(name, monkeypatch):
    FakeRuntime("NVIDIA H200").stand_in(monkeypatch)
    with pytest.raises(EngineError, match=name) as caught:
        check((Code(700, name),))
    assert not isinstance(caught.value, SessionLostError)


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
    FakeRuntime(*["NVIDIA H200"] * 3).stand_in(monkeypatch)

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
