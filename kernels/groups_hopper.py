"""The lists of groups.py, written by four warps of a kernel in Gluon.

Stage: run time, below prefill_hopper_shrink.py and expert_hopper_shrink.py. Letters as in groups.py.
"""

# ruff: noqa: ANN001 (pointers and blocks have no static type)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fxlora.kernels.groups import FIELDS, MOST


@gluon.jit
def add(a, b) -> gl.tensor:
    """a + b, for scans."""
    return a + b


@gluon.jit
def put_groups(record, capacity, h_width, slots, start, rank) -> None:
    """Lists the groups of these slots, of rank 0 where there is none, and how many there are."""
    own = (rank + 15) // 16
    first = gl.associative_scan(own, 0, add) - own
    for i in range(h_width // 16):
        at = record + first + i
        gl.store(at, slots, mask=i < own)
        gl.store(at + capacity, start + 16 * i, mask=i < own)
        gl.store(at + 2 * capacity, 16 * i + gl.minimum(rank - 16 * i, 16) - 1, mask=i < own)
    count = gl.sum(own, axis=0)
    end = record + count + gl.arange(0, MOST, layout=own.type.layout)
    gl.store(end, gl.full([MOST], -1, gl.int32, layout=own.type.layout))
    gl.store(record + FIELDS * capacity, count)


@gluon.jit
def write_groups(
    row_tile, slots_ptr, segments, site, record, capacity, h_width, WORDS: gl.constexpr, BINS: gl.constexpr
) -> None:
    """groups.write_groups of a row tile of WORDS entries."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    _, num_entries, max_adapters = segments
    found = gl.full([BINS], 0, gl.int32, layout=line)
    for first in range(0, WORDS, 128):
        places = first + gl.arange(0, 128, layout=line)
        entries = row_tile * WORDS + places
        slots = gl.load(slots_ptr + entries, mask=(places < WORDS) & (entries < num_entries), other=-1)
        known = (slots >= 0) & (slots < max_adapters)
        found += gl.histogram(gl.where(known, slots, BINS - 1), BINS, layout=line)
    bins = gl.arange(0, BINS, layout=line)
    present = (found > 0) & (bins < max_adapters)
    rank = gl.load(site[2] + bins, mask=present, other=0)
    start = gl.load(site[1] + bins, mask=present, other=0)
    put_groups(record, capacity, h_width, bins, start, rank)


@gluon.jit
def write_lists(
    programs, groups, h_width, slots_ptr, segments, sites, HAS_POOL: gl.constexpr, WORDS: gl.constexpr,
    BINS: gl.constexpr,
) -> None:  # fmt: skip
    """This program's share of the lists; the last programs, which have least to do, begin."""
    tiles_m = gl.cdiv(segments[1], WORDS)
    for row_tile in range(programs - 1 - gl.program_id(0), tiles_m, programs):
        for member in gl.static_range(len(HAS_POOL)):
            if HAS_POOL[member]:
                record = groups[0] + (member * tiles_m + row_tile) * (FIELDS * groups[1] + 1)
                write_groups(row_tile, slots_ptr, segments, sites[member], record, groups[1], h_width, WORDS, BINS)
