"""The pool: bits, bytes and addresses of adapter memory, loads that change nothing when refused, and its end."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.torch import load_file

from fxlora.adapter import WEIGHTS_NAME, read_adapter
from fxlora.adapter_config import AdapterConfig
from fxlora.binding import BoundAdapter, Entry, bind_adapter
from fxlora.errors import (
    AdapterError,
    AdapterShapeError,
    CapacityError,
    DuplicateAdapterError,
    NonFiniteError,
    PoolClosedError,
    RankError,
    RuntimeGoneError,
    UnboundTensorError,
    UnknownAdapterError,
)
from fxlora.kernels.registry import SitePool, pools_of
from fxlora.passes.sites import Role, Site
from fxlora.pool import AdapterPool, ExtentAllocator, round_up_rows
from tests.fxlora.peft_sites import make_site, sites_of
from tests.models import ZOO
from tests.oracle import RECIPES, config_of, make_adapter

DIGEST = 0x51735


def make_sites(dtype: torch.dtype = torch.float32) -> tuple[Site, Site, Site]:
    """A linear K 6, N 5; an embedding V 7, N 6; a head K 6, N 7, tied to the embedding."""
    table = torch.randn(7, 6)
    linear = make_site("fc", torch.randn(5, 6), dtype=dtype)
    embedding = make_site("emb", table, Role.EMBEDDING, dtype=dtype)
    head = make_site("head", table, Role.LOGITS, dtype=dtype)
    return linear, embedding, head


def make_bound(ranks: Mapping[Site, int], seed: int = 0, scaling: float = 0.5) -> BoundAdapter:
    generator = torch.Generator().manual_seed(seed)
    entries = {
        site: Entry(
            torch.randn(rank, site.in_features, generator=generator),
            torch.randn(site.out_features, rank, generator=generator).t(),
            scaling,
            rank,
            (f"{site.name}.lora_A.weight", f"{site.name}.lora_B.weight"),
        )
        for site, rank in ranks.items()
    }
    return BoundAdapter("made", AdapterConfig(r=4, lora_alpha=2.0), entries)


def make_pool(sites: tuple[Site, ...], **options: int) -> AdapterPool:
    sizes = {"max_adapters": 3, "max_rank": 32, **options}
    return AdapterPool(sites, digest=DIGEST, **sizes)


def site_pool(pool: AdapterPool, site: Site) -> SitePool:
    (found,) = pools_of(pool.handles[(site,)])
    assert found is not None
    return found


def rows_of(pool: AdapterPool, site: Site, slot: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [R, K], B [R, N] and the scaling that the ops would read for a slot, by way of the handle."""
    memory = site_pool(pool, site)
    start, rank = int(memory.start[slot]), int(memory.rank[slot])
    a_PK = memory.a.t() if site.role is Role.EMBEDDING else memory.a
    return a_PK[start : start + rank], memory.b[start : start + rank], float(memory.scaling[slot])


def snapshot(pool: AdapterPool) -> list[object]:
    """Every byte of every pool and table, and who holds what."""
    state: list[object] = [dict(pool.slots)]
    for site in pool.sites:
        memory = site_pool(pool, site)
        state += [t.numpy().tobytes() for t in (memory.a, memory.b, memory.start, memory.rank, memory.scaling)]
        extents = pool._rooms[site].extents
        state += [list(map(id, memory.extents)), (extents.free, extents.largest_free, extents.find(16))]
    return state


def test_the_pool_holds_a_and_b_transposed_bit_for_bit(tmp_path: Path) -> None:
    entry = ZOO["gpt2"]
    model = sites_of(entry.build())
    pool = AdapterPool(model.sites, digest=DIGEST, max_adapters=2, max_rank=8)
    folder = make_adapter(entry.build, config_of(entry, RECIPES["docs"]), tmp_path)
    with read_adapter(folder) as adapter:
        bound = bind_adapter(adapter, model.sites, model.skipped, model.weights)
    slot = pool.load("docs", bound)
    tensors = load_file(folder / WEIGHTS_NAME)
    assert len(bound.entries) == 10
    for site in bound.entries:
        a_RK, b_RN, scaling = rows_of(pool, site, slot)
        key_a, key_b = bound.entries[site].keys
        assert torch.equal(a_RK, tensors[key_a])
        assert torch.equal(b_RN, tensors[key_b].t())
        assert scaling == torch.tensor(5 / 4**0.5, dtype=torch.float32)
    memory = site_pool(pool, model.of("transformer.wte", Role.EMBEDDING))
    assert memory.a.shape == (131, 2 * 16)


