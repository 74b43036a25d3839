"""The first launch of experts over many rows on a Hopper GPU: h of every row tile, made beside the product.

Stage: run time, below expert_prefill.py, in place of expert_prefill_shrink.py. Few programs make h while the product's
run on the other multiprocessors, in the order in which those meet the row tiles; `ready` says of each that its h and
its list of groups are there (overlap.py). One warp loads x, two the As of the groups of 16 ranks that a tile meets, and
two groups of four warps multiply in turn: one lists groups and stores h while the other multiplies (`turns` says that
the other has issued its last product). `full` says that a block of the ring has come, `empty` that it has been
multiplied. The bits are those of expert_prefill_shrink.py.

Letters: T rows, J slots per row, K in-features, S slots, W columns of h, L slots of a row tile.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels.call import Plan
from fxlora.kernels.expert_call import ExpertCall
from fxlora.kernels.expert_prefill_shrink import ExpertAdapters
from fxlora.kernels.expert_tiles import ExpertBesideTile
from fxlora.kernels.gluon_names import load_block
from fxlora.kernels.groups import FIELDS
from fxlora.kernels.groups_hopper import add, put_groups
from fxlora.kernels.launch import Launcher
from fxlora.kernels.prefill_hopper import block_after, describe
from fxlora.kernels.triton_helpers import multiprocessors, next_power_of_2

GROUPS = gl.constexpr(8)
"""Groups of 16 ranks whose h is made at once."""

EACH = gl.constexpr(4)
"""Of them, those whose A one warp loads."""

PART = gl.constexpr(32)
"""Rows of x that are loaded together where a tile has no more."""

BLOCK = gl.constexpr(64)
"""In-features of a block in shared memory."""

RING = 224 * 1024
"""Bytes of shared memory for blocks, of which as many as possible are on their way."""


@gluon.jit
def look(item, count, table, site, L: gl.constexpr, WARPS: gl.constexpr) -> gl.tensor:
    """Expert of a row tile, its first row and its slots, [L], -1 past the last. Past the last tile: of the last."""
    at, _, _, bound, tiles_at, tile_slots_at = table
    tile = gl.minimum(item, count - 1)
    expert = gl.load(at + tiles_at + 1 + tile)
    first = gl.load(at + tiles_at + 1 + bound + tile)
    index = gl.arange(0, L, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    max_adapters = site[0]
    slots = gl.load(at + tile_slots_at + tile * max_adapters + index, mask=index < max_adapters, other=-1)
    return expert, first, slots


@gluon.jit
def look_closer(seen, table, site, starts, steps, BM: gl.constexpr) -> gl.tensor:
    """Rows [first, end) and slots of a tile, the first pool row and the rank of each slot; no slots where the rows have
    no expert. starts, steps: of A's rows, or of B's."""
    expert, first, slots = seen
    end = gl.load(table[0] + 2 * table[1] + expert + 1)
    slots = gl.where(expert < table[2], slots, -1)
    known = slots >= 0
    start = gl.load(starts + slots, mask=known, other=0)
    start += expert * gl.load(steps + slots, mask=known, other=0)
    rank = gl.load(site[1] + slots, mask=known, other=0)
    return first, gl.minimum(first + BM, end), slots, start, rank


@gluon.jit
def load_x(
    share, ring, x_desc, table, site, a_rows, steps, L: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr
) -> None:
    """The warp that loads x, as often as the groups of a tile need it."""
    item, count, programs = share
    xs, full, empty = ring[0], ring[2], ring[3]
    seen = look(item + programs, count, table, site, L, 1)
    closer = look_closer(look(item, count, table, site, L, 1), table, site, a_rows[0], a_rows[1], BM)
    stage, phase = 0, 1  # every block is empty at first
    while item < count:
        first, end, _, _, rank = closer
        closer = look_closer(seen, table, site, a_rows[0], a_rows[1], BM)
        item += programs
        seen = look(item + programs, count, table, site, L, 1)
        parts = gl.cdiv(end - first, PART)
        groups = gl.sum((rank + 15) // 16, axis=0)
        for _ in range(gl.cdiv(groups, GROUPS)):
            for step in range(steps):
                there = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                for some in gl.static_range(1, BM // PART + 1):
                    mbarrier.expect(there, some * x_desc.block_type.nbytes, parts == some)
                for part in gl.static_range(BM // PART):
                    at, to = [first + part * PART, step * BLOCK], xs.index(stage).slice(part * PART, PART)
                    load_block(x_desc, at, there, to, part < parts)
                stage, phase = block_after(stage, phase, STAGES)


@gluon.jit
def load_a(
    PART_OF_A: gl.constexpr, share, ring, a_desc, table, site, a_rows, steps, L: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """A warp that loads A of EACH of the groups made at once: one warp is too slow to ask for all of them."""
    item, count, programs = share
    all_as, full, empty = ring[1], ring[2], ring[3]
    seen = look(item + programs, count, table, site, L, 1)
    closer = look_closer(look(item, count, table, site, L, 1), table, site, a_rows[0], a_rows[1], BM)
    stage, phase = 0, 1
    while item < count:
        _, _, _, start, rank = closer
        closer = look_closer(seen, table, site, a_rows[0], a_rows[1], BM)
        item += programs
        seen = look(item + programs, count, table, site, L, 1)
        own = (rank + 15) // 16
        ends = gl.associative_scan(own, 0, add)
        groups = gl.max(ends, axis=0)
        for first_group in range(0, groups, GROUPS):
            first = first_group + PART_OF_A * EACH
            some = gl.minimum(groups - first, EACH)
            rows = ()
            for i in gl.static_range(EACH):
                index = first + i - (ends - own)
                rows = rows + (gl.max(gl.where((index >= 0) & (index < own), start + 16 * index, 0), axis=0),)
            for step in range(steps):
                there = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.arrive(there, pred=some <= 0)
                for number in gl.static_range(1, EACH + 1):
                    mbarrier.expect(there, number * a_desc.block_type.nbytes, some == number)
                for i in gl.static_range(EACH):
                    to = all_as.index(stage).slice((PART_OF_A * EACH + i) * 16, 16)
                    load_block(a_desc, [rows[i], step * BLOCK], there, to, i < some)
                stage, phase = block_after(stage, phase, STAGES)


@gluon.jit
def put(
    acc, record, capacity, first_group, first, end, h, slots_ptr, coeffs_ptr, scaling_ptr, J: gl.constexpr,
    HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """h of a tile's rows in the columns of these groups: whole groups, zero beyond the rank. acc: [BM, GROUPS * 16]."""
    rows = first + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    lanes = cols % 16
    col_slots = gl.load(record + first_group + cols // 16, cache_modifier=".cg")
    ranks = gl.load(record + 2 * capacity + first_group + cols // 16, cache_modifier=".cg")
    known = col_slots >= 0
    scaling = gl.load(scaling_ptr + col_slots, mask=known, other=0.0)
    row_mask, is_rank = rows < end, lanes <= ranks % 16
    h_cols = ranks - ranks % 16 + lanes
    for j in gl.static_range(J):
        entries = rows * J + j
        row_slots = gl.load(slots_ptr + entries, mask=row_mask, other=-1)
        value = acc * scaling[None, :]
        if HAS_COEFFS:
            value = value * gl.load(coeffs_ptr + entries, mask=row_mask, other=0.0)[:, None]
        value = gl.where(is_rank[None, :], value, 0.0).to(h[0].dtype.element_ty)
        at = h[0] + (entries.to(gl.int64) * h[1])[:, None] + h_cols[None, :]
        gl.store(at, value, mask=(row_slots[:, None] == col_slots[None, :]) & known[None, :])


@gluon.jit
def multiply(acc, stage, phase, steps, ring, STAGES: gl.constexpr) -> gl.tensor:
    """acc + x A^T, of which the last product is not awaited; and the block that it reads."""
    xs, all_as, full, empty = ring
    held = gl.to_tensor(-1)
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(xs.index(stage), all_as.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(gl.maximum(held, 0)), pred=held >= 0)
        held = stage
        stage, phase = block_after(stage, phase, STAGES)
    return acc, held


@gluon.jit
def compute(
    GROUP: gl.constexpr, share, ring, turns, h, lists, rows, table, site, b_rows, scaling_ptr, steps, J: gl.constexpr,
    L: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """A group of warps: every other tile of this program's. It lists the groups of the next one and stores h of the
    last while the other multiplies, and hands on the turn when its last product is issued."""
    item, count, programs = share
    groups_ptr, capacity, ready_ptr = lists
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, GROUPS * 16, 16])
    seen = look(item + programs, count, table, site, L, 4)
    closer = look_closer(look(item, count, table, site, L, 4), table, site, b_rows[0], b_rows[1], BM)
    done, number = 0, 0  # steps and tiles of this program
    while item < count:
        first, end, slots, start, rank = closer
        closer = look_closer(seen, table, site, b_rows[0], b_rows[1], BM)
        seen = look(item + 2 * programs, count, table, site, L, 4)
        groups = gl.sum((rank + 15) // 16, axis=0)
        if number % 2 == GROUP:
            record = groups_ptr + item * (FIELDS * capacity + 1)
            put_groups(record, capacity, h[1], slots, start, rank)
            debug_barrier()
            mbarrier.wait(turns.index(GROUP), (number // 2 & 1) ^ (1 - GROUP))
            mbarrier.arrive(turns.index(1 - GROUP), pred=groups == 0)
            so_far = done
            for first_group in range(0, groups, GROUPS):
                acc = gl.zeros([BM, GROUPS * 16], gl.float32, of_acc)
                acc, held = multiply(acc, so_far % STAGES, so_far // STAGES & 1, steps, ring, STAGES)
                so_far += steps
                mbarrier.arrive(turns.index(1 - GROUP), pred=first_group + GROUPS >= groups)
                acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                mbarrier.arrive(ring[3].index(held))
                put(acc, record, capacity, first_group, first, end, h, rows[0], rows[1], scaling_ptr, J, HAS_COEFFS)
            debug_barrier()  # all have stored
            gl.atomic_xchg(ready_ptr + item, 1, sem="release", scope="gpu")
        done += gl.cdiv(groups, GROUPS) * steps
        number += 1
        item += programs


@gluon.jit
def make_tiles(
    share, x_desc, a_desc, h, lists, rows, table, site, a_rows, b_rows, scaling_ptr, steps, J: gl.constexpr,
    L: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """This program's tiles."""
    dtype: gl.constexpr = x_desc.dtype
    of_xs: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BLOCK], dtype)
    of_as: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUPS * 16, BLOCK], dtype)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, BLOCK], of_xs)
    all_as = gl.allocate_shared_memory(dtype, [STAGES, GROUPS * 16, BLOCK], of_as)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=3)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    ring = (xs, all_as, full, empty)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    0, share, ring, turns, h, lists, rows, table, site, b_rows, scaling_ptr, steps, J, L, BM, STAGES,
                    HAS_COEFFS,
                ),
            ),
            (
                compute,
                (
                    1, share, ring, turns, h, lists, rows, table, site, b_rows, scaling_ptr, steps, J, L, BM, STAGES,
                    HAS_COEFFS,
                ),
            ),
            (load_x, (share, ring, x_desc, table, site, a_rows, steps, L, BM, STAGES)),
            (load_a, (0, share, ring, a_desc, table, site, a_rows, steps, L, BM, STAGES)),
            (load_a, (1, share, ring, a_desc, table, site, a_rows, steps, L, BM, STAGES)),
        ],
        [4, 1, 1, 1],
        [208, 88, 88, 88],
    )  # fmt: skip


