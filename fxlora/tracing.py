"""How dynamo traces a model for fxlora: settings that hold around its own traces and calls, and nowhere else.

Equal sizes stay two sizes: a batch as large as its requests are long, or as the model has heads, would else be one
with them, and the next batch compile a further graph. Floats of the model (a scaling, an epsilon) are constants: as
inputs, which they are for dynamic graphs, inductor of torch 2.11 packs them with integers under CUDA graphs and then
refuses its own indices. Recurrent layers are traced, and what a model logs on its way is left out, for a graph cannot
break at a log line.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_config
from torch.nn.modules import transformer

_log = logging.getLogger(__name__)
_LOGS = ("debug", "info", "warning", "warn", "error", "critical", "exception", "log", "warning_once", "info_once")
_IGNORED = "ignore_logging_functions"
_DETECT = "_detect_is_causal_mask"


def logging_functions() -> set[Any]:
    """Every method of a logger that writes a line, those among them that libraries have added."""
    return {getattr(logging.Logger, name) for name in _LOGS if hasattr(logging.Logger, name)}


@cache
def can_ignore_logs() -> bool:
    """Whether dynamo can leave out what a model logs. torch 2.11 writes its settings into the metrics of every compile,
    cannot write functions, and logs an error each time: there a model that logs breaks its graph."""
    if not hasattr(torch._dynamo.config, _IGNORED):
        return False
    describe = getattr(torch._dynamo.utils, "_get_dynamo_config_for_logging", lambda: None)
    with torch._dynamo.config.patch({_IGNORED: logging_functions()}):
        try:
            describe()
        except TypeError:
            return False
    return True


def capture_settings() -> dict[str, Any]:
    """What holds while a model is captured, for ``torch._dynamo.config.patch``."""
    ignored = {_IGNORED: logging_functions()} if can_ignore_logs() else {}
    return {"allow_rnn": True, "specialize_float": True, **ignored}


def experts_advice(model: nn.Module) -> str:
    """What makes a graph of a transformers model that computes its experts one by one; empty for any other.

    Source: `use_experts_implementation` in transformers/integrations/moe.py.
    """
    dispatching = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    if all(getattr(getattr(m, "config", None), "_experts_implementation", "") != "eager" for m in dispatching):
        return ""
    return (
        "it computes its experts one by one, as many as the data asks for; in one graph it does after "
        'model.set_experts_implementation("grouped_mm")'
    )


@contextmanager
def plain_attention() -> Iterator[None]:
    """While a model is captured, torch's attention modules run their Python code.

    The calls they are fused into for inference hide which sizes belong together, or pack rows by a mask; and whether a
    mask is the causal one, which is a hint that `nn.Transformer` reads off its values, no graph can know.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    detect = getattr(transformer, _DETECT, None)
    torch.backends.mha.set_fastpath_enabled(False)
    if detect is not None:
        setattr(transformer, _DETECT, _said_causal)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
        if detect is not None:
            setattr(transformer, _DETECT, detect)


def _said_causal(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    """The hint as the caller gave it; without it the mask itself is used, which says the same."""
    return bool(is_causal)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch's own wrappers (`torch.compile`, data parallel), which adapter files do not name."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def call_once(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a model on copies of a call's arguments: what some set up at their first call, no graph can (a lock)."""
    args, kwargs = copy.deepcopy((args, kwargs))
    try:
        with torch.no_grad():
            forward(*args, **kwargs)
    except Exception:
        _log.debug("the model does not run as it is either", exc_info=True)


class Tracing:
    """The settings for calls of a compiled model, which may trace; further: of dynamo, beside those of a capture.

    `patch` of the two configs does the same in 42 us and more; a call enters here in 7 (one CPU core).
    """

    def __init__(self, further: Mapping[str, Any]) -> None:
        self._lock = threading.Lock()
        self._further = further
        self._inside = 0
        self._duck_shape = True
        self._before: dict[str, Any] = {}
        self._inner: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._inner = self._inner or {**capture_settings(), **self._further}
                self._duck_shape = shape_config.use_duck_shape
                self._before = {name: getattr(torch._dynamo.config, name) for name in self._inner}
                self._set(False, self._inner)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._duck_shape, self._before)

    @staticmethod
    def _set(duck_shape: bool, settings: dict[str, Any]) -> None:
        shape_config.use_duck_shape = duck_shape
        for name, value in settings.items():
            setattr(torch._dynamo.config, name, value)
