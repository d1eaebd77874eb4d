"""The page of runs: what it says, whatever names they have, and how a browser shows it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from engine.data.coco import coco_evaluation
from engine.errors import EngineError
from harness.errors import HarnessError
from harness.loadgen.log import ACCURACY
from harness.results import run_all
from harness.results.layers import Layers, read_layers
from harness.results.page import PAGE, render_page, write_index
from harness.results.report import INDEX, find_results
from harness.results.result import read_result
from harness.results.run import Benchmark
from tests.harness.results.test_result import ANYTHING, FIGURES
from tests.support.compliance_runs import TOTAL, data_set
from tests.support.harness_fakes import FakeEngine, Memory, benchmark, short
from tests.support.pages import HOSTILE, Page, accuracy_run, performance_run, shown

PATTERN = np.random.default_rng(1).integers(0, 255, (60, 80, 3)).astype(np.uint8)
CLASSES = [HOSTILE, "cat"]


@pytest.fixture(scope="module")
def performance(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "first"
    names = {"model": HOSTILE, "backend": HOSTILE, HOSTILE: HOSTILE, "devices": [HOSTILE]}
    return performance_run(root, engine=names, errors=(HOSTILE,), command=HOSTILE)


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
    """A run with annotations, and its data set."""
    return accuracy_run(
        tmp_path_factory.mktemp("runs") / HOSTILE[2:].replace("/", "|"), PATTERN, CLASSES
    )


@pytest.fixture
def known(accuracy, monkeypatch):
    monkeypatch.setattr("harness.results.page.known_dataset", lambda *_: accuracy[1])


@pytest.fixture
def page(performance, accuracy, known, tmp_path):
    return render_page([performance, accuracy[0]], tmp_path)


def test_nothing_from_files_is_markup_or_comes_from_elsewhere(page):
    read = Page(page)
    scripts = [tag for tag, _ in read.elements if tag == "script"]
    assert len(scripts) == 1 + 4 * 1  # Plotly, and four charts
    assert not [tag for tag, attributes in read.elements if "onerror" in attributes]
    for _, attributes in read.elements:
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
    assert "http-equiv" in page and "default-src 'none'" in page
    assert read.text.count(HOSTILE) > 5


def test_results_are_those_of_the_runs(page, performance, accuracy):
    first, second = Page(page).results()
    assert list(first)[:3] == ["#", "run", "model"]  # the rest may need scrolling
    result = performance[1]
    assert first["scenario"] == "SingleStream" and first["mode"] == "PerformanceOnly"
    assert first["run"] == "first" and first["model"] == first["engine"] == HOSTILE
    assert first["samples/s"] == f"{result.samples_per_second:.2f}"
    assert first["p99 ms"] == f"{result.latency_ms['p99']:.2f}"
    assert first["date"] == result.finished[:16].replace("T", " ")
    assert (first["mAP"], second["samples/s"]) == ("–", "–")
    assert second["mAP"] == f"{accuracy[0][1].accuracy['mAP']:.4f}"
    assert second["data set"] == "own-val"


def test_worst_images_come_first_with_what_is_wrong(page):
    text = " ".join(Page(page).text.split())
    assert text.count("00000.jpg: 1 missed, 1 false, 1 right") == 1
    assert text.count(": 1 missed, 1 false, 1 right") == 4


def test_layers_side_by_side(performance, tmp_path):
    folder, result = performance
    runs = []
    for name, times in (("a", {HOSTILE: 2.0, "conv": 0.5}), ("b", {"conv": 3.0})):
        where = tmp_path / name
        shutil.copytree(folder, where)
        Layers(8, times).write(where)
        runs.append((where, result))
    read = Page(render_page([*runs, performance], tmp_path))
    assert ["conv", "0.5000", "3.0000"] in read.rows
    assert [HOSTILE, "2.0000", "–"] in read.rows
    assert ["all 2", "2.500", "3.000"] in read.rows
    assert read.rows.index(["conv", "0.5000", "3.0000"]) < read.rows.index([HOSTILE, "2.0000", "–"])
    assert "Layers" not in [row[0] for row in Page(render_page([performance], tmp_path)).rows]
    (runs[0][0] / "layers.json").write_text("[]")
    with pytest.raises(HarnessError, match=r"layers\.json"):
        render_page(runs, tmp_path)


def test_changes_are_against_the_first_of_its_kind(performance, tmp_path):
    folder, result = performance
    faster = replace(result, samples_per_second=1.25 * result.samples_per_second)
    other = replace(result, scenario="Server")
    read = Page(render_page([(folder, result), (folder, faster), (folder, other)], tmp_path))
    changes = [row["samples/s"].partition(" ")[2] for row in read.results()]
    assert changes == ["", "(+25.0 %)", ""]
    assert ["scenario", "SingleStream", "SingleStream", "Server"] in read.rows


def test_a_page_without_accuracy_and_one_without_performance(
    performance, accuracy, known, tmp_path
):
    assert "No accuracy run with annotations." in Page(render_page([performance], tmp_path)).text
    read = Page(render_page([accuracy[0]], tmp_path))
    assert "No performance run that left its latencies." in read.text
    assert "1 missed, 1 false" in read.text


def test_what_is_gone_since_is_said(accuracy, known, tmp_path, monkeypatch):
    (folder, result), data = accuracy
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / ACCURACY).unlink()
    assert f"{ACCURACY} not found" in Page(render_page([(copy, result)], tmp_path)).text
    data.image_dir, before = tmp_path / "none", data.image_dir
    assert "00000.jpg: 1 missed, 1 false, 1 right (image not found)" in " ".join(
        Page(render_page([(folder, result)], tmp_path)).text.split()
    )
    data.image_dir = before
    other = replace(result, accuracy={"stats": {"AP": 0.123}})
    text = Page(render_page([(folder, other)], tmp_path)).text
    assert "the annotations are others now" in text
    monkeypatch.undo()
    text = Page(render_page([(folder, replace(result, dataset={"name": "x-val"}))], tmp_path)).text
    assert "no classes and no images: unknown data set 'x'" in text


@given(engine=ANYTHING, dataset=ANYTHING, accuracy=ANYTHING, figures=FIGURES)
def test_any_result_has_a_page(performance, engine, dataset, accuracy, figures):
    folder, result = performance
    strange = replace(
        result, engine=engine, dataset=dataset, accuracy=accuracy, batch_latency_ms=figures
    )
    assert len(Page(render_page([(folder, strange)], folder)).results()) == 1


def test_index(performance, accuracy, tmp_path):
    """Newest first; what cannot be read is named; runs that failed are not there."""
    logs = tmp_path / "logs"
    for name, day in (("old run", 1), ("new", 3), ("#1?", 2)):
        folder = logs / name / "box" / "ssd-resnet34" / "SingleStream" / "PerformanceOnly"
        folder.mkdir(parents=True)
        replace(performance[1], finished=f"2026-01-0{day}T00:00:00+00:00").write(folder)
    shutil.copytree(folder, folder.with_name("AccuracyOnly.partial"))
    broken = logs / "broken" / "result.json"
    broken.parent.mkdir()
    broken.write_text(HOSTILE)
    for name in ("old run", "#1?"):
        (logs / name / PAGE).touch()
    write_index(logs)
    text = (logs / INDEX).read_text()
    read = Page(text)
    assert [row[0] for row in read.rows[1:] if row[0] != "new"] == ["#1?", "old run"]
    links = [attributes["href"] for tag, attributes in read.elements if tag == "a"]
    assert links == ["%231%3F/report.html", "old%20run/report.html"]
    assert f"{broken}: not JSON" in read.text
    assert not [tag for tag, _ in read.elements if tag in ("script", "img")]
    broken.unlink()
    found = find_results(sorted(logs.glob("[!b]*")))  # as a shell's build/logs/*
    assert [folder.relative_to(logs).parts[0] for folder, _ in found] == ["#1?", "new", "old run"]


@pytest.fixture
def tests(tmp_path):
    folder = tmp_path / "build" / "logs" / "now" / "box" / "ssd-resnet34" / "Offline"
    settings = short("Offline")
    return [(benchmark(FakeEngine()), settings, "PerformanceOnly", folder / "PerformanceOnly")]


def test_a_run_leaves_its_page_and_the_list(tests, tmp_path, capsys):
    run_all.run_all(tests, tmp_path / "build")
    logs = tmp_path / "build" / "logs"
    assert Page((logs / "now" / PAGE).read_text()).results()[0]["run"] == "now"
    assert 'href="now/report.html"' in (logs / INDEX).read_text()
    assert "now/report.html" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere" / "a" / "b" / "c" / "d"
    run_all.run_all([(*tests[0][:3], elsewhere)], tmp_path / "build")
    assert not (tmp_path / INDEX).exists()


def test_a_run_and_its_page_evaluate_once(tmp_path, monkeypatch):
    """The page is that of an evaluation of its own."""
    evaluations = []

    def counted(*arguments):
        evaluations.append(arguments)
        return coco_evaluation(*arguments)

    data = data_set(tmp_path / "data")
    monkeypatch.setattr("harness.results.accuracy.coco_evaluation", counted)
    monkeypatch.setattr("harness.results.page.known_dataset", lambda *_: data)
    logs = tmp_path / "build" / "logs"
    test = Benchmark((FakeEngine(),), Memory(TOTAL), data, 30), short("Offline"), "AccuracyOnly"
    where = logs / "now" / "box" / "ssd-resnet34" / "Offline" / "AccuracyOnly"
    run_all.run_all([(*test, where)], tmp_path / "build")
    assert len(evaluations) == 1
    page = (logs / "now" / PAGE).read_text()
    assert "No accuracy run" not in page and "no classes" not in page
    assert render_page(find_results([logs]), tmp_path / "build") == page
    assert len(evaluations) == 2


def test_the_page_has_this_run_alone_and_replaces_no_file_of_the_user(tests, tmp_path, capsys):
    """As with ``--log-dir .``, where other runs and a report of somebody lie, too."""
    home = tmp_path / "box" / "ssd-resnet34" / "Offline"
    other = tmp_path / "older" / "box" / "ssd-resnet34" / "Offline" / "PerformanceOnly"
    run_all.run_all([(*tests[0][:3], other)], tmp_path / "build")
    run_all.run_all([(*tests[0][:3], home / "PerformanceOnly")], tmp_path / "build")
    assert len(Page((tmp_path / PAGE).read_text()).results()) == 1
    run_all.run_all([(*tests[0][:3], home / "Second")], tmp_path / "build")  # ours is replaced
    assert len(Page((tmp_path / PAGE).read_text()).results()) == 2
    (tmp_path / PAGE).write_text("mine")
    capsys.readouterr()
    run_all.run_all([(*tests[0][:3], home / "Third")], tmp_path / "build")
    assert (tmp_path / PAGE).read_text() == "mine"
    assert f"{PAGE} is none of ours" in capsys.readouterr().err


class LayeredEngine(FakeEngine):
    """One that tells its layers, or fails to."""

    fails = False

    tells_layers = True

    def layer_times(self, batch):
        if self.fails:
            raise EngineError("no more memory")
        return batch, {"conv": 0.25 * batch}


def test_layers_of_a_run(tests, tmp_path, capsys):
    engine = LayeredEngine()
    test = (benchmark(engine), short("Offline", batch_size=4), "PerformanceOnly", tests[0][3])
    run_all.run_all([test], tmp_path / "build", layers=True)
    assert read_layers(tests[0][3]) == Layers(4, {"conv": 1.0})
    engine.fails = True
    other = tests[0][3].with_name("Again")
    run_all.run_all([(*test[:3], other)], tmp_path / "build", layers=True)
    assert "warning: no more memory" in capsys.readouterr().err
    assert (other / "result.json").exists() and read_layers(other) is None
    silent = FakeEngine()
    with pytest.raises(HarnessError, match="does not tell the times of its layers"):
        run_all.run_all(
            [(benchmark(silent), *test[1:3], other.with_name("Third"))],
            tmp_path / "build",
            layers=True,
        )
    assert not silent.batches


def test_resume_runs_what_is_missing(tests, tmp_path, capsys):
    engine = FakeEngine()
    wanted = [
        (benchmark(engine), short(name), "PerformanceOnly", tmp_path / "logs" / name / "mode")
        for name in ("Offline", "SingleStream")
    ]
    run_all.run_all(wanted[:1], tmp_path)
    before = (wanted[0][3] / "result.json").read_bytes()
    with pytest.raises(HarnessError, match=r"Offline/mode exists; .* --resume"):
        run_all.check_folders([where for *_, where in wanted])
    wanted[1][3].with_name("mode.partial").mkdir(parents=True)  # of a run that failed
    done = len(engine.batches)
    run_all.run_all(wanted, tmp_path, resume=True)
    assert (wanted[0][3] / "result.json").read_bytes() == before
    assert len(engine.batches) > done
    said = capsys.readouterr()
    assert "Offline PerformanceOnly: was run, " in said.err
    assert "SingleStream" in said.out and "Offline" in said.out.split("SingleStream")[0]
    done = len(engine.batches)
    run_all.run_all(wanted, tmp_path, resume=True)
    assert len(engine.batches) == done


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_duration_ms": 70}, "min_duration_ms was 50 and is 70 now"),
        ({"batch_size": 3}, "batch_size was None and is 3 now"),
        ({"target_qps": 9.0}, "target_qps was None and is 9.0 now"),
    ],
)
def test_resume_refuses_another_test(tests, tmp_path, change, message):
    run_all.run_all(tests, tmp_path)
    other = [(tests[0][0], short("Offline", **change), *tests[0][2:])]
    with pytest.raises(HarnessError, match=f"Only is of another test: {message}"):
        run_all.run_all(other, tmp_path, resume=True)


def test_resume_refuses_what_was_asked_for_otherwise(tests, tmp_path):
    """What was told is another test than what followed from a warm-up."""
    test = tests[0]
    run_all.run_all([(test[0], short("Offline", batch_size=8), *test[2:])], tmp_path)
    with pytest.raises(HarnessError, match="batch_size was 8 and is None now"):
        run_all.run_all([(test[0], short("Offline"), *test[2:])], tmp_path, resume=True)


def test_resume_takes_what_cudnn_made_ready_for_other_scenarios(tests, tmp_path):
    run_all.run_all(tests, tmp_path)
    result = read_result(tests[0][3] / "result.json")
    replace(result, engine={**result.engine, "max_batch": 1, "batch_sizes": [1]}).write(tests[0][3])
    run_all.run_all(tests, tmp_path, resume=True)


def test_a_fault_of_the_review_does_not_lose_the_run(tmp_path, monkeypatch):
    def fail(_):
        raise KeyError("x")

    monkeypatch.setattr("harness.results.run_all.review", fail)
    data = data_set(tmp_path / "data")
    monkeypatch.setattr("harness.results.page.known_dataset", lambda *_: data)
    where = tmp_path / "logs" / "box" / "ssd-resnet34" / "Offline" / "AccuracyOnly"
    test = Benchmark((FakeEngine(),), Memory(TOTAL), data, 30), short("Offline"), "AccuracyOnly"
    run_all.run_all([(*test, where)], tmp_path / "build")
    assert read_result(where / "result.json").value is not None
    assert "No accuracy run" not in (tmp_path / "logs" / PAGE).read_text()


def test_resume_refuses_another_engine_or_other_samples(tests, tmp_path):
    run_all.run_all(tests, tmp_path)
    where = tests[0][3]
    result = read_result(where / "result.json")
    for key, value in (("onnx_sha256", "0" * 64), ("threads", 77), ("devices", ["cuda:0"])):
        replace(result, engine={**result.engine, key: value}).write(where)
        with pytest.raises(HarnessError, match=f"is of another test: {key} was .* and is "):
            run_all.run_all(tests, tmp_path, resume=True)
    replace(result, engine={**result.engine, "model": "elsewhere.onnx"}).write(where)
    run_all.run_all(tests, tmp_path, resume=True)
    names = (where / "samples.txt").read_text().splitlines()
    (where / "samples.txt").write_text("\n".join(names[::-1]))
    with pytest.raises(HarnessError, match="is of another test: its samples"):
        run_all.run_all(tests, tmp_path, resume=True)


@pytest.mark.parametrize("package", ["plotly", "jinja2"])
def test_without_its_packages_a_run_is_a_run(tests, tmp_path, capsys, monkeypatch, package):
    for name in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    run_all.run_all(tests, tmp_path / "build")
    said = capsys.readouterr()
    assert "samples/s" in said.out
    assert f"no page was written: HarnessError: a page needs {package}" in said.err
    assert len(said.err.splitlines()) == 2  # the run's announcement, and this
    with pytest.raises(HarnessError, match="pip install"):
        render_page(find_results([tmp_path]), tmp_path)


@pytest.mark.slow
def test_five_thousand_images_fit_in_15_mb(tmp_path, monkeypatch):
    """Of pictures that no codec makes small."""
    large = np.random.default_rng(1).integers(0, 255, (1080, 1920, 3)).astype(np.uint8)
    names = [f"class {number}" for number in range(8)]
    whole, data = accuracy_run(tmp_path / "run", large, names, images=5000)
    # two more with as many pictures as a page has, of the first images
    others = [accuracy_run(tmp_path / name, large, names, images=20)[0] for name in "ab"]
    monkeypatch.setattr("harness.results.page.known_dataset", lambda *_: data)
    assert len(render_page([whole, *others], tmp_path).encode()) < 15 * 2**20


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_in_chromium(page, tmp_path, width, dark):
    if shutil.which("chromium") is None:
        pytest.skip("needs Chromium")
    path = tmp_path / "page.html"
    path.write_text(page)
    (inner, wide, title, drawn, images), console, picture = shown(path, width, dark=dark)
    assert inner == wide == width  # nothing sticks out
    assert title.startswith("Runs first, ")
    assert drawn > 5
    assert images == 4
    assert console == ""
    assert (picture[5, 5].mean() < 60) == dark
