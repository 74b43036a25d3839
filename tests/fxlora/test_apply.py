"""apply: any graph module in, the caller's left alone, each refusal typed and before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxlora
from fxlora.errors import (
    AlreadyAppliedError,
    BatchDimsError,
    CapacityError,
    GraphError,
    NeedsExampleInputsError,
    RowsNotProvenError,
    TargetError,
    UnboundTensorError,
)
from tests.toys.base import make_adapter, merged

apply_module = import_module("fxlora.apply")


class Model(nn.Module):
    """ids [B, T] -> [B, T, 7], tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.proj(self.embed(ids)))


def built() -> nn.Module:
    torch.manual_seed(3)
    return Model().eval().requires_grad_(False)


def ids(batch: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 7, (batch, length), generator=torch.Generator().manual_seed(1))


def applied(**options: Any) -> fxlora.LoraModule:
    return fxlora.apply(fx.symbolic_trace(built()), example_inputs=(ids(),), **options)


def test_the_callers_graph_and_weights_are_left_alone() -> None:
    model = built()
    gm = fx.symbolic_trace(model)
    text, code = str(gm.graph), gm.code
    lora = fxlora.apply(gm, example_inputs=(ids(),))
    assert (str(gm.graph), gm.code) == (text, code)
    assert torch.equal(gm(ids()), model(ids()))
    assert {site.weight.data_ptr() for site in lora.sites} <= {p.data_ptr() for p in model.parameters()}
    again = fxlora.apply(gm, example_inputs=(ids(),))
    assert again.pool is not lora.pool, "one graph may be applied twice"


def test_an_exported_program_is_taken_as_its_module() -> None:
    model = built()
    lora = fxlora.apply(torch.export.export(model, (ids(),)))
    assert {site.role.value for site in lora.sites} == {"embedding", "linear", "logits"}
    assert torch.allclose(lora(ids()), model(ids()), atol=1e-6)


@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, lambda x: x], ids=["module", "none", "function"])
def test_what_is_no_graph_is_refused_with_the_way_to_one(given: Any) -> None:
    with pytest.raises(GraphError, match=r"not a \w+; `fxlora.capture\(model, ...\)` makes one"):
        fxlora.apply(given)


def test_a_rewritten_graph_is_refused() -> None:
    with pytest.raises(AlreadyAppliedError, match="load_adapter"):
        fxlora.apply(applied().graph_module, example_inputs=(ids(), torch.zeros(3).int()))


@pytest.mark.parametrize("example", [(ids(),), [ids()], {"ids": ids()}, ids()], ids=["tuple", "list", "dict", "tensor"])
def test_example_inputs_in_every_form(example: Any) -> None:
    lora = fxlora.apply(fx.symbolic_trace(built()), example_inputs=example)
    assert len(lora.sites) == 3


def test_a_graph_without_shapes_needs_them() -> None:
    with pytest.raises(NeedsExampleInputsError, match="'ids'"):
        fxlora.apply(fx.symbolic_trace(built()))


