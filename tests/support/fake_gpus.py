"""A stand-in for the CUDA runtime's bindings, as far as they list and describe GPUs."""

from __future__ import annotations

from types import SimpleNamespace


class Code(int):
    """An error code, which has a name."""

    name: str

    def __new__(cls, value, name):
        code = super().__new__(cls, value)
        code.name = name
        return code


SUCCESS = Code(0, "cudaSuccess")


class FakeRuntime:
    """GPUs of these names; the UUID of number N ends in N, its PCI bus is N."""

    def __init__(self, *names, capability=(9, 0)):
        self.names, self.capability = names, capability
        self.failing = None
        self.current = None

    def stand_in(self, patch):
        patch.setattr("engine.backends.cuda.runtime", lambda: self)
        return self

    def cudaGetErrorString(self, error):  # noqa: N802
        return SUCCESS, {100: b"no CUDA-capable device is detected"}.get(int(error), b"a failure")

    def cudaGetDeviceCount(self):  # noqa: N802
        if not self.names:
            return Code(100, "cudaErrorNoDevice"), None
        return SUCCESS, len(self.names)

    def cudaSetDevice(self, device):  # noqa: N802
        if self.failing is not None:
            return (self.failing,)
        self.current = device
        return (SUCCESS,)

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        if not 0 <= device < len(self.names):
            return Code(101, "cudaErrorInvalidDevice"), None
        major, minor = self.capability
        uuid = SimpleNamespace(bytes=bytes(15) + bytes([device]))
        name = self.names[device].encode().ljust(256, b"\0")
        return SUCCESS, SimpleNamespace(name=name, major=major, minor=minor, uuid=uuid)

    def cudaDeviceGetPCIBusId(self, length, device):  # noqa: N802
        return SUCCESS, f"0000:{device:02X}:00.0".encode().ljust(length, b"\0")
