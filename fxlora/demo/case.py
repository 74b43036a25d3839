"""What a demo serves: a model, its adapters, and the held-out texts they are judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlora.demo import DATA

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One demo, ready to be served.

    model: a transformers causal language model, fp32 on the CPU. adapters: name to PEFT folder. texts: kind to token
    ids, int64 [windows, length], the same shape for every kind; each kind has the adapter of the same name. prompt: the
    text that every row of the sample continues. encode, decode: text to ids of shape [tokens] and back.
    """

    title: str
    model: Any
    adapters: Mapping[str, Path]
    texts: Mapping[str, torch.Tensor]
    prompt: str
    encode: Callable[[str], torch.Tensor]
    decode: Callable[[torch.Tensor], str]


def held_out(kind: str) -> str:
    """Return the held-out text of a kind, as it was when the adapters were trained."""
    return (DATA / "held_out" / f"{kind}.txt").read_text(encoding="ascii")


def windows(ids: torch.Tensor, *, length: int, count: int) -> torch.Tensor:
    """Cut token ids of shape [tokens] into `count` windows spread evenly: int64 [count, length]."""
    import torch

    starts = [part * (len(ids) - length) // max(count - 1, 1) for part in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def tiny_case() -> Case:
    """Return the case that ships with the package: a byte-level Qwen3-MoE and three adapters."""
    from fxlora.demo.model import WINDOW, decode, encode, load_model
    from fxlora.demo.texts import KINDS

    return Case(
        title="a byte-level Qwen3-MoE of 1.0 M parameters",
        model=load_model(DATA / "base"),
        adapters={kind: DATA / "adapters" / kind for kind in KINDS},
        texts={kind: windows(encode(held_out(kind)), length=WINDOW, count=24) for kind in KINDS},
        prompt="return ",
        encode=encode,
        decode=decode,
    )
