"""The plan: what each site becomes, and why the others stay as they are. Every decision is made here; rewriting only
edits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from difflib import get_close_matches
from functools import cache

from torch import fx

from fxlora.passes import experts
from fxlora.passes.errors import RowsNotProvenError, TargetError
from fxlora.passes.memory import Memory
from fxlora.passes.reads import Reader
from fxlora.passes.rows import moves
from fxlora.passes.rows.labels import Label, Mixed, RowMap
from fxlora.passes.rows.masked import Guard
from fxlora.passes.rows.propagate import Prover
from fxlora.passes.sites import Role, Site, Skipped
from fxlora.passes.zeros import are_zero, zeros_behind

Targets = None | str | Sequence[str]


@dataclass(frozen=True)
class AdapterShape:
    """How much adapter memory each site gets: slots, the largest rank, and rank rows in all (None: enough for every
    slot). expert_pool_rows: rank rows per expert of a site that has several.
    """

    max_adapters: int
    max_rank: int
    pool_rows: int | None = None
    expert_pool_rows: int | None = None


@dataclass(frozen=True)
class PlannedUse:
    """One call to rewrite: the site it reads, the map of its rows, and what reads its result."""

    node: fx.Node
    site: Site
    rows: RowMap
    readers: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Group:
    """Calls that one op makes: linears that read one input (`siblings.py`), or one call alone.

    Attributes:
        uses: The calls, in graph order; the op stands where the first stood.
        reason: Why they are together, or why the call is alone.
        moved: Nodes that later members need, to be moved before the first call, in this order.
    """

    uses: tuple[PlannedUse, ...]
    reason: str = ""
    moved: tuple[fx.Node, ...] = field(default=(), repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The members' sites, in order: what the op's handle names."""
        return tuple(use.site for use in self.uses)


@dataclass(frozen=True)
class Plan:
    """All decisions about one graph.

    Attributes:
        sites: Sites that get an op and a pool.
        uses: Their calls, in graph order.
        skipped: Weights that stay as they are, each with its reason.
        groups: The same calls as ops: every use is in one group.
        digest: 32 bits over sites, shapes, dtypes, slots, pool rows and groups: part of the compile key.
        assumed: Where isolation is taken on trust (packed attention), in words.
        mixed_outputs: Graph outputs that combine requests, with the op that did it.
        guards: Calls whose rows are checked as the graph runs.
    """

    sites: tuple[Site, ...]
    uses: tuple[PlannedUse, ...]
    groups: tuple[Group, ...]
    skipped: tuple[Skipped, ...]
    shape: AdapterShape
    digest: int
    assumed: tuple[str, ...] = ()
    mixed_outputs: tuple[str, ...] = field(default=())
    guards: Mapping[fx.Node, Guard] = field(default_factory=dict, repr=False)

    @property
    def site_groups(self) -> tuple[tuple[Site, ...], ...]:
        """The distinct lists of member sites, in order: one handle each."""
        return tuple(dict.fromkeys(group.sites for group in self.groups))


def plan_graph(
    prover: Prover,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    reader: Reader,
    targets: Targets,
    shape: AdapterShape,
    outputs: Iterable[tuple[str, fx.Node]],
) -> Plan:
    """Decide for every site whether it is rewritten.

    Raises:
        TargetError: ``targets`` is empty or no regular expression. That it names sites is for :func:`check_targets`.
        RowsNotProvenError: ``targets`` names a site whose rows are not proven.
    """
    chosen: list[Site] = []
    uses: list[PlannedUse] = []
    left = list(skipped)
    wanted = _Targets(targets)
    memory = cache(lambda: Memory(prover.graph, reader))
    rewritten = _rewritten_routings(sites, reader, memory)
    for site in sites:
        if not wanted.takes(site):
            left.append(Skipped(site.parameter, wanted.why_not(site), site.aliases))
            continue
        planned, reason = _plan_uses(prover, site, reader, memory)
        reason = reason or next((rewritten[node] for node in site.uses if node in rewritten), "")
        if reason:
            if wanted.explicit:
                raise RowsNotProvenError(f"targets names {site.name!r}, but {reason}")
            left.append(Skipped(site.parameter, reason, site.aliases))
            continue
        chosen.append(site)
        uses += planned
    order = {node: i for i, node in enumerate(prover.graph.nodes)}
    uses = [replace(use, rows=prover.table.canonical(use.rows)) for use in uses]
    uses.sort(key=lambda use: order[use.node])
    mixed = tuple(words for path, node in outputs if (words := _misplaced(prover, path, node)))
    assumed = tuple(dict.fromkeys(prover.assumed.values()))
    groups = tuple(Group((use,), "linears are not grouped") for use in uses)
    digest = digest_of(chosen, shape, groups)
    return Plan(tuple(chosen), tuple(uses), groups, tuple(left), shape, digest, assumed, mixed, dict(prover.guards))


