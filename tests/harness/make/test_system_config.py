"""Which system configuration is taken, and what is refused."""

from __future__ import annotations

import subprocess
import tomllib

import pytest
import tomlkit
from hypothesis import assume, given

from engine.load import BACKENDS
from engine.support.environment import gpu_name
from harness.errors import HarnessError
from harness.loadgen.settings import SCENARIOS, settings_from
from harness.make import system_config as module
from harness.make.arguments import choices
from harness.make.system_config import (
    CONFIGS,
    VERSIONS,
    SystemConfig,
    config_of,
    system_config,
)
from tests.support.fake_gpus import FakeRuntime
from tests.support.formats import Sample, damages

MODEL = "ssd-resnet34"
SHIPPED = sorted(CONFIGS.resolve().glob("*.toml"))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A folder of configurations on a machine without a GPU whose processor is an Example 9."""
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.setattr(module, "CONFIGS", folder)
    monkeypatch.setattr(module, "gpu_name", lambda: None)
    monkeypatch.setattr(module, "cpu_name", lambda: "Example 9 CPU")

    def write(name, machine, text="[default]", benchmark=MODEL):
        path = folder / f"{name}.toml"
        path.write_text(f'[system]\nbenchmark = "{benchmark}"\n{machine}\n{text}\n')
        return path

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_understood(path):
    """Every version of every file gives settings, or names an engine that is not there yet."""
    tables = tomllib.loads(path.read_text())
    for version in VERSIONS:
        arguments = (tables["system"]["benchmark"], version, path.stem)
        if version not in tables:
            with pytest.raises(HarnessError, match=rf"has no \[{version}\]; it has: default"):
                system_config(*arguments)
        elif tables[version]["engine"] not in BACKENDS:
            with pytest.raises(HarnessError, match="not among this release's"):
                system_config(*arguments)
        else:
            config = system_config(*arguments)
            assert settings_from(config.tables, tuple(SCENARIOS), {})


@pytest.mark.parametrize(
    ("gpu", "name", "engine", "batches"),
    [  # NVIDIA's v2.0 configuration of an A100: 64 Offline, 8 Server
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb", "tensorrt", (64, 8)),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb", "tensorrt", (64, 8)),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb", "cudnn", (64, 48)),
        ("NVIDIA H200", "h200-sxm-141gb", "cudnn", (64, 48)),
    ],
)
def test_gpus_are_found_by_the_names_of_their_driver(monkeypatch, gpu, name, engine, batches):
    monkeypatch.setattr(module, "gpu_name", lambda: gpu)
    config = system_config(MODEL, "default", None)
    assert (config.name, config.engine, config.device) == (name, engine, "cuda")
    offline, server = settings_from(config.tables, ("Offline", "Server"), {})
    assert (offline.batch_size, server.batch_size) == batches
    assert server.target_qps < offline.target_qps


def test_what_a_server_runs(write):
    write("sys", 'gpu = "Example"', '[triton]\nengine = "triton"\ndevice = "cuda"')
    write("own", 'cpu = "Example"', '[triton]\nengine = "triton"\nserves = "cudnn"')
    write("bad", 'cpu = "Other"', '[triton]\nengine = "triton"\nserves = "cuddn"')
    assert system_config(MODEL, "triton", "sys").builder == "tensorrt"
    assert system_config(MODEL, "triton", "own").builder == "cudnn"
    with pytest.raises(
        HarnessError, match=r"\[triton\]: serves: one of .*cudnn.* expected, not \"cuddn\""
    ):
        system_config(MODEL, "triton", "bad")


def test_a_machine_without_a_file_gets_the_programs_values(write, monkeypatch):
    """And the name of the host, as in `harness run`: a processor's has spaces."""
    write("l4", 'gpu = "NVIDIA L4"')
    monkeypatch.setattr("platform.node", lambda: "box")
    assert system_config(MODEL, "default", None) == SystemConfig("box")
    assert system_config(MODEL, "triton", None).name == "box"
    with pytest.raises(HarnessError, match="harness tune"):
        system_config(MODEL, "maxq", None)


