"""The warps of fused_hopper.py that lay h beside the Bs of adapters, so that both are multiplied as x and W are.

Stage: run time. What rows contribute to a block of groups, 16 ranks each, takes the place of a block of x in the ring
of fused_hopper_loads.py: h where a group is of the row's adapter, else zero. Which groups meet the tile follows from
the row map and the slot table, so these warps list them for all others while the shrink runs.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_wait

from fxlora.kernels.fused_hopper_loads import NOWHERE, tile_of
from fxlora.kernels.groups_hopper import add
from fxlora.kernels.prefill_hopper import block_after

WORDS = gl.constexpr(8)
"""Of 4 bytes, two ranks of bf16 each, in the 16 ranks of a group."""

OF_BLOCK = gl.constexpr(gl.BlockedLayout([1, 1, 4], [4, 4, 2], [4, 1, 1], [2, 1, 0]))
"""Of [BM, groups, WORDS]: a thread writes 16 bytes at a time."""

OF_ROWS = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, OF_BLOCK)))
"""Of [BM] beside it."""

OF_PAIRS = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
"""Of [groups, SLOTS]: every warp has all slots."""

OF_SLOTS = gl.constexpr(gl.SliceLayout(0, OF_PAIRS))
"""Of [SLOTS]."""


@gluon.constexpr_function
def of_parts(block_rows: int) -> gl.DistributedLinearLayout:
    """Of [BM, WORDS, 2]: each thread has both halves of the words that it writes."""
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 1, 0], [0, 2, 0], *([rows, 0, 0] for rows in (16, 32) if rows < block_rows)],
        [[0, 4, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [2, 0, 0]],
        [[4, 0, 0], [8, 0, 0]],
        [],
        [block_rows, 8, 2],
    )


@gluon.jit
def groups_in(row_tile, slots_ptr, site, max_adapters, num_rows, BM: gl.constexpr, SLOTS: gl.constexpr) -> gl.tensor:
    """Of each slot: its first pool row, the number of its first group among those of a row tile, one past its last, and
    its ranks, none where no row has it. And how many groups there are."""
    places, ids = gl.arange(0, max(32, BM), layout=OF_SLOTS), gl.arange(0, SLOTS, layout=OF_SLOTS)
    rows = row_tile * BM + places  # a histogram counts what several lanes have several times
    slots = gl.load(slots_ptr + rows, mask=(places < BM) & (rows < num_rows), other=-1)
    start = gl.load(site[1] + ids, mask=ids < max_adapters, other=0)
    rank = gl.load(site[2] + ids, mask=ids < max_adapters, other=0)
    known = (slots >= 0) & (slots < max_adapters)
    present = gl.histogram(gl.where(known, slots, 0), SLOTS, mask=known, layout=OF_SLOTS) > 0
    rank = gl.where(present, rank, 0)
    groups = (rank + 15) // 16
    end = gl.sum(gl.associative_scan(groups[None, :], 1, add), axis=0)  # a scan is of whole layouts
    return start, end - groups, end, rank, gl.sum(groups, axis=0)


@gluon.jit
def list_groups(groups, listed, asked) -> None:
    """First pool row and ranks of each group, block by block, and what `number_of` tells: in shared memory, for all."""
    start, first, end, rank, count = groups
    pool_rows, ranks, numbers_at = listed
    EACH: gl.constexpr = ranks.shape[1]
    of_number: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    blocks = gl.cdiv(count, EACH)
    for block in range(blocks):
        numbers = block * EACH + gl.arange(0, EACH, layout=gl.SliceLayout(1, OF_PAIRS))
        after = numbers[:, None] - first[None, :]
        is_own = (after >= 0) & (numbers[:, None] < end[None, :])
        row = gl.sum(gl.where(is_own, start[None, :] + 16 * after, 0), axis=1)
        left = gl.sum(gl.where(is_own, rank[None, :] - 16 * after, 0), axis=1)
        pool_rows.index(block).store(gl.where(numbers < count, row, NOWHERE))
        ranks.index(block).store(gl.where(numbers < count, gl.minimum(left, 16), 16))
    fewest = gl.min(gl.where(rank % 16 > 0, rank % 16, 16), axis=0)
    numbers_at.index(0).store(gl.zeros([1], gl.int32, of_number) + blocks)
    numbers_at.index(1).store(gl.zeros([1], gl.int32, of_number) + fewest)
    debug_barrier()
    mbarrier.arrive(asked)


@gluon.jit
def places_of(row_tile, groups, slots_ptr, max_adapters, num_rows, BM: gl.constexpr) -> gl.tensor:
    """Of each row: which of a tile's groups is the first of its slot, and how many there are, none without a slot."""
    rows = row_tile * BM + gl.arange(0, BM, layout=OF_ROWS)
    slots = gl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    known = (slots >= 0) & (slots < max_adapters)
    own = gl.where(known, slots, 0)
    first = gl.gather(groups[1], own, 0)
    return first, gl.where(known, gl.gather(groups[2], own, 0) - first, 0)


