"""What only dynamo's own graphs have: numbers of the model as symbols, and sizes that guards tie to others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxlora.dynamo_inputs import read_inputs
from fxlora.kernels.registry import SitePool, register_runtime, unregister_runtime
from fxlora.passes.pipeline import Job, analyse, rewrite
from fxlora.passes.plan import AdapterShape
from fxlora.passes.rows.worlds import shape_env_of


class Cached(nn.Module):
    """Reads its own earlier rows beside the new ones, scaled by a number, under a mask that is never longer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.scale = nn.Linear(6, 5), 0.25

    def forward(self, x: torch.Tensor, cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([cache, x], dim=1)
        if mask.shape[1] > rows.shape[1] or mask.shape[1] < rows.shape[1] - 1:
            raise ValueError("the mask does not fit")
        query = x * self.scale
        return nn.functional.scaled_dot_product_attention(
            query, rows, self.proj(rows)[..., :1] + rows, scale=self.scale
        )


def jobs(model: nn.Module, *args: Any) -> list[Job]:
    """The job of each graph that dynamo makes of a call, analysed and rewritten inside the backend call."""
    torch._dynamo.reset()
    made: list[Job] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        read = read_inputs(gm, inputs)
        arguments = read.arguments(("x", "cache", "mask"))
        job = Job(gm, arguments, read.bound, [model], None, None, AdapterShape(2, 4), whole=False)
        plan = analyse(job)
        pools = [tuple(pool_of(site) for site in group) for group in plan.site_groups]
        buffers = {torch.device("cpu"): torch.tensor([0, 1, -1, 0], dtype=torch.int32)}
        handles.extend(register_runtime(plan.digest, pools, buffers))
        rewrite(job, dict(zip(plan.site_groups, handles[-len(pools) :], strict=True)), slots_from_memory=True)
        made.append(job)
        return gm.forward

    handles: list[int] = []
    with torch.no_grad(), torch.fx.experimental._config.patch(use_duck_shape=False):
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for call in args:
            assert torch.allclose(compiled(*call), model(*call), atol=1e-6)
    unregister_runtime(handles)
    return made


def pool_of(site: Any) -> SitePool:
    return SitePool.allocate(
        kind=site.kind,
        pool_rows=16,
        in_features=site.in_features,
        out_features=site.out_features,
        max_adapters=2,
        max_rank=4,
        dtype=site.dtype,
        device=site.device,
    )


def call_of(batch: int, earlier: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 1, 6), torch.randn(batch, earlier, 6), torch.ones(batch, earlier + 1)


def test_a_map_reads_a_size_that_guards_leave_no_choice_for() -> None:
    """One graph serves caches of any length, though sizes may differ by no more than the guards allow."""
    (job,) = jobs(Cached(), call_of(4, 7), call_of(4, 8), call_of(3, 12))
    assert [site.name for site in job.plan.sites] == ["proj"]
    earlier = {world.shape(next(i.node for i in job.inputs if i.name == "cache"))[1] for world in job.sizing.worlds}
    assert len(earlier) > 1, "worlds keep the traced difference of two sizes and move both"


def test_numbers_of_the_model_stay_numbers() -> None:
    (job,) = jobs(Cached(), call_of(4, 7))
    env = shape_env_of(job.gm)
    floats = [symbol for symbol in env.var_to_range if not symbol.is_integer]
    assert floats
    assert all(world.symbols[symbol] == 0.25 for world in job.sizing.worlds for symbol in floats)


def test_slots_are_read_once_and_the_signature_stays() -> None:
    (job,) = jobs(Cached(), call_of(4, 7))
    nodes = list(job.gm.graph.nodes)
    (slots,) = [n for n in nodes if n.target is torch.ops.fxlora.batch_slots.default]
    assert slots.args[:2] == (job.primary, [0])
    assert [n.op for n in nodes if n.op not in ("call_function", "call_method", "output")] == ["placeholder"] * len(
        [n for n in nodes if n.op == "placeholder"]
    )
    assert not any(n.target == "adapter_slots" for n in nodes)
