"""attach: one runtime per model, what a trace shows, adapters that wait for the first graph, and the end of it."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlora
from fxlora.errors import (
    AdapterShapeError,
    AlreadyAttachedError,
    BatchGranularityError,
    CapacityError,
    CaptureError,
    DuplicateAdapterError,
    GraphError,
    IncompletePairError,
    NotAttachedError,
    PoolClosedError,
    RankError,
    RowsNotProvenError,
    TargetError,
    UnboundTensorError,
    UnknownAdapterError,
)
from tests.fxlora.runtime_toys import EAGER, Toy, adapter, attached, check, compiled_by
from tests.models import ZOO
from tests.oracle import RECIPES, make_adapters

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_a_model_has_one_runtime() -> None:
    model = Toy()
    runtime = fxlora.attach(model)
    assert fxlora.runtime(model) is runtime
    assert fxlora.runtime(compiled_by("fxlora", model)) is runtime
    with pytest.raises(AlreadyAttachedError, match=r"'fc\.weight' of this Toy belongs to a runtime already"):
        fxlora.attach(model)
    with pytest.raises(AlreadyAttachedError):
        fxlora.attach(nn.Sequential(model, nn.Linear(5, 2)))
    assert fxlora.runtime(model) is runtime
    with pytest.raises(NotAttachedError, match="this Linear has no runtime"):
        fxlora.runtime(nn.Linear(2, 2))
    with pytest.raises(GraphError, match=r"not a function"):
        fxlora.attach(lambda x: x)  # pyrefly: ignore


def test_example_inputs_show_the_sites() -> None:
    model = Toy()
    runtime = attached(model, example_inputs=(X,))
    assert [site.name for site in runtime.sites] == ["fc", "out"]
    assert runtime.learned
    with pytest.raises(UnboundTensorError, match="nope"):
        runtime.load_adapter("a", adapter("nope"))
    assert runtime.adapter_names == ()
    with pytest.raises(CaptureError):
        attached(Toy(), example_inputs=(X[:, :2],))


def test_a_transformers_model_shows_its_sites_by_itself(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    runtime = fxlora.attach(entry.build(), max_adapters=2, max_rank=8)
    assert runtime.learned
    assert len(runtime.sites) == 16
    assert runtime.skipped == ()
    folder = make_adapters(entry, tmp_path, {"docs": RECIPES["docs"]})["docs"]
    runtime.load_adapter("docs", folder)
    assert runtime.adapter_names == ("docs",)


def test_adapters_wait_for_the_first_graph() -> None:
    model = Toy()
    sources = {"a": adapter(), "b": adapter("out", 8, 5, rank=3, seed=1)}
    runtime = attached(model, sources)
    assert runtime.sites == ()
    assert runtime.adapter_names == ("a", "b")
    with pytest.raises(DuplicateAdapterError):
        runtime.load_adapter("a", adapter())
    check(compiled_by(runtime.backend, model), runtime, model, X, sources)
    assert [site.name for site in runtime.sites] == ["fc", "out"]
    runtime.unload_adapter("a")
    with pytest.raises(UnknownAdapterError), runtime.batch(["a"]):
        pass


def test_an_adapter_that_waits_can_be_unloaded() -> None:
    model = Toy()
    runtime = attached(model, {"a": adapter()})
    runtime.unload_adapter("a")
    runtime.load_adapter("a", adapter(seed=3))
    check(compiled_by(runtime.backend, model), runtime, model, X, {"a": adapter(seed=3)})


def test_what_can_be_checked_before_a_graph_is() -> None:
    runtime = attached(Toy())
    with pytest.raises(UnboundTensorError, match=r"nope\.lora_A"):
        runtime.load_adapter("a", adapter("nope"))
    with pytest.raises(AdapterShapeError, match=r"is \[2, 7\]"):
        runtime.load_adapter("a", adapter(k=7))
    config, tensors = adapter()
    with pytest.raises(IncompletePairError):
        runtime.load_adapter("a", (config, dict(list(tensors.items())[:1])))
    with pytest.raises(RankError, match="rank 5 at site fc"):
        runtime.load_adapter("high", adapter(rank=5))
    assert runtime.adapter_names == ()


class Shared(Toy):
    """`fc` reads a table that belongs to no request."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(self.table).expand(len(x), 8) + x.sum(1, keepdim=True))


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_weight_without_requests_takes_no_adapter(compiled_first: bool) -> None:
    model = Shared()
    runtime = attached(model)
    compiled = compiled_by(runtime.backend, model)
    if compiled_first:
        compiled(X)
        with pytest.raises(UnboundTensorError, match="shared by the whole batch"):
            runtime.load_adapter("a", adapter())
    else:
        runtime.load_adapter("a", adapter())
        with pytest.raises(UnboundTensorError, match="shared by the whole batch"):
            compiled(X)
        runtime.unload_adapter("a")
    source = {"b": adapter("out", 8, 5)}
    runtime.load_adapter("b", source["b"])
    check(compiled, runtime, model, X, source)
    assert "shared by the whole batch" in {skip.name: skip.reason for skip in runtime.skipped}["fc.weight"]


