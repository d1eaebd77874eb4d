"""One file over HTTP: resumed after a break, whole or absent under its own name.

What has arrived so far: `harness.download.part`. Proxies come from the environment
(``http_proxy``, ``https_proxy``, ``no_proxy``).
"""

from __future__ import annotations

import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine.errors import one_line
from engine.support.files import file_sha256
from engine.support.progress import Progress
from harness.disk import require_space
from harness.download.part import Part, Version
from harness.download.record import mismatch
from harness.errors import HarnessError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before the tries that follow a failed one; begun anew whenever a try got further."""
LARGEST = 4 << 30
"""Bytes of a file whose size nobody knows before; the benchmark's largest have a fifth of that."""
SLOWEST = 1024
"""Bytes a second below which a transfer is given up, on average over twice `TIMEOUT`."""
_LONGEST_WAIT = 60.0  # whatever Retry-After says
_CHUNK = 1 << 18
_NUMBER = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")

Notify = Callable[[str], None]
"""Takes one line about what happens, for instance a try that failed."""


class StatusError(HarnessError):
    """The server answered, and its answer is no: an HTTP status that another try will not change.

    Attributes
    ----------
    status
        HTTP status code.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StoppedError(Exception):
    """The transfer was told to stop; what has arrived is kept."""


class _BrokenError(Exception):
    """A try that failed, though the next may not."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    spare: int = 0,
    notify: Notify,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> str:
    """Download a file.

    Parameters
    ----------
    url
        http or https.
    target
        Where the file appears once it is complete and checked; its folder exists.
    sha256, md5
        Expected digests in hex; None where they are not known.
    size
        Expected size in bytes; None where it is not known, and then `LARGEST` at most.
    spare
        Bytes that must stay free on the disk besides the file itself.
    notify
        Told about failed tries.
    progress
        Called with the bytes that have arrived and, where the server says it, their final number.
    stop
        Ends the transfer when it is set.

    Returns
    -------
    str
        SHA-256 of the file in hex.

    Raises
    ------
    HarnessError
        The server refuses (`StatusError`), is not reached in the tries of `WAITS`, is slower than
        `SLOWEST`, or sends another file than the expected one; the disk is too full.
    StoppedError
        `stop` was set.
    OSError
        The file cannot be written.
    """
    stop = stop or threading.Event()
    checked = sha256 is not None or md5 is not None
    part = Part(target)
    furthest, tries = part.size, 0
    while True:
        try:
            _receive(url, part, checked, size=size, spare=spare, progress=progress, stop=stop)
            break
        except _BrokenError as error:
            if part.size > furthest:
                furthest, tries = part.size, 0
            if tries == len(WAITS):
                raise HarnessError(
                    f"{url}: {error}, in {tries + 1} tries; run the command again later, it goes "
                    "on where this one stopped, or take another server with --mirror"
                ) from error
            wait = max(WAITS[tries], min(error.wait, _LONGEST_WAIT))
            notify(f"{target.name}: {error}; next try in {wait:g} s")
            tries += 1
            if stop.wait(wait):
                raise StoppedError from error
    if problem := mismatch(part.path, sha256=sha256, md5=md5):
        part.discard()
        raise HarnessError(
            f"{url} is not the expected {target.name}: {problem}; nothing was kept. Try again or "
            "take another server with --mirror"
        )
    found = sha256 or file_sha256(part.path)
    part.finish(target)
    return found


def arrived(target: Path) -> int:
    """Bytes of a file that are on the disk already, be it complete or not."""
    return target.stat().st_size if target.exists() else Part(target).size


def _receive(
    url: str,
    part: Part,
    checked: bool,
    *,
    size: int | None,
    spare: int,
    progress: Progress | None,
    stop: threading.Event,
) -> None:
    """One request; returns when the part is the whole file."""
    old = part.version(url, checked=checked)
    start = part.size if old else 0
    if old and start == old.size:
        return  # complete, but the run ended before it was checked
    headers = {"User-Agent": "ssd-resnet34-trt", "Accept-Encoding": "identity"}
    if old and old.validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": old.validator}
    with _request(url, headers, part) as response:
        new = _version(url, response)
        _check_answer(url, response, new, size)
        if response.status != 206:
            part.begin(new)
            start = 0
        # a server may overlook If-Range, or send another range than the one asked for
        elif old is None or not old.continued_by(new) or _range_start(response.headers) != start:
            part.discard()
            raise _BrokenError("the file changed on the server, it is fetched from the start")
        require_space(part.path.parent, (new.size or size or 0) - start + spare)
        received, most = start, new.size or size or LARGEST
        with part.path.open("ab") as file:
            for chunk in _chunks(url, response):
                received += len(chunk)
                if received > most:
                    break
                file.write(chunk)
                if progress is not None:
                    progress(received, new.size)
                if stop.is_set():
                    raise StoppedError
    if new.size is not None and received < new.size:
        raise _BrokenError(f"the connection broke after {received} of {new.size} bytes")
    if received > most:
        part.discard()
        raise HarnessError(
            f"{url}: the server sends more than {most} bytes; take another server with --mirror"
        )