def check_targets(targets: Targets, sites: Sequence[Site], skipped: Sequence[Skipped]) -> None:
    """Raise TargetError when ``targets`` names nothing, or a weight that is no site."""
    wanted = _Targets(targets)
    for site in sites:
        wanted.takes(site)
    wanted.check([site.name for site in sites], skipped)


def is_target(targets: Targets, site: Site) -> bool:
    """Whether ``targets`` names a site."""
    return _Targets(targets).takes(site)


def targeted_paths(targets: Targets, paths: Iterable[str]) -> set[str]:
    """The parameter paths that ``targets`` names."""
    wanted = _Targets(targets)
    return {path for path in paths if wanted.match((path,))}


def check_target_names(targets: Targets, paths: Iterable[str]) -> None:
    """Raise TargetError when ``targets`` names no weight at all, before any graph has shown which are sites."""
    wanted, known = _Targets(targets), list(paths)
    for path in known:
        wanted.match((path,))
    wanted.check([path.removesuffix(".weight") for path in known], ())


def _misplaced(prover: Prover, path: str, node: fx.Node) -> str:
    """What is wrong with the rows of one output: mixed, or one row a request but not of the requests in order."""
    rows = prover.rows(node)
    if _is_alone(prover):
        return ""
    if isinstance(rows, Mixed):
        return f"output {path}: {rows.reason}"
    if not isinstance(rows, Label):
        return ""
    requests = [ids.shape[0] for ids in prover.seed.ids]
    if [prover.shape(node, w)[:1] for w in range(prover.count)] != [(n,) for n in requests]:
        return ""
    own = Label(prover.seed, tuple(range(prover.seed.ids[0].dim())))
    return "" if rows == own else f"output {path}: its rows are not those of the requests in order"


def _rewritten_routings(sites: Sequence[Site], reader: Reader, memory: Callable[[], Memory]) -> dict[fx.Node, str]:
    calls = [node for site in sites if site.role is Role.EXPERTS for node in site.uses]
    if not calls:
        return {}
    return experts.rewritten_routings([(node, reader.read_as(node, "experts")) for node in calls], memory())


def _is_alone(prover: Prover) -> bool:
    """Whether the graph is for batches of one request: all rows that depend on any are its own."""
    return all(ids.numel() == 1 for ids in prover.seed.ids)


def _of_the_one_request(prover: Prover, node: fx.Node) -> Label:
    """The map without dims of a batch of one request."""
    rows = Label(prover.seed, tuple(range(prover.seed.ids[0].dim())))
    for d in reversed(rows.dims):
        ids = [i.select(d, 0) for i in rows.map.ids]
        rows = moves.derive(prover, node, rows, ids, rows.dims[:d], moves.select_first(d), "select")
    return rows


def _plan_uses(
    prover: Prover, site: Site, reader: Reader, memory: Callable[[], Memory]
) -> tuple[list[PlannedUse], str]:
    planned = []
    for node in site.uses:
        if node in prover.vmapped:
            return [], "it is computed inside torch.vmap, which hides one of its dims"
        read = reader.read_as(node, site.kind)
        rows = prover.rows_of_read(read.x) if read.product is None else prover.rows(read.x)
        alone = rows is not None and _is_alone(prover)
        if alone:
            rows = _of_the_one_request(prover, read.x)
        if read.product is not None and isinstance(rows, Label):
            found = experts.plan_rows(prover, node, read, rows)
            if isinstance(found, str):
                return [], found
            planned.append(PlannedUse(node, site, found, tuple(node.users)))
            continue
        lead = prover.ndim(read.x) - (site.role is not Role.EMBEDDING)
        if isinstance(rows, Label) and read.x_order is not None and not alone:
            rows = moves.permute(prover, read.x, rows, read.x_order)
        if rows is None:
            zeros = zeros_behind(read.x) if site.kind == "linear" else []
            if zeros and are_zero(zeros, node, memory()):
                continue
            return [], _no_request(prover, read.x)
        if isinstance(rows, Mixed):
            return [], f"its rows mix requests: {rows.reason}"
        if any(d >= lead for d in rows.dims):
            return [], "requests run along the dim that the weight sums over"
        flat = moves.flat_rows(prover, read.x, rows, lead, read.x_order)
        planned.append(PlannedUse(node, site, flat, tuple(node.users)))
    return planned, "" if planned or not site.uses else "it reads zeros alone, to which no adapter adds anything"


