"""LoraModule: a rewritten graph that is called like the model, with `adapters=` beside its own arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from fxlora.adapter import Adapter, AdapterSource, read_adapter
from fxlora.batch import Adapters, slots_of
from fxlora.binding import BoundAdapter, bind_adapter
from fxlora.dumps.folder import dump_refusal
from fxlora.dumps.record import Record, title_of
from fxlora.errors import AdapterError, CallError
from fxlora.passes.pipeline import Job, PassReport
from fxlora.passes.plan import Group
from fxlora.passes.rows.worlds import GraphInput
from fxlora.passes.sites import Site, Skipped
from fxlora.pool import AdapterPool
from fxlora.renames import renames_of
from fxlora.signature import META_KEY, Signature


@dataclass(frozen=True)
class OutputCheck:
    """How far one output of the rewritten graph, with nothing loaded, is from the base graph's."""

    path: str
    dtype: torch.dtype
    max_abs_error: float
    max_rel_error: float
    equal_bits: bool


class LoraModule(nn.Module):
    """Serves adapters over one graph. Made by `fxlora.apply`.

    Calls from several threads do not cross: a batch's slots are an input of its own call. Runs under `torch.no_grad`:
    the ops have no autograd formula.

    Attributes:
        graph_module: The rewritten graph: flat inputs, then `adapter_slots` (int32).
        sites: Weights that adapters can reach. skipped: the others, each with its reason.
        groups: The ops of the graph, in order: the sites that each serves, and why these.
        pool: The adapter memory. reports: what each pass did. record: what dumps are drawn from.
        dump_folder: Where `FXLORA_DUMP` made `fxlora.apply` write this graph.
        fixed_sizes: Sizes that tracing fixed, by input name and dim: calls with others are refused.
        assumed: Where isolation of requests is taken on trust. mixed_outputs: outputs that combine requests.
    """

    base: fx.GraphModule
    graph_module: fx.GraphModule

    def __init__(
        self, base: fx.GraphModule, graph_module: fx.GraphModule, signature: Signature, job: Job, pool: AdapterPool
    ) -> None:
        super().__init__()
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "graph_module", graph_module)
        self.pool = pool
        self._signature = signature
        self.sites: tuple[Site, ...] = job.plan.sites
        self.skipped: tuple[Skipped, ...] = job.plan.skipped
        self.groups: tuple[Group, ...] = job.plan.groups
        self.reports: tuple[PassReport, ...] = tuple(job.reports)
        self.assumed, self.mixed_outputs = job.plan.assumed, job.plan.mixed_outputs
        self.frozen: bool = job.sizing.frozen
        self.dump_folder: Path | None = None
        self.record = Record.of_job(job, pool, title=title_of(base))
        self._weights = dict(job.weights.names)
        self._rename = base.meta.get(META_KEY, {}).get("renames") or renames_of(job.models)
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        position = {node: i for i, node in enumerate(placeholders)}
        self._primary = position[job.primary]
        self._request_dims = job.seeds[job.primary]
        self._seeded = [
            (inp.name, position[inp.node], job.seeds[inp.node]) for inp in job.inputs if inp.node in job.seeds
        ]
        self._ndims = [(inp.name, position[inp.node], len(inp.sizes)) for inp in job.inputs if inp.dtype is not None]
        self._fixed = [(inp.name, position[inp.node], dict(job.sizing.fixed.get(inp.node, {}))) for inp in job.inputs]
        self.fixed_sizes = {name: sizes for name, _, sizes in self._fixed if sizes}
        self._guards = job.sizing.guards
        self._alike = [(pair, tuple(_place(symbol, job.inputs) for symbol in pair)) for pair in job.sizing.alike]
        self._symbols = [
            (s, position[inp.node], d) for inp in job.inputs for d, s in enumerate(inp.symbols) if s is not None
        ]
        self._allowed: set[tuple[int, ...]] = set()
        self._row_maps = {
            use.site: "; ".join(dict.fromkeys(" -> ".join(u.rows.chain()) for u in job.plan.uses if u.site is use.site))
            for use in job.plan.uses
        }

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in slot order."""
        return self.pool.names

    def load_adapter(self, name: str, source: AdapterSource) -> None:
        """Load an adapter from a PEFT folder, a file of diffusers, or (config, tensors), under a name.

        All or nothing: every tensor lands on a site, or an error of the AdapterError family says what does not and why,
        and nothing has changed. The graph does not change either.
        """
        try:
            with read_adapter(source) as adapter:
                self.pool.load(name, self.bind(adapter))
        except AdapterError as error:
            if self.dump_folder is not None:
                dump_refusal(self.dump_folder, self, source, error)
            raise

    def bind(self, adapter: Adapter) -> BoundAdapter:
        """The site of every tensor of an adapter that was read; nothing is loaded. Raises as `load_adapter`."""
        return bind_adapter(adapter, self.sites, self.skipped, self._weights, self._rename)

    def unload_adapter(self, name: str) -> None:
        """Free the slot and the memory of an adapter. Raises UnknownAdapterError."""
        self.pool.unload(name)

    def row_map(self, site: Site) -> str:
        """How the rows of a site follow from `adapter_slots`: the chain of ops that proved it."""
        return self._row_maps[site]

    def explain(self, row: int | tuple[int, int] | None = None, adapters: Adapters = None) -> str:
        """Which slot the rows of a request get at each site, and the chain of ops that proved it, as text.

        Args:
            row: The request, or (request, token) where adapters are chosen per token; None: every request.
            adapters: As in a call.

        Raises:
            UnknownAdapterError, BatchError: as a call would.
        """
        from fxlora.dumps.explain import explain

        return explain(self.record, row, adapters, len(self._request_dims))

    def siblings(self, site: Site) -> tuple[Site, ...]:
        """The other sites that share an op with a site, in order."""
        found = [other for group in self.groups if site in group.sites for other in group.sites]
        return tuple(dict.fromkeys(other for other in found if other is not site))

    def forward(self, *args: Any, adapters: Adapters = None, **kwargs: Any) -> Any:
        """Run a batch. The graph's own arguments, and what it returns, are unchanged.

        Args:
            adapters: One name or None per request; one for all; nested lists, one per token, where `batch_dims` has
                two dims.

        Raises:
            UnknownAdapterError, BatchError: before anything runs. CallError: shapes the graph was not traced for.
        """
        flat = self._signature.flatten(args, kwargs)
        self._check_tensors(flat)
        primary = flat[self._primary]
        if torch.is_autocast_enabled(primary.device.type):
            raise CallError(
                "autocast is on around the call, and would change the dtype of linears, where the graph keeps that of "
                "its inputs: load the model in the dtype that it is to be served in, and call it without autocast"
            )
        sizes = tuple(primary.shape[d] for d in self._request_dims)
        self._check_shapes(flat, sizes)
        dims = tuple(range(len(sizes)))
        slots = slots_of(adapters, self.pool, request_dims=dims, sizes=sizes, device=primary.device)
        with torch.no_grad():
            outputs = self.graph_module(*flat, slots)
        return self._signature.unflatten(outputs, args, kwargs)

    def _check_tensors(self, flat: list[Any]) -> None:
        for name, position, ndim in self._ndims:
            value = flat[position]
            if not isinstance(value, torch.Tensor) or value.dim() != ndim:
                found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise CallError(f"input {name!r} is a {found}; the graph takes a tensor of {ndim} dims there")

    def _check_shapes(self, flat: list[Any], sizes: tuple[int, ...]) -> None:
        for name, position, dims in self._seeded:
            found = tuple(flat[position].shape[d] for d in dims)
            if found != sizes:
                raise CallError(f"input {name!r} has {found} requests along dims {dims}, the batch has {sizes}")
        for name, position, fixed in self._fixed:
            for d, size in fixed.items():
                if flat[position].shape[d] != size:
                    shape = tuple(flat[position].shape)
                    raise CallError(
                        f"input {name!r} has shape {shape}; the graph is valid only for size {size} at dim {d}, which "
                        f"tracing fixed: capture it with dynamic sizes, or for this shape"
                    )

        if self._symbols:
            self._check_guards(flat)

    def _check_guards(self, flat: list[Any]) -> None:
        """Sizes for which the model's own code would take another branch than it took at tracing are refused."""
        sizes = tuple(flat[position].shape[d] for _, position, d in self._symbols)
        if sizes in self._allowed:
            return
        values: dict[Any, int] = {}
        for (symbol, position, d), size in zip(self._symbols, sizes, strict=True):
            if values.setdefault(symbol, size) != size:
                shape = tuple(flat[position].shape)
                raise CallError(
                    f"dim {d} of an input of shape {shape} must be {values[symbol]}: tracing made it one size"
                )
        for guard in self._guards:
            if guard.subs(values) == False:  # noqa: E712  a sympy truth value
                raise CallError(
                    f"the model takes another branch at these sizes: it was traced where {guard} holds, with {values}"
                )
        for pair, places in self._alike:
            if len({values.get(symbol) for symbol in pair}) > 1:
                raise CallError(
                    f"{places[0]} is {values[pair[0]]} and {places[1]} is {values[pair[1]]}: rows are proven for calls "
                    "that give them one size, as the graph was traced"
                )
        self._allowed.add(sizes)

    def check(self, *args: Any, **kwargs: Any) -> list[OutputCheck]:
        """Run the base graph and the rewritten one with no adapter on the same inputs, and compare every output."""

        def call(module: Any) -> list[Any]:
            fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, (args, kwargs))
            return pytree.tree_leaves_with_path(module(*fresh[0], **fresh[1]))

        with torch.no_grad():
            expected, got = call(self.base), call(self)
        rows = []
        for (path, want), (_, have) in zip(expected, got, strict=True):
            if not isinstance(want, torch.Tensor):
                continue
            error = (want.double() - have.double()).abs().max().item() if want.numel() else 0.0
            scale = want.double().abs().max().item() if want.numel() else 0.0
            rows.append(
                OutputCheck(
                    pytree.keystr(path), want.dtype, error, error / scale if scale else error, torch.equal(want, have)
                )
            )
        return rows

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The base graph's own, unchanged: adapters are not part of it."""
        return self.base.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads base weights in place, as the base graph would; adapters stay."""
        return self.base.load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise CallError("a LoraModule stays where its graph was applied: move the model first, then capture and apply")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise CallError("a LoraModule owns adapter memory of this process and cannot be copied: apply the graph again")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CallError("a LoraModule owns adapter memory of this process and cannot be pickled: save the base model")


def _place(symbol: Any, inputs: Sequence[GraphInput]) -> str:
    """Where a call gives a size its value."""
    return next(f"dim {d} of {inp.name!r}" for inp in inputs for d, s in enumerate(inp.symbols) if s == symbol)
