"""Generation in mixed batches against PEFT's generation of each request alone, token for token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import fxlora
from tests.models import ZOO, Entry, Inputs, request
from tests.oracle import CHANGED, TOLERANCE, make_adapters, relative_error

NAMES: Sequence[str | None] = ("docs", None, "code")
WHOLE: Mapping[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 5,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def entry_of(name: str, **overrides: Any) -> Entry:
    """A zoo entry that keeps its cache and never stops early."""
    entry = ZOO[name]
    return replace(entry, overrides={**entry.overrides, **overrides})


def build(entry: Entry, device: str = "cpu") -> Any:
    model: Any = entry.build().to(device)
    model.config.use_cache = True
    own = model.generation_config
    own.eos_token_id = own.forced_eos_token_id = None
    own.pad_token_id, own.decoder_start_token_id, own.max_length = 0, 1, None
    return model


def prompts(entry: Entry, batch: int = 3, length: int = 7, padded: bool = True, device: str = "cpu") -> Inputs:
    """What `generate` takes; left-padded where the model has a mask of its own tokens."""
    inputs = {name: value for name, value in entry.inputs(batch, length).items() if not name.startswith("decoder")}
    if padded and "attention_mask" in inputs:
        first = torch.tensor([2, 0, 3, 1])[torch.arange(batch) % 4]
        inputs["attention_mask"] = (torch.arange(length) >= first[:, None]).long()
    return {name: value.to(device) for name, value in inputs.items()}


@dataclass
class Served:
    """A compiled model with all adapters of an entry, and PEFT's models beside it."""

    entry: Entry
    folder: Path
    backend: Any = "eager"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.adapters = make_adapters(self.entry, self.folder)
        self.model = build(self.entry, self.device)
        self.compiled: Any = fxlora.compile(
            self.model, max_adapters=4, max_rank=16, backend=self.backend, **self.options
        )
        for name, folder in self.adapters.items():
            self.compiled.load_adapter(name, folder)
        self._references: dict[str | None, nn.Module] = {}

    def alone(self, name: str | None, inputs: Inputs, **options: Any) -> Any:
        """PEFT's generation (the bare model's for None): `sequences`, and `logits` by step."""
        if name not in self._references:
            base = build(self.entry, self.device)
            folder = None if name is None else str(self.adapters[name])
            self._references[name] = base if folder is None else peft.PeftModel.from_pretrained(base, folder).eval()
        return self._references[name].generate(**inputs, disable_compile=True, **{**WHOLE, **options})

    def together(self, inputs: Inputs, adapters: Any, **options: Any) -> Any:
        """The compiled model's generation of a batch."""
        return self.compiled.generate(**inputs, adapters=adapters, **{**WHOLE, **options})

    def check(self, inputs: Inputs, names: Sequence[str | None] = NAMES, **options: Any) -> None:
        """Each request of a batch has the tokens and logits that it has alone, and every adapter changes its logits."""
        got = self.together(inputs, list(names), **options)
        returned, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
        rows = max(returned, beams)
        for i, name in enumerate(names):
            mine = request(inputs, i)
            want, base = self.alone(name, mine, **options), self.alone(None, mine, **options)
            mixed = got.sequences[returned * i : returned * (i + 1)]
            assert torch.equal(mixed, want.sequences), f"request {i} ({name}): {mixed} is not {want.sequences}"
            for step, logits in enumerate(want.logits):
                error = relative_error(got.logits[step][rows * i : rows * (i + 1)], logits)
                assert error < TOLERANCE, f"logits of request {i} ({name}) at step {step} are off by {error:.1e}"
            assert name is None or relative_error(want.logits[0], base.logits[0]) > CHANGED, f"{name} changes nothing"


def served(name: str, folder: Path, overrides: Mapping[str, Any] | None = None, **options: Any) -> Served:
    """A zoo entry, compiled for the backend "eager" unless told otherwise."""
    backend, device = options.pop("backend", "eager"), options.pop("device", "cpu")
    return Served(entry_of(name, **(overrides or {})), folder, backend, options, device)
