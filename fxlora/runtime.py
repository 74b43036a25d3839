"""The runtime of one model: its adapters and their memory, shared by every graph that torch.compile makes of it.

Stage: owner of an adapter's way under torch.compile. The sites come from a trace (`attach.py`); each compiled graph
(`backend.py`) may add some, never lose one that a loaded adapter uses.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx, nn

from fxlora.adapter import AdapterSource, read_adapter
from fxlora.apply import graph_job
from fxlora.batch import Adapters, request_sizes, slots_of
from fxlora.binding import BoundAdapter, Entry, bind_adapter
from fxlora.capture import capture, output_embedding
from fxlora.dynamo_inputs import DynamoInputs
from fxlora.errors import (
    AdapterInUseError,
    CallError,
    CaptureError,
    GraphError,
    NotAttachedError,
    RowsNotProvenError,
    Unbound,
    UnboundTensorError,
    UnknownAdapterError,
)
from fxlora.live_batch import Batch, LiveBatch
from fxlora.mm_encoders import FEATURES, vouched_features
from fxlora.passes.pipeline import Job, analyse
from fxlora.passes.plan import AdapterShape, Plan, Targets, check_target_names, targeted_paths
from fxlora.passes.rows.seeds import BatchDims, dims_of_call
from fxlora.passes.rows.worlds import GraphInput
from fxlora.passes.sites import NOT_READ, Site, Skipped
from fxlora.passes.weights import tensor_key
from fxlora.pool import AdapterPool
from fxlora.provisional import provisional_sites
from fxlora.renames import renames_of
from fxlora.signature import example_arguments

_log = logging.getLogger(__name__)


class Runtime:
    """The adapters of one model, for all graphs compiled of it. Made by `attach`.

    Attributes:
        backend: For `torch.compile(model, backend=runtime.backend)`; takes `mode` and `options` as "fxlora" does.
        names: Every path of every Parameter. argument_names: of the model's forward.
        pool: The adapter memory. live: the slots of the running batch.
        learned: Whether the sites of the model's whole forward are known.
        warned: What was logged of compiled graphs as a warning.
        targets, batch_dims, shape, group_siblings: as given to `attach`.
    """

    backend: Callable[..., Callable[..., Any]]

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, torch.Tensor],
        shape: AdapterShape,
        targets: Targets,
        batch_dims: BatchDims,
        max_tokens: int,
        group_siblings: bool,
    ) -> None:
        from fxlora.backend import compile_graph  # and with it dynamo, which `import fxlora` does not need

        self.backend = partial(compile_graph)
        self.model = weakref.ref(model)
        self.names = names
        self._rename = renames_of([model])
        self.argument_names = tuple(inspect.signature(model.forward).parameters)
        self.output_embedding = output_embedding(model)
        self.targets, self.batch_dims, self.shape, self.group_siblings = targets, batch_dims, shape, group_siblings
        self.live = LiveBatch(max_tokens)
        self.pool = AdapterPool((), digest=0, slots=self.live.buffers, **asdict(shape))
        self.closed = False
        self.warned: set[str] = set()
        self._request_dims = _count_request_dims(batch_dims)
        self._lock = threading.RLock()
        self._sites: dict[Any, Site] = {}
        self._refused: dict[Any, str] = {}
        self._skipped: dict[str, Skipped] = {}
        self.learned = False
        self._pending: dict[str, BoundAdapter] = {}
        self._held: Counter[str] = Counter()
        check_target_names(targets, [path for path, parameter in names.items() if parameter.dim() > 1])
        self._targeted = targeted_paths(targets, names)
        # By object: a model that moves keeps its Parameters. Two of them over one memory are one weight.
        firsts: dict[Any, int] = {}
        self._weights = {id(p): firsts.setdefault(tensor_key(p), id(p)) for p in names.values()}
        self._paths: dict[int, tuple[str, ...]] = {}
        for path, parameter in names.items():
            weight = self._weights[id(parameter)]
            self._paths[weight] = (*self._paths.get(weight, ()), path)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Weights that adapters can reach, as far as traces and compiled graphs have shown them."""
        return tuple(site for key, site in self._sites.items() if key not in self._refused)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The other weights, each with its reason."""
        refused = [
            Skipped(site.parameter, self._refused[key], site.aliases)
            for key, site in self._sites.items()
            if key in self._refused
        ]
        served = {name for site in self.sites for name in (site.parameter, *site.aliases)}
        others = [skip for name, skip in self._skipped.items() if name not in served or skip.reason != NOT_READ]
        return (*refused, *(skip for skip in others if skip.name not in {r.name for r in refused}))

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in slot order."""
        return self.pool.names

    def load_adapter(self, name: str, source: AdapterSource) -> None:
        """Load an adapter from a PEFT folder, a file of diffusers, or (config, tensors), under a name.

        All or nothing, as `LoraModule.load_adapter`; no graph is compiled anew.
        """
        with self._lock, read_adapter(source) as adapter:
            if self.learned:
                self.pool.load(name, bind_adapter(adapter, self.sites, self.skipped, self.names, self._rename))
                return
            bound = bind_adapter(adapter, provisional_sites(adapter, self.names), (), self.names, self._rename)
            for guess, entry in bound.entries.items():
                self.pool.check_entry(guess, entry)
            self.pool.load(name, BoundAdapter(bound.origin, bound.config, {}))
            self._pending[name] = bound
            _log.info("adapter %r waits for the first compiled graph, which shows the sites", name)

    def unload_adapter(self, name: str) -> None:
        """Free the slot and the memory of an adapter. Raises UnknownAdapterError, AdapterInUseError."""
        with self._lock:
            if self._held[name]:
                raise AdapterInUseError(
                    f"{self._held[name]} requests of continuous batching still have adapter {name!r}: unload it when "
                    f"they are finished, or cancel them"
                )
            self.pool.unload(name)
            self._pending.pop(name, None)

    def hold_adapter(self, name: str) -> int:
        """Keep an adapter loaded until `release_adapter`, which is due once for each call; returns its slot."""
        with self._lock:
            slots = self.pool.slots
            if name not in slots:
                raise UnknownAdapterError(f"adapter is {name!r}, which is not loaded; loaded: {list(slots)}")
            self._held[name] += 1
            return slots[name]

    def release_adapter(self, name: str) -> None:
        """See `hold_adapter`."""
        with self._lock:
            self._held[name] -= 1

    @property
    def request_dims(self) -> int:
        """1 where adapters are chosen per request, 2 where they may be per token."""
        return self._request_dims

    @contextmanager
    def batch(self, adapters: Adapters) -> Iterator[Batch]:
        """Every call of a compiled graph inside runs with these adapters; outside of any batch it has none.

        Replays of a CUDA graph that was captured inside a batch read what the batch around the replay says.

        adapters: One name or None per request; one for all; nested lists, one per token, where `batch_dims` has two
        dims. Raises UnknownAdapterError or BatchError before anything runs: for a batch of another thread
        BatchInUseError. A batch inside a batch takes its place until it ends.
        """
        self.require_open()
        sizes = request_sizes(adapters, self._request_dims)
        dims = tuple(range(len(sizes)))
        slots = slots_of(adapters, self.pool, request_dims=dims, sizes=sizes, device=torch.device("cpu"))
        with self.live.enter(slots) as batch:
            yield batch

    @contextmanager
    def same_batch(self) -> Iterator[None]:
        """The running batch once more, so that what is done to it inside ends with it; nothing outside of any batch."""
        running = self.live.running
        if running is None:
            yield
            return
        with self.live.enter(running.slots):
            yield

    def close(self) -> None:
        """Free the adapter memory. The model can be attached again; graphs compiled for this runtime raise."""
        with self._lock:
            self.closed = True
            self.pool.close()
            self._pending.clear()

    def require_open(self) -> None:
        """Raise NotAttachedError once closed."""
        if self.closed:
            raise NotAttachedError(
                "this runtime was closed: attach the model again, call `torch._dynamo.reset()` and compile it again"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Runtime owns adapter memory of this process: it cannot be copied or pickled")

    def learn(self, model: nn.Module, example_inputs: Any) -> None:
        """Find the sites in a trace of the model, if it can be traced."""
        given = example_arguments(example_inputs)
        call = given or _dummy_call(model)
        if call is None:
            _log.info("no example inputs: the first compiled graph shows the sites")
            return
        # A cache made inside the forward is no site's matter, and not every version of torch can trace its making.
        cacheless = {"use_cache": False} if "use_cache" in self.argument_names[len(call[0]) :] else {}
        try:
            gm = capture(model, *call[0], **{**cacheless, **call[1]})
            job, _ = graph_job(gm, self.shape, targets=self.targets, model=model, group_siblings=False)
            job.batch_dims = self._dims_of(job.inputs)
            plan = analyse(job)
        except CaptureError as error:
            if given is not None:
                raise
            _log.info(
                "the model's dummy inputs cannot be traced, so the first compiled graph shows the sites: %s", error
            )
            return
        self.admit(job, plan)
        self.learned = True

    def paths_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Every path of a Parameter in the model."""
        return self._paths.get(self._weight(parameter), ())

    def is_target(self, parameter: torch.Tensor) -> bool:
        """Whether `targets` names a Parameter, as far as its paths tell."""
        return not self._targeted.isdisjoint(self.paths_of(parameter))

    def _weight(self, tensor: torch.Tensor) -> int:
        """One number per weight of the model."""
        if id(tensor) in self._weights:
            return self._weights[id(tensor)]
        key = tensor_key(tensor)
        return next((self._weights[id(p)] for p in self.names.values() if tensor_key(p) == key), id(tensor))

    def _key(self, site: Site) -> tuple[int, str]:
        return self._weight(site.weight), site.kind

    def job(self, gm: fx.GraphModule, inputs: DynamoInputs) -> Job:
        """What the passes take, for one of dynamo's graphs, which they then edit in place."""
        model = self.model()
        arguments = inputs.arguments(self.argument_names)
        return Job(
            gm=gm,
            inputs=arguments,
            bound=inputs.bound,
            models=[] if model is None else [model],
            batch_dims=self._dims_of(arguments),
            targets=self.targets,
            shape=self.shape,
            output_embedding=None if self.output_embedding is None else self.names[self.output_embedding],
            group_siblings=self.group_siblings,
            whole=False,
        )

    def _dims_of(self, inputs: Sequence[GraphInput]) -> BatchDims:
        """`batch_dims` as they hold for one call."""
        dims = self.batch_dims
        if isinstance(dims, Mapping) and FEATURES in self.argument_names:
            dims = {**dims, **vouched_features(dims)}
        return dims_of_call(inputs, dims, self.argument_names)

    def require_no_adapter_on(self, modules: Iterable[nn.Module], what: str) -> None:
        """Raise CallError where a loaded adapter adds to a weight of modules that ran outside of compiled graphs."""
        weights = {self._weight(p) for module in modules for p in module.parameters(recurse=False)}
        for name in self.pool.names:
            for site in self.pool.sites_of(name):
                if self._weight(site.weight) in weights:
                    raise CallError(
                        f"adapter {name!r} adds to {site.name}, but {what} ran outside of the compiled graphs, without "
                        f"adapters. Leave the input it reads out of `batch_dims`, so that it runs inside, or unload "
                        f"the adapter"
                    )

    def admit(self, job: Job, plan: Plan, *, whole: bool = True) -> dict[Site, Site]:
        """Take in what a graph shows: its sites get memory, adapters that waited for them are placed.

        Returns the runtime's own site for each of the plan's. whole: whether the graph is the model's own forward.
        Raises RowsNotProvenError or UnboundTensorError where a loaded adapter cannot be served by this graph.
        """
        with self._lock:
            self.require_open()
            # Without their uses: those would keep every node of the graph.
            own = {site: self._sites.get(self._key(site)) or replace(site, uses=()) for site in plan.sites}
            for site, mine in own.items():
                if (site.dtype, site.device) != (mine.dtype, mine.device):
                    raise GraphError(
                        f"site {site.name} runs in {site.dtype} on {site.device} in this graph; its adapter memory is "
                        f"{mine.dtype} on {mine.device}. Move the model, and choose its autocast, before attach"
                    )
            refused = self._refusals(job, plan)
            self._require_served(refused)
            self.pool.add_sites(list(own.values()))
            self._sites |= {self._key(site): site for site in own.values()}
            self._refused |= refused
            for skip in plan.skipped:
                if skip.reason != NOT_READ or skip.name not in self._skipped:
                    self._skipped[skip.name] = skip
            if whole:
                self._place_pending()
                self.learned = True
            return own

    def _refusals(self, job: Job, plan: Plan) -> dict[Any, str]:
        """Weights that a graph reads and no adapter can reach there, though one could in another graph."""
        planned = {self._key(site) for site in plan.sites}
        reasons = {name: skip.reason for skip in plan.skipped for name in (skip.name, *skip.aliases)}
        found = {
            self._key(site): reasons.get(site.parameter, "it is left out")
            for site in job.sites
            if self._key(site) not in planned
        }
        read = {key for key, _ in found} | {key for key, _ in planned}
        for name, tensor in self.names.items():
            weight = self._weight(tensor)
            if weight not in read and reasons.get(name, NOT_READ) != NOT_READ:
                found |= dict.fromkeys([(weight, kind) for kind in ("linear", "embedding")], reasons[name])
        return found

    def _require_served(self, refused: Mapping[Any, str]) -> None:
        for name in self.pool.names:
            for site in self.pool.sites_of(name):
                if reason := refused.get(self._key(site)):
                    raise RowsNotProvenError(
                        f"adapter {name!r} is loaded and adds to {site.name}, but in this graph {reason}"
                    )

    def _place_pending(self) -> None:
        for name, bound in list(self._pending.items()):
            entries: dict[Site, Entry] = {}
            lost = []
            for guess, entry in bound.entries.items():
                site = self._sites.get(self._key(guess))
                if site is None or self._key(guess) in self._refused:
                    reason = self._refused.get(self._key(guess)) or self._reason(guess)
                    lost += [Unbound(key, reason) for key in entry.keys]
                elif site in entries:
                    raise GraphError(f"{entry.keys} and {entries[site].keys} both name site {site.name}")
                else:
                    entries[site] = entry
            if lost:
                raise UnboundTensorError(tuple(lost), bound=2 * len(entries))
            self.pool.fill(name, BoundAdapter(bound.origin, bound.config, entries, bound.base_copies))
            del self._pending[name]

    def _reason(self, guess: Site) -> str:
        skips = [self._skipped[name].reason for name in (guess.parameter, *guess.aliases) if name in self._skipped]
        return skips[0] if skips else f"{guess.parameter} is not read as {guess.kind} by the compiled graph"


def _dummy_call(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The model's own idea of a call (transformers models have one), on the model's device."""
    inputs = getattr(model, "dummy_inputs", None)
    first = next(model.parameters(), None)
    if not isinstance(inputs, Mapping) or first is None:
        return None
    return (), {k: v.to(first.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _count_request_dims(batch_dims: BatchDims) -> int:
    given: Sequence[Any] = list(batch_dims.values()) if isinstance(batch_dims, Mapping) else [batch_dims]
    return max((len(dims) if isinstance(dims, tuple) else 1 for dims in given), default=1)
