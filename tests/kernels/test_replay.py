"""Replays: the third call of a kind enters the kernels as the first two did, at its own addresses, or goes the long
way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxlora.kernels import ops
from tests.kernels.cases import HAS_CUDA, Case, equal_bits, make_case, registered
from tests.kernels.expert_cases import ExpertCase, make_expert_case

pytest.importorskip("triton")
from fxlora.kernels import call as calls
from fxlora.kernels import expert_call, launch, lora_embedding, lora_experts, lora_linear, replay
from fxlora.kernels.entry import Entry
from fxlora.kernels.errors import OpInputError, RuntimeGoneError
from fxlora.kernels.expert_tiles import ExpertBesideTile, ExpertHopperTile, ExpertPrefillTile, expert_prefill_tile
from fxlora.kernels.prefill_tiles import BesideTile, HopperTile
from fxlora.kernels.tiles import SHRINK_ALONE
from fxlora.kernels.wave_tiles import FusedHopperTiles
from tests.kernels.test_prefill_hopper import IS_HOPPER

pytestmark = pytest.mark.skipif(ops.INTERPRET, reason="interpreted kernels are launched plainly")

BF16 = torch.bfloat16
LINEARS: dict[str, dict[str, Any]] = {
    "gemv": {"rows": 1, "outs": (64,)},
    "gemv, three members, one without a pool": {"rows": 1, "outs": (64, 32, 16), "none_members": (1,), "bias": True},
    "decode": {"rows": 16, "outs": (1024,)},
    "decode, two slots, bias": {"rows": 16, "outs": (1024, 64), "width": 2, "bias": True},
    "decode, its own shrink": {"rows": 200, "outs": (1024,)},
    "fused": {"rows": 200, "outs": (256, 64)},
    "prefill": {"rows": 300, "outs": (256, 64)},
    "prefill, a member without a pool": {"rows": 300, "outs": (256, 64), "none_members": (0,), "bias": True},
}
ONE_WAVE: tuple[dict[str, Any], ...] = (
    {"rows": 40, "outs": (256,)}, {"rows": 200, "outs": (256, 64), "none_members": (0,), "bias": True},
)  # fmt: skip
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "row by row": {"rows": 9},
    "two slots, by tiles": {"rows": 200, "width": 2},
    "no pool": {"rows": 9, "none_members": (0,)},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "decode": {"rows": 20},
    "decode, any order, bias": {"rows": 20, "in_place": False, "bias": True, "width": 2},
    "prefill": {"rows": 400},
    "prefill, transposed, any order": {"rows": 400, "transposed": True, "in_place": False},
    "prefill, no pool": {"rows": 400, "has_pool": False},
}


def noting(make: Callable[..., Any], made: list[Any]) -> Callable[..., Any]:
    """Makes the same, and notes it."""

    def prepare(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    return prepare


class Entries:
    """What kernels were entered with, and the calls that were prepared."""

    def __init__(self) -> None:
        self.log: list[tuple[str, object]] = []
        self.prepared: list[Any] = []

    @property
    def long(self) -> int:
        """How many went the long way."""
        return len(self.prepared)

    def taken(self, names: dict[int, str], constant: set[int]) -> list[Any]:
        """What was entered since the last time, addresses by name, scratch by the order in which it turned up."""
        scratch: dict[int, str] = {}

        def visit(value: object) -> object:
            if isinstance(value, launch.Described):
                return visit(value.base.data_ptr()), value.shape, value.strides, value.block
            if isinstance(value, tuple):
                return tuple(map(visit, value))
            if not isinstance(value, int) or value < 1 << 24 or value in constant:
                return value
            return names.get(value) or scratch.setdefault(value, f"scratch {len(scratch)}")

        log, self.log = self.log, []
        return [(kernel, visit(found)) for kernel, found in log]


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Entries]:
    """Nothing runs: kernels are known at their first launch, and their entries write down what they get.

    They are forgotten afterwards: those of the next test would write here.
    """
    found, variants = Entries(), []

    def launch_plain(self: Any, grid: tuple[int, ...], args: tuple[object, ...], variant: Any) -> None:
        kinds = launch.kinds_of(args, self.kernel.params)
        assert kinds is not None
        variant.family = variant.family or launch._Family(kinds, launch._binder(kinds), {})
        variants.append(variant)
        name = self.kernel.fn.__name__
        enter = Entry(lambda *given: found.log.append((name, given)), None)
        variant.family.kernels[variant.family.bind(args)[0]] = enter
        variant.launch(grid, args)

    monkeypatch.setattr(launch.Launcher, "launch_plain", launch_plain)
    for module in (launch, replay):
        monkeypatch.setattr(module, "raw_stream", lambda device: 7)
    for module in (calls, expert_call):
        monkeypatch.setattr(module, "can_overlap", lambda device: True)
    monkeypatch.setattr(lora_linear, "LinearCall", noting(lora_linear.LinearCall, found.prepared))
    monkeypatch.setattr(lora_experts, "ExpertCall", noting(lora_experts.ExpertCall, found.prepared))
    monkeypatch.setattr(lora_embedding, "EmbeddingCall", noting(lora_embedding.EmbeddingCall, found.prepared))
    yield found
    for variant in variants:
        variant.family = None


def moved(case: Any) -> Any:
    """The same call with what changes from call to call elsewhere in memory."""
    names = [name for name in ("x", "row_slots", "row_coeffs", "offsets", "expert_ids") if hasattr(case, name)]
    return replace(
        case, **{name: None if getattr(case, name) is None else getattr(case, name).clone() for name in names}
    )


def run_linear(case: Case, handle: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    segments = ops.segment_rows(case.row_slots, case.max_adapters)
    rest = (case.row_slots, case.row_coeffs, segments, handle)
    return lora_linear.lora_linear(case.x, case.weights, case.biases, *rest), segments


def run_embedding(case: Case, handle: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    segments = ops.segment_rows(case.row_slots, case.max_adapters)
    rest = (case.row_slots, case.row_coeffs, segments, handle)
    return [lora_embedding.lora_embedding(case.x, case.weights[0], *rest)], segments


def run_experts(case: ExpertCase, handle: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    segments = case.segments()
    rest = (case.row_slots, case.row_coeffs, segments, handle)
    return [lora_experts.lora_experts(case.x, case.weight, case.bias, *rest)], segments


def names_of(case: Any, outputs: Sequence[torch.Tensor], segments: torch.Tensor) -> dict[int, str]:
    named = {"x": case.x, "slots": case.row_slots, "coeffs": case.row_coeffs, "segments": segments}
    named |= {f"y{i}": output for i, output in enumerate(outputs)}
    return {tensor.data_ptr(): name for name, tensor in named.items() if tensor is not None}


def constants_of(case: Any) -> set[int]:
    """Addresses of pools, weights and biases."""
    pools = case.pools if isinstance(case, Case) else (case.pool,)
    fixed = [*case.weights, *case.biases] if isinstance(case, Case) else [case.weight, case.bias]
    for pool in pools:
        fixed += [] if pool is None else [value for value in vars(pool).values() if isinstance(value, torch.Tensor)]
    return {tensor.data_ptr() for tensor in fixed if tensor is not None}


def check_replay(case: Any, run: Any, entries: Entries) -> None:
    pools = case.pools if isinstance(case, Case) else (case.pool,)
    with registered(pools) as handle:
        taken, kept = [], []
        for _ in range(4):
            case = moved(case)
            outputs, segments = run(case, handle)
            kept.append((case, outputs, segments))  # alive, so that no address comes again
            taken.append(entries.taken(names_of(case, outputs, segments), constants_of(case)))
        assert entries.long == 2
        assert taken[0]
        assert taken[0] == taken[1] == taken[2] == taken[3]
        shapes = [[(y.shape, y.dtype, y.stride()) for y in outputs] for _, outputs, _ in kept]
        assert shapes[0] == shapes[3]


@pytest.mark.parametrize("name", LINEARS)
def test_a_linear_is_entered_as_before(name: str, entries: Entries) -> None:
    check_replay(make_case(features=64, dtype=BF16, **LINEARS[name]), run_linear, entries)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_entered_as_before(name: str, entries: Entries) -> None:
    check_replay(make_case("embedding", features=64, dtype=BF16, **EMBEDDINGS[name]), run_embedding, entries)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_entered_as_before(name: str, entries: Entries) -> None:
    check_replay(make_expert_case(features=64, out=32, dtype=BF16, **EXPERTS[name]), run_experts, entries)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, shrinks that run beside the product, in calls of any size."""
    for module in (lora_linear, lora_experts):
        monkeypatch.setattr(module, "has_gluon", lambda device: True)
    tile = HopperTile(128, 128, 64, 5, False, 8, 0, BesideTile(3, 1000))
    monkeypatch.setattr(lora_linear, "hopper_tile", lambda *_: tile)

    def expert_tile(*sizes: Any) -> ExpertPrefillTile:
        return replace(expert_prefill_tile(*sizes), early=True, shrink=ExpertBesideTile(2, 1000))

    monkeypatch.setattr(lora_experts, "expert_beside_tile", expert_tile)


@pytest.fixture
def in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, experts whose h is made by those who make y, in calls of any size."""
    monkeypatch.setattr(lora_experts, "has_gluon", lambda device: True)
    monkeypatch.setattr(lora_experts, "expert_hopper_tile", lambda *_: ExpertHopperTile(4, 3, 2))


@pytest.fixture
def one_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, the tiles of one wave, in calls of any size."""
    monkeypatch.setattr(lora_linear, "has_gluon", lambda device: True)
    monkeypatch.setattr(lora_linear, "fused_hopper_tiles", lambda *_: FusedHopperTiles(SHRINK_ALONE, 64, 64, 128, 5))


@pytest.mark.usefixtures("one_wave")
@pytest.mark.parametrize("options", ONE_WAVE, ids=["plain", "members"])
def test_tiles_of_one_wave_are_entered_as_before(options: dict[str, Any], entries: Entries) -> None:
    """TMA reads A and B, which stay where they are."""
    check_replay(make_case(features=64, dtype=BF16, **options), run_linear, entries)


@pytest.mark.usefixtures("in_one")
def test_experts_in_one_launch_are_entered_as_before(entries: Entries) -> None:
    check_replay(make_expert_case(features=64, out=32, dtype=BF16, rows=400), run_experts, entries)


@pytest.mark.usefixtures("beside")
def test_shrinks_beside_the_product_are_entered_as_before(entries: Entries) -> None:
    """TMA reads A, which stays where it is."""
    for name in ("prefill", "prefill, a member without a pool"):
        entries.prepared.clear()
        check_replay(make_case(features=64, dtype=BF16, **LINEARS[name]), run_linear, entries)
    entries.prepared.clear()
    check_replay(make_expert_case(features=64, out=32, dtype=BF16, rows=400), run_experts, entries)


