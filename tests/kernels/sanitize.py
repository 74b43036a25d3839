"""Every op and every Triton body on small calls, for compute-sanitizer: `make sanitize` runs it and says what it needs.

Each result is compared with the reference, or with what was: a tool that finds nothing in kernels that computed nothing
says nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from fxlora.kernels.expert_tiles import ExpertBesideTile, ExpertHopperTile
from fxlora.kernels.prefill_tiles import BesideTile
from tests.kernels.cases import HAS_CUDA, assert_right, make_case
from tests.kernels.expert_cases import assert_experts_right, make_expert_case
from tests.kernels.test_bodies import BODIES, DECODE, DEVICE, FUSED, GEMV, SINGLE, check, serves, small_case
from tests.kernels.test_expert_hopper import assert_same as assert_same_in_one
from tests.kernels.test_expert_hopper import large_case as case_in_one
from tests.kernels.test_expert_hopper_shrink import assert_same as assert_same_of_experts
from tests.kernels.test_expert_hopper_shrink import large_case as large_expert_case
from tests.kernels.test_fused_hopper import FORMS as WAVE_FORMS
from tests.kernels.test_fused_hopper import assert_same as assert_same_of_a_wave
from tests.kernels.test_fused_hopper import some_rows
from tests.kernels.test_prefill_hopper import IS_HOPPER, RANKS, SHARED, TURNS, assert_same_of_few_programs
from tests.kernels.test_prefill_hopper_shrink import assert_same as assert_same_beside

DTYPES = (torch.bfloat16, torch.float32)


def body_calls() -> Iterator[Callable[[], object]]:
    for dtype in DTYPES:
        for body in BODIES:
            if not serves(body, dtype):
                continue
            tiles = {"gemv": GEMV, "single": SINGLE, "decode": DECODE, "fused": FUSED}
            for tile in tiles.get(body, {"its own": None}).values():
                for width in (1, 2):
                    options = {"dtype": dtype, "outs": (24, 40), "width": width, "bias": True, "ranks": (8, 0, 40, 3)}
                    yield lambda body=body, options=options, tile=tile: check(body, small_case(**options), tile)
        for body in filter(lambda body: serves(body, dtype), ("gemv", "single", "decode", "fused", "general")):
            odd = {"dtype": dtype, "features": 37, "outs": (19, 5), "ranks": (5, 17)}
            yield lambda body=body, options=odd: check(body, small_case(**options))


def op_calls() -> Iterator[Callable[[], object]]:
    """With the tiles that a call of its shape gets."""
    for dtype in DTYPES:
        for rows in (1, 5, 20, 70, 150, 300):
            options = {"rows": rows, "dtype": dtype, "device": DEVICE}
            for features, outs in ((136, (200, 72)), (45, (19,))):
                sizes = {"features": features, "outs": outs, "width": 2, **options}
                yield lambda sizes=sizes: assert_right(make_case(**sizes))
            for kind in ("logits", "embedding"):
                sizes = {"kind": kind, "features": 136, "outs": (72,), **options}
                yield lambda sizes=sizes: assert_right(make_case(**sizes))


def hopper_calls() -> Iterator[Callable[[], object]]:
    """prefill_hopper.py and its shrink, which serve calls as small as these for a test alone."""
    for tile in (TURNS, SHARED) if IS_HOPPER else ():
        for dtype, outs, width in (
            (torch.bfloat16, (264,), 1),
            (torch.float16, (200, 72), 1),
            (torch.bfloat16, (1032,), 2),
        ):
            sizes = {"rows": 513, "features": 264, "outs": outs, "width": width, "dtype": dtype, "device": DEVICE}
            options = {**sizes, "bias": True, "ranks": (8, 0, 40, 3), "order": "shuffled"}
            yield lambda options=options, tile=tile: assert_same_of_few_programs(make_case(**options), tile)
    for few, most in ((3, 1000), (1, 20), (1, 1)) if IS_HOPPER else ():  # a small grid, one of a large, all of it
        for outs, width, order in (((264,), 1, "runs"), ((200, 72, 8), 1, "shuffled"), ((72, 8), 2, "shuffled")):
            sizes = {"rows": 300, "features": 264, "outs": outs, "width": width, "dtype": torch.bfloat16}
            options = {**sizes, "device": DEVICE, "ranks": (*RANKS, *[3] * 20), "order": order}
            tile = BesideTile(few, most)
            yield lambda options=options, tile=tile: assert_same_beside(make_case(**options), tile)


def one_wave() -> Iterator[Callable[[], object]]:
    """fused_hopper.py: every form of a tile, few steps and short groups, more groups than the ring has room for."""
    for tiles in WAVE_FORMS.values() if IS_HOPPER else ():
        for features, ranks in ((200, (8, 0, 40, 3)), (1032, (16,) * 70)):
            options = {"rows": 150, "features": features, "outs": (264, 72), "ranks": ranks, "bias": True}
            case = {"order": "shuffled", **options}
            yield lambda case=case, tiles=tiles: assert_same_of_a_wave(some_rows(**case), tiles)


def beside_experts() -> Iterator[Callable[[], object]]:
    """expert_hopper_shrink.py: few programs beside the product, one, all before it."""
    for few, most in ((3, 1000), (1, 1000), (1, 0)) if IS_HOPPER else ():
        for rows, width in ((1000, 1), (600, 2)):  # tiles of 64 rows, of 128
            options = {"rows": rows, "width": width, "features": 264, "ranks": (8, 0, 40, 3, *[16] * 8)}
            tile = ExpertBesideTile(few, most)
            yield lambda options=options, tile=tile: assert_same_of_experts(large_expert_case(**options), tile)


def experts_in_one() -> Iterator[Callable[[], object]]:
    """expert_hopper.py: several programs, and one for everything."""
    for tile, programs in ((ExpertHopperTile(4, 3, 2), 6), (ExpertHopperTile(4, 2, 4), 1)) if IS_HOPPER else ():
        for rows, out in ((1000, 264), (600, 1032)):
            options = {"rows": rows, "features": 264, "out": out, "ranks": (8, 0, 16, 3, 40, *[16] * 8), "bias": True}
            form = (tile, programs)
            yield lambda options=options, form=form: assert_same_in_one(case_in_one(**options), form)


def expert_calls() -> Iterator[Callable[[], object]]:
    """Row tiles of every height, rows in place and in any order."""
    for dtype in DTYPES:
        for rows, experts in ((1, 4), (20, 6), (60, 6), (90, 3), (200, 3), (450, 3), (200, 1)):
            for features, out in ((136, 72), (45, 19)):
                for in_place in (True, False):
                    sizes = {
                        "rows": rows, "experts": experts, "features": features, "out": out, "in_place": in_place,
                        "dtype": dtype, "device": DEVICE, "bias": True, "width": 1 + in_place, "ranks": (8, 0, 40, 3),
                        "shared": ("A", ""),
                    }  # fmt: skip
                    yield lambda sizes=sizes: assert_experts_right(make_expert_case(**sizes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th call from the I-th on, 0 being first")
    part, parts = map(int, parser.parse_args().part.split("/"))
    if not HAS_CUDA:
        print("skipped: no GPU")
        return 0
    all_calls = (body_calls, op_calls, hopper_calls, one_wave, beside_experts, experts_in_one, expert_calls)
    calls = [call for some in all_calls for call in some()][part::parts]
    for done, call in enumerate(calls, 1):
        torch.manual_seed(0)
        call()
        torch.cuda.synchronize()
        print(f"{done} of {len(calls)}", flush=True)
    print(f"{len(calls)} results are near their references")
    return 0


if __name__ == "__main__":
    sys.exit(main())
