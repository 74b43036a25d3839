"""Blocks, pointers and shared memory of kernels in Gluon, as torch tensors on the CPU.

Registers are not modelled, so distributed layouts mean nothing. Shared memory is: bytes where the layout puts them (but
for the swizzle, a permutation that all views of one width share), which hold NaN until something comes, and which a
store by threads leaves closed to TMA and to the matrix unit until these threads make a fence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.kernels.gluon_machine import MisuseError

TORCH = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "int1": torch.bool,
    "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip
TRITON = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32, torch.float64: gl.float64,
    torch.bool: gl.int1, torch.int16: gl.int16, torch.int32: gl.int32, torch.int64: gl.int64,
}  # fmt: skip


def plain(value: Any) -> Any:
    """A constexpr's value."""
    return value.value if isinstance(value, gl.constexpr) else value


def torch_dtype(dtype: Any) -> torch.dtype:
    return TORCH[plain(dtype).name]


class Pointer:
    """What a pointer points into."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.memory = tensor.as_strided((size,), (1,), 0)
        self.first = tensor.storage_offset()

    @property
    def element_ty(self) -> Any:
        return TRITON[self.memory.dtype]

    def places(self, offsets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Elements of `memory`; 0 where the mask is not set."""
        at = torch.where(mask, offsets + self.first, 0)
        if bool(((at < 0) | (at >= len(self.memory))).any()):
            raise MisuseError(f"an address outside of its tensor, which has {len(self.memory)} elements")
        return at


class Value:
    """A block of registers, or a scalar. Of a pointer, data are offsets from where it points."""

    def __init__(self, data: torch.Tensor, layout: Any = None, pointer: Pointer | None = None) -> None:
        self._data: torch.Tensor | None = data
        self.layout, self.pointer = layout, pointer

    @classmethod
    def coming(cls, layout: Any, shape: Sequence[int]) -> Value:
        """What a product will be, once it is waited for."""
        found = cls(torch.empty(tuple(shape)), layout)
        found._shape, found._data = list(shape), None
        return found

    def comes(self, data: torch.Tensor) -> None:
        self._data = data

    @property
    def data(self) -> torch.Tensor:
        if self._data is None:
            raise MisuseError("a product is read that nobody waited for")
        return self._data

    @property
    def shape(self) -> list[int]:
        return self._shape if self._data is None else list(self._data.shape)

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.layout)

    @property
    def dtype(self) -> Any:
        return self.pointer or TRITON[self.data.dtype]

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        wanted = torch_dtype(dtype)
        if self.pointer is not None:
            return Value((self.data + self.pointer.first) * self.pointer.memory.element_size()
                         + self.pointer.memory.data_ptr(), self.layout)  # fmt: skip
        return Value(self.data.view(wanted) if bitcast else self.data.to(wanted), self.layout)

    def reshape(self, *shape: Any) -> Value:
        """Of sides, or of a list of them."""
        return Value(self.data.reshape(tuple(map(plain, shape[0] if isinstance(shape[0], Sequence) else shape))))

    def permute(self, *order: int) -> Value:
        return Value(self.data.permute(*order))

    @property
    def T(self) -> Value:
        return Value(self.data.T)

    def __getitem__(self, index: Any) -> Value:
        return Value(self.data[index], None, self.pointer)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    __int__ = __index__

    def _with(self, other: Any, operation: Callable[..., torch.Tensor], swapped: bool = False) -> Value:
        other = plain(other)
        own, theirs, pointer, layout = self.data, other, self.pointer, self.layout
        if isinstance(other, Value):
            theirs, pointer, layout = other.data, pointer or other.pointer, layout or other.layout
            wider = torch.promote_types(own.dtype, theirs.dtype)
            own, theirs = own.to(wider), theirs.to(wider)
        return Value(operation(theirs, own) if swapped else operation(own, theirs), layout, pointer)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Any) -> Value:
        return self._with(other, torch.add)

    def __radd__(self, other: Any) -> Value:
        return self._with(other, torch.add)

    def __sub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a - b, swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._with(other, torch.mul)

    def __rmul__(self, other: Any) -> Value:
        return self._with(other, torch.mul)

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, quotient)

    def __rfloordiv__(self, other: Any) -> Value:
        return self._with(other, quotient, swapped=True)

    def __mod__(self, other: Any) -> Value:
        return self._with(other, torch.fmod)

    def __rmod__(self, other: Any) -> Value:
        return self._with(torch.tensor(other, dtype=torch.int32), torch.fmod, swapped=True)

    def __and__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a & b)

    def __rand__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a & b)

    def __or__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a | b)

    def __xor__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a ^ b)

    def __lshift__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a << b)

    def __lt__(self, other: Any) -> Value:
        return self._with(other, torch.lt)

    def __le__(self, other: Any) -> Value:
        return self._with(other, torch.le)

    def __gt__(self, other: Any) -> Value:
        return self._with(other, torch.gt)

    def __ge__(self, other: Any) -> Value:
        return self._with(other, torch.ge)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._with(other, torch.eq)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return self._with(other, torch.ne)


