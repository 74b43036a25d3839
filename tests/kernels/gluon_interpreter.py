"""Kernels in Gluon without a GPU: their Python, over blocks that are torch tensors (gluon_values.py) and a machine that
decides when what happens (gluon_machine.py).

`interpreted(kernel, seed)` stands where a compiled kernel would. Programs of a launch run side by side, partitions of
each too; copies by TMA and cp.async happen at any time between the asking and the wait for them, products of the matrix
unit as late as may be. So what is read or overwritten too early, waited for in vain or never waited for shows in the
result, as an error, or as a hang that says who waits. What warps of one partition do to each other does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from tests.kernels.gluon_machine import Barrier, Machine, MisuseError, Move, Task
from tests.kernels.gluon_values import COPIED, OPEN, Allocation, Pointer, Shared, Value, plain, torch_dtype


class Layout(SimpleNamespace):
    """Any distributed layout: only its parent is ever asked for."""

    def __init__(self, *args: Any, **_: Any) -> None:
        super().__init__(parent=args[-1] if args else None)


class Descriptor:
    """What TMA moves."""

    def __init__(self, described: Any) -> None:
        self.base, self.block = described.base, list(getattr(described, "block_shape", ()) or described.block)
        self.layout = described.layout
        (dtype,) = {Pointer(self.base).element_ty}
        size = torch.Size(self.block).numel() * self.base.element_size()
        self.dtype, self.block_type = dtype, SimpleNamespace(shape=self.block, nbytes=size)

    def block_at(self, place: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a block lies in the tensor and in the block, as far as it lies in the tensor."""
        inside, within = [], []
        for first, length, size in zip(place, self.block, self.base.shape, strict=True):
            begin, end = min(max(first, 0), size), min(max(first + length, 0), size)
            inside.append(slice(begin, end))
            within.append(slice(begin - first, begin - first + max(end - begin, 0)) if end > begin else slice(0, 0))
        return tuple(inside), tuple(within)