@gluon.jit
def h_of_parts(row_tile, h, num_rows, BM: gl.constexpr, PARTS: gl.constexpr) -> gl.tensor:
    """16 columns of h of a tile's rows, [BM, 1, WORDS]: parts in fp32 are added up and rounded to bf16.

    h: pointer to the first of them, W.
    """
    OF_PARTS: gl.constexpr = of_parts(BM)
    rows = row_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, gl.SliceLayout(2, OF_PARTS)))
    words = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(2, OF_PARTS)))
    halves = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, OF_PARTS)))
    at = h[0] + (rows * h[1])[:, None, None] + 2 * words[None, :, None] + halves[None, None, :]
    inside = (rows < num_rows)[:, None, None]
    value = gl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    for part in gl.static_range(1, PARTS):
        value += gl.load(at + part * num_rows * h[1], mask=inside, other=0.0, cache_modifier=".cg")
    low, high = gl.split(value.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32))
    return gl.convert_layout(low & 0xFFFF | high << 16, gl.SliceLayout(1, OF_BLOCK), assert_trivial=True)[:, None, :]


@gluon.jit
def kept_h(row_tile, h, num_rows, BM: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr) -> gl.tensor:
    """All h of a tile's rows, [BM, 1, WORDS] for each 16 columns, anything beyond a row's ranks; () to leave it in
    memory, as no element is needed twice and registers are few."""
    hs = ()
    if PARTS > 1:
        for i in gl.static_range(CHUNKS):
            hs = hs + (h_of_parts(row_tile, (h[0] + 16 * i, h[1]), num_rows, BM, PARTS),)
    elif CHUNKS == 1:
        of_words: gl.constexpr = gl.SliceLayout(1, OF_BLOCK)
        rows = row_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, of_words))
        at = rows[:, None] * WORDS + gl.arange(0, WORDS, layout=gl.SliceLayout(0, of_words))[None, :]
        hs = (gl.load(h[0] + at, mask=(rows < num_rows)[:, None], other=0, cache_modifier=".cg")[:, None, :],)
    return hs


@gluon.jit
def h_of(block, row_tile, h, kept, places, BM: gl.constexpr, EACH: gl.constexpr) -> gl.tensor:
    """What each row contributes to the groups of a block, [BM, EACH, WORDS]: its h at groups of its slot, else zero."""
    numbers = block * EACH + gl.arange(0, EACH, layout=gl.SliceLayout(0, gl.SliceLayout(2, OF_BLOCK)))
    chunk = numbers[None, :] - places[0][:, None]
    is_own = (chunk >= 0) & (chunk < places[1][:, None])
    if len(kept) > 0:
        chunk = gl.where(is_own, chunk, -1)[:, :, None]
        value = gl.zeros([BM, EACH, WORDS], gl.int32, OF_BLOCK)
        for i in gl.static_range(len(kept)):
            value = gl.where(chunk == i, kept[i], value)
    else:
        rows = row_tile * BM + gl.arange(0, BM, layout=OF_ROWS)
        words = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, OF_BLOCK)))
        at = (rows[:, None] * (h[1] // 16) + chunk)[:, :, None] * WORDS + words[None, None, :]
        value = gl.load(h[0] + at, mask=is_own[:, :, None], other=0, cache_modifier=".cg")
    return value


@gluon.jit
def make_blocks(row_tile, groups, h, kept, places, steps, ring, asked, words, STAGES: gl.constexpr) -> None:
    """h of every block of a tile's groups."""
    full, empty = ring[2], ring[3]
    BM: gl.constexpr = words.shape[1]
    EACH: gl.constexpr = words.shape[2] // WORDS
    value = h_of(0, row_tile, h, kept, places, BM, EACH)
    mbarrier.wait(asked, 0)
    stage, phase = steps % STAGES, (steps // STAGES & 1) ^ 1
    for block in range(gl.cdiv(groups[4], EACH)):
        mbarrier.wait(empty.index(stage), phase)
        words.index(stage).store(value.reshape([BM, EACH * WORDS]))
        fence_async_shared()
        debug_barrier()
        mbarrier.arrive(full.index(stage))
        value = h_of(block + 1, row_tile, h, kept, places, BM, EACH)
        stage, phase = block_after(stage, phase, STAGES)


@gluon.jit
def make_h(
    ring, b_ring, words, listed, scratch, sites, max_adapters, num_rows, widths, steps, CHUNKS: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, HAS_POOL: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """What a program's rows contribute to all groups of its tile. scratch: h of all members, its width, the row map."""
    h_ptr, h_width, slots_ptr = scratch
    BM: gl.constexpr = words.shape[1]
    BN: gl.constexpr = b_ring[0].shape[2]
    begin = 0
    for member in gl.static_range(len(HAS_POOL)):
        is_here, row_tile, _, end = tile_of(begin, num_rows, widths[member], BM, BN)
        if HAS_POOL[member]:  # noqa: SIM102 (a choice at compile time is an `if` of its own)
            if is_here & (gl.program_id(1) == 0):
                groups = groups_in(row_tile, slots_ptr, sites[member], max_adapters, num_rows, BM, SLOTS)
                list_groups(groups, listed, b_ring[2])
                places = places_of(row_tile, groups, slots_ptr, max_adapters, num_rows, BM)
                if PDL:
                    gdc_wait()
                width = h_width if PARTS > 1 else h_width // 2
                h = (h_ptr + member * num_rows * width * PARTS, h_width)
                kept = kept_h(row_tile, h, num_rows, BM, CHUNKS, PARTS)
                make_blocks(row_tile, groups, h, kept, places, steps, ring, b_ring[2], words, STAGES)
        begin = end
    if PDL:
        gdc_wait()
