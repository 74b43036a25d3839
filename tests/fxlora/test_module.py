"""LoraModule: called like the model, `adapters=` in every form, errors before anything runs, no crossing threads."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import fx, nn

import fxlora
from fxlora.errors import (
    BatchGranularityError,
    BatchSizeError,
    BatchTypeError,
    CallError,
    FxloraError,
    UnknownAdapterError,
)
from tests.toys.base import make_adapter, merged


class Model(nn.Module):
    """x [B, T, 3] -> [B, T, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


PATHS = ("up", "down")
FORMS: dict[str, Callable[[nn.Module, torch.Tensor], fx.GraphModule]] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "capture": lambda model, x: fxlora.capture(model, x=x),
    "export": lambda model, x: torch.export.export(model, (), {"x": x}).module(),
}


def built(make: type[nn.Module] = Model) -> nn.Module:
    torch.manual_seed(5)
    return make().eval().requires_grad_(False)


def inputs(batch: int = 4, tokens: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(seed))


def served(model: nn.Module, form: str = "symbolic_trace", **options: Any) -> fxlora.LoraModule:
    """The model with adapters a (rank 2) and b (rank 3) loaded."""
    x = inputs()
    lora = fxlora.apply(FORMS[form](model, x), max_adapters=3, max_rank=4, example_inputs={"x": x}, **options)
    for name, rank in (("a", 2), ("b", 3)):
        lora.load_adapter(name, make_adapter(model, PATHS, rank, rank))
    return lora


@pytest.fixture(scope="module")
def lora() -> fxlora.LoraModule:
    return served(built())


@pytest.fixture(scope="module")
def wanted() -> dict[str | None, nn.Module]:
    """The model with each adapter merged in."""
    model = built()
    ranks: dict[str, int] = {"a": 2, "b": 3}
    return {None: model, **{n: merged(model, make_adapter(model, PATHS, r, r)) for n, r in ranks.items()}}