def test_nothing_of_a_loaded_adapter_is_kept(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    model = sites_of(entry.build())
    pool = AdapterPool(model.sites, digest=DIGEST, max_adapters=2, max_rank=8)
    folder = make_adapter(entry.build, config_of(entry, RECIPES["sql"]), tmp_path)
    with read_adapter(folder) as adapter:
        bound = bind_adapter(adapter, model.sites, model.skipped, model.weights)
    pool.load("sql", bound)
    del bound, adapter
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(folder) in os.path.realpath(link)]
    assert pool.names == ("sql",)


def test_values_are_converted_to_the_dtype_of_the_site(caplog: pytest.LogCaptureFixture) -> None:
    sites = make_sites(torch.bfloat16)
    pool = make_pool(sites)
    bound = make_bound(dict.fromkeys(sites, 4))
    with caplog.at_level(logging.DEBUG, "fxlora.pool"):
        slot = pool.load("a", bound)
    assert "A at site fc: torch.float32 stored as torch.bfloat16" in caplog.text
    for site, entry in bound.entries.items():
        a_RK, b_RN, _ = rows_of(pool, site, slot)
        assert torch.equal(a_RK, entry.a_RK.bfloat16())
        assert torch.equal(b_RN, entry.b_RN.bfloat16())


def test_bytes_are_those_allocated_and_are_logged_first(caplog: pytest.LogCaptureFixture) -> None:
    sites = make_sites(torch.float16)
    with caplog.at_level(logging.INFO, "fxlora.pool"):
        pool = make_pool(sites, max_adapters=3, max_rank=20)
    assert pool.pool_rows == 3 * 32
    assert pool.bytes == 96 * (6 + 5 + 7 + 6 + 6 + 7) * 2 + 3 * 12 * 3
    assert pool.bytes == sum(site_pool(pool, site).bytes for site in sites)
    assert f"3 sites of 96 rank rows, {pool.bytes} bytes" in caplog.text


def test_bytes_are_logged_even_if_allocation_fails(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> SitePool:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SitePool, "allocate", fail)
    with caplog.at_level(logging.INFO, "fxlora.pool"), pytest.raises(torch.OutOfMemoryError):
        make_pool(make_sites())
    assert "adapter pools: 3 sites" in caplog.text


def test_a_site_without_a_pool_is_named() -> None:
    linear, other, *_ = make_sites()
    pool = make_pool((linear,))
    assert pool.sites == tuple(site for (site,) in pool.handles) == (linear,)
    with pytest.raises(UnboundTensorError, match=rf"{other.name}\.lora_A\.weight: site {other.name} .* owns no pool"):
        pool.load("a", make_bound({linear: 4, other: 4}))


def test_ranks_are_packed_in_granules_of_sixteen() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,), max_adapters=4, pool_rows=100)
    assert pool.pool_rows == 112
    for index, rank in enumerate((1, 17, 16, 32)):
        assert pool.load(f"a{index}", make_bound({site: rank}, index)) == index
    memory = site_pool(pool, site)
    assert memory.start.tolist() == [0, 16, 48, 64]
    assert memory.rank.tolist() == [1, 17, 16, 32]


def test_an_adapter_takes_rows_only_where_it_has_weights() -> None:
    linear, embedding, head = make_sites()
    pool = make_pool((linear, embedding, head))
    pool.load("a", make_bound({linear: 8}))
    pool.load("b", make_bound({linear: 4, embedding: 32}))
    assert [site_pool(pool, site).rank.tolist() for site in pool.sites] == [[8, 4, 0], [0, 32, 0], [0, 0, 0]]
    assert site_pool(pool, embedding).start[1] == 0


def test_a_freed_slot_and_a_freed_gap_are_used_first() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,), max_adapters=3, pool_rows=96)
    for index, rank in enumerate((16, 32, 16)):
        pool.load(f"a{index}", make_bound({site: rank}, index))
    kept = rows_of(pool, site, 2)[0].clone()
    pool.unload("a1")
    assert site_pool(pool, site).rank.tolist() == [16, 0, 16]
    bound = make_bound({site: 20}, 9)
    assert pool.load("b", bound) == 1
    assert site_pool(pool, site).start.tolist() == [0, 16, 48]
    assert torch.equal(rows_of(pool, site, 1)[0], bound.entries[site].a_RK)
    assert torch.equal(rows_of(pool, site, 2)[0], kept)
    assert pool.names == ("a0", "b", "a2")


