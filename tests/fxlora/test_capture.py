"""Capture: dynamo first, export next, one error that quotes both; dynamic sizes; what the capture fixed stays fixed."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.errors import CallError, CaptureError, PeftModelError
from fxlora.signature import META_KEY
from tests.toys.base import make_adapter, merged

capture_module = import_module("fxlora.capture")


class Model(nn.Module):
    """x [B, T, 3] -> [B, T, 4], twice as large where flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, flag: bool = True, name: str = "a") -> torch.Tensor:
        return self.proj(x) * (2 if flag else 1)


def x(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 3)


def built(make: type[nn.Module] = Model) -> nn.Module:
    return make().eval().requires_grad_(False)


def test_dynamo_is_tried_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_export", lambda *args: pytest.fail("export was tried"))
    gm = fxlora.capture(built(), x())
    assert isinstance(gm, fx.GraphModule)
    assert gm.meta[META_KEY]["model"] is None, "dynamo keeps all names itself"


def refuse(*args: Any) -> fx.GraphModule:
    raise RuntimeError("dynamo says no")


def test_export_is_the_fallback(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", refuse)
    model = built()
    with caplog.at_level(logging.DEBUG, logger="fxlora.capture"):
        gm = fxlora.capture(model, x())
    assert gm.meta[META_KEY]["model"] is model
    lora = fxlora.apply(gm)
    assert [site.name for site in lora.sites] == ["proj"]
    for batch, length in ((2, 5), (4, 7), (3, 2)):
        sample = x(batch, length)
        assert torch.allclose(lora(sample), model(sample), atol=1e-6)


def test_export_keeps_both_names_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", refuse)
    (site,) = fxlora.apply(fxlora.capture(built(Twice), x())).sites
    assert {site.parameter, *site.aliases} == {"a.weight", "b.weight"}


class Twice(nn.Module):
    """One linear on two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(x)


def test_dynamo_keeps_both_names_of_a_weight() -> None:
    (site,) = fxlora.apply(fxlora.capture(built(Twice), x())).sites
    assert {site.parameter, *site.aliases} == {"a.weight", "b.weight"}


class Asking(nn.Module):
    """Takes a branch that data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) if x.sum() > 0 else x


def test_the_error_quotes_both_tracers() -> None:
    with pytest.raises(CaptureError) as caught:
        fxlora.capture(built(Asking), x())
    lines = str(caught.value).splitlines()
    assert "no whole graph of the model could be captured" in lines[0]
    assert any(line.startswith("dynamo: ") for line in lines)
    assert any(line.startswith("export: ") for line in lines)


def test_batch_and_length_are_dynamic_and_features_are_not() -> None:
    model = built()
    lora = fxlora.apply(fxlora.capture(model, x()))
    assert not lora.frozen
    for batch, length in ((2, 5), (7, 3), (3, 11)):
        sample = x(batch, length)
        assert torch.allclose(lora(sample), model(sample), atol=1e-6)
    with pytest.raises(CallError, match=r"'x' has shape \(2, 5, 4\).*only for size 3 at dim 2"):
        lora(torch.randn(2, 5, 4))


def test_a_dim_of_one_stays_fixed() -> None:
    lora = fxlora.apply(fxlora.capture(built(), x(2, 1)))
    lora(x(5, 1))
    with pytest.raises(CallError, match="only for size 1 at dim 1"):
        lora(x(2, 3))


def test_the_callers_tensors_are_not_marked() -> None:
    sample = x()
    fxlora.capture(built(), sample)
    assert not [name for name in vars(sample) if "dynamo" in name]


class TestConstants:
    """Values that are no tensors are part of the graph."""

    @pytest.fixture(scope="class")
    @classmethod
    def lora(cls) -> Any:
        return fxlora.apply(fxlora.capture(built(), x(), flag=False, name="b"))

    def test_may_be_left_out_or_repeated(self, lora: Any) -> None:
        sample = x()
        assert torch.equal(lora(sample), lora(sample, flag=False, name="b"))
        assert torch.equal(lora(sample), lora(sample, False, "b"))

    @pytest.mark.parametrize("changed", [{"flag": True}, {"name": "c"}, {"flag": None}])
    def test_may_not_change(self, lora: Any, changed: dict[str, Any]) -> None:
        (name,) = changed
        with pytest.raises(CallError, match=f"argument {name} is .*; the graph was traced with"):
            lora(x(), **changed)

    def test_one_is_not_true(self) -> None:
        """1 == True in Python; another type takes the same branch here, so it is served."""
        lora = fxlora.apply(fxlora.capture(built(), x(), flag=True))
        assert torch.equal(lora(x() * 0, flag=1), lora(x() * 0))

    def test_new_ones_are_refused(self) -> None:
        lora = fxlora.apply(fxlora.capture(built(), x()))
        with pytest.raises(CallError, match="flag"):
            lora(x(), flag=False)


