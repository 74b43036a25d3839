"""The ops as torch sees them: opcheck, compile, export, grad mode, handles that are gone, lazy Triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.library import opcheck

from fxlora.kernels import ops
from fxlora.kernels.errors import OpInputError, PlanMismatchError, RuntimeGoneError
from fxlora.kernels.registry import register_runtime, unregister_runtime
from tests.kernels.cases import DEVICES, Case, assert_near, make_case, registered

KINDS = ("linear", "logits", "embedding")


def op_and_arguments(case: Case, handle: int) -> tuple[Any, tuple[Any, ...]]:
    segments = ops.segment_rows(case.row_slots, case.max_adapters)
    rest = (case.row_slots, case.row_coeffs, segments, handle)
    if case.kind == "linear":
        return ops.lora_linear, (case.x, case.weights, case.biases, *rest)
    if case.kind == "logits":
        return ops.lora_logits, (case.x, case.weights[0], case.biases[0], *rest)
    return ops.lora_embedding, (case.x, case.weights[0], *rest)


def with_grad(case: Case) -> Case:
    x = case.x.clone().requires_grad_() if case.x.is_floating_point() else case.x
    return replace(case, x=x, weights=[weight.clone().requires_grad_() for weight in case.weights])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, width: int, grad: bool, device: str) -> None:
    outs = (24, 16) if kind == "linear" else (24,)
    case = make_case(kind, outs=outs, width=width, bias=True, device=device)
    with registered(case.pools) as handle:
        op, arguments = op_and_arguments(with_grad(case) if grad else case, handle)
        opcheck(op, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_segment_rows(device: str) -> None:
    opcheck(ops.segment_rows, (make_case(device=device).row_slots, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_dtypes_and_strides_of_the_fakes(kind: str, device: str) -> None:
    for shape in ((24,), (2, 12), (0, 3)):
        case = make_case(kind, rows=torch.Size(shape).numel(), dtype=torch.bfloat16, device=device)
        x = case.x.view(shape) if kind == "embedding" else case.x.view(*shape, 40)
        with registered(case.pools) as handle:
            op, arguments = op_and_arguments(replace(case, x=x), handle)
            real = op(*arguments)
            meta = op(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments))
        for y, fake in zip(*((r if isinstance(r, list) else [r]) for r in (real, meta)), strict=True):
            assert (y.shape, y.dtype, y.stride()) == (fake.shape, fake.dtype, fake.stride())


def two_sites(case: Case, handle: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor, row_slots: torch.Tensor) -> torch.Tensor:
        segments = torch.ops.fxlora.segment_rows(row_slots, case.max_adapters)
        for _ in range(2):
            parts = torch.ops.fxlora.lora_linear(x * 2, case.weights, case.biases, row_slots, None, segments, handle)
            x = parts[0] + parts[1]
        return x

    return forward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_in_grad_mode_with_dynamic_rows(backend: str, device: str) -> None:
    case = with_grad(make_case(outs=(40, 40), device=device))
    with registered(case.pools) as handle:
        plain = two_sites(case, handle)
        compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=True)
        for rows in (24, 9):
            x, slots = case.x[:rows], case.row_slots[:rows]
            found = compiled(x, slots)
            torch.testing.assert_close(found, plain(x, slots), rtol=1e-5, atol=1e-5)
        assert not plain(case.x, case.row_slots).requires_grad


def test_each_call_is_one_node_in_an_exported_graph() -> None:
    case = make_case(outs=(40, 40))
    with registered(case.pools) as handle:

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(case.weights[0])

            def forward(self, x: torch.Tensor, row_slots: torch.Tensor) -> torch.Tensor:
                segments = torch.ops.fxlora.segment_rows(row_slots, case.max_adapters)
                return torch.ops.fxlora.lora_linear(
                    x, [self.weight, self.weight], [None, None], row_slots, None, segments, handle
                )[1]

        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(
            Model(), (case.x, case.row_slots), dynamic_shapes=({0: rows}, {0: rows}), strict=False
        )
        targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
        assert targets.count(ops.lora_linear) == 1
        assert targets.count(ops.segment_rows) == 1
        found = exported.module()(case.x[:7], case.row_slots[:7])
        assert_near([found], [replace(case, x=case.x[:7], row_slots=case.row_slots[:7],
                                      weights=[case.weights[0]] * 2).expected()[1]], torch.float32)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_loading_between_calls_needs_no_new_graph(device: str) -> None:
    case = make_case(outs=(40, 40), ranks=(0, 0), order="one", device=device)
    with registered(case.pools) as handle:
        compiled = torch.compile(two_sites(case, handle), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            before = compiled(case.x, case.row_slots)
            for pool in case.pools:
                assert pool is not None
                pool.write(1, start=0, a_RK=torch.randn(1, 40), b_RN=torch.randn(1, 40), scaling=1.0)
            after = compiled(case.x, case.row_slots)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, two_sites(case, handle)(case.x, case.row_slots))
            for pool in case.pools:
                assert pool is not None
                pool.clear(1)
            assert torch.equal(compiled(case.x, case.row_slots), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_handles_are_checked_at_the_call(kind: str, device: str) -> None:
    case = make_case(kind, device=device)
    handles = register_runtime(0x51, [case.pools])
    op, arguments = op_and_arguments(case, handles[0])
    with pytest.raises(PlanMismatchError):
        op(*arguments[:-1], handles[0] + 1)
    unregister_runtime(handles)
    with pytest.raises(RuntimeGoneError):
        op(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_disagree_are_refused(kind: str, device: str) -> None:
    case = make_case(kind, device=device)
    wrong = {
        "row_slots is torch.int64": replace(case, row_slots=case.row_slots.long()),
        "expected int32 .24, J.": replace(case, row_slots=case.row_slots[:3]),
        "row_coeffs is torch.float64": replace(case, row_coeffs=torch.ones(24, 1, dtype=torch.float64, device=device)),
    }
    with registered(case.pools) as handle:
        segments = ops.segment_rows(case.row_slots, case.max_adapters)
        for match, variant in wrong.items():
            with pytest.raises(OpInputError, match=match):
                variant.call(segments, handle)
        with pytest.raises(OpInputError, match="sorted for 9 slots, the pool has 4"):
            case.call(ops.segment_rows(case.row_slots, 9), handle)
    with registered((*case.pools, None)) as handle, pytest.raises(OpInputError, match="got 1 weights"):
        case.call(segments, handle)


def test_importing_the_ops_imports_no_triton() -> None:
    script = "import sys, fxlora.kernels.ops; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
