"""Opaque calls (packed multi-head attention, modules that symbols cannot trace) to the aten ops they are made of.

Each is traced once at sizes of the proof, all dims symbolic, and its graph takes the call's place. What cannot be
traced stays, and its weights are skipped with that reason.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch.fx.experimental.proxy_tensor import make_fx

from fxlora.passes.fused import SPELLED
from fxlora.passes.graph import op_name, place_in_model
from fxlora.passes.normalize import replace_call
from fxlora.passes.rows.worlds import TensorFacts, UnknownShapeError, World, model_guards, shape_env_of

log = logging.getLogger(__name__)

_OPAQUE_FUNCTIONS = {"multi_head_attention_forward", *SPELLED}


def opaque_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Calls whose inside is not in the graph and matters: it reads weights, or its result is used."""
    return [
        n
        for n in gm.graph.nodes
        if n.users and (n.op == "call_module" or (n.op == "call_function" and op_name(n) in _OPAQUE_FUNCTIONS))
    ]


def decompose_calls(gm: fx.GraphModule, world: World) -> int:
    """Replace what can be traced; returns how many calls were."""
    return sum(_decompose(gm, node, world) for node in opaque_calls(gm))


def _decompose(gm: fx.GraphModule, node: fx.Node, world: World) -> bool:
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    weights = [] if module is None else list({**dict(module.named_parameters()), **dict(module.named_buffers())})
    operands = [n for n in node.all_input_nodes if isinstance(_facts(world, n), TensorFacts)]
    try:
        examples = [_example(world.facts(n)) for n in operands] + [
            _example(_attribute(module, name)) for name in weights
        ]
    except UnknownShapeError:
        return False

    def call(*tensors: torch.Tensor) -> Any:
        values = dict(zip(operands, tensors, strict=False))
        args = fx.map_arg(node.args, lambda n: values.get(n, world.facts(n) if n not in values else None))
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: values.get(n, world.facts(n) if n not in values else None))
        if module is None:
            return SPELLED.get(op_name(node), node.target)(*args, **kwargs)  # type: ignore[operator]
        state = dict(zip(weights, tensors[len(operands) :], strict=True))
        return torch.func.functional_call(module, state, args, kwargs)

    try:
        # Under torch.compile its sizes would be those of dynamo's own trace, which then cannot guard them.
        with torch.no_grad(), tracing(None):
            inner = make_fx(call, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True)(*examples)
    except Exception as error:
        log.info("%s stays opaque: %s", node.name, error)
        return False
    env = shape_env_of(inner)
    if env is not None and model_guards(env):
        log.info("%s stays opaque: it branches on sizes (%s)", node.name, model_guards(env)[0])
        return False
    with gm.graph.inserting_before(node):
        sources = operands + [gm.graph.get_attr(f"{node.target}.{name}") for name in weights]
    facts = world.facts(node) if node in world.values or world.symbols is not None else None
    _know(world, _splice(gm, node, inner, sources), facts)
    return True


def _know(world: World, result: Any, facts: Any) -> None:
    """What the call was known to give, for the calls that read what now stands in its place."""
    if isinstance(result, fx.Node):
        world.values.setdefault(result, facts)
    elif isinstance(result, list | tuple) and isinstance(facts, tuple):
        for item, known in zip(result, facts, strict=True):
            _know(world, item, known)


def _attribute(module: torch.nn.Module | None, name: str) -> Any:
    return operator.attrgetter(name)(module)


def _facts(world: World, node: fx.Node) -> Any:
    try:
        return world.facts(node)
    except UnknownShapeError:
        return None


def _example(facts: Any) -> torch.Tensor:
    return torch.zeros(tuple(facts.shape), dtype=facts.dtype, device=facts.device)


def _splice(gm: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, sources: list[fx.Node]) -> Any:
    """Put the traced graph where the call stood; what it returns, in the place of the call."""
    values: dict[fx.Node, Any] = {}
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    values.update(zip(placeholders, sources, strict=True))
    with gm.graph.inserting_before(node):
        for n in inner.graph.nodes:
            if n.op in ("placeholder", "output"):
                continue
            if n.op == "get_attr":
                name = f"_{node.name}_{n.target}".replace(".", "_")
                setattr(gm, name, operator.attrgetter(str(n.target))(inner))
                values[n] = gm.graph.get_attr(name)
            else:
                values[n] = gm.graph.node_copy(n, lambda a: values[a])
            values[n].meta = place_in_model(node.meta)
    returned = next(n.args[0] for n in inner.graph.nodes if n.op == "output")
    result: Any = fx.map_arg(returned, lambda a: values[a])
    replace_call(gm, node, result)
    return result
