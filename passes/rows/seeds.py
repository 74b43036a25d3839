"""Which input dims tell requests apart: the seeds of row provenance, bound by the caller's signature."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import fx

from fxlora.passes.errors import AmbiguousRequestsError, BatchDimsError
from fxlora.passes.rows.worlds import GraphInput

BatchDims = int | tuple[int, ...] | Mapping[str, int | tuple[int, ...] | None] | None


def choose_seeds(inputs: Sequence[GraphInput], batch_dims: BatchDims) -> tuple[dict[fx.Node, tuple[int, ...]], fx.Node]:
    """The request dims of each input, and the input that gives ``adapter_slots`` its shape.

    Args:
        inputs: The graph's inputs, in the caller's order.
        batch_dims: None or 0: dim 0 of every input that shares the first input's batch dim. ``(0, 1)``: adapters are
        chosen per
            token. A mapping names inputs: ``{"input_ids": 0}``, ``{"input_ids": (0, 1)}``; other inputs follow where
            they share
            the dim. None for an input says that it holds what belongs to the requests in their order, along no dim of
        theirs (see :func:`trusted_inputs`).

    Raises:
        BatchDimsError: A name or dim that no input has.
        AmbiguousRequestsError: No tensor input with a dim to tell requests by.
    """
    tensors = [inp for inp in inputs if inp.dtype is not None and inp.sizes]
    trusted = trusted_inputs(inputs, batch_dims)
    tensors = [inp for inp in tensors if inp.node not in trusted]
    named = _named(tensors, batch_dims)
    if named:
        primary = next(inp for inp in tensors if inp.node in named)
    elif tensors:
        primary = tensors[0]
        named = {
            primary.node: _as_dims(0 if batch_dims is None or isinstance(batch_dims, Mapping) else batch_dims, primary)
        }
    else:
        raise AmbiguousRequestsError(
            "the graph has no tensor input with a dim to tell requests by; its inputs are "
            f"{[inp.name for inp in inputs]}"
        )
    dims = named[primary.node]
    seeds = {
        inp.node: named[inp.node] for inp in tensors if inp.node in named and (inp is primary or _counts(inp, dims))
    }
    for inp in tensors:
        if inp.node not in seeds and _follows(
            inp, primary, dims, by_symbol=bool(isinstance(batch_dims, Mapping) and batch_dims)
        ):
            seeds[inp.node] = dims
    return seeds, primary.node


def trusted_inputs(inputs: Sequence[GraphInput], batch_dims: BatchDims) -> set[fx.Node]:
    """Inputs that `batch_dims` gives None: several images of each request, say, one after another."""
    if not isinstance(batch_dims, Mapping):
        return set()
    names = [name for name, given in batch_dims.items() if given is None]
    return {inp.node for name in names for inp in _matching(inputs, name)}


def dims_of_call(inputs: Sequence[GraphInput], batch_dims: BatchDims, arguments: Collection[str]) -> BatchDims:
    """`batch_dims` without the inputs that one call of a forward left out: images, say, in a step of decoding.

    arguments: what the forward takes; other names stay, and are refused. So do the request dims, if all their inputs
    were left out.
    """
    if not isinstance(batch_dims, Mapping):
        return batch_dims
    kept = {
        name: given for name, given in batch_dims.items() if name.split(".")[0] not in arguments or _found(inputs, name)
    }
    if any(given is not None for given in batch_dims.values()) and all(given is None for given in kept.values()):
        return batch_dims
    return kept or None


def _found(inputs: Sequence[GraphInput], name: str) -> list[GraphInput]:
    """The inputs a name means: by its whole path, or by the first parts of it."""
    tensors = [inp for inp in inputs if inp.dtype is not None and inp.sizes]
    exact = [inp for inp in tensors if inp.name == name]
    return exact or [
        inp for inp in tensors if inp.name.startswith(f"{name}.") or name == re.sub(r"_\d+$", "", inp.name)
    ]


def _matching(inputs: Sequence[GraphInput], name: str) -> list[GraphInput]:
    tensors = [inp for inp in inputs if inp.dtype is not None and inp.sizes]
    matches = _found(inputs, name)
    if not matches:
        raise BatchDimsError(
            f"batch_dims names the input {name!r}; the graph's tensor inputs are {[inp.name for inp in tensors]}"
        )
    return matches


def _named(tensors: Sequence[GraphInput], batch_dims: BatchDims) -> dict[fx.Node, tuple[int, ...]]:
    if not isinstance(batch_dims, Mapping):
        return {}
    named: dict[fx.Node, tuple[int, ...]] = {}
    for name, given in batch_dims.items():
        if given is not None:
            named |= {inp.node: _as_dims(given, inp) for inp in _matching(tensors, name)}
    if len({len(dims) for dims in named.values()}) > 1:
        raise BatchDimsError(
            f"batch_dims mixes inputs with one and with two request dims: {dict(batch_dims)}; give all one kind"
        )
    return named


def _as_dims(given: int | tuple[int, ...], inp: GraphInput) -> tuple[int, ...]:
    dims = (given,) if isinstance(given, int) else tuple(given)
    if (
        not 1 <= len(dims) <= 2
        or any(not isinstance(d, int) or not 0 <= d < len(inp.sizes) for d in dims)
        or list(dims) != sorted(set(dims))
    ):
        raise BatchDimsError(
            f"batch_dims {given!r} for input {inp.name!r} of {len(inp.sizes)} dims; expected one dim, or two ascending "
            "ones (requests, tokens), each below its number of dims"
        )
    return dims


def _follows(inp: GraphInput, primary: GraphInput, dims: tuple[int, ...], *, by_symbol: bool) -> bool:
    """Does an unnamed input carry the same requests along the same dims? If others were named, only tracing tells."""
    if not _counts(inp, dims):
        return False
    return len(inp.sizes) > max(dims) and all(_same_dim(inp, primary, d, by_symbol) for d in dims)


def _counts(inp: GraphInput, dims: tuple[int, ...]) -> bool:
    """Per token, integer inputs beside the first are positions and masks: they belong to the packing, to no adapter."""
    return len(dims) == 1 or (inp.dtype is not None and inp.dtype.is_floating_point)


def _same_dim(inp: GraphInput, primary: GraphInput, d: int, by_symbol: bool) -> bool:
    mine, theirs = inp.symbols[d], primary.symbols[d]
    if mine is not None and theirs is not None and mine == theirs:
        return True
    if by_symbol or (theirs is not None and theirs in inp.symbols):
        return False
    if (mine is None) != (theirs is None) or inp.sizes[d] != primary.sizes[d]:
        return False
    # Two dims of one traced size that tracing never had to compare: a batch of rows, but not a bare list of positions.
    return len(inp.sizes) > 1 or (mine is None and inp.dtype is not None and inp.dtype.is_floating_point)
