"""Submission trees of stand-in runs, and edits of their logs."""

from __future__ import annotations

import json

from harness.submission.check import check_submission
from harness.submission.compliance import find_bases
from harness.submission.description import load_description
from harness.submission.tree import write_submission
from tests.support.compliance_runs import SYSTEM

MODEL = f"{SYSTEM}/ssd-resnet34"
LOG = "mlperf_log_accuracy.json"
DETAIL = "mlperf_log_detail.txt"
SUMMARY = "mlperf_log_summary.txt"
OWNER = """
status = "available"
system_type = "datacenter"
accelerators_per_node = 2
[measurements]
retraining = "N"
"""


def owner(folder):
    path = folder / "system.toml"
    path.write_text(OWNER)
    return load_description(path)


def submit(runs, output, division="closed"):
    return write_submission(
        find_bases([runs / "logs"]),
        submitter="Acme",
        division=division,
        description=owner(output),
        annotations=lambda _: runs / "data" / "annotations.json",
        output=output,
    )


def edit_log(path, **values):
    """Give keys of a detail log other values."""
    lines, found = [], set()
    for line in path.read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        found.add(entry["key"])
        entry["value"] = values.get(entry["key"], entry["value"])
        lines.append(f":::MLLOG {json.dumps(entry)}\n")
    assert set(values) <= found, path
    path.write_text("".join(lines))


def errors(tree):
    return [finding for finding in check_submission(tree) if finding.error]
