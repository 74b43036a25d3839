"""Launches Triton kernels in a few microseconds of host time.

Stage: run time, below the Triton bodies. `kernel[grid](...)` examines every argument at each launch, 20 to 60 us where
there are many. A `Launcher` keeps compiled kernels under a key of its own and calls their C entry directly; the first
launch under a key goes through `kernel[grid]`, which compiles, so a key only has to be finer than Triton's. It holds:
    device, num_warps, num_stages, pdl, registers, together, names and values of the constants;
    of a tensor: dtype, device and address modulo 16;
    of what TMA moves: dtype, device and block;
    of an int: its value; of an int parameter in `do_not_specialize`: whether it fits 32 bits.
Ints that change from batch to batch belong in `do_not_specialize`, or each new value costs one plain launch. Triton
knobs are read at the first launch under a key.

Plain launches all the way: interpreted kernels, a Triton without the internals used here (logged once), and while
launch hooks (profilers) are set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fxlora.kernels.entry import Entry, entry
from fxlora.kernels.triton_helpers import INTERPRET

MAX_KERNELS = 512
"""Keys kept for one choice of constants and options; past that they are dropped and made again."""

Bind = Callable[[tuple[Any, ...]], tuple[object, tuple[object, ...]]]
"""Arguments of fixed kinds -> (key, arguments with addresses for tensors)."""

# torch.cuda.current_stream makes an object for what is one number; CPU builds of torch have neither.
raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream
)

_runtime = triton.knobs.runtime


class Fixed:
    """Arguments whose tensors never move nor change dtype, examined once. They stay alive as long as this does.

    args: what one parameter of a kernel gets, a tensor or a tuple (nested at will) of tensors, ints and None.
    """

    __slots__ = ("args", "call", "token")

    def __init__(self, args: object) -> None:
        kind = _kind(args)
        if kind is None:
            raise TypeError(f"fixed arguments are tensors, ints and None in tuples, not {args!r}")
        self.args = args
        key, (self.call,) = _binder((kind,))((args,))
        self.token = _tokens.setdefault((kind, key), object())


_tokens: dict[object, object] = {}


class Described:
    """An argument that TMA reads or writes: a tensor and the block of each copy. Triton gets a `TensorDescriptor`.

    Strides are multiples of 16 bytes but for the last, which is 1; the address is one too. layout: of the block in
    shared memory, for kernels in Gluon; it follows from dtype and block.
    """

    __slots__ = ("base", "block", "key", "layout", "shape", "strides")
    padding = "zero"  # what Triton's launcher asks a descriptor for
    round_f32_to_tf32 = False

    def __init__(self, base: torch.Tensor, block: tuple[int, ...], layout: Any = None) -> None:
        self.base = base
        self.block = block
        self.layout = layout
        self.shape: tuple[int, ...] = tuple(base.shape)
        self.strides: tuple[int, ...] = base.stride()
        self.key = (base.dtype, base.get_device(), block)

    def at(self, base: Any) -> Described:
        """The same memory layout at another address, that of `base` (only its `data_ptr` is asked)."""
        moved = Described.__new__(Described)
        moved.base, moved.block, moved.layout, moved.shape, moved.strides, moved.key = (
            base, self.block, self.layout, self.shape, self.strides, self.key,
        )  # fmt: skip
        return moved


class _Family(NamedTuple):
    """Compiled kernels of one choice of constants and options."""

    kinds: tuple[object, ...]
    bind: Bind
    kernels: dict[object, Entry]


class Variant:
    """One choice of constants and options of a kernel, for launches that come again and again."""

    __slots__ = ("constants", "device", "family", "launcher", "options")

    def __init__(self, launcher: Launcher, constants: Mapping[str, object], options: tuple[Any, ...]) -> None:
        self.launcher = launcher
        self.constants = constants
        self.options = options
        self.device: int = options[0]
        self.family: _Family | None = None

    def launch(self, grid: tuple[int, ...], args: tuple[object, ...]) -> None:
        """As `Launcher.launch`."""
        found, call = (None, ()) if hooked() else self.entry_of(args)
        if found is None:
            self.launcher.launch_plain(grid, args, self)
        else:
            dims = len(grid)
            y, z = grid[1] if dims > 1 else 1, grid[2] if dims > 2 else 1
            found.enter(grid[0], y, z, raw_stream(self.device), call)

    def entry_of(self, args: tuple[object, ...]) -> tuple[Entry | None, tuple[object, ...]]:
        """The compiled kernel for such arguments, if it is known, and what it gets for these."""
        family = self.family
        if family is None:
            return None, ()
        try:
            key, call = family.bind(args)
        except (AttributeError, TypeError, ValueError):  # arguments of other kinds
            return None, ()
        return family.kernels.get(key), call


class Launcher:
    """Launches of one kernel, whose constexpr parameters come last."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._variants: dict[object, Variant] = {}
        self._interpreted = bool(INTERPRET.value)
        self._direct = not self._interpreted and not getattr(kernel, "pre_run_hooks", None)

    def launch(
        self,
        grid: tuple[int, ...],
        args: tuple[object, ...],
        constants: Mapping[str, object],
        *,
        device: int,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        registers: int | None = None,
        together: bool = False,
    ) -> None:
        """One launch on the current stream of GPU `device`, which has to be the current GPU.

        args: one for each parameter that is not constexpr: a tensor, an int, None, a Fixed, a Described, or a tuple
        (a NamedTuple, where the kernel reads its fields by name) of these. The
        kind of each may depend on the constants only. constants: by name, in the kernel's order. pdl: the launch may
        begin before the one ahead of it ends; the kernel says where it waits. registers: most of a thread.
        together: no program starts before all of them can, which is CUDA's cooperative launch.
        """
        variant = self.variant(
            constants, device=device, num_warps=num_warps, num_stages=num_stages, pdl=pdl, registers=registers,
            together=together,
        )  # fmt: skip
        variant.launch(grid, args)

    def variant(
        self,
        constants: Mapping[str, object],
        *,
        device: int,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        registers: int | None = None,
        together: bool = False,
    ) -> Variant:
        """The choice of constants and options, the same object at each call."""
        options = (device, num_warps, num_stages, pdl, registers, together, tuple(constants), tuple(constants.values()))
        found = self._variants.get(options)
        if found is None:
            found = self._variants[options] = Variant(self, constants, options)
        return found

    def launch_plain(self, grid: tuple[int, ...], args: tuple[object, ...], variant: Variant) -> None:
        """The launch as Triton does it; keeps the compiled kernel."""
        _, num_warps, num_stages, pdl, registers, together, *_ = variant.options
        keywords = {} if self._interpreted else {"num_warps": num_warps, "num_stages": num_stages}
        if pdl and not self._interpreted:
            keywords["launch_pdl"] = True
        if registers and not self._interpreted:
            keywords["maxnreg"] = registers
        if together and not self._interpreted:
            keywords["launch_cooperative_grid"] = True
        compiled = self.kernel[grid](*map(_plain, args), **variant.constants, **keywords)
        if pdl and not self._interpreted:
            prefer_shared_memory(compiled)
        if self._direct:
            self._keep(compiled, args, variant)

    def _keep(self, compiled: Any, args: tuple[object, ...], variant: Variant) -> None:
        found = entry(compiled, len(variant.constants))
        if found is None:
            self._direct = False
            return
        kinds = kinds_of(args, self.kernel.params)
        if kinds is None:
            return
        family = variant.family
        if family is None:
            family = variant.family = _Family(kinds, _binder(kinds), {})
        if family.kinds == kinds:
            if len(family.kernels) >= MAX_KERNELS:
                family.kernels.clear()
            family.kernels[family.bind(args)[0]] = found


