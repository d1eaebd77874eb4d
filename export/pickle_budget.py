"""What a pickle may cost, counted before it is run: its operations are read, not carried out.

A pickle of a few KB can ask for gigabytes or for minutes: a memo index of 2^31 makes CPython's
unpickler allocate a table of that length, and the hash of a tuple of shared tuples takes time
exponential in their nesting, and stack in proportion to it.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

from export.errors import ExportError

MAX_OPERATIONS = 4_000_000
"""Each makes an object of some 100 bytes at most; a checkpoint of 10,000 tensors has 500,000."""

MAX_TUPLE_DEPTH = 100
"""No checkpoint nests tuples deeper than the arguments of its rebuild functions, 4."""

_MARK = (0, -1)
_PUT = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GET = ("GET", "BINGET", "LONG_BINGET")
_HASHED = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
_OTHER = (1, 0)


def check_pickle(file: IO[bytes]) -> None:
    """Read a pickle to its end, and count.

    Parameters
    ----------
    file
        At its start; left behind its last byte.

    Raises
    ------
    ExportError
        More operations or deeper tuples than the limits, or a memo index that no pickler writes.
    ValueError, IndexError, KeyError
        No whole pickle.
    """
    # of each object on the unpickler's stack: what hashing it costs, and the depth of its tuples
    stack: list[tuple[int, int]] = []
    memo: dict[int, tuple[int, int]] = {}
    spent = 0
    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        spent += 1
        if name in _PUT:
            index = len(memo) if name == "MEMOIZE" else int(argument)
            if not 0 <= index <= spent:
                raise ExportError(f"the pickle numbers an object {index} after {spent} operations")
            memo[index] = stack[-1]
        elif name in _GET or name == "DUP":
            stack.append(stack[-1] if name == "DUP" else memo[int(argument)])
            spent += stack[-1][0]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        else:
            parts = _taken(operation, stack)
            made = _OTHER
            if name in _HASHED:
                made = 1 + sum(cost for cost, _ in parts), 1 + max((d for _, d in parts), default=0)
                spent += made[0]
            stack.extend(made for _ in operation.stack_after)
            if made[1] > MAX_TUPLE_DEPTH:
                raise ExportError(f"tuples nested deeper than {MAX_TUPLE_DEPTH} in the pickle")
        if spent > MAX_OPERATIONS:
            raise ExportError(f"more than {MAX_OPERATIONS} operations in the pickle")


def _taken(
    operation: pickletools.OpcodeInfo, stack: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Pop what an operation takes off the stack."""
    before = operation.stack_before
    parts = []
    if pickletools.markobject in before:
        while (top := stack.pop()) is not _MARK:
            parts.append(top)
        before = before[: before.index(pickletools.markobject)]
    parts += [stack.pop() for _ in before]
    return parts