def test_fragmented_rows_are_named_in_the_error_and_change_nothing() -> None:
    linear, embedding, head = sites = make_sites()
    pool = make_pool(sites, max_adapters=6, pool_rows=64)
    for name in "abcd":
        pool.load(name, make_bound({linear: 16}))
    pool.unload("a")
    pool.unload("c")
    before = snapshot(pool)
    with pytest.raises(
        CapacityError, match=r"rank 17 at site fc asks for 32 .* 32 of 64 are free, 16 adjacent"
    ) as caught:
        pool.load("e", make_bound({head: 16, embedding: 16, linear: 17}))
    error = caught.value
    assert (error.unit, error.asked, error.free, error.largest_free) == ("pool rows", 32, 32, 16)
    assert "['b', 'd']" in str(error)
    assert snapshot(pool) == before
    pool.load("e", make_bound({head: 16, embedding: 16, linear: 16}))
    assert site_pool(pool, linear).start[pool.slot_of("e")] == 0


def test_no_slot_left() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,), max_adapters=2)
    for name in "ab":
        pool.load(name, make_bound({site: 4}))
    before = snapshot(pool)
    with pytest.raises(CapacityError, match=r"all 2 slots are taken by \['a', 'b'\]") as caught:
        pool.load("c", make_bound({site: 4}))
    assert (caught.value.unit, caught.value.asked, caught.value.free) == ("slots", 1, 0)
    assert snapshot(pool) == before


def broken(bound: BoundAdapter, site: Site, **change: object) -> BoundAdapter:
    entry = Entry(**{**vars(bound.entries[site]), **change})
    return BoundAdapter(bound.origin, bound.config, {**bound.entries, site: entry})


def test_every_refused_load_leaves_every_byte_as_it_was() -> None:
    linear, embedding, head = sites = make_sites(torch.float16)
    foreign = make_site("foreign", torch.randn(5, 6))
    pool = make_pool(sites)
    pool.load("a", make_bound(dict.fromkeys(sites, 8), 1))
    before = snapshot(pool)
    good = make_bound(dict.fromkeys(sites, 4), 2)
    huge = torch.full((4, head.in_features), 1e5)
    nan = torch.full((4, head.out_features), float("nan"))
    cases: list[tuple[str, BoundAdapter, type[Exception]]] = [
        ("a", good, DuplicateAdapterError),
        ("", good, AdapterError),
        ("b", make_bound({linear: 4, foreign: 4}), UnboundTensorError),
        ("b", make_bound({linear: 4, embedding: 33}), RankError),
        ("b", broken(good, head, a_RK=torch.randn(4, 7)), AdapterShapeError),
        ("b", broken(good, head, b_RN=torch.randn(3, 7)), AdapterShapeError),
        ("b", broken(good, head, a_RK=torch.randn(0, 6), b_RN=torch.randn(0, 7)), RankError),
        ("b", broken(good, head, a_RK=huge), NonFiniteError),
        ("b", broken(good, head, b_RN=nan), NonFiniteError),
        ("b", broken(good, head, scaling=float("nan")), NonFiniteError),
        ("b", broken(good, head, scaling=1e300), NonFiniteError),
    ]
    for name, bound, error in cases:
        with pytest.raises(error):
            pool.load(name, bound)
        assert snapshot(pool) == before, (name, error)
    pool.load("b", good)
    assert snapshot(pool) != before


def test_values_that_are_not_finite_are_refused_by_the_names_of_adapter_site_and_tensor() -> None:
    linear, _, head = sites = make_sites(torch.float16)
    pool = make_pool(sites)
    before, good = snapshot(pool), make_bound(dict.fromkeys(sites, 4))
    for half, width in (("a_RK", head.in_features), ("b_RN", head.out_features)):
        values = torch.ones(4, width)
        values[2, :3] = 7e4  # finite, but not in fp16
        with pytest.raises(NonFiniteError, match=f"adapter 'sql': 3 values of {half[0].upper()}.*float16") as caught:
            pool.load("sql", broken(good, head, **{half: values}))
        assert head.name in str(caught.value)
        assert all(key in str(caught.value) for key in good.entries[head].keys)
        assert snapshot(pool) == before
        assert pool.names == ()
    assert pool.load("sql", good) == 0
    assert int(site_pool(pool, linear).rank[0]) == 4


def test_a_write_that_fails_midway_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, head = sites = make_sites()
    pool = make_pool(sites)
    pool.load("a", make_bound(dict.fromkeys(sites, 8), 1))
    kept = [tuple(t.clone() for t in rows_of(pool, site, 0)[:2]) for site in sites]
    write, failing = SitePool.write, site_pool(pool, head)

    def fail_at_head(self: SitePool, slot: int, **options: object) -> None:
        if self is failing:
            raise torch.OutOfMemoryError("device lost")
        write(self, slot, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SitePool, "write", fail_at_head)
    with pytest.raises(torch.OutOfMemoryError):
        pool.load("b", make_bound(dict.fromkeys(sites, 8), 2))
    monkeypatch.undo()
    assert pool.names == ("a",)
    for site, (a_RK, b_RN) in zip(sites, kept, strict=True):
        memory = site_pool(pool, site)
        assert memory.rank.tolist() == [8, 0, 0]
        assert memory.extents[1:] == [None, None]
        assert pool._rooms[site].extents.free == pool.pool_rows - 16
        assert torch.equal(rows_of(pool, site, 0)[0], a_RK)
        assert torch.equal(rows_of(pool, site, 0)[1], b_RN)
    assert pool.load("b", make_bound(dict.fromkeys(sites, 8), 2)) == 1


