"""Makes the demo's package data: `python -m fxlora.demo.train [FOLDER]` trains the base model and the three adapters.

One thread, seeded, about five minutes. The held-out texts are saved beside the weights and take no part in training.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlora.demo.losses import row_losses
from fxlora.demo.model import WINDOW, encode, load_model, new_model
from fxlora.demo.texts import KINDS, held_out_texts, training_texts

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

SEED = 20
ROWS = 16
BASE_ROWS = {"code": 6, "docs": 6, "licence": 4}
BASE_STEPS, BASE_RATE = 800, 3e-3
ADAPTER_STEPS, ADAPTER_RATE = {"code": 600, "docs": 450, "licence": 250}, 5e-3
RANKS = {"code": 16, "docs": 8, "licence": 4}


def draw_rows(data: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Return `rows` windows of token ids, int64 [rows, 128], that start anywhere in `data` [tokens]."""
    import torch

    starts = torch.randint(0, len(data) - WINDOW, (rows,), generator=generator)
    return torch.stack([data[start : start + WINDOW] for start in starts.tolist()])


def optimise(
    model: Any, sources: list[tuple[torch.Tensor, int]], *, steps: int, rate: float, seed: int, bar: tqdm[Any]
) -> None:
    """Train whatever in `model` requires a gradient; each batch has so many rows of each of the `sources`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        ids = torch.cat([draw_rows(data, rows, generator) for data, rows in sources])
        loss = row_losses(model(input_ids=ids).logits, ids).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def train_base(folder: Path, data: dict[str, torch.Tensor], bar: tqdm[Any]) -> None:
    """Train the base model on all kinds and save it in fp32."""
    bar.set_description("base")
    model = new_model(SEED)
    sources = [(data[kind], BASE_ROWS[kind]) for kind in KINDS]
    optimise(model, sources, steps=BASE_STEPS, rate=BASE_RATE, seed=SEED, bar=bar)
    model.save_pretrained(folder)


def train_adapter(base: Path, folder: Path, kind: str, data: torch.Tensor, bar: tqdm[Any]) -> None:
    """Train one adapter on attention and router gates, on the text of its kind alone, and save it as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model

    bar.set_description(kind)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=RANKS[kind],
        lora_alpha=2 * RANKS[kind],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.gate.weight"],
    )
    model = get_peft_model(load_model(base), config)
    seed = SEED + 1 + KINDS.index(kind)
    optimise(model, [(data, ROWS)], steps=ADAPTER_STEPS[kind], rate=ADAPTER_RATE, seed=seed, bar=bar)
    model.save_pretrained(folder)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Make what PEFT saved the same from run to run: no model card, no path of this machine, sorted lists."""
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = "fxlora/demo"
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(folder: Path) -> None:
    """Train everything and write it under `folder`."""
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    for kind, text in held_out_texts().items():
        (folder / "held_out" / f"{kind}.txt").write_text(text)
    data = {kind: encode(text) for kind, text in training_texts().items()}
    with tqdm(total=BASE_STEPS + sum(ADAPTER_STEPS.values()), unit="step") as bar:
        train_base(folder / "base", data, bar)
        for kind in KINDS:
            train_adapter(folder / "base", folder / "adapters" / kind, kind, data[kind], bar)
    record = {
        "seed": SEED,
        "python": platform.python_version(),
        "training_bytes": {kind: len(tokens) for kind, tokens in data.items()},
        "steps": {"base": BASE_STEPS, **ADAPTER_STEPS},
        "rows_per_step": {"base": BASE_ROWS, "adapter": ROWS},
        "bytes_per_row": WINDOW,
        "ranks": RANKS,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
