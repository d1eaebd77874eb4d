"""Triton servers for tests: the one that `make triton_server` installs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.errors import HarnessError
from harness.triton_server import find_server

ROOT = Path(__file__).resolve().parent.parent


def server_command() -> Path:
    """`tritonserver`, or the test is skipped."""
    pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")
    try:
        return find_server(ROOT / os.environ.get("BUILD_DIR", "build"))
    except HarnessError:
        pytest.skip("needs a Triton server: make triton_server")
