"""That detectors differ by their description alone."""

import re

import pytest

from harness.benchmarks import BENCHMARKS, benchmark_of
from harness.data.dataset import BENCHMARK_SETS
from harness.errors import HarnessError
from harness.loadgen.audit import COMPLIANCE_TESTS
from tests.support import ROOT


def test_no_code_asks_which_detector_it_is():
    """Names of detectors stand in the registry, and in no comparison, key or case anywhere else."""
    detectors = {one.detector for one in BENCHMARKS.values()} | {*BENCHMARKS}
    names = "|".join(sorted(map(re.escape, detectors), key=len, reverse=True))
    asking = re.compile(
        rf"""(==|!=|\bin\b|\bcase\b|startswith\(|removeprefix\()\s*[({{\[]*["'](?:{names})["']"""
        rf"""|["'](?:{names})["']\s*(==|!=|:)"""
    )
    assert asking.search('if model == "ssd-resnet34":')
    assert asking.search('TABLE = {"ssd-resnet34": 1}')
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for room in ("engine", "graph_surgery", "harness", "plugin_cuda")
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in path.read_text().splitlines()
        if asking.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_descriptions(name):
    known = BENCHMARKS[name]
    assert known.name == name
    assert known.dataset in BENCHMARK_SETS
    assert set(known.compliance) <= {*COMPLIANCE_TESTS}
    assert (ROOT / known.weights).is_file() == (not known.models)
    if known.models:  # what is downloaded is where it is looked for
        assert known.weights.name in {model.name for model in known.models}
    assert benchmark_of(known.detector).detector == known.detector


def test_a_detector_without_a_benchmark():
    with pytest.raises(HarnessError, match="no benchmark has the detector 'yolo'; known are ssd"):
        benchmark_of("yolo")