@pytest.mark.parametrize("has_guards", [True, False])
def test_what_is_not_of_the_kind_goes_the_long_way(
    has_guards: bool, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a torch whose dynamo does not check tensors for us."""
    assert replay._Guards is not None
    monkeypatch.setattr(replay, "_Guards", replay._Guards if has_guards else None)
    case = make_case(rows=16, features=64, outs=(1024,), dtype=BF16, bias=True)
    with registered(case.pools) as handle:
        for _ in range(3):
            run_linear(case, handle)
        assert entries.long == 2
        shifted = torch.zeros(16 * 64 + 1, dtype=BF16)[1:].view(16, 64)
        others = [
            replace(case, weights=[case.weights[0].clone()]),
            replace(case, biases=[case.biases[0].clone()]),
            replace(case, biases=[None]),
            replace(case, x=shifted),
            replace(case, x=case.x.view(4, 4, 64)),
            replace(case, row_coeffs=torch.ones(16, 1)),
            replace(case, x=case.x[:5], row_slots=case.row_slots[:5]),
        ]
        for number, other in enumerate(others):
            run_linear(other, handle)
            assert entries.long == 3 + number
        run_linear(case, handle)
        run_linear(replace(case, row_slots=case.row_slots.flip(0)), handle)
        assert entries.long == 2 + len(others)  # what was replayed last is still known
        for _ in range(3):  # and takes turns with what looks like it from afar
            run_linear(others[5], handle)
            run_linear(case, handle)
        assert entries.long == 2 + len(others)


def test_calls_of_any_length_do_not_end_the_replays_of_others(entries: Entries) -> None:
    """A server sees prompts of every length, for days: the kinds that come again and again stay known."""
    case = make_case(rows=700, features=16, outs=(24,), dtype=BF16)

    def prepared(rows: int) -> int:
        before = entries.long
        run_linear(replace(case, x=case.x[:rows], row_slots=case.row_slots[:rows]), handle)
        return entries.long - before

    with registered(case.pools) as handle:
        for rows in (5, 6, 5, 6):
            prepared(rows)
        for rows in range(40, 700):
            assert prepared(rows) == prepared(rows) == 1
            assert prepared(rows) == prepared(5) == prepared(6) == 0
        assert len(lora_linear.derived_of(handle, lora_linear._runs_of)[0].replays._alike) == replay.MOST_KEYS


def test_calls_that_are_never_alike_hardly_ever_make_a_function(entries: Entries) -> None:
    """As where every call has a weight of its own."""
    case = make_case(rows=5, features=16, outs=(24,), dtype=BF16)
    others = [replace(case, weights=[case.weights[0].clone()]) for _ in range(300)]
    with registered(case.pools) as handle:
        for other in others:
            run_linear(other, handle)
        (found,) = lora_linear.derived_of(handle, lora_linear._runs_of)[0].replays._alike.values()
        assert found.made <= replay.AT_ONCE + 8
        assert len(found.functions) == replay.MOST_ALIKE
    assert entries.long == len(others)


def test_a_known_call_is_refused_as_ever_where_it_is_wrong(entries: Entries) -> None:
    case = make_case(rows=16, features=64, outs=(64, 64), dtype=BF16)
    with registered(case.pools) as handle:
        for _ in range(3):
            run_linear(case, handle)
        assert entries.long == 2
        for count in (1, 3):
            weights = [case.weights[0]] * count
            with pytest.raises(OpInputError, match=f"got {count} weights, its group has 2"):
                run_linear(replace(case, weights=weights, biases=[None] * count), handle)
    with pytest.raises(RuntimeGoneError):
        run_linear(case, handle)


def test_copies_of_strided_input_are_made_again_each_time(entries: Entries) -> None:
    case = make_case(rows=300, features=64, outs=(256,), dtype=BF16)
    strided = replace(case, x=torch.randn(64, 300, dtype=BF16).t())
    with registered(case.pools) as handle:
        for _ in range(4):
            run_linear(strided, handle)
    assert entries.long == 4


@pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", LINEARS)
def test_a_replayed_linear_has_the_bits_of_a_prepared_one(name: str) -> None:
    assert_replayed_linears_have_prepared_bits(make_case(features=64, dtype=BF16, device="cuda", **LINEARS[name]))


def assert_replayed_linears_have_prepared_bits(case: Case) -> None:
    run = run_embedding if case.kind == "embedding" else run_linear
    with registered(case.pools) as handle:
        results = []
        for _ in range(4):
            results.append(run(case, handle)[0])
            case = moved(case)
    assert all(equal_bits(results[0], other, slice(None)) for other in results[1:])


@pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_a_replayed_embedding_has_the_bits_of_a_prepared_one(name: str) -> None:
    case = make_case("embedding", features=64, dtype=BF16, device="cuda", **EMBEDDINGS[name])
    assert_replayed_linears_have_prepared_bits(case)


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
@pytest.mark.usefixtures("beside")
def test_replays_of_shrinks_beside_the_product_have_the_bits_of_prepared_ones() -> None:
    case = make_case(features=64, dtype=BF16, device="cuda", **LINEARS["prefill"])
    experts = make_expert_case(features=64, out=32, dtype=BF16, device="cuda", rows=400)
    with registered(case.pools) as handle, registered([experts.pool]) as expert_handle:
        results = []
        for _ in range(4):
            results.append([*run_linear(case, handle)[0], *run_experts(experts, expert_handle)[0]])
            case, experts = moved(case), moved(experts)
    assert all(equal_bits(results[0], other, slice(None)) for other in results[1:])


def assert_replayed_experts_have_prepared_bits(case: ExpertCase) -> None:
    with registered([case.pool]) as handle:
        results = []
        for _ in range(4):
            results.append(run_experts(case, handle)[0])
            case = moved(case)
    assert all(torch.equal(results[0][0], other[0]) for other in results[1:])


@pytest.mark.skipif(not HAS_CUDA, reason="needs CUDA")
@pytest.mark.parametrize("name", EXPERTS)
def test_replayed_experts_have_the_bits_of_prepared_ones(name: str) -> None:
    case = make_expert_case(features=64, out=32, dtype=BF16, device="cuda", **EXPERTS[name])
    assert_replayed_experts_have_prepared_bits(case)


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
@pytest.mark.usefixtures("in_one")
def test_replays_of_experts_in_one_launch_have_the_bits_of_prepared_ones() -> None:
    case = make_expert_case(features=64, out=32, dtype=BF16, device="cuda", rows=400)
    assert_replayed_experts_have_prepared_bits(case)


@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
@pytest.mark.usefixtures("one_wave")
@pytest.mark.parametrize("options", ONE_WAVE, ids=["plain", "members"])
def test_replays_of_tiles_of_one_wave_have_the_bits_of_prepared_ones(options: dict[str, Any]) -> None:
    assert_replayed_linears_have_prepared_bits(make_case(features=64, dtype=BF16, device="cuda", **options))