def expected(wanted: dict[str | None, nn.Module], x: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    return torch.cat([wanted[name](x[i : i + 1]) for i, name in enumerate(names)])


@pytest.mark.parametrize(
    ("adapters", "names"),
    [
        (None, [None] * 4),
        ("a", ["a"] * 4),
        (["a", None, "b", "a"], ["a", None, "b", "a"]),
        (("b", "b", None, "a"), ["b", "b", None, "a"]),
        ([None] * 4, [None] * 4),
        (torch.tensor([1, -1, 0, 0]), ["b", None, "a", "a"]),
        (torch.tensor([0, 0, 1, -1], dtype=torch.int32), ["a", "a", "b", None]),
    ],
    ids=["none", "one name", "list", "tuple", "list of none", "slots", "slots int32"],
)
def test_forms_of_adapters(
    lora: fxlora.LoraModule, wanted: dict[str | None, nn.Module], adapters: Any, names: list[str | None]
) -> None:
    x = inputs()
    got = lora(x, adapters=adapters)
    assert torch.allclose(got, expected(wanted, x, names), atol=1e-5)
    assert not torch.allclose(got, expected(wanted, x, names[1:] + names[:1]), atol=1e-3) or len(set(names)) == 1


def test_one_adapter_per_token(wanted: dict[str | None, nn.Module]) -> None:
    lora = served(built(), batch_dims=(0, 1))
    x = inputs(2, 3)
    names: list[list[str | None]] = [["a", None, "b"], ["b", "b", "a"]]
    got = lora(x, adapters=names)
    for i, row in enumerate(names):
        for j, name in enumerate(row):
            assert torch.allclose(got[i, j], wanted[name](x[i : i + 1, j : j + 1])[0, 0], atol=1e-5)
    assert torch.allclose(lora(x, adapters=["a", None])[0], wanted["a"](x)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "error"),
    [
        ("c", UnknownAdapterError),
        (["a", "c", None, None], UnknownAdapterError),
        (["a"], BatchSizeError),
        ([None] * 5, BatchSizeError),
        ([["a"] * 6] * 4, BatchGranularityError),
        (3, BatchTypeError),
        ([1, 2, 3, 4], BatchTypeError),
        (torch.tensor([2, -1, -1, -1]), UnknownAdapterError),
        (torch.tensor([0.0, 0, 0, 0]), BatchTypeError),
        (torch.tensor([0, 0]), BatchSizeError),
    ],
)
def test_wrong_adapters_raise_before_anything_runs(
    lora: fxlora.LoraModule, monkeypatch: pytest.MonkeyPatch, adapters: Any, error: type[FxloraError]
) -> None:
    monkeypatch.setattr(type(lora.graph_module), "forward", lambda *args: pytest.fail("the graph ran"))
    with pytest.raises(error):
        lora(inputs(), adapters=adapters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "'x' is missing"),
        ({"y": inputs()}, "'y' is not in the graph"),
        ({"x": torch.randn(4, 6, 7)}, r"shape \(4, 6, 7\).*only for size 3 at dim 2"),
    ],
)
def test_wrong_calls_raise_before_anything_runs(
    lora: fxlora.LoraModule, monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(type(lora.graph_module), "forward", lambda *args: pytest.fail("the graph ran"))
    with pytest.raises(CallError, match=message):
        lora(**call)


def test_inputs_that_differ_in_their_number_of_requests_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.up(x).sum(1) + y.sum(1)[:1]

    lora = fxlora.apply(fx.symbolic_trace(built(Pair)), example_inputs=(inputs(), torch.randn(4, 4, 4)))
    with pytest.raises(CallError, match=r"'y' has \(3,\) requests along dims \(0,\), the batch has \(4,\)"):
        lora(inputs(), torch.randn(3, 4, 4))


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


pytree.register_dataclass(Result)
BODIES: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "tensor": lambda self, x: self.up(x),
    "tuple": lambda self, x: (self.up(x), x),
    "one in a tuple": lambda self, x: (self.up(x),),
    "list": lambda self, x: [self.up(x), x * 2],
    "dict": lambda self, x: {"logits": self.up(x), "other": {"x": x * 2}},
    "nested": lambda self, x: (self.up(x), [x * 2, (x + 1, {"deep": x - 1})]),
    "dataclass": lambda self, x: Result(self.up(x), (x * 2, x + 1)),
    "none inside": lambda self, x: (self.up(x), None, 3),
    "the input itself": lambda self, x: (x, self.up(x)),
    "twice the same": lambda self, x: ((y := self.up(x)), y),
}


def shape_of(output: Any) -> Any:
    """The structure of an output with types, and the shapes in it."""
    if dataclasses.is_dataclass(output):
        return type(output), {f.name: shape_of(getattr(output, f.name)) for f in dataclasses.fields(output)}
    if isinstance(output, dict):
        return type(output), {key: shape_of(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return type(output), [shape_of(value) for value in output]
    return tuple(output.shape) if isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BODIES)
def test_outputs_have_the_models_structure(form: str, kind: str) -> None:
    if form == "symbolic_trace" and kind == "dataclass":
        pytest.skip("torch.fx cannot trace a dataclass")
    model = type("Structured", (Model,), {"forward": BODIES[kind]})().eval().requires_grad_(False)
    x = inputs()
    lora = fxlora.apply(FORMS[form](model, x), max_rank=4, example_inputs={"x": x})
    lora.load_adapter("a", make_adapter(model, ("up",), 2, 2))
    got, want = lora(x=x, adapters=["a", None, None, "a"]), model(x)
    assert shape_of(got) == shape_of(want)
    leaves = [(g, w) for g, w in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)]
    for left, right in leaves:
        if isinstance(left, torch.Tensor):
            assert torch.allclose(left[1:3], right[1:3], atol=1e-6), "rows without an adapter"
    assert any(isinstance(g, torch.Tensor) and not torch.allclose(g[0], w[0], atol=1e-3) for g, w in leaves)


def test_outputs_carry_no_grad_and_inputs_may() -> None:
    lora = served(built())
    out = lora(inputs().requires_grad_(), adapters="a")
    assert not out.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_the_state_dict_is_the_models(form: str) -> None:
    model = built()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = served(model, form)
    lora(inputs(), adapters="a") if form != "capture" else lora(x=inputs(), adapters="a")
    assert {name: value.data_ptr() for name, value in lora.state_dict().items()} == {
        name: value.data_ptr() for name, value in model.state_dict().items()
    }
    assert all(torch.equal(value, before[name]) for name, value in lora.state_dict().items())
    assert list(lora.parameters()) == []


