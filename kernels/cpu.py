"""CPU bodies of the ops: base result of the whole batch first, then the adapter rows in place.

Stage: run time, behind `ops.py`. Promises: a row without an adapter keeps the bits of `F.linear` / `F.embedding` on the
whole input; at a fixed batch shape a row's bits do not depend on the slots of other rows. For that, adapters are never
merged into one GEMM, and all GEMMs of a batch shape have the same row count (MKL picks its kernels, and how it splits
work over threads, by shape: with 16 threads that shows in the bits even between 64 and 100 rows):
    up to SINGLE_ROWS rows in the batch: one matrix-vector product per row (also the fastest: 1 us, where a GEMM of
        any size wakes a second thread for 10 to 80 us);
    above: GEMMs over blocks of `block_rows(T)` rows of one slot: adjacent rows in place, in views of the output; the
        slot's remaining rows gathered, padded to a block and scattered back. A shrink is A x^T: there a row's bits
        do not depend on its place in the block, in x A^T they do (MKL, 3 to 16 threads, K from 576 up).
Half-precision inputs are computed in fp32 and rounded once more at the end.

Letters: T rows, J slots per row, K in-features, N out-features, R rank, S slots, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fxlora.kernels.checks import check_members, check_rows
from fxlora.kernels.errors import OpInputError
from fxlora.kernels.extent import Extent
from fxlora.kernels.registry import SitePool, pools_of
from fxlora.kernels.segments import slot_starts_at, slots_of, tile_count_at

SINGLE_ROWS = 16
"""Batches of up to this many rows go row by row."""

EXPAND_COLUMNS = 16
"""Fewest columns at which an expand gives a row the same bits wherever it lies (MKL with AVX-512; at 7 it does not)."""


class Rows(NamedTuple):
    """Rows of one slot and one j that go through one GEMM: a block of adjacent ones, or a gathered, padded block."""

    slot: int
    j: int
    start: int
    stop: int  # rows start .. stop, adjacent; -1 when gathered
    padded: torch.Tensor  # int64 [block_rows(T)], the gathered rows, then the first one again
    rows: torch.Tensor  # int64 [n], the gathered rows


class HostPlan(NamedTuple):
    """Work of one row map. `single` for batches of up to SINGLE_ROWS rows, else `blocks`; both in order of j."""

    max_adapters: int
    single: tuple[tuple[int, int, int], ...]  # (row, j, slot)
    blocks: tuple[Rows, ...]


class Shrink(NamedTuple):
    """How h = x A^T of one slot is had: for one row, and for a block of rows."""

    one: Callable[[torch.Tensor, Extent], torch.Tensor]
    rows: Callable[[torch.Tensor, Extent], torch.Tensor]


Extents = Sequence[Extent | None] | Mapping[int, Extent | None]

Member = tuple[torch.Tensor, Extents]
"""Output [T, N] and the extents of its pool, by the slots of the plan."""

SHRINK_X = Shrink(
    one=lambda x_K, extent: torch.mv(extent.a, x_K),
    rows=lambda x_nK, extent: torch.mm(extent.window, x_nK.t())[extent.ranks].t(),
)
_SHRINK_IDS = Shrink(
    one=lambda token, extent: extent.a[token],
    rows=lambda ids_n, extent: extent.a.index_select(0, ids_n),
)


def block_rows(num_rows: int) -> int:
    """Rows of every GEMM in a batch of `num_rows` rows: few calls for long batches, little padding for short ones."""
    return next((block for bound, block in ((64, 16), (256, 32), (512, 64)) if num_rows <= bound), 128)


def host_plan(segments: torch.Tensor, row_slots: torch.Tensor) -> HostPlan:
    """The plan of these segments. Cached by content, so a tensor refilled in place can never be served an old plan."""
    content = ctypes.string_at(segments.data_ptr(), segments.numel() * 4)
    return _parse(content, *row_slots.shape)


@lru_cache(maxsize=64)
def _parse(content: bytes, num_rows: int, width: int) -> HostPlan:
    entries = num_rows * width
    max_adapters = slots_of(len(content) // 4, entries)
    segments = torch.frombuffer(bytearray(content), dtype=torch.int32)
    order = segments[:entries].long()
    starts = segments[slot_starts_at(entries) : tile_count_at(entries, max_adapters)].tolist()
    used = [slot for slot in range(max_adapters) if starts[slot + 1] > starts[slot]]
    if num_rows <= SINGLE_ROWS:
        found = [
            (e // width, e % width, slot) for slot in used for e in order[starts[slot] : starts[slot + 1]].tolist()
        ]
        return HostPlan(max_adapters, tuple(sorted(found, key=lambda item: (item[1], item[0]))), ())
    blocks: list[Rows] = []
    for j in range(width):
        for slot in used:
            entries_of_slot = order[starts[slot] : starts[slot + 1]]
            rows = entries_of_slot[entries_of_slot % width == j] // width
            blocks += cut(rows, slot, j, block_rows(num_rows))
    return HostPlan(max_adapters, (), tuple(blocks))


def cut(rows: torch.Tensor, slot: int, j: int, block: int) -> list[Rows]:
    """Whole blocks of adjacent rows, then everything else gathered. rows: int64 [n], ascending."""
    if not rows.numel():
        return []
    breaks = (rows.diff() != 1).nonzero().flatten().add(1).tolist()
    none, rest, blocks = rows[:0], [], []
    for begin, end in pairwise([0, *breaks, rows.numel()]):
        whole = end - (end - begin) % block
        first = int(rows[begin])
        starts = range(first, first + whole - begin, block)
        blocks += [Rows(slot, j, start, start + block, none, none) for start in starts]
        rest.append(rows[whole:end])
    gathered = torch.cat(rest)
    for part in gathered.split(block) if gathered.numel() else ():
        padded = torch.cat([part, part[:1].expand(block - part.numel())])
        blocks.append(Rows(slot, j, 0, -1, padded, part))
    return blocks


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> list[torch.Tensor]:
    """See `ops.lora_linear`."""
    pools = pools_of(group)
    check_rows(x.numel() // x.shape[-1], row_slots, row_coeffs)
    check_members(weights, pools)
    outputs = [F.linear(x, weight, bias).contiguous() for weight, bias in zip(weights, biases, strict=True)]
    x_TK = x.reshape(row_slots.shape[0], x.shape[-1]).contiguous()
    _add_adapters(outputs, pools, x_TK, row_slots, row_coeffs, segments, SHRINK_X)
    return outputs


def lora_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_logits`."""
    return lora_linear(x, [weight], [bias], row_slots, row_coeffs, segments, group)[0]


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_embedding`."""
    pools = pools_of(group)
    check_rows(ids.numel(), row_slots, row_coeffs)
    check_members([weight], pools)
    ids = ids.long()
    output = F.embedding(ids, weight).contiguous()
    _add_adapters([output], pools, ids.reshape(-1), row_slots, row_coeffs, segments, _SHRINK_IDS)
    return output


def _add_adapters(
    outputs: Sequence[torch.Tensor],
    pools: Sequence[SitePool | None],
    source: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    shrink: Shrink,
) -> None:
    """Adds every adapter's part to the outputs in place. source: what is shrunk, x [T, K] or ids [T]."""
    owned = [(output, pool) for output, pool in zip(outputs, pools, strict=True) if pool is not None]
    if not owned or not row_slots.numel():
        return
    plan = host_plan(segments, row_slots)
    for _, pool in owned:
        if len(pool.extents) != plan.max_adapters:
            raise OpInputError(f"segments were sorted for {plan.max_adapters} slots, the pool has {len(pool.extents)}")
    members = [(output.view(row_slots.shape[0], -1), pool.extents) for output, pool in owned]
    add = add_single if plan.single else add_blocks
    if outputs[0].dtype not in (torch.bfloat16, torch.float16):
        add(members, source, row_coeffs, plan, shrink)
        return
    wide = [(y_TN.float(), [as_fp32(extent) for extent in extents]) for y_TN, extents in members]
    add(wide, source.float() if source.is_floating_point() else source, row_coeffs, plan, shrink)
    for (y_TN, _), (y32_TN, _) in zip(members, wide, strict=True):
        y_TN.copy_(y32_TN)


def as_fp32(extent: Extent | None) -> Extent | None:
    """The extent with its views copied to fp32."""
    if extent is None:
        return None
    return extent._replace(a=extent.a.float(), window=extent.window.float(), b=extent.b.float())


def add_single(
    members: Sequence[Member], source: torch.Tensor, row_coeffs: torch.Tensor | None, plan: HostPlan, shrink: Shrink
) -> None:
    """Adds the adapters of `plan.single` to the outputs in place."""
    sources = source.unbind(0)
    coeffs = None if row_coeffs is None else row_coeffs.tolist()
    for y_TN, extents in members:
        ys = y_TN.unbind(0)
        for row, j, slot in plan.single:
            extent = extents[slot]
            if extent is not None:
                alpha = extent.scaling if coeffs is None else extent.scaling * coeffs[row][j]
                ys[row].addmv_(extent.b.t(), shrink.one(sources[row], extent), alpha=alpha)


def add_blocks(
    members: Sequence[Member], source: torch.Tensor, row_coeffs: torch.Tensor | None, plan: HostPlan, shrink: Shrink
) -> None:
    """Adds the adapters of `plan.blocks` to the outputs in place."""
    for slot, j, start, stop, padded, rows in plan.blocks:
        gathered = stop < 0
        block = source.index_select(0, padded) if gathered else source[start:stop]
        coeffs = None if row_coeffs is None else row_coeffs[:, j : j + 1]
        if coeffs is not None:
            coeffs = coeffs.index_select(0, padded) if gathered else coeffs[start:stop]
        for y_TN, extents in members:
            extent = extents[slot]
            if extent is None:
                continue
            h = shrink.rows(block, extent)
            h = h if coeffs is None else h * coeffs
            if gathered:
                y_nN = y_TN.index_select(0, padded)
                _expand_into(y_nN, h, extent)
                y_TN.index_copy_(0, rows, y_nN[: rows.numel()])
            else:
                _expand_into(y_TN[start:stop], h, extent)


def _expand_into(y_nN: torch.Tensor, h_nR: torch.Tensor, extent: Extent) -> None:
    if y_nN.shape[1] >= EXPAND_COLUMNS:
        y_nN.addmm_(h_nR, extent.b, alpha=extent.scaling)
        return
    b_RG = F.pad(extent.b, (0, EXPAND_COLUMNS - y_nN.shape[1]))
    y_nN.add_(torch.mm(h_nR, b_RG)[:, : y_nN.shape[1]], alpha=extent.scaling)
