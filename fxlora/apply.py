"""`apply(gm)`: the whole flow in order, from any graph module to a module that serves adapters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx, nn

from fxlora.dumps.folder import dump_if_asked
from fxlora.dumps.record import title_of
from fxlora.errors import GraphError
from fxlora.module import LoraModule
from fxlora.passes.normalize import copy_graph, refuse_applied, refuse_autocast
from fxlora.passes.pipeline import Job, analyse, rewrite
from fxlora.passes.plan import AdapterShape, Targets
from fxlora.passes.rows.seeds import BatchDims
from fxlora.passes.weights import tensor_key
from fxlora.pool import AdapterPool
from fxlora.signature import META_KEY, Signature, bound_weights, example_arguments, graph_inputs, refuse_lifted

_log = logging.getLogger(__name__)


def apply(
    gm: fx.GraphModule,
    max_adapters: int = 8,
    max_rank: int = 64,
    targets: str | Sequence[str] | None = None,
    batch_dims: BatchDims = None,
    example_inputs: Any = None,
    pool_rows: int | None = None,
    *,
    model: nn.Module | None = None,
    group_siblings: bool = True,
    expert_pool_rows: int | None = None,
) -> LoraModule:
    """Rewrite a graph so that it serves many LoRA adapters in one batch.

    Args:
        gm: A graph module from `fxlora.capture`, `torch.fx.symbolic_trace`, `torch.export` (`ep.module()`, plain or
            decomposed), dynamo capture or `make_fx`. It is left as it is; its weights are shared, never copied.
        max_adapters: Slots: adapters loaded at once.
        max_rank: The largest rank of one adapter at one site.
        targets: None: every site but expert weights (one matrix for each of several experts), whose adapter memory is
            large. "all": every site. A list or a regex names weights as PEFT's `target_modules` does.
        batch_dims: Which input dims tell requests apart. None: dim 0 of every input that shares the first input's.
            `{"input_ids": 0}` names inputs; `(0, 1)` or `{"input_ids": (0, 1)}` chooses adapters per token (packed).
            None for an input vouches that its rows go to the requests in order, some to each (images, say).
        example_inputs: A tuple or dict of inputs, for graphs that record no shapes (symbolic_trace).
        pool_rows: Rank rows per site; by default max_adapters * max_rank, both rounded up to 16.
        model: The module the graph was traced from, where the graph has lost names of its weights (make_fx, or an
            alias that symbolic_trace does not see). Its parameter paths are names that adapters may use.
        group_siblings: Linears that read one input (q, k and v) become one op. The answers are the same either way.
        expert_pool_rows: Rank rows per expert at each expert weight; by default 16 for each of max_adapters (max_rank
            where that is lower), and never fewer than max_rank. A row takes (K + N) elements, so 128 experts of
            2048 x 1536 take 0.9 MB per rank in bf16.

    Returns:
        A LoraModule with the graph's own signature, plus `adapters=`.

    Raises:
        GraphError: The family of everything that cannot be served, see `fxlora.errors`.
        CapacityError: The pools cannot hold one adapter of `max_rank`.
    """
    if isinstance(gm, torch.export.ExportedProgram):
        gm = gm.module()  # type: ignore[assignment]
    job, signature = graph_job(
        gm,
        AdapterShape(max_adapters, max_rank, pool_rows, expert_pool_rows),
        targets=targets,
        batch_dims=batch_dims,
        example_inputs=example_inputs,
        model=model,
        group_siblings=group_siblings,
    )
    try:
        return _serve(gm, signature, job)
    except Exception as error:
        dump_if_asked(job, title=title_of(gm), error=error)
        raise


def graph_job(
    gm: Any,
    shape: AdapterShape,
    *,
    targets: Targets = None,
    batch_dims: BatchDims = None,
    example_inputs: Any = None,
    model: nn.Module | None = None,
    group_siblings: bool = True,
) -> tuple[Job, Signature]:
    """A copy of a graph as `analyse` takes it, and how the graph is called. Arguments and errors as for `apply`."""
    if not isinstance(gm, fx.GraphModule):
        raise GraphError(
            f"apply takes a torch.fx.GraphModule, not a {type(gm).__name__}; `fxlora.capture(model, ...)` makes one"
        )
    refuse_applied(gm)
    refuse_autocast(gm)
    signature = Signature.of(gm)
    call = example_arguments(example_inputs)
    refuse_lifted(gm)
    flat = None if call is None else signature.flatten(*call)
    kept = gm.meta.get(META_KEY, {})
    bound = bound_weights(gm, flat)
    inputs = graph_inputs(gm, signature, bound, flat)
    if model is not None:
        _check_model(gm, model, bound.values())
    copy, mapping = copy_graph(gm)
    job = Job(
        gm=copy,
        inputs=[_moved(inp, mapping) for inp in inputs],
        bound={mapping[node]: tensor for node, tensor in bound.items()},
        models=[m for m in (model, kept.get("model"), gm) if m is not None],
        batch_dims=batch_dims,
        targets=targets,
        shape=shape,
        group_siblings=group_siblings,
        origin=kept.get("origin"),
    )
    head = kept.get("output_embedding")
    job.output_embedding = (
        None if head is None else dict(job.models[0].named_parameters(remove_duplicate=False)).get(head)
    )
    return job, signature


def _serve(gm: fx.GraphModule, signature: Signature, job: Job) -> LoraModule:
    """The job's plan, its adapter memory, and the rewrite."""
    plan = analyse(job)
    pool = AdapterPool(plan.sites, digest=plan.digest, groups=plan.site_groups, **asdict(plan.shape))
    try:
        rewritten = rewrite(job, pool.handles)
    except BaseException:
        pool.close()
        raise
    lora = LoraModule(gm, rewritten, signature, job, pool)
    _log_outcome(lora)
    lora.dump_folder = dump_if_asked(job, pool, title=title_of(gm))
    return lora


def _log_outcome(lora: LoraModule) -> None:
    counts = (len(lora.sites), len(lora.groups), len(lora.skipped), len(lora.graph_module.graph.nodes))
    _log.info("%d sites in %d ops, %d weights skipped, %d nodes", *counts)
    for words in (*lora.assumed, *lora.mixed_outputs):
        _log.warning("%s", words)
    if lora.fixed_sizes:
        _log.info("sizes that tracing fixed: %s", lora.fixed_sizes)


def _check_model(gm: fx.GraphModule, model: nn.Module, bound: Iterable[torch.Tensor]) -> None:
    """`model` must hold the graph's own weights: another instance's names would mean other tensors."""
    held = {tensor_key(p) for p in model.parameters()}
    own = [*gm.parameters(), *bound]
    if own and not any(tensor_key(t) in held for t in own):
        raise GraphError(
            "model= holds none of the graph's weights: give the very module that the graph was traced from"
        )


def _moved(inp: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    return replace(inp, node=mapping[inp.node])
