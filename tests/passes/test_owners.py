"""Modules that are more than the read of their weight: PEFT adapts the module, so an adapter of it is refused."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

import fxlora
from fxlora.errors import CallError, GraphError, UnboundTensorError, UnsupportedAdapterError

X = torch.randn(3, 4, 6)
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def pair(path: str) -> dict[str, torch.Tensor]:
    """LoRA tensors of a linear 6 -> 6, as PEFT names them."""
    stem = f"base_model.model.{path}"
    return {f"{stem}.lora_A.weight": torch.randn(4, 6), f"{stem}.lora_B.weight": torch.randn(6, 4)}


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Clamping(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.clamp(-1, 1))


class Twice(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(input))


class Spelled(nn.Linear):
    """No more than a linear, spelled in another way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flat = input.reshape(-1, 6).double() @ self.weight.double().t()
        return (flat + self.bias.double()).to(input.dtype).view(input.shape)


class Hooked(nn.Linear):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.register_forward_hook(lambda module, args, output: output * 2)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.inner, self.head = kind(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(x)))


SOURCES: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "capture": lambda model: fxlora.capture(model, x=X),
    "export": lambda model: torch.export.export(model, (X,)).module(),  # type: ignore[dict-item]
    "symbolic_trace": torch.fx.symbolic_trace,
}


def served(model: nn.Module, source: str = "capture") -> fxlora.LoraModule:
    return fxlora.apply(SOURCES[source](model.eval()), max_adapters=2, max_rank=4, example_inputs=(X,))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", [Scaled, Clamping, Twice, Hooked])
def test_a_module_that_does_more_than_its_linear_is_refused_by_name(kind: type[nn.Linear], source: str) -> None:
    lora = served(Net(kind), source)
    with pytest.raises(UnboundTensorError, match=r"inner\.lora_A.*does more than the linear"):
        lora.load_adapter("a", (CONFIG, pair("inner")))
    lora.load_adapter("a", (CONFIG, pair("head")))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", [nn.Linear, Spelled])
def test_another_spelling_of_a_linear_is_one(kind: type[nn.Linear], source: str) -> None:
    served(Net(kind), source).load_adapter("a", (CONFIG, pair("inner")))


class Table(nn.Embedding):
    """Scaled by a number that PEFT does not know of."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 4


class ScaledTable(nn.Embedding):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.embed_scale = 4.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("exported", [False, True])
def test_a_table_is_scaled_by_what_peft_takes_into_account_or_refused(exported: bool) -> None:
    ids = torch.arange(6).view(2, 3)
    tensors = {
        "base_model.model.0.lora_embedding_A": torch.randn(4, 7),
        "base_model.model.0.lora_embedding_B": torch.randn(6, 4),
    }
    for kind in (Table, ScaledTable):
        model = nn.Sequential(kind(7, 6), nn.Linear(6, 6)).eval()
        gm: Any = torch.export.export(model, (ids,)).module() if exported else fxlora.capture(model, ids)
        lora = fxlora.apply(gm, max_adapters=2, max_rank=4)
        if kind is Table:
            with pytest.raises(UnboundTensorError, match="more than the embedding"):
                lora.load_adapter("a", (CONFIG, tensors))
        else:
            lora.load_adapter("a", (CONFIG, tensors))


def test_modules_that_share_a_weight_are_adapted_apart_so_none_is_here() -> None:
    model = Net(nn.Linear)
    model.head.weight = model.inner.weight
    with pytest.raises(UnboundTensorError, match=r"inner.*share one weight"):
        served(model).load_adapter("a", (CONFIG, pair("inner")))


def test_one_module_called_twice_is_one() -> None:
    model = Net(nn.Linear)
    model.head = model.inner
    served(model).load_adapter("a", (CONFIG, pair("inner")))


class Past(Net):
    """Reads a weight past its module, as some do to give it another bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.linear(x, self.inner.weight))


