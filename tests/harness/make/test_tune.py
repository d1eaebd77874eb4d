"""What `harness tune` finds on engines whose best settings are known."""

from __future__ import annotations

import threading
import time
import tomllib
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.cli.main import main
from harness.errors import RunFailedError
from harness.loadgen.settings import settings_from
from harness.make import system_config as module
from harness.make.tune import (
    PRECISION,
    Tuned,
    Tuning,
    climb,
    highest_valid,
    put,
    read_config,
    search,
)
from tests.support import ROOT
from tests.support.fake_gpus import FakeRuntime
from tests.support.harness_fakes import FakeEngine, Memory, on_gpu


@given(st.floats(0, 2000), st.floats(1 / 32, 1.5), st.floats(1e-3, 2000))
def test_bisection_ends_just_below_the_limit(limit, share, ceiling):
    asked, floor = [], share * ceiling

    def valid(value):
        asked.append(value)
        return value <= limit

    found = highest_valid(valid, floor, ceiling)
    assert len(asked) <= 12
    assert all(floor < value < ceiling for value in asked)
    near = PRECISION / (1 - PRECISION)
    if found is None:
        assert min(limit, ceiling) - floor <= near * floor
    else:
        assert found in asked
        assert found <= limit
        assert min(limit, ceiling) - found <= near * min(limit, ceiling)


@given(st.integers(0, 6), st.integers(1, 200))
def test_climb_finds_the_peak(peak, largest):
    found = climb(lambda size: -abs(size - 2**peak), largest)
    assert max(found) <= largest
    assert max(found, key=found.get) == min(2**peak, largest)
    assert len(found) <= peak + 3  # no more than two beyond the peak


@dataclass
class Device(FakeEngine):
    """A batch takes 8 ms and 0.25 ms an image, from 16 images on 2 ms; one thread, twice that.

    One works at a time; copies, of 6 ms a batch, may overlap it.
    """

    threads: int = 1
    working: threading.Lock = field(default_factory=threading.Lock)

    def infer(self, images):
        time.sleep(0.006)
        per_image = 0.002 if len(images) >= 16 else 0.00025
        with self.working:
            time.sleep((0.008 + per_image * len(images)) * (3 - self.threads))
        return super().infer(images)


@pytest.mark.slow
def test_search_finds_the_best_batch_threads_and_a_valid_rate(monkeypatch):
    monkeypatch.setattr("harness.make.tune.SERVER_QUERIES", 700)
    said = []
    tuning = Tuning("fake", "cpu", 64, 0.1)
    found = search(
        lambda _, threads: (Device(threads=threads),), Memory(100), tuning, 2, said.append
    )
    assert found.offline_batch == 8
    assert found.threads == 2
    assert found.streams == 1
    assert 0 < found.offline_qps <= 8 / 0.016  # what the sleeping allows
    assert found.server_batch == 8
    assert 0 < found.server_qps < found.offline_qps * 1.05
    assert any(f"{found.server_qps:.2f} queries/s" in line and " VALID" in line for line in said)
    assert not any("batch 64" in line for line in said)
    assert any("batch 8, 1 thread, 2 streams" in line for line in said)


@pytest.mark.slow
def test_search_finds_the_streams_that_hide_the_copies(monkeypatch):
    monkeypatch.setattr("harness.make.tune.SERVER_QUERIES", 100)
    monkeypatch.setattr(
        "harness.make.tune.highest_valid", lambda valid, _, qps: valid(qps / 2) or qps / 2
    )
    said = []
    tuning = Tuning("fake", "cuda", 8, 0.2)
    found = search(lambda *_: (Device(threads=2),), Memory(100), tuning, None, said.append)
    assert (found.offline_batch, found.threads) == (8, None)
    assert found.streams > 1
    assert 8 / 0.016 < found.offline_qps <= 8 / 0.010  # what the sleeping allows
    assert found.server_qps == pytest.approx(found.offline_qps / 2)
    assert any(f"Server, batch 8, {found.streams} streams" in line for line in said)


@dataclass
class Several(Device):
    """One of several devices, which works in 4 ms whatever the batch."""

    number: int = 0

    def infer(self, images):
        with self.working:
            time.sleep(0.004)
        return FakeEngine.infer(self, images)


@pytest.mark.slow
def test_several_devices_are_tuned_together(monkeypatch):
    """A full batch of each takes 4 ms: the rate is that of both, and Server's bound holds."""
    monkeypatch.setattr("harness.make.tune.SERVER_QUERIES", 100)
    asked = []
    monkeypatch.setattr(
        "harness.make.tune.highest_valid", lambda _, *ends: asked.append(ends) or ends[1] / 2
    )
    engines = tuple(Several(number=number) for number in range(2))
    tuning = Tuning("fake", "cuda", 4, 0.3, (0, 1))
    found = search(lambda *_: engines, Memory(100), tuning, None, lambda _: None)
    assert 1 * 4 / 0.004 < found.offline_qps <= 2 * 4 / 0.004  # what the sleeping allows
    assert all(engine.batches for engine in engines)
    ((_, ceiling),) = asked
    assert ceiling == pytest.approx(found.offline_qps)


