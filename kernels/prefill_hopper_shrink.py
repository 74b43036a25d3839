"""The launch before prefill's on a Hopper GPU that has multiprocessors to spare: groups of each row tile, h of all
members.

Stage: run time, beside the base product of the launch after it, as group_shrink.py, which it takes the place of. Few
programs make h while the product's run on the other multiprocessors, so each has to be fast: one warp loads x, one the
As, four multiply, and a block of x meets the As of all members. A tile is HEIGHT entries of one slot. Rows side by
side, as a request's are, come by TMA, others each by itself; the bits are the same, and those of group_shrink.py's
tiles of 64 entries. `full` says that a block of the ring has come, `empty` that it has been multiplied.

Letters: T rows, J slots per row, E = T * J entries, K in-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels.call import MOST_MEMBERS, LinearCall, Plan
from fxlora.kernels.gluon_names import load_block, load_elements
from fxlora.kernels.group_shrink import Scratch
from fxlora.kernels.groups_hopper import add, write_lists
from fxlora.kernels.launch import Launcher
from fxlora.kernels.prefill_hopper import block_after, describe
from fxlora.kernels.prefill_tiles import BesideTile
from fxlora.kernels.segments import tile_bound
from fxlora.kernels.tiles import MULTIPROCESSORS
from fxlora.kernels.triton_helpers import next_power_of_2

RANKS = gl.constexpr(16)
"""Ranks of each member that are made at once."""

HEIGHT = gl.constexpr(BesideTile.BM)
"""Entries of a tile."""

PART = gl.constexpr(16)
"""Of its rows, so many are loaded together where a slot has no more."""

BLOCK = gl.constexpr(64)
"""In-features of a block in shared memory."""

SUBS = gl.constexpr(4)
"""Blocks that come together: a warp that waited for each would load too slowly."""

RING = 200 * 1024
"""Bytes of shared memory for blocks."""


@gluon.jit
def tile_ends(segments, BINS: gl.constexpr, WARPS: gl.constexpr) -> gl.tensor:
    """[BINS]: tiles of each slot and of all before it. segments: pointer, E, S. BINS: a power of two above S."""
    at, num_entries, max_adapters = segments
    slots = gl.arange(0, BINS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    known = slots < max_adapters
    first = gl.load(at + num_entries + slots, mask=known, other=0)
    end = gl.load(at + num_entries + slots + 1, mask=known, other=0)
    return gl.associative_scan((end - first + HEIGHT - 1) // HEIGHT, 0, add)


@gluon.jit
def tile_of(item, ends, segments, J: gl.constexpr) -> gl.tensor:
    """Slot of a tile, the positions [first, end) of its entries, its first row, and whether its rows lie side by side.

    Asked for a tile ahead, hence also past the last: that has slot S, and is never made.
    """
    at, num_entries, max_adapters = segments
    slot = gl.minimum(gl.sum((ends <= item).to(gl.int32), axis=0), max_adapters)
    index = item - gl.max(gl.where(ends <= item, ends, 0), axis=0)
    end_of_slot = gl.load(at + num_entries + slot + 1)
    first = gl.minimum(gl.load(at + num_entries + slot) + index * HEIGHT, end_of_slot - 1)
    end = gl.minimum(first + HEIGHT, end_of_slot)
    row = gl.load(at + gl.maximum(first, 0))
    is_run = (gl.load(at + gl.maximum(end - 1, 0)) - row == end - 1 - first) & (J == 1)
    return slot, first, end, row, is_run


@gluon.jit
def rounds_of(slot, sites, HAS_POOL: gl.constexpr) -> gl.tensor:
    """How often RANKS make the ranks of a slot, of the member that has most."""
    most = gl.to_tensor(0)
    for member in gl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            most = gl.maximum(most, gl.load(sites[member][2] + slot))
    return (most + RANKS - 1) // RANKS


@gluon.jit
def load_run(xs, block, there, x_desc, part_desc, row, k, parts) -> None:
    """Asks for SUBS blocks of rows side by side, or for so many parts of them."""
    WHOLE: gl.constexpr = HEIGHT // PART
    if parts == WHOLE:
        mbarrier.expect(there, SUBS * x_desc.block_type.nbytes)
        for sub in gl.static_range(SUBS):
            load_block(x_desc, [row, k + sub * BLOCK], there, xs.index(block + sub))
    else:
        for count in gl.static_range(1, WHOLE):
            mbarrier.expect(there, SUBS * count * part_desc.block_type.nbytes, parts == count)
        for sub in gl.static_range(SUBS):
            for part in gl.static_range(WHOLE - 1):
                at, to = [row + part * PART, k + sub * BLOCK], xs.index(block + sub).slice(part * PART, PART)
                load_block(part_desc, at, there, to, part < parts)
    mbarrier.arrive(there, count=32)


@gluon.jit
def rows_of(first, end, x, segments, J: gl.constexpr) -> gl.tensor:
    """Of each part of a tile where its rows of x begin, and which of them there are."""
    of_part: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    lanes = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, of_part))
    found = ()
    for part in gl.static_range(HEIGHT // PART):
        places = first + part * PART + gl.arange(0, PART, layout=gl.SliceLayout(1, of_part))
        entries = gl.load(segments[0] + places, mask=places < end, other=0)
        at = x[0] + (entries // J).to(gl.int64)[:, None] * (x[1] * 8) + lanes[None, :]
        found = found + ((at, (places < end)[:, None], lanes[None, :]),)
    return found


@gluon.jit
def load_rows(xs, block, there, rows, k, parts, num_features) -> None:
    """As load_run, of rows in any order."""
    for part in gl.static_range(HEIGHT // PART):
        if part < parts:
            at, known, lanes = rows[part]
            for sub in gl.static_range(SUBS):
                to = xs.index(block + sub).slice(part * PART, PART)
                first = k + sub * BLOCK
                load_elements(to, at + first, known & (first + lanes < num_features))
    async_copy.mbarrier_arrive(there, increment_count=False)  # of every lane, when its copies are there
    mbarrier.arrive(there)


@gluon.jit
def load_x(
    share, ring, x_desc, part_desc, x, segments, sites, num_features, HAS_POOL: gl.constexpr, J: gl.constexpr,
    BINS: gl.constexpr, STAGES: gl.constexpr,
) -> None:  # fmt: skip
    """The warp that loads x: every step of this program's tiles, as soon as there is room. What it leaves of a block is
    of rows that are not stored."""
    item, count, programs = share
    xs, full, empty = ring[0], ring[2], ring[3]
    ends = tile_ends(segments, BINS, 1)
    tile = tile_of(item, ends, segments, J)
    stage, phase = 0, 1  # every block is empty at first
    while item < count:
        slot, first, end, row, is_run = tile
        item += programs
        tile = tile_of(item, ends, segments, J)
        parts, rows = gl.cdiv(end - first, PART), rows_of(first, end, x, segments, J)
        for _ in range(rounds_of(slot, sites, HAS_POOL)):
            for k in range(0, num_features, SUBS * BLOCK):
                there, block = full.index(stage), stage * SUBS
                mbarrier.wait(empty.index(stage), phase)
                if is_run:
                    load_run(xs, block, there, x_desc, part_desc, row, k, parts)
                else:
                    load_rows(xs, block, there, rows, k, parts, num_features)
                stage, phase = block_after(stage, phase, STAGES)


@gluon.jit
def load_a(
    share, ring, a_descs, segments, sites, num_features, HAS_POOL: gl.constexpr, J: gl.constexpr, BINS: gl.constexpr,
    STAGES: gl.constexpr, POOLED: gl.constexpr,
) -> None:  # fmt: skip
    """The warp that loads the A of every member beside x."""
    item, count, programs = share
    all_as, full, empty = ring[1], ring[2], ring[3]
    ends = tile_ends(segments, BINS, 1)
    slot = tile_of(item, ends, segments, J)[0]
    stage, phase = 0, 1
    while item < count:
        pool_rows = ()
        for member in gl.static_range(len(HAS_POOL)):
            pool_rows = pool_rows + ((gl.load(sites[member][1] + slot) if HAS_POOL[member] else 0),)
        rounds = rounds_of(slot, sites, HAS_POOL)
        item += programs
        slot = tile_of(item, ends, segments, J)[0]
        for i in range(rounds):
            for k in range(0, num_features, SUBS * BLOCK):
                there, block = full.index(stage), stage * SUBS
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(there, POOLED * SUBS * RANKS * BLOCK * 2)
                for member in gl.static_range(len(HAS_POOL)):
                    if HAS_POOL[member]:
                        row = pool_rows[member] + i * RANKS  # past the rank follow others', whose h is left out
                        for sub in gl.static_range(SUBS):
                            a = all_as.index(block + sub).slice(member * RANKS, RANKS)
                            load_block(a_descs[member], [row, k + sub * BLOCK], there, a)
                stage, phase = block_after(stage, phase, STAGES)


@gluon.jit
def field_of(member_of, slot, sites, HAS_POOL: gl.constexpr, FIELD: gl.constexpr, NONE: gl.constexpr) -> gl.tensor:
    """A field of the slot at the member of each column, NONE where there is no pool."""
    found = gl.full(member_of.shape, NONE, gl.float32 if FIELD == 3 else gl.int32, layout=member_of.type.layout)
    for member in gl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            found = gl.where(member_of == member, gl.load(sites[member][FIELD] + slot), found)
    return found


@gluon.jit
def put(
    acc, tile, first_rank, h, coeffs, segments, sites, HAS_POOL: gl.constexpr, J: gl.constexpr,
    HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """h of a tile's entries, zero beyond each member's rank. acc: [HEIGHT, RANKS of each member side by side]."""
    slot, first, end, _, _ = tile
    places = first + gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, acc.type.layout))
    cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    member_of, ranks = cols // RANKS, first_rank + cols % RANKS
    entries = gl.load(segments[0] + places, mask=places < end, other=0)
    rank = field_of(member_of, slot, sites, HAS_POOL, 2, 0)
    factor = field_of(member_of, slot, sites, HAS_POOL, 3, 0.0)[None, :]
    if HAS_COEFFS:
        at = coeffs[0] + (entries // J).to(gl.int64) * coeffs[1] + (entries % J) * coeffs[2]
        factor = factor * gl.load(at, mask=places < end, other=0.0)[:, None]
    values = gl.where((ranks < rank)[None, :], acc * factor, 0.0).to(h[0].dtype.element_ty)
    h_rows = member_of.to(gl.int64)[None, :] * segments[1] + entries[:, None]
    mask = (places < end)[:, None] & (ranks < (rank + 15) // 16 * 16)[None, :]
    gl.store(h[0] + h_rows * h[1] + ranks[None, :], values, mask=mask)


@gluon.jit
def multiply(
    share, ring, h, groups, coeffs, slots_ptr, segments, sites, num_features, HAS_POOL: gl.constexpr, J: gl.constexpr,
    WORDS: gl.constexpr, BINS: gl.constexpr, STAGES: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """The warps that multiply; while the first blocks are on their way they list the groups."""
    item, count, programs = share
    xs, all_as, full, empty = ring
    COLUMNS: gl.constexpr = all_as.shape[1]
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    write_lists(programs, groups, h[1], slots_ptr, segments, sites, HAS_POOL, WORDS, BINS)
    ends = tile_ends(segments, BINS, 4)
    upcoming = tile_of(item, ends, segments, J)
    stage, phase = 0, 0
    while item < count:
        tile = upcoming
        item += programs
        upcoming = tile_of(item, ends, segments, J)
        for i in range(rounds_of(tile[0], sites, HAS_POOL)):
            acc = gl.zeros([HEIGHT, COLUMNS], gl.float32, of_acc)
            held = gl.to_tensor(-1)
            for _ in range(0, num_features, SUBS * BLOCK):
                mbarrier.wait(full.index(stage), phase)
                if not tile[4]:
                    fence_async_shared()  # what was not copied by TMA
                for sub in gl.static_range(SUBS):
                    a = all_as.index(stage * SUBS + sub).permute((1, 0))
                    acc = warpgroup_mma(xs.index(stage * SUBS + sub), a, acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=SUBS, deps=(acc,))
                mbarrier.arrive(empty.index(gl.maximum(held, 0)), pred=held >= 0)
                held = stage
                stage, phase = block_after(stage, phase, STAGES)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(empty.index(held))
            put(acc, tile, i * RANKS, h, coeffs, segments, sites, HAS_POOL, J, HAS_COEFFS)


@gluon.jit
def make_tiles(
    share, x_desc, part_desc, x, a_descs, h, groups, coeffs, segments, slots_ptr, sites, num_features,
    HAS_POOL: gl.constexpr, J: gl.constexpr, WORDS: gl.constexpr, BINS: gl.constexpr, STAGES: gl.constexpr,
    MEMBERS: gl.constexpr, POOLED: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """This program's tiles. MEMBERS: a power of two, POOLED: those that have a pool."""
    dtype: gl.constexpr = x_desc.dtype
    of_as: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MEMBERS * RANKS, BLOCK], dtype)
    xs = gl.allocate_shared_memory(dtype, [STAGES * SUBS, HEIGHT, BLOCK], x_desc.layout)
    all_as = gl.allocate_shared_memory(dtype, [STAGES * SUBS, MEMBERS * RANKS, BLOCK], of_as)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=34)  # both warps say how much comes, 32 lanes that theirs has
        mbarrier.init(empty.index(stage), count=1)
    ring = (xs, all_as, full, empty)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    share, ring, h, groups, coeffs, slots_ptr, segments, sites, num_features, HAS_POOL, J, WORDS, BINS,
                    STAGES, HAS_COEFFS,
                ),
            ),
            (load_x, (share, ring, x_desc, part_desc, x, segments, sites, num_features, HAS_POOL, J, BINS, STAGES)),
            (load_a, (share, ring, a_descs, segments, sites, num_features, HAS_POOL, J, BINS, STAGES, POOLED)),
        ],
        [1, 1],
        [168, 96],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "max_adapters", "few", "most"])