def test_the_gpu_comes_before_the_processor_and_the_longer_name_first(write, monkeypatch):
    write("any", 'cpu = ""')
    write("example", 'cpu = "Example 9"')
    write("l4", 'gpu = "NVIDIA L4"')
    write("l40", 'gpu = "NVIDIA L40"')
    write("demo", 'gpu = "NVIDIA L40S"', benchmark="ssd-resnet34-demo")
    assert system_config(MODEL, "default", None).name == "example"
    monkeypatch.setattr(module, "gpu_name", lambda: "NVIDIA L40S")
    assert system_config(MODEL, "default", None).name == "l40"
    monkeypatch.setattr(module, "gpu_name", lambda: "NVIDIA H200")
    assert system_config(MODEL, "default", None).name == "example"


def test_version_and_name_choose(write):
    text = '[default]\nthreads = 1\n[maxq]\nthreads = 3\ndevice = "cuda"\n[maxq.Offline]\n'
    path = write("other", 'gpu = "NVIDIA L4"', f"{text}batch_size = 5")
    config = system_config(MODEL, "maxq", "other")
    assert config == SystemConfig(
        "other", path, device="cuda", threads=3, tables={"Offline": {"batch_size": 5}}
    )
    (offline,) = settings_from(config.tables, ("Offline",), {})
    assert offline.batch_size == 5


def test_devices_and_streams(write):
    path = write(
        "here",
        'cpu = "Example 9"',
        "[default]\ndevices = [0, 2]\nstreams = 2\n[default.Server]\nstreams = 3",
    )
    config = system_config(MODEL, "default", None)
    assert (config.source, config.devices) == (path, (0, 2))
    offline, server = settings_from(config.tables, ("Offline", "Server"), {})
    assert (offline.streams, server.streams) == (2, 3)
    assert settings_from(config.tables, ("Server",), {"streams": 1})[0].streams == 1


def test_all_gpus(write, monkeypatch):
    write("here", 'cpu = "Example 9"', '[default]\ndevices = "all"')
    FakeRuntime("NVIDIA H200", "NVIDIA H200").stand_in(monkeypatch)
    assert system_config(MODEL, "default", None).devices == (0, 1)
    FakeRuntime().stand_in(monkeypatch)
    with pytest.raises(HarnessError, match="devices 'all': there is none here: CUDA: no CUDA-cap"):
        system_config(MODEL, "default", None)


@pytest.mark.parametrize(
    ("machine", "text", "message"),
    [
        ('cpu = ""', "[fastest]", "fastest: unknown; known: system, default, triton, maxq"),
        ('cpu = ""', "default = 1\n", "default: unknown"),
        (
            'cpu = ""',
            "[default]\nsessions = 2",
            r"\[default\]: sessions: unknown; known: .*batch",
        ),
        ('cpu = ""', "[default.Batch]\n", r"\[default\]: Batch: unknown"),
        ('cpu = ""', "[default.Offline]\nqps = 1", "Offline.qps: unknown; known: .*target_qps"),
        ('cpu = ""', "[default]\nthreads = 0", "threads: greater than 0 expected, not 0"),
        (
            'cpu = ""',
            "[default]\ndevices = []",
            r"devices: different GPUs as \[0, 1\] expected, not \[\]",
        ),
        (
            'cpu = ""',
            "[default]\ndevices = [-1]",
            r"devices\[0\]: greater than or equal to 0 expected, not -1",
        ),
        (
            'cpu = ""',
            "[default]\ndevices = [1, 1]",
            r"devices: different GPUs as \[0, 1\] expected, not \[1, 1\]",
        ),
        ('cpu = ""', '[default]\nengine = "fast"', 'engine: one of .* expected, not "fast"'),
        ('cpu = ""', "[maxq]", r"has no \[default\]; it has: maxq"),
        ("", "[default]", "either gpu or cpu"),
        ('cpu = ""\ngpu = ""', "[default]", "either gpu or cpu"),
        ("cpu = ", "[default]", "cannot read it"),
    ],
)
def test_bad_files_are_refused(write, machine, text, message):
    path = write("bad", machine, text)
    with pytest.raises(HarnessError, match=message) as error:
        system_config(MODEL, "default", None)
    assert str(path) in str(error.value)


