"""One file over HTTP, from a local server that breaks in every way a server can."""

from __future__ import annotations

import shutil
import threading
from hashlib import md5, sha256

import numpy as np
import pytest

from harness.download import transfer
from harness.download.transfer import StatusError, StoppedError, fetch
from harness.errors import HarnessError
from tests.support import http_files
from tests.support.http_files import (
    answers,
    broken,
    chunked,
    running_proxy,
    running_site,
    serve,
    stalls,
)

CONTENT = np.random.default_rng(1).bytes(700_000)
PATH = "/files/model.bin"


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(transfer, "WAITS", (0.0,) * 5)
    with running_site() as site:
        site.files[PATH] = CONTENT
        yield site


@pytest.fixture
def target(tmp_path):
    return tmp_path / "model.bin"


def get(site, target, **options):
    notes = []
    digest = fetch(site.url + PATH, target, **{"notify": notes.append, **options})
    assert target.read_bytes() == site.files[PATH]
    assert digest == sha256(site.files[PATH]).hexdigest()
    assert [path.name for path in target.parent.iterdir()] == [target.name]  # no part is left
    return notes


def asked_ranges(site):
    return [headers.get("Range") for _, headers in site.requests]


class Clock(threading.Event):
    """Notes how long it was to be waited on, and does not wait."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return False


def test_whole_file(site, target):
    steps = []
    assert get(site, target, progress=lambda *step: steps.append(step)) == []
    assert steps[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_known_hash_and_size(site, target):
    get(site, target, sha256=sha256(CONTENT).hexdigest(), size=len(CONTENT))


def test_broken_connection_is_resumed(site, target):
    site.faults[PATH] = [broken(300_000), broken(250_000)]
    notes = get(site, target)
    assert asked_ranges(site) == [None, "bytes=300000-", "bytes=550000-"]
    etag = site.validators(PATH)["ETag"]
    assert [headers.get("If-Range") for _, headers in site.requests] == [None, etag, etag]
    assert "300000 of 700000" in notes[0]


def test_stopped_transfer_is_resumed_by_the_next(site, target):
    stop = threading.Event()
    site.faults[PATH] = [stalls(400_000)]

    def after_some(done, _total):
        if done == 400_000:
            stop.set()

    with pytest.raises(StoppedError):
        get(site, target, stop=stop, progress=after_some)
    assert not target.exists()
    get(site, target)
    assert asked_ranges(site) == [None, "bytes=400000-"]


def test_last_modified_serves_where_the_etag_is_weak_or_missing(site, target):
    site.etag = False
    site.faults[PATH] = [
        lambda handler: serve(handler, cut=9, headers=[("ETag", 'W/"x"')]),
    ]
    get(site, target, sha256=sha256(CONTENT).hexdigest())
    assert site.requests[1][1]["If-Range"] == site.validators(PATH)["Last-Modified"]


def test_without_validator_the_rest_is_not_asked_for(site, target):
    site.etag = site.last_modified = False
    site.faults[PATH] = [broken(1000)]
    get(site, target)
    assert asked_ranges(site) == [None, None]


@pytest.mark.parametrize("if_range", [True, False], ids=["if-range", "no-if-range"])
@pytest.mark.parametrize("etag", [True, False], ids=["etag", "date"])
@pytest.mark.parametrize("length", [700_000, 900_000, 1_000])
def test_file_that_changed_on_the_server(site, target, if_range, etag, length):
    site.if_range, site.etag = if_range, etag
    changed = np.random.default_rng(2).bytes(length)

    def change(handler):
        serve(handler, cut=300_000)
        site.files[PATH], site.dates[PATH] = changed, 1.1e9

    site.faults[PATH] = [change]
    get(site, target)


def test_changed_length_is_noticed_by_itself(site, target):
    site.if_range = site.etag = False

    def change(handler):  # under the same date
        serve(handler, cut=300_000)
        site.files[PATH] = CONTENT[::-1] + b"more"

    site.faults[PATH] = [change]
    get(site, target)


def test_server_without_ranges(site, target):
    site.ranges = False
    site.faults[PATH] = [broken(1000), broken(500_000)]
    get(site, target)


def test_server_that_sends_another_range(site, target):
    site.faults[PATH] = [broken(1000), lambda handler: serve(handler, shift=1)]
    get(site, target)
    assert asked_ranges(site) == [None, "bytes=1000-", None]


def test_range_without_content_range(site, target):
    site.faults[PATH] = [broken(1000), lambda handler: serve(handler, status=206)]
    site.if_range = True
    site.ranges = False
    get(site, target)


def test_complete_part_is_taken_as_it_is(site, target):
    site.faults[PATH] = [broken(1000)]
    get(site, target)
    note = target.with_name("model.bin.part.json")
    stop = threading.Event()
    site.faults[PATH] = [stalls(len(CONTENT))]
    target.unlink()
    with pytest.raises(StoppedError):  # stopped behind the last byte
        get(site, target, stop=stop, progress=lambda done, total: done == total and stop.set())
    assert note.exists()
    asked = len(site.requests)
    get(site, target)
    assert len(site.requests) == asked


def test_part_with_a_damaged_note_is_not_used(site, target):
    target.with_name("model.bin.part").write_bytes(b"x" * 1000)
    target.with_name("model.bin.part.json").write_bytes(b'{"url": ')
    get(site, target)


def test_part_of_another_address_is_not_used(site, target, tmp_path):
    site.files["/other"] = bytes(len(CONTENT))
    site.etag = False  # so that the size and the date are all that tells the files apart: nothing
    site.faults["/other"] = [broken(1000), answers(404)]
    with pytest.raises(StatusError):
        fetch(site.url + "/other", target, notify=print)
    assert target.with_name("model.bin.part").stat().st_size == 1000
    get(site, target)


def test_announced_length_that_never_comes(site, target):
    lie = [lambda handler: serve(handler, length=800_000)] * 20
    site.faults[PATH], site.ranges = lie, False
    with pytest.raises(HarnessError, match=r"after 700000 of 800000 bytes, in 6 tries"):
        get(site, target)
    assert not target.exists()


def test_announced_length_that_is_too_short(site, target):
    site.faults[PATH] = [lambda handler: serve(handler, length=600_000)]
    with pytest.raises(HarnessError, match=r"not the expected model\.bin"):
        get(site, target, sha256=sha256(CONTENT).hexdigest())
    assert list(target.parent.iterdir()) == []
    get(site, target, sha256=sha256(CONTENT).hexdigest())


def test_unnamed_length_is_refused(site, target):
    site.faults[PATH] = [http_files.without_length]
    with pytest.raises(HarnessError, match="names no length"):
        get(site, target)
    assert list(target.parent.iterdir()) == []


def test_chunked_transfer(site, target):
    site.faults[PATH] = [chunked(cut=5000), chunked()]
    get(site, target)
    assert asked_ranges(site) == [None, None]


def test_waits_grow_and_begin_anew_after_progress(site, target, monkeypatch):
    monkeypatch.undo()
    clock = Clock()
    down = answers(503)
    site.faults[PATH] = [down, down, down, broken(1000), down, down]
    get(site, target, stop=clock)
    before, after = clock.waits[:3], clock.waits[3:]
    assert before == sorted(set(before))
    assert after == before[: len(after)]


def test_retry_after_is_kept_within_reason(site, target):
    clock = Clock()
    site.faults[PATH] = [answers(429, Retry_After=n) for n in ("7", "86400", "soon")]
    get(site, target, stop=clock)
    assert clock.waits == [7.0, 60.0, 0.0]


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 429])
def test_passing_failures_are_tried_again(site, target, status):
    site.faults[PATH] = [answers(status)]
    assert str(status) in get(site, target)[0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusals_are_not_tried_again(site, target, status):
    site.faults[PATH] = [answers(status)] * 3
    with pytest.raises(StatusError, match=f"{PATH}: the server answers {status}") as caught:
        get(site, target)
    assert caught.value.status == status
    assert len(site.requests) == 1


def test_lasting_failure(site, target):
    site.faults[PATH] = [answers(503)] * 9
    with pytest.raises(HarnessError, match=r"503 .*in 6 tries; run the command again"):
        get(site, target)
    assert len(site.requests) == 6


def test_server_that_falls_silent(site, target, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    site.faults[PATH] = [stalls(1000)]
    assert "no answer in 0.2 s" in get(site, target)[0]
    assert asked_ranges(site) == [None, "bytes=1000-"]


def test_no_server(target):
    with running_site() as gone:
        pass
    clock = Clock()
    with pytest.raises(HarnessError, match="refused"):
        get(gone, target, stop=clock)
    assert list(target.parent.iterdir()) == []


def test_other_file_than_the_expected_one(site, target):
    with pytest.raises(HarnessError, match=f"SHA-256 is {sha256(CONTENT).hexdigest()}, not 00"):
        get(site, target, sha256="0" * 64)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ([("Content-Type", "text/html; charset=utf-8")], "a web page"),
        ([("Content-Encoding", "gzip")], r"encoded \(gzip\)"),
        ([], "has 700000 bytes, not 5"),
    ],
)
def test_what_cannot_be_the_file_does_not_cost_the_part(site, target, headers, problem):
    refused = [lambda handler: serve(handler, headers=headers)]
    site.faults[PATH] = [broken(1000), answers(404)]
    with pytest.raises(StatusError):
        get(site, target)
    site.faults[PATH] = refused
    with pytest.raises(HarnessError, match=problem):
        get(site, target, size=None if headers else 5)
    get(site, target)
    assert asked_ranges(site)[-1] == "bytes=1000-"


def test_empty_file_is_refused(site, target):
    site.files[PATH] = b""
    with pytest.raises(HarnessError, match="empty"):
        get(site, target)


def test_full_disk_is_noticed_before_anything_is_written(site, target, monkeypatch):
    class Usage:
        free = len(CONTENT) + 10

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(HarnessError, match=r"1 MB needed, 1 MB free on this disk"):
        get(site, target, spare=11)
    assert not target.exists()
    assert not any(path.suffix == ".part" for path in target.parent.iterdir())
    get(site, target, spare=10)


def test_redirects_keep_the_range(site, target):
    site.files["/moved"] = CONTENT
    moved = answers(302, Location="/moved")
    site.faults[PATH] = [moved, moved]
    site.faults["/moved"] = [broken(5000)]
    get(site, target)
    assert asked_ranges(site) == [None, None, "bytes=5000-", "bytes=5000-"]


def test_proxy_of_the_environment(site, target, monkeypatch):
    with running_proxy(site) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy)
        fetch(f"http://files.example{PATH}", target, notify=print)
        assert seen == [f"http://files.example{PATH}"]
        assert target.read_bytes() == CONTENT
        target.unlink()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        get(site, target)
        assert len(seen) == 1


def test_a_known_md5_is_checked_on_arrival(site, target):
    known = md5(CONTENT, usedforsecurity=False).hexdigest()
    assert get(site, target, md5=known) == []
    target.unlink()
    site.files[PATH] = CONTENT[:-1] + b"!"
    other = md5(site.files[PATH], usedforsecurity=False).hexdigest()
    with pytest.raises(
        HarnessError, match=rf"not the expected model\.bin: its MD5 is {other}, not"
    ):
        get(site, target, md5=known)
    assert list(target.parent.iterdir()) == []


def test_a_date_is_enough_to_go_on_where_the_md5_is_known(site, target):
    """As with a known SHA-256: what is put together is checked."""
    site.etag = False
    site.faults[PATH] = [broken(300_000)]
    get(site, target, md5=md5(CONTENT, usedforsecurity=False).hexdigest())
    assert asked_ranges(site) == [None, "bytes=300000-"]
