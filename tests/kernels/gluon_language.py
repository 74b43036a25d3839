"""What kernels in Gluon say of blocks and of memory, and as much of Triton's language as launches before them say.

`Language` stands for `gl` and `tl` in interpreted kernels; gluon_interpreter.py has what waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.kernels.gluon_machine import Barrier, Machine, MisuseError
from tests.kernels.gluon_values import Allocation, Pointer, Shared, Value, plain, torch_dtype


class Layout(SimpleNamespace):
    """Any distributed layout: only its parent is ever asked for."""

    def __init__(self, *args: Any, **_: Any) -> None:
        super().__init__(parent=args[-1] if args else None)


class Language:
    """Gluon's language, and as much of Triton's as kernels in Gluon call, of one launch."""

    BlockedLayout = SliceLayout = NVMMADistributedLayout = DotOperandLayout = Layout
    SwizzledSharedLayout = DistributedLinearLayout = Layout

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.extra: Any = None  # what tl.extra.cuda is, see Scopes
        self.tensors: list[torch.Tensor] = []  # that addresses may lie in
        self.allocations: list[Allocation] = []  # of shared memory

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)  # dtypes, layouts of shared memory, constexpr

    # Scalars and blocks

    def value(self, found: Any) -> Value:
        found = plain(found)
        if isinstance(found, Value):
            return found
        kinds = {bool: torch.bool, int: torch.int32, float: torch.float32}
        return Value(torch.tensor(found, dtype=kinds[type(found)]))

    to_tensor = value

    def program_id(self, axis: int) -> Value:
        return self.value(self.machine.current.program[plain(axis)])

    def num_programs(self, axis: int) -> Value:
        return self.value(self.machine.current.launch.grid[plain(axis)])

    def range(self, *bounds: Any, num_stages: int = 1) -> Iterator[Value]:
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
        return self.cumsum(block, axis)

    def cumsum(self, block: Value, axis: int) -> Value:
        return Value(block.data.cumsum(axis, dtype=block.data.dtype), block.layout)

    def dot(self, a: Value, b: Value, acc: Value | None = None, out_dtype: Any = None, **_: Any) -> Value:
        found = (a.data @ b.data).to(torch_dtype(out_dtype or gl.float32))
        return Value(found if acc is None else acc.data + found)

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

    def max_constancy(self, block: Value, _: Any) -> Value:
        return block

    multiple_of = max_contiguous = max_constancy

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
        self.machine.changes += 1

    def atomic_add(self, at: Value, value: Any, sem: str = "", scope: str = "") -> Value:
        found = self.load(at)
        if value:
            self._pointer(at).memory[at.data + self._pointer(at).first] += plain(value)
            self.machine.changes += 1
        return found

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
        if "nanosleep" in asm:  # a look at a word in memory
            before = self.machine.changes
            self.machine.wait(lambda: self.machine.changes != before, "a word in memory")
            return args[0]
        at, value, mask = (*args, args[-1])[:3]
        where, own = torch.broadcast_tensors(at.data, mask.data != 0)
        if "st.relaxed" in asm:
            memory, places = self._places(where[own], value.data.dtype)
            memory[places] = value.data[own]
            self.machine.changes += 1
            self.machine.pause()
            return value
        assert "ld.relaxed" in asm
        found = torch.zeros(where.shape, dtype=torch_dtype(dtype))
        memory, places = self._places(where[own], found.dtype)

        def is_there() -> bool:
            found[own] = memory[places]
            return not bool((found.view(torch.int16)[own] == -1).any())

        self.machine.wait(is_there, "h")
        return Value(found, at.layout)

    def _places(self, addresses: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensor that all of these addresses lie in, any if there are none, and their places there."""
        for tensor in self.tensors:
            first, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            inside = (addresses >= first) & (addresses < first + size)
            if tensor.dtype == dtype and bool(inside.all()):
                return Pointer(tensor).memory, (addresses - first) // tensor.element_size()
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
        launch, program = self.machine.current.launch, self.machine.current.program
        tasks = []
        for i, (function, given) in enumerate(others):
            name = f"{function.function.__name__} {i} of program {program}"
            tasks.append(self.machine.start(partial(function, *given), launch, program, name))
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
