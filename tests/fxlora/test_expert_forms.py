"""Every spelling of an expert product is one site, and a mixed batch equals each request with merged weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxlora
from fxlora.errors import RowsNotProvenError, TargetError
from fxlora.passes.graph import op_name
from tests.toys.base import clone, worst
from tests.toys.experts import (
    GROUPED,
    PICKED,
    SPELLINGS,
    STORED_KN,
    A,
    Body,
    E,
    K,
    L,
    N,
    Routed,
    RoutedByTable,
    chosen,
    combined,
    dense,
    grouped,
    make_expert_adapter,
    matmul,
    merged_experts,
    routed,
    routed_by_table,
    tokens,
    tokens_and_ids,
)

NAMES: Sequence[str | None] = ("a", None, "b", "a")


def capture(model: nn.Module) -> fx.GraphModule:
    return fxlora.capture(model, **tokens())


def applied(toy: Routed, form: Callable[[nn.Module], fx.GraphModule], **options: Any) -> Any:
    return fxlora.apply(
        form(toy), **{"max_adapters": 3, "max_rank": 8, "targets": "all", "example_inputs": tokens(), **options}
    )


@torch.no_grad()
def check(lora: Any, model: Routed, names: Sequence[str | None] = NAMES, length: int = 6) -> None:
    """A mixed batch equals each request alone with its adapter in the weights; each adapter matters."""
    adapters = {"a": make_expert_adapter(model, 2, 1), "b": make_expert_adapter(model, 5, 2, rslora=True)}
    for name, adapter in adapters.items():
        lora.load_adapter(name, adapter)
    (site,) = [site for site in lora.sites if site.name == "w"]
    assert (site.num_experts, site.in_features, site.out_features) == (E, K, N)
    assert any(op_name(node) == "fxlora::lora_experts" for node in lora.graph_module.graph.nodes)
    inputs = tokens(batch=len(names), length=length, seed=4)
    got = lora(**clone(inputs), adapters=list(names))
    for index, name in enumerate(names):
        x = inputs["x"][index : index + 1]
        base, want = model(x), merged_experts(model, adapters[name] if name else None)(x)
        assert name is None or worst([want], [base]) > 1e-2, f"{name} changes nothing"
        assert worst([got[index : index + 1]], [want]) <= 1e-5, f"request {index} ({name})"


@pytest.mark.parametrize("form", [fx.symbolic_trace, capture], ids=["symbolic_trace", "capture"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_site(name: str, form: Callable[[nn.Module], fx.GraphModule]) -> None:
    model = routed(SPELLINGS[name])
    check(applied(model, form), model)


@pytest.mark.parametrize("name", GROUPED)
def test_sorted_rows(name: str) -> None:
    model = routed(GROUPED[name])
    check(applied(model, capture), model)


@pytest.mark.parametrize("name", STORED_KN)
def test_weights_stored_in_by_out(name: str) -> None:
    model = routed(STORED_KN[name], stored_KN=True)
    check(applied(model, capture), model)


@pytest.mark.parametrize("name", PICKED)
def test_loops_that_pick_their_tokens(name: str) -> None:
    """Rows of an expert are a number that data decides, none at all for some."""
    model = routed(PICKED[name])
    check(applied(model, capture), model)


@pytest.mark.parametrize("name", {**SPELLINGS, **GROUPED})
def test_graphs_of_aten_ops(name: str) -> None:
    """Decomposed by export, einsum and matmul put dims of the weight into one, and one dim of x is none of its own."""
    model = routed({**SPELLINGS, **GROUPED}[name])
    dims = {"x": {0: torch.export.Dim("requests", min=2)}}

    def export(model: nn.Module) -> fx.GraphModule:
        return torch.export.export(model, (), tokens(), dynamic_shapes=dims).run_decompositions().module()

    check(applied(model, export, model=model), model, length=L)


@pytest.mark.parametrize("name", ["bmm of w[ids]", "einsum ti,taoi->tao", "bmm of all", "linear of w[e]", "grouped"])
def test_graphs_without_sizes_of_their_own(name: str) -> None:
    """make_fx fixes what it was traced with."""
    model = routed({**SPELLINGS, **GROUPED}[name])

    def proxied(model: nn.Module) -> fx.GraphModule:
        return make_fx(lambda x: model(x=x), pre_dispatch=True, _allow_non_fake_inputs=True)(tokens()["x"])

    check(applied(model, proxied, model=model), model, names=NAMES[:3], length=L)


@pytest.mark.parametrize("name", ["bmm of w[ids]", "einsum ti,taoi->tao", "bmm of all", "grouped"])
@torch.no_grad()
def test_an_adapter_for_each_token(name: str) -> None:
    model = routed({**SPELLINGS, **GROUPED}[name])
    adapters = {"a": make_expert_adapter(model, 2, 1), "b": make_expert_adapter(model, 5, 2, rslora=True)}
    lora = applied(model, capture, batch_dims={"x": (0, 1)})
    for adapter, source in adapters.items():
        lora.load_adapter(adapter, source)
    x, names = tokens(batch=2, length=4, seed=4)["x"], [["a", None, "b", "a"], ["b", "b", None, "a"]]
    got = lora(x=x.clone(), adapters=names)
    for row, named in enumerate(names):
        for token, adapter in enumerate(named):
            alone = merged_experts(model, adapters[adapter] if adapter else None)(x[row : row + 1, token : token + 1])
            assert worst([got[row, token]], [alone[0, 0]]) <= 1e-5


@pytest.mark.parametrize("name", ["bmm of w[ids]", "grouped", "grouped, by argsort"])
def test_a_graph_of_one_request(name: str) -> None:
    """Captured for a batch of one, which tracing fixes: nobody's routing but its own is counted."""
    model = routed({**SPELLINGS, **GROUPED}[name])
    lora = applied(model, lambda toy: fxlora.capture(toy, **tokens(batch=1)))
    check(lora, model, names=["a"])
    assert worst([lora(**tokens(batch=1), adapters="b")], [lora(**tokens(batch=1), adapters="a")]) > 1e-2


