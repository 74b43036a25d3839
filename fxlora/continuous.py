"""`fxlora.continuous_batching(model)`: the continuous batching of transformers, with an adapter for each request.

Stage: what users of transformers call. Requests of all adapters share the tokens of one packed row; the slots of these
tokens are set before each step. Objects that transformers made for this model are hooked, never its classes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fxlora.batch import slots_of
from fxlora.compile import _Compiled, _Generates
from fxlora.compile import compile as compile_model
from fxlora.errors import (
    BatchDimsError,
    BatchSizeError,
    BatchTypeError,
    CompileOptionError,
    TransformersVersionError,
)
from fxlora.live_requests import LiveRequests
from fxlora.packed_step import PackedStep
from fxlora.paged_cache import PagedCaches
from fxlora.runtime import Runtime

_log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

Names = str | None | Sequence[str | None]

# Adapters of the prompts of the `generate_batch` that runs, one for each.
_of_prompts: ContextVar[list[str | None] | None] = ContextVar("_of_prompts", default=None)

# What is used of transformers beyond its documented methods: object, then names of its attributes.
_INTERNALS: dict[str, tuple[str, ...]] = {
    "": ("_create_batch_processor", "model", "is_running", "continuous_batching_config"),
    "batch_processor": ("cache", "inputs_and_outputs", "model_runner", "output_router", "max_batch_tokens"),
    "batch_processor.inputs_and_outputs": ("prepare_batch_tensors", "compute_stream"),
    "batch_processor.model_runner": ("compute_batch",),
    "batch_processor.output_router": ("deliver", "deliver_batch"),
}
_METHODS = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching")


def continuous_batching(model: M, **options: Any) -> M:
    """Serve requests with adapters of their own through the continuous batching of transformers.

    Args:
        model: A transformers model that can generate, or what `fxlora.compile(model, batch_dims=(0, 1))` made of one.
            Requests are packed into one row, so adapters are chosen per token: hence the two batch dims.
        options: Those of `fxlora.compile`, for a model that is not compiled yet. `max_tokens` (default 8192) must be at
            least the `max_batch_tokens` of the ContinuousBatchingConfig.

    Returns:
        An object with the model's methods and those of a compiled model (`load_adapter`, `runtime`, ...), of which

        - `generate_batch(inputs, adapters=[...])` takes one name or None per prompt, or one for all,
        - `continuous_batching_context_manager` and `init_continuous_batching` give a manager whose
          `add_request(input_ids, adapter="sql")` and `add_requests(inputs, adapters=[...])` do.

        An adapter cannot be unloaded while a request that has it lives; others come and go between steps. Blocks of the
        cache are not shared between requests, as the same prompt has other keys and values under another adapter.
        Nothing else may call the model while a manager runs, and its `generate` is not served. What goes wrong in a
        step is raised by the next `add_request` and at the end of the context.

    Raises:
        CompileOptionError: `mode`, or a config, asks for compilation or CUDA graphs that would hide adapters; CUDA
            graphs of continuous batching itself (`use_cuda_graph=True` in its config) are served.
        BatchDimsError: the compiled model does not choose adapters per token.
        TransformersVersionError: the installed transformers lacks something that is used of it.
        Everything that `fxlora.compile` raises.
    """
    missing = [name for name in _METHODS if not callable(getattr(model, name, None))]
    if missing:
        raise TransformersVersionError(
            f"{type(model).__name__} has no {missing[0]}: continuous batching takes a transformers model that can "
            f"generate, of transformers 5"
        )
    compiled: Any = model
    if isinstance(model, _Compiled):
        if options:
            raise CompileOptionError(f"the model is compiled already; options {list(options)} come too late")
    else:
        per_token: dict[str, Any] = {"batch_dims": (0, 1), **options}
        compiled = compile_model(model, **per_token)
    if compiled.runtime.request_dims != 2:
        raise BatchDimsError(
            f"continuous batching packs requests into one row, and this model was compiled with "
            f"batch_dims={compiled.runtime.batch_dims!r}; compile it with batch_dims=(0, 1)"
        )
    if (mode := compiled._fxlora_backend.keywords["mode"]) in ("reduce-overhead", "max-autotune"):
        raise CompileOptionError(
            f"mode={mode!r} has CUDA graphs of its own; continuous batching captures its steps itself: set "
            f"use_cuda_graph=True in the ContinuousBatchingConfig"
        )
    if isinstance(compiled, _Serves):
        return cast("M", compiled)
    serving, kind = copy.copy(compiled), type(compiled)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    serving.__class__ = type(kind.__name__, (_Serves, kind), names)
    serving.__dict__["_fxlora_caches"] = PagedCaches()
    return cast("M", serving)


class _Serves(_Generates):
    """What a model that serves requests has beside the methods of a compiled one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs and "adapters" not in kwargs:  # a step: its batch is open already
            return nn.Module.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> Any:
        """As the model's own; the manager's `add_request` takes `adapter=`, its `add_requests` `adapters=`."""
        config: Any = self.config
        attention = config._attn_implementation or ""
        if "flash" in attention:
            raise CompileOptionError(
                f"the model's attention is {attention!r}, whose rows cannot be proven: choose another with "
                f"`model.set_attn_implementation('sdpa')`"
            )
        config = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        manager = cast("Any", super()).init_continuous_batching(
            generation_config=generation_config, continuous_batching_config=_own_config(config), **kwargs
        )
        if isinstance(manager, _Manages):  # kept from an earlier session
            return manager
        return _adopt(manager, self.runtime)

    @contextlib.contextmanager
    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As the model's own, with the manager of `init_continuous_batching`. Raises what went wrong in a step."""
        with cast("Any", super()).continuous_batching_context_manager(*args, **kwargs) as manager:
            yield manager
        manager.raise_failure()

    def generate_batch(self, inputs: Any, *args: Any, adapters: Names = None, **kwargs: Any) -> Any:
        """As the model's own; adapters: one name or None per prompt, or one for all.

        Raises UnknownAdapterError or BatchError before anything runs, and what went wrong in a step.
        """
        token = _of_prompts.set(_names(adapters, len(inputs), self.runtime))
        try:
            return cast("Any", super()).generate_batch(inputs, *args, **kwargs)
        finally:
            _of_prompts.reset(token)