class Language:
    """Gluon's language, and as much of Triton's as kernels in Gluon call, of one launch."""

    BlockedLayout = SliceLayout = NVMMADistributedLayout = DotOperandLayout = Layout
    SwizzledSharedLayout = DistributedLinearLayout = Layout

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.tensors: list[torch.Tensor] = []  # that addresses may lie in
        self.allocations: list[Allocation] = []  # of shared memory

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)  # dtypes, layouts of shared memory, constexpr

    # Scalars and blocks

    def value(self, found: Any, dtype: torch.dtype | None = None) -> Value:
        found = plain(found)
        if isinstance(found, Value):
            return found
        kinds = {bool: torch.bool, int: torch.int32, float: torch.float32}
        return Value(torch.tensor(found, dtype=dtype or kinds[type(found)]))

    to_tensor = value

    def program_id(self, axis: int) -> Value:
        return self.value(self.machine.current.program)

    def num_programs(self, axis: int) -> Value:
        return self.value(self.machine.programs)

    def range(self, *bounds: Any) -> Iterator[Value]:
        """Of a loop when the kernel runs."""
        return (self.value(i) for i in range(*map(int, map(plain, bounds))))

    def static_range(self, *bounds: Any) -> Iterable[int]:
        return range(*map(plain, bounds))

    def static_assert(self, condition: Any, message: str = "") -> None:
        assert condition, message

    def cdiv(self, a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    def arange(self, first: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(first, end, dtype=torch.int32), layout)

    def full(self, shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Value:
        fill = self.value(value).data
        return Value(torch.empty([plain(side) for side in shape], dtype=torch_dtype(dtype)).copy_(fill), layout)

    def zeros(self, shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
        return self.full(shape, 0, dtype, layout)

    def zeros_like(self, block: Value) -> Value:
        return Value(torch.zeros_like(block.data), block.layout)

    def where(self, condition: Any, a: Any, b: Any) -> Value:
        condition, a, b = (self.value(found) for found in (condition, a, b))
        dtypes = [side.data.dtype for side in (a, b)]
        blocks = [side.data.dtype for side in (a, b) if side.data.dim()]
        wider = blocks[0] if len(blocks) == 1 else torch.promote_types(*dtypes)
        layout = a.layout or b.layout or condition.layout
        return Value(torch.where(condition.data, a.data.to(wider), b.data.to(wider)), layout, a.pointer or b.pointer)

    def minimum(self, a: Any, b: Any) -> Value:
        return self.value(a)._with(self.value(b), torch.minimum)

    def maximum(self, a: Any, b: Any) -> Value:
        return self.value(a)._with(self.value(b), torch.maximum)

    def sum(self, block: Value, axis: int) -> Value:
        return Value(block.data.sum(axis, dtype=block.data.dtype))

    def max(self, block: Value, axis: int) -> Value:
        return Value(block.data.amax(axis))

    def min(self, block: Value, axis: int) -> Value:
        return Value(block.data.amin(axis))

    def associative_scan(self, block: Value, axis: int, combine: Any) -> Value:
        assert combine.function.__name__ == "add"
        return Value(block.data.cumsum(axis, dtype=block.data.dtype), block.layout)

    def histogram(self, block: Value, bins: int, mask: Value | None = None, layout: Any = None) -> Value:
        found = block.data if mask is None else block.data[mask.data]
        return Value(torch.bincount(found, minlength=plain(bins))[: plain(bins)].to(torch.int32), layout)

    def gather(self, block: Value, index: Value, axis: int) -> Value:
        return Value(torch.gather(block.data, axis, index.data.long()), index.layout)

    def split(self, block: Value) -> tuple[Value, Value]:
        left, right = block.data.unbind(-1)
        return Value(left), Value(right)

    def reshape(self, block: Value, shape: Sequence[int]) -> Value:
        return block.reshape(shape)

    def permute(self, block: Value, order: Sequence[int]) -> Value:
        return Value(block.data.permute(tuple(order)))

    def expand_dims(self, block: Value, axis: int) -> Value:
        return Value(block.data.unsqueeze(plain(axis)))

    def convert_layout(self, block: Value, layout: Any, assert_trivial: bool = False) -> Value:
        return Value(block.data, layout)

    # Global memory

    def load(self, at: Value, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Value:
        self.machine.pause()
        pointer, mask = self._pointer(at), self.value(mask).data
        offsets, mask = torch.broadcast_tensors(at.data, mask)
        fill = self.value(other).data.to(pointer.memory.dtype)
        return Value(torch.where(mask, pointer.memory[pointer.places(offsets, mask)], fill), at.layout)

    def store(self, at: Value, value: Any, mask: Any = True) -> None:
        self.machine.pause()
        pointer = self._pointer(at)
        data = self.value(value).data.to(pointer.memory.dtype)
        offsets, data, mask = torch.broadcast_tensors(at.data, data, self.value(mask).data)
        pointer.memory[pointer.places(offsets, mask)[mask]] = data[mask]

    def atomic_xchg(self, at: Value, value: Any, sem: str = "", scope: str = "") -> None:
        self.store(at, value)

    def _pointer(self, at: Value) -> Pointer:
        if at.pointer is None:
            raise MisuseError("what is loaded or stored is no pointer")
        return at.pointer

    def inline_asm_elementwise(self, asm: str, constraints: str, args: Sequence[Value], dtype: Any, **_: Any) -> Any:
        """The few things that kernels say in PTX."""
        if "prefetch" in asm or "fence.acq_rel" in asm:
            return args[0]
        at, value, mask = (*args, args[-1])[:3]
        where, own = torch.broadcast_tensors(at.data, mask.data != 0)
        if "st.relaxed" in asm:
            for memory, places in self._memories(where[own], value.data.dtype):
                memory[places] = value.data[own]
            self.machine.pause()
            return value
        assert "ld.relaxed" in asm
        found = torch.zeros(where.shape, dtype=torch_dtype(dtype))

        def is_there() -> bool:
            for memory, places in self._memories(where[own], found.dtype):
                found[own] = memory[places]
            return not bool((found.view(torch.int16)[own] == -1).any())

        self.machine.wait(is_there, "h")
        return Value(found, at.layout)

    def _memories(self, addresses: torch.Tensor, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The tensor that all of these addresses lie in, and their places there."""
        if not addresses.numel():
            return []
        for tensor in self.tensors:
            pointer, first = Pointer(tensor), tensor.untyped_storage().data_ptr()
            inside = (addresses >= first) & (addresses < first + tensor.untyped_storage().nbytes())
            if tensor.dtype == dtype and bool(inside.all()):
                return [(pointer.memory, (addresses - first) // tensor.element_size())]
        raise MisuseError("addresses outside of every tensor")

    # Shared memory, and who waits for whom

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if isinstance(layout, BarrierLayout):
            return Barriers([Barrier(f"barrier {i} of {list(shape)}") for i in range(plain(shape[0]))])
        found = Shared.new(plain(dtype), shape, plain(layout), lambda: self.machine.current.number)
        self.allocations.append(found.allocation)
        return found

    def warp_specialize(self, partitions: Sequence[tuple[Any, Sequence[Any]]], warps: Any, registers: Any) -> None:
        (own, args), *others = partitions
        program = self.machine.current.program
        tasks = []
        for i, (function, given) in enumerate(others):
            name = f"{function.function.__name__} {i} of program {program}"
            tasks.append(self.machine.start(lambda call=function, given=given: call(*given), program, name))
        own(*args)
        self.machine.wait(lambda: all(task.done for task in tasks), "its other warps")


class BarrierLayout:
    """Of memory for barriers."""


class Barriers:
    """Memory for barriers, of which one alone is itself."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: Any) -> Barriers:
        return Barriers([self.barriers[int(i)]])

    @property
    def one(self) -> Barrier:
        (found,) = self.barriers
        return found


class Waiting:
    """Gluon's mbarrier, tma, async_copy and the matrix unit."""

    MBarrierLayout = BarrierLayout

    def __init__(self, machine: Machine, allocations: list[Allocation]) -> None:
        self.machine, self._allocations = machine, allocations

    @property
    def task(self) -> Task:
        return self.machine.current

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
        inside, within = source.block_at([int(part) for part in place])
        to.poison()

        def act() -> None:
            block = torch.zeros(source.block, dtype=source.base.dtype)
            block[within] = source.base[inside]
            to.write(block.reshape(to.shape))
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
        self._language, self._waiting = language, waiting
        self._scopes: dict[int, dict[str, Any]] = {}
        self._functions: dict[int, Function] = {}
        named = {
            warpgroup_mma: waiting.warpgroup_mma, warpgroup_mma_wait: waiting.warpgroup_mma_wait,
            fence_async_shared: waiting.fence_async_shared, gluon_names.load_block: waiting.load_block,
            gluon_names.store_block: waiting.store_block, gluon_names.load_elements: waiting.load_elements,
            gluon_names.viewed: Shared.viewed, gdc_wait: nothing, gdc_launch_dependents: nothing,
            triton.language.debug_barrier: nothing, gl: language, triton.language: language, mbarrier: waiting,
            tma: waiting, async_copy: waiting,
        }  # fmt: skip
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
    """Of programs that do not overlap with those of another launch, and of warps that run in one thread."""


def interpreted(kernel: Any, seed: int) -> Any:
    """Something to launch as `kernel[grid](*args, **constants)`."""

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **constants: launch(kernel, grid, args, constants, seed)

    return Launch()


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any], seed: int) -> None:
    machine = Machine(seed, grid[0])
    language = Language(machine)
    waiting = Waiting(machine, language.allocations)
    function = Scopes(language, waiting).function(kernel)

    def given(arg: Any) -> Any:
        if isinstance(arg, torch.Tensor):
            language.tensors.append(arg)
            return Value(torch.tensor(0), None, Pointer(arg))
        if isinstance(arg, tuple):
            parts = [given(part) for part in arg]
            return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
        if hasattr(arg, "base"):
            return Descriptor(arg)
        return arg if arg is None else language.value(arg)

    values = [given(arg) for arg in args]
    machine.run([lambda: function(*values, **constants) for _ in range(grid[0])])