def _no_request(prover: Prover, x: fx.Node) -> str:
    """Why rows carry no request, and what would change that."""
    shared = "its rows are shared by the whole batch: they carry no request"
    if strangers := prover.strangers_behind(x):
        return f"{shared} (they come from {', '.join(strangers)}: batch_dims can name the request dim of an input)"
    return f"{shared} (positions, constants)"


class _Targets:
    """``targets`` as PEFT's ``target_modules``: a list matches by suffix, a string is a regex over the whole name."""

    def __init__(self, targets: Targets) -> None:
        self.linear_only = targets == "all-linear"  # PEFT's word: every linear but the one that makes logits
        self.default = targets is None
        self.all = targets is None or targets == "all" or self.linear_only
        self.explicit = not self.all
        self.pattern = targets if isinstance(targets, str) and not self.all else None
        self.names = [] if self.all or isinstance(targets, str) or targets is None else list(targets)
        self._matched: set[str] = set()
        if self.pattern is None and not self.all and not self.names:
            raise TargetError("targets is empty; expected names of weights, a regex, 'all' or None")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise TargetError(f"targets={targets!r} is no regular expression: {error}") from error

    def takes(self, site: Site) -> bool:
        """Does ``targets`` name this site?"""
        if self.linear_only and site.role is not Role.LINEAR:
            return False
        if self.default and site.role is Role.EXPERTS:
            return False
        return self.match((site.name, site.parameter, *site.aliases))

    def why_not(self, site: Site) -> str:
        """The reason for a site that ``targets`` leaves out."""
        if self.default and site.role is Role.EXPERTS:
            return (
                f"not targeted: adapter memory for {site.num_experts} experts is allocated only where `targets` asks "
                f'for it; apply with targets="all", or name {site.name.rpartition(".")[2]!r} in targets'
            )
        return "not targeted: `targets` does not name it"

    def match(self, paths: Iterable[str]) -> bool:
        if self.all:
            return True
        found = False
        for path in paths:
            module = path.removesuffix(".weight")
            if self.pattern is not None and (re.fullmatch(self.pattern, module) or re.fullmatch(self.pattern, path)):
                self._matched.add(self.pattern)
                found = True
            for name in self.names:
                if any(p == name or p.endswith(f".{name}") for p in (module, path)):
                    self._matched.add(name)
                    found = True
        return found

    def check(self, names: Sequence[str], skipped: Sequence[Skipped]) -> None:
        for name in [self.pattern] if self.pattern is not None else self.names:
            if name in self._matched:
                continue
            for item in skipped:
                if _Targets(name if self.pattern is not None else [name]).match((item.name, *item.aliases)):
                    raise TargetError(
                        f"targets names {name!r}, which means {item.name!r}, but that is no site: {item.reason}"
                    )
            known = sorted(set(names))
            near = get_close_matches(str(name), known + [k.rpartition(".")[2] for k in known], n=3)
            raise TargetError(
                f"targets names {name!r}, which matches no weight of the graph; nearest: {near or known[:5]}"
            )


def digest_of(sites: Sequence[Site], shape: AdapterShape, groups: Sequence[Group] = ()) -> int:
    """32 bits that change whenever sites, their shapes and dtypes, the adapter memory or the groups change."""
    facts = [
        (s.parameter, s.role.value, s.num_experts, s.in_features, s.out_features, str(s.dtype), str(s.device.type))
        for s in sites
    ]
    members = [[(site.parameter, site.role.value) for site in group.sites] for group in groups]
    text = repr((facts, *astuple(shape), members))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
