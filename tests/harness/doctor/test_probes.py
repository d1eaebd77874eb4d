"""What the doctor reads of this machine."""

from __future__ import annotations

import pytest

from harness.doctor.probes import int8_on_cpu


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("fpu avx2 avx512_vnni", "avx512_vnni: INT8 by 'engine quantize --target cpu' is faster"),
        ("fpu avx2 avx_vnni", "avx_vnni: INT8"),
        ("fpu avx2 avx_vnni_not", "neither VNNI nor AMX"),
        (None, "neither VNNI nor AMX"),
    ],
)
def test_what_int8_gains_on_a_cpu(tmp_path, flags, says):
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert int8_on_cpu(tmp_path / "cpuinfo").startswith(says)
