"""Runs and the trees made of them, shared by the tests of this folder."""

from __future__ import annotations

import pytest

from harness.submission.compliance import check_compliance, find_bases
from tests.support.compliance_runs import CheatingEngine, base_runs, benchmark
from tests.support.shared import once
from tests.support.submissions import DETAIL, SUMMARY, edit_log, submit


@pytest.fixture(scope="session")
def runs(shared):
    """Runs and compliance tests of a datacenter system, too short to be submitted."""

    def make(root):
        bench = benchmark(root / "data", CheatingEngine(seconds=0.002))
        base_runs(bench, root / "logs", "Offline", min_query_count=300)
        base_runs(bench, root / "logs", "Server", target_qps=500.0)
        for base in find_bases([root / "logs"]):
            for test in ("TEST01", "TEST04", "TEST05"):
                check_compliance(bench, base, test)

    return once(shared / "runs", make)


def without_errors(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"is_error": true' not in line))


@pytest.fixture(scope="session")
def good(runs, tmp_path_factory):
    """The tree as ten minutes a run on all of COCO would have left it: only the logs differ."""
    tree = tmp_path_factory.mktemp("good")
    submit(runs, tree)
    for path in tree.rglob(DETAIL):
        without_errors(path)
        offline = "Offline" in path.parts
        edit_log(
            path,
            effective_min_duration_ms=600_000,
            effective_accuracy_sample_count=5000,
            effective_samples_per_query=24_576 if offline else 1,
        )
        if path.parent.name == "accuracy":
            continue
        score = "result_samples_per_second" if offline else "result_scheduled_samples_per_sec"
        edit_log(path, result_validity="VALID", **{score: 100.0})
        if not offline:
            edit_log(path, early_stopping_met=True)
        summary = path.with_name(SUMMARY)
        summary.write_text(summary.read_text().replace("is : INVALID", "is : VALID"))
    for path in tree.rglob("verify_performance.txt"):
        path.write_text("Verifying performance.\nTEST PASS\n")
    return tree
