"""Kernels without a GPU, in Gluon and in Triton: right, and the same to the bit, in whichever order launches, programs,
warps and copies take turns; and what one of them would do wrong shows."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import Case, assert_near, equal_bits, linear_call, make_case
from tests.kernels.expert_cases import ExpertCase, make_expert_case

pytest.importorskip("triton")
from fxlora.kernels import call as calls
from fxlora.kernels import (
    decode,
    decode_shrink,
    expand,
    expert_call,
    expert_decode,
    expert_hopper,
    expert_hopper_shrink,
    expert_lists,
    expert_prefill,
    expert_prefill_shrink,
    fused,
    fused_hopper,
    fused_hopper_h,
    gemv,
    group_shrink,
    prefill,
    prefill_hopper,
    prefill_hopper_shrink,
    shrink,
)
from fxlora.kernels.expert_tiles import ExpertBesideTile, ExpertHopperTile
from fxlora.kernels.launch import Launcher
from fxlora.kernels.lora_experts import _run as run_experts
from fxlora.kernels.lora_linear import body_of
from fxlora.kernels.prefill_tiles import BesideTile
from tests.kernels import test_expert_hopper, test_expert_hopper_shrink
from tests.kernels.gluon_interpreter import Stream
from tests.kernels.gluon_machine import HangError, MisuseError
from tests.kernels.test_fused_hopper import FORMS
from tests.kernels.test_prefill_hopper import SHARED, TURNS

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(not INTERPRET, reason="compiled kernels are launched with what only a GPU takes"),
]
BF16 = torch.bfloat16
RANKS = (1, 8, 0, 16, 40, 64)
MODULES = (
    shrink, gemv, decode, decode_shrink, expand, group_shrink, fused, fused_hopper, prefill, prefill_hopper,
    prefill_hopper_shrink, expert_decode, expert_lists, expert_hopper, expert_hopper_shrink, expert_prefill,
    expert_prefill_shrink,
)  # fmt: skip
PREFILLS = {
    "turns": TURNS,
    "shared": SHARED,
    "shared, groups early": replace(SHARED, ahead=2),
    "turns, groups early": replace(TURNS, ahead=2),
    "turns, a shrink beside": replace(TURNS, shrink=BesideTile(2, 1000)),
    "turns, a shrink of all": replace(TURNS, shrink=BesideTile(1, 1)),
}
Run = Callable[[], Sequence[torch.Tensor]]
NewStream = Callable[[int], Stream]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> NewStream:
    """Has kernels interpreted from here on, in another order for each seed."""
    launchers = [found for module in MODULES for found in vars(module).values() if isinstance(found, Launcher)]
    kernels = [launcher.kernel for launcher in launchers]

    def new(seed: int) -> Stream:
        found = Stream(seed)
        for launcher, kernel in zip(launchers, kernels, strict=True):
            monkeypatch.setattr(launcher, "kernel", found.kernel(kernel))
        return found

    return new


@pytest.fixture
def overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of an op run beside each other, as on a Hopper GPU."""
    for module in (calls, expert_call):
        monkeypatch.setattr(module, "can_overlap", lambda device: True)


def check(run: Run, expected: Sequence[torch.Tensor], stream: NewStream, seeds: Sequence[int] = range(3)) -> None:
    first: Sequence[torch.Tensor] | None = None
    for seed in seeds:
        launched = stream(seed)
        found = run()
        launched.run()
        assert_near(list(found), list(expected), BF16)
        assert first is None or equal_bits(list(first), list(found), slice(None)), f"seed {seed}"
        first = first or found