def quotient(a: Any, b: Any) -> torch.Tensor:
    """As integers are divided on a GPU, towards zero."""
    a, b = (part if isinstance(part, torch.Tensor) else torch.tensor(part, dtype=torch.int32) for part in (a, b))
    return torch.div(a, b, rounding_mode="trunc")


OPEN, COPIED = -1, -2
"""No writer: TMA or the matrix unit may read it. Written by cp.async: so they may after a fence of whoever waited."""


class Allocation:
    """Shared memory of a program."""

    def __init__(self, size: int, writer: Callable[[], int]) -> None:
        self.writer = writer  # who runs now
        self.bytes = torch.full((size,), 0xFF, dtype=torch.uint8)
        self.writers = torch.full((size,), OPEN, dtype=torch.int64)  # who stored this, with no fence since


class Shared:
    """A view of shared memory. at: the byte of each element."""

    def __init__(self, allocation: Allocation, at: torch.Tensor, dtype: Any) -> None:
        self.allocation, self.at, self.dtype = allocation, at, dtype
        self._size = torch_dtype(dtype).itemsize

    @classmethod
    def new(cls, dtype: Any, shape: Sequence[int], layout: Any, writer: Callable[[], int]) -> Shared:
        at = bytes_of(shape, dtype, layout)
        return cls(Allocation(at.numel() * torch_dtype(dtype).itemsize, writer), at, dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.at.shape)

    def index(self, i: Any) -> Shared:
        return Shared(self.allocation, self.at[int(i)], self.dtype)

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.allocation, self.at.narrow(dim, int(start), plain(length)), self.dtype)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.allocation, self.at.permute(tuple(order)), self.dtype)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.allocation, self.at.reshape(tuple(shape)), self.dtype)

    def viewed(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        at = bytes_of(shape, dtype, layout)
        if at.numel() * torch_dtype(dtype).itemsize > len(self.allocation.bytes):
            raise MisuseError(f"a view of {list(shape)} is larger than its memory")
        return Shared(self.allocation, at, dtype)

    def read(self) -> torch.Tensor:
        return self.allocation.bytes.view(torch_dtype(self.dtype))[self.at // self._size]

    def write(self, data: torch.Tensor) -> None:
        self.allocation.bytes.view(torch_dtype(self.dtype))[self.at // self._size] = data

    def poison(self) -> None:
        """Something is on its way here."""
        self._each_byte(self.allocation.bytes, 0xFF)

    def close(self, writer: int) -> None:
        self._each_byte(self.allocation.writers, writer)

    def read_by_hardware(self) -> torch.Tensor:
        if bool((self.allocation.writers[self.at] != OPEN).any()):
            raise MisuseError("TMA or the matrix unit reads what threads stored, without a fence between")
        return self.read()

    def load(self, layout: Any) -> Value:
        return Value(self.read(), layout)

    def store(self, value: Value) -> None:
        """By the threads of the current task."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise MisuseError(f"{value.dtype} {value.shape} is stored to {self.dtype} {self.shape}")
        self.write(value.data)
        self.close(self.allocation.writer())

    def _each_byte(self, memory: torch.Tensor, value: Any) -> None:
        for i in range(self._size):
            memory[self.at + i] = value


def bytes_of(shape: Sequence[int], dtype: Any, layout: Any) -> torch.Tensor:
    """Where a layout puts elements: rows of panels as wide as the swizzle, which is left out."""
    shape, size = [plain(side) for side in shape], torch_dtype(dtype).itemsize
    width = getattr(layout, "swizzle_byte_width", 0) // size
    places = torch.arange(torch.Size(shape).numel())
    if width and shape[-1] > width:
        *outer, rows, columns = shape
        places = places.reshape(*outer, columns // width, rows, width).movedim(-3, -2)
    return places.reshape(shape) * size
