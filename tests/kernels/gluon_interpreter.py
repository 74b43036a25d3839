"""Kernels in Gluon without a GPU: their Python, over blocks that are torch tensors (gluon_values.py, gluon_language.py)
and a machine that decides when what happens (gluon_machine.py). Those in Triton, too: its own interpreter runs programs
one after another, and launches.

`Stream.kernel` stands where a compiled kernel would. Launches overlap, programs run side by side, partitions of each
too; copies by TMA and cp.async happen at any time between the asking and the wait for them, products of the matrix unit
as late as may be. So what is read or overwritten too early, waited for in vain or never waited for shows in the result,
as an error, or as a hang that says who waits. What warps of one partition do to each other does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels import gluon_names
from tests.kernels.gluon_language import BarrierLayout, Barriers, Language
from tests.kernels.gluon_machine import Launch, Machine, MisuseError, Move, Task
from tests.kernels.gluon_values import COPIED, OPEN, Allocation, Pointer, Shared, Value, plain


class Descriptor:
    """What TMA moves."""

    def __init__(self, described: Any) -> None:
        self.base, self.block = described.base, list(described.block_shape)
        self.layout = getattr(described, "layout", None)  # which Triton's own has not
        size = torch.Size(self.block).numel() * self.base.element_size()
        self.dtype, self.block_type = Pointer(self.base).element_ty, SimpleNamespace(shape=self.block, nbytes=size)

    def load(self, place: Sequence[Any]) -> Value:
        """A block in registers, zero outside of the tensor."""
        inside, within = self.block_at([int(plain(part)) for part in place])
        block = torch.zeros(self.block, dtype=self.base.dtype)
        block[within] = self.base[inside]
        return Value(block)

    def store(self, place: Sequence[Any], block: Value) -> None:
        inside, within = self.block_at([int(plain(part)) for part in place])
        self.base[inside] = block.data[within]

    def block_at(self, place: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a block lies in the tensor and in the block, as far as it lies in the tensor."""
        inside, within = [], []
        for first, length, size in zip(place, self.block, self.base.shape, strict=True):
            begin, end = min(max(first, 0), size), min(max(first + length, 0), size)
            inside.append(slice(begin, end))
            within.append(slice(begin - first, begin - first + max(end - begin, 0)) if end > begin else slice(0, 0))
        return tuple(inside), tuple(within)


