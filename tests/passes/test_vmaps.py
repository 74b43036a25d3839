"""vmaps as dynamo leaves them in a graph: opened where all of it is elementwise ops and lookups; same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import fxlora.passes.vmaps as vmaps_module
from fxlora.passes.graph import op_name, rerun
from fxlora.passes.normalize import copy_graph
from fxlora.passes.rows.mapped import OPENS
from fxlora.passes.vmaps import open_vmaps

Body = Callable[..., torch.Tensor]


def vmaps(gm: fx.GraphModule) -> int:
    return sum(op_name(node) == OPENS for node in gm.graph.nodes)


def opened(body: Body, *inputs: torch.Tensor) -> tuple[int, int]:
    """vmaps in dynamo's graph of a function, and in the same graph after the pass, which gives the same values."""
    found: list[tuple[int, int]] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        copied, _ = copy_graph(gm)
        open_vmaps(copied)
        copied.graph.lint()
        copied.recompile()
        found.append((vmaps(gm), vmaps(copied)))

        def run(*args: Any) -> Any:
            wanted = gm(*args)
            for got, want in zip(copied(*args), wanted, strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want)
            return wanted

        return run

    torch._dynamo.reset()
    torch.compile(body, backend=backend, dynamic=True, fullgraph=True)(*inputs)
    return found[0]


def mask(padding: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T], as transformers maps the function that says whether a token sees another."""
    batch, length = padding.shape

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        near = (q - kv < 3) & (kv <= q) | (lookup(kinds, b, q) == lookup(kinds, b, kv))
        return q.new_ones((), dtype=torch.bool) & near & lookup(padding, b, kv)

    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        sees = torch.vmap(sees, in_dims=dims)
    places = torch.arange(length)
    return sees(torch.arange(batch), torch.arange(1), places, places)


def lookup(x: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.index(x, at)


def minus(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a - b


FLOATS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
ROW = FLOATS[0, 0]
WHOLE: dict[str, tuple[Body, tuple[torch.Tensor, ...]]] = {
    "a mask": (mask, (torch.rand(3, 5) > 0.3, torch.randint(0, 2, (3, 5)))),
    "dims in the middle": (
        lambda x: torch.vmap(lambda row: row.exp() * row, in_dims=1, out_dims=2)(x), (FLOATS,),
    ),
    "an operand of all slices": (
        lambda x, row: torch.vmap(lambda part: torch.where(part > 0, part, row))(x), (FLOATS, ROW),
    ),
    "slices of different dims": (
        lambda x, row: torch.vmap(torch.vmap(minus, in_dims=(0, None)), in_dims=(0, None))(x, row), (FLOATS, ROW),
    ),
    "scalars against rows": (
        lambda x, row: torch.vmap(torch.mul, in_dims=(1, 0))(x, row[:2].repeat(3)[:5]), (FLOATS, ROW),
    ),
    "outer product": (
        lambda row: torch.vmap(torch.vmap(minus, in_dims=(None, 0)), in_dims=(0, None), out_dims=-1)(row, row),
        (ROW,),
    ),
    "a result that one level does not reach": (
        lambda x, row: torch.vmap(lambda part: row.cos() + 0 * row)(x).clone(), (FLOATS, ROW),
    ),
    "rows looked up": (
        lambda x, row: torch.vmap(lambda at: lookup(x, at) + row)(torch.tensor([2, 0, 1, 1])), (FLOATS, ROW),
    ),
    "a number of the graph": (
        lambda x, row: torch.vmap(lambda part: part * row.shape[0] + (part < x.shape[1]))(x), (FLOATS, ROW),
    ),
    "one after another": (lambda x: torch.vmap(torch.exp)(torch.vmap(torch.abs, in_dims=2)(x)), (FLOATS,)),
}  # fmt: skip
KEPT: dict[str, tuple[Body, tuple[torch.Tensor, ...]]] = {
    "a reduction": (lambda x: torch.vmap(lambda row: row.softmax(0) + row)(x), (FLOATS,)),
    "dims that decide on the dtype": (
        lambda row: torch.vmap(lambda one: one.double() * row)(row), (ROW,),
    ),
    "a lookup in a slice": (lambda x: torch.vmap(lambda row: lookup(row, torch.tensor([1, 0])))(x), (FLOATS,)),
    "sizes of a slice": (lambda x: torch.vmap(lambda row: row.reshape(-1).exp())(x), (FLOATS,)),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_opened(name: str) -> None:
    before, after = opened(WHOLE[name][0], *WHOLE[name][1])
    assert before
    assert not after


def test_what_fails_on_the_way_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an op may that asks for more of a size than tracing knows."""

    def fails(node: fx.Node) -> Any:
        if op_name(node) == "index":
            raise RuntimeError("could not guard on a size")
        return rerun(node)

    monkeypatch.setattr(vmaps_module, "rerun", fails)
    before, after = opened(WHOLE["a mask"][0], *WHOLE["a mask"][1])
    assert after == before


@pytest.mark.parametrize("name", KEPT)
def test_what_stays(name: str) -> None:
    before, after = opened(KEPT[name][0], *KEPT[name][1])
    assert before
    assert after == before
