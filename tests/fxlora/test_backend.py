"""The backend: the runtime behind a graph's Parameters, graph breaks, replaced weights, options, what dynamo shares."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fxlora
from fxlora.backend import fxlora_backend
from fxlora.errors import (
    BatchNotServedError,
    BatchSizeError,
    CompileOptionError,
    FxloraError,
    GraphBreakError,
    GraphError,
    NotAttachedError,
    UnboundTensorError,
)
from tests.fxlora.runtime_toys import EAGER, Broken, Outer, Toy, adapter, attached, check, compiled_by, expected


class Pooled(Toy):
    """The toy times a float of the module, and packed attention from it to learned tokens, which is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5
        self.attention = nn.MultiheadAttention(5, 1)
        self.tokens = nn.Parameter(torch.randn(3, 1, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = (super().forward(x) * self.scale)[None]
        tokens = torch.cat([query, self.tokens.expand(-1, x.shape[0], -1)])
        weights = (self.attention.in_proj_weight, self.attention.in_proj_bias, None, None, False, 0.0)
        out = (self.attention.out_proj.weight, self.attention.out_proj.bias)
        return (query + F.multi_head_attention_forward(query, tokens, tokens, 5, 1, *weights, *out)[0])[0]


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
ROOT = Path(__file__).parent.parent.parent
A, B = {"a": adapter()}, {"a": adapter(seed=5)}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_a_float_of_the_model_and_an_opaque_call_in_one_dynamic_graph() -> None:
    model = Pooled()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model, dynamic=True, fullgraph=True)
    for batch in (9, 7):
        check(compiled, runtime, model, torch.randn(batch, 6), A)


@pytest.mark.parametrize("dynamic", [True, False, None])
def test_the_string_and_the_object_find_the_runtime(dynamic: bool | None) -> None:
    model = Toy()
    runtime = attached(model, A)
    for backend in ("fxlora", runtime.backend):
        torch._dynamo.reset()
        compiled = compiled_by(backend, model, dynamic=dynamic, fullgraph=True)
        for batch in (4, 1, 9, 2):
            check(compiled, runtime, model, torch.randn(batch, 6), A)


def test_the_first_call_works_in_grad_mode() -> None:
    model = Toy()
    runtime = attached(model, A)
    for inner in ("eager", "aot_eager", lambda gm, inputs: gm.forward):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=runtime.backend, options={"backend": inner})
        assert torch.is_grad_enabled()
        with runtime.batch("a"):
            got = compiled(X)
        assert not got.requires_grad
        assert torch.allclose(got, expected(model, X, ["a"] * 4, A), atol=1e-5)


@pytest.mark.parametrize("backend", ["one object", "two objects", "string"])
def test_two_models_of_one_class_never_share(backend: str) -> None:
    models = Toy(), Toy()
    runtimes = attached(models[0], A), attached(models[1], B)
    chosen: list[Any] = {
        "one object": [runtimes[0].backend] * 2,
        "two objects": [runtime.backend for runtime in runtimes],
        "string": ["fxlora"] * 2,
    }[backend]
    compiled = [compiled_by(each, model, dynamic=True) for each, model in zip(chosen, models, strict=True)]
    for _ in range(2):
        for i, sources in enumerate((A, B)):
            check(compiled[i], runtimes[i], models[i], X, sources)
    assert graphs() == 2


def test_a_third_model_of_the_class_without_a_runtime_is_refused() -> None:
    model, stranger = Toy(), Toy()
    runtime = attached(model, A)
    check(compiled_by(runtime.backend, model), runtime, model, X, A)
    with pytest.raises(NotAttachedError, match="none of which belongs to a runtime"):
        compiled_by(runtime.backend, stranger)(X)
    late = attached(stranger, B)
    check(compiled_by(runtime.backend, stranger), late, stranger, X, B)


def test_errors_are_of_their_own_kind_and_of_torch() -> None:
    with pytest.raises(NotAttachedError) as caught:
        compiled_by("fxlora", Toy())(X)
    assert isinstance(caught.value, BackendCompilerFailed)
    assert isinstance(caught.value, FxloraError)
    assert type(caught.value.inner_exception) is NotAttachedError
    assert "`fxlora.attach(model)`" in str(caught.value)


@pytest.mark.parametrize("compiled_before", [True, False])
def test_a_replaced_parameter_is_refused(compiled_before: bool) -> None:
    model = Toy()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model)
    if compiled_before:
        check(compiled, runtime, model, X, A)
    old = model.fc.weight
    model.fc.weight = nn.Parameter(torch.randn(8, 6))
    with pytest.raises(NotAttachedError, match=r"'fc\.weight' \(1 of 4 Parameters\), which belongs to no runtime"):
        compiled(X)
    model.fc.weight = old
    with torch.no_grad():
        old.copy_(torch.randn(8, 6))
    check(compiled, runtime, model, X, A)


