"""Adapter memory of experts: packed over all experts, either half shared, its bytes said before they are taken."""

from __future__ import annotations

import logging

import pytest
import torch

from fxlora.adapter_config import AdapterConfig
from fxlora.binding import BoundAdapter
from fxlora.entries import Entry
from fxlora.errors import AdapterShapeError, CapacityError, RankError
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.registry import expert_pool_of
from fxlora.passes.sites import Role, Site
from fxlora.pool import AdapterPool
from tests.fxlora.peft_sites import make_site


def make_pool(sites: tuple[Site, ...], **sizes: int) -> AdapterPool:
    return AdapterPool(sites, digest=0xE1E1, **{"max_adapters": 3, "max_rank": 32, **sizes})


def expert_site(experts: int = 5) -> Site:
    weight = torch.randn(experts, 7, 6)
    return Site("w", "w", (), Role.EXPERTS, weight, 6, 7, torch.float32, weight.device, num_experts=experts)


def expert_entry(site: Site, rank: int, shared: tuple[bool, bool] = (False, False)) -> BoundAdapter:
    rows = [rank * (1 if half else site.num_experts) for half in shared]
    a, b = torch.randn(rows[0], site.in_features), torch.randn(rows[1], site.out_features)
    entry = Entry(a, b, 0.5, rank, ("w.lora_A.weight", "w.lora_B.weight"), shared, tuple(range(site.num_experts)))
    return BoundAdapter("made", AdapterConfig(r=4, lora_alpha=2.0), {site: entry})


def expert_memory(pool: AdapterPool, site: Site) -> ExpertPool:
    found = expert_pool_of(pool.handles[(site,)])
    assert found is not None
    return found


def test_experts_are_packed_and_either_half_may_be_shared() -> None:
    """5 experts of rank 3 take 15 rows, one granule; what all share takes one expert's rows."""
    site = expert_site()
    pool = make_pool((site,), max_adapters=4, max_rank=8, expert_pool_rows=16)
    shapes = {"own": (False, False), "a": (True, False), "b": (False, True), "both": (True, True)}
    loaded = {name: expert_entry(site, 3, shared) for name, shared in shapes.items()}
    for name, bound in loaded.items():
        pool.load(name, bound)
    memory = expert_memory(pool, site)
    assert (memory.a.shape, memory.b.shape) == ((80, 6), (80, 7))
    assert [memory.a_start.tolist(), memory.b_start.tolist()] == [[0, 16, 32, 48], [0, 16, 32, 48]]
    assert [memory.a_step.tolist(), memory.b_step.tolist()] == [[3, 0, 3, 0], [3, 3, 0, 0]]
    for slot, bound in enumerate(loaded.values()):
        entry, starts = bound.entries[site], (memory.a_start[slot], memory.b_start[slot])
        for pool_rows, start, rows in zip((memory.a, memory.b), starts, (entry.a_RK, entry.b_RN), strict=True):
            assert torch.equal(pool_rows[start : start + len(rows)], rows)
    before = [t.clone() for t in (memory.a, memory.b)]
    pool.unload("a")
    assert memory.rank.tolist() == [3, 0, 3, 3]
    pool.load("again", expert_entry(site, 3))
    assert memory.a_start.tolist()[1] == 16
    assert all(torch.equal(new[32:], old[32:]) for new, old in zip((memory.a, memory.b), before, strict=True))


def test_default_memory_of_experts_and_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 16 for every slot, or max_rank where that is lower; one adapter of max_rank always fits."""
    site, linear = expert_site(), make_site("fc", torch.randn(5, 6))
    for slots, rank, rows in ((3, 4, 3 * 32), (3, 20, 3 * 80), (1, 64, 320)):
        with caplog.at_level(logging.INFO, "fxlora.pool"):
            pool = make_pool((site, linear), max_adapters=slots, max_rank=rank)
        assert expert_memory(pool, site).a.shape[0] == rows
        assert pool.bytes == expert_memory(pool, site).bytes + pool._rooms[linear].pool.bytes
        assert f"of these, 1 expert sites with {expert_memory(pool, site).bytes} bytes" in caplog.text


def test_refused_loads_of_experts_leave_every_byte() -> None:
    site = expert_site()
    pool = make_pool((site,), max_adapters=2, max_rank=8, expert_pool_rows=8)
    pool.load("own", expert_entry(site, 5))
    memory = expert_memory(pool, site)
    before = [t.clone() for t in (memory.a, memory.b, memory.rank)]
    short = expert_entry(site, 3)
    short.entries[site].a_RK.resize_(3, 6)
    for bound, error in (
        (expert_entry(site, 9), RankError),
        (short, AdapterShapeError),
        (expert_entry(site, 4), CapacityError),
    ):
        with pytest.raises(error):
            pool.load("other", bound)
        assert all(torch.equal(a, b) for a, b in zip((memory.a, memory.b, memory.rank), before, strict=True))
    pool.load("other", expert_entry(site, 3, (True, True)))