class Waiting:
    """Gluon's mbarrier, tma, async_copy and the matrix unit."""

    MBarrierLayout = BarrierLayout

    def __init__(self, machine: Machine, allocations: list[Allocation]) -> None:
        self.machine, self._allocations = machine, allocations

    @property
    def task(self) -> Task:
        return self.machine.current

    def gdc_wait(self) -> None:
        launch, program = self.task.launch, self.task.program
        self.machine.wait(lambda: launch.before is None or launch.before.is_over, "the end of the launch before")
        launch.waited.add(program)

    def gdc_launch_dependents(self) -> None:
        launch, program = self.task.launch, self.task.program
        if launch.before is None and program not in launch.waited:
            raise MisuseError(f"{launch.name}, the first, lets the next launch start before it has waited")
        launch.let.add(program)
        self.machine.pause()

    def init(self, barrier: Barriers, count: int) -> None:
        barrier.one.init(plain(count))

    def expect(self, barrier: Barriers, size: Any, pred: Any = True) -> None:
        if pred:
            barrier.one.expect(int(plain(size)))
            self.machine.pause()

    def arrive(self, barrier: Barriers, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.one.arrive(plain(count))
            self.machine.pause()

    def wait(self, barrier: Barriers, phase: Any) -> None:
        found, parity = barrier.one, int(plain(phase))
        self.machine.wait(lambda: found.is_over(parity), f"{found.name}, phase {found.phase}")

    def load_block(
        self, source: Descriptor, place: Sequence[Any], barrier: Barriers, to: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        at = [int(part) for part in place]
        to.poison()

        def act() -> None:
            to.write(source.load(at).data.reshape(to.shape))
            barrier.one.come(source.block_type.nbytes)

        self.machine.move(act)
        self.machine.pause()

    def store_block(self, target: Descriptor, place: Sequence[Any], block: Shared) -> None:
        inside, within = target.block_at([int(part) for part in place])

        def act() -> None:
            target.base[inside] = block.read_by_hardware()[within]

        self.task.stores.append(self.machine.move(act))
        self.machine.pause()

    def store_wait(self, pendings: int) -> None:
        stores = self.task.stores
        while len(stores) > plain(pendings):
            stores.pop(0).happen()

    def load_elements(self, to: Shared, at: Value, mask: Any = True) -> None:
        pointer = at.pointer
        assert pointer is not None
        offsets, wanted = torch.broadcast_tensors(at.data, mask.data)
        to.poison()

        def act() -> None:
            found = pointer.memory[pointer.places(offsets, wanted)]
            to.write(torch.where(wanted, found, torch.zeros_like(found)))
            to.close(COPIED)

        self.task.copies[-1].append(self.machine.move(act))

    def commit_group(self) -> None:
        self.task.copies.append([])

    def wait_group(self, pendings: int) -> None:
        copies = self.task.copies
        while len(copies) > plain(pendings) + 1:
            for move in copies.pop(0):
                move.happen()

    def mbarrier_arrive(self, barrier: Barriers, increment_count: bool = True) -> None:
        """Every lane of a warp arrives when its copies so far are there."""
        assert not increment_count
        before: list[Move] = [move for group in self.task.copies for move in group]

        def act() -> None:
            for move in before:
                move.happen()
            barrier.one.arrive(32)

        self.machine.move(act)

    def fence_async_shared(self) -> None:
        for allocation in self._allocations:
            writers = allocation.writers
            writers[(writers == self.task.number) | (writers == COPIED)] = OPEN

    def warpgroup_mma(self, a: Any, b: Shared, acc: Value, is_async: bool = False) -> Value:
        found = Value.coming(acc.layout, acc.shape)

        def multiply() -> None:
            left = a.read_by_hardware() if isinstance(a, Shared) else a.data
            found.comes(acc.data + left.float() @ b.read_by_hardware().float())

        self.task.products.append(multiply)
        return found

    def warpgroup_mma_wait(self, num_outstanding: int = 0, deps: Sequence[Value] = ()) -> Any:
        products = self.task.products
        while len(products) > plain(num_outstanding):
            products.pop(0)()
        self.machine.pause()
        return deps[0] if len(deps) == 1 else tuple(deps)


class Function:
    """A function of a kernel."""

    def __init__(self, jit: Any, scopes: Scopes) -> None:
        self.source, self._scopes = jit.fn, scopes
        self._function: Callable[..., Any] | None = None

    @property
    def function(self) -> Callable[..., Any]:
        if self._function is None:
            scope = self._scopes.of(self.source)
            self._function = FunctionType(self.source.__code__, scope, self.source.__name__, self.source.__defaults__)
        return self._function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class Scopes:
    """The globals of functions, with what they call replaced."""

    def __init__(self, language: Language, waiting: Waiting) -> None:
        self._language = language
        self._scopes: dict[int, dict[str, Any]] = {}
        self._functions: dict[int, Function] = {}
        named = {
            warpgroup_mma: waiting.warpgroup_mma, warpgroup_mma_wait: waiting.warpgroup_mma_wait,
            fence_async_shared: waiting.fence_async_shared, gluon_names.load_block: waiting.load_block,
            gluon_names.store_block: waiting.store_block, gluon_names.load_elements: waiting.load_elements,
            gluon_names.viewed: Shared.viewed, gdc_wait: waiting.gdc_wait,
            gdc_launch_dependents: waiting.gdc_launch_dependents,
            triton.language.debug_barrier: nothing, gl: language, triton.language: language, mbarrier: waiting,
            tma: waiting, async_copy: waiting,
        }  # fmt: skip
        language.extra = SimpleNamespace(cuda=waiting)
        self._named = {id(key): value for key, value in named.items()}

    def of(self, source: Any) -> dict[str, Any]:
        names = source.__globals__
        found = self._scopes.get(id(names))
        if found is None:
            found = self._scopes[id(names)] = {}
            found.update({name: self._replaced(value) for name, value in names.items()})
            found["range"] = self._language.range
        return found

    def function(self, jit: Any) -> Function:
        return self._functions.setdefault(id(jit.fn), Function(jit, self))

    def _replaced(self, value: Any) -> Any:
        if id(value) in self._named:
            return self._named[id(value)]
        if hasattr(value, "fn") and not isinstance(value, ModuleType):
            return self.function(value)
        return plain(value)


def nothing(*_: Any) -> None:
    """Of warps that run in one thread."""


class Stream:
    """Launches of kernels, which `run` interprets side by side."""

    def __init__(self, seed: int) -> None:
        self._machine = Machine(seed)
        self._language = Language(self._machine)
        self._scopes = Scopes(self._language, Waiting(self._machine, self._language.allocations))
        self._launches: list[Launch] = []

    def kernel(self, jit: Any) -> Any:
        """Something to launch as `kernel[grid](*args, **constants)`."""
        return Launchable(self, jit)

    def add(self, jit: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> None:
        function, values = self._scopes.function(jit), [self._given(arg) for arg in args]
        overlaps = bool(constants.get("PDL"))
        body = partial(function, *values, **constants)
        self._launches.append(Launch(jit.fn.__name__, grid, overlaps, body))

    def run(self) -> None:
        launches, self._launches = self._launches, []
        self._machine.run(launches)

    def _given(self, arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            self._language.tensors.append(arg)
            return Value(torch.tensor(0), None, Pointer(arg))
        if isinstance(arg, tuple):
            parts = [self._given(part) for part in arg]
            return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
        if hasattr(arg, "base"):
            return Descriptor(arg)
        return arg if arg is None else self._language.value(arg)


class Launchable:
    """A kernel of a stream."""

    def __init__(self, stream: Stream, jit: Any) -> None:
        self._stream, self._jit = stream, jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self._stream.add(self._jit, grid, args, constants)
