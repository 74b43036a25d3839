"""Errors of the graph side: one class per refusal, each message says what was found, expected and what exists."""

from __future__ import annotations

from fxlora.kernels.errors import FxloraError

__all__ = [
    "AlreadyAppliedError",
    "AlreadyAttachedError",
    "AmbiguousRequestsError",
    "BatchDimsError",
    "CallError",
    "CaptureError",
    "CompileOptionError",
    "GraphBreakError",
    "GraphError",
    "NeedsExampleInputsError",
    "NotAttachedError",
    "PeftModelError",
    "RowsNotProvenError",
    "TargetError",
    "VerifyError",
]


class GraphError(FxloraError):
    """A graph that cannot be served as asked."""


class AlreadyAppliedError(GraphError):
    """The graph already holds fxlora ops."""


class AlreadyAttachedError(GraphError):
    """The model has a runtime, and a model has one at a time."""


class NotAttachedError(GraphError):
    """A model or a Parameter that belongs to no runtime: never attached, replaced since, or of a closed runtime."""


class CompileOptionError(GraphError, ValueError):
    """An option of the compile backend that does not exist, or a value that it does not take."""


class GraphBreakError(GraphError):
    """A part of a model's forward reads weights that adapters may target: nothing can be proven across a break."""


class NeedsExampleInputsError(GraphError):
    """The graph carries no shapes and no ``example_inputs`` were given."""


class PeftModelError(GraphError):
    """The graph or model already holds PEFT's LoRA wrappers."""


class BatchDimsError(GraphError):
    """``batch_dims`` does not fit the graph's inputs."""


class AmbiguousRequestsError(GraphError):
    """No input dim can be told to be the request dim."""


class TargetError(GraphError):
    """A target names nothing that can be adapted."""


class RowsNotProvenError(GraphError):
    """It is not proven which request each row of a targeted site belongs to."""


class CaptureError(GraphError):
    """No whole graph of a model could be captured."""


class CallError(GraphError):
    """A call whose arguments do not fit the graph."""


class VerifyError(GraphError):
    """A rewritten graph failed a structural check: a defect of fxlora, never of the user's model."""
