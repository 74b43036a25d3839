"""Models that denoise images: a timestep for all requests or one for each, convolutions around attention, frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlora
from tests.oracle import CHANGED, TOLERANCE, Oracle, make_adapter, relative_error

NAMES = ["a", None, "b", "a", "b"]
TARGETS = ["to_q", "to_v", "to_out.0", "ff", "time_proj", "time.0", "time.2"]


class Denoiser(nn.Module):
    """sample [B, C, F, H, W] and a timestep -> [B, C, F, H, W]: frames are folded into the batch, pixels into tokens.

    The timestep is read before the sample is, and may be a number, a tensor of one, or one for each request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.time_proj = nn.Linear(16, 8)
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])
        self.ff = nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, scale: float = 2.0) -> torch.Tensor:
        timesteps = torch.tensor([timestep]) if not isinstance(timestep, torch.Tensor) else timestep
        waves = timesteps.reshape(-1, 1) * torch.exp(-torch.arange(4, dtype=torch.float32))
        waves = torch.cat([waves.cos(), waves.sin()], dim=-1).expand(sample.shape[0], -1)
        moment = self.time_proj(F.silu(self.time(waves)))
        batch, _, frames, height, width = sample.shape
        x = self.conv_in(sample.transpose(1, 2).flatten(0, 1))
        x = self.norm(x) + moment.repeat_interleave(frames, dim=0)[:, :, None, None]
        tokens = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        heads = (p(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.to_out[0](mixed)
        tokens = tokens + F.gelu(self.ff(tokens))
        x = x + F.interpolate(tokens.transpose(1, 2).unflatten(-1, (height // 2, width // 2)), scale_factor=scale)
        return self.conv_out(x).unflatten(0, (batch, frames)).transpose(1, 2)


def denoiser() -> nn.Module:
    torch.manual_seed(3)
    return Denoiser().eval().requires_grad_(False)


TIMESTEPS = {
    "for each": lambda: torch.arange(5.0) + 0.5,
    "for all": lambda: torch.tensor(0.7),
    "of one": lambda: torch.tensor([0.7]),
    "number": lambda: 0.7,
}


def call(timestep: str) -> dict[str, Any]:
    return {"sample": torch.randn(5, 3, 4, 8, 8), "timestep": TIMESTEPS[timestep]()}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("adapters")
    recipes = {"a": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS),
               "b": peft.LoraConfig(r=4, lora_alpha=2, target_modules=[*TARGETS, "to_k"])}  # fmt: skip
    made = {
        name: make_adapter(denoiser, config, folder / name, seed=i) for i, (name, config) in enumerate(recipes.items())
    }
    return Oracle(denoiser, made)


def check(got: torch.Tensor, inputs: dict[str, Any], oracle: Oracle) -> None:
    """Each request is what PEFT gives for the whole batch under its adapter alone."""
    base = oracle.alone(None, inputs)["0"]
    for i, name in enumerate(NAMES):
        want = oracle.alone(name, inputs)["0"]
        assert relative_error(got[i], want[i]) <= TOLERANCE, f"request {i} under {name!r}"
        assert name is None or relative_error(want[i], base[i]) > CHANGED


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_a_captured_denoiser_equals_peft(timestep: str, oracle: Oracle) -> None:
    """The requests are those of the first argument, also where the graph reads another one first."""
    inputs = call(timestep)
    lora = fxlora.apply(fxlora.capture(denoiser(), **inputs), max_adapters=2, max_rank=4)
    for name, folder in oracle.adapters.items():
        lora.load_adapter(name, folder)
    with torch.no_grad():
        check(lora(**inputs, adapters=NAMES), inputs, oracle)


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_a_compiled_denoiser_equals_peft(timestep: str, oracle: Oracle) -> None:
    torch._dynamo.reset()
    inputs, model = call(timestep), denoiser()
    runtime = fxlora.attach(model, max_adapters=2, max_rank=4)
    for name, folder in oracle.adapters.items():
        runtime.load_adapter(name, folder)
    compiled = torch.compile(model, backend=runtime.backend, options={"backend": "eager"}, fullgraph=True, dynamic=True)
    with torch.no_grad(), runtime.batch(NAMES):
        check(compiled(**inputs), inputs, oracle)


class Guided(nn.Module):
    """A denoiser that runs each request with its condition and without, in one batch of twice the size."""

    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.inner, self.interleaved = Denoiser(), interleaved

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        pair = [sample, sample * 0.5]
        both = torch.stack(pair, dim=1).flatten(0, 1) if self.interleaved else torch.cat(pair)
        out = self.inner(both, timestep)
        bare, guided = (out[0::2], out[1::2]) if self.interleaved else out.chunk(2)
        return bare + 3.0 * (guided - bare)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_guided_denoiser_of_any_batch(interleaved: bool, frames: int, tmp_path: Path) -> None:
    """Few images are traced for few images; the graph takes more. Rows of the timestep are those of both halves."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Guided(interleaved).eval().requires_grad_(False)

    folder = make_adapter(build, peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS), tmp_path / "a")
    oracle = Oracle(build, {"a": folder, "b": folder})
    inputs = {"sample": torch.randn(3, 3, frames, 8, 8), "timestep": torch.tensor(0.7)}
    lora = fxlora.apply(fxlora.capture(build(), **inputs), max_adapters=2, max_rank=4)
    lora.load_adapter("a", folder)
    lora.load_adapter("b", folder)
    inputs["sample"] = torch.randn(5, 3, frames, 8, 8)
    with torch.no_grad():
        check(lora(**inputs, adapters=NAMES), inputs, oracle)


def test_rows_that_meet_the_requests_in_another_order_are_refused() -> None:
    """A timestep for both halves, taken as if it were for pairs: nothing but the order of the meeting tells."""

    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(1, 4)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            both = torch.cat([sample, sample])
            moment = self.time(timestep.expand(both.shape[0], 1))
            return both + moment.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    lora = fxlora.apply(fxlora.capture(Twisted(), torch.randn(5, 4), torch.tensor(0.5)), max_adapters=1, max_rank=2)
    assert not lora.sites
    assert "they come from timestep" in {skip.name: skip.reason for skip in lora.skipped}["time.weight"]


def test_two_timesteps_for_five_requests_say_nothing_of_any() -> None:
    """What more than one number says may be of some requests only: repeated for all, it is nobody's."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(2, 4)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample + self.time(timestep.expand(sample.shape[0], -1))

    lora = fxlora.apply(fxlora.capture(Mean(), torch.randn(5, 4), torch.randn(2)), max_adapters=1, max_rank=2)
    assert not lora.sites
    assert "they come from timestep" in {skip.name: skip.reason for skip in lora.skipped}["time.weight"]