class Twice(nn.Module):
    """One linear on two paths; a trace keeps the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x).tanh()


def test_names_the_trace_lost_come_from_model() -> None:
    model, x = Twice().eval().requires_grad_(False), torch.randn(3, 4)
    gm, adapter = fx.symbolic_trace(model), make_adapter(model, ("b",), 2, 1)
    (site,) = fxlora.apply(gm, example_inputs=(x,)).sites
    assert site.aliases == ()
    lora = fxlora.apply(gm, example_inputs=(x,), model=model)
    lora.load_adapter("a", adapter)
    assert {lora.sites[0].parameter, *lora.sites[0].aliases} == {"a.weight", "b.weight"}
    assert torch.allclose(lora(x, adapters="a"), merged(model, adapter)(x), atol=1e-5)


def test_a_graph_with_names_of_its_own_says_how_to_give_it_the_models() -> None:
    model, x = Twice().eval().requires_grad_(False), torch.randn(3, 4)
    gm, adapter = make_fx(lambda x: model(x))(x), make_adapter(model, ("b",), 2, 1)
    with pytest.raises(UnboundTensorError, match=r"made up its own, as _param_constant0: .* model="):
        fxlora.apply(gm).load_adapter("a", adapter)
    fxlora.apply(gm, model=model).load_adapter("a", adapter)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"targets": ["nothing"]}, TargetError),
        ({"batch_dims": {"x": 0}}, BatchDimsError),
        ({"batch_dims": 2}, BatchDimsError),
        ({"example_inputs": 3}, GraphError),
    ],
)
def test_refusals_come_before_memory_is_taken(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception]
) -> None:
    monkeypatch.setattr(apply_module, "AdapterPool", lambda *args, **kwargs: pytest.fail("memory was taken"))
    with pytest.raises(error):
        fxlora.apply(fx.symbolic_trace(built()), **{"example_inputs": (ids(),), **options})


def test_pools_too_small_for_one_adapter_are_refused() -> None:
    with pytest.raises(CapacityError):
        applied(max_rank=64, pool_rows=16)


@pytest.mark.parametrize("targets", [["proj"], "proj", r"pr.*"])
def test_only_targets_own_memory(targets: Any) -> None:
    lora = applied(targets=targets)
    assert [site.name for site in lora.sites] == ["proj"]
    assert {s.reason.split(":")[0] for s in lora.skipped} == {"not targeted"}
    assert lora.pool.bytes < applied().pool.bytes


def test_a_bigger_shape_takes_more_memory() -> None:
    sizes = [applied(max_adapters=a, max_rank=r).pool.bytes for a, r in ((2, 16), (4, 16), (4, 32))]
    assert sizes == sorted(set(sizes))


def test_what_is_assumed_or_mixed_is_said_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Mixing(Model):
        def forward(self, ids: torch.Tensor) -> Any:
            h = self.proj(self.embed(ids))
            return h, h.mean(0)

    lora = fxlora.apply(fx.symbolic_trace(Mixing()), example_inputs=(ids(),))
    (words,) = lora.mixed_outputs
    assert words.startswith("output 1: mean over the request dim")
    assert words in caplog.text


def test_a_target_whose_rows_mix_is_refused() -> None:
    class Mixing(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.proj(self.embed(ids).mean(0))

    gm = fx.symbolic_trace(Mixing())
    with pytest.raises(RowsNotProvenError, match="'proj', but its rows mix requests: mean"):
        fxlora.apply(gm, example_inputs=(ids(),), targets=["proj"])
    assert [s.name for s in fxlora.apply(gm, example_inputs=(ids(),)).sites] == ["embed"]


def test_reports_cover_every_pass() -> None:
    names = [report.name for report in applied().reports]
    assert names[0] == "normalize"
    assert names[-2:] == ["rewrite_sites", "verify_rewrite"]
    assert len(names) == len(set(names))


class LeafTracer(fx.Tracer):
    """Keeps every module below the root as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class LongIsDouble(nn.Module):
    """Takes another branch for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * 2 if x.shape[1] > 8 else self.proj(x)


class Wrapper(nn.Module):
    """Calls another module and nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0


def test_an_opaque_module_keeps_its_branches() -> None:
    model = Wrapper(LongIsDouble()).eval().requires_grad_(False)
    gm = fx.GraphModule(model, LeafTracer().trace(model))
    lora = fxlora.apply(gm, example_inputs=(torch.randn(3, 5, 4),))
    for length in (5, 8, 9, 20):
        x = torch.randn(3, length, 4)
        assert torch.allclose(lora(x), model(x), atol=1e-5), length


def refused_or_right(model: nn.Module, gm: fx.GraphModule, *inputs: torch.Tensor) -> None:
    """Without adapters the answer is the model's, and no site's rows hold what all requests made."""
    lora = fxlora.apply(gm, example_inputs=inputs)
    got, want = lora(*inputs), model(*inputs)
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-5)


class Masked(nn.Module):
    """Rows of a table picked by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(13, 6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x > 0]


def test_a_mask_over_a_table_is_no_lookup() -> None:
    model, x = Masked(), torch.randn(13)
    refused_or_right(model, torch.export.export(model, (x,)).module(), x)


class Averaged(nn.Module):
    """Every row gets the mean of all requests, as a Python number on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x + torch.full_like(x, x.mean().item()))


def test_a_number_made_of_all_requests_mixes_what_it_fills() -> None:
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    gm = torch.export.export(Averaged().eval(), (torch.randn(3, 5, 4),), dynamic_shapes=dims).module()
    assert fxlora.apply(gm).sites == ()


class Reordered(nn.Module):
    """Requests in another order, by a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x[[2, 0, 1]])


TRACERS: dict[str, Callable[[nn.Module, torch.Tensor], fx.GraphModule]] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "capture": lambda model, x: fxlora.capture(model, x=x),
}


@pytest.mark.parametrize("form", TRACERS)
def test_requests_picked_by_a_list_keep_their_adapters(form: str) -> None:
    model, x = Reordered().eval().requires_grad_(False), torch.randn(4, 5, 4)
    lora = fxlora.apply(TRACERS[form](model, x), example_inputs={"x": x})
    adapter = make_adapter(model, ("proj",), 2, 1)
    lora.load_adapter("a", adapter)
    got = lora(x=x, adapters=[None, None, "a", None])
    assert torch.allclose(got[0], merged(model, adapter)(x)[0], atol=1e-5)
    assert torch.allclose(got[1:], model(x)[1:], atol=1e-5)


def test_a_model_that_is_not_the_graphs_is_refused() -> None:
    with pytest.raises(GraphError):
        fxlora.apply(fx.symbolic_trace(built()), example_inputs=(ids(),), model=built())
