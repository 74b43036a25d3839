"""A LoRA file by itself: what diffusers writes is served as PEFT's folder is; other forms are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxlora
from fxlora.adapter import CONFIG_NAME, read_adapter
from fxlora.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFileError,
    AdapterFormatError,
    PickledAdapterError,
    UnboundTensorError,
    UnsupportedAdapterError,
)
from fxlora.single_file import FILE_NAME
from tests.oracle import randomize_adapter

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
Tensors = dict[str, torch.Tensor]


class Block(nn.Module):
    """x [B, 6] -> [B, 6]; `b.to_q` ends as `a.b.to_q` does."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.ModuleDict({"to_q": nn.Linear(6, 8)})
        self.a = nn.ModuleDict({"b": nn.ModuleDict({"to_q": nn.Linear(8, 6)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a["b"]["to_q"](self.b["to_q"](x).tanh())


def block() -> nn.Module:
    torch.manual_seed(2)
    return Block().eval().requires_grad_(False)


def trained(**options: Any) -> tuple[nn.Module, dict[str, Any], Tensors]:
    """A model under PEFT, its config as written, and its tensors by path within the model."""
    config = peft.LoraConfig(target_modules=["b.to_q", "a.b.to_q"], **options)
    model = peft.get_peft_model(block(), config)
    randomize_adapter(model, torch.Generator().manual_seed(1))
    raw = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    state = peft.get_peft_model_state_dict(model)
    return model.eval(), raw, {k.removeprefix("base_model.model."): v for k, v in state.items()}


def written(path: Path, tensors: Mapping[str, torch.Tensor], header: Any = None, component: str = "") -> Path:
    before = f"{component}." if component else ""
    metadata = {"format": "pt"}
    if header is not None:
        metadata["lora_adapter_metadata"] = json.dumps({f"{before}{k}": v for k, v in header.items()})
    save_file({f"{before}{k}": v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def served(source: Any) -> torch.Tensor:
    lora = fxlora.apply(fxlora.capture(block(), X), max_adapters=1, max_rank=8)
    lora.load_adapter("a", source)
    with torch.no_grad():
        return lora(X, adapters=["a", None, "a"])


def check(source: Any, model: nn.Module) -> None:
    with torch.no_grad():
        want, base, got = model(X), block()(X), served(source)
    assert (got - want)[[0, 2]].abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(got[1], base[1])
    assert (want - base).abs().max() > 1e-2


@pytest.mark.parametrize("component", ["transformer", "unet", "text_encoder_2", ""])
def test_the_header_is_the_config(component: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"^b.to_q": 2}, "alpha_pattern": {"a.b.to_q": 7}}
    model, raw, tensors = trained(r=4, lora_alpha=3, use_rslora=True, **patterns)
    path = written(tmp_path / "any.safetensors", tensors, raw, component)
    check(path, model)
    check(str(path), model)


def test_alphas_beside_the_tensors_are_of_their_own_paths_alone(tmp_path: Path) -> None:
    """One path is the end of the other: the pattern of the first must not reach it."""
    model, _, tensors = trained(
        r=4, lora_alpha=3, rank_pattern={"^b.to_q": 2}, alpha_pattern={"^b.to_q": 5, "^a.b.to_q": 1}
    )
    alphas = {"b.to_q.alpha": torch.tensor(5.0), "a.b.to_q.alpha": torch.tensor(1.0)}
    written(tmp_path / FILE_NAME, {**tensors, **alphas}, None, "unet")
    check(tmp_path, model)


def test_without_an_alpha_the_delta_is_the_product(tmp_path: Path) -> None:
    model, _, tensors = trained(r=4, lora_alpha=4)
    check(written(tmp_path / "a.safetensors", tensors, None, "transformer"), model)
    assert read_adapter(tmp_path / "a.safetensors").config.scaling_of("b.to_q") == 1


def test_the_names_in_errors_are_paths_within_the_model(tmp_path: Path) -> None:
    _, raw, tensors = trained(r=4, lora_alpha=4)
    tensors["b.to_k.lora_A.weight"], tensors["b.to_k.lora_B.weight"] = torch.ones(4, 6), torch.ones(8, 4)
    with pytest.raises(UnboundTensorError, match=r"b\.to_k\.lora_A\.weight: no weight of this name; nearest: b\.to_q"):
        served(written(tmp_path / "a.safetensors", tensors, raw, "transformer"))


def lora(*paths: str, rank: int = 2) -> Tensors:
    return {f"{path}.lora_{half}.weight": torch.ones(rank, rank) for path in paths for half in "AB"}


def pair(path: str, down: str, up: str) -> Tensors:
    return {f"{path}{down}": torch.ones(2, 6), f"{path}{up}": torch.ones(8, 2)}


ALPHA = torch.tensor(4.0)
KOHYA = "lora_unet_down_blocks_0_attentions_0_to_q"
FOREIGN = {
    "kohya-ss": {**pair(KOHYA, ".lora_down.weight", ".lora_up.weight"), f"{KOHYA}.alpha": ALPHA},
    "once saved": pair("unet.down.attn1.processor.to_q_lora", ".down.weight", ".up.weight"),
    "and XLabs": pair("double_blocks.0.processor.qkv_lora1", ".down.weight", ".up.weight"),
    "called down and up": pair("unet.down.attn1.to_q.lora", ".down.weight", ".up.weight"),
    "called lora_down": pair("diffusion_model.b.q", ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS": pair("transformer.b.q", ".lokr_w1", ".lokr_w2"),
}


@pytest.mark.parametrize("form", FOREIGN)
def test_other_forms_are_refused_by_name(form: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", FOREIGN[form])
    with pytest.raises(
        UnsupportedAdapterError, match=rf"another form than .*{form}.* among \d tensors.*with diffusers"
    ):
        read_adapter(path)


Case = tuple[type[AdapterError], str, Callable[[Path], Path]]
CASES: dict[str, Case] = {
    "several": (
        UnsupportedAdapterError,
        r"several models, text_encoder \(2\), unet \(2\), and a graph serves one",
        lambda p: written(p / "a.safetensors", lora("unet.x", "text_encoder.x")),
    ),
    "some without": (
        UnsupportedAdapterError,
        r"several models, unet \(2\), others \(2\)",
        lambda p: written(p / "a.safetensors", lora("unet.x", "y")),
    ),
    "alpha twice": (
        AdapterFormatError,
        "says alpha twice",
        lambda p: written(p / "a.safetensors", {**lora("x"), "x.alpha": ALPHA}, {"r": 2}, "unet"),
    ),
    "alpha for some": (
        AdapterFormatError,
        r"alphas for some pairs only, or for none: \['y'\]",
        lambda p: written(p / "a.safetensors", {**lora("x", "y"), "x.alpha": ALPHA}, None, "unet"),
    ),
    "no number": (
        AdapterFormatError,
        r"unet\.x\.alpha has the shape \(2,\); expected one number",
        lambda p: written(p / "a.safetensors", {**lora("x"), "x.alpha": torch.ones(2)}, None, "unet"),
    ),
    "ranks without alpha": (
        AdapterConfigError,
        r"ranks \[2, 3\] and says alpha neither",
        lambda p: written(p / "a.safetensors", {**lora("x"), **lora("y", rank=3)}, None, "unet"),
    ),
    "alpha nowhere": (AdapterConfigError, "says alpha nowhere", lambda p: written(p / "a.safetensors", lora("x"))),
    "peft alone": (
        AdapterFileError,
        "PEFT's tensors .* no adapter_config.json beside it",
        lambda p: written(p / "adapter_model.safetensors", lora("base_model.model.x")),
    ),
    "header of another": (
        AdapterConfigError,
        r"has no unet\.r; it has \['transformer\.r'\]",
        lambda p: written(p / "a.safetensors", lora("unet.x"), {"transformer.r": 2}),
    ),
    "no pair": (
        AdapterFormatError,
        "no pair X.lora_A.weight",
        lambda p: written(p / "a.safetensors", {"unet.x.weight": ALPHA}),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_file_leaves_open_is_an_error(case: str, tmp_path: Path) -> None:
    error, words, made = CASES[case]
    with pytest.raises(error, match=words):
        read_adapter(made(tmp_path))


def test_dora_and_features_of_the_header_are_refused(tmp_path: Path) -> None:
    _, raw, tensors = trained(r=4, lora_alpha=4)
    with pytest.raises(UnsupportedAdapterError, match="use_dora"):
        read_adapter(written(tmp_path / "a.safetensors", tensors, {**raw, "use_dora": True}, "unet"))
    tensors["b.to_q.lora_magnitude_vector"] = torch.ones(8)
    with pytest.raises(UnboundTensorError, match="a DoRA magnitude, which is not served"):
        served(written(tmp_path / "b.safetensors", tensors, None, "unet"))


def test_a_broken_header(tmp_path: Path) -> None:
    for text, words in (("{", "not valid JSON"), ("[1]", "a JSON list, not an object")):
        save_file(lora("unet.x"), tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
        with pytest.raises(AdapterFormatError, match=words):
            read_adapter(tmp_path / "a.safetensors")


def test_a_pickle_and_a_folder_of_peft_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80")
    with pytest.raises(PickledAdapterError, match="is a pickle, which is not opened"):
        read_adapter(tmp_path / "pytorch_lora_weights.bin")
    path = written(tmp_path / FILE_NAME, lora("unet.x"))
    (tmp_path / CONFIG_NAME).write_text("{}")
    with pytest.raises(AdapterFileError, match="is a file; expected a folder"):
        read_adapter(path)
