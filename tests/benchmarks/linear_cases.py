"""The op calls that `tests.benchmarks.linear` measures, what each must cost at least, and what it may cost at most.

Letters: M rows, K in-features, N out-features, r rank, S slots, J slots per row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ELEMENT_BYTES = 2  # bf16
ROTATED_BYTES = 400e6  # weights and used adapter rows that one graph goes through: beyond any L2
MIN_SETS, MAX_SETS = 2, 128


@dataclass(frozen=True)
class Case:
    """One op call.

    kind: linear (one weight or a group), logits, or embedding. features: K (embedding: the vocabulary). outs: N of each
    member. rank: highest rank; ranks: those of the slots in turn where they differ. adapters: slots in use, in
    contiguous runs of rows, equal below 257 rows and ragged above. width: J. bare: share of the rows without an
    adapter, at the end. in_table: ours must be faster than every peer here.
    """

    name: str
    kind: str
    rows: int
    features: int
    outs: tuple[int, ...]
    rank: int
    adapters: int
    slots: int = 64
    ranks: tuple[int, ...] = ()
    width: int = 1
    bare: float = 0.0
    in_table: bool = True

    @property
    def ragged(self) -> bool:
        return self.rows > 256

    @property
    def bare_rows(self) -> int:
        return int(self.rows * self.bare)

    def rank_of(self, slot: int) -> int:
        return self.ranks[slot % len(self.ranks)] if self.ranks else self.rank


def weight_bytes(case: Case, used_ranks: int) -> int:
    """Bytes of weights and adapter rows that one call reads. used_ranks: sum of the ranks of the slots in use."""
    n = sum(case.outs)
    if case.kind == "embedding":
        return ELEMENT_BYTES * (case.rows * (n + case.rank) + used_ranks * n)
    return ELEMENT_BYTES * (n * case.features + used_ranks * (case.features * len(case.outs) + n))


def least_bytes(case: Case, used_ranks: int) -> int:
    """Bytes one call has to move: every weight, used adapter row and input once in, every output once out."""
    activations = case.rows * sum(case.outs) + (0 if case.kind == "embedding" else case.rows * case.features)
    return weight_bytes(case, used_ranks) + ELEMENT_BYTES * activations


def least_flops(case: Case, entry_ranks: int) -> int:
    """Floating-point operations of one call. entry_ranks: sum over rows and their slots of the slot's rank."""
    n = sum(case.outs)
    if case.kind == "embedding":
        return 2 * entry_ranks * n
    return 2 * case.rows * n * case.features + 2 * entry_ranks * (case.features * len(case.outs) + n)


def set_count(case: Case) -> int:
    """Weight sets that one graph rotates over."""
    each = weight_bytes(case, case.rank * case.adapters * case.width)
    return min(MAX_SETS, max(MIN_SETS, math.ceil(ROTATED_BYTES / each)))


SMALL = [(1, 1, 16), (16, 16, 16), (64, 8, 16), (64, 64, 16)]
WIDE = [(4, 4, 16), *SMALL, (1, 1, 64), (16, 16, 64), (64, 8, 64), (64, 64, 64)]
LARGE = [(256, 64, 16), (2048, 8, 16), (8192, 16, 16)]
SQUARE = [(2, 2, 16), (16, 1, 16), (64, 1, 16), (256, 64, 64), (2048, 8, 64), (8192, 16, 64)]
SHAPES: dict[tuple[int, int], list[tuple[int, int, int]]] = {
    (4096, 4096): [*WIDE, *SQUARE, *LARGE],
    (2048, 4096): [(4, 4, 16), *SMALL, *LARGE],
    (14336, 4096): [*WIDE, *LARGE],
    (4096, 28672): [*WIDE, *LARGE, (2048, 8, 64), (8192, 16, 64)],
    (4096, 1024): SMALL,
    (2048, 128): [*WIDE, (4, 4, 64), *LARGE, (256, 64, 64), (2048, 8, 64), (8192, 16, 64)],
}
GROUPS: dict[str, tuple[tuple[int, ...], list[tuple[int, int, int]]]] = {
    "qkv": ((4096, 1024, 1024), SMALL),
    "gate_up": ((14336, 14336), [(16, 16, 16)]),
}
VOCABULARY = 151936


def suffix(rows: int, adapters: int, rank: int) -> str:
    return f"M{rows}-a{adapters}-r{rank}"


def _square(name: str, rows: int, adapters: int, rank: int = 16, **rest: Any) -> Case:
    return Case(name, "linear", rows, 4096, (4096,), rank, adapters, in_table=False, **rest)


