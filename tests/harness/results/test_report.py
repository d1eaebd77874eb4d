"""The table of results on a terminal of 80 columns, and as CSV."""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.results.compare import paired, print_comparison, two_sides
from harness.results.report import OURS, find_results, print_table, to_csv
from harness.results.result import RESULT, RunResult
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


def test_marked_pages_are_no_runs_but_any_other_file_is_refused(run, tmp_path):
    folder, one = tmp_path / "run", run[1]
    folder.mkdir()
    one.write(folder)
    (tmp_path / "index.html").write_text("<p>mine")
    with pytest.raises(HarnessError, match=r"index\.html"):
        find_results([folder, tmp_path / "index.html"])
    (tmp_path / "index.html").write_text(f"<!doctype html>{OURS}")
    assert [path for path, _ in find_results([folder, tmp_path / "index.html"])] == [folder]


def compared(first, second, capsys, monkeypatch):
    """What is printed, by the first cell of its rows; and all of it."""
    monkeypatch.setenv("COLUMNS", "200")
    print_comparison(first, second)
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}, text


def test_two_runs_side_by_side(run, capsys, monkeypatch):
    folder, a = run
    b = replace(
        a,
        samples_per_second=1.25 * a.samples_per_second,
        latency_ms={"p50": 12345.678, "p99": 0.25},
        valid=False,
        errors=("too [short]",),
        engine={**a.engine, "onnx_sha256": "f" * 64},
    )
    lonely = replace(a, scenario="Server")
    rows, text = compared(
        [(folder, a)], [(FOLDER.parent, b), (FOLDER, lonely)], capsys, monkeypatch
    )
    assert rows["samples/s"] == ["123456.79", "154320.99", "+30864.20", "+25.0 %"]
    assert rows["query p99 ms"] == ["0.500", "0.250", "-0.250", "-50.0 %"]
    assert rows["query p50 ms"][2:] == ["+0.000", "+0.0 %"]
    assert rows["LoadGen"][:2] == ["VALID", "INVALID"]
    assert rows["engine.onnx_sha256"] == ["–", "f" * 64]
    assert "engine.model" not in rows and "versions.python" not in rows  # the same in both
    assert "B: too [short]" in text
    assert "B alone: Server PerformanceOnly, which A has not" in text


def test_accuracies_side_by_side(run, capsys, monkeypatch):
    def accuracy(ap):
        figures = {"mAP": ap, "stats": {"AP": ap, "APs": -1.0}}
        return [
            (FOLDER, result(mode="AccuracyOnly", valid=None, value=ap, accuracy=figures)),
        ]

    rows, _ = compared(accuracy(0.25), accuracy(0.2), capsys, monkeypatch)
    assert rows["AP"] == ["0.2500", "0.2000", "-0.0500", "-20.0 %"]
    assert "LoadGen" not in rows
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(accuracy(0.25), accuracy(0.2))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_what_cannot_be_compared_is_refused(run):
    other = [(FOLDER, replace(run[1], scenario="Server"))]
    with pytest.raises(HarnessError, match="MultiStream PerformanceOnly against Server Perf"):
        paired([run], other)
    with pytest.raises(HarnessError, match="twice"):
        paired([run], [run, (FOLDER.parent, run[1])])


def test_a_folder_of_two_runs_is_compared_the_older_with_the_newer(tmp_path):
    def leave(name, minute, *scenarios):
        for scenario in scenarios:
            finished = f"2026-01-01T00:0{minute}:00+00:00"
            done = result(scenario=scenario, finished=finished, accuracy=None)
            folder = tmp_path / name / "box" / "ssd-resnet34" / scenario / "PerformanceOnly"
            folder.mkdir(parents=True)
            (folder / RESULT).write_text(json.dumps(asdict(done)))

    leave("z, the first", 1, "Offline", "Server")
    with pytest.raises(HarnessError, match=f"{tmp_path} holds 1: name another, too"):
        two_sides([tmp_path])
    leave("a, the second", 2, "Server")
    first, second = two_sides([tmp_path])
    assert [one.scenario for _, one in first] == ["Offline", "Server"]
    assert all("z, the first" in str(folder) for folder, _ in first)
    assert [(folder.parents[3].name, one.scenario) for folder, one in second] == [
        ("a, the second", "Server")
    ]
    named = two_sides([tmp_path / "a, the second", tmp_path / "z, the first"])
    assert named == (second, first)
    leave("c", 3, "Server")
    with pytest.raises(HarnessError, match=r"holds 3; the newest two: .*") as error:
        two_sides([tmp_path])
    (_, _, command) = str(error.value).partition("--compare takes")[2].partition("--compare ")
    both = two_sides([Path(one) for one in shlex.split(command)])
    assert [side[0][0].parents[3].name for side in both] == ["a, the second", "c"]
    with pytest.raises(HarnessError, match="these are 3"):
        two_sides([tmp_path] * 3)
