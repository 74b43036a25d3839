"""The ways into a compiled Triton kernel that cost the host least.

Stage: run time, below launch.py, which takes the first way, and replay.py, which takes the second. `run.launch` lies
past `CompiledKernel.run`, whose signature is that of Triton 3.6 to 3.9. Before it enters C it takes what TMA moves
apart, in Python and at every launch (a map of 128 bytes, sizes, strides). These follow from an address and what is
known before, so a caller that keeps them may call the C function itself.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import triton

logger = logging.getLogger(__name__)

Enter = Callable[[int, int, int, int, tuple[object, ...]], object]
"""(grid x, y, z, stream, arguments: addresses of tensors, a `launch.Described` for each that TMA moves)."""


class Native(NamedTuple):
    """The C function, called with the grid, the stream and `head`, and then with arguments and `tail`, which are one
    tuple if `packs`."""

    call: Callable[..., object]
    head: tuple[object, ...]
    tail: tuple[object, ...]
    packs: bool
    unfold: Callable[[int, Any], tuple[object, ...]]
    """(number, argument): what C takes in place of an argument that TMA moves, which is one of that number."""


class Entry(NamedTuple):
    """Both ways; native is None where it is not known."""

    enter: Enter
    native: Native | None


def entry(compiled: Any, num_constants: int) -> Entry | None:
    """The ways into a compiled kernel; None when there is none that we know."""
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    try:
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        logger.warning("triton %s has no kernel entry that fxlora knows: launches cost more", triton.__version__)
        return None
    tail = (None,) * num_constants
    head = _head(run, function, packed)
    if head is None:
        return Entry(
            lambda x, y, z, stream, call: run(x, y, z, stream, function, packed, None, None, None, *call, *tail), None
        )
    launch, packs = run.launch, release() > (3, 6)
    native = _native(launch, head, tail, packs)
    if packs:
        return Entry(lambda x, y, z, stream, call: launch(x, y, z, stream, *head, (*call, *tail)), native)
    return Entry(lambda x, y, z, stream, call: launch(x, y, z, stream, *head, *call, *tail), native)


def _head(run: Any, function: object, packed: object) -> tuple[object, ...] | None:
    """What `run.launch` gets between the stream and the arguments, where its signature is known: no scratch memory, no
    launch hooks."""
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return None
    if getattr(run, "gsan_enabled", False):
        return None
    flags, none = (run.launch_cooperative_grid, run.launch_pdl), None
    if release() == (3, 6):
        return (function, *flags, none, none, packed, none, none, none)
    if (3, 7) <= release() <= (3, 9):
        return (function, *flags, packed, none, none, none, none, none, run.arg_annotations, run.kernel_signature)
    return None


def _native(launch: Any, head: tuple[object, ...], tail: tuple[object, ...], packs: bool) -> Native | None:
    """Of a `run.launch`, which is the C function itself where TMA moves nothing, else a closure around it."""
    if not inspect.isfunction(launch):
        return Native(launch, head, tail, packs, _nothing_to_unfold)
    known = inspect.getclosurevars(launch).nonlocals
    call, maps = known.get("launcher"), known.get("tensordesc_meta")
    make = getattr(import_module("triton.backends.nvidia.driver"), "make_tensordesc_arg", None)
    if call is None or not maps or None in maps or make is None:
        return None
    rest = (None,) * (len(inspect.signature(make).parameters) - 2)  # since 3.8, arguments of the launch, for others
    return Native(call, head, tail, packs, lambda number, described: tuple(make(described, maps[number], *rest)))


def _nothing_to_unfold(number: int, described: Any) -> tuple[object, ...]:
    raise TypeError(f"TMA moves {described!r}, which a kernel that was compiled without TMA got as its number {number}")


@cache
def release() -> tuple[int, ...]:
    """Of Triton: (3, 6)."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])
