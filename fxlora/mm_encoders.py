"""Encoders of images and video that transformers' `generate` runs once, beside the model's forward.

Stage: under `fxlora.compile`, before the first compiled step. Many such encoders read sizes of each image on the host,
so no graph holds them; what they return (`mm_encoder_outputs`) is an input of the forward, which then is one graph.
They run so only where the caller vouches for the order of their input, and no adapter may add to what they run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fxlora.passes.rows.seeds import BatchDims

FEATURES = "mm_encoder_outputs"
"""The argument of a forward that takes what the encoders return, by modality."""

# The names that transformers' models give to what an encoder reads.
_INPUTS = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}


def vouched_features(batch_dims: BatchDims) -> dict[str, None]:
    """`batch_dims` of the features whose inputs have None there: they too belong to the requests in their order."""
    if not isinstance(batch_dims, Mapping):
        return {}
    vouched = {name for name, given in batch_dims.items() if given is None}
    return {f"{FEATURES}.{modality}": None for modality, names in _INPUTS.items() if vouched.intersection(names)}


def advice(forward: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """What helps where a forward with these arguments is no graph or its rows are not proven; empty if nothing does."""
    given = [name for names in _INPUTS.values() for name in names if arguments.get(name) is not None]
    if not given or FEATURES not in inspect.signature(forward).parameters:
        return ""
    return (
        f"batch_dims={{{given[0]!r}: None}} says that this input comes in the order of the requests; `generate` then "
        f"runs its encoder beside the graph"
    )


@contextmanager
def modules_that_run() -> Iterator[list[nn.Module]]:
    """Every module called inside, in this order."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        seen.append(module)

    hook = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()