def test_code_that_runs_without_guards_is_refused() -> None:
    model = Toy()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model)
    check(compiled, runtime, model, X, A)
    model.fc.weight = nn.Parameter(torch.randn(8, 6))
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True), pytest.raises(NotAttachedError, match="guards"):
        compiled(X)


def test_a_graph_of_two_models_or_of_a_stranger_is_refused() -> None:
    model, other, stranger = Toy(), Toy(), nn.Linear(5, 5)
    attached(model, A)
    attached(other, A)
    with pytest.raises(NotAttachedError, match="Parameters of 2 attached models"):
        compiled_by("fxlora", lambda x: model(x) + other(x))(X)
    with pytest.raises(NotAttachedError, match=r"2 of 6 Parameters"):
        compiled_by("fxlora", lambda x: stranger(model(x)))(X)


def test_functions_and_modules_around_the_model() -> None:
    model = Toy()
    runtime = attached(model, A)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, scale: float, *, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * scale

    def step(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return module(x)

    wrapped = compiled_by(runtime.backend, Wrapper(), fullgraph=True)
    check(lambda x: wrapped(1.0, x=x), runtime, model, X, A)
    stepped = compiled_by(runtime.backend, step, fullgraph=True)
    check(lambda x: stepped(model, x), runtime, model, X, A)
    check(compiled_by(runtime.backend, model.forward, fullgraph=True), runtime, model, X, A)


@pytest.mark.parametrize(
    ("make", "path", "sizes"), [(Broken, "out", (8, 5)), (Outer, "inner.fc", (6, 8)), (Outer, "head", (5, 3))]
)
def test_a_graph_break_with_targets_behind_it_is_refused(
    make: Callable[[], nn.Module], path: str, sizes: tuple[int, int]
) -> None:
    model = make()
    runtime = attached(model, {"a": adapter(path, *sizes)}, example_inputs=(X,))
    with pytest.raises(GraphBreakError, match="Compile the attached model itself with fullgraph=True"):
        compiled_by(runtime.backend, model)(X)


def test_an_adapter_that_waits_for_a_weight_behind_a_graph_break_is_refused() -> None:
    model = Broken()
    runtime = attached(model, {"a": adapter("out", 8, 5)})
    with pytest.raises(UnboundTensorError, match=r"out\.lora_A\.weight: not read by this graph"):
        compiled_by(runtime.backend, model)(X)


def test_a_graph_break_without_targets_behind_it_is_served() -> None:
    model = Broken()
    runtime = attached(model, A, targets=["fc"])
    check(compiled_by(runtime.backend, model), runtime, model, X, A)
    assert graphs() == 2


def test_a_submodule_compiled_by_itself_is_refused() -> None:
    model = nn.Sequential(Toy(), nn.Linear(5, 3))
    attached(model, {"a": adapter("0.fc")})
    with pytest.raises(GraphBreakError, match=r"calls '0\.fc\.weight' 'fc\.weight'"):
        compiled_by("fxlora", model[0])(X)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_refused(inside: bool) -> None:
    class Casting(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return super().forward(x)

    model = Casting()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model)
    if not inside:  # autocast that is off changes nothing
        check(compiled, runtime, model, X, A)
    model = Casting() if inside else Toy()
    attached(model, A)
    with pytest.raises(GraphError, match="autocast is on"), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        compiled_by("fxlora", model)(X)


def test_suppressed_errors_do_not_run_without_adapters() -> None:
    model = Toy()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(BatchNotServedError), runtime.batch("a"):
        compiled(X)
    logging.getLogger("torch._dynamo").setLevel(logging.NOTSET)


def test_the_uncompiled_model_in_a_batch_is_refused() -> None:
    model = Toy()
    runtime = attached(model, A)
    with pytest.raises(BatchNotServedError), runtime.batch(["a"] * 4):
        model(X)
    with runtime.batch(None):
        model(X)


def test_a_batch_of_another_size_than_the_call_is_refused() -> None:
    model = Toy()
    runtime = attached(model, A)
    compiled = compiled_by(runtime.backend, model)
    words = "names adapters for 3 requests, the call has 4 requests"
    with pytest.raises(BatchSizeError, match=words), runtime.batch(["a"] * 3):
        compiled(X)
    check(compiled, runtime, model, X, A)


@pytest.mark.parametrize(
    ("options", "mode", "words"),
    [
        ({"backnd": "eager"}, None, r"options \['backnd'\] are unknown.*takes \['backend', 'mode'\]"),
        ({"backend": "nope"}, None, "inner compiler 'nope' is unknown; torch.compile knows"),
        ({"backend": 3}, None, "inner compiler 3"),
        ({"backend": "eager", "mode": "reduce-overhead"}, None, "is for the inner compiler 'inductor', not 'eager'"),
        ({"mode": "fastest"}, None, "mode='fastest' is unknown"),
        (None, "fastest", "mode='fastest' is unknown"),
        ({"backend": "fxlora"}, None, "cannot be its own inner compiler"),
    ],
)
def test_options(options: Any, mode: str | None, words: str) -> None:
    model = Toy()
    attached(model, A)
    gm = torch.fx.symbolic_trace(model)
    with pytest.raises(CompileOptionError, match=words):
        fxlora_backend(gm, [X], mode=mode, options=options)
    if mode is None:
        with pytest.raises(CompileOptionError, match=words):
            torch.compile(model, backend="fxlora", options=options)(X)


def test_a_graph_without_parameters_goes_to_the_inner_compiler() -> None:
    assert torch.equal(compiled_by("fxlora", lambda x: x * 2 + 1)(X), X * 2 + 1)


def test_a_graph_with_parameters_of_one_dim_alone_is_no_matter_of_adapters() -> None:
    class Scaled(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((5,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            torch._dynamo.graph_break()
            return y * self.scale

    model = Scaled()
    runtime = attached(model, A, targets=["fc"])
    check(compiled_by(runtime.backend, model), runtime, model, X, A)


def test_loads_unloads_and_ranks_compile_nothing() -> None:
    model = Toy()
    runtime = attached(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=runtime.backend, options={"backend": counter}, dynamic=True)
    check(compiled, runtime, model, X, {})
    before = counter.frame_count
    for i in range(12):
        names = ["x", "y", "z"][: 1 + i % 3]
        sources = {name: adapter(rank=1 + (i + k) % 4, seed=i + k) for k, name in enumerate(names)}
        for name, source in sources.items():
            runtime.load_adapter(name, source)
        check(compiled, runtime, model, torch.randn(2 + i, 6), sources)
        for name in sources:
            runtime.unload_adapter(name)
    assert counter.frame_count == before


def test_graphs_of_one_plan_share_handles_and_pools() -> None:
    model = Toy()
    runtime = attached(model, A)
    held: list[list[int]] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        held.append([n.args[-1] for n in gm.graph.nodes if "lora" in str(n.target)])
        return gm.forward

    compiled = torch.compile(model, backend=runtime.backend, options={"backend": inner}, dynamic=False)
    bytes_before = None
    for batch in (2, 5, 7):
        check(compiled, runtime, model, torch.randn(batch, 6), A)
        bytes_before = bytes_before or runtime.pool.bytes
    assert len(held) == 3
    assert all(handles == held[0] for handles in held)
    assert runtime.pool.bytes == bytes_before


def test_the_graph_is_edited_in_place_with_calls_only() -> None:
    model = Toy()
    runtime = attached(model, A)
    seen: list[tuple[Any, Any]] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append((gm, inputs))
        return gm.forward

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        before = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        buffers = dict(gm.named_buffers())
        compiled = runtime.backend(gm, inputs, options={"backend": inner})
        assert seen[-1][0] is gm
        assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == before
        assert dict(gm.named_buffers()) == buffers
        assert all(a is b for a, b in zip(seen[-1][1], inputs, strict=True))
        return compiled

    check(torch.compile(model, backend=backend), runtime, model, X, A)
    assert seen


def test_log_records(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    runtime = attached(model, A)
    with caplog.at_level(logging.INFO, logger="fxlora"):
        check(compiled_by(runtime.backend, model), runtime, model, X, A)
    assert any(r.name == "fxlora.backend" and "2 sites in 2 ops" in r.getMessage() for r in caplog.records)


def test_the_model_stays_as_it_is() -> None:
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    runtime = attached(model, A)
    check(compiled_by(runtime.backend, model), runtime, model, X, A)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fxlora.runtime(model) is runtime
    assert dict(EAGER) == {"backend": "eager"}


LOGGED = """
import torch
from tests.fxlora.runtime_toys import Toy, adapter, attached, compiled_by
model = Toy()
runtime = attached(model, {"a": adapter()})
with runtime.batch("a"):
    compiled_by("fxlora", model)(torch.randn(3, 6))
"""


def test_torch_logs_and_traces(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_LOGS": "+fxlora", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOGGED], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "rewrite_sites" in done.stderr
    assert "2 sites in 2 ops" in done.stderr
    trace = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.log"))
    assert '"name": "fxlora_plan"' in trace
    assert "lora_linear" in trace
