"""The oracle of every equality test: adapters made by PEFT, and PEFT's own answer for each request run alone.

A test serves a mixed batch in one graph and compares it request by request with `answer`. `check` refuses a vacuous
pass: an adapter that does not change the answer fails the test as surely as a wrong answer does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from tests.models import Entry, Inputs, request

TOLERANCE = 1e-5
CHANGED = 1e-3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """One adapter to make: which parts of an entry it targets, and the rest of its LoraConfig."""

    rank: int
    alpha: int
    parts: Sequence[str]
    rslora: bool = False
    patterned: bool = False


RECIPES: Mapping[str, Recipe] = {
    "sql": Recipe(rank=2, alpha=3, parts=("attention", "gate"), patterned=True),
    "docs": Recipe(rank=4, alpha=5, parts=("attention", "mlp", "embedding", "head"), rslora=True),
    "code": Recipe(rank=8, alpha=9, parts=("mlp", "gate", "attention", "head")),
}


def config_of(entry: Entry, recipe: Recipe) -> peft.LoraConfig:
    """The LoraConfig of a recipe: modules by suffix, the router gate by parameter, patterns on the first module."""
    modules = [name for part in recipe.parts if part != "gate" for name in getattr(entry, part)]
    options: dict[str, Any] = {}
    if recipe.patterned:
        first, last = entry.attention[0], entry.attention[-1]
        options = {"rank_pattern": {first: recipe.rank + 3}, "alpha_pattern": {last: recipe.alpha + 4, first: 7}}
    if "gate" in recipe.parts and entry.gate:
        options["target_parameters"] = list(entry.gate)
    return peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, use_rslora=recipe.rslora, target_modules=modules, **options
    )


@torch.no_grad()
def randomize_adapter(model: nn.Module, generator: torch.Generator, gain: float = 1.0) -> None:
    """Redraw every LoRA tensor in place so that each delta is of the order of its base weight; B is never zero."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        second = "lora_B" in name or "lora_embedding_B" in name
        parameter.copy_(0.4 * gain * noise if second else noise * parameter.shape[-1] ** -0.5)
        if "lora_embedding_A" in name:
            parameter.copy_(0.5 * noise)


def make_adapter(
    build: Callable[[], nn.Module], config: peft.LoraConfig, folder: Path, seed: int = 0, gain: float = 1.0
) -> Path:
    """Write an adapter as PEFT saves it (adapter_config.json and adapter_model.safetensors) and return its folder."""
    model = peft.get_peft_model(build(), config)
    randomize_adapter(model, torch.Generator().manual_seed(seed), gain)
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def make_adapters(entry: Entry, folder: Path, recipes: Mapping[str, Recipe] = RECIPES) -> dict[str, Path]:
    """One folder per recipe for this entry."""
    return {
        name: make_adapter(
            entry.build, config_of(entry, recipe), folder / entry.name / name, seed=index, gain=entry.gain
        )
        for index, (name, recipe) in enumerate(recipes.items())
    }


def tensors_of(output: Any) -> Tensors:
    """Every tensor of a model's output by name; a bare tensor or a tuple is named by position, nested ones by dots."""
    if isinstance(output, torch.Tensor):
        return {"0": output}
    pairs = (
        output.items()
        if isinstance(output, Mapping)
        else enumerate(output)
        if isinstance(output, (tuple, list))
        else ()
    )
    found: Tensors = {}
    for key, value in pairs:
        if isinstance(value, torch.Tensor):
            found[str(key)] = value
        elif isinstance(value, (Mapping, tuple, list)):
            found.update({f"{key}.{name}": tensor for name, tensor in tensors_of(value).items()})
    return found


@torch.no_grad()
def answer(build: Callable[[], nn.Module], adapter: Path | None, inputs: Inputs) -> Tensors:
    """PEFT's own output for these inputs under one adapter (None: the untouched base), on a fresh base."""
    model = build()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    return tensors_of(model(**inputs))


@dataclass
class Oracle:
    """PEFT's answers for one entry and its adapters, each model built once and each answer kept."""

    build: Callable[[], nn.Module]
    adapters: Mapping[str, Path]
    models: dict[str | None, nn.Module] = field(default_factory=dict)

    @torch.no_grad()
    def alone(self, name: str | None, inputs: Inputs) -> Tensors:
        """The answer of a batch (usually of one request) under one adapter."""
        if name not in self.models:
            model = self.build()
            folder = self.adapters[name] if name is not None else None
            self.models[name] = model if folder is None else peft.PeftModel.from_pretrained(model, str(folder)).eval()
        return tensors_of(self.models[name](**inputs))

    def check(self, got: Any, inputs: Inputs, names: Sequence[str | None], tolerance: float = TOLERANCE) -> float:
        """Compare a mixed batch with each request alone; returns the worst relative error.

        got: the output for the whole batch, request on dim 0. Raises AssertionError for a wrong row, a missing output,
        or an adapter that leaves an answer as the base gives it.
        """
        outputs, worst, seen = tensors_of(got), 0.0, set()
        for index, name in enumerate(names):
            mine = request(inputs, index)
            want, base = self.alone(name, mine), self.alone(None, mine)
            assert want.keys() <= outputs.keys(), f"outputs {sorted(outputs)} lack some of {sorted(want)}"
            moved = max(relative_error(want[key], base[key]) for key in want)
            assert name is None or moved > CHANGED, f"adapter {name!r} changes request {index} by {moved:.1e} only"
            for key, value in want.items():
                error = relative_error(outputs[key][index : index + 1], value)
                assert error <= tolerance, (
                    f"{key} of request {index} ({name!r}) is off by {error:.2e} (adapter moves it by {moved:.2e})"
                )
                worst = max(worst, error)
            seen.add(name)
        assert seen - {None}, "no adapter in this batch: nothing is checked"
        return worst


@torch.no_grad()
def answer_per_token(
    build: Callable[[], nn.Module], adapters: Mapping[str, Path], inputs: Inputs, names: Sequence[Sequence[str | None]]
) -> Tensors:
    """The answer where every token of every request has an adapter of its own: names is nested as the ids are.

    PEFT has no such mode: each of its LoRA linears adds its delta to the base linear of the same name, at its tokens.
    """
    model = build()
    for name, folder in adapters.items():
        mine = torch.tensor([[chosen == name for chosen in row] for row in names])[..., None]
        for path, layer in peft.PeftModel.from_pretrained(build(), str(folder)).named_modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                base = model.get_submodule(path.removeprefix("base_model.model."))
                base.register_forward_hook(_adding(layer, mine))
    return tensors_of(model(**inputs))


def _adding(layer: Any, mine: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        delta = layer.lora_B["default"](layer.lora_A["default"](args[0])) * layer.scaling["default"]
        return output + torch.where(mine, delta, 0.0)

    return hook


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| / max |want|; infinite where the shapes differ or a value is not finite on one side alone."""
    if got.shape != want.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()) or not torch.equal(
        got[~finite].nan_to_num(), want[~finite].nan_to_num()
    ):
        return float("inf")
    difference = torch.where(finite, got - want, 0.0).abs().max()
    return float(difference / torch.where(finite, want, 0.0).abs().max().clamp_min(1e-30))
