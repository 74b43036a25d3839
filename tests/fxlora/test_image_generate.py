"""Generation from images and text, where the encoder of images is no graph and runs beside the compiled forward."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.torch_version import TorchVersion

import fxlora
from fxlora.errors import BatchDimsError, CallError, GraphBreakError, RowsNotProvenError, UnboundTensorError

pytestmark = pytest.mark.skipif(
    not hasattr(transformers.GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="this transformers runs the encoder inside the forward",
)

IMAGE, START = 60, 61
TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
SIGHT = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
IDS = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": START, "vision_end_token_id": 62}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2-vl": ("Qwen2VL", {}, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {},
        {
            "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "fullatt_block_indexes": [1],
            "window_size": 16,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {"head_dim": 16},
        {
            "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    ),
}  # fmt: skip
TARGETS = {"a": r".*language_model.*\.(q_proj|down_proj)", "b": r".*language_model.*\.(k_proj|v_proj|up_proj)"}
NAMES = ("a", None, "b")
IMAGES = (2, 1, 1)  # of each request
VOUCHED = {"pixel_values": None}


def build(family: str) -> Any:
    name, text, sight = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text}, vision_config={**SIGHT, **sight}, **IDS
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def save(base: Any, folder: Path, targets: str) -> str:
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


def requests() -> list[dict[str, torch.Tensor]]:
    """Prompts of one length with images of 4 x 4 patches, which become 2 x 2 tokens."""
    found = []
    for images in IMAGES:
        ids = torch.randint(3, 58, (1, 16))
        for i in range(images):
            ids[0, 2 + 6 * i] = START
            ids[0, 3 + 6 * i : 7 + 6 * i] = IMAGE
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.randn(16 * images, 3 * 2 * 4 * 4),
                "image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(images, 1),
                "mm_token_type_ids": (ids == IMAGE).int(),
            }
        )
    return found


def together(given: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([request[name] for request in given]) for name in given[0]}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_with_images_equal_each_alone(family: str, beams: int, tmp_path: Path) -> None:
    base = build(family)
    served: Any = fxlora.compile(copy.deepcopy(base), max_rank=8, backend="eager", batch_dims=VOUCHED)
    models = {None: base}
    for name, targets in TARGETS.items():
        folder = save(base, tmp_path / name, targets)
        served.load_adapter(name, folder)
        models[name] = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    given = requests()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "num_beams": beams}
    for names in (NAMES, ("b", "a", None)):
        got = served.generate(**together(given), adapters=list(names), **options)
        for i, name in enumerate(names):
            assert torch.equal(got[i], models[name].generate(**given[i], **options)[0]), (i, name)
    text = {name: value for name, value in together(given).items() if name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].clamp(max=57)
    got = served.generate(**text, adapters=list(NAMES), **options)
    assert torch.equal(got[2:], models["b"].generate(**{k: v[2:] for k, v in text.items()}, **options))


def test_an_adapter_of_the_encoder_is_refused_by_name(tmp_path: Path) -> None:
    base = build("qwen2.5-vl")
    served: Any = fxlora.compile(copy.deepcopy(base), max_rank=8, backend="eager", batch_dims=VOUCHED)
    folder = save(base, tmp_path, r".*visual.*\.qkv")
    with pytest.raises(UnboundTensorError, match=r"visual.*not read"):
        served.load_adapter("seen", folder)


def test_an_encoder_that_is_no_graph_says_so(tmp_path: Path) -> None:
    served: Any = fxlora.compile(build("qwen2.5-vl"), max_rank=8, backend="eager")
    with pytest.raises(GraphBreakError, match=r"batch_dims=\{'pixel_values': None\}"):
        served.generate(**together(requests()), max_new_tokens=2)


def test_an_input_that_the_forward_does_not_take_is_refused() -> None:
    with pytest.raises(BatchDimsError, match="pixels"):
        fxlora.compile(build("qwen2.5-vl"), max_rank=8, backend="eager", batch_dims={"pixels": None})


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.12", reason="dynamo of torch 2.11 gets no whole graph of it")
def test_no_adapter_is_left_out_beside_the_graph(tmp_path: Path) -> None:
    """An encoder that a trace has seen gets no sites from a vouched input; should it have some, the call is refused."""
    text = transformers.GemmaConfig(**{k: v for k, v in TEXT.items() if k != "rope_parameters"}, head_dim=16)
    sight = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8,
        vision_use_head=False, projection_dim=64,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=sight, image_token_index=IMAGE, projection_dim=64, hidden_size=64
    )
    base = transformers.PaliGemmaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 58, (2, 12))
    ids[:, 2:6] = IMAGE
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 16, 16),
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    served: Any = fxlora.compile(
        copy.deepcopy(base), max_rank=8, backend="eager", example_inputs=given, batch_dims=VOUCHED
    )
    served.load_adapter("words", save(base, tmp_path / "words", TARGETS["a"]))
    unvouched: Any = fxlora.compile(copy.deepcopy(base), max_rank=8, backend="eager")
    unvouched.load_adapter("words", str(tmp_path / "words"))
    several = {**given, "pixel_values": torch.randn(4, 3, 16, 16), "input_ids": ids.clone()}
    several["input_ids"][:, 7:11] = IMAGE
    with pytest.raises(RowsNotProvenError, match="pixel_values") as refusal:
        unvouched.generate(**several, adapters="words", max_new_tokens=2)
    assert "batch_dims={'pixel_values': None}" in refusal.value.__notes__[0]
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "words")).eval()
    got = served.generate(**given, adapters=["words", None], **options)
    assert torch.equal(got[0], model.generate(**given, **options)[0])
    assert torch.equal(got[1], base.generate(**given, **options)[1])
    with pytest.raises(UnboundTensorError, match=r"vision_tower.*q_proj.*carry no request"):
        served.load_adapter("seen", save(base, tmp_path / "seen", r".*vision.*\.q_proj"))
    served.runtime.require_no_adapter_on(served.model.vision_tower.modules(), "the encoder")
    with pytest.raises(CallError, match=r"'words' adds to .*language_model.*, but the encoder ran outside"):
        served.runtime.require_no_adapter_on(served.model.modules(), "the encoder")
