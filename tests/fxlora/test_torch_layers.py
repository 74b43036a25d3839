"""torch's own layers as PEFT adapts them: packed attention, transformer layers, recurrent cells, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn
from torch._dynamo.functional_export import dynamo_graph_capture_for_export
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora.tracing import plain_attention
from tests.oracle import Oracle, make_adapter

WIDTH = 8
NAMES = ("one", None, "two")


class Encoder(nn.Module):
    """Two layers that torch fuses into one call each for inference."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.layers(x, src_key_padding_mask=padding))


class Causal(Encoder):
    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layers(x, mask=mask))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 12, batch_first=True), 1)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.layers(x, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1]))


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.lstm, self.head = nn.GRUCell(WIDTH, 6), nn.LSTMCell(WIDTH, 6), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], 6)
        pair = (state, state)
        for step in range(3):
            state, pair = self.cell(x[:, step], state), self.lstm(x[:, step], pair)
        return self.head(torch.cat([state, pair[0]], -1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(torch.relu(self.first(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


def built(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return build


@pytest.fixture(autouse=True)
def seen_by_peft() -> Iterator[None]:
    """The fused calls read weights past PEFT's layers, so PEFT's own answers are taken without them."""
    with plain_attention():
        yield


def check(
    build: Callable[[], nn.Module], inputs: dict[str, torch.Tensor], folder: Path, gm: fx.GraphModule, **config: Any
) -> fxlora.LoraModule:
    lora = fxlora.apply(gm, max_adapters=2, max_rank=8)
    adapters = {}
    for seed, (name, rank) in enumerate((("one", 2), ("two", 5))):
        options = {"r": rank, "lora_alpha": 3, **config}
        adapters[name] = make_adapter(build, peft.LoraConfig(**options), folder / name, seed=seed)
        lora.load_adapter(name, adapters[name])
    Oracle(build, adapters).check(lora(**inputs, adapters=list(NAMES)), inputs, NAMES)
    return lora


def fused(model: nn.Module, inputs: dict[str, torch.Tensor]) -> fx.GraphModule:
    """The model's graph with the calls that torch fuses for inference."""
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.no_grad():
            gm = dynamo_graph_capture_for_export(model)(**inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    assert isinstance(gm, fx.GraphModule)
    assert any("_transformer_encoder_layer_fwd" in str(node.target) for node in gm.graph.nodes)
    return gm


LAYERS = ["linear1", "linear2", "head"]


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_fused_encoder_layers(options: dict[str, Any], tmp_path: Path) -> None:
    build, inputs = built(lambda: Encoder(**options)), {"x": torch.randn(3, 5, WIDTH)}
    check(build, inputs, tmp_path, fused(build(), inputs), target_modules=LAYERS)


@pytest.mark.parametrize("make", [Encoder, Causal])
def test_encoders_that_are_captured(make: type[Encoder], tmp_path: Path) -> None:
    build, inputs = built(make), {"x": torch.randn(3, 5, WIDTH), "padding": torch.zeros(3, 5, dtype=torch.bool)}
    inputs["padding"][0, 3:] = inputs["padding"][2, 4:] = True
    check(build, inputs, tmp_path, fxlora.capture(build(), **inputs), target_modules=LAYERS)


def test_a_decoder_with_a_causal_mask(tmp_path: Path) -> None:
    build, inputs = built(Decoder), {"x": torch.randn(3, 5, WIDTH), "memory": torch.randn(3, 4, WIDTH)}
    check(build, inputs, tmp_path, fxlora.capture(build(), **inputs), target_modules=LAYERS[:2])


def test_packed_attention_takes_adapters_with_the_patterns_of_its_own_path(tmp_path: Path) -> None:
    build, inputs = built(Encoder), {"x": torch.randn(3, 5, WIDTH)}
    options = {"rank_pattern": {"self_attn": 3}, "alpha_pattern": {"1.self_attn": 11}}
    check(build, inputs, tmp_path, fused(build(), inputs), target_modules=["self_attn", "linear1"], **options)


def test_recurrent_cells(tmp_path: Path) -> None:
    build, inputs = built(Cells), {"x": torch.randn(3, 4, WIDTH)}
    check(build, inputs, tmp_path, fxlora.capture(build(), **inputs), target_modules=["head"])


@pytest.mark.parametrize("strict", [None, False])
def test_checkpointed_blocks(strict: bool | None, tmp_path: Path) -> None:
    build, inputs = built(Checkpointed), {"x": torch.randn(3, 4, WIDTH)}
    gm = fxlora.capture(build(), **inputs) if strict is None else torch.export.export(build(), (), inputs).module()
    assert isinstance(gm, fx.GraphModule)
    before = str(gm.graph)
    check(build, inputs, tmp_path, gm, target_modules=["first", "head"])
    assert str(gm.graph) == before


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapped_model_is_captured_as_what_it_wraps(wrap: Callable[..., Any], tmp_path: Path) -> None:
    build, inputs = built(Checkpointed), {"x": torch.randn(3, 4, WIDTH)}
    check(build, inputs, tmp_path, fxlora.capture(wrap(build()), **inputs), target_modules=["first", "head"])
