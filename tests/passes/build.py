"""Graphs for the tests of the passes: a function or module traced by hand, with the facts the passes ask for.

Everything runs on the caller's tensors as examples; nothing here goes through fxlora's own capture or apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxlora.passes.pipeline import Job, analyse, rewrite
from fxlora.passes.plan import AdapterShape, Targets
from fxlora.passes.reads import Read, Reader, Refusal
from fxlora.passes.rows.labels import Label, Mixed, Rows
from fxlora.passes.rows.propagate import Prover
from fxlora.passes.rows.seeds import BatchDims, choose_seeds
from fxlora.passes.rows.worlds import GraphInput, size_worlds
from fxlora.passes.sites import Site
from fxlora.passes.weights import Weights

Body = Callable[..., Any]


def traced(target: nn.Module | Body) -> fx.GraphModule:
    """torch.fx.symbolic_trace; a graph module stays as it is."""
    return target if isinstance(target, fx.GraphModule) else fx.symbolic_trace(target)


def call(target: Any, *args: Any, method: bool = False, **kwargs: Any) -> fx.Node:
    """One call node in a graph of its own; strings among the arguments that start with % become placeholders."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def node(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("%"):
            return made.setdefault(value, graph.placeholder(value[1:]))
        return value

    args, kwargs = tuple(node(a) for a in args), {k: node(v) for k, v in kwargs.items()}
    return graph.call_method(target, args, kwargs) if method else graph.call_function(target, args, kwargs)


def inputs_of(gm: fx.GraphModule, *examples: torch.Tensor) -> list[GraphInput]:
    """The placeholders of a graph as inputs without symbols, sized by examples."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [
        GraphInput(node, str(node.target), tuple(value.shape), (None,) * value.dim(), value.dtype, value)
        for node, value in zip(nodes, examples, strict=True)
    ]


def job_of(
    target: nn.Module | Body,
    *examples: torch.Tensor,
    targets: Targets = None,
    batch_dims: BatchDims = None,
    models: Sequence[nn.Module] = (),
    shape: AdapterShape | None = None,
    group_siblings: bool = True,
) -> Job:
    """A job over a symbolic trace, not analysed yet."""
    gm = traced(target)
    return Job(
        gm=gm,
        inputs=inputs_of(gm, *examples),
        bound={},
        models=models,
        batch_dims=batch_dims,
        targets=targets,
        shape=shape or AdapterShape(2, 4),
        group_siblings=group_siblings,
    )


def analysed(target: nn.Module | Body, *examples: torch.Tensor, **options: Any) -> Job:
    """A job with its plan made."""
    job = job_of(target, *examples, **options)
    analyse(job)
    return job


def rewritten(target: nn.Module | Body, *examples: torch.Tensor, **options: Any) -> Job:
    """A job whose graph is rewritten, with handles that stand for no memory."""
    job = analysed(target, *examples, **options)
    rewrite(job, handles_of(job))
    return job


def handles_of(job: Job) -> dict[tuple[Site, ...], int]:
    """A handle for each group of sites, behind which no memory is."""
    return {sites: 100 + i for i, sites in enumerate(job.plan.site_groups)}


def proved(target: nn.Module | Body, *examples: torch.Tensor, batch_dims: BatchDims = None) -> Prover:
    """A graph with every node labelled."""
    gm = traced(target)
    inputs = inputs_of(gm, *examples)
    seeds, primary = choose_seeds(inputs, batch_dims)
    return Prover(gm, size_worlds(gm, inputs, seeds, {}), seeds, primary).run()


def rows_of(target: nn.Module | Body, *examples: torch.Tensor, batch_dims: BatchDims = None) -> Rows:
    """Rows of the one tensor that a function returns."""
    prover = proved(target, *examples, batch_dims=batch_dims)
    return prover.rows(returned(prover.graph))


def returned(graph: fx.Graph) -> fx.Node:
    """The one node a graph returns."""
    value = next(n for n in graph.nodes if n.op == "output").args[0]
    assert isinstance(value, fx.Node)
    return value


def mapping_of(rows: Rows) -> tuple[tuple[int, ...], list[int]]:
    """Dims of a label and its first map, flat. Fails with the reason where rows are mixed."""
    assert isinstance(rows, Label), rows.reason if isinstance(rows, Mixed) else "no rows"
    return rows.dims, rows.map.ids[0].flatten().tolist()


def reason_of(rows: Rows) -> str:
    """Why rows are mixed. Fails where they are not."""
    assert isinstance(rows, Mixed), rows
    return rows.reason


def reads_of(target: nn.Module | Body, *examples: torch.Tensor) -> list[Read | Refusal]:
    """Every read of a weight in a graph, in order."""
    job = job_of(target, *examples)
    seeds, _ = choose_seeds(job.inputs, None)
    world = size_worlds(job.gm, job.inputs, seeds, {}).worlds[0]
    reader = Reader(Weights(job.gm), world)
    return [read for node in job.gm.graph.nodes for read in reader.reads(node)]


def holder(body: Body, **members: torch.Tensor | nn.Module) -> nn.Module:
    """A module whose forward is `body`, a function of (self, *inputs), with these parameters and modules."""
    made: nn.Module = type("Held", (nn.Module,), {"forward": body})()
    for name, value in members.items():
        setattr(made, name, value if isinstance(value, nn.Module) else nn.Parameter(value, requires_grad=False))
    return made.eval()


def weight(*shape: int) -> torch.Tensor:
    """A random fp32 tensor."""
    return torch.randn(*shape)
