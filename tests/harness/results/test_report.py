"""The table of results on a terminal of 80 columns, and as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from harness.results.report import print_table, to_csv
from harness.results.result import RunResult
from tests.harness.results.test_result import SAMPLE

LONG = {"model": "a-model-of-a-very-long-name-" * 3 + "[/x].onnx", "backend": "onnxruntime"}
FOLDER = Path("/logs/a-run-of-a-very-long-name/box/ssd-resnet34/MultiStream/PerformanceOnly")


def result(**changes):
    plain = {"errors": (), "warnings": (), "lost_devices": ()}
    return RunResult(**(SAMPLE.document | plain | changes))


@pytest.fixture
def run():
    figures = {
        "samples_per_second": 123456.789,
        "latency_ms": {"p50": 12345.678, "p99": 0.5},
        "accuracy": None,
    }
    engine = LONG | {"gpu": "NVIDIA H200 NVL of a very long name"}
    return FOLDER, result(scenario="MultiStream", engine=engine, **figures)


def test_table_fits_80_columns_and_breaks_nothing_off(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table([run])
    table = capsys.readouterr().out.split("└")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    columns = [
        "".join(parts)
        for parts in zip(*(line.split("│")[1:-1] for line in table if "│" in line), strict=True)
    ]
    text = ["".join(column.split()) for column in columns]
    assert LONG["model"] + "onnxruntimeNVIDIAH200NVLofaverylongname" == text[1]
    assert text[0] == "a-run-of-a-very-long-name2026-01-0100:00coco-val"
    assert text[2] == "MultiStreamPerformanceOnlyVALID"
    assert text[3] == "––123456.79"
    assert text[4] == "12345.68–0.50"


def test_a_run_of_fewer_gpus_is_not_valid_in_the_table_and_it_still_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fewer = result(
        valid=False,
        engine=LONG | {"gpu": "NVIDIA H200", "devices": ["cuda:0", "cuda:1", "cuda:2"]},
        errors=("cuda:1 (GPU-1) lost: a figure of 2 of 3 devices",),
        lost_devices=("cuda:1 (GPU-1)",),
    )
    print_table([(FOLDER, fewer)])
    printed = capsys.readouterr().out
    table = printed.split("└")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    assert "INVALID, 1 of 3 lost" in printed
    assert "cuda:1 (GPU-1) lost: a figure of 2 of 3 devices" in printed
    (row,) = csv.DictReader(io.StringIO(to_csv([(FOLDER, fewer)])))
    assert (row["LoadGen"], row["device"]) == ("INVALID, 1 of 3 lost", "3 x NVIDIA H200")


def test_csv(run):
    accuracy = (
        FOLDER,
        result(
            mode="AccuracyOnly",
            valid=None,
            samples_per_second=None,
            accuracy={"mAP": 0.25, "AP50": 0.5},
        ),
    )
    first, second = csv.DictReader(io.StringIO(to_csv([run, accuracy])))
    assert first["model"] == LONG["model"]
    assert first["directory"] == str(FOLDER)
    assert (first["samples/s"], first["p99 ms"], first["mAP"]) == ("123456.789", "0.5", "")
    assert (second["mAP"], second["LoadGen"], second["samples/s"]) == ("0.25", "", "")
