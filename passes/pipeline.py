"""The one ordered list of passes, and the runner that lints, recompiles, diffs, times and post-checks each.

``analyse`` decides (it ends with a Plan), ``rewrite`` edits; adapter memory is allocated between the two, from the
plan alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxlora.kernels.ops import batch_slots
from fxlora.passes.decompose import decompose_calls, opaque_calls
from fxlora.passes.diff import Snapshot, graph_diff
from fxlora.passes.errors import VerifyError
from fxlora.passes.graph import output_leaves
from fxlora.passes.inplace_views import functional_views
from fxlora.passes.logits import mark_logits
from fxlora.passes.normalize import count_weight_nodes, inline_modules, refuse_applied, unify_weights
from fxlora.passes.plan import AdapterShape, Plan, Targets, check_targets, plan_graph
from fxlora.passes.reads import Reader
from fxlora.passes.rewrite import rewrite_sites
from fxlora.passes.rows.integers import settle_worlds
from fxlora.passes.rows.propagate import Prover, constant_integers
from fxlora.passes.rows.seeds import BatchDims, choose_seeds, trusted_inputs
from fxlora.passes.rows.worlds import GraphInput, Sizing, World, size_worlds, symbols_alike
from fxlora.passes.siblings import group_siblings
from fxlora.passes.sites import Site, Skipped, find_sites
from fxlora.passes.verify import verify_rewrite
from fxlora.passes.vmaps import open_vmaps
from fxlora.passes.weights import Weights

log = logging.getLogger(__name__)
SLOTS_NAME = "adapter_slots"


@dataclass(frozen=True)
class PassReport:
    """What one pass did: seconds, node counts, the graph on both sides, and (under debug logging) their diff.

    A pass that changed nothing has one snapshot on both sides.
    """

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    diff: str = field(default="", repr=False)
    before: Snapshot | None = field(default=None, repr=False)
    after: Snapshot | None = field(default=None, repr=False)


@dataclass
class Job:
    """One graph on its way through the passes: the request, then what each pass found.

    Attributes:
        gm: The graph, edited in place (a copy of the caller's).
        inputs: The caller's inputs; ``bound``: tensors behind placeholders that are weights.
        models: Modules whose parameter paths are names of weights beside the graph's own.
        origin: The model that was traced, where none of ``models`` is it.
        output_embedding: The weight that makes logits, where the model says so.
        group_siblings: Whether linears that read one input become one op.
        whole: Whether the graph is all there is, so that a target it does not hold is an error.
        results: After the rewrite, what stands in the place of each planned call.
    """

    gm: fx.GraphModule
    inputs: Sequence[GraphInput]
    bound: Mapping[fx.Node, torch.Tensor]
    models: Sequence[torch.nn.Module]
    batch_dims: BatchDims
    targets: Targets
    shape: AdapterShape
    origin: torch.nn.Module | None = None
    output_embedding: torch.Tensor | None = None
    group_siblings: bool = True
    whole: bool = True
    weights: Weights = field(init=False)
    seeds: dict[fx.Node, tuple[int, ...]] = field(init=False)
    primary: fx.Node = field(init=False)
    sizing: Sizing = field(init=False)
    prover: Prover = field(init=False)
    reader: Reader = field(init=False)
    sites: list[Site] = field(init=False)
    skipped: list[Skipped] = field(init=False)
    plan: Plan = field(init=False)
    results: dict[fx.Node, fx.Node] = field(default_factory=dict)
    reports: list[PassReport] = field(default_factory=list)


def normalize(job: Job) -> None:
    """Leaf modules inlined, one node per weight; then every name of every weight is known."""
    refuse_applied(job.gm)
    opaque = inline_modules(job.gm)
    unify_weights(job.gm)
    functional_views(job.gm)
    open_vmaps(job.gm)
    doubled = [c for c in count_weight_nodes(job.gm).values() if c > 1]
    if doubled:
        raise VerifyError(f"{len(doubled)} weights are still read through more than one node")
    if opaque:
        log.info("modules that cannot be traced stay opaque: %s", ", ".join(opaque))
    job.weights = Weights(job.gm, job.bound, job.models)


def size_graph(job: Job) -> None:
    """Choose the request dims of the inputs, and the sizes of the proof."""
    job.seeds, job.primary = choose_seeds(job.inputs, job.batch_dims)
    job.sizing = size_worlds(job.gm, job.inputs, job.seeds, job.bound)
    settle_worlds(job.gm, job.sizing.worlds, constant_integers(job.gm, job.bound))


def open_calls(job: Job) -> None:
    """Replace opaque calls by the ops they are made of, where they can be traced; then sizes are taken anew."""
    if opaque_calls(job.gm) and decompose_calls(job.gm, job.sizing.worlds[0]):
        unify_weights(job.gm)
        job.gm.graph.lint()
        job.gm.recompile()
        job.weights = Weights(job.gm, job.bound, job.models)
        job.sizing = size_worlds(job.gm, job.inputs, job.seeds, job.bound)
        settle_worlds(job.gm, job.sizing.worlds, constant_integers(job.gm, job.bound))


def find_linear_sites(job: Job) -> None:
    """Find the sites and their roles, the logits site among them."""
    world: World = job.sizing.worlds[0]
    job.sites, job.skipped = find_sites(job.gm, job.weights, world, [job.gm, *job.models], job.origin)
    job.sites = mark_logits(job.gm, job.sites, job.weights, job.output_embedding)
    job.reader = Reader(job.weights, world)


def prove_rows(job: Job) -> None:
    """Label every tensor with the requests its rows belong to."""
    known = {*job.seeds, *trusted_inputs(job.inputs, job.batch_dims)}
    strangers = {inp.node: inp.name for inp in job.inputs if inp.node not in known}
    uses = [(node, job.reader.read_as(node, site.kind)) for site in job.sites for node in site.uses]
    reads = {node: read.x for node, read in uses if read.product is None}

    def proven(sizing: Sizing) -> Prover:
        return Prover(job.gm, sizing, job.seeds, job.primary, job.bound, strangers, reads).run()

    job.prover = proven(job.sizing)
    alike = symbols_alike(job.inputs) if job.whole and job.prover.count_mixed() else ()
    if alike:  # proven for calls that give these one size, which the module checks
        sizing = size_worlds(job.gm, job.inputs, job.seeds, job.bound, alike)
        settle_worlds(job.gm, sizing.worlds, constant_integers(job.gm, job.bound))
        prover = proven(sizing)
        if sizing.alike and prover.count_mixed() < job.prover.count_mixed():
            job.sizing, job.prover, job.reader = sizing, prover, Reader(job.weights, sizing.worlds[0])


def make_plan(job: Job) -> None:
    """Decide for every site whether it is rewritten, and with which row map."""
    outputs = output_leaves(job.gm.graph)
    job.plan = plan_graph(job.prover, job.sites, job.skipped, job.reader, job.targets, job.shape, outputs)
    if job.whole:
        check_targets(job.targets, job.sites, job.skipped)


def find_siblings(job: Job) -> None:
    """Put linears that read one input into one group, unless the job says not to."""
    if job.group_siblings:
        job.plan = group_siblings(job.plan, job.sites, job.gm.graph, job.reader)


def analyse(job: Job) -> Plan:
    """Everything up to the plan."""
    for step in (normalize, size_graph, open_calls, find_linear_sites, prove_rows, make_plan, find_siblings):
        _run(job, step.__name__, step)
    return job.plan


def rewrite(job: Job, handles: Mapping[tuple[Site, ...], int], *, slots_from_memory: bool = False) -> fx.GraphModule:
    """Rewrite the analysed graph; it takes ``adapter_slots`` (int32, the request dims) as its last input.

    handles: one for each of the plan's ``site_groups``. slots_from_memory: the signature stays as it is and the graph
    reads the slots by an op of its own (torch.compile gives a graph no further inputs).
    """
    placeholders = [n for n in job.gm.graph.nodes if n.op == "placeholder"]
    names = [str(n.target) for n in placeholders]
    if not slots_from_memory:
        names.append(SLOTS_NAME)

    def edit(job: Job) -> None:
        graph = job.gm.graph
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            if slots_from_memory:
                args = (job.primary, list(job.seeds[job.primary]), handles[job.plan.site_groups[0]])
                slots = graph.call_function(batch_slots, args)
            else:
                slots = graph.placeholder(SLOTS_NAME)
        job.results = rewrite_sites(job.gm, job.plan, job.reader, job.prover.seed, slots, handles)

    def check(job: Job) -> None:
        verify_rewrite(job.gm, job.plan, job.results, job.weights, handles, names)

    _run(job, "rewrite_sites", edit)
    _run(job, "verify_rewrite", check)
    return job.gm


def _run(job: Job, name: str, step: Callable[[Job], Any]) -> None:
    last = job.reports[-1].after if job.reports else None
    before = last or Snapshot.of(job.gm)
    start = time.perf_counter()
    try:
        step(job)
    except Exception as error:
        error.add_note(f"in the pass {name}")
        raise
    if name in ("normalize", "rewrite_sites"):
        job.gm.graph.lint()
        job.gm.recompile()
    seconds = time.perf_counter() - start
    after = Snapshot.of(job.gm)
    after = before if after.nodes == before.nodes else after
    debug = log.isEnabledFor(logging.DEBUG) and after is not before
    diff = graph_diff(before.text(), after.text()) if debug else ""
    report = PassReport(name, seconds, len(before.nodes), len(after.nodes), diff, before, after)
    job.reports.append(report)
    log.debug(
        "%s: %.1f ms, %d -> %d nodes\n%s", name, 1000 * seconds, report.nodes_before, report.nodes_after, report.diff
    )
