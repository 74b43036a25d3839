"""Truth of every op: plain fp32 torch, one row and one slot at a time. Tests and benchmarks compare with this file
alone.

Same arguments as the ops, except that pools come as arguments and `segments` is not read. Outputs are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.registry import SitePool


def segment_rows(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    """Layout of segments.py, by a stable sort of Python integers."""
    slots = [slot if 0 <= slot < max_adapters else max_adapters for slot in row_slots.reshape(-1).tolist()]
    order = sorted(range(len(slots)), key=slots.__getitem__)
    starts = [sum(other < slot for other in slots) for slot in range(max_adapters + 2)]
    tiles = [(slot, first) for slot in range(max_adapters) for first in range(starts[slot], starts[slot + 1], 16)]
    unused = [-1] * (-(-len(slots) // 16) + max_adapters - len(tiles))
    tables = [slot for slot, _ in tiles] + unused + [first for _, first in tiles] + unused
    return torch.tensor([*order, *starts, len(tiles), *tables], dtype=torch.int32, device=row_slots.device)


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pools: Sequence[SitePool | None],
) -> list[torch.Tensor]:
    """x [..., K], weights [N, K] each, biases [N] or None, row_slots [T, J] -> fp32 [..., N] for each member."""
    outputs = []
    x_TK = x.float().reshape(-1, x.shape[-1])
    for weight, bias, pool in zip(weights, biases, pools, strict=True):
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        if pool is not None:
            _add_deltas(y.view(-1, y.shape[-1]), lambda row, a_RK: a_RK @ x_TK[row], row_slots, row_coeffs, pool)
        outputs.append(y)
    return outputs


def lora_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pool: SitePool | None,
) -> torch.Tensor:
    """x [..., K], weight [V, K], bias [V] or None -> fp32 [..., V]."""
    return lora_linear(x, [weight], [bias], row_slots, row_coeffs, [pool])[0]


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pool: SitePool | None,
) -> torch.Tensor:
    """ids [...] of any int dtype, weight [V, N] -> fp32 [..., N]."""
    ids_T = ids.long().reshape(-1)
    y = F.embedding(ids.long(), weight.float())
    if pool is not None:
        _add_deltas(y.view(-1, y.shape[-1]), lambda row, a_RV: a_RV[:, ids_T[row]], row_slots, row_coeffs, pool)
    return y


def experts_of(
    rows: int, offsets: torch.Tensor | None, expert_ids: torch.Tensor | None, num_experts: int
) -> list[int | None]:
    """Expert of each row, None where it has none."""
    if expert_ids is not None:
        return [expert if 0 <= expert < num_experts else None for expert in expert_ids.tolist()]
    assert offsets is not None
    ends = offsets.tolist()
    return [next((expert for expert in range(num_experts) if row < ends[expert]), None) for row in range(rows)]


def lora_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    row_experts: Sequence[int | None],
    pool: ExpertPool | None,
) -> torch.Tensor:
    """x [T, K], weight [E, N, K], bias [E, N] or None, the expert of each row or None -> fp32 [T, N]."""
    y_TN = torch.zeros(x.shape[0], weight.shape[1], device=x.device)
    for row, expert in enumerate(row_experts):
        if expert is None:
            continue
        x_K = x[row].float()
        y_TN[row] = weight[expert].float() @ x_K
        if bias is not None:
            y_TN[row] += bias[expert].float()
        for j, slot in enumerate(row_slots[row].tolist() if pool is not None else ()):
            assert pool is not None
            rank = int(pool.rank[slot]) if 0 <= slot < pool.rank.numel() else 0
            if not rank:
                continue
            a_first = int(pool.a_start[slot] + expert * pool.a_step[slot])
            b_first = int(pool.b_start[slot] + expert * pool.b_step[slot])
            h_R = pool.a[a_first : a_first + rank].float() @ x_K
            factor = float(pool.scaling[slot]) * (1.0 if row_coeffs is None else float(row_coeffs[row, j]))
            y_TN[row] += factor * (h_R @ pool.b[b_first : b_first + rank].float())
    return y_TN


def _add_deltas(
    y_TN: torch.Tensor,
    shrink: Callable[[int, torch.Tensor], torch.Tensor],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pool: SitePool,
) -> None:
    starts, ranks, scalings = pool.start.tolist(), pool.rank.tolist(), pool.scaling.tolist()
    for row, slots in enumerate(row_slots.tolist()):
        for j, slot in enumerate(slots):
            if not 0 <= slot < len(ranks) or not ranks[slot]:
                continue
            rows = slice(starts[slot], starts[slot] + ranks[slot])
            h_R = shrink(row, pool.a_PK[rows].float())
            factor = scalings[slot] if row_coeffs is None else scalings[slot] * float(row_coeffs[row, j])
            y_TN[row] += factor * (h_R @ pool.b[rows].float())
