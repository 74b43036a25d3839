"""The ops random programs are made of. Each takes a program and a value and adds one value, or raises CannotStep.

In a careful program an op works only along dims that carry no request; in a wild one along any.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from tests.toys.base import Sizes
from tests.toys.programs import CannotStep, Chooser, Dim, Program, Value, pair

Op = Callable[[Program, Value], None]


def along(program: Program, value: Value, at_least: int = 1) -> int:
    """One dim the op may work along."""
    free = value.free(program.careful, at_least)
    if not free:
        raise CannotStep("no dim to work along")
    return program.chooser.pick(free)


def changed(value: Value, dim: int, *into: Dim) -> list[Dim]:
    """The dims of a value with one of them replaced."""
    return [*value.dims[:dim], *into, *value.dims[dim + 1 :]]


def unary(program: Program, value: Value) -> None:
    ops: list[Callable[..., Any]] = [torch.tanh, F.silu, torch.neg, torch.abs, torch.sin, torch.square]
    op = program.chooser.pick(ops)
    program.keep(program.call(torch.tanh, program.call(op, pair(value))), value.dims)


def binary(program: Program, value: Value) -> None:
    same = [other for other in program.values if fits(program, other, value)]
    other = program.chooser.pick(same)
    ops: list[Callable[..., Any]] = [torch.add, torch.sub, torch.mul, torch.maximum, torch.where, torch.lerp]
    op = program.chooser.pick(ops)
    if op is torch.where:
        made = program.call(op, program.call(torch.gt, pair(other), pair(value)), pair(value), pair(other))
    elif op is torch.lerp:
        made = program.call(op, pair(value), pair(other), 0.25)
    else:
        made = program.call(op, pair(value), pair(other))
    program.keep(made, value.dims)


def fits(program: Program, other: Value, value: Value) -> bool:
    """Whether two values may meet elementwise: equal dims in a careful program, equal shapes in a wild one."""
    if program.careful:
        return other.dims == value.dims
    return other.tensor.shape == value.tensor.shape


def add_constant(program: Program, value: Value) -> None:
    free = set(value.free(program.careful))
    shape = [size if dim in free else 1 for dim, size in enumerate(value.tensor.shape)]
    program.keep(program.call(torch.add, pair(value), program.constant(program.random(*shape))), value.dims)


def permute(program: Program, value: Value) -> None:
    left, order = list(range(value.tensor.dim())), []
    while left:
        order.append(left.pop(left.index(program.chooser.pick(left))))
    program.keep(program.call("permute", pair(value), *order), [value.dims[dim] for dim in order])


def merge(program: Program, value: Value) -> None:
    if value.tensor.dim() < 2:
        raise CannotStep("one dim")
    dim = program.chooser.pick(range(value.tensor.dim() - 1))
    dims = [*value.dims[:dim], value.dims[dim] + value.dims[dim + 1], *value.dims[dim + 2 :]]
    program.keep(program.call("reshape", pair(value), *[program.size_of(d) for d in dims]), dims)


def split(program: Program, value: Value) -> None:
    wide = [dim for dim, atoms in enumerate(value.dims) if len(atoms) > 1]
    if not wide:
        raise CannotStep("no merged dim")
    dim = program.chooser.pick(wide)
    dims = changed(value, dim, *[(atom,) for atom in value.dims[dim]])
    program.keep(program.call("reshape", pair(value), *[program.size_of(d) for d in dims]), dims)


def narrow(program: Program, value: Value) -> None:
    dim = along(program, value, 2)
    size = value.tensor.shape[dim]
    start = program.chooser.pick(range(size - 1))
    stop = program.chooser.pick(range(start + 1, size))
    index = (*[slice(None)] * dim, slice(start, stop))
    program.keep(program.call(operator.getitem, pair(value), index), changed(value, dim, program.fresh(stop - start)))


def select(program: Program, value: Value) -> None:
    if value.tensor.dim() < 3:
        raise CannotStep("too few dims")
    dim = along(program, value)
    program.keep(program.call(torch.select, pair(value), dim, -1), changed(value, dim))


def reduce(program: Program, value: Value) -> None:
    dim = along(program, value)
    ops: list[Callable[..., Any]] = [torch.mean, torch.sum, torch.amax, torch.logsumexp]
    op = program.chooser.pick(ops)
    keepdim = value.tensor.dim() < 3 or program.chooser.pick([True, False])
    into = [program.fresh(1)] if keepdim else []
    program.keep(program.call(op, pair(value), dim=dim, keepdim=keepdim), changed(value, dim, *into))


def centre(program: Program, value: Value) -> None:
    dim = along(program, value)
    middle = program.call(torch.mean, pair(value), dim=dim, keepdim=True)
    program.keep(program.call(torch.sub, pair(value), middle), value.dims)


def scan(program: Program, value: Value) -> None:
    dim = along(program, value)
    ops: list[Callable[..., Any]] = [torch.softmax, torch.cumsum]
    op = program.chooser.pick(ops)
    program.keep(program.call(op, pair(value), dim), value.dims)


def first_of_two(program: Program, value: Value) -> None:
    dim = along(program, value)
    ops: list[Callable[..., Any]] = [torch.sort, torch.cummax]
    op = program.chooser.pick(ops)
    made = program.call(op, pair(value), dim=dim)
    program.keep(program.call(operator.getitem, made, 0), value.dims)


def largest(program: Program, value: Value) -> None:
    dim = along(program, value, 2)
    made = program.call(torch.topk, pair(value), 2, dim=dim)
    program.keep(program.call(operator.getitem, made, 0), changed(value, dim, program.fresh(2)))


def gather_sorted(program: Program, value: Value) -> None:
    dim = along(program, value)
    order = program.call(torch.argsort, pair(value), dim=dim)
    program.keep(program.call(torch.gather, pair(value), dim, order), value.dims)


def constant_order(program: Program, value: Value) -> None:
    dim = along(program, value)
    order = torch.randperm(value.tensor.shape[dim], generator=program.generator)
    index = program.constant(order)
    if program.chooser.pick([True, False]):
        made = program.call(torch.index_select, pair(value), dim, index)
    else:
        made = program.call(operator.getitem, pair(value), (*[slice(None)] * dim, index))
    program.keep(made, changed(value, dim, program.fresh(len(order))))


def moved(program: Program, value: Value) -> None:
    dim = along(program, value)
    made = program.call(torch.roll, pair(value), 1, dim) if program.chooser.pick([0, 1]) else None
    program.keep(made or program.call(torch.flip, pair(value), [dim]), value.dims)


def cat_with(program: Program, value: Value) -> None:
    dim = along(program, value)
    other = program.chooser.pick([other for other in program.values if fits(program, other, value)])
    made = program.call(torch.cat, [pair(value), pair(other)], dim)
    program.keep(made, changed(value, dim, program.fresh(2 * value.tensor.shape[dim])))


def stack_with(program: Program, value: Value) -> None:
    if value.tensor.dim() > 3:
        raise CannotStep("too many dims")
    dim = program.chooser.pick(range(value.tensor.dim() + 1))
    other = program.chooser.pick([other for other in program.values if fits(program, other, value)])
    dims = [*value.dims[:dim], program.fresh(2), *value.dims[dim:]]
    program.keep(program.call(torch.stack, [pair(value), pair(other)], dim), dims)


def expand(program: Program, value: Value) -> None:
    if value.tensor.dim() > 3:
        raise CannotStep("too many dims")
    dim = program.chooser.pick(range(value.tensor.dim()))
    dims = [*value.dims[:dim], program.fresh(2), *value.dims[dim:]]
    made = program.call(torch.unsqueeze, pair(value), dim)
    program.keep(program.call("expand", made, *[program.size_of(d) for d in dims]), dims)


def weigh(program: Program, value: Value) -> None:
    last = value.tensor.dim() - 1
    if last not in value.free(program.careful):
        raise CannotStep("the last dim carries requests")
    weight = program.constant(program.random(value.tensor.shape[-1], 4) / value.tensor.shape[-1] ** 0.5)
    program.keep(program.call(torch.matmul, pair(value), weight), changed(value, last, program.fresh(4)))


def attend(program: Program, value: Value) -> None:
    """Attention of a value with itself over its last but one dim; a careful program keeps requests before it."""
    rank = value.tensor.dim()
    if rank < 2 or (program.careful and not {rank - 1, rank - 2} <= set(value.free(True))):
        raise CannotStep("requests among the keys")
    if program.chooser.pick([True, False]):
        made = program.call(F.scaled_dot_product_attention, pair(value), pair(value), pair(value))
    else:
        scores = program.call(torch.matmul, pair(value), program.call(torch.transpose, pair(value), -1, -2))
        made = program.call(torch.matmul, program.call(torch.softmax, scores, -1), pair(value))
    program.keep(made, value.dims)


def contract(program: Program, value: Value) -> None:
    """einsum of a 3-D value with itself: a Gram matrix per leading index, applied to the value."""
    if value.tensor.dim() != 3 or (program.careful and not {1, 2} <= set(value.free(True))):
        raise CannotStep("not three dims, or requests among the summed ones")
    gram = program.call(torch.einsum, "bth,bsh->bts", pair(value), pair(value))
    mixed = program.call(torch.einsum, "bts,bsh->bth", gram, pair(value))
    program.keep(program.call(torch.tanh, mixed), value.dims)


def write_through_view(program: Program, value: Value) -> None:
    """Copy, write a part of the copy from another part through a view, and go on with the copy."""
    dim = along(program, value, 2)
    half = value.tensor.shape[dim] // 2
    copy = program.call("clone", pair(value))
    target = program.call("narrow", copy, dim, half, half)
    source = program.call("narrow", pair(value), dim, 0, half)
    program.call(program.chooser.pick(["copy_", "add_", "mul_"]), target, source)
    program.keep(copy, value.dims)


def permute_and_return(program: Program, value: Value) -> None:
    """A constant permutation of a dim (also one of requests) around an op, undone after it."""
    dim = program.chooser.pick(range(value.tensor.dim()))
    size = value.tensor.shape[dim]
    order = torch.randperm(size, generator=program.generator)
    back = order.argsort() if program.careful or program.chooser.pick([True, False]) else order
    made = program.call(torch.index_select, pair(value), dim, program.constant(order))
    made = program.call(torch.sin, made)
    program.keep(program.call(torch.index_select, made, dim, program.constant(back)), value.dims)


def dispatch_and_return(program: Program, value: Value) -> None:
    """Sort the leading dim by a score, run a site on the sorted rows, put the rows back."""
    if value.tensor.dim() != 2 or program.sites or 1 not in value.free(program.careful):
        raise CannotStep("rows of features only, one site")
    order = program.call(torch.argsort, program.call(torch.sum, pair(value), dim=-1))
    rows = program.call(operator.getitem, pair(value), order)
    floor = len(program.values)
    served = program.site(program.keep(rows, value.dims))
    back = program.call(torch.argsort, order)
    back = back if program.careful or program.chooser.pick([True, False]) else order
    if program.careful:
        del program.values[floor:]
        program.floor = floor
    program.keep(program.call(operator.getitem, pair(served), back), served.dims)


def repeat_rows(program: Program, value: Value) -> None:
    """Each index of the leading dim twice, then the mean of the two copies."""
    wide = program.call(torch.repeat_interleave, pair(value), 2, dim=0)
    shape = [program.size_of(dim) for dim in value.dims]
    paired = program.call("reshape", program.call(torch.tanh, wide), shape[0], 2, *shape[1:])
    program.keep(program.call(torch.mean, paired, dim=1), value.dims)


def misread(program: Program, value: Value) -> None:
    """Reshape to the sizes in another order."""
    sizes = list(value.tensor.shape)[::-1]
    if program.careful or len(sizes) < 2:
        raise CannotStep("mixes requests")
    program.keep(program.call("reshape", pair(value), *sizes), [program.fresh(size) for size in sizes])


def add_part(program: Program, value: Value) -> None:
    """Add the first index of a dim to all."""
    dim = along(program, value)
    program.keep(program.call(torch.add, pair(value), program.call("narrow", pair(value), dim, 0, 1)), value.dims)


def add_other_layout(program: Program, value: Value) -> None:
    """Add the transpose of a value whose two dims happen to be equal."""
    sizes = value.tensor.shape
    equal = [(i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j]]
    if program.careful or not equal:
        raise CannotStep("no equal dims")
    i, j = program.chooser.pick(equal)
    program.keep(program.call(torch.add, pair(value), program.call(torch.transpose, pair(value), i, j)), value.dims)


OPS: Sequence[Op] = (
    unary, binary, add_constant, permute, merge, split, narrow, select, reduce, centre, scan, first_of_two, largest,
    gather_sorted, constant_order, moved, cat_with, stack_with, expand, weigh, attend, contract, write_through_view,
    permute_and_return, dispatch_and_return, repeat_rows, misread, add_part, add_other_layout,
)  # fmt: skip


def draw(chooser: Chooser, sizes: Sizes, careful: bool, symbolic: bool, length: int) -> tuple[fx.GraphModule, Program]:
    """A random program with one or two sites: length ops, a site, a few ops, at times a second site."""
    program = Program(chooser, sizes, careful, symbolic)
    for part in (length, length // 2):
        for _ in range(part):
            program.step(OPS)
        if program.sites == 0 or chooser.pick([True, False]):
            program.step([site])
    if program.sites == 0:
        program.site(program.values[0])
    return program.finish(program.values[-1:]), program


def site(program: Program, value: Value) -> None:
    program.site(value)
