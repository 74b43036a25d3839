"""Every op and every Triton body on small calls, for compute-sanitizer: `make sanitize` runs it and says what it needs.

Each result is compared with the reference: a tool that finds nothing in kernels that computed nothing says nothing.
"""

from __future__ import annotations

import sys

import torch

from tests.kernels.cases import HAS_CUDA, assert_right, make_case
from tests.kernels.expert_cases import assert_experts_right, make_expert_case
from tests.kernels.test_bodies import BODIES, DECODE, DEVICE, GEMV, check, small_case

DTYPES = (torch.bfloat16, torch.float32)


def check_bodies() -> None:
    for dtype in DTYPES:
        for body in BODIES:
            if body == "prefill" and dtype == torch.float32:
                continue
            for tile in {"gemv": GEMV, "decode": DECODE}.get(body, {"its own": None}).values():
                for width in (1, 2):
                    case = small_case(dtype=dtype, outs=(24, 40), width=width, bias=True, ranks=(8, 0, 40, 3))
                    check(body, case, tile)
        for body in ("gemv", "decode", "general"):
            check(body, small_case(dtype=dtype, features=37, outs=(19, 5), ranks=(5, 17)))


def check_ops() -> None:
    """With the tiles that a call of its shape gets."""
    for dtype in DTYPES:
        for rows in (1, 5, 20, 70, 150, 300):
            for features, outs in ((136, (200, 72)), (45, (19,))):
                assert_right(make_case(rows=rows, features=features, outs=outs, dtype=dtype, device=DEVICE, width=2))
            for kind in ("logits", "embedding"):
                assert_right(make_case(kind, rows=rows, features=136, outs=(72,), dtype=dtype, device=DEVICE))


def check_experts() -> None:
    """Row tiles of every height, rows in place and in any order."""
    for dtype in DTYPES:
        for rows, experts in ((1, 4), (20, 6), (60, 6), (90, 3), (200, 3), (200, 1)):
            for features, out in ((136, 72), (45, 19)):
                for in_place in (True, False):
                    assert_experts_right(
                        make_expert_case(
                            rows=rows, experts=experts, features=features, out=out, in_place=in_place, dtype=dtype,
                            device=DEVICE, bias=True, width=1 + in_place, ranks=(8, 0, 40, 3), shared=("A", ""),
                        )
                    )  # fmt: skip


def main() -> int:
    if not HAS_CUDA:
        print("skipped: no GPU")
        return 0
    torch.manual_seed(0)
    check_bodies()
    check_ops()
    check_experts()
    torch.cuda.synchronize()
    print("every result is near its reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