def prefill_hopper_shrink_kernel(
    x_desc, part_desc, x, a0_desc, a1_desc, a2_desc, a3_desc, h, groups, coeffs, segments_ptr, slots_ptr, sites,
    num_rows, feature_octets, max_adapters, few, most, HAS_POOL: gl.constexpr, J: gl.constexpr, WORDS: gl.constexpr,
    BINS: gl.constexpr, STAGES: gl.constexpr, MEMBERS: gl.constexpr, POOLED: gl.constexpr, HAS_COEFFS: gl.constexpr,
    PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Few programs make all of h, unless it has more than `most` tiles. The others leave at once: the product's
    programs take turns best if they begin together.

    x: pointer and row stride / 8; h [members, E, W], like x, and W; groups: the lists and the capacity of each; coeffs:
    pointer and strides. WORDS: entries of a row tile. The other parameters are those of group_shrink_kernel, with A of
    each member as TMA reads it, None without a pool and past the last.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    segments = (segments_ptr, num_rows * J, max_adapters)
    count, programs = gl.max(tile_ends(segments, BINS, 4), axis=0), gl.num_programs(0)
    if count <= most:
        programs = gl.minimum(few, programs)
    if gl.program_id(0) < programs:
        make_tiles(
            (gl.program_id(0), count, programs), x_desc, part_desc, x, (a0_desc, a1_desc, a2_desc, a3_desc), h,
            groups, coeffs, segments, slots_ptr, sites, feature_octets * 8, HAS_POOL, J, WORDS, BINS, STAGES, MEMBERS,
            POOLED, HAS_COEFFS,
        )  # fmt: skip


_launcher = Launcher(prefill_hopper_shrink_kernel)


def shrink_beside(call: LinearCall, scratch: Scratch, tile: BesideTile) -> None:
    """Fills the lists of groups, and h of each entry: whole groups, zero beyond the rank.

    TMA reads x, and A, whose rows are as long.
    """
    plan = call.plan(_launcher, tile, lambda: _plan(call, scratch, tile), step=scratch.block_rows)
    block = (RANKS.value, BLOCK.value)
    a_descs = [None if pool is None else describe(pool.a, block) for pool in call.members.pools]
    call.launch(
        plan,
        describe(call.x, (HEIGHT.value, BLOCK.value)),
        describe(call.x, (PART.value, BLOCK.value)),
        (call.x, call.x.stride(0) // 8),
        *a_descs,
        *(None,) * (MOST_MEMBERS - len(a_descs)),
        (scratch.h, scratch.width),
        (scratch.groups, scratch.capacity),
        call.coeffs,
        call.segments,
        scratch.slots,
        call.members.a_pools,
        *plan.numbers,
    )


def _plan(call: LinearCall, scratch: Scratch, tile: BesideTile) -> Plan:
    members = call.members
    width = next_power_of_2(len(call.widths))
    bound = min(call.entries, tile_bound(call.entries, members.max_adapters, HEIGHT.value))
    return call.planned(
        _launcher,
        (tile.few if bound <= tile.most else min(bound, MULTIPROCESSORS),),
        (call.rows, call.features // 8, members.max_adapters, tile.few, tile.most),
        4,
        HAS_POOL=members.has_pool,
        J=call.width,
        WORDS=scratch.block_rows * call.width,
        BINS=max(32, next_power_of_2(members.max_adapters + 1)),
        STAGES=RING // (SUBS.value * BLOCK.value * 2 * (HEIGHT.value + RANKS.value * width)),
        MEMBERS=width,
        POOLED=len(members.owned),
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )
