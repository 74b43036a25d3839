"""Other multi-LoRA linears, run beside ours from a folder outside of the repository.

The folder (`--peers DIR`) holds a module `peers` whose builders `vllm_linear`, `sglang_linear`, `sglang_csgmv_linear`,
`gathered_bmm` and `peft_mixed` take one problem

    x [M, K]    W[i] [N, K]    A[i][s] [S, r, K]    B[i][s] [S, N_s, r]    ids int32 [M]    out[i] [M, N]    ranks

(sets i, members s, W over all members, scaling folded into B, ranks of the slots or None) and return `step(i)`, which
leaves its result in out[i], and whatever these builders import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu_timing import Step, WallClock
from tests.benchmarks.linear_build import Built, WrongResultError, judge_outputs
from tests.benchmarks.linear_cases import Case

GRAPHED: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm": ("vllm_linear", {}),
    "vllm_dual": ("vllm_linear", {"dual_stream": True}),
    "sglang_v2": ("sglang_linear", {}),
    "sglang_csgmv": ("sglang_csgmv_linear", {}),
    "gathered_bmm": ("gathered_bmm", {}),
}
EAGER = "peft"
PEERS = (*GRAPHED, EAGER)
GATHER_ROWS, PEFT_ROUNDS = 256, 5
# PEFT wraps every adapter in modules, which takes seconds: timed where it says something, one weight, rank 16.
PEFT_SHAPES = ((4096, 4096), (2048, 128))


@dataclass
class PeerSteps:
    """Peers that ran and were right, by name, and why each of the others is missing."""

    steps: dict[str, Step] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def load_peers(folder: Path | None) -> Any:
    """The module `peers` of the folder, None without a folder."""
    if folder is None:
        return None
    if not (folder / "peers.py").is_file():
        raise FileNotFoundError(f"{folder} holds no peers.py")
    sys.path.insert(0, str(folder.resolve()))
    return importlib.import_module("peers")


def unfit(case: Case, peer: str) -> str | None:
    """Why a peer cannot take a case, None if it can."""
    if case.kind == "embedding":
        return "no embedding among the peers"
    if case.width > 1:
        return "peers take one adapter per row"
    if peer == "gathered_bmm" and case.rows > GATHER_ROWS:
        return f"gathers A and B for every row: only up to {GATHER_ROWS} rows"
    if peer == EAGER and not ((case.features, *case.outs) in PEFT_SHAPES and case.rank == 16 and case.rows <= 2048):
        return "timed at 4096x4096 and 2048x128 with rank 16 and up to 2048 rows alone"
    return None


def problem(built: Built, sets: int) -> dict[str, Any]:
    """The case in the peers' form, over the first `sets` weight sets; all write to one output."""
    case, groups = built.case, built.sets[:sets]
    out = torch.empty(case.rows, sum(case.outs), dtype=built.x.dtype, device=built.x.device)
    scale = built.scaling[:, None, None]
    return {
        "x": built.x,
        "W": [group[0].weight if len(group) == 1 else torch.cat([m.weight for m in group]) for group in groups],
        "A": [[member.a_SRK for member in group] for group in groups],
        "B": [[(m.b_SRN * scale).to(out.dtype).transpose(1, 2).contiguous() for m in group] for group in groups],
        "ids": built.row_slots[:, 0].contiguous(),
        "out": [out] * len(groups),
        "ranks": [case.rank_of(slot) for slot in range(case.slots)] if case.ranks else None,
    }


def checked(step: Step, out: torch.Tensor, truth: torch.Tensor) -> Step:
    """Run set 0, which leaves its result in `out`, and compare; returns the step."""
    out.fill_(float("nan"))
    step(0)
    judge_outputs([out.view(truth.shape)], [truth], out.dtype, "set 0")
    return step


def reason(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, WrongResultError):
        return f"wrong result, {error}"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def build_peers(peers: Any, built: Built, truth: list[torch.Tensor] | None) -> PeerSteps:
    """Every graphed peer that can be built, runs, and is right.

    truth: of set 0, one tensor for each member; None: unchecked.
    """
    found = PeerSteps()
    fitting = {}
    for name in PEERS:
        why = "no --peers folder" if peers is None else unfit(built.case, name)
        if why:
            found.missing[name] = why
        elif name != EAGER:
            fitting[name] = GRAPHED[name]
    if not fitting:
        return found
    given = problem(built, len(built.sets))
    expected = None if truth is None else torch.cat(truth, dim=1)
    for name, (builder, options) in fitting.items():
        try:
            step: Step = getattr(peers, builder)(**given, **options)
            found.steps[name] = step if expected is None else checked(step, given["out"][0], expected)
        except Exception as error:
            found.missing[name] = reason(error)
    run_all(found, len(built.sets))
    return found


def run_all(found: PeerSteps, count: int) -> None:
    """Run every step on every set: some builders drop what another peer has cached, and capture has to find it."""
    for name in list(found.steps):
        try:
            for i in range(count):
                found.steps[name](i)
        except Exception as error:
            del found.steps[name]
            found.missing[name] = reason(error)


def time_peft(peers: Any, built: Built, truth: list[torch.Tensor], device: str) -> tuple[list[float], str | None]:
    """(microseconds of an eager call, one per round; or why there are none): a loop over adapters fits no graph."""
    why = "no --peers folder" if peers is None else unfit(built.case, EAGER)
    if why:
        return [], why
    given = problem(built, 1)
    builder: Callable[..., Step] = partial(peers.peft_mixed, **given)
    try:
        step = checked(builder(), given["out"][0], truth[0])
        clock = WallClock(device)
        return clock.rounds({EAGER: clock.prepare(step, 1, 2)}, PEFT_ROUNDS)[EAGER], None
    except Exception as error:
        return [], reason(error)