def test_torchs_own_grouped_matmul_in_half_precision() -> None:
    """The grouped matmul that dynamo traces in bf16 alone; weights are read through a cast."""

    def half(self: Routed, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x.bfloat16(), self.w.bfloat16().transpose(-2, -1), offs=ends).float()

    model = routed(grouped(half))
    lora = applied(model, capture)
    lora.load_adapter("a", make_expert_adapter(model, 2, 1))
    (site,) = [site for site in lora.sites if site.name == "w"]
    assert site.dtype == torch.bfloat16
    inputs, merged = tokens(batch=2, seed=4), merged_experts(model, make_expert_adapter(model, 2, 1))
    got = lora(**clone(inputs), adapters=["a", None])
    for index, wanted in enumerate((merged, model)):
        assert worst([got[index : index + 1]], [wanted(inputs["x"][index : index + 1])]) <= 3e-2
    assert worst([model(inputs["x"][:1])], [merged(inputs["x"][:1])]) > 0.3


LOOKUPS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table[ids]": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids),
    "embedding": lambda table, ids: F.embedding(ids, table),
}


@pytest.mark.parametrize("product", ["grouped", "bmm of w[ids]", "where, index_add_"])
@pytest.mark.parametrize("lookup", LOOKUPS)
@torch.no_grad()
def test_experts_that_a_table_of_the_vocabulary_names(lookup: str, product: str) -> None:
    model = routed_by_table({**SPELLINGS, **GROUPED, **PICKED}[product], LOOKUPS[lookup])
    lora = fxlora.apply(fxlora.capture(model, **tokens_and_ids()), max_adapters=2, max_rank=8, targets="all")
    adapter = make_expert_adapter(model, 3, 1)
    lora.load_adapter("a", adapter)
    inputs = tokens_and_ids(batch=3, length=6, seed=4)
    got = lora(**clone(inputs), adapters=["a", None, "a"])
    for index, name in enumerate(("a", None, "a")):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        want = merged_experts(model, adapter if name else None)(**alone)
        assert worst([got[index : index + 1]], [want]) <= 1e-5
        assert name is None or worst([want], [model(**alone)]) > 1e-2


