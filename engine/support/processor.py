"""What this machine's processor has for INT8."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_KNOWN = ("amx_int8", "avx512_vnni", "avx_vnni")

CPUINFO = Path("/proc/cpuinfo")


@cache
def int8_instructions(cpuinfo: Path = CPUINFO) -> str | None:
    """Name, as Linux has it, of instructions that sum INT8 products in 32 bits; None: none known.

    Parameters
    ----------
    cpuinfo
        Linux's list of processors.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    lines = (line.partition(":") for line in text.splitlines())
    flags = {flag for key, _, value in lines if key.strip() == "flags" for flag in value.split()}
    return next((name for name in _KNOWN if name in flags), None)
