"""`fxlora.compile(model)`: the model's own methods, `generate` among them, over compiled graphs that serve adapters.

Stage: what users of transformers call. A shallow copy of the model whose forward is compiled; the model itself stays
as it is and shares its weights.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fxlora.adapter import AdapterSource
from fxlora.attach import attach
from fxlora.batch import Adapters
from fxlora.errors import CallError, GraphBreakError, NeedsExampleInputsError, RowsNotProvenError
from fxlora.mm_encoders import advice, modules_that_run, vouched_features
from fxlora.passes.plan import Targets
from fxlora.passes.rows.seeds import BatchDims
from fxlora.passes.sites import Site, Skipped
from fxlora.replays import WITHOUT_GRAPHS, Replays
from fxlora.runtime import Runtime
from fxlora.tracing import Tracing, call_once, experts_advice

M = TypeVar("M", bound=nn.Module)

# One forward is compiled for several kinds of call: prefill and decode, batches of one, each kind of cache.
_GRAPHS_MAX = 64
_OUTER: Any = object()
_CACHE_CHOICES = ("cache_implementation", "past_key_values", "assistant_model", "prompt_lookup_num_tokens")


def compile(
    model: M,
    max_adapters: int = 8,
    max_rank: int = 64,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    *,
    targets: Targets = None,
    batch_dims: BatchDims = None,
    pool_rows: int | None = None,
    max_tokens: int = 8192,
    group_siblings: bool = True,
    example_inputs: Any = None,
    expert_pool_rows: int | None = None,
) -> M:
    """Compile a model so that it serves many LoRA adapters in one batch.

    Args:
        model: The bare base model, on its device and in its mode. It is left as it is and shares its weights.
        backend: The compiler of the rewritten graphs: "inductor", "eager", "aot_eager", any other that torch.compile
            knows, or a callable.
        mode: As for torch.compile, "reduce-overhead" (CUDA graphs) or "max-autotune"; for "inductor".
        max_adapters, max_rank, targets, batch_dims, pool_rows, expert_pool_rows, max_tokens, group_siblings,
            example_inputs: as for `fxlora.attach`.

    Returns:
        An object of the model's class and with its methods. Calls and, where the model has it, `generate` take
        `adapters=`: one name or None per request, or one for all; without it a call has the adapters of the batch
        around it (`runtime.batch`), else none. `load_adapter(name, source)`, `unload_adapter(name)`, `adapter_names`,
        `sites`, `skipped` and `runtime` are those of the runtime. Outputs carry no gradient.

    Raises:
        Everything that `fxlora.attach` raises. CompileOptionError: `backend` or `mode` is unknown.
    """
    from fxlora.backend import compile_graph, inner_compiler  # and with it dynamo, which `import fxlora` does not need

    inner_compiler(mode, {"backend": backend})
    runtime = attach(
        model,
        max_adapters,
        max_rank,
        targets=targets,
        batch_dims=batch_dims,
        pool_rows=pool_rows,
        max_tokens=max_tokens,
        group_siblings=group_siblings,
        example_inputs=example_inputs,
        expert_pool_rows=expert_pool_rows,
    )
    made = copy.copy(model)
    parents = (_Generates, _Compiled) if callable(getattr(model, "generate", None)) else (_Compiled,)
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made.__class__ = type(kind.__name__, (*parents, kind), names)
    made.__dict__["runtime"] = runtime
    own_backend = functools.partial(compile_graph, mode=mode, options={"backend": backend})
    made.__dict__["_fxlora_backend"] = own_backend
    made.__dict__["_fxlora_base"] = model
    made.__dict__["_fxlora_encoders"] = {}
    made.__dict__["forward"] = _compiled_forward(model, own_backend)
    if mode in WITHOUT_GRAPHS:
        plain = _compiled_forward(model, _without_graphs(own_backend))
        made.__dict__["forward"] = Replays(made.__dict__["forward"], plain)
    return made


def _without_graphs(backend: functools.partial[Callable[..., Any]]) -> functools.partial[Callable[..., Any]]:
    mode = backend.keywords["mode"]
    return functools.partial(backend, mode=WITHOUT_GRAPHS.get(mode, mode))


class _Compiled(nn.Module):
    """What a compiled model has beside the methods of its class."""

    runtime: Runtime
    _fxlora_backend: functools.partial[Callable[..., Any]]
    _fxlora_base: nn.Module
    _fxlora_encoders: dict[int, nn.Module]

    def __call__(self, *args: Any, adapters: Adapters = _OUTER, **kwargs: Any) -> Any:
        with self._batch(adapters):
            return super().__call__(*args, **kwargs)

    def load_adapter(self, name: str, source: AdapterSource) -> None:
        """Load an adapter: a PEFT folder, a file of diffusers, or (config, tensors), under a name, all or nothing."""
        self.runtime.load_adapter(name, source)

    def unload_adapter(self, name: str) -> None:
        """Free the slot and the memory of an adapter. Raises UnknownAdapterError."""
        self.runtime.unload_adapter(name)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in slot order."""
        return self.runtime.adapter_names

    @property
    def sites(self) -> tuple[Site, ...]:
        """Weights that adapters can reach."""
        return self.runtime.sites

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The other weights, each with its reason."""
        return self.runtime.skipped

    @contextmanager
    def _batch(self, adapters: Adapters) -> Iterator[None]:
        with self.runtime.same_batch() if adapters is _OUTER else self.runtime.batch(adapters):
            yield


class _Generates(_Compiled):
    """What it needs further where the class can generate: the batch follows what generation does to the inputs."""

    def generate(self, *args: Any, adapters: Adapters = _OUTER, **kwargs: Any) -> Any:
        """The model's own `generate`; adapters: one name or None per request of the inputs, or one for all.

        Beams and returned sequences keep the adapter of their request. Under the modes with CUDA graphs the cache is a
        static one unless the call or the model chooses: steps over a cache that grows run outside of CUDA graphs.
        """
        if kwargs.get("cache_implementation") == "paged":
            raise CallError(
                "cache_implementation='paged' is continuous batching, which runs in a thread of its own over packed "
                "requests: `adapters=` of one call cannot reach it"
            )
        if self._fxlora_backend.keywords["mode"] in WITHOUT_GRAPHS and not self._chooses_cache(kwargs):
            kwargs["cache_implementation"] = "static"
        kwargs["disable_compile"] = True  # transformers would compile the compiled forward again
        with self._batch(adapters):
            return cast("Any", super()).generate(*args, **kwargs)

    def _chooses_cache(self, kwargs: Mapping[str, Any]) -> bool:
        config: Any = kwargs.get("generation_config") or self.generation_config
        given = {key for key in _CACHE_CHOICES if kwargs.get(key, getattr(config, key, None)) is not None}
        return bool(given) or kwargs.get("use_cache", config.use_cache) is False

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder, compiled by itself: `generate` runs it once, outside of the model's forward."""
        encoder = cast("Any", super()).get_encoder(*args, **kwargs)
        path = next((name for name, module in self._fxlora_base.named_modules() if module is encoder), "")
        if not path or not getattr(self.config, "is_encoder_decoder", False):
            return encoder
        if not self.runtime.learned:
            raise NeedsExampleInputsError(
                f"the encoder {path!r} is a graph of its own, and no trace of the whole model has shown its sites: "
                f"give `example_inputs` to `fxlora.compile`, or call the compiled model once"
            )
        if id(encoder) not in self._fxlora_encoders:
            made = copy.copy(encoder)
            # Its output is read by every step, which a CUDA graph of its own would not keep.
            backend = functools.partial(_without_graphs(self._fxlora_backend), prefix=f"{path}.")
            made.__dict__["forward"] = _compiled_forward(encoder, backend)
            self._fxlora_encoders[id(encoder)] = made
        return self._fxlora_encoders[id(encoder)]

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.__dict__["forward"]
        with forward.paused() if isinstance(forward, Replays) else nullcontext():
            return cast("Any", super())._prefill(*args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        self.runtime.live.expand(expand_size)
        return cast("Any", super())._expand_inputs_for_generation(expand_size, *args, **kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        """Whether encoders of images run beside the compiled forward; they run inside unless the caller vouches for
        their input, as the rows of what they return cannot be followed."""
        vouched = vouched_features(self.runtime.batch_dims)
        return bool(vouched) and cast("Any", super())._supports_mm_encoder_outputs()

    def _prepare_multimodal_encoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        with modules_that_run() as run:
            prepared = cast("Any", super())._prepare_multimodal_encoder_kwargs_for_generation(*args, **kwargs)
        self.runtime.require_no_adapter_on(run, "the encoder of images")
        return prepared


def _compiled_forward(model: nn.Module, backend: functools.partial[Callable[..., Any]]) -> Callable[..., Any]:
    """The forward of a module as whole graphs of dynamic batch and length."""
    from torch._dynamo.exc import Unsupported, UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    # Dynamo counts graphs by code object, and `forward` of all compiled models would be one.
    code = forward.__code__.replace(co_name=f"{type(model).__name__}_forward")
    own = types.FunctionType(code, forward.__globals__, closure=forward.__closure__)
    compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=True)

    untried = [True]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _tracing:
            try:
                return compiled(*args, **kwargs)
            except (Unsupported, UserError, GuardOnDataDependentSymNode) as error:
                if untried and untried.pop():
                    call_once(original, args, kwargs)
                    return call(*args, **kwargs)
                note = advice(original, kwargs) or experts_advice(model)
                raise GraphBreakError(
                    f"the forward of this {type(model).__name__} is no single graph, and nothing can be proven "
                    f"across a graph break{note and f' ({note})'}: {error}"
                ) from error
            except RowsNotProvenError as error:
                if note := advice(original, kwargs):
                    error.add_note(note)
                raise

    return call


_tracing = Tracing({"recompile_limit": _GRAPHS_MAX})