def test_a_weight_that_is_read_past_its_module_takes_no_adapter_but_zero() -> None:
    lora = fxlora.apply(fxlora.capture(nn.Sequential(Past(nn.Linear)).eval(), X), max_adapters=2, max_rank=4)
    tensors = pair("0.inner")
    with pytest.raises(UnsupportedAdapterError, match=r"reads the weight of 0\.inner past its module"):
        lora.load_adapter("a", (CONFIG, tensors))
    tensors["base_model.model.0.inner.lora_B.weight"].zero_()  # as training by PEFT leaves it
    lora.load_adapter("a", (CONFIG, tensors | pair("0.head")))
    parameter = {**CONFIG, "target_parameters": ["inner.weight"]}
    lora.load_adapter("b", (parameter, pair("0.inner")))


class Both(Net):
    """Calls a module and reads its weight past it; turned, by another name, where it says so."""

    turned = False

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__(kind)
        self.back = nn.Linear(6, 6, bias=False)
        self.back.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.head(torch.relu(self.inner(x)))
        return hidden @ self.back.weight if self.turned else functional.linear(hidden, self.inner.weight)


class Turned(Both):
    turned = True


@pytest.mark.parametrize("wrapped", [False, True], ids=["the model itself", "a part of it"])
@pytest.mark.parametrize("net", [Both, Turned])
def test_a_weight_that_its_module_reads_too_is_adapted_there_as_by_peft(net: type[Both], wrapped: bool) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model: nn.Module = net(nn.Linear).eval()
    model = nn.Sequential(model) if wrapped else model
    stem = "0." if wrapped else ""
    lora = fxlora.apply(fxlora.capture(model, X), max_adapters=2, max_rank=4)
    tuned = get_peft_model(deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=["inner", "head"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lora.load_adapter("a", (CONFIG, get_peft_model_state_dict(tuned)))
    torch.testing.assert_close(lora(X, adapters=["a", None, "a"])[::2], tuned(X).detach()[::2])
    back = pair(f"{stem}back")
    if net is Turned:
        with pytest.raises(UnsupportedAdapterError, match="past its module"):
            lora.load_adapter("b", (CONFIG, back))
        back[f"base_model.model.{stem}back.lora_B.weight"].zero_()
        lora.load_adapter("b", (CONFIG, back))
        lora.unload_adapter("a")
        lora.load_adapter("a", (CONFIG, get_peft_model_state_dict(tuned) | back))
        torch.testing.assert_close(lora(X, adapters=["a", "b", "a"])[::2], tuned(X).detach()[::2])
        assert torch.equal(lora(X, adapters=["a", "b", "a"])[1], lora(X, adapters=["a", None, "a"])[1])


@pytest.mark.parametrize("net", [Both, Turned])
def test_a_targeted_parameter_is_adapted_where_its_module_is_called_as_by_peft(net: type[Both]) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = net(nn.Linear).eval()
    named = {"target_parameters": ["inner.weight"]}
    tuned = get_peft_model(deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=["head"], **named))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lora = fxlora.apply(fxlora.capture(model, X), max_adapters=2, max_rank=4)
    lora.load_adapter("a", (CONFIG | named, get_peft_model_state_dict(tuned)))
    torch.testing.assert_close(lora(X, adapters=["a", None, "a"])[::2], tuned(X).detach()[::2])


class Casting(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_autocast_is_refused_in_the_model_and_around_a_call() -> None:
    with pytest.raises(GraphError, match="autocast is on"):
        served(Casting(nn.Linear))
    lora = served(Net(nn.Linear))
    with pytest.raises(CallError, match="autocast is on"), torch.autocast("cpu", torch.bfloat16):
        lora(x=X, adapters=None)


def test_weights_that_compute_by_themselves_are_refused_with_their_class() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Net(nn.Linear).requires_grad_(False)
    weight = model.inner.weight
    model.inner.weight = nn.Parameter(TwoTensor(weight.detach(), weight.detach()), requires_grad=False)
    gm = torch.fx.symbolic_trace(model)
    lora = fxlora.apply(gm, max_adapters=2, max_rank=4, example_inputs=(X,))
    with pytest.raises(UnboundTensorError, match=r"inner.*TwoTensor"):
        lora.load_adapter("a", (CONFIG, pair("inner")))
    assert functional.mse_loss(lora(X, adapters=None), model(X)) < 1e-9