def prefer_shared_memory(compiled: Any) -> None:
    """Multiprocessors that run this kernel give all they can to shared memory, from the next launch on.

    They divide it from L1 for the kernel that comes first, and a kernel that needs more cannot join it there: the next
    one would start when this one has ended. Kernels that hardly use it live on L1 and are left alone. See
    `cuFuncSetAttribute` in the CUDA driver API.
    """
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    function, shared = getattr(compiled, "function", None), getattr(getattr(compiled, "metadata", None), "shared", 0)
    library = _driver_library()
    if library is not None and isinstance(function, int) and shared >= _MUCH_SHARED:
        library.cuFuncSetAttribute(ctypes.c_void_p(function), _PREFERRED_SHARED_MEMORY_CARVEOUT, _ALL)


_PREFERRED_SHARED_MEMORY_CARVEOUT, _ALL = 9, 100  # CUfunction_attribute; percent
_MUCH_SHARED = 16384  # bytes of a program


@cache
def _driver_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:  # no NVIDIA driver, or not Linux: launches only overlap less
        return None


def hooked() -> bool:
    """Someone wants to hear of launches, or changes how kernels are compiled."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook  # each a chain of hooks, or one
    if (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)):
        return True
    return getattr(_runtime, "add_stages_inspection_hook", None) is not None


def _plain(arg: object) -> object:
    """What Triton itself gets."""
    if isinstance(arg, Fixed):
        return arg.args
    if isinstance(arg, Described) and arg.layout is not None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Laid

        return Laid(arg.base, list(arg.shape), list(arg.strides), list(arg.block), arg.layout)
    if isinstance(arg, Described):
        return TensorDescriptor(arg.base, arg.shape, arg.strides, list(arg.block))
    if isinstance(arg, tuple):
        return getattr(arg, "_make", tuple)(map(_plain, arg))  # a NamedTuple stays one
    return arg


def kinds_of(args: Sequence[object], parameters: Sequence[Any]) -> tuple[object, ...] | None:
    """Kind of each argument; None when one of them is something that no binder reads."""
    kinds = tuple(
        _kind(arg, bool(parameter.do_not_specialize)) for arg, parameter in zip(args, parameters, strict=False)
    )
    return None if None in kinds or len(kinds) != len(args) else kinds


def _kind(arg: object, unspecialized: bool = False) -> object:
    """tensor, int, free (an int whose value Triton ignores), none, fixed, described, or a tuple of these."""
    if isinstance(arg, torch.Tensor):
        return "tensor"
    if isinstance(arg, Fixed | Described):
        return "fixed" if isinstance(arg, Fixed) else "described"
    if isinstance(arg, tuple):
        kinds = tuple(map(_kind, arg))
        return None if None in kinds else kinds
    if type(arg) is int:
        return "free" if unspecialized else "int"
    return "none" if arg is None else None


def _binder(kinds: tuple[object, ...]) -> Bind:
    """A function that takes such arguments apart, compiled from text: a loop over kinds takes three times as long."""
    numbers, statements, keys = count(), [], []

    def visit(kind: object) -> tuple[str, str]:
        """Pattern that names the leaves, expression of what the kernel gets."""
        if isinstance(kind, tuple):
            parts = [visit(part) for part in kind]
            pattern, value = ("".join(f"{part[side]}, " for part in parts) for side in (0, 1))
            return (f"({pattern})", f"({value})") if parts else ("[]", "()")
        name = f"a{next(numbers)}"
        if kind == "tensor":
            statements.append(f"p{name} = {name}.data_ptr()")
            keys.append(f"{name}.dtype, {name}.get_device(), p{name} & 15")
            return name, f"p{name}"
        key = {"free": f"{name} >> 31", "fixed": f"{name}.token", "described": f"{name}.key"}
        keys.append(key.get(str(kind), name))
        return name, f"{name}.call" if kind == "fixed" else name

    pattern, value = visit(kinds)
    body = [f"{pattern} = args", *statements, f"return ({''.join(f'{key}, ' for key in keys)}), {value}"]
    scope: dict[str, Any] = {}
    exec("\n    ".join(["def bind(args):", *body]), scope)
    return scope["bind"]
