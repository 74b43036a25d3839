"""What kernels in Gluon do through TMA and with shared memory, by the names that the installed Triton has for it.

Stage: compile time of the kernels. Gluon is experimental, and its releases rename functions whose arguments and meaning
stay:
    load_block(descriptor, [row, column], barrier, to, pred): TMA brings a block to shared memory
    store_block(descriptor, [row, column], block): TMA writes one of shared memory
    load_elements(to, pointers, mask): what TMA cannot read, without registers (cp.async)
    viewed(memory, dtype, shape, layout): the same shared memory
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma


def _first(place: Any, *names: str) -> Any:
    """The first of these names that there is; newer ones go first, as older ones may stay to raise an error."""
    return next(getattr(place, name) for name in names if hasattr(place, name))


load_block = _first(tma, "async_load", "async_copy_global_to_shared")
store_block = _first(tma, "async_store", "async_copy_shared_to_global")
load_elements = _first(async_copy, "async_load", "async_copy_global_to_shared")
viewed = _first(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")
