"""Model and example inputs -> one whole graph, with dynamic batch and length. The first step of the flow."""

from __future__ import annotations

import inspect
import logging
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxlora.errors import CaptureError
from fxlora.passes.weights import Weights, tensor_key
from fxlora.renames import renames_of
from fxlora.signature import META_KEY, constant_leaves, supply_builtins, tensor_leaves
from fxlora.size_limit import limited_sizes
from fxlora.tracing import call_once, capture_settings, experts_advice, plain_attention, unwrapped

_log = logging.getLogger(__name__)


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """Trace a model's whole forward for these inputs.

    Dynamo's whole-graph capture is tried first (it keeps every name of every weight), then torch.export. Every dim of
    size two or more of every tensor input becomes dynamic where the model allows it, and torch can still compare what
    sizes follow from it (`LoraModule.fixed_sizes` has the rest).
    The graph is called like the model, with arguments of the same names, and shares its weights.

    Args:
        model: The bare base model (no PEFT wrappers), in the mode (`eval()`) it is to be served in. Of a wrapper of
            torch's (`torch.compile`, data parallel), the model inside it.
        *args, **kwargs: One call's arguments. Values that are no tensors are fixed by the capture.

    Returns:
        A graph module for `fxlora.apply`.

    Raises:
        CaptureError: Neither tracer gets a whole graph (a data-dependent branch, an untraceable call).
        PeftModelError: The model holds PEFT's wrappers.
    """
    model = unwrapped(model)
    Weights.refuse_peft([name for name, _ in model.named_parameters(remove_duplicate=False)])
    args, kwargs = _by_name(model, args, kwargs)
    _refuse_unknown_containers(args, kwargs)
    failures: list[str] = []
    too_deep: list[str] = []
    # Image sizes, kernels and the like may be more than a tracer can leave open: then batch and length alone are.
    attempts = (
        ("dynamo", _dynamo, None),
        ("dynamo", _dynamo_after_a_call, None),
        ("dynamo", _dynamo, 2),
        ("export", _export, None),
    )
    for name, tracer, dims in attempts:
        if too_deep and dims is None:
            continue  # it would grow as long again
        args, kwargs = _with_open_dims(args, kwargs, dims)
        try:
            # Nothing of an earlier capture of the same class may decide what is symbolic here; numbers stay numbers.
            config = torch._dynamo.config.patch({"automatic_dynamic_shapes": False, **capture_settings()})
            limit = limited_sizes() if dims is None else nullcontext(too_deep)
            with config, torch.no_grad(), plain_attention(), limit as too_deep, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gm = tracer(model, args, kwargs)
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            _log.debug("%s could not capture the model", name, exc_info=True)
            continue
        supply_builtins(gm)
        _remember(gm, model, args, kwargs)
        return gm
    advice = experts_advice(model)
    raise CaptureError(
        "no whole graph of the model could be captured, and nothing can be proven across a graph break"
        + (f" ({advice}).\n" if advice else ".\n")
        + "\n".join(dict.fromkeys(failures))
    )


def _with_open_dims(args: Any, kwargs: Any, dims: int | None) -> tuple[Any, Any]:
    """The arguments over the same memory, the first dims of each marked as dynamic (None: all of them)."""
    args, kwargs = pytree.tree_map(lambda t: t.detach() if type(t) is torch.Tensor else t, (args, kwargs))
    for _, tensor in tensor_leaves((args, kwargs)):
        for d, size in enumerate(tensor.shape[:dims]):
            if size > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, d)
    return args, kwargs


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments by name, where the model's forward names them all: a graph keeps names of keywords only."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"these arguments do not fit the model's forward{signature}: {error}") from error
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return args, kwargs
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return (), named


def _refuse_unknown_containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for arguments that hold tensors where no tracer can see them as inputs."""
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and tensor_leaves(leaf):
            kind = f"{type(leaf).__module__}.{type(leaf).__name__}"
            raise CaptureError(
                f"argument {pytree.keystr(path)} is a {kind}, whose tensors cannot be inputs of a graph: pass the "
                f"tensors themselves, or register the class with `torch.utils._pytree.register_pytree_node` "
                f"(transformers has one for DynamicCache: `register_dynamic_cache_export_support`)"
            )


def _dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    return dynamo_graph_capture_for_export(model)(*args, **kwargs)


def _dynamo_after_a_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    call_once(model, args, kwargs)
    return _dynamo(model, args, kwargs)


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    def dims(value: Any) -> Any:
        return tuple(torch.export.Dim.AUTO for _ in value.shape) if isinstance(value, torch.Tensor) else None

    shapes = (pytree.tree_map(dims, args), pytree.tree_map(dims, kwargs))
    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    by_name = {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}
    dynamic = shapes[0] if args and not kwargs else by_name
    return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic).module()  # type: ignore[return-value]


def _remember(gm: fx.GraphModule, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep beside the graph what it does not show itself: aliases of weights, the output embedding, fixed arguments."""
    names = list(inspect.signature(model.forward).parameters)
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    head = output_embedding(model)
    kept = (
        None if hasattr(gm.graph._codegen, "dynamo_bytecode_flatten") else model
    )  # export drops names; dynamo keeps all
    named = kept is None and not args
    gm.meta[META_KEY] = {
        "class": type(model).__name__,
        "constants": constant_leaves(bound),
        "output_embedding": head,
        "model": kept,
        "origin": model,
        "order": names if named else (),
        "renames": renames_of([model]),
    }


def output_embedding(model: nn.Module) -> str | None:
    """The path of the weight that makes logits, where the model says which it is (as transformers models do)."""
    getter = getattr(model, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        weight = getattr(getter(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(weight, torch.Tensor):
        return None
    named = model.named_parameters(remove_duplicate=False)
    return next((name for name, parameter in named if tensor_key(parameter) == tensor_key(weight)), None)