class Switch(Toy):
    """Reads `fc` per request, or mixes requests before it."""

    def forward(self, x: torch.Tensor, mixed: bool = False) -> torch.Tensor:
        return self.out(self.fc(x.mean(0, keepdim=True).expand_as(x) if mixed else x))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_later_graph_that_cannot_serve_a_site_is_refused_or_takes_the_site_away(loaded: bool) -> None:
    model = Switch()
    runtime = attached(model, {"a": adapter()} if loaded else {}, example_inputs=(X,))
    compiled = compiled_by(runtime.backend, model)
    if loaded:
        with pytest.raises(RowsNotProvenError, match="adapter 'a' is loaded and adds to fc, but in this graph"):
            compiled(X, mixed=True)
        runtime.unload_adapter("a")
        return
    compiled(X, mixed=True)
    assert runtime.sites == ()
    with pytest.raises(UnboundTensorError, match="mean over the request dim"):
        runtime.load_adapter("a", adapter())


def test_targets() -> None:
    model = Toy()
    runtime = attached(model, targets=["fc"])
    with pytest.raises(TargetError, match="'nope', which matches no weight"):
        attached(Toy(), targets=["nope"])
    source = {"a": adapter()}
    runtime.load_adapter("a", source["a"])
    check(compiled_by(runtime.backend, model), runtime, model, X, source)
    assert [site.name for site in runtime.sites] == ["fc"]
    with pytest.raises(UnboundTensorError, match="not targeted"):
        runtime.load_adapter("b", adapter("out", 8, 5))


def test_refused_sizes() -> None:
    with pytest.raises(CapacityError):
        attached(Toy(), max_rank=20, pool_rows=16)
    with pytest.raises(ValueError, match="max_adapters is 0"):
        attached(Toy(), max_adapters=0)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        attached(Toy(), max_tokens=0)
    assert fxlora.attach(Toy()).adapter_names == ()


def test_batches_name_adapters_that_exist_and_no_deeper_than_the_runtime() -> None:
    runtime = attached(Toy(), {"a": adapter()})
    with pytest.raises(UnknownAdapterError, match=r"adapters\[1\] is 'b', which is not loaded; loaded: \['a'\]"):
        runtime.batch(["a", "b"]).__enter__()
    with pytest.raises(BatchGranularityError):
        runtime.batch([["a"], ["a"]]).__enter__()


def test_adapters_per_token() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    source = adapter("0")
    runtime = attached(model, {"a": source}, batch_dims=(0, 1))
    compiled = compiled_by(runtime.backend, model)
    x = torch.randn(2, 3, 6)
    delta = (
        x @ source[1]["base_model.model.0.lora_A.weight"].t() @ source[1]["base_model.model.0.lora_B.weight"].t() * 2
    )
    with torch.no_grad(), runtime.batch([["a", None, "a"], [None, "a", None]]):
        got = compiled(x)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])[..., None]
    assert torch.allclose(got, model(x) + mask * delta, atol=1e-5)
    with runtime.batch(["a", None]):
        got = compiled(x)
    assert torch.allclose(got, model(x) + torch.tensor([1, 0])[:, None, None] * delta, atol=1e-5)


def test_after_close_the_model_can_be_attached_again() -> None:
    model = Toy()
    runtime = attached(model, {"a": adapter()})
    compiled = compiled_by("fxlora", model)
    check(compiled, runtime, model, X, {"a": adapter()})
    runtime.close()
    runtime.close()
    for use in (lambda: compiled(X), lambda: runtime.batch(None).__enter__(), lambda: fxlora.runtime(model)):
        with pytest.raises(NotAttachedError):
            use()
    with pytest.raises(PoolClosedError):
        runtime.load_adapter("b", adapter())
    again = attached(model, {"a": adapter(seed=2)})
    torch._dynamo.reset()
    check(compiled, again, model, X, {"a": adapter(seed=2)})


@pytest.mark.parametrize("by_name", [True, False])
def test_a_runtime_goes_with_its_model(by_name: bool) -> None:
    model = Toy()
    runtime = attached(model, {"a": adapter()})
    compiled = compiled_by("fxlora" if by_name else runtime.backend, model)
    check(compiled, runtime, model, X, {"a": adapter()})
    gone = weakref.ref(runtime)
    del model, runtime, compiled
    gc.collect()
    assert gone() is None


def test_a_runtime_is_neither_copied_nor_pickled() -> None:
    runtime = attached(Toy())
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(runtime)


def test_a_model_that_moved_after_attach_is_refused() -> None:
    model = Toy()
    runtime = attached(model, example_inputs=(X,))
    model.double()
    with pytest.raises(GraphError, match="attach"):
        torch.compile(model, backend=runtime.backend, options=dict(EAGER))(X.double())


def test_a_runtime_keeps_no_graph() -> None:
    model = Toy()
    runtime = attached(model, {"a": adapter()}, example_inputs=(X,))
    graphs: list[weakref.ref[torch.fx.GraphModule]] = []

    def inner(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(weakref.ref(gm))
        return gm.forward

    compiled = torch.compile(model, backend=runtime.backend, options={"backend": inner})
    check(compiled, runtime, model, X, {"a": adapter()})
    torch._dynamo.reset()
    del compiled
    gc.collect()
    assert graphs
    assert all(graph() is None for graph in graphs)
    assert all(site.uses == () for site in runtime.sites)


def test_one_request_alone_mixes_with_nobody() -> None:
    """A graph for batches of one serves what a graph for more is refused for."""

    class Centred(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0) + x.flip(0))

    model, x = Centred(), torch.randn(4, 3, 6)
    runtime = attached(model, {"a": adapter()})
    compiled = compiled_by(runtime.backend, model, dynamic=True)
    check(compiled, runtime, model, x[:1], {"a": adapter()})
    with pytest.raises(
        RowsNotProvenError, match="adapter 'a' is loaded and adds to fc, but in this graph its rows mix"
    ):
        compiled(x)