def _check_answer(url: str, response: HTTPResponse, new: Version, size: int | None) -> None:
    """Refuse what cannot be the file before any of it is kept."""
    headers = response.headers
    problem = None
    if headers.get_content_type() == "text/html":
        problem = "the server sends a web page, not the file"
    elif headers.get("Content-Encoding", "identity") != "identity":
        problem = f"the server sends the file encoded ({headers['Content-Encoding']})"
    elif new.size is None and response.status != 206 and not response.chunked:
        problem = "the server names no length, so a broken file would not be noticed"
    elif new.size == 0:
        problem = "the file on the server is empty"
    elif size is None and (new.size or 0) > LARGEST:
        problem = f"the file on the server has {new.size} bytes, more than {LARGEST}"
    elif None not in (size, new.size) and size != new.size:
        problem = f"the file on the server has {new.size} bytes, not {size}"
    if problem:
        raise HarnessError(f"{url}: {problem}; take another server with --mirror")


@contextmanager
def _request(url: str, headers: dict[str, str], part: Part) -> Iterator[HTTPResponse]:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - http(s), see apply_mirror
    try:
        response = _open(request)
    except urllib.error.HTTPError as error:
        with error:
            reason = f"{error.code} {one_line(error.reason)}"
            if error.code == 416:
                part.discard()
                raise _BrokenError("the file changed on the server") from error
            if error.code in (408, 429) or error.code >= 500:
                raise _BrokenError(reason, _retry_after(error.headers)) from error
            raise StatusError(error.code, f"{url}: the server answers {reason}") from error
    except (HTTPException, OSError) as error:
        raise _network_error(url, error) from error
    except ValueError as error:  # of an address that the server names, as a broken port
        raise HarnessError(f"{url}: the server names no address: {one_line(error)}") from error
    with response:
        yield response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to other web addresses alone."""

    def redirect_request(self, *answer: Any) -> urllib.request.Request | None:
        *_, address = answer
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or parts.port == 0:  # or it is no number
            raise ValueError(f"{address[:100]!r} is not of the web")
        return super().redirect_request(*answer)


def _open(request: urllib.request.Request) -> HTTPResponse:
    """Send a request and wait for the head of its answer, but not for one that drips."""
    # an opener of our own: the module's common one keeps the proxies of its first use
    opener = urllib.request.build_opener(_Redirects())
    answer: Future[HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(opener.open(request, timeout=TIMEOUT))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()  # it may outlive the transfer
    return answer.result(2 * TIMEOUT)


def _chunks(url: str, response: HTTPResponse) -> Iterator[bytes]:
    begun, received = time.monotonic(), 0
    while True:
        if (passed := time.monotonic() - begun) > 2 * TIMEOUT:
            if received < SLOWEST * passed:
                raise HarnessError(
                    f"{url}: the server sends less than {SLOWEST} bytes a second; run the command "
                    "again later, it goes on where this one stopped, or take another server with "
                    "--mirror"
                )
            begun, received = time.monotonic(), 0
        try:
            chunk = response.read1(_CHUNK)
        except (HTTPException, OSError) as error:
            raise _BrokenError(_reason(error)) from error
        if not chunk:
            return
        received += len(chunk)
        yield chunk


def _network_error(url: str, error: Exception) -> Exception:
    cause = getattr(error, "reason", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return HarnessError(f"{url}: the server's certificate is not trusted: {cause}")
    return _BrokenError(_reason(cause))


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT:g} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error) or type(error).__name__


def _version(url: str, response: HTTPResponse) -> Version:
    headers = response.headers
    length: str | None = headers["Content-Length"]
    if response.status == 206:
        found = _CONTENT_RANGE.fullmatch(headers["Content-Range"] or "")
        length = found[2] if found else None
    size = int(length) if length is not None and _NUMBER.fullmatch(length) else None
    return Version(url, size, headers["ETag"], headers["Last-Modified"])


def _range_start(headers: Message[str, str]) -> int | None:
    found = _CONTENT_RANGE.fullmatch(headers["Content-Range"] or "")
    return int(found[1]) if found else None


def _retry_after(headers: Any) -> float:
    seconds = str(headers["Retry-After"] or "")  # the form with a date is left to WAITS
    return float(seconds) if seconds.isdecimal() else 0.0
