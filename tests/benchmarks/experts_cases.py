"""The calls that `tests.benchmarks.experts` measures, what each must cost at least, and what it may cost at most.

Letters: M tokens, T rows (M times the experts of a token), E experts, K in-features, N out-features, r rank, S slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.benchmarks.linear_cases import ELEMENT_BYTES, Target, suffix

SLOTS = 16
ROTATED_BYTES = 400e6  # expert weights that one graph goes through: beyond any L2
MAX_ROUTINGS = 16


@dataclass(frozen=True)
class ExpertCase:
    """One call of lora_experts. rows: M. Slots lie in equal runs of tokens, and each token picks its experts at random;
    `routings` draws take turns, on one weight."""

    name: str
    rows: int
    num_experts: int
    top_k: int
    features: int
    out: int
    rank: int
    adapters: int
    in_place: bool = True
    routings: int = 2
    kind: str = "experts"

    @property
    def pairs(self) -> int:
        """T."""
        return self.rows * self.top_k


# E, experts of a token, hidden size, width of an expert
MODELS = {"qwen3": (128, 8, 2048, 768), "mixtral": (8, 2, 4096, 14336), "deepseek": (256, 8, 7168, 2048)}
BATCHES = {1: (1,), 16: (1, 8, 16), 64: (1, 8, 16), 256: (8,), 2048: (1, 8, 16)}
RANKS = (8, 16, 64)


def shapes() -> Iterator[tuple[str, int, int, int, int]]:
    """Name, E, experts of a token, K and N of each expert weight."""
    for model, (experts, top_k, hidden, width) in MODELS.items():
        yield f"{model}-gate_up", experts, top_k, hidden, 2 * width
        yield f"{model}-down", experts, top_k, width, hidden


def routing_count(rows: int, num_experts: int, top_k: int, features: int, out: int) -> int:
    """Draws of the routing that one graph goes through."""
    active = num_experts * (1 - (1 - top_k / num_experts) ** rows)
    read = active * features * out * ELEMENT_BYTES
    return max(2, min(MAX_ROUTINGS, -(-int(ROTATED_BYTES) // int(read))))


def _cases() -> Iterator[ExpertCase]:
    for name, experts, top_k, features, out in shapes():
        for rows, counts in BATCHES.items():
            routings = routing_count(rows, experts, top_k, features, out)
            for adapters in counts:
                for rank in RANKS:
                    call = (rows, experts, top_k, features, out, rank, adapters)
                    yield ExpertCase(f"{name}-{suffix(rows, adapters, rank)}", *call, routings=routings)
    for rows in (1, 16):
        name, experts, top_k, features, out = next(shapes())
        routings = routing_count(rows, experts, top_k, features, out)
        call = (rows, experts, top_k, features, out, 16, rows)
        label = f"{name}-ids-{suffix(rows, rows, 16)}"
        yield ExpertCase(label, *call, in_place=False, routings=routings)


CASES: dict[str, ExpertCase] = {case.name: case for case in _cases()}

TARGETS: Sequence[Target] = (
    Target(r"qwen3-.*-M(1-a1|16-a(8|16)|64-a(8|16))-r16", "base", 1.10),
    Target(r"(mixtral|deepseek)-.*-M(1-a1|16-a16|64-a8)-r16", "base", 1.10),
    Target(r".*-M2048-a8-r16", "base", 1.15),
    Target("|".join(re.escape(name) for name in CASES), "peers", 1.00),
)