def test_a_trial_that_loses_a_device_tunes_nothing(tmp_path):
    engines = (on_gpu(0), on_gpu(1, fault="lost in result", all_faulty=True))
    tuning = Tuning("fake", "cuda", 1, 0.1, (0, 1))
    with pytest.raises(RunFailedError, match=r"fake:1 \(GPU-1\) lost: nothing is tuned by fewer"):
        search(lambda *_: engines, Memory(100), tuning, None, lambda _: None)


def configured(path, monkeypatch, *more):
    """What `harness tune` tunes with, and the file then, for two GPUs."""
    FakeRuntime("NVIDIA H200", "NVIDIA H200").stand_in(monkeypatch)
    monkeypatch.setattr("harness.make.tune.gpu_name", lambda: "NVIDIA H200")
    tuned = []

    def tune(_route, tuning):
        tuned.append(tuning)
        return Tuned(None, 1, 16, 48.25, 4, 20.5)

    monkeypatch.setattr("harness.make.tune.tune", tune)
    files = [f"--build-dir={path.parent / 'build'}", f"--output={path}", "--force"]
    words = ["harness", "tune", *files, "--engine=cudnn", *more]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="0"):
        main()
    (tuning,) = tuned
    return tuning.devices, tomllib.loads(path.read_text())["default"].get("devices")


@pytest.mark.parametrize(
    ("said", "more", "devices"),
    [
        ("", ["--device=cuda"], None),
        ("", ["--device=cuda", "--devices=1,0"], (1, 0)),
        ("", ["--device=cuda", "--devices=all"], (0, 1)),
        ("devices = [1, 0]", ["--device=cuda"], (1, 0)),
        ('devices = "all"', ["--device=cuda"], (0, 1)),
        ("devices = [0, 1]", ["--device=cuda", "--devices=1"], (1,)),
        ("devices = [0, 1]", ["--device=cuda:1"], None),
    ],
)
def test_the_devices_are_those_asked_for_else_the_files(said, more, devices, tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(f"[system]\nbenchmark = 'ssd-resnet34'\ngpu = 'NVIDIA'\n[default]\n{said}\n")
    found, written = configured(path, monkeypatch, *more)
    assert found == devices
    assert written == (None if devices is None else list(devices))


def test_devices_are_of_gpus_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["harness", "tune", "--devices=0,1"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--devices chooses GPUs, but the device is cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_slower_than_the_bound_gets_no_rate():
    said = []
    engine = FakeEngine(seconds=0.12)  # 100 ms are allowed
    found = search(
        lambda *_: (engine,), Memory(100), Tuning("fake", "cuda", 1, 0.3), None, said.append
    )
    assert (found.server_batch, found.server_qps, found.threads) == (None, None, None)
    assert said[-1] == "Server: one image takes longer than 100 ms"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "lowest"), [(0.06, 1000 / 120), (0.001, None)], ids=["slow", "fast"]
)
def test_rates_that_are_too_slow_to_try(monkeypatch, seconds, lowest):
    """Never under 1/32 of the throughput, nor where 1,000 queries take over 120 s."""
    asked = []

    def never(valid, floor, ceiling):
        asked.append((floor, ceiling))

    monkeypatch.setattr("harness.make.tune.highest_valid", never)
    engine = FakeEngine(seconds=seconds)
    found = search(
        lambda *_: (engine,), Memory(100), Tuning("fake", "cuda", 1, 0.3), None, lambda _: None
    )
    ((floor, ceiling),) = asked
    assert floor == pytest.approx(ceiling / 32 if lowest is None else lowest)
    assert ceiling == pytest.approx(found.offline_qps)
    assert found.server_qps is None


@pytest.mark.parametrize(
    "found", [Tuned(3, 2, 16, 48.25, 2, 20.5), Tuned(None, 1, 16, 48.25, None, None)]
)
def test_the_file_says_what_was_found(tmp_path, monkeypatch, found):
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr(module, "CONFIGS", folder)
    path = folder / "here.toml"
    document = read_config(path, "ssd-resnet34-demo", "cpu")
    put(document, Tuning("onnxruntime", "cpu", 64, 5), found)
    path.write_text(document.as_string())
    assert tomllib.loads(path.read_text())["system"]["cpu"] == module.cpu_name()
    monkeypatch.setattr(module, "gpu_name", lambda: None)
    config = module.system_config("ssd-resnet34-demo", "default", None)
    assert (config.name, config.engine, config.threads) == ("here", "onnxruntime", found.threads)
    offline, server = settings_from(config.tables, ("Offline", "Server"), {})
    assert (offline.streams, server.streams) == (found.streams, found.streams)
    assert (offline.batch_size, offline.target_qps) == (16, 48.25)
    assert (server.batch_size, server.target_qps) == (found.server_batch, found.server_qps)