def test_a_table_before_its_values_are_loaded() -> None:
    model = routed_by_table(GROUPED["grouped"], LOOKUPS["table[ids]"])
    model.table.zero_()
    lora = fxlora.apply(fxlora.capture(model, **tokens_and_ids()), max_adapters=2, targets="all")
    assert "w" in [site.name for site in lora.sites]


class Columns(nn.Module):
    """x [B, K], which [] -> [B, 2]: the columns of a product that a table names for a number of the caller's."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(K, 9)
        self.register_buffer("table", table)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        return self.proj(x).index_select(-1, self.table[which].long())


@pytest.mark.parametrize("table", [[[0, 1], [2, 8]], [[127, 127], [1, 2]]], ids=["numbers", "with a mark of none"])
def test_a_table_of_which_few_numbers_are_read(table: list[list[int]]) -> None:
    model = Columns(torch.tensor(table, dtype=torch.int8)).eval().requires_grad_(False)
    lora = fxlora.apply(fxlora.capture(model, torch.randn(3, K), torch.tensor(1)), max_adapters=2)
    assert [site.name for site in lora.sites] == ["proj"]


def test_a_table_that_names_no_expert_for_some() -> None:
    """Rows before the first expert's move all others: then whose they are is anybody's say."""
    model = routed_by_table(GROUPED["grouped"], LOOKUPS["table[ids]"])
    model.table[17, 1] = -1
    with pytest.raises(RowsNotProvenError, match="offsets are not proven"):
        fxlora.apply(fxlora.capture(model, **tokens_and_ids()), max_adapters=2, targets=["w"])


def test_a_table_that_the_graph_writes() -> None:
    class Growing(RoutedByTable):
        def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
            self.table.add_(1)
            return super().forward(x, ids)

    model = Growing(GROUPED["grouped"], LOOKUPS["table[ids]"]).eval().requires_grad_(False)
    with pytest.raises(RowsNotProvenError, match="offsets are not proven"):
        fxlora.apply(fxlora.capture(model, **tokens_and_ids()), max_adapters=2, targets=["w"])


def of_other_requests(self: Routed, x: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("ti,taoi->tao", x, self.w[ids.roll(1, 0)])


def centred(self: Routed, x: Tensor, ids: Tensor) -> Tensor:
    return torch.einsum("ti,taoi->tao", x - x.mean(0), self.w[ids])


def unsorted_rows(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    ends = F.one_hot(ids.reshape(-1), E).sum(0).cumsum(0).to(torch.int32)
    return combined(matmul(x.repeat_interleave(A, 0), self.w.mT, offs=ends).view(-1, A, N), weights)


def sorted_by_others(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    experts, order = torch.sort(ids.flip(0).reshape(-1))
    ends = torch.histc(experts.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    y = matmul(x[order // A], self.w.mT, offs=ends)
    return combined(torch.zeros_like(y).index_copy(0, order, y).view(-1, A, N), weights)


def shifted_ends(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    experts, order = torch.sort(ids.reshape(-1))
    ends = torch.histc(experts.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    ends.sub_(1)
    y = matmul(x[order // A], self.w.mT, offs=ends)
    return combined(torch.zeros_like(y).index_copy(0, order, y).view(-1, A, N), weights)


def routed_again(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    flat, rows = ids.reshape(-1), x.repeat_interleave(A, 0)
    first = torch.bmm(self.w[flat], rows.unsqueeze(-1)).squeeze(-1)
    flat.clamp_(max=2)
    return combined((first + torch.bmm(self.w[flat], rows.unsqueeze(-1)).squeeze(-1)).view(-1, A, N), weights)


def less_its_experts_mean(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], N)
    for e in range(E):
        token, place = torch.where(ids == e)
        rows = x[token]
        y[token] += weights[token, place, None] * ((rows - rows.mean(0)) @ self.w[e].T)
    return y


def looped_over_picks(part: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Body:
    """A loop whose part is (all tokens, tokens of an expert, their positions) -> the rows that its expert sees."""

    def body(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = x.new_zeros((x.shape[0], N))
        for e in range(E):
            token, place = torch.where(ids == e)
            y[token] += weights[token, place, None] * (part(x, x[token], token) @ self.w[e].T)
        return y

    return body


MIXED: Mapping[str, tuple[Body, str]] = {
    "scaled by how many there are": (
        looped_over_picks(lambda x, rows, token: rows / (token.shape[0] + 1)),
        "a size that the data of all requests decides",
    ),
    "summed over as many copies": (
        looped_over_picks(lambda x, rows, token: rows[None].expand(token.shape[0], -1, -1).sum(0)),
        "a size that the data of all requests decides",
    ),
    "cut where the count says": (
        looped_over_picks(lambda x, rows, token: torch.cat([x[: token.shape[0]], x[token.shape[0] :] * 2])[token]),
        "a size that the data of all requests decides",
    ),
    "experts of another request": (chosen(of_other_requests), "mix requests"),
    "rows mixed before": (chosen(centred), "mean over the request dim"),
    "rows not sorted": (unsorted_rows, "offsets are not proven"),
    "sorted by other tokens' choice": (sorted_by_others, "mix requests"),
    "offsets moved in place": (shifted_ends, "offsets are not proven"),
    "ids written between two reads": (routed_again, "written in place"),
    "mean over an expert's tokens": (less_its_experts_mean, "mean over the request dim"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_not_proven_is_refused(name: str) -> None:
    body, reason = MIXED[name]
    model = routed(body)
    with pytest.raises(RowsNotProvenError, match=reason):
        applied(model, capture, targets=["w"])
    lora = applied(model, capture)
    assert reason in next(skip.reason for skip in lora.skipped if skip.name == "w")


NO_PRODUCTS: Mapping[str, tuple[Body, str]] = {
    "summed over experts": (
        lambda self, x, weights, ids: torch.einsum("ti,eoi->to", x, self.w),
        "sums over rows or experts",
    ),
    "some of the experts": (
        lambda self, x, weights, ids: torch.einsum("ti,eoi->eto", x, self.w[:3]).sum(0),
        "part",
    ),
    "some of the columns": (
        dense(lambda self, x: F.pad(torch.einsum("ti,eoi->eto", x, self.w[:, :4]), (0, N - 4))),
        "part",
    ),
    "scaled first": (chosen(lambda self, x, ids: torch.einsum("ti,taoi->tao", x, self.w[ids] * 2)), "read by mul"),
    "gathered by columns": (
        dense(lambda self, x: torch.einsum("ti,eoi->eto", x, self.w[:, torch.arange(N).flip(0)])),
        "part of them",
    ),
}


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_what_is_no_expert_product_is_no_site(name: str) -> None:
    body, reason = NO_PRODUCTS[name]
    model = routed(body)
    lora = applied(model, capture)
    (skip,) = [skip for skip in lora.skipped if skip.name == "w"]
    assert reason in skip.reason
    with pytest.raises(TargetError, match="no site"):
        applied(model, capture, targets=["w"])


def test_biases_that_routing_picks_are_no_embedding() -> None:
    lora = applied(routed(SPELLINGS["bias in place"]), capture)
    assert [site.name for site in lora.sites] == ["gate", "w"]
    assert "bias for each expert" in next(skip.reason for skip in lora.skipped if skip.name == "b")
