"""Other multi-LoRA expert kernels, run beside ours from the folder of `peers_adapter.py`.

Its builders `moe_base`, `vllm_moe` and `sglang_moe` take one problem

    x [M, K], or [T, K] with down=True    W[i] [E, N, K]    A[i][s] [S, E, r, K]    B[i][s] [S, E, N_s, r]
    topk_ids int32 [M, k]    topk_weights fp32 [M, k]    ids int32 [M], the slot of each token    out[i] [M, k, N]

(scaling folded into B; results of down=True are multiplied by topk_weights, all one here) and return `step(i)`. They
gather the rows of a token themselves, and have their tables of rows by expert made beforehand, as ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.benchmarks.experts_build import Built
from tests.benchmarks.gpu_timing import Step
from tests.benchmarks.peers_adapter import PeerSteps, checked, reason, run_all

BASE = "triton"
"""The grouped GEMM that the peers start from: no peer, but a candidate for the base."""

BUILDERS = {BASE: "moe_base", "vllm": "vllm_moe", "sglang": "sglang_moe"}
PEERS = ("vllm", "sglang")


def problem(built: Built) -> dict[str, Any]:
    """The case in the peers' form, less topk_ids; all write to one output."""
    case = built.case
    out = torch.empty(case.rows, case.top_k, case.out, dtype=built.x.dtype, device=built.x.device)
    b = (built.b * built.scaling[:, None, None, None]).to(out.dtype).transpose(2, 3).contiguous()
    weights = torch.ones(case.rows, case.top_k, device=out.device)
    return {
        "x": built.x, "W": [built.weight], "A": [[built.a]], "B": [[b]], "topk_weights": weights, "ids": built.slots,
        "out": [out], "down": built.x.shape[0] == case.pairs and case.top_k > 1,
    }  # fmt: skip


def over_routings(builder: Any, built: Built, given: dict[str, Any]) -> Step:
    """One step that takes the number of a routing, of steps built for one each."""
    steps = [builder(topk_ids=routing.topk_ids.to(torch.int32), **given) for routing in built.routings]
    return lambda i: steps[i](0)


def in_pairs(built: Built, truth: Sequence[torch.Tensor]) -> torch.Tensor:
    """The truth of routing 0 in the order of pairs, as peers write it."""
    return torch.empty_like(truth[0]).index_copy_(0, built.routings[0].order, truth[0])


def build_peers(
    peers: Any, built: Built, truth: Sequence[torch.Tensor] | None, base_truth: Sequence[torch.Tensor] | None
) -> PeerSteps:
    """The peers and their base, as far as they can be built, run, and are right.

    truth, base_truth: of routing 0, with and without adapters; None: unchecked.
    """
    found = PeerSteps()
    if peers is None:
        found.missing = dict.fromkeys(PEERS, "no --peers folder")
        return found
    given = problem(built)
    for name, builder in BUILDERS.items():
        expected = base_truth if name == BASE else truth
        try:
            step = over_routings(getattr(peers, builder), built, given)
            found.steps[name] = step
            if expected is not None:
                checked(step, given["out"][0], in_pairs(built, expected))
        except Exception as error:
            found.steps.pop(name, None)
            found.missing[name] = reason(error)
    run_all(found, built.count)
    return found