@gluon.jit
def reset(ready_ptr, count, programs) -> None:
    """None of this program's tiles is ready, for whoever starts after this."""
    index = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    for first in range(gl.program_id(0), count, 128 * programs):
        at = first + index * programs
        gl.store(ready_ptr + at, gl.full([128], 0, gl.int32, layout=index.type.layout), mask=at < count)
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.u32 $0, $1;", "=r,r", [index], dtype=gl.int32, is_pure=False, pack=1
    )
    debug_barrier()


@gluon.jit
def rounds_of_all(count, table, max_adapters, SERVED: gl.constexpr) -> gl.tensor:
    """How often tiles are made, in all, if SERVED slots are served at once."""
    index = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    found = gl.full([128], 0, gl.int32, layout=index.type.layout)
    for slot in range(0, max_adapters, SERVED):
        for first in range(0, count, 128):
            at = table[0] + table[5] + (first + index) * max_adapters + slot
            found += (gl.load(at, mask=first + index < count, other=-1) >= 0).to(gl.int32)
    return gl.sum(found, axis=0)


@gluon.jit(do_not_specialize=["num_rows", "bound", "tiles_at", "tile_slots_at", "few", "most"])
def expert_hopper_shrink_kernel(
    x_desc, a_desc, h, lists, rows, table_ptr, site, a_rows, b_rows, scaling_ptr, num_rows, num_experts, bound,
    tiles_at, tile_slots_at, feature_octets, few, most, J: gl.constexpr, L: gl.constexpr, BM: gl.constexpr,
    SERVED: gl.constexpr, STAGES: gl.constexpr, HAS_COEFFS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Few programs make h of all tiles, unless that takes more than `most` rounds: then all do.

    x_desc: x [T, K] in blocks of PART rows; a_desc: A [PA, K] in blocks of 16; h [T * J, W], like x, and W; lists:
    those of the groups, the capacity of each, `ready`; rows: slots and coefficients [T, J], contiguous; site: S and
    ranks; a_rows, b_rows: where the rows of each slot's A and B begin, and how far experts are apart; num_rows to
    tile_slots_at: of the table. SERVED: slots whose groups are made at once.
    """
    if PDL:
        gdc_wait()
    table = (table_ptr, num_rows, num_experts, bound, tiles_at, tile_slots_at)
    count, programs = gl.load(table_ptr + tiles_at), gl.num_programs(0)
    are_few = rounds_of_all(count, table, site[0], SERVED) <= most
    if are_few:
        programs = gl.minimum(few, programs)
    if gl.program_id(0) < programs:
        reset(lists[2], count, programs)
        if PDL and are_few:  # else the product's programs, which share what they read, begin together behind these
            gdc_launch_dependents()
        share = (gl.program_id(0), count, programs)
        steps = gl.cdiv(feature_octets * 8, BLOCK)
        make_tiles(
            share, x_desc, a_desc, h, lists, rows, table, site, a_rows, b_rows, scaling_ptr, steps, J, L, BM, STAGES,
            HAS_COEFFS,
        )  # fmt: skip


_launcher = Launcher(expert_hopper_shrink_kernel)


def shrink_beside(call: ExpertCall, adapters: ExpertAdapters, tile: ExpertBesideTile) -> None:
    """Fills h, the groups and `ready` of `adapters`. TMA reads x, in place, and A, whose rows are as long."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile))
    pool = call.site.pool
    assert pool is not None
    call.launch(
        plan,
        describe(call.x, (PART.value, BLOCK.value)),
        describe(pool.a, (16, BLOCK.value)),
        (adapters.h, adapters.width),
        (adapters.groups, adapters.capacity, adapters.ready),
        (adapters.slots, adapters.coeffs),
        call.segments,
        (adapters.max_adapters, adapters.rank),
        (adapters.a_start, adapters.a_step),
        (adapters.b_start, adapters.b_step),
        adapters.scaling,
        *plan.numbers,
    )


def _plan(call: ExpertCall, tile: ExpertBesideTile) -> Plan:
    most_slots = min(call.site.max_adapters, call.height * call.width)
    return call.planned(
        _launcher,
        (min(call.tiles, multiprocessors(call.x.device)),),
        (
            call.rows, call.num_experts, call.bound, call.tiles_at, call.tile_slots_at, call.features // 8, tile.few,
            tile.most,
        ),
        4,
        J=call.width,
        L=max(32, next_power_of_2(most_slots)),
        BM=call.height,
        SERVED=max(1, GROUPS.value * 16 // max(16, call.site.h_width)),
        STAGES=RING // (BLOCK.value * 2 * (call.height + GROUPS.value * 16)),
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )  # fmt: skip