REFUSALS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pickle": (lambda lora: pickle.dumps(lora), "cannot be pickled"),
    "deepcopy": (lambda lora: copy.deepcopy(lora), "cannot be copied"),
    "copy": (lambda lora: copy.copy(lora), "cannot be pickled"),
    "to a dtype": (lambda lora: lora.to(torch.float64), "move the model first"),
    "to a device": (lambda lora: lora.to("meta"), "move the model first"),
    "half": (lambda lora: lora.half(), "move the model first"),
    "cpu": (lambda lora: lora.cpu(), "move the model first"),
}


@pytest.mark.parametrize("action", REFUSALS)
def test_copies_and_moves_are_refused_with_the_reason(lora: fxlora.LoraModule, action: str) -> None:
    act, message = REFUSALS[action]
    before = lora(inputs(), adapters="a")
    with pytest.raises(CallError, match=message):
        act(lora)
    assert torch.equal(lora(inputs(), adapters="a"), before)


def test_check_compares_with_the_base_without_adapters(lora: fxlora.LoraModule) -> None:
    (row,) = lora.check(inputs())
    assert row.dtype == torch.float32
    assert row.max_rel_error <= 1e-6
    assert row.max_abs_error >= 0


def test_check_sees_a_difference_and_names_each_output() -> None:
    model = type("Two", (Model,), {"forward": lambda self, x: {"a": self.up(x), "b": x.sum(1)}})().eval()
    lora = fxlora.apply(fx.symbolic_trace(model), example_inputs=(inputs(),))
    assert [row.path for row in lora.check(inputs())] == ["['a']", "['b']"]
    object.__setattr__(lora, "base", lambda x: {"a": model.up(x) + 1, "b": x.sum(1)})
    changed, same = lora.check(inputs())
    assert changed.max_abs_error == pytest.approx(1.0, abs=1e-5)
    assert not changed.equal_bits
    assert (same.max_abs_error, same.equal_bits) == (0.0, True)


def test_adapters_come_and_go_without_touching_the_graph() -> None:
    lora = served(built())
    text = str(lora.graph_module.graph)
    x = inputs()
    first = lora(x, adapters=["b", "b", None, "b"])
    lora.unload_adapter("a")
    assert lora.adapter_names == ("b",)
    assert torch.equal(lora(x, adapters=["b", "b", None, "b"]), first)
    with pytest.raises(UnknownAdapterError, match="'a'"):
        lora(x, adapters="a")
    with pytest.raises(UnknownAdapterError):
        lora.unload_adapter("a")
    assert str(lora.graph_module.graph) == text


def test_a_row_map_reads_as_the_chain_that_proved_it(lora: fxlora.LoraModule) -> None:
    for site in lora.sites:
        assert lora.row_map(site).startswith("adapter_slots -> ")


@pytest.mark.parametrize("form", ["symbolic_trace", "capture"])
def test_threads_do_not_cross(form: str) -> None:
    """Two threads, other batches and other adapters at each of 200 calls: every answer has the bits of its own."""
    lora = served(built(), form)
    generator = random.Random(0)
    cases = []
    for case in range(6):
        x = inputs(2 + case % 3, 2 + case, seed=case)
        names = [generator.choice(["a", "b", None]) for _ in range(len(x))]
        cases.append((x, names, lora(x=x, adapters=names)))
    failures: list[str] = []

    def run(seed: int) -> None:
        chosen = random.Random(seed)
        try:
            for _ in range(200):
                x, names, want = chosen.choice(cases)
                if not torch.equal(lora(x=x, adapters=names), want):
                    failures.append(f"thread {seed}: {names}")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_input_with_too_few_dims_is_a_call_error(lora: fxlora.LoraModule) -> None:
    with pytest.raises(CallError):
        lora(torch.randn(3))


def test_an_input_that_is_no_tensor_is_a_call_error(lora: fxlora.LoraModule) -> None:
    with pytest.raises(CallError):
        lora(x=None)
