"""`attach(model)`: gives a model its runtime, which compiled graphs find by the identity of the model's Parameters.

Stage: first under torch.compile, before any graph. A runtime lives as long as its model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from fxlora.errors import AlreadyAttachedError, GraphError, NotAttachedError
from fxlora.passes.plan import AdapterShape, Targets
from fxlora.passes.rows.seeds import BatchDims
from fxlora.passes.weights import Weights
from fxlora.runtime import Runtime

_by_model: WeakIdKeyDictionary = WeakIdKeyDictionary()
_by_parameter: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_registry_lock = threading.Lock()


def attach(
    model: nn.Module,
    max_adapters: int = 8,
    max_rank: int = 64,
    targets: Targets = None,
    batch_dims: BatchDims = None,
    pool_rows: int | None = None,
    max_tokens: int = 8192,
    group_siblings: bool = True,
    example_inputs: Any = None,
) -> Runtime:
    """Give a model adapter memory that its compiled graphs read; the model itself stays as it is.

    Compile with `torch.compile(model, backend=runtime.backend)`, or with `backend="fxlora"`, which finds the runtime by
    the identity of the model's Parameters. Move the model and set its mode first.

    Args:
        model: The bare base model. It gets one runtime at a time, which lives as long as the model does.
        max_adapters, max_rank, targets, batch_dims, pool_rows, group_siblings: as for `fxlora.apply`.
        max_tokens: Requests (tokens, where `batch_dims` has two dims) of the largest batch.
        example_inputs: One call's arguments, a tuple or a dict, from which the sites are learned now. By default the
            model's own `dummy_inputs`. Where neither can be traced, the first compiled graph shows the sites; adapters
            loaded before are checked against names and shapes of weights now and against the sites then.

    Raises:
        AlreadyAttachedError: The model, or a model that holds one of its Parameters, has a runtime.
        CaptureError: `example_inputs` cannot be traced. PeftModelError: the model holds PEFT's wrappers.
        TargetError: `targets` names nothing. CapacityError: `pool_rows` is too small.
    """
    if not isinstance(model, nn.Module):
        raise GraphError(f"attach takes a model, a torch.nn.Module, not a {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    names = dict(model.named_parameters(remove_duplicate=False))
    Weights.refuse_peft(names)
    if taken := next((path for path, parameter in names.items() if _owner(parameter) is not None), None):
        raise AlreadyAttachedError(
            f"{taken!r} of this {type(model).__name__} belongs to a runtime already (`fxlora.runtime(model)`): use it, "
            f"or close it first with `runtime.close()`"
        )
    shape = AdapterShape(max_adapters, max_rank, pool_rows)
    made = Runtime(model, names, shape, targets, batch_dims, max_tokens, group_siblings)
    made.learn(model, example_inputs)
    with _registry_lock:
        _by_model[model] = made
        for parameter in names.values():
            _by_parameter[parameter] = weakref.ref(made)
    return made


def runtime(model: nn.Module) -> Runtime:
    """The runtime of an attached model, or of a compiled form of it. Raises NotAttachedError."""
    model = getattr(model, "_orig_mod", model)
    found = _by_model.get(model) or next(filter(None, map(_owner, model.parameters())), None)
    if found is None or found.closed:
        raise NotAttachedError(
            f"this {type(model).__name__} has no runtime: call `fxlora.attach(model)`, or `fxlora.compile(model)`"
        )
    return found


def _owner(parameter: torch.Tensor) -> Runtime | None:
    reference = _by_parameter.get(parameter)
    found = None if reference is None else reference()
    return None if found is None or found.closed else found


def owner_of(parameters: Sequence[tuple[str, torch.Tensor]]) -> Runtime:
    """The one runtime of all these Parameters, each with its path in a graph. Raises NotAttachedError."""
    owners = [(path, _owner(parameter)) for path, parameter in parameters]
    found = {id(owner): owner for _, owner in owners}
    if len(found) == 1 and (only := next(iter(found.values()))) is not None:
        return only
    strangers = [path for path, owner in owners if owner is None]
    if strangers and len(strangers) < len(owners):
        raise NotAttachedError(
            f"the graph reads {strangers[0]!r} ({len(strangers)} of {len(owners)} Parameters), which belongs to no "
            f"runtime: it was put into the model after `fxlora.attach`, or is of another model. Copy new values into "
            f"the attached Parameter, or close the runtime and attach again"
        )
    if strangers:
        raise NotAttachedError(
            f"the graph reads {strangers[0]!r} and {len(strangers) - 1} other Parameters, none of which belongs to a "
            f"runtime: call `fxlora.attach(model)` before the compiled model runs"
        )
    raise NotAttachedError(f"the graph reads Parameters of {len(found)} attached models; compile each by itself")
