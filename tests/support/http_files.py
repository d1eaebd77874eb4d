"""A local file server that can misbehave, and a proxy in front of it."""

from __future__ import annotations

import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server serves and how well; `faults` are used up one a request, per path."""

    files: dict = field(default_factory=dict)
    faults: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)  # (path, headers)
    ranges: bool = True
    if_range: bool = True
    etag: bool = True
    last_modified: bool = True
    dates: dict = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def paths(self):
        return [path for path, _ in self.requests]

    def validators(self, path):
        """ETag and Last-Modified of what the path holds now."""
        found = {}
        if self.etag:
            found["ETag"] = f'"{sha256(self.files[path]).hexdigest()[:8]}"'
        if self.last_modified:
            found["Last-Modified"] = formatdate(self.dates.get(path, 1e9), usegmt=True)
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.close_connection = True
        site = self.server.site
        site.requests.append((self.path, dict(self.headers)))
        faults = site.faults.get(self.path)
        if faults:
            faults.pop(0)(self)
        else:
            serve(self)

    def log_message(self, *_):
        pass


def serve(handler, *, cut=None, status=None, length=None, shift=0, headers=()):
    """Answer as a good server does; the arguments make it a bad one.

    `cut`: bytes sent before the connection closes; `length`: another Content-Length; `shift`: the
    range begins so many bytes later than asked for; `status`: another status.
    """
    site, path = handler.server.site, handler.path
    if path not in site.files:
        handler.send_error(404)
        return
    content, validators = site.files[path], site.validators(path)
    start, code = 0, 200
    wanted, condition = handler.headers["Range"], handler.headers["If-Range"]
    current = not site.if_range or condition in (None, *validators.values())
    if wanted and site.ranges and current:
        start, code = int(wanted.removeprefix("bytes=").rstrip("-")) + shift, 206
        if start >= len(content):
            handler.send_error(416)
            return
    body = content[start:]
    handler.send_response(status or code)
    for name, value in {**validators, **dict(headers)}.items():
        handler.send_header(name, value)
    if code == 206:
        last = len(content) - 1
        handler.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body if cut is None else body[:cut])


def broken(cut):
    return lambda handler: serve(handler, cut=cut)


def answers(code, **headers):
    def fault(handler):
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return fault


def stalls(cut):
    """Send some bytes, then nothing until the site is released."""

    def fault(handler):
        serve(handler, cut=cut)
        handler.wfile.flush()
        handler.server.site.released.wait(20)

    return fault


def without_length(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(handler.server.site.files[handler.path])


def chunked(cut=None):
    """Transfer-Encoding: chunked; `cut` leaves out the end."""

    def fault(handler):
        content = handler.server.site.files[handler.path]
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(content) if cut is None else cut, 1000):
            chunk = content[start : start + 1000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        if cut is None:
            handler.wfile.write(b"0\r\n\r\n")

    return fault


class _Proxy(BaseHTTPRequestHandler):
    """Takes `GET http://host/path`, and asks the site for the path, whatever the host is."""

    def do_GET(self):
        self.server.seen.append(self.path)
        path = "/" + self.path.split("/", 3)[3]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.server.site.url + path, timeout=10) as answer:
            body = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def _running(handler, site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.site, server.seen = site, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        site.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running_site():
    site = Site()
    with _running(_Handler, site) as server:
        site.url = f"http://127.0.0.1:{server.server_port}"
        yield site


@contextmanager
def running_proxy(site):
    """Yield the proxy's URL and the list of the addresses that it was asked for."""
    with _running(_Proxy, site) as server:
        yield f"http://127.0.0.1:{server.server_port}", server.seen


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
