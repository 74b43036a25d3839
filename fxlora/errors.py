"""Every error fxlora raises, by room; users catch `FxloraError` or one of the families here.

Stage: all. `AdapterError` covers an adapter's way from file to pool, `BatchError` the `adapters=` of a call. The
families of the rooms below are re-exported. A message says what was found, what was expected and what exists.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxlora.kernels.errors import FxloraError, OpInputError, PlanMismatchError, PoolWriteError, RuntimeGoneError
from fxlora.passes.errors import (
    AlreadyAppliedError,
    AlreadyAttachedError,
    AmbiguousRequestsError,
    BatchDimsError,
    CallError,
    CaptureError,
    CompileOptionError,
    GraphBreakError,
    GraphError,
    NeedsExampleInputsError,
    NotAttachedError,
    PeftModelError,
    RowsNotProvenError,
    TargetError,
    VerifyError,
)

__all__ = [
    "AdapterConfigError",
    "AdapterDtypeError",
    "AdapterError",
    "AdapterFileError",
    "AdapterFormatError",
    "AdapterInUseError",
    "AdapterShapeError",
    "AlreadyAppliedError",
    "AlreadyAttachedError",
    "AmbiguousRequestsError",
    "BaseWeightMismatchError",
    "BatchDimsError",
    "BatchError",
    "BatchGranularityError",
    "BatchInUseError",
    "BatchNotServedError",
    "BatchSizeError",
    "BatchTypeError",
    "CallError",
    "CapacityError",
    "CaptureError",
    "CompileOptionError",
    "ConflictingEntriesError",
    "ContinuousBatchingError",
    "DumpError",
    "DumpFocusError",
    "DumpFormatError",
    "DumpPackageError",
    "DumpPathError",
    "DuplicateAdapterError",
    "FxloraError",
    "GraphBreakError",
    "GraphError",
    "IncompletePairError",
    "NeedsExampleInputsError",
    "NonFiniteError",
    "NotAttachedError",
    "OpInputError",
    "PeftModelError",
    "PickledAdapterError",
    "PlanMismatchError",
    "PoolClosedError",
    "PoolWriteError",
    "RankError",
    "RowsNotProvenError",
    "RuntimeGoneError",
    "TargetError",
    "TransformersVersionError",
    "Unbound",
    "UnboundTensorError",
    "UnknownAdapterError",
    "UnsupportedAdapterError",
    "VerifyError",
]

_LISTED_MAX = 100


class AdapterError(FxloraError):
    """An adapter cannot be read, bound, placed or found."""


class AdapterFileError(AdapterError):
    """The adapter folder or one of its files does not exist."""


class PickledAdapterError(AdapterFileError):
    """The folder holds its weights as a pickle only; it is never opened, as unpickling can run code."""


class AdapterFormatError(AdapterError):
    """A file or a mapping is there but is not what PEFT writes: malformed JSON, corrupt safetensors, mixed adapters."""


class AdapterConfigError(AdapterFormatError):
    """A key of adapter_config.json is missing or has a value of the wrong type."""


class UnsupportedAdapterError(AdapterError):
    """The adapter uses a feature that changes the arithmetic and that fxlora does not serve."""


class RankError(AdapterError):
    """A rank is not positive, differs from the tensor that carries it, or exceeds max_rank."""


class AdapterDtypeError(AdapterError):
    """An adapter tensor is not floating point."""


class NonFiniteError(AdapterError):
    """A tensor or a scaling holds NaN or infinity, as stored or after conversion to the dtype of its pool."""


class AdapterShapeError(AdapterError):
    """A tensor does not have the shape its site asks for."""


class IncompletePairError(AdapterError):
    """A lora_A has no lora_B, or the other way round."""


class ConflictingEntriesError(AdapterError):
    """Two entries name one site through different aliases and differ."""


class BaseWeightMismatchError(AdapterError):
    """The full copy of a base weight in the adapter is not the weight of this model."""


@dataclass(frozen=True)
class Unbound:
    """One adapter tensor that found no site.

    key: the name in the file. reason: why it has no site. nearest: the closest name that has one, if any is close.
    """

    key: str
    reason: str
    nearest: str | None = None

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}" + (f"; nearest: {self.nearest}" if self.nearest else "")


class UnboundTensorError(AdapterError):
    """Some adapter tensors found no site; `unbound` has all of them, the message the first hundred."""

    def __init__(self, unbound: tuple[Unbound, ...], *, bound: int) -> None:
        self.unbound = unbound
        lines = [f"{len(unbound)} adapter tensors have no site ({bound} have one); nothing was loaded:"]
        lines += [f"  {item}" for item in unbound[:_LISTED_MAX]]
        if len(unbound) > _LISTED_MAX:
            lines.append(f"  and {len(unbound) - _LISTED_MAX} more (see .unbound)")
        super().__init__("\n".join(lines))


class CapacityError(AdapterError):
    """No slot or no contiguous extent is free. asked, free, largest_free: slots or pool rows, as `unit` says."""

    def __init__(self, message: str, *, unit: str, asked: int, free: int, largest_free: int) -> None:
        self.unit, self.asked, self.free, self.largest_free = unit, asked, free, largest_free
        super().__init__(message)


class DuplicateAdapterError(AdapterError):
    """An adapter of this name is loaded already."""


class AdapterInUseError(AdapterError):
    """An adapter cannot be unloaded while requests of continuous batching have it."""


class PoolClosedError(AdapterError):
    """The adapter pool was closed."""


class DumpError(FxloraError):
    """A graph cannot be dumped as asked."""


class DumpFormatError(DumpError, ValueError):
    """No such format."""


class DumpPathError(DumpError, OSError):
    """The path of a dump cannot be written or read."""


class DumpFocusError(DumpError, ValueError):
    """`focus=` names no module of the graph."""


class DumpPackageError(DumpError, ImportError):
    """A format needs a package or a program that is not installed; the message says how to install it."""


class BatchError(FxloraError):
    """The `adapters=` of a call does not fit the call."""


class BatchTypeError(BatchError, TypeError):
    """`adapters=` holds something that is neither a name, None, a list of these nor an int tensor of slots."""


class BatchSizeError(BatchError, ValueError):
    """`adapters=` has another length or shape than the inputs."""


class BatchGranularityError(BatchError, TypeError):
    """`adapters=` is nested deeper than the module was built for."""


class BatchInUseError(BatchError, RuntimeError):
    """Another thread runs a batch of this runtime, or the batch of this thread cannot be set now."""


class BatchNotServedError(BatchError, RuntimeError):
    """A batch named adapters, and no compiled graph of its runtime ran inside it."""


class UnknownAdapterError(AdapterError, BatchError):
    """No adapter of this name, or in this slot, is loaded."""


class ContinuousBatchingError(FxloraError):
    """A step of continuous batching cannot be served."""


class TransformersVersionError(ContinuousBatchingError):
    """The installed transformers lacks something that fxlora uses of its continuous batching."""
