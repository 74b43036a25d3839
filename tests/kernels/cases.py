"""Random op calls and their comparison with the reference: what all op tests of this folder share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from fxlora.kernels import ops, reference
from fxlora.kernels.registry import PoolKind, SitePool, register_runtime, unregister_runtime

if TYPE_CHECKING:
    from fxlora.kernels.call import LinearCall

DIGEST = 0xF01A
HAS_CUDA = torch.cuda.is_available() and not ops.INTERPRET
DEVICES = ["cpu", *(["cuda"] if HAS_CUDA else [])]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest relative error of a row against the fp32 reference on the same (already rounded) inputs.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One op call: `kind` linear, logits or embedding; lengths are of the runs of equal slots."""

    kind: str
    x: torch.Tensor
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    row_slots: torch.Tensor
    row_coeffs: torch.Tensor | None
    pools: tuple[SitePool | None, ...]
    max_adapters: int

    def with_slots(self, row_slots: torch.Tensor) -> Case:
        return replace(self, row_slots=row_slots)

    def run(self) -> list[torch.Tensor]:
        with registered(self.pools) as handle:
            segments = ops.segment_rows(self.row_slots, self.max_adapters)
            return self.call(segments, handle)

    def call(self, segments: torch.Tensor, handle: int) -> list[torch.Tensor]:
        rest = (self.row_slots, self.row_coeffs, segments, handle)
        if self.kind == "linear":
            return ops.lora_linear(self.x, self.weights, self.biases, *rest)
        if self.kind == "logits":
            return [ops.lora_logits(self.x, self.weights[0], self.biases[0], *rest)]
        return [ops.lora_embedding(self.x, self.weights[0], *rest)]

    def expected(self) -> list[torch.Tensor]:
        rest = (self.row_slots, self.row_coeffs)
        if self.kind == "embedding":
            return [reference.lora_embedding(self.x, self.weights[0], *rest, self.pools[0])]
        return reference.lora_linear(self.x, self.weights, self.biases, *rest, self.pools)

    def base(self) -> list[torch.Tensor]:
        """The same call without any adapter in the batch."""
        return self.with_slots(torch.full_like(self.row_slots, -1)).run()


@contextmanager
def registered(pools: Sequence[SitePool | None]) -> Iterator[int]:
    handles = register_runtime(DIGEST, [tuple(pools)])
    try:
        yield handles[0]
    finally:
        unregister_runtime(handles)


def make_pool(
    kind: PoolKind,
    in_features: int,
    out_features: int,
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> SitePool:
    """One adapter per rank (0: an empty slot), extents in shuffled order, unused pool memory NaN."""
    rows = [-(-rank // 16) * 16 for rank in ranks]
    pool = SitePool.allocate(
        kind=kind,
        pool_rows=max(sum(rows), 16),
        in_features=in_features,
        out_features=out_features,
        max_adapters=len(ranks),
        dtype=dtype,
        device=device,
        max_rank=max([1, *ranks]),
    )
    pool.a.fill_(float("nan"))
    pool.b.fill_(float("nan"))
    order = list(range(len(ranks)))
    random.shuffle(order)
    start = 0
    for slot in order:
        rank = ranks[slot]
        a_RK = torch.randn(rank, in_features, device=device) * (1 if kind == "embedding" else in_features**-0.5)
        b_RN = torch.randn(rank, out_features, device=device) * max(rank, 1) ** -0.5
        pool.write(slot, start=start, a_RK=a_RK, b_RN=b_RN, scaling=random.uniform(0.5, 2.0))
        start += rows[slot]
    return pool


def draw_slots(rows: int, width: int, max_adapters: int, order: str) -> torch.Tensor:
    """int32 [T, J]. order: runs (ragged, as requests lie), shuffled (a slot per row), one (a single slot)."""
    if order == "one":
        return torch.full((rows, width), max_adapters - 1, dtype=torch.int32)
    slots = torch.randint(-1, max_adapters, (rows, width), dtype=torch.int32)
    if order == "runs" and rows:
        cuts = [0, *sorted(random.choices(range(rows + 1), k=4)), rows]
        for start, stop in pairwise(cuts):
            slots[start:stop] = slots[start : start + 1]
    if rows:
        slots[-1] = max_adapters - 1
    return slots


def make_case(
    kind: str = "linear",
    *,
    rows: int = 24,
    features: int = 40,
    outs: Sequence[int] = (24,),
    ranks: Sequence[int] = (8, 16, 0, 3),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    width: int = 1,
    order: str = "runs",
    none_members: Sequence[int] = (),
) -> Case:
    """A random call; `features` is K, or V for an embedding; one member for each of `outs`."""
    embedding = kind == "embedding"
    scale = 1.0 if embedding else features**-0.5
    shapes = [(features, n) if embedding else (n, features) for n in outs]
    ids = torch.randint(0, features, (rows,), device=device)
    pools = tuple(
        None
        if i in none_members
        else make_pool("embedding" if embedding else "linear", features, n, ranks, dtype, device)
        for i, n in enumerate(outs)
    )
    return Case(
        kind=kind,
        x=ids if embedding else torch.randn(rows, features, dtype=dtype, device=device),
        weights=[(torch.randn(shape, device=device) * scale).to(dtype) for shape in shapes],
        biases=[torch.randn(n, dtype=dtype, device=device) if bias else None for n in outs],
        row_slots=draw_slots(rows, width, len(ranks), order).to(device),
        row_coeffs=torch.rand(rows, width, device=device) if width > 1 else None,
        pools=pools,
        max_adapters=len(ranks),
    )


def row_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each row; one that cancels below its terms is measured against their size (order one)."""
    found, expected = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (found, expected))
    size = expected.norm(dim=1).clamp(min=0.5 * expected.shape[1] ** 0.5)
    return (found - expected).norm(dim=1) / size


def assert_near(
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    dtype: torch.dtype,
    limits: Mapping[torch.dtype, float] = TOLERANCE,
) -> None:
    assert len(found) == len(expected)
    for y, truth in zip(found, expected, strict=True):
        assert y.shape == truth.shape
        assert y.dtype == dtype
        if y.numel():
            errors = row_errors(y, truth)
            worst = int(errors.nan_to_num(torch.inf).argmax())
            assert errors[worst] <= limits[dtype], f"row {worst}: relative error {errors[worst]:.2e} in {dtype}"


def assert_right(case: Case) -> list[torch.Tensor]:
    """Runs the case, compares every row with the reference and checks that the adapters mattered."""
    found, truth = case.run(), case.expected()
    assert_near(found, truth, case.weights[0].dtype)
    used = {slot for slot in case.row_slots.unique().tolist() if slot >= 0}
    for y, base, pool in zip(found, case.base(), case.pools, strict=True):
        if pool is not None and any(pool.rank.tolist()[slot] for slot in used):
            assert not torch.equal(y, base), "the adapters changed nothing"
    return found


def equal_bits(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], rows: torch.Tensor | slice) -> bool:
    return all(torch.equal(a.flatten(0, -2)[rows], b.flatten(0, -2)[rows]) for a, b in zip(left, right, strict=True))


def linear_call(case: Case) -> LinearCall:
    """What the Triton bodies of a linear get."""
    from fxlora.kernels.call import LinearCall, Members

    segments = ops.segment_rows(case.row_slots, case.max_adapters)
    rest = (case.row_slots, case.row_coeffs, segments, Members(case.pools))
    return LinearCall(case.x, case.weights, case.biases, *rest)
