"""Which CPUs are next to a GPU, on machines whose memory is not the same distance from all CPUs.

Linux puts memory next to the CPU that touches it first, so a thread that runs next to its GPU
allocates there, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SYS = Path("/sys")


def gpu_cpus(device: str) -> frozenset[int] | None:
    """CPUs of the NUMA node that a GPU is attached to.

    Parameters
    ----------
    device
        ``cuda`` or ``cuda:N``, see `engine.backends.cuda.gpu_index`.

    Returns
    -------
    frozenset of int or None
        Of the CPUs that the process may use. None where it makes no difference or nothing is
        known: no GPU, one node, or none of the node's CPUs may be used.

    Raises
    ------
    EngineError
        When there is no such GPU.
    """
    from engine.backends.cuda import gpu_index, pci_bus_id

    index = gpu_index(device)
    if index is None or len(_nodes(_SYS)) < 2:
        return None
    return cpus_near(pci_bus_id(index), _SYS) or None


def cpus_near(pci: str, sys: Path) -> frozenset[int]:
    """CPUs that the process may use on the node of a PCI device.

    Parameters
    ----------
    pci
        Address of the device, as ``0000:1b:00.0``.
    sys
        Where sysfs is mounted.

    Returns
    -------
    frozenset of int
        None of them where the kernel does not know the node: it says -1 then.
    """
    try:
        node = int((sys / "bus/pci/devices" / pci / "numa_node").read_text())
    except (OSError, ValueError):
        return frozenset()
    return _nodes(sys).get(node, frozenset()) & os.sched_getaffinity(0)


def parse_cpu_list(text: str) -> frozenset[int]:
    """CPUs of the kernel's list format, as ``0-3,8,10-11``.

    Raises
    ------
    ValueError
        When it is none.
    """
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


@contextmanager
def running_on(cpus: frozenset[int] | None) -> Iterator[None]:
    """Keep this thread on some CPUs, where there are any to keep it on."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _nodes(sys: Path) -> dict[int, frozenset[int]]:
    """NUMA nodes that have CPUs."""
    nodes = {}
    for folder in (sys / "devices/system/node").glob("node*"):
        if found := re.fullmatch(r"node(\d+)", folder.name):
            try:
                cpus = parse_cpu_list((folder / "cpulist").read_text())
            except (OSError, ValueError):
                continue
            if cpus:
                nodes[int(found[1])] = cpus
    return nodes