def _cases() -> Iterator[Case]:
    for (features, out), calls in SHAPES.items():
        for rows, adapters, rank in calls:
            name = f"{features}x{out}-{suffix(rows, adapters, rank)}"
            yield Case(name, "linear", rows, features, (out,), rank, adapters)
    for rows, adapters, rank in [(1, 1, 16), (16, 16, 16), (64, 8, 16), (64, 64, 16), (256, 64, 16)]:
        yield Case(f"lm_head-{suffix(rows, adapters, rank)}", "logits", rows, 2048, (VOCABULARY,), rank, adapters)
    for group, (outs, calls) in GROUPS.items():
        for rows, adapters, rank in calls:
            yield Case(f"{group}-{suffix(rows, adapters, rank)}", "linear", rows, 4096, outs, rank, adapters)
    for rows in (16, 64):
        yield _square(f"mixed-M{rows}-a{rows}-r8,16,64", rows, rows, 64, ranks=(8, 16, 64))
    yield _square("two_slots-M16-a16-r16", 16, 16, width=2)
    for rows, adapters in ((1, 1), (16, 16), (64, 8), (2048, 8)):
        yield _square(f"bare-M{rows}-r16", rows, adapters, bare=1.0)
        if rows > 1:
            yield _square(f"half_bare-{suffix(rows, adapters, 16)}", rows, adapters, bare=0.5)
    for rows, adapters in ((1, 1), (16, 16), (2048, 8)):
        name = f"embedding-{suffix(rows, adapters, 16)}"
        yield Case(name, "embedding", rows, VOCABULARY, (4096,), 16, adapters, in_table=False)


CASES: dict[str, Case] = {case.name: case for case in _cases()}


@dataclass(frozen=True)
class Target:
    """What the cases of a pattern may cost: `limit` x base, x floor, or x the fastest peer; or microseconds of host."""

    pattern: str
    against: str
    limit: float

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


FOUR = r"(4096x4096|2048x4096|14336x4096|4096x28672)"
TARGETS: Sequence[Target] = (
    Target(r"4096x4096-M1-a1-r16", "base", 0.85),
    Target(r"14336x4096-M1-a1-r16", "base", 0.93),
    Target(r"2048x4096-M1-a1-r16", "base", 0.95),
    Target(r"4096x28672-M1-a1-r16", "base", 1.00),
    Target(r"2048x128-M1-a1-r16", "base", 0.60),
    Target(r"2048x128-M16-a16-r16", "base", 0.75),
    Target(rf"{FOUR}-M16-a16-r16", "base", 1.00),
    Target(rf"{FOUR}-M64-a8-r16", "base", 1.25),
    Target(r"4096x4096-M64-a64-r16", "floor", 1.40),
    Target(r"4096x4096-M64-a64-r64", "floor", 1.25),
    Target(r"lm_head-M16-a16-r16", "floor", 1.05),
    Target(r"(\d+x\d+|lm_head)-M256-a64-r16", "base", 1.30),
    Target(r"(4096x4096|4096x28672)-M(2048-a8|8192-a16)-r16", "base", 1.04),
    Target(r"qkv-M1-a1-r16", "base", 0.52),
    Target(r"qkv-M16-a16-r16", "base", 0.65),
    Target("|".join(re.escape(case.name) for case in CASES.values() if case.in_table), "peers", 1.00),
    Target(r"host-.*", "host", 25.0),
)


@dataclass(frozen=True)
class Verdict:
    """One target on one case; value in the target's unit, None where it was not measured."""

    target: Target
    name: str
    value: float | None

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.target.limit


def value_against(row: Mapping[str, Any], against: str, form: str = "plain") -> float | None:
    """The number of a result row that a target speaks of, None where the row has none (`linear_report` for rows)."""
    if row["status"] != "ok":
        return None
    if against == "host":
        return row.get("host_us")
    if against == "base":
        return row["ratio"][form]["median"] if "ratio" in row else None
    if against == "floor":
        return row["us"]["ours"][form]["median"] / row["floor_us"] if "floor_us" in row else None
    best = row.get("best_peer")
    return 1 / best[form]["ratio"] if best else None


def judge(rows: Sequence[Mapping[str, Any]], form: str = "plain", targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target on every measured case it speaks of; rows that no target names are left out."""
    return [
        Verdict(target, row["name"], value_against(row, target.against, form))
        for target in targets
        for row in rows
        if target.matches(row["name"])
    ]
