"""Refusals of the kernel room, and the root of every error fxlora raises.

Stage: run time. The families of the rooms above (`GraphError`, `AdapterError`, `BatchError`) derive from `FxloraError`.
"""

from __future__ import annotations


class FxloraError(Exception):
    """Root of every error raised by fxlora."""


class RuntimeGoneError(FxloraError):
    """A rewritten graph was called after the adapter memory it reads had been closed."""

    def __init__(self, handle: int, digest: int, ordinal: int) -> None:
        super().__init__(
            f"handle {handle:#018x} belongs to runtime {ordinal} of plan {digest:#010x}, which has been closed; "
            f"rewrite or compile the graph again"
        )


class PlanMismatchError(FxloraError):
    """A rewritten graph carries a handle of a plan or group that this process never registered."""

    def __init__(self, handle: int, reason: str) -> None:
        super().__init__(f"handle {handle:#018x} does not fit the adapter memory of this process: {reason}")


class OpInputError(FxloraError, ValueError):
    """Arguments of one fxlora op disagree in shape, dtype or range."""


class PoolWriteError(FxloraError, ValueError):
    """An adapter does not fit the extent or the slot it is written to."""
