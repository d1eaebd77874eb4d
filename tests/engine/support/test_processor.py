"""What the processor has for INT8, and what ONNX Runtime is told of it."""

from __future__ import annotations

import pytest

from engine.backends.onnxruntime import session
from engine.support.processor import int8_instructions

CPUINFO = "processor\t: 0\nflags\t\t: {}\nbugs\t\t: avx_vnni\n\nprocessor\t: 1\nflags\t\t: {}\n"


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx2 avx512_vnni", "avx512_vnni"),
        ("avx_vnni", "avx_vnni"),
        ("avx512_vnni amx_int8", "amx_int8"),
        ("fpu avx2 avx512f", None),
    ],
)
def test_instructions(tmp_path, flags, found):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags, flags))
    assert int8_instructions(tmp_path / "cpuinfo") == found
    assert int8_instructions(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["avx512_vnni", None])
def test_only_without_them_sums_are_made_exact_the_slow_way(monkeypatch, name):
    monkeypatch.setattr(session, "int8_instructions", lambda: name)
    assert session.exact_int8() == ({} if name else {"session.x64quantprecision": "1"})
