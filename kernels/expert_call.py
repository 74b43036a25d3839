"""One call of an expert weight on the device: its tensors as kernel arguments, shared by every kernel it launches.

Stage: run time, first thing in the Triton body of `lora_experts`. Letters: T rows, J slots per row, E experts, K
in-features, N out-features, S slots.
"""

# ruff: noqa: ANN001, RET505 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import PlannedCall, Plans
from fxlora.kernels.checks import check_experts, check_rows
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.expert_segments import (
    HIGH,
    high_count_at,
    high_slots_at,
    is_in_place,
    tile_bound,
    tile_count_at,
    tile_height,
    tile_slots_at,
)
from fxlora.kernels.expert_tiles import FEW_RANKS
from fxlora.kernels.launch import Fixed
from fxlora.kernels.overlap import can_overlap
from fxlora.kernels.replay import Replays
from fxlora.kernels.triton_helpers import strided


class ExpertSite:
    """What the pool of an expert weight contributes to every call: arguments that never move, examined once."""

    def __init__(self, pool: ExpertPool | None) -> None:
        self.pool = pool
        self.resident = [] if pool is None else [pool.a]
        self.plans: Plans = {}
        self._replays = (Replays(), Replays())
        self.max_adapters = 1 if pool is None else pool.rank.numel()
        self.h_width = 1 if pool is None else pool.rank_bound
        a_pool: tuple[torch.Tensor | None, ...] = (None,) * 5
        b_pool: tuple[torch.Tensor | None, ...] = (None,) * 4
        self.fixed: tuple[Fixed, ...] = ()  # A, B, their starts and steps, rank, scaling
        if pool is not None:
            starts = (pool.a_start, pool.a_step, pool.b_start, pool.b_step)
            self.fixed = tuple(map(Fixed, (pool.a, pool.b, *starts, pool.rank, pool.scaling)))
            a_pool = (pool.a, pool.a_start, pool.a_step, pool.rank, pool.scaling)
            b_pool = (pool.b, pool.b_start, pool.b_step, pool.rank)
        self.a_pool = Fixed(a_pool)
        self.b_pool = Fixed(b_pool)

    @property
    def highest_rank(self) -> int:
        """Of any adapter that is loaded now."""
        return 0 if self.pool is None else self.pool.highest_rank

    @property
    def replays(self) -> Replays:
        """Of calls with the bodies that serve the ranks of now."""
        return self._replays[self.highest_rank > FEW_RANKS]


class ExpertCall(PlannedCall):
    """x [T, K] with adjacent columns, weight, bias, row map, routing and pool, as kernels take them."""

    def __init__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        row_slots: torch.Tensor,
        row_coeffs: torch.Tensor | None,
        segments: torch.Tensor,
        site: ExpertSite,
    ) -> None:
        super().__init__()
        check_rows(x.shape[0], row_slots, row_coeffs)
        check_experts(x, weight, bias, segments, site.pool)
        self.rows, self.width = row_slots.shape
        self.num_experts, self.columns, self.features = weight.shape
        self.entries = self.rows * self.width
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.weight, self.bias, self.site, self.plans = weight, bias, site, site.plans
        self.segments, self.row_slots, self.row_coeffs = segments, row_slots, row_coeffs
        self.resident = site.resident
        self.has_bias, self.has_pool, self.has_coeffs = bias is not None, site.pool is not None, row_coeffs is not None
        self.slots = strided(row_slots)
        self.coeffs = self.slots if row_coeffs is None else strided(row_coeffs)
        self.in_place = is_in_place(segments.numel())
        self.height = tile_height(self.rows, self.num_experts)
        self.overlap = can_overlap(x.device)
        self.device_index = x.get_device()
        self.signature = (
            self.rows, self.width, self.features, self.columns, self.num_experts, self.has_bias, self.has_coeffs,
            self.in_place, x.dtype, self.device_index, self.overlap, self.height,
        )  # fmt: skip

    @property
    def bound(self) -> int:
        """TB of the table, HB with its tiles of HIGH rows."""
        return tile_bound(self.rows, self.num_experts, HIGH if self.height == HIGH else 16)

    @property
    def tiles_at(self) -> int:
        """Where the list of tiles begins in the table."""
        return (high_count_at if self.height == HIGH else tile_count_at)(self.rows, self.num_experts)

    @property
    def tile_slots_at(self) -> int:
        """Where the slots of the tiles begin in the table."""
        if self.height == HIGH:
            return high_slots_at(self.rows, self.num_experts, self.site.max_adapters)
        return tile_slots_at(self.rows, self.num_experts)

    @property
    def tiles(self) -> int:
        """Row tiles that always suffice."""
        return min(self.rows, tile_bound(self.rows, self.num_experts, self.height))

    @property
    def strided_bias(self) -> tuple[Any, ...]:
        """Pointer and strides of the bias."""
        return (None, 0, 0) if self.bias is None else strided(self.bias)


@triton.jit
def tiles_in_use(table) -> tl.tensor:
    """Row tiles of the batch. table: that of expert_segments.py, T, E, TB and where its list of tiles begins."""
    return tl.load(table[0] + table[4])


@triton.jit
def tile_record(tile, table) -> tl.tensor:
    """Expert of a row tile, its first position in row_order, where its expert's positions begin and end."""
    tile_experts_ptr = table[0] + table[4] + 1
    expert = tl.load(tile_experts_ptr + tile)
    first = tl.load(tile_experts_ptr + table[3] + tile)
    start = tl.load(table[0] + 2 * table[1] + expert)
    return expert, first, start, tl.load(table[0] + 2 * table[1] + expert + 1)


@triton.jit
def tile_item(item, tiles_n, table, HEIGHT: tl.constexpr) -> tl.tensor:
    """Expert, row tile, column tile, first position and end of an item, one tile of y.

    Experts one after another, then columns, then rows: what shares a block of W runs at the same time. Each round of
    the programs begins with another row tile, so that the last ones, often short, go to all programs in turn.
    """
    any_tile = item // tiles_n
    expert, any_first, start, end = tile_record(any_tile, table)
    first_tile = any_tile - (any_first - start) // HEIGHT
    tiles_m = tl.cdiv(end - start, HEIGHT)
    in_expert = item - first_tile * tiles_n
    in_column = in_expert % tiles_m
    down = (in_column + (item - in_column) // tl.num_programs(0)) % tiles_m
    return expert, first_tile + down, in_expert // tiles_m, start + down * HEIGHT, end


@triton.jit
def rows_of(positions, inside, table, IN_PLACE: tl.constexpr) -> tl.tensor:
    """Rows at these positions of row_order."""
    return positions if IN_PLACE else tl.load(table[0] + positions, mask=inside, other=0)


@triton.jit
def load_x(
    x, x_desc, first, rows, row_mask, first_k, num_features, BK: tl.constexpr, EVEN_K: tl.constexpr
) -> tl.tensor:
    """[BM, BK] of x, through TMA where there is a descriptor."""
    if x_desc is not None:
        return x_desc.load([first, first_k])
    else:
        ks = first_k + tl.arange(0, BK)
        mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (ks < num_features)[None, :]
        return tl.load(x[0] + rows[:, None] * x[1] + ks[None, :], mask=mask, other=0.0)
