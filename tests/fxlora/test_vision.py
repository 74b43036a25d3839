"""Models of images: learned queries for every request, image features among embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.torch_version import TorchVersion

import fxlora
from tests.oracle import Oracle, make_adapter

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
BOTH = {"input_ids": 0, "pixel_values": 0}
whole_paligemma = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12",
    reason="dynamo of torch 2.11 gets no whole graph of it",
)


def paligemma() -> nn.Module:
    text = transformers.GemmaConfig(**TEXT, head_dim=8)
    image = transformers.SiglipVisionConfig(**IMAGE, vision_use_head=False, projection_dim=32)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=image, image_token_index=60, projection_dim=32, hidden_size=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        num_queries=5, **sizes,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def texts(batch: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 58, (batch, 12))
    ids[:, 2:6] = 60
    same = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 16, 16), **same}


def masked(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32), "pixel_mask": torch.ones(batch, 32, 32)}


@pytest.mark.parametrize(
    ("build", "inputs", "batch_dims", "sites"),
    [pytest.param(paligemma, texts, BOTH, 23, marks=whole_paligemma), (detr, masked, None, 20)],
)
def test_a_mixed_batch_equals_peft(
    build: Callable[[], nn.Module], inputs: Any, batch_dims: Any, sites: int, tmp_path: Path
) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)

    adapters = {
        name: make_adapter(
            made, peft.LoraConfig(r=rank, lora_alpha=3, target_modules="all-linear"), tmp_path / name, seed=rank
        )
        for name, rank in (("a", 2), ("b", 5))
    }
    torch.manual_seed(3)
    batch, names = inputs(4), ["a", None, "b", "a"]
    lora = fxlora.apply(fxlora.capture(made(), **batch), max_adapters=2, max_rank=8, batch_dims=batch_dims)
    assert len(lora.sites) == sites
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)
    with torch.no_grad():
        Oracle(made, adapters).check(lora(**batch, adapters=names), batch, names)


@whole_paligemma
def test_images_whose_requests_are_not_known() -> None:
    """The reason says which input it is, and what to say of it."""
    gm = fxlora.capture(paligemma().eval(), **texts(3))
    lora = fxlora.apply(gm, max_adapters=1, max_rank=2, batch_dims={"input_ids": 0})
    reasons = {skip.name: skip.reason for skip in lora.skipped}
    assert "they come from pixel_values: batch_dims can name" in reasons["model.multi_modal_projector.linear.weight"]
    assert "not known to follow the requests: pixel_values" in reasons["lm_head.weight"]