def _names(adapters: Any, count: int, runtime: Runtime) -> list[str | None]:
    """One loaded adapter's name or None for each of `count` prompts. Raises UnknownAdapterError or BatchError."""
    if isinstance(adapters, torch.Tensor):
        raise BatchTypeError("adapters is a tensor; requests name their adapters")
    slots_of(adapters, runtime.pool, request_dims=(0,), sizes=(count,))
    return list(adapters) if isinstance(adapters, list | tuple) else [adapters] * count


def _own_config(given: Any) -> Any:
    """The caller's config, or the default one, without what would give wrong tokens or unproven graphs."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError as error:
        raise TransformersVersionError(
            "transformers has no ContinuousBatchingConfig; expected transformers 5"
        ) from error

    config = ContinuousBatchingConfig() if given is None else copy.copy(given)
    if not hasattr(config, "allow_block_sharing"):
        raise TransformersVersionError("transformers' ContinuousBatchingConfig has no allow_block_sharing")
    config.allow_block_sharing = False  # a prefix is known by its tokens alone, whatever adapter made its keys
    if hasattr(config, "auto_switch_to_flash"):
        config.auto_switch_to_flash = False
    return config


def _adopt(manager: Any, runtime: Runtime) -> Any:
    """Give a new manager of transformers adapters."""
    _require(manager, "")
    for name in ("varlen_compile_config", "decode_compile_config"):
        if getattr(manager.continuous_batching_config, name, None) is not None:
            raise CompileOptionError(
                f"continuous batching was asked to compile the forward ({name}), which is compiled already: leave "
                f"compile configs and default_compile_level out of its config, and compile_config out of the model's"
            )
    kind = type(manager)
    manager.__class__ = type(kind.__name__, (_Manages, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    manager.live_requests = LiveRequests(runtime)
    manager.failure = None
    manager._fxlora_runtime = runtime
    manager._fxlora_ids = itertools.count()
    manager._fxlora_hooked = None
    return manager


class _Manages:
    """What the manager has beside the methods of transformers' own."""

    live_requests: LiveRequests
    failure: Exception | None
    model: Any
    is_running: Callable[[], bool]
    _fxlora_runtime: Runtime
    _fxlora_ids: Iterator[int]
    _fxlora_hooked: Any

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        *args: Any,
        adapter: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """As transformers' own, with an adapter for the request. Raises UnknownAdapterError for one not loaded."""
        self.raise_failure()
        chosen = f"request_{next(self._fxlora_ids)}" if request_id is None else request_id
        self.live_requests.add(chosen, adapter, getattr(self, "num_return_sequences", 1) or 1)
        accepted = None
        try:
            accepted = cast("Any", super()).add_request(input_ids, chosen, *args, **kwargs)
        finally:
            if accepted is None:
                self.live_requests.cancel(chosen)
        return accepted

    def add_requests(
        self, inputs: Sequence[Sequence[int]], *args: Any, adapters: Names = None, **kwargs: Any
    ) -> list[str | None]:
        """As transformers' own; adapters: one name or None per request, or one for all. All are added or none."""
        names = _of_prompts.get() or _names(adapters, len(inputs), self._fxlora_runtime)
        keywords = dict(zip(("max_new_tokens", "streaming", "record_timestamps"), args, strict=False)) | kwargs
        return [self.add_request(ids, adapter=name, **keywords) for ids, name in zip(inputs, names, strict=True)]

    def cancel_request(self, request_id: str) -> None:
        """As transformers' own; its adapter can be unloaded from now on."""
        cast("Any", super()).cancel_request(request_id)
        self.live_requests.cancel(request_id)

    def start(self) -> None:
        """As transformers' own."""
        self.failure = None
        cast("Any", super()).start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As transformers' own."""
        try:
            cast("Any", super()).stop(*args, **kwargs)
        finally:
            if not self.is_running():
                self.live_requests.clear()
                self.model._fxlora_caches.close()

    def raise_failure(self) -> None:
        """Raise what ended the loop of steps, if anything did."""
        if self.failure is not None:
            raise self.failure

    def _create_batch_processor(self) -> Any:
        processor = cast("Any", super())._create_batch_processor()
        if processor is not self._fxlora_hooked:
            try:
                self._hook(processor)
            except Exception as error:
                self.failure = error
                raise
            self._fxlora_hooked = processor
        return processor

    def _hook(self, processor: Any) -> None:
        for path in list(_INTERNALS)[1:]:
            _require(_follow(processor, path.partition(".")[2]), path)
        if processor.max_batch_tokens > self._fxlora_runtime.live.max_tokens:
            raise BatchSizeError(
                f"steps of continuous batching take up to {processor.max_batch_tokens} tokens; "
                f"max_tokens={self._fxlora_runtime.live.max_tokens}: raise it, or set max_batch_tokens in the "
                f"ContinuousBatchingConfig"
            )
        # Now, as the first step may run where all memory is that of a CUDA graph.
        self._fxlora_runtime.live.reserve(self.model.device)
        router = processor.output_router
        step = PackedStep(self, processor)
        processor.inputs_and_outputs.prepare_batch_tensors = step.prepare
        processor.model_runner.compute_batch = step.compute
        deliver, deliver_batch = router.deliver, router.deliver_batch

        def delivered(output: Any) -> None:
            self._note([output])
            deliver(output)

        def batch_delivered(outputs: Any) -> None:
            self._note(outputs)
            deliver_batch(outputs)

        router.deliver, router.deliver_batch = delivered, batch_delivered

    def _note(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            if output.is_finished():
                self.live_requests.finish(output.request_id)


def _follow(start: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        start = getattr(start, name)
    return start


def _require(owner: Any, path: str) -> None:
    for name in _INTERNALS[path]:
        if not hasattr(owner, name):
            import transformers

            raise TransformersVersionError(
                f"the continuous batching manager of transformers {transformers.__version__} has no "
                f"{f'{path}.{name}'.lstrip('.')}, which sets the adapters of a step"
            )
