"""Record: what a dump is drawn from, the graph on both sides of the rewrite and every decision between.

Stage: after the flow, or where it stopped. Made from a LoraModule, from the `Job` of a compile, or from any graph
module; nothing here runs the model or touches a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.diff import Snapshot
from fxlora.passes.graph import attribute, fake_value
from fxlora.passes.pipeline import Job, PassReport
from fxlora.passes.plan import Group, PlannedUse
from fxlora.passes.rows.labels import Mixed, RowMap
from fxlora.passes.rows.worlds import TensorFacts
from fxlora.passes.sites import Site, Skipped
from fxlora.passes.weights import tensor_key
from fxlora.signature import META_KEY, bound_weights

if TYPE_CHECKING:
    from fxlora.pool import AdapterPool


@dataclass(frozen=True, eq=False)
class Record:
    """One graph on its way through fxlora.

    Attributes:
        title: The model's class, as far as it is known. gm: The graph module as it is now.
        before: The graph as it was read: one node per weight, nothing rewritten yet.
        after: The rewritten graph; None where nothing was rewritten.
        tensors: The weight or buffer behind each node that stands for one. paths: all names of a tensor, by its key.
        sites, skipped, groups, uses: The plan; empty for a plain graph module. found: all sites, targeted or not.
        reports: What each pass did. labels: rows of every node of `before` (see `passes.rows.labels`).
        results: For each rewritten call, what stands in its place.
        shapes: Dtype and shape of nodes for which tracing recorded none; `*` where the size may vary.
        pool: The adapter memory, if there is any.
        refusal: Why the flow stopped, if it did.
    """

    title: str
    gm: fx.GraphModule
    before: Snapshot
    after: Snapshot | None
    tensors: Mapping[fx.Node, torch.Tensor]
    paths: Mapping[Any, Sequence[str]]
    input_names: Mapping[fx.Node, str] = field(default_factory=dict)
    sites: Sequence[Site] = ()
    found: Sequence[Site] = ()
    skipped: Sequence[Skipped] = ()
    groups: Sequence[Group] = ()
    uses: Sequence[PlannedUse] = ()
    reports: Sequence[PassReport] = ()
    labels: Mapping[fx.Node, Any] = field(default_factory=dict)
    results: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    shapes: Mapping[fx.Node, tuple[torch.dtype, list[int | str]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    pool: AdapterPool | None = None
    refusal: str = ""

    @classmethod
    def of_job(cls, job: Job, pool: AdapterPool | None = None, *, title: str = "", refusal: str = "") -> Record:
        """Everything a job has found so far; a job that failed has no plan, and may have no sites."""
        plan, weights, prover = (getattr(job, name, None) for name in ("plan", "weights", "prover"))
        rewritten = bool(job.results)
        last = Snapshot.of(job.gm)
        edits = [report for report in job.reports if report.name == "rewrite_sites"]
        before = edits[0].before if edits and edits[0].before else last
        after = last if rewritten else None
        nodes = [state.node for snapshot in (before, after) if snapshot for state in snapshot.nodes]
        tensors = {n: t for n in nodes if weights and (t := weights.tensor_of(n)) is not None}
        names = weights.names if weights else {}
        found = tuple(getattr(job, "sites", ()))
        refused = {} if plan or prover is None else _refused(job, found)
        return cls(
            title=title or next((title_of(m) for m in job.models), ""),
            gm=job.gm,
            before=before,
            after=after,
            tensors=tensors,
            paths=_paths(names.items(), _buffers([*job.models, job.gm])),
            input_names={inp.node: inp.name for inp in job.inputs},
            sites=plan.sites if plan else tuple(site for site in found if site not in refused),
            found=found,
            skipped=plan.skipped if plan else (*refused.values(), *getattr(job, "skipped", ())),
            groups=plan.groups if plan else (),
            uses=plan.uses if plan else (),
            reports=tuple(job.reports),
            labels=prover.labels if prover else {},
            results=dict(job.results),
            shapes=_shapes(job, before),
            notes=(*plan.assumed, *plan.mixed_outputs) if plan else (),
            pool=pool,
            refusal=refusal,
        )

    @classmethod
    def of_graph(cls, gm: fx.GraphModule) -> Record:
        """A graph module as it is: weights and calls, and the fxlora ops it may hold."""
        bound = dict(bound_weights(gm, None))
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(value := attribute(gm, str(node.target)), torch.Tensor):
                bound[node] = value
        kept = gm.meta.get(META_KEY, {}).get("model")
        models = [gm] if kept is None else [kept, gm]
        named = (item for model in models for item in model.named_parameters(remove_duplicate=False))
        return cls(title_of(kept or gm), gm, Snapshot.of(gm), None, bound, _paths(named, _buffers(models)))

    @property
    def graph(self) -> Snapshot:
        """The graph as it is now."""
        return self.after or self.before

    def side_before(self) -> Record:
        """The same record without what the rewrite made."""
        return replace(self, after=None, results={})

    def paths_of(self, node: fx.Node) -> tuple[str, ...]:
        """All names of the tensor behind a node, the canonical one first; its target where it has none."""
        tensor = self.tensors[node]
        return tuple(self.paths.get(tensor_key(tensor), ())) or (str(node.target),)

    def row_maps(self) -> dict[RowMap, int]:
        """The distinct row maps of the planned calls, numbered from 1 in graph order."""
        numbers: dict[RowMap, int] = {}
        for use in self.uses:
            numbers.setdefault(use.rows, 1 + len(numbers))
        return numbers

    def uses_of(self, site: Site) -> list[PlannedUse]:
        return [use for use in self.uses if use.site is site]


def _shapes(job: Job, before: Snapshot) -> dict[fx.Node, tuple[torch.dtype, list[int | str]]]:
    """What the proof knows of nodes whose shapes tracing did not record, from the sizes in each of its worlds."""
    worlds = job.sizing.worlds if hasattr(job, "sizing") else []
    found: dict[fx.Node, tuple[torch.dtype, list[int | str]]] = {}
    for state in before.nodes:
        if fake_value(state.node) is not None:
            continue
        known = [world.values.get(state.node) for world in worlds]
        facts = [fact for fact in known if isinstance(fact, TensorFacts)]
        if facts and len(facts) == len(known):
            sizes = zip(*(fact.shape for fact in facts), strict=True)
            found[state.node] = (facts[0].dtype, [n[0] if len(set(n)) == 1 else "*" for n in sizes])
    for call, made in job.results.items():
        if call in found:
            found[made] = found[call]
    return found


def _refused(job: Job, sites: Iterable[Site]) -> dict[Site, Skipped]:
    """Sites whose rows mix requests, where a job stopped before its plan said so."""
    found = {}
    for site in sites:
        for node in site.uses:
            rows = job.prover.rows(job.reader.read_as(node, site.kind).x)
            if isinstance(rows, Mixed):
                found[site] = Skipped(site.parameter, f"its rows mix requests: {rows.reason}", site.aliases)
    return found


def title_of(module: torch.nn.Module) -> str:
    """The class of the model, or of the model that a graph module was traced from; empty where that is not known."""
    kept = module.meta.get(META_KEY, {}).get("class", "") if isinstance(module, fx.GraphModule) else ""
    name = type(module).__name__
    return kept or ("" if name.startswith("GraphModule") else name)


def _paths(*named: Iterable[tuple[str, torch.Tensor]]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for items in named:
        for path, tensor in items:
            known = found.setdefault(tensor_key(tensor), [])
            if path not in known:
                known.append(path)
    return found


def _buffers(models: Iterable[torch.nn.Module]) -> list[tuple[str, torch.Tensor]]:
    return [item for model in models for item in model.named_buffers(remove_duplicate=False)]