def tuned_file(path, monkeypatch, found):
    """Let `harness tune` put `found` into the file of this machine at `path`."""
    monkeypatch.setattr("harness.make.tune.tune", lambda *_: found)
    files = [f"--build-dir={path.parent / 'build'}", f"--output={path}", "--force"]
    monkeypatch.setattr("sys.argv", ["harness", "tune", *files, "--engine=cudnn", "--device=cuda"])
    main()


@pytest.mark.parametrize(
    "name", [path.name for path in sorted((ROOT / "configs").glob("?[12]00*.toml"))]
)
def test_a_shipped_file_keeps_what_was_not_measured(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes((ROOT / "configs" / name).read_bytes())
    before = tomllib.loads(path.read_text())
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    monkeypatch.setattr("harness.make.tune.gpu_name", lambda: before["system"]["gpu"])
    with pytest.raises(SystemExit, match="0"):
        tuned_file(path, monkeypatch, Tuned(None, 2, 16, 48.25, 4, 20.5))
    expected = {**before, "default": {**before["default"], "engine": "cudnn", "streams": 2}}
    expected["default"]["Offline"] = {"batch_size": 16, "target_qps": 48.25}
    expected["default"]["Server"] = {"batch_size": 4, "batch_delay_ms": 2.0, "target_qps": 20.5}
    text = path.read_text()
    assert tomllib.loads(text) == expected
    assert [line for line in text.splitlines() if line.startswith("#")] == comments
    (target,) = (line for line in text.splitlines() if line.startswith("target_qps = 20.5"))
    assert "# harness tune, " in target  # not what was said of the old one


@pytest.mark.parametrize(
    "default",
    [
        "default = {engine = 'triton', url = 'a:1', Server = {target_qps = 4.0}}",
        "[default.Server]\ntarget_qps = 4.0\n[triton]\nengine = 'triton'\n[default]\nurl = 'a:1'",
        "default.Server.target_qps = 4.0\ndefault.threads = 3\ndefault.Offline.streams = 4",
    ],
    ids=["inline", "apart", "dotted"],
)
def test_any_way_to_write_it(tmp_path, monkeypatch, default):
    """No rate was valid: Server's stays."""
    path = tmp_path / "mine.toml"
    default = default.split("\n", 1)
    system = "system = {benchmark = 'ssd-resnet34', gpu = 'NVIDIA'}"
    path.write_text("\n".join([system, *default]) + "\n")
    before = tomllib.loads(path.read_text())
    monkeypatch.setattr("harness.make.tune.gpu_name", lambda: "NVIDIA H100")
    with pytest.raises(SystemExit, match="0"):
        tuned_file(path, monkeypatch, Tuned(None, 2, 16, 48.25, None, None))
    found = tomllib.loads(path.read_text())
    assert found.pop("default") == {
        "engine": "cudnn",
        "device": "cuda",
        "streams": 2,
        "Offline": {"batch_size": 16, "target_qps": 48.25},
        "Server": {"target_qps": 4.0},
    }
    before.pop("default")
    assert found == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[system", "cannot read it"),
        ("[system]\nbenchmark = 'ssd-resnet34'\ngpu = 'NVIDIA A100'", "is not for ssd-resnet34 on"),
        ("[system]\nbenchmark = 'ssd-resnet34-demo'\ngpu = ''", "is not for ssd-resnet34 on"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_the_trials(
    tmp_path, monkeypatch, capsys, content, message
):
    path = tmp_path / "mine.toml"
    path.write_text(content)
    monkeypatch.setattr("harness.make.tune.gpu_name", lambda: "NVIDIA H100")
    with pytest.raises(SystemExit, match="2"):
        tuned_file(path, monkeypatch, None)
    assert message in capsys.readouterr().err
    assert path.read_text() == content


def test_a_file_of_the_user_is_not_changed_without_being_asked(tmp_path, monkeypatch, capsys):
    path, weights = tmp_path / "mine.toml", tmp_path / "weights.onnx"
    path.write_text("[system]\nbenchmark = 'ssd-resnet34'\ngpu = 'NVIDIA'\n")
    weights.hardlink_to(path)
    monkeypatch.setattr("harness.make.tune.gpu_name", lambda: "NVIDIA H100")
    monkeypatch.setattr("harness.make.tune.tune", pytest.fail)
    before = path.read_text()
    command = ["harness", "tune", "--engine=cudnn", "--device=cuda", "-o", str(path)]
    for more, message in (
        ([], "exists already: name another, or pass --force to change it"),
        (["--force", "--weights", str(weights)], "is the input; give the output another name"),
    ):
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err == f"harness: error: {path}: {message}\n"
    assert path.read_text() == before
