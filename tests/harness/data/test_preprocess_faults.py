"""Preprocessing in a process of its own that is interrupted, killed or out of room."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from engine.data.preprocessed import load_preprocessed
from engine.protocol import InputSpec
from tests.support.image_sets import make_dataset, write_times
from tests.support.photos import photo, reference

pytestmark = pytest.mark.slow  # commands in processes of their own

# What a user runs, as a script of its own: spawn needs a main module that can be imported.
SCRIPT = """
import sys
from pathlib import Path
from engine.protocol import InputSpec
from harness.data.dataset import Dataset
from harness.errors import HarnessError
from harness.data.preprocess import preprocess

if __name__ == "__main__":
    root = Path(sys.argv[1])
    if len(sys.argv) > 2:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    dataset = Dataset("test", root / "images", root / "map.txt", None)
    spec = InputSpec("image", (3, 600, 600), "float32")
    try:
        preprocess(dataset, spec, root / "out", workers=2, overwrite=False, skip_bad=False,
                   progress=False, say=print)
    except HarnessError as error:
        print(error)
        sys.exit(2)
"""


def start_script(root: Path, *arguments: str) -> subprocess.Popen[str]:
    script = root / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(root), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a shell gives it
    )


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_resumes(tmp_path: Path, kill: int) -> None:
    base = photo(700, 900)
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    jpeg = cv2.imencode(".jpg", base)[1].tobytes()
    names = [f"{n}.jpg" for n in range(240)]
    for name in names:
        (image_dir / name).write_bytes(jpeg)
    (tmp_path / "map.txt").write_text("\n".join(names))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    process = start_script(tmp_path)
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 10)
    if kill == signal.SIGINT:  # Ctrl-C reaches every process of the group
        os.killpg(process.pid, kill)
    else:
        process.kill()
    # ends when every process has closed the output pipes
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("KeyboardInterrupt") == (kill == signal.SIGINT)
    assert not (tmp_path / "out").exists()
    if kill == signal.SIGINT:
        assert not list((tmp_path / "out.partial").glob("*.tmp"))
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    finished = {f"{line['file']}.npy" for line in lines}
    assert 0 < len(finished) < 240
    before = write_times(tmp_path / "out.partial")
    with journal.open("a") as file:
        file.write('{"file": "239.jpg", "si')  # as a crash may leave it

    result = start_script(tmp_path)
    assert result.communicate(timeout=120) == ("", "")
    after = write_times(tmp_path / "out")
    assert len(after) == 240
    assert all(after[name] == before[name] for name in finished)
    opened = load_preprocessed(tmp_path / "out", InputSpec("image", (3, 600, 600), "float32"))
    expected = reference(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), 600, 600)
    np.testing.assert_allclose(opened.load([239])[0], expected, rtol=0, atol=1e-5)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    make_dataset(tmp_path, {f"{n}.jpg": photo(700, 900, n % 2) for n in range(160)})
    process = start_script(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this kernel does not list the children of a process")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") > 3)
    for child in children.read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            break
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "")
    assert output.startswith("a preprocessing process died")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    make_dataset(tmp_path, {f"{n}.jpg": photo(40, 50, n) for n in range(4)})
    process = start_script(tmp_path, "1000000")  # bytes per file; an image takes 4,320,128
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "")
    assert output.startswith(f"cannot write {tmp_path}/out.partial/")
    assert output.count("\n") == 1
    assert {path.name for path in (tmp_path / "out.partial").iterdir()} == {"journal.jsonl"}
