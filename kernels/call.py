"""One call of a linear on the device: its tensors as kernel arguments, shared by every kernel the call launches.

Stage: run time, first thing in a Triton body. Letters: T rows, J slots per row, K in-features, N out-features.
"""

# ruff: noqa: C419 (a list costs less host time than a generator)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxlora.kernels.checks import check_rows
from fxlora.kernels.launch import Described, Fixed, Launcher, Variant
from fxlora.kernels.overlap import can_overlap
from fxlora.kernels.registry import Group, SitePool
from fxlora.kernels.replay import Replays
from fxlora.kernels.triton_helpers import INTERPRET, check_pool, expand_precision, strided, unit_of

PoolArguments = tuple[torch.Tensor | None, ...]

MOST_MEMBERS = 4
"""Members that share a launch: each one's code is compiled into it."""

MAX_PLANS = 512
"""Plans kept for a group, about a kilobyte each; past that the oldest are dropped, to be made again."""


class Plan(NamedTuple):
    """One launch: compiled constants, grid, and the numbers (or tuples of them) among its arguments that follow from
    the shapes."""

    variant: Variant
    grid: tuple[int, ...]
    numbers: tuple[Any, ...]


Plans = dict[object, tuple[object, Plan]]


class PlannedCall:
    """A call whose launches are planned once for all calls like it.

    device_index: GPU, -1 for interpreted kernels. overlap: whether that GPU has programmatic dependent launch, and with
    it TMA. plans: of the group that is called. signature: what a plan follows from, beside the launcher and the tile.
    resident: A and B of each pool, which never move.
    """

    device_index: int
    overlap: bool
    plans: Plans
    signature: tuple[object, ...]
    x: torch.Tensor
    resident: list[torch.Tensor]

    def __init__(self) -> None:
        self.launches: list[tuple[Plan, tuple[object, ...]]] = []  # with their arguments, in order
        self.scratch: list[torch.Tensor] = []
        self.is_recorded = True  # nothing was done on the device but these launches

    def launch(self, plan: Plan, *args: object) -> None:
        """Launches it with these arguments."""
        self.launches.append((plan, args))
        plan.variant.launch(plan.grid, args)

    def new_scratch(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory that nobody reads after the call."""
        scratch = self.x.new_empty(*shape, dtype=dtype)
        self.scratch.append(scratch)
        return scratch

    def tma_reads(self, matrix: torch.Tensor) -> bool:
        """Half precision, last dim adjacent, all else 16 bytes apart, on a GPU that has TMA."""
        if matrix.dtype == torch.float32 or not (self.overlap or INTERPRET.value):
            return False
        *strides, last = matrix.stride()
        return last == 1 and matrix.data_ptr() % 16 == 0 and not any([stride % 8 for stride in strides])

    def plan(self, launcher: Launcher, tile: object, make: Callable[[], Plan], step: object = 0) -> Plan:
        """What one launch of the call does not owe to its tensors, made once for calls of this shape and tile.

        make: returns it. step: tells apart the launches of one kernel in one call, or what else a plan follows from.
        """
        key = (launcher, self.signature, step)
        found = self.plans.get(key)
        if found is None or (found[0] is not tile and found[0] != tile):
            if len(self.plans) >= MAX_PLANS:
                self.plans.pop(next(iter(self.plans)), None)  # another thread may have
            found = self.plans[key] = (tile, make())
        return found[1]

    def planned(
        self,
        launcher: Launcher,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        num_warps: int,
        registers: int | None = None,
        together: bool = False,
        num_stages: int = 3,
        **constants: object,
    ) -> Plan:
        """A plan. With PDL the launch may start while the one before it on the stream still runs.

        registers: most of a thread. together: no program starts before all of them can.
        """
        options = {
            "num_warps": num_warps, "num_stages": num_stages, "pdl": bool(constants.get("PDL")), "registers": registers,
            "together": together,
        }  # fmt: skip
        return Plan(launcher.variant(constants, device=self.device_index, **options), grid, numbers)


class Members:
    """What a group's pools contribute to every call: arguments that never move, examined once.

    A member without a pool has None in the argument tuples and False in `has_pool`; kernels never touch those.
    """

    def __init__(self, pools: Group) -> None:
        self.pools = pools
        self.owned = [pool for pool in pools if pool is not None]
        self.resident = [matrix for pool in self.owned for matrix in (pool.a, pool.b)]
        self.has_pool = tuple(pool is not None for pool in pools)
        self.has_pools = bool(self.owned)
        self.h_width = max((pool.rank_bound for pool in self.owned), default=1)
        self.max_adapters = self.owned[0].start.numel() if self.owned else 1
        self.plans: Plans = {}
        self.replays = Replays()
        self.a_pools = Fixed(tuple(map(_a_arguments, pools)))  # A, start, rank, scaling of each member
        self.b_pools = Fixed(tuple([None if pool is None else pool.b for pool in pools]))


def _a_arguments(pool: SitePool | None) -> PoolArguments:
    return (None,) * 4 if pool is None else (pool.a, pool.start, pool.rank, pool.scaling)


class LinearCall(PlannedCall):
    """x [T, K] with adjacent columns, a weight and a bias for each member, row map and pools, as kernels take them."""

    def __init__(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        row_slots: torch.Tensor,
        row_coeffs: torch.Tensor | None,
        segments: torch.Tensor,
        members: Members,
    ) -> None:
        super().__init__()
        self.features = x.shape[-1]
        self.rows, self.width = row_slots.shape
        check_rows(x.numel() // self.features if self.features else self.rows, row_slots, row_coeffs)
        self.entries = self.rows * self.width
        for pool in members.owned:
            check_pool(pool, segments, self.entries)
        self.leading = x.shape[:-1]
        x_TK = x if x.dim() == 2 else x.reshape(self.rows, self.features)
        self.x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
        self.weights, self.biases, self.members, self.plans = weights, biases, members, members.plans
        self.segments, self.row_slots, self.row_coeffs = segments, row_slots, row_coeffs
        self.resident = members.resident
        self.widths = tuple([weight.shape[0] for weight in weights])
        self.has_bias = tuple([bias is not None for bias in biases])
        self.has_coeffs = row_coeffs is not None
        self.slots = strided(row_slots)
        self.coeffs = self.slots if row_coeffs is None else strided(row_coeffs)
        self.overlap = can_overlap(x.device)
        self.precision = expand_precision(x.dtype)
        self.device_index = x.get_device()
        row_strides = [weight.stride(0) for weight in weights]
        self.units = (unit_of(self.features, self.x.stride(0), *row_strides), unit_of(*self.widths))
        self.signature = (
            self.rows, self.width, self.features, self.widths, self.has_bias, self.has_coeffs, x.dtype,
            self.device_index, self.overlap, self.units,
        )  # fmt: skip

    @property
    def strided_weights(self) -> tuple[tuple[torch.Tensor | int, ...], ...]:
        """Pointer and both strides of each weight."""
        return tuple([strided(weight) for weight in self.weights])

    @property
    def strided_biases(self) -> tuple[tuple[torch.Tensor | int | None, ...], ...]:
        """Pointer and stride of each bias."""
        return tuple([(None, 0) if bias is None else (bias, bias.stride(0)) for bias in self.biases])

    def rows_by_tma(self, *matrices: torch.Tensor) -> bool:
        """Whether TMA reads each of them, of whole octets of in-features."""
        return all([self.tma_reads(m) and m.shape[1] % 8 == 0 and m.numel() > 0 for m in matrices])

    def described_weights(
        self,
        block: tuple[int, int],
        by_tma: bool = True,
        transposed: bool = False,
        describe: Callable[[torch.Tensor, tuple[int, ...]], Described] = Described,
    ) -> list[Described | None]:
        """Each weight in blocks [BN, BK] for TMA ([BK, BN] of its transpose), None past the last and without TMA."""
        found: list[Described | None] = []
        if by_tma and transposed:
            found = [describe(weight.t(), block[::-1]) for weight in self.weights]
        elif by_tma:
            found = [describe(weight, block) for weight in self.weights]
        return found + [None] * (MOST_MEMBERS - len(found))

    def new_outputs(self) -> list[torch.Tensor]:
        """[..., N] of each member, uninitialised."""
        return [self.x.new_empty(*self.leading, n) for n in self.widths]
