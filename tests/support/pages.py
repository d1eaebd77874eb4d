"""Runs with names that would break a page; pages as they are read and as Chromium shows them."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np

from harness.loadgen.log import ACCURACY
from harness.results.result import read_result
from harness.results.run import SAMPLES, run
from tests.support.harness_fakes import FakeEngine, benchmark, short

HOSTILE = (
    '</script><script>document.title="hit"</script><img src=x onerror=alert(1)> & "\'{{ 7*7 }}'
)
"""Ends what it stands in, and runs, wherever it is not escaped."""


class Page(HTMLParser):
    """What a page has: its text, its elements with their attributes, its tables by their id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.rows = [], "", []
        self._cell = self._code = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._code = tag in ("script", "style")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._code = False
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if not self._code:
            self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def results(self):
        """The rows of the first table, by its heads."""
        width = len(self.rows[0])
        end = next(i for i, row in enumerate(self.rows) if len(row) != width)
        return [dict(zip(self.rows[0], row, strict=True)) for row in self.rows[1:end]]


def performance_run(root, scenario="SingleStream", **changes):
    """A run in ``root/box/ssd-resnet34``, with LoadGen and an engine that takes 2 ms."""
    folder = root / "box" / "ssd-resnet34" / scenario / "PerformanceOnly"
    result = run(benchmark(FakeEngine(seconds=0.002)), short(scenario), "PerformanceOnly", folder)
    result = replace(result, **changes)
    result.write(folder)
    return folder, result


def accuracy_run(root, pattern, classes, images=4, **changes):
    """An accuracy run of made-up detections: of each image's two objects one is found, one moved.

    Returns
    -------
    The run, and its data set for `harness.results.page.known_dataset`.
    """
    folder = root / "box" / "ssd-resnet34" / "Offline" / "AccuracyOnly"
    folder.mkdir(parents=True)
    data = root.parent / f"data-{root.name}"
    data.mkdir()
    files = [f"{number:05d}.jpg" for number in range(images)]
    cv2.imwrite(str(data / "picture.jpg"), pattern)
    truth = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": 3 * n, "name": name} for n, name in enumerate(classes, 1)]
    log = []
    height, width = pattern.shape[:2]
    for number, name in enumerate(files):
        (data / name).symlink_to(data / "picture.jpg")
        truth["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        rows = []
        for place, left in enumerate((0.1, 0.6)):
            label = 1 + (number + place) % len(classes)
            box = [left * width, 0.2 * height, 0.3 * width, 0.5 * height]
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": number, "iscrowd": 0}
                | {"category_id": 3 * label, "bbox": box, "area": box[2] * box[3]}
            )
            rows.append((number, 0.2, left - 0.4 * place, 0.7, left + 0.3, 0.9, label))
        payload = np.array(rows, "<f4").tobytes().hex()
        log.append({"seq_id": number, "qsl_idx": number, "data": payload})
    (folder / ACCURACY).write_text(json.dumps(log))
    (folder / SAMPLES).write_text("".join(f"{name}\n" for name in files))
    (data / "truth.json").write_text(json.dumps(truth))
    from dataclasses import asdict

    from harness.results.accuracy import evaluate

    accuracy = evaluate(folder / ACCURACY, data / "truth.json", files)
    other, _ = performance_run(root, "Offline")
    result = replace(
        read_result(other / "result.json"),
        **{
            "mode": "AccuracyOnly",
            "valid": None,
            "latency_ms": {},
            "accuracy": asdict(accuracy),
            "samples_per_second": None,
            "dataset": {"name": "own-val", "samples": images},
            **changes,
        },
    )
    shutil.rmtree(other)
    result.write(folder)
    dataset = SimpleNamespace(name="own-val", annotations=data / "truth.json", image_dir=data)
    return (folder, result), dataset


def shown(path, width, *, dark=False):
    """What Chromium makes of a page: its DOM, the console's messages, and a picture, uint8 BGR.

    The page lies in a frame, since a window is at least 500 pixels wide.
    """
    probe = """<script>addEventListener("load", () => setTimeout(() => parent.postMessage(
        [innerWidth, document.documentElement.scrollWidth, document.title,
         document.querySelectorAll("path.js-line, path.point").length,
         [...document.querySelectorAll("img")].filter(i => i.naturalWidth).length], "*"), 500))
        </script></body>"""
    inner = path.with_name(f"probed-{width}.html")
    inner.write_text(path.read_text().replace('loading="lazy"', "").replace("</body>", probe))
    outer = path.with_name(f"frame-{width}.html")
    outer.write_text(
        f"<body style='margin:0'><pre hidden></pre><iframe src='{inner.name}' "
        f"style='width:{width}px;height:3000px;border:0'></iframe><script>onmessage = e => "
        "document.querySelector('pre').textContent = JSON.stringify(e.data)</script></body>"
    )
    picture = path.with_suffix(".png")
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    chromium += ["--enable-logging=stderr", "--virtual-time-budget=10000"]
    chromium += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    chromium += [f"--window-size={width},3000", f"--user-data-dir={path.parent / 'profile'}"]
    said = ""
    for what in (f"--screenshot={picture}", "--dump-dom"):
        done = subprocess.run(
            [*chromium, what, outer.as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        said += "".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    facts = json.loads(done.stdout.split('<pre hidden="">')[1].split("</pre>")[0])
    return facts, said, cv2.imread(str(picture))
