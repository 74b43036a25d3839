"""Launcher: a compiled kernel is entered again only where Triton itself would have taken it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
launch = pytest.importorskip("fxlora.kernels.launch")

not_interpreted = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are launched plainly")


class FakeKernel:
    """Parameters (out, x, n, m, BLOCK), m in do_not_specialize. Counts what is compiled and records what is run."""

    def __init__(self, complete: bool = True) -> None:
        free = (False, False, False, True, False)
        self.params = [SimpleNamespace(do_not_specialize=flag) for flag in free]
        self.plain: list[tuple[object, dict[str, object]]] = []
        self.direct: list[tuple[object, ...]] = []
        self.complete = complete

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: object, **keywords: object) -> object:
            self.plain.append((args, keywords))
            number = len(self.plain)
            if not self.complete:
                return SimpleNamespace()
            return SimpleNamespace(
                run=lambda *given: self.direct.append((number, *given)), function=7, packed_metadata=(4, 1, 0)
            )

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setattr(launch, "raw_stream", lambda device: 90 + device)
    return FakeKernel()


def start(launcher: Any, *args: object, block: int = 8, **options: Any) -> None:
    launcher.launch((3, 2), args, {"BLOCK": block}, **{"device": 0, **options})


@not_interpreted
def test_the_second_launch_enters_the_compiled_kernel_with_addresses(kernel: FakeKernel) -> None:
    launcher = launch.Launcher(kernel)
    out, x, other = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    start(launcher, out, (x, 8, (1, x)), 16, 5, pdl=True, num_warps=2)
    keywords = {"BLOCK": 8, "num_warps": 2, "num_stages": 3, "launch_pdl": True}
    assert kernel.plain == [((out, (x, 8, (1, x)), 16, 5), keywords)]
    assert not kernel.direct
    start(launcher, out, (other, 8, (1, x)), 16, 6, pdl=True, num_warps=2)
    call = (out.data_ptr(), (other.data_ptr(), 8, (1, x.data_ptr())), 16, 6, None)
    assert kernel.direct == [(1, 3, 2, 1, 90, 7, (4, 1, 0), None, None, None, *call)]


@not_interpreted
def test_what_triton_is_told(kernel: FakeKernel) -> None:
    launcher = launch.Launcher(kernel)
    for options in ({}, {"together": True}, {"registers": 128}, {"pdl": True, "together": True}):
        start(launcher, torch.zeros(8), 16, **options)
    usual = {"BLOCK": 8, "num_warps": 4, "num_stages": 3}
    assert [keywords for _, keywords in kernel.plain] == [
        usual,
        {**usual, "launch_cooperative_grid": True},
        {**usual, "maxnreg": 128},
        {**usual, "launch_pdl": True, "launch_cooperative_grid": True},
    ]


@not_interpreted
def test_what_the_key_tells_apart(kernel: FakeKernel) -> None:
    launcher = launch.Launcher(kernel)
    x, base = torch.zeros(8), torch.zeros(64)
    variants: list[tuple[tuple[object, ...], dict[str, Any]]] = [
        ((x, base, 16, 5), {}),
        ((x.double(), base, 16, 5), {}),
        ((x, base[1:], 16, 5), {}),
        ((x, base[2:], 16, 5), {}),
        ((x, base, 1, 5), {}),
        ((x, base, 3, 5), {}),
        ((x, base, 1 << 31, 5), {}),
        ((x, base, 16, 1 << 31), {}),
        ((x, base, 16, 5), {"block": 16}),
        ((x, base, 16, 5), {"num_warps": 8}),
        ((x, base, 16, 5), {"num_stages": 1}),
        ((x, base, 16, 5), {"pdl": True}),
        ((x, base, 16, 5), {"together": True}),
        ((x, base, 16, 5), {"registers": 128}),
        ((x, base, 16, 5), {"device": 1}),
    ]
    for _ in range(3):
        for args, options in variants:
            start(launcher, *args, **options)
    assert len(kernel.plain) == len(variants)
    assert [number for number, *_ in kernel.direct] == 2 * list(range(1, len(variants) + 1))
    start(launcher, x, base[4:], 16, 1)  # same alignment; Triton does not look at the last int
    assert len(kernel.plain) == len(variants)
    assert kernel.direct[-1][0] == 1


@not_interpreted
def test_fixed_arguments_are_read_once(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = launch.Launcher(kernel)
    x = torch.zeros(8)
    pools = [launch.Fixed((torch.zeros(4), (torch.zeros(4), 4))) for _ in range(2)]
    misplaced = launch.Fixed((torch.zeros(5)[1:], (torch.zeros(4), 4)))
    other_int = launch.Fixed((torch.zeros(4), (torch.zeros(4), 5)))
    start(launcher, x, pools[0], 16, 5)
    assert kernel.plain[0][0] == (x, pools[0].args, 16, 5)
    start(launcher, x, pools[1], 16, 5)
    tensor, (strided, _) = pools[1].args
    assert kernel.direct[-1][-5:-1] == (x.data_ptr(), (tensor.data_ptr(), (strided.data_ptr(), 4)), 16, 5)
    for different in (misplaced, other_int):
        start(launcher, x, different, 16, 5)
    assert len(kernel.plain) == 3
    start(launcher, x, (x, pools[0]), 16, 5)
    assert kernel.plain[-1][0] == (x, (x, pools[0].args), 16, 5)
    with pytest.raises(TypeError, match="fixed arguments"):
        launch.Fixed((torch.zeros(4), "text"))


@not_interpreted
def test_arguments_of_another_kind_are_launched_plainly(kernel: FakeKernel) -> None:
    launcher = launch.Launcher(kernel)
    x = torch.zeros(8)
    start(launcher, x, x, 16, 5)
    for args in ((x, (x, 1), 16, 5), (x, None, 16, 5), (x, x, x, 5), (x, 4, 16, 5), (x, x, 16.5, 5)):
        for _ in range(2):
            before = len(kernel.plain)
            start(launcher, *args)
            assert len(kernel.plain) == before + 1
            assert kernel.plain[-1][0] == args
    assert not kernel.direct
    start(launcher, x, x, 16, 5)
    assert len(kernel.direct) == 1


@not_interpreted
def test_hooks_see_every_launch(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = launch.Launcher(kernel)
    x = torch.zeros(8)
    for _ in range(2):
        start(launcher, x, x, 16, 5)
    assert len(kernel.plain) == 1
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", print)
    start(launcher, x, x, 16, 5)
    assert len(kernel.plain) == 2


@not_interpreted
def test_unknown_internals_mean_plain_launches(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.complete = False
    launcher = launch.Launcher(kernel)
    x = torch.zeros(8)
    for _ in range(3):
        start(launcher, x, x, 16, 5)
    assert len(kernel.plain) == 3
    assert len(caplog.records) == 1


@not_interpreted
def test_keys_do_not_pile_up(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MAX_KERNELS", 4)
    launcher = launch.Launcher(kernel)
    x = torch.zeros(8)
    for number in range(20):
        start(launcher, x, x, number, 5)
    (variant,) = launcher._variants.values()
    assert variant.family is not None
    assert len(variant.family.kernels) <= 4


@triton.jit(do_not_specialize=["factor"])
def scale_kernel(out, x, bound, factor, BLOCK: tl.constexpr) -> None:  # noqa: ANN001
    x_ptr, stride = x
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x_ptr + at * stride, mask=at < bound, other=0.0)
    tl.store(out + at, (values * factor).to(out.dtype.element_ty), mask=at < bound)


@pytest.mark.interpreted
@pytest.mark.parametrize("device", ["cpu"] if INTERPRET else [name for name in DEVICES if name != "cpu"])
def test_results_are_those_of_a_plain_launch(device: str) -> None:
    launcher = launch.Launcher(scale_kernel)
    base = torch.randn(700, device=device)
    for _ in range(2):
        for dtype in (torch.float32, torch.float64):
            for first in (0, 1, 4):
                for stride in (1, 2, 16):
                    for factor in (1, 3, 16, 1 << 33):
                        x = base.to(dtype)[first::stride]
                        bound = min(x.numel(), 37 if factor == 3 else 48)
                        out, expected = torch.zeros(2, 64, device=device)
                        launcher.launch((4,), (out, (x, stride), bound, factor), {"BLOCK": 16}, device=0, num_warps=1)
                        scale_kernel[(4,)](expected, (x, stride), bound, factor, BLOCK=16)
                        assert torch.equal(out, expected)
                        assert torch.allclose(out[:bound], (x[:bound] * factor).float(), rtol=1e-6)


@pytest.mark.gpu
def test_a_launch_costs_little_host_time() -> None:
    launcher = launch.Launcher(scale_kernel)
    out, x = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")

    def microseconds() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            launcher.launch((4,), (out, (x, 1), 64, 2), {"BLOCK": 16}, device=0)
        return (time.perf_counter() - begin) / 200 * 1e6

    microseconds()
    assert min(microseconds() for _ in range(10)) < 10
