"""Names that weights had in earlier versions of a model: adapter files keep them after the model's own code moved.

Stage: part of binding. transformers knows what it renamed; a name that the model does not have is looked up there,
before it counts as unknown.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

_log = logging.getLogger(__name__)

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Renames:
    """Maps a module path of an earlier version to today's (a parameter's own path, where it is no `weight`), and any
    other path to itself. steps: transformers' renamings, in order.
    """

    steps: tuple[Any, ...] = ()

    def __call__(self, module: str) -> str:
        name = f"{module}.weight"
        for step in self.steps:
            name = step.rename_source_key(name)[0]
        return name.removesuffix(".weight")


def renames_of(models: Iterable[nn.Module]) -> Renames:
    """What transformers renamed in any of these models."""
    return Renames(tuple(step for model in models for step in _steps(model)))


def _steps(model: nn.Module) -> list[Any]:
    """Renamings that transformers applies when it loads an old checkpoint of this model; none for other models."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [step for step in get_model_conversion_mapping(model) if type(step) is WeightRenaming]
    except Exception as error:  # another version keeps them elsewhere: old names then count as unknown
        _log.debug("no names of earlier versions for %s: %s", type(model).__name__, error)
        return []
