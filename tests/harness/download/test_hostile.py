"""Servers that send too much, too slowly, elsewhere, or numbers that are none."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from email.utils import formatdate
from hashlib import sha256

import pytest

from harness.download import transfer
from harness.download.transfer import fetch
from harness.errors import HarnessError
from tests.support import ROOT
from tests.support.http_files import answers, broken, running_site, serve, stalls, wait_until

PATH = "/model.bin"
CONTENT = bytes(range(250)) * 100


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(transfer, "WAITS", (0.0,) * 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running_site() as site:
        site.files[PATH] = CONTENT
        yield site


def get(site, folder, **options):
    fetch(site.url + PATH, folder / "model.bin", notify=lambda _: None, **options)
    return (folder / "model.bin").read_bytes()


def refusal(site, folder, **options):
    with pytest.raises(HarnessError) as caught:
        get(site, folder, **options)
    assert len(site.requests) == 1  # another try would bring the same
    said = str(caught.value)
    assert said.isprintable()
    assert site.url in said
    return said


def endless(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    except OSError:  # the client has had enough
        pass


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_an_endless_body_is_stopped_at_the_size(site, tmp_path, monkeypatch, size):
    monkeypatch.setattr(transfer, "LARGEST", 100_000)
    site.faults[PATH] = [endless]
    said = refusal(site, tmp_path, size=size)
    assert f"sends more than {size or 100_000} bytes" in said
    assert list(tmp_path.iterdir()) == []


def test_an_announced_size_beyond_all_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST", 1000)
    assert "has 25000 bytes, more than 1000" in refusal(site, tmp_path)


def test_numbers_of_5000_digits(site, tmp_path):
    site.faults[PATH] = [lambda handler: serve(handler, length="9" * 5000)]
    assert "names no length" in refusal(site, tmp_path)
    site.faults[PATH] = [answers(503, Retry_After="9" * 5000)]
    assert get(site, tmp_path, stop=_Impatient()) == CONTENT


class _Impatient:
    def wait(self, seconds):
        assert seconds <= 60
        return False

    def is_set(self):
        return False


@pytest.mark.parametrize(
    "address",
    [
        "ftp://127.0.0.1/x",
        "file:///etc/hostname",
        "data:,x",
        "http://[",
        "http://127.0.0.1:port/x",
        "http://" + "a" * 70 + ".example/x",
    ],
)
def test_redirects_to_what_is_no_web_address(site, tmp_path, address):
    site.faults[PATH] = [answers(302, Location=address)]
    refusal(site, tmp_path)


def test_a_reason_with_control_characters_is_one_line(site, tmp_path):
    site.faults[PATH] = [lambda handler: handler.send_error(404, "no\tsuch\x85file")]
    assert "404 no such file" in refusal(site, tmp_path)


def test_a_redirect_in_a_circle_is_one_line(site, tmp_path):
    site.faults[PATH] = [answers(302, Location=PATH)] * 30
    with pytest.raises(HarnessError) as caught:
        get(site, tmp_path)
    assert "\n" not in str(caught.value)


def drips(handler):
    serve(handler, cut=0)
    try:
        for byte in CONTENT:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        pass


def test_a_server_that_drips_is_given_up(site, tmp_path, monkeypatch):
    """Each byte comes within the time-out, and all of them would take ten minutes."""
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    site.faults[PATH] = [drips]
    assert "less than 1024 bytes a second" in refusal(site, tmp_path)
    assert get(site, tmp_path) == CONTENT  # which goes on where it stopped
    assert site.requests[1][1]["Range"]


def test_a_server_whose_head_drips_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "WAITS", ())
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    program = (
        "import socket, sys, time\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True)\n"
        "line, _ = server.accept()\n"
        "for byte in b'HTTP/1.1 200 OK' + b'x' * 5000: line.send(bytes([byte])); time.sleep(0.1)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        port = int(server.stdout.readline())
        with pytest.raises(HarnessError, match="no answer in"):
            fetch(f"http://127.0.0.1:{port}/x", tmp_path / "x", notify=lambda _: None)
        server.kill()


@pytest.mark.parametrize("known", [False, True], ids=["no hash", "hash"])
def test_a_part_without_an_etag_goes_on_only_to_a_known_hash(site, tmp_path, known):
    """Two versions of one second have the same date, and a mixture of them no other sign."""
    site.etag = False
    other = CONTENT[::-1]

    def change(handler):
        serve(handler, cut=10_000)
        site.files[PATH] = other

    site.faults[PATH] = [broken(10_000) if known else change]
    expected = CONTENT if known else other
    digest = sha256(CONTENT).hexdigest() if known else None
    assert get(site, tmp_path, sha256=digest) == expected
    assert ("Range" in site.requests[1][1]) is known


def test_a_range_that_does_not_repeat_the_etag_is_not_taken(site, tmp_path):
    def other_version(handler):
        site.files[PATH], site.etag, site.if_range = CONTENT[::-1], False, False
        serve(handler)

    site.dates[PATH] = 1e9
    assert formatdate(1e9, usegmt=True) == site.validators(PATH)["Last-Modified"]
    site.faults[PATH] = [broken(10_000), other_version]
    assert get(site, tmp_path) == CONTENT[::-1]


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server(site, tmp_path):
    path = "/record/3236545/files/resnet34-ssd1200.pytorch"
    site.files[path] = CONTENT
    site.faults[path] = [stalls(1000)]
    command = [sys.executable, "-m", "harness", "download", "model", "--mirror", site.url]
    process = subprocess.Popen([*command, "--build-dir", tmp_path], cwd=ROOT)
    wait_until(lambda: site.requests)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
