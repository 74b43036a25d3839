"""Op calls like an earlier one, without the Python that prepares a call.

Stage: run time, ahead of everything in the Triton bodies of `lora_linear` and `lora_experts`. What a call launches
follows from shapes, strides, dtypes and alignment of its tensors; only addresses differ from call to call. The second
call of a kind leaves a function behind: it looks whether a call is of that kind, allocates outputs and scratch, and
enters the kernels with their addresses, which takes a third of the host's time. Weights and biases are expected where
they were. What is not of the kind, and what launches in ways not recorded here, goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import count, groupby
from operator import itemgetter
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from fxlora.kernels.launch import Described, Fixed, hooked, raw_stream
from fxlora.kernels.triton_helpers import current_gpu

if TYPE_CHECKING:
    from fxlora.kernels.call import PlannedCall
    from fxlora.kernels.entry import Native

Outputs = list[torch.Tensor]
Replay = Callable[..., Outputs | None]
"""(x, row_slots, row_coeffs, segments, weights, biases) -> the outputs, None if the call is not of this kind."""

Value = tuple[bool, Any]
"""(True, expression) of what moves, (False, value) of what does not."""

MOST_ADDRESSES = 64
"""Kept for one tensor that TMA moves."""

MOST_KEYS, MOST_ALIKE = 64, 4
"""Keys remembered for a group, and functions for one key. Of more, those used longest ago are forgotten."""

AT_ONCE = 8
"""Functions made under one key as soon as one is wanted; each further one after twice as many calls as the one before,
so that calls which are never alike cost little, however long they go on."""

# What code compiled by inductor allocates with, a third of the time of new_empty: sizes, strides, dtype.
_EMPTY: dict[str, Callable[..., torch.Tensor]] = {
    kind: found
    for kind in ("cpu", "cuda")
    if (found := getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}", None))
}

# What dynamo checks the tensors of a compiled graph with, all of them in one call: type, dtype, device, sizes, strides,
# whether they require grad.
_Guards: Callable[..., Any] | None = getattr(torch._C._dynamo.guards, "TensorGuards", None)

_ROOM = 512
"""Bytes that parts of the scratch begin at multiples of."""


class _Alike:
    """What is known of calls under one key: functions, the last used first; calls that none of them served since one
    was made, how many are wanted until the next is made, and how many were made."""

    __slots__ = ("functions", "made", "missed", "wanted")

    def __init__(self) -> None:
        self.functions: list[Replay] = []
        self.missed, self.wanted, self.made = 0, 2.0, 0  # a call that comes once needs no function

    def add(self, function: Replay | None, last: Replay | None) -> None:
        """One more function, None if nothing repeats such a call. last: the one that served last is not forgotten."""
        if function is None:
            self.wanted = float("inf")
            return
        kept = [other for other in self.functions if other is last]
        others = [other for other in self.functions if other is not last]
        self.functions = [function, *kept, *others][:MOST_ALIKE]
        self.made += 1
        self.missed, self.wanted = 0, 2.0 ** max(0, self.made - AT_ONCE)


class Replays:
    """The functions of one group. Threads may call it at a time: lists are replaced whole, keys may be gone."""

    def __init__(self) -> None:
        self._alike: dict[object, _Alike] = {}  # the last used at the end
        self._last: Replay | None = None  # calls of one kind mostly follow each other

    def run(
        self,
        x: torch.Tensor,
        row_slots: torch.Tensor,
        row_coeffs: torch.Tensor | None,
        segments: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> Outputs | None:
        """The outputs of a call whose kind is known and which goes to the current GPU, else None."""
        last = self._last
        outputs = last(x, row_slots, row_coeffs, segments, weights, biases) if last is not None else None
        if outputs is not None:
            return outputs
        key = (x.shape, x.stride(), row_slots.shape, row_slots.stride())
        alike = self._alike.get(key)
        if alike is None:
            return None
        for function in alike.functions:
            outputs = None if function is last else function(x, row_slots, row_coeffs, segments, weights, biases)
            if outputs is not None:
                alike.functions = [function, *[other for other in alike.functions if other is not function]]
                self._alike.pop(key, None)
                self._alike[key] = alike
                self._last = function
                return outputs
        return None

    def learn(self, inputs: tuple[Any, ...], call: PlannedCall, outputs: Outputs) -> None:
        """Remember a call that was made, with the arguments of `run`; the second one of a kind is kept."""
        x, row_slots = inputs[:2]
        key = (x.shape, x.stride(), row_slots.shape, row_slots.stride())
        alike = self._alike.pop(key, None) or _Alike()
        if len(self._alike) >= MOST_KEYS:
            self._alike.pop(next(iter(self._alike)), None)
        self._alike[key] = alike
        alike.missed += 1
        if alike.missed >= alike.wanted and not hooked():
            alike.add(_Writer(call, outputs, *inputs).function(), self._last)


class _NotRecordedError(Exception):
    """A call that no function can repeat."""


class _Writer:
    """Writes the function of one call. Constants are names in its scope, so that calls alike share their text."""

    def __init__(
        self,
        call: PlannedCall,
        outputs: Outputs,
        x: torch.Tensor,
        row_slots: torch.Tensor,
        row_coeffs: torch.Tensor | None,
        segments: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
    ) -> None:
        self._call, self._outputs = call, outputs
        self._x, self._coeffs, self._segments = x, row_coeffs, segments
        self._moving = {"x": x, "row_slots": row_slots, "row_coeffs": row_coeffs, "segments": segments}
        self._weights, self._biases = weights, biases
        self._scope: dict[str, Any] = {
            "__name__": __name__, "hooked": hooked, "raw_stream": raw_stream, "current_gpu": current_gpu,
        }  # fmt: skip
        self._numbers = count()

    def function(self) -> Replay | None:
        """None where the call launched what cannot be repeated."""
        if not self._call.is_recorded:
            return None
        try:
            launches = [self._launch(plan, args) for plan, args in self._call.launches]
        except _NotRecordedError:
            return None
        if not launches:
            return None
        lines = [f"if {' or '.join(self._differences())}:", "    return None"]
        lines += [*self._unpacked(), *self._guards(), *self._allocations(), *launches]
        lines.append(f"return [{', '.join(f'y{i}' for i in range(len(self._outputs)))}]")
        head = "def replay(x, row_slots, row_coeffs, segments, weights, biases):"
        exec(_compiled("\n    ".join([head, *lines])), self._scope)
        return self._scope["replay"]

    def _constant(self, value: object) -> str:
        name = f"c{next(self._numbers)}"
        self._scope[name] = value
        return name

    def _differences(self) -> list[str]:
        """What shows at once that a call is of another kind, or to be made on another GPU than the current one."""
        tests = [f"row_coeffs is {'not ' if self._coeffs is None else ''}None"]
        tests += [f"len(weights) != {len(self._weights)}", f"len(biases) != {len(self._biases)}"]
        return tests + ([f"current_gpu() != {self._constant(self._x.get_device())}"] if self._x.is_cuda else [])

    def _unpacked(self) -> list[str]:
        lines = [f"p_{name} = {name}.data_ptr()" for name, tensor in self._moving.items() if tensor is not None]
        names = [f"w{i}" for i in range(len(self._weights))], [f"b{i}" for i in range(len(self._biases))]
        return [*lines, f"{', '.join(names[0])}, = weights", f"{', '.join(names[1])}, = biases"]

    def _guards(self) -> list[str]:
        """What differs from call to call of one kind is addresses of aligned tensors, nothing else."""
        tests = []
        moving = {name: tensor for name, tensor in self._moving.items() if tensor is not None}
        fixed = [(f"w{i}", weight) for i, weight in enumerate(self._weights)]
        for i, bias in enumerate(self._biases):
            tests.append(f"b{i} is {'not ' if bias is None else ''}None")
            fixed += [] if bias is None else [(f"b{i}", bias)]
        checked = {**moving, **dict(fixed)}
        tests.append(f"not {self._constant(_check_of(list(checked.values())))}({', '.join(checked)})")
        tests += self._misplaced(moving)
        tests += [f"{name}.data_ptr() != {self._constant(tensor.data_ptr())}" for name, tensor in fixed]
        return [f"if {' or '.join([*tests, 'hooked()'])}:", "    return None"]

    def _misplaced(self, moving: dict[str, torch.Tensor]) -> list[str]:
        """Tests for another alignment; one alone where all are aligned."""
        if not any(tensor.data_ptr() & 15 for tensor in moving.values()):
            return [f"({' | '.join(f'p_{name}' for name in moving)}) & 15"]
        return [f"p_{name} & 15 != {self._constant(tensor.data_ptr() & 15)}" for name, tensor in moving.items()]

    def _allocations(self) -> list[str]:
        lines = []
        for i, output in enumerate(self._outputs):
            lines.append(f"y{i} = {self._empty(output.shape, output.stride(), output.dtype)}")
            lines.append(f"p_y{i} = y{i}.data_ptr()")
        total = sum(_room(part) for part in self._call.scratch)
        if total:
            lines += [f"s = {self._empty((total,), (1,), torch.uint8)}", "p_s = s.data_ptr()"]
        return [*lines, f"stream = raw_stream({self._constant(self._call.device_index)})"]

    def _empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> str:
        """Expression of a new tensor on the device of x, which is the current one."""
        empty = _EMPTY.get(self._x.device.type)
        if empty is None:
            return f"x.new_empty({self._constant(tuple(shape))}, dtype={self._constant(dtype)})"
        parts = (empty, tuple(shape), tuple(strides), dtype)
        function, *rest = map(self._constant, parts)
        return f"{function}({', '.join(rest)})"

    def _launch(self, plan: Any, args: tuple[object, ...]) -> str:
        entry, _ = plan.variant.entry_of(args)
        if entry is None:
            raise _NotRecordedError
        grid = ", ".join(self._constant(side) for side in (*plan.grid, 1, 1)[:3])
        native = entry.native
        if native is None:
            return f"{self._constant(entry.enter)}({grid}, stream, ({self._row(map(self._value, args))},))"
        head, tail = ([(False, value) for value in part] for part in (native.head, native.tail))
        parts = [*self._unfolded(native, args), *tail]
        rest = f"{self._row(head)}, ({self._row(parts)},)" if native.packs else self._row([*head, *parts])
        return f"{self._constant(native.call)}({grid}, stream, {rest})"

    def _row(self, values: Iterable[Value]) -> str:
        """Expressions in a row; those that stay and follow each other are one tuple."""
        texts: list[str] = []
        for moving, group in groupby(values, itemgetter(0)):
            found = tuple(value for _, value in group)
            texts += found if moving else [f"*{self._constant(found)}"]
        return ", ".join(texts)

    def _unfolded(self, native: Native, args: tuple[object, ...]) -> list[Value]:
        """What the C function gets."""
        values, numbers = [], count()
        for arg in args:
            if not isinstance(arg, Described):
                values.append(self._value(arg))
                continue
            found = _Unfolded(native, next(numbers), arg)
            moving, name = self._owner(arg.base)
            if moving:
                values.append((True, f"*{self._constant(found)}[p_{name}]"))
            else:
                values += [(False, value) for value in found[arg.base.data_ptr()]]
        return values

    def _value(self, arg: object) -> Value:
        if isinstance(arg, Fixed):
            return False, arg.call
        if isinstance(arg, torch.Tensor):
            return self._address(arg)
        if isinstance(arg, Described):
            moving, name = self._owner(arg.base)
            described = arg.at(_Address(arg.base.data_ptr()))
            return (True, f"{self._constant(described)}.at({name})") if moving else (False, described)
        if isinstance(arg, tuple):
            parts = [self._value(part) for part in arg]
            if not any(moving for moving, _ in parts):
                return False, tuple(value for _, value in parts)
            return True, f"({self._row(parts)},)"
        return False, arg

    def _owner(self, tensor: torch.Tensor) -> tuple[bool, str]:
        """(whether it moves, name) of the input or output that begins where this tensor does."""
        at = tensor.data_ptr()
        for name, moving in self._moving.items():
            if moving is not None and moving.data_ptr() == at:
                return True, name
        for i, output in enumerate(self._outputs):
            if output.data_ptr() == at:
                return True, f"y{i}"
        stays = (*self._weights, *self._biases, *self._call.resident)
        if any(fixed is not None and fixed.data_ptr() == at for fixed in stays):
            return False, ""
        raise _NotRecordedError

    def _address(self, tensor: torch.Tensor) -> tuple[bool, Any]:
        if not tensor.numel():
            return False, 0
        begin, storage = 0, tensor.untyped_storage().data_ptr()
        for part in self._call.scratch:
            if part.untyped_storage().data_ptr() == storage and part.numel():
                return True, f"p_s + {self._constant(begin + tensor.data_ptr() - storage)}"
            begin += _room(part)
        moving, name = self._owner(tensor)
        return (True, f"p_{name}") if moving else (False, tensor.data_ptr())


def _check_of(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether tensors are like these in all but address and content."""
    if _Guards is not None:
        return _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    expected = [_form(tensor) for tensor in tensors]
    return lambda *found: [_form(tensor) for tensor in found] == expected


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


class _Unfolded(dict[int, tuple[object, ...]]):
    """By address, what a kernel's C function gets for memory like this that TMA moves. Allocators give the same few
    addresses again and again."""

    def __init__(self, native: Native, number: int, described: Described) -> None:
        super().__init__()
        self._unfold, self._number = native.unfold, number
        self._described = described.at(_Address(described.base.data_ptr()))

    def __missing__(self, address: int) -> tuple[object, ...]:
        if len(self) >= MOST_ADDRESSES:
            self.clear()
        found = self[address] = self._unfold(self._number, self._described.at(_Address(address)))
        return found


class _Address:
    """Stands for a tensor that this function must not keep alive."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _room(part: torch.Tensor) -> int:
    return -(-part.untyped_storage().nbytes() // _ROOM) * _ROOM


@lru_cache(maxsize=1024)
def _compiled(text: str) -> CodeType:
    return compile(text, "<replay of an op call>", "exec")