TABLES = Sample(
    {
        "system": {"benchmark": MODEL, "cpu": "Example"},
        "default": {
            "engine": "triton",
            "device": "cuda",
            "devices": [0, 1],
            "threads": 2,
            "url": "localhost:8001",
            "serves": "cudnn",
            "streams": 2,
            "Offline": {"batch_size": 8},
        },
    }
)


def test_the_sample_is_a_configuration(write):
    path = write("good", "")
    path.write_text(tomlkit.dumps(TABLES.document))
    config = system_config(MODEL, "default", None)
    assert (config.engine, config.serves, config.devices) == ("triton", "cudnn", (0, 1))
    assert config.tables == {"streams": 2, "Offline": {"batch_size": 8}}


@given(damages(TABLES, ("replace", "add")))
def test_damage_is_named_by_its_path(write, damage):
    path = write("damaged", "")
    try:
        path.write_text(tomlkit.dumps(damage.document))
    except (ValueError, TypeError):
        assume(False)  # TOML has no null, and whole numbers of 64 bits
    with pytest.raises(HarnessError) as caught:
        config = system_config(MODEL, "default", None)
        settings_from(config.tables, tuple(SCENARIOS), {})
    says = damage.says.replace("default.", "").replace("default: ", "default")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_system_lists_those_of_the_benchmark(write):
    write("one", 'cpu = ""')
    write("two", 'cpu = ""', benchmark="ssd-resnet34-demo")
    with pytest.raises(HarnessError, match=r"no configuration 'three' .*there are: one$"):
        system_config(MODEL, "default", "three")


def test_a_file_by_its_path(write, tmp_path):
    """Wherever it lies and whatever machine it is for, as `harness tune -o` may write it."""
    made = write(
        "one", 'gpu = "Another"', "[default]\nthreads = 3\n[default.Offline]\nbatch_size = 5"
    )
    path = made.rename(tmp_path / "mine.toml")
    config = system_config(MODEL, "default", str(path))
    assert config == config_of(path, "ssd-resnet34")
    assert (config.name, config.source, config.threads) == ("mine", path, 3)
    assert settings_from(config.tables, ["Offline"], {})[0].batch == 5
    with pytest.raises(HarnessError, match="for ssd-resnet34, and the model is of retinanet"):
        config_of(path, "retinanet")
    with pytest.raises(
        HarnessError, match=r"mine\.toml is for ssd-resnet34, not for ssd-resnet34-demo"
    ):
        system_config("ssd-resnet34-demo", "default", str(path))
    with pytest.raises(HarnessError, match=r"mine\.toml has no \[maxq\]; it has: default"):
        system_config(MODEL, "maxq", str(path))
    with pytest.raises(HarnessError, match=r"none\.toml"):
        system_config(MODEL, "default", "none.toml")
    settings = tmp_path / "settings.toml"
    settings.write_text("min_duration_ms = 5")
    assert config_of(settings, "ssd-resnet34") is None


def test_all_stands_for_every_name():
    assert choices(" ALL", ("a", "b"), "letter") == ("a", "b")
    with pytest.raises(HarnessError, match="unknown letter 'all'"):
        choices("a,all", ("a", "b"), "letter")


def test_gpu_name_from_nvidia_smi(monkeypatch):
    """As far as the driver's files are not there, which they are on no machine of the tests."""
    answers = []
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answers.pop())
    for code, output, expected in (
        (0, "NVIDIA L4\nNVIDIA T4\n", "NVIDIA L4"),
        (9, "NVIDIA-SMI has failed\n", None),
        (0, "", None),
    ):
        answers.append(subprocess.CompletedProcess([], code, output, ""))
        assert gpu_name() == expected
