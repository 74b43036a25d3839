"""The torch.compile backend: dynamo's graph, rewritten in place, then handed to an inner compiler.

Stage: graph side under torch.compile, dynamo's graph -> inputs -> passes -> rewrite -> inner compiler -> CompiledGraph.
The graph's own object is edited, calls only: a copy would lose which inputs are static, and CUDA-graph replays would
copy every weight.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._guards import TracingContext
from torch._logging import trace_structured

from fxlora.attach import owner_of
from fxlora.dumps.folder import dump_if_asked
from fxlora.dynamo_inputs import read_inputs
from fxlora.errors import CompileOptionError, FxloraError, GraphBreakError, GraphError, NotAttachedError
from fxlora.passes.diff import graph_text
from fxlora.passes.normalize import refuse_autocast
from fxlora.passes.pipeline import Job, analyse, rewrite
from fxlora.passes.plan import Plan, is_target
from fxlora.runtime import Runtime

_log = logging.getLogger(__name__)

Compiler = Callable[..., Any]
_OPTIONS = ("backend", "mode")


def fxlora_backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
) -> Callable[..., Any]:
    """`torch.compile(model, backend="fxlora", options={"backend": "inductor"})` for a model with a runtime.

    The runtime is found by the identity of the Parameters among the inputs, so one backend serves any number of
    models. Outputs carry no gradient, whatever the grad mode.

    Args:
        gm: Dynamo's graph; it is edited in place.
        example_inputs: Its inputs, Parameters among them.
        mode: Of torch.compile ("reduce-overhead", "max-autotune"), for the inner compiler inductor.
        options: "backend": the inner compiler, a name that torch.compile knows ("inductor", "eager", "aot_eager") or a
            callable. "mode": as `mode`.

    Raises:
        NotAttachedError, CompileOptionError, GraphBreakError, or any other error of `fxlora.errors`; each is a
        `torch._dynamo.exc.BackendCompilerFailed` as well.
    """
    return compile_graph(gm, example_inputs, mode=mode, options=options)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> Callable[..., Any]:
    """As `fxlora_backend`. prefix: path, with a dot, of the module whose forward this is, where it is a submodule."""
    try:
        with torch.no_grad():
            return _compile(gm, example_inputs, inner_compiler(mode, options), prefix)
    except FxloraError as error:
        raise _as_backend_failure(error) from error


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], inner: Compiler, prefix: str) -> Callable[..., Any]:
    inputs = read_inputs(gm, example_inputs)
    if not inputs.parameters:
        return inner(gm, list(example_inputs))
    runtime = owner_of([(path, example_inputs[i]) for i, path in inputs.parameters.items()])
    if torch._dynamo.config.suppress_errors:
        raise CompileOptionError(
            "torch._dynamo.config.suppress_errors is on: what cannot be served would run without adapters, in silence"
        )
    watched = {i: path for i, path in inputs.parameters.items() if example_inputs[i].dim() > 1}
    _guard_identity(gm, watched)
    primary, dims = None, ()
    if any(runtime.is_target(example_inputs[i]) for i in watched):
        job = runtime.job(gm, inputs)
        partial = inputs.after_break or _off_path(runtime, watched, example_inputs, prefix)
        plan = _analyse(job, partial)
        if plan.sites:
            _refuse_autocast(gm, plan.sites[0].device.type)
        own = runtime.admit(job, plan, whole=not prefix)
        if own:
            groups = {group: tuple(own[site] for site in group) for group in plan.site_groups}
            handles = runtime.pool.register(plan.digest, list(groups.values()))
            primary, dims = _position(gm, job.primary), job.seeds[job.primary]
            runtime.live.reserve(example_inputs[primary].device)
            rewrite(job, {group: handles[mine] for group, mine in groups.items()}, slots_from_memory=True)
        _log_outcome(job, plan, runtime)
        dump_if_asked(job, runtime.pool, title=type(runtime.model()).__name__)
    identities = {i: id(example_inputs[i]) for i in watched}
    return CompiledGraph(runtime, inner(gm, list(example_inputs)), identities, primary, dims)


def _analyse(job: Job, partial: str) -> Plan:
    """The plan of a whole graph. partial: why the graph is only a part of a forward, empty if it is none.

    Raises GraphBreakError for a part that reads a weight which adapters may target.
    """
    try:
        plan = analyse(job)
    except GraphError as error:
        dump_if_asked(job, error=error)
        if partial:
            raise GraphBreakError(_advice(partial, "it may read weights that adapters target")) from error
        raise
    targeted = [site for site in job.sites if is_target(job.targets, site)]
    if partial and targeted:
        names = ", ".join(site.name for site in targeted[:3])
        more = f" and {len(targeted) - 3} more" if len(targeted) > 3 else ""
        raise GraphBreakError(_advice(partial, f"it reads {names}{more}"))
    return plan


def _advice(partial: str, reads: str) -> str:
    return (
        f"a graph holds only a part of the model's forward ({partial}), and {reads}: which request its rows belong to "
        f"cannot be proven. Compile the attached model itself with fullgraph=True, which says where its graph breaks, "
        f"or leave these weights out of `targets`"
    )


def _off_path(runtime: Runtime, watched: Mapping[int, str], example_inputs: Sequence[Any], prefix: str) -> str:
    """A weight that was not reached from the attached model (from its module at `prefix`), in words; else empty."""
    for i, path in watched.items():
        aliases = [
            alias.removeprefix(prefix) for alias in runtime.paths_of(example_inputs[i]) if alias.startswith(prefix)
        ]
        if not any(path == alias or path.endswith(f".{alias}") for alias in aliases):
            return f"it calls {runtime.paths_of(example_inputs[i])[0]!r} {path!r}"
    return ""


def _refuse_autocast(gm: fx.GraphModule, device: str) -> None:
    """Raise where autocast would choose the dtype of a linear: the ops keep that of their input."""
    refuse_autocast(gm)
    if torch.is_autocast_enabled(device):
        raise GraphError(
            "autocast is on where the model is compiled, and would change the dtype of its linears: load the model in "
            "the dtype that it is to be served in, and compile it without autocast"
        )


def _position(gm: fx.GraphModule, placeholder: fx.Node) -> int:
    return [node for node in gm.graph.nodes if node.op == "placeholder"].index(placeholder)


def _guard_identity(gm: fx.GraphModule, watched: Mapping[int, str]) -> None:
    """Let dynamo compile anew for other Parameter objects: it shares compiled code between models of one class."""
    if TracingContext.try_get() is None:
        return
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for i in watched:
        install_guard(placeholders[i]._dynamo_source.make_guard(GuardBuilder.ID_MATCH))


class CompiledGraph:
    """What dynamo calls in place of its graph: checks the Parameters and the batch, then runs the compiled code."""

    def __init__(
        self,
        runtime: Runtime,
        compiled: Callable[..., Any],
        identities: Mapping[int, int],
        primary: int | None,
        dims: tuple[int, ...],
    ) -> None:
        """identities: position -> id of each Parameter the code was compiled for. primary: position of the input whose
        `dims` are the requests; None for a graph that serves no adapters."""
        self._runtime = weakref.ref(runtime)  # dynamo keeps compiled code for longer than a model may live
        self._compiled = compiled
        first = next(iter(identities), 0)  # once more, as an itemgetter of one position gives no tuple
        self._watched = itemgetter(first, first, *identities)
        self._identities = tuple(identities.values())
        self._primary, self._dims = primary, dims

    def __call__(self, *args: Any) -> Any:
        runtime = self._runtime()
        if runtime is None:
            raise NotAttachedError("the model of this compiled code is gone; call `torch._dynamo.reset()`")
        runtime.require_open()
        if tuple(map(id, self._watched(args)))[2:] != self._identities:
            raise NotAttachedError(
                "compiled code was called with other Parameters than it was compiled for (dynamo's guards were "
                "switched off, or a Parameter was replaced): attach the model that holds them and compile it"
            )
        if self._primary is None:
            return self._run(args)
        primary = args[self._primary]
        outside = runtime.live.begin_call(tuple(primary.shape[d] for d in self._dims))
        try:
            return self._run(args)
        finally:
            runtime.live.end_call(outside)

    def _run(self, args: tuple[Any, ...]) -> Any:
        if not torch.is_grad_enabled():
            return self._compiled(*args)
        with torch.no_grad():
            return self._compiled(*args)


def inner_compiler(mode: str | None, options: Mapping[str, Any] | None) -> Compiler:
    """The compiler that takes the rewritten graph. Raises CompileOptionError."""
    options = dict(options or {})
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        raise CompileOptionError(f"options {unknown} are unknown to the backend; it takes {list(_OPTIONS)}")
    chosen, mode = options.get("backend", "inductor"), options.get("mode", mode)
    if chosen == "inductor":
        return partial(_inductor, patches=_mode_options(mode))
    if mode not in (None, "default"):
        raise CompileOptionError(f"mode={mode!r} is for the inner compiler 'inductor', not {chosen!r}")
    if chosen in ("fxlora", fxlora_backend):
        raise CompileOptionError("the backend cannot be its own inner compiler; give 'inductor' or another one")
    if callable(chosen):
        return chosen
    known = list_backends(exclude_tags=())
    if chosen not in known:
        raise CompileOptionError(f"the inner compiler {chosen!r} is unknown; torch.compile knows {known}")
    return lookup_backend(chosen)


def _mode_options(mode: str | None) -> dict[str, Any]:
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise CompileOptionError(f"mode={mode!r} is unknown; torch.compile knows {list(modes)}")
    return dict(modes.get(mode or "default", {}))


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], *, patches: Mapping[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=dict(patches))
    return compiled


def _as_backend_failure(error: FxloraError) -> FxloraError:
    """The same error, also of the kind that torch.compile lets through as it is; others it would wrap in one."""
    kind = type(type(error).__name__, (type(error), BackendCompilerFailed), {"__module__": type(error).__module__})
    raised: Any = kind.__new__(kind)  # pyrefly: ignore[no-matching-overload]
    BackendCompilerFailed.__init__(raised, fxlora_backend, error, None)
    raised.args = error.args
    raised.__dict__.update(error.__dict__)
    return raised.with_traceback(error.__traceback__)


def _log_outcome(job: Job, plan: Plan, runtime: Runtime) -> None:
    counts = (len(plan.sites), len(plan.groups), len(plan.skipped), len(job.gm.graph.nodes), plan.digest)
    _log.info("%d sites in %d ops, %d weights skipped, %d nodes, plan %#010x", *counts)
    for words in (*plan.assumed, *plan.mixed_outputs):
        if words not in runtime.warned:  # each graph of a model would say it again
            runtime.warned.add(words)
            _log.warning("%s", words)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fxlora_graph", "encoding": "string"},
        payload_fn=lambda: graph_text(job.gm),
    )
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "fxlora_plan", "encoding": "json"},
        payload_fn=lambda: json.dumps(_plan_facts(plan)),
    )


def _plan_facts(plan: Plan) -> dict[str, Any]:
    return {
        "digest": f"{plan.digest:#010x}",
        "ops": [{"sites": [site.name for site in group.sites], "reason": group.reason} for group in plan.groups],
        "skipped": {skip.name: skip.reason for skip in plan.skipped},
        "assumed": list(plan.assumed),
        "mixed_outputs": list(plan.mixed_outputs),
    }