def test_addresses_never_move() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,))

    def addresses() -> list[int]:
        memory = site_pool(pool, site)
        return [t.data_ptr() for t in (memory.a, memory.b, memory.start, memory.rank, memory.scaling)]

    first = addresses()
    for name in "abcabc":
        if name in pool.names:
            pool.unload(name)
        pool.load(name, make_bound({site: 32}))
    assert addresses() == first


def test_unknown_names_list_what_is_loaded() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,))
    pool.load("a", make_bound({site: 4}))
    for call in (pool.unload, pool.slot_of):
        with pytest.raises(UnknownAdapterError, match=r"no adapter 'x' is loaded; loaded: \['a'\]"):
            call("x")


@pytest.mark.parametrize("sizes", [{"max_adapters": 0}, {"max_rank": 0}])
def test_sizes_below_one(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="both are at least 1"):
        make_pool((), **sizes)


def test_a_pool_too_small_for_one_adapter() -> None:
    with pytest.raises(CapacityError, match="pool_rows=16 cannot hold one adapter of max_rank 20, which takes 32 rows"):
        make_pool((), max_rank=20, pool_rows=16)


def test_closing_ends_the_handles() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,))
    pool.load("a", make_bound({site: 4}))
    handle = pool.handles[(site,)]
    pool.close()
    pool.close()
    assert (pool.names, pool.bytes) == ((), 0)
    with pytest.raises(RuntimeGoneError):
        pools_of(handle)
    for call in (lambda: pool.load("b", make_bound({site: 4})), lambda: pool.unload("a")):
        with pytest.raises(PoolClosedError):
            call()


def test_a_forgotten_pool_lets_its_memory_go() -> None:
    (site, *_) = make_sites()
    pool = make_pool((site,))
    handle = pool.handles[(site,)]
    del pool
    gc.collect()
    with pytest.raises(RuntimeGoneError):
        pools_of(handle)


def test_two_pools_of_one_plan_are_apart() -> None:
    (site, *_) = make_sites()
    one, two = make_pool((site,)), make_pool((site,))
    assert one.handles[(site,)] != two.handles[(site,)]
    one.load("a", make_bound({site: 4}))
    assert site_pool(two, site).rank.tolist() == [0, 0, 0]


def test_copies_are_refused_with_a_reason() -> None:
    pool = make_pool(make_sites())
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            call(pool)


def test_threads_take_turns() -> None:
    sites = make_sites()
    pool = make_pool(sites, max_adapters=4)
    bounds = {f"t{index}": make_bound(dict.fromkeys(sites, 4 + index), index) for index in range(4)}
    failures: list[BaseException] = []

    def churn(name: str) -> None:
        try:
            for _ in range(20):
                slot = pool.load(name, bounds[name])
                for site, entry in bounds[name].entries.items():
                    a_RK, b_RN, _ = rows_of(pool, site, slot)
                    assert torch.equal(a_RK, entry.a_RK)
                    assert torch.equal(b_RN, entry.b_RN)
                pool.unload(name)
        except BaseException as error:  # reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in bounds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.names == ()
    assert all(pool._rooms[site].extents.free == pool.pool_rows for site in sites)


class Extents(RuleBasedStateMachine):
    """The allocator against a plain list of owners, one per row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int | None] = [None] * 160
        self.allocator = ExtentAllocator(160)
        self.held: dict[int, int] = {}

    def first_gap(self, need: int) -> int | None:
        starts = range(160 - need + 1)
        return next((at for at in starts if all(owner is None for owner in self.rows[at : at + need])), None)

    @rule(rank=st.integers(1, 100))
    def take(self, rank: int) -> None:
        need = round_up_rows(rank)
        start = self.allocator.find(rank)
        assert start == self.first_gap(need)
        if start is not None:
            self.allocator.take(start, rank)
            self.held[start] = need
            self.rows[start : start + need] = [start] * need

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.held)))
        self.allocator.release(start)
        need = self.held.pop(start)
        self.rows[start : start + need] = [None] * need

    @invariant()
    def counts_agree(self) -> None:
        runs = "".join("." if owner is None else "x" for owner in self.rows).split("x")
        assert self.allocator.free == self.rows.count(None)
        assert self.allocator.largest_free == max(map(len, runs))
        assert all(start % 16 == 0 for start in self.held)


TestExtents = Extents.TestCase
TestExtents.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