class Branching(nn.Module):
    """Takes another branch for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * 2 if x.shape[1] > 8 else self.proj(x)


@pytest.mark.parametrize(("traced", "allowed", "refused"), [(5, (2, 8), (9, 20)), (12, (9, 30), (8, 3))])
def test_the_models_own_branches_guard_the_call(
    traced: int, allowed: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    model = built(Branching)
    lora = fxlora.apply(fxlora.capture(model, x(2, traced)))
    for length in allowed:
        sample = x(3, length)
        assert torch.allclose(lora(sample), model(sample), atol=1e-6)
    for length in refused:
        with pytest.raises(CallError, match="another branch at these sizes"):
            lora(x(3, length))


class Choices(nn.Module):
    """ids and mask [B, C, L] -> [B, C]: both are made lists of rows, and the mask's are picked by number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.proj = nn.Embedding(30, 3), nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = ids.flatten(0, 1)
        places = torch.arange(rows.shape[0])[:, None], torch.arange(rows.shape[1])
        kept = mask.flatten(0, 1)[places]
        return (self.proj(self.embed(rows) * kept[..., None])).sum((1, 2)).view(ids.shape[:2])


def choices(batch: int, number: int, length: int = 5) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(30, (batch, number, length)), "mask": torch.rand(batch, number, length)}


@torch.no_grad()
def test_dims_that_inputs_have_alike_are_one_size_in_every_call() -> None:
    """No op compares how many choices ids and mask have; which request a row of both belongs to follows from that."""
    model = built(Choices)
    lora = fxlora.apply(fxlora.capture(model, **choices(2, 3)))
    assert [site.name for site in lora.sites] == ["embed", "proj"]
    lora.load_adapter("a", make_adapter(model, ("proj",), rank=2, seed=1))
    for number in (3, 2, 7):
        inputs = choices(3, number)
        got = lora(**inputs, adapters=["a", None, "a"])
        for index, name in enumerate(("a", None, "a")):
            alone = {key: value[index : index + 1] for key, value in inputs.items()}
            want = merged(model, make_adapter(model, ("proj",), rank=2, seed=1) if name else None)(**alone)
            assert torch.allclose(got[index : index + 1], want, atol=1e-5)
            assert name is None or not torch.allclose(want, model(**alone), atol=1e-2)
    with pytest.raises(CallError, match="dim 1 of 'ids' is 4 and dim 1 of 'mask' is 2: rows are proven for calls that"):
        lora(ids=choices(3, 4)["ids"], mask=choices(3, 2)["mask"])


def test_a_peft_model_is_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", lambda *args: pytest.fail("traced"))
    wrapped = peft.get_peft_model(built(), peft.LoraConfig(r=2, target_modules=["proj"]))
    with pytest.raises(PeftModelError, match=r"unload\(\).*load_adapter"):
        fxlora.capture(wrapped, x())


def test_the_output_embedding_is_remembered_by_name() -> None:
    class Headed(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.proj

    class Headless(Model):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert fxlora.capture(built(Headed), x()).meta[META_KEY]["output_embedding"] == "proj.weight"
    assert fxlora.capture(built(Headless), x()).meta[META_KEY]["output_embedding"] is None


def test_weights_are_shared_and_the_model_is_untouched() -> None:
    model = built()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    gm = fxlora.capture(model, x())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {p.data_ptr() for p in gm.parameters()} == set(before.values())


def test_export_lets_fixed_arguments_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", refuse)
    fxlora.apply(fxlora.capture(built(), x(), flag=False))(x())


def test_branches_of_an_exported_graph_guard_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", refuse)
    lora = fxlora.apply(fxlora.capture(built(Branching), x()))
    with pytest.raises(CallError):
        lora(x(2, 12))


def test_fixed_arguments_of_an_exported_graph_are_call_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "_dynamo", refuse)
    lora = fxlora.apply(fxlora.capture(built(), x(), flag=True))
    with pytest.raises(CallError):
        lora(x(), flag=False)


def test_arguments_given_by_position_go_by_their_names_too() -> None:
    sample = x()
    lora = fxlora.apply(fxlora.capture(built(), sample), batch_dims={"x": 0})
    assert torch.equal(lora(x=sample), lora(sample))


def test_the_captured_call_itself_is_served() -> None:
    sample = x()
    lora = fxlora.apply(fxlora.capture(built(), sample, False))
    assert torch.equal(lora(sample, False), lora(sample))