def linears(rows: int, features: int, *outs: int, **options: Any) -> Case:
    return make_case(**{"rows": rows, "features": features, "outs": outs, "ranks": RANKS, "dtype": BF16, **options})


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "case",
    [
        lambda: linears(20, 264, 136, order="shuffled", bias=True),
        lambda: linears(70, 1304, 72, 8, 136, order="runs", none_members=(1,)),
        lambda: linears(9, 2056, 40, order="shuffled", ranks=tuple(i % 17 for i in range(40))),
    ],
    ids=["mixed ranks", "members", "many steps, no rank above 16"],
)
def test_tiles_of_one_wave(case: Callable[[], Case], form: str, stream: NewStream) -> None:
    made = case()
    check(lambda: fused_hopper.fused_hopper(linear_call(made), FORMS[form]), made.expected(), stream)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("form", ["narrow", "few rows", "narrow, early"])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_one_wave_that_wait_for_x_themselves(
    transposed: bool, form: str, stream: NewStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pool there is no launch before theirs."""
    case = linears(20, 1304, 72, 136, none_members=(0, 1), bias=True)
    if transposed:
        case = replace(case, weights=[weight.t().contiguous().t() for weight in case.weights])
    check(lambda: fused_hopper.fused_hopper(linear_call(case), FORMS[form]), case.expected(), stream)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", PREFILLS)
@pytest.mark.parametrize(
    "case",
    [
        lambda: linears(300, 264, 136, order="shuffled", bias=True),
        lambda: linears(200, 520, 264, 8, 40, order="runs", none_members=(1,)),
        lambda: linears(150, 72, 136, width=2, order="shuffled"),
    ],
    ids=["mixed ranks", "members", "two slots a row"],
)
def test_many_rows(case: Callable[[], Case], name: str, stream: NewStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs make all tiles, so that even a small call has turns."""
    monkeypatch.setattr(prefill, "multiprocessors", lambda device: 2)
    made = case()
    check(lambda: prefill.prefill(linear_call(made), PREFILLS[name]), made.expected(), stream)


def experts(**options: Any) -> ExpertCase:
    sizes = {"rows": 300, "experts": 3, "features": 200, "out": 264, "ranks": (8, 16, 0, 3, 40), "bias": True}
    return make_expert_case(**{**sizes, "dtype": BF16, **options})


EXPERTS: dict[str, dict[str, Any]] = {
    "mixed ranks": {},
    "transposed": {"transposed": True, "out": 520, "slot_runs": 20},
    "many steps": {"features": 1032, "rows": 130},
}


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("form", [(ExpertHopperTile(4, 3, 2), 2), (ExpertHopperTile(4, 2, 4), 5)], ids=["two", "four"])
def test_experts_in_one_launch(form: Any, name: str, stream: NewStream) -> None:
    case = experts(**EXPERTS[name])
    check(lambda: [test_expert_hopper.run(case, form)], [case.expected()], stream)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("shrink", [ExpertBesideTile(3, 10000), ExpertBesideTile(1, 0)], ids=["few", "all"])
def test_experts_with_a_shrink_beside(shrink: ExpertBesideTile, name: str, stream: NewStream) -> None:
    case = experts(**EXPERTS[name])
    check(lambda: [test_expert_hopper_shrink.run(case, shrink)], [case.expected()], stream)


OTHERS: dict[str, tuple[str, Callable[[], Case]]] = {
    "one row": ("gemv", lambda: linears(1, 264, 136, 72, bias=True)),
    "few rows": ("decode", lambda: linears(12, 264, 1032, bias=True)),
    "some rows, members": ("decode", lambda: linears(40, 520, 520, 264, none_members=(1,))),
    "some rows, wide": ("fused", lambda: linears(40, 72, 6152)),
    "more rows": ("decode", lambda: linears(100, 264, 1032)),
    "many rows": ("prefill", lambda: linears(300, 264, 264, 40, bias=True)),
    "many rows, odd": ("fused", lambda: linears(300, 263, 131)),
}


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", OTHERS)
def test_launches_in_triton_overlap(name: str, stream: NewStream) -> None:
    body_name, make = OTHERS[name]
    case = make()
    body, tiles = body_of(linear_call(case))
    assert body.__name__ == body_name
    check(lambda: body(linear_call(case), tiles), case.expected(), stream)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("rows", [20, 300], ids=["few", "many"])
def test_launches_of_experts_in_triton_overlap(rows: int, stream: NewStream) -> None:
    case = experts(rows=rows)
    check(lambda: [run_experts(test_expert_hopper_shrink.call_of(case))], [case.expected()], stream)


def broken(function: Any, old: str, new: str) -> Any:
    """The function of a kernel, of which something is changed."""
    source = inspect.getsource(function.fn)
    source = source[source.index("def ") :]
    assert source.count(old) >= 1, f"{function.fn.__name__} has no {old!r}"
    scope: dict[str, Any] = {}
    code = compile("from __future__ import annotations\n" + textwrap.dedent(source.replace(old, new)), "broken", "exec")
    exec(code, dict(function.fn.__globals__), scope)
    made = scope[function.fn.__name__]
    return SimpleNamespace(fn=FunctionType(made.__code__, function.fn.__globals__, made.__name__, made.__defaults__))


Break = tuple[ModuleType, str, str, str]
"""Where a function is called, its name, what is replaced in it and by what."""

BREAKS: dict[str, Break] = {
    "a block is overwritten while it is read": (
        fused_hopper, "load", "mbarrier.wait(ring[3].index(stage), phase)", "pass",
    ),
    "a ring that is full is filled again": (fused_hopper, "load", "(0 if EARLY else 1)", "1"),
    "nobody waits for a block": (fused_hopper, "multiply", "mbarrier.wait(full.index(stage), phase)", "pass"),
    "a block is given back while it is read": (
        fused_hopper,
        "multiply",
        "mbarrier.arrive(empty.index(gl.maximum(held, 0)), pred=held >= 0)",
        "mbarrier.arrive(empty.index(stage))",
    ),
    "h is stored without a fence": (fused_hopper_h, "make_blocks", "fence_async_shared()", "pass"),
    "h is never said to be there": (fused_hopper_h, "make_blocks", "mbarrier.arrive(full.index(stage))", "pass"),
    "Bs are asked for in a phase that is over": (
        fused_hopper, "load_bs", "(steps // STAGES & 1) ^ 1", "steps // STAGES & 1",
    ),
    "nobody waits for a product": (
        fused_hopper,
        "multiply",
        "acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))",
        "pass",
    ),
    "a store leaves its tensor": (fused_hopper, "store", "rows < num_rows", "rows < num_rows + 1"),
    "h is read before it is made": (fused_hopper, "make_h", "gdc_wait()", "pass"),
    "the first launch does not wait for what ran before": (
        group_shrink, "wait_for_earlier", "tl.extra.cuda.gdc_wait()", "pass",
    ),
    "y leaves before its last adapter": (fused_hopper, "number_of", "axis=0)", "axis=0) - (1 - i)"),
}  # fmt: skip


PART_BREAKS: dict[str, Break] = {
    "a part is said to be there before it is": (
        fused_hopper,
        "add_parts",
        "gl.store(at + part * (ROWS * COLS), acc)\n        debug_barrier()\n        found =",
        "gl.store(at + part * (ROWS * COLS), acc, mask=found > PARTS)\n        found =",
    ),
    "the first part comes before the others": (fused_hopper, "add_parts", "found < PARTS - 1:", "found < 0:"),
    "counts are those of a call before": (
        group_shrink,
        "clear",
        "tl.zeros([128], tl.int32)",
        "tl.full([128], 1, tl.int32)",
    ),
}


EXPERT_BREAKS: dict[str, Break] = {
    "h is said to be there before it is": (
        expert_hopper_shrink, "compute", "so_far = done", "so_far = done; gl.atomic_xchg(ready_ptr + item, 1)",
    ),
    "nobody waits for h": (expert_prefill, "wait_until_ready", "ready == 0", "False"),
    "h is never said to be there": (expert_hopper_shrink, "compute", "ready_ptr + item, 1", "ready_ptr + item, 0"),
    "the next launch starts before words are reset": (
        expert_hopper_shrink, "reset", "gl.full([128], 0", "gl.full([128], 1",
    ),
}  # fmt: skip


@contextmanager
def breaking(change: Break, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is checked within is broken, and shows it. It runs as the tests above do, which pass."""
    module, function, old, new = change
    monkeypatch.setattr(module, function, broken(getattr(module, function), old, new))
    with pytest.raises((AssertionError, HangError, MisuseError)):
        yield


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", BREAKS)
def test_what_goes_wrong_shows(name: str, stream: NewStream, monkeypatch: pytest.MonkeyPatch) -> None:
    case = linears(20, 1304, 136, order="shuffled", ranks=tuple(i % 17 for i in range(40)))
    tiles = FORMS["few rows, wide, early"]
    with breaking(BREAKS[name], monkeypatch):
        check(lambda: fused_hopper.fused_hopper(linear_call(case), tiles), case.expected(), stream, range(10))


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", PART_BREAKS)
def test_what_goes_wrong_between_parts_shows(name: str, stream: NewStream, monkeypatch: pytest.MonkeyPatch) -> None:
    case = linears(20, 264, 136, order="shuffled")
    tiles = FORMS["few rows, all in parts"]
    with breaking(PART_BREAKS[name], monkeypatch):
        check(lambda: fused_hopper.fused_hopper(linear_call(case), tiles), case.expected(), stream, range(10))


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("name", EXPERT_BREAKS)
def test_what_goes_wrong_with_experts_shows(name: str, stream: NewStream, monkeypatch: pytest.MonkeyPatch) -> None:
    case = experts()
    shrink = ExpertBesideTile(3, 10000)
    with breaking(EXPERT_BREAKS[name], monkeypatch):
        check(lambda: [test_expert_hopper_shrink.run(case, shrink)], [case.expected()], stream, range(10))
