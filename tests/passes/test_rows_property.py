"""Random programs through the row prover: whatever is accepted must give every request its own adapter's answer.

Refusing is always allowed for a wild program. Programs that keep requests apart by construction must nearly all be
accepted, so that a prover that refuses everything fails too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import fx

from fxlora.errors import FxloraError
from tests.toys.base import DISTINCT, SINGLE, SQUARE, Adapter, Sizes, adapters_for
from tests.toys.program_ops import draw
from tests.toys.programs import Program, Truth, truth_of
from tests.toys.serve import mixed_outputs, serve

Item = TypeVar("Item")
EXAMPLES = int(os.environ.get("FXLORA_EXAMPLES", "60"))
NAMES: Sequence[str | None] = ("a", None, "b", "b", None)
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FXLORA_EXAMPLES" not in os.environ,
    suppress_health_check=list(hypothesis.HealthCheck),
)


class Drawn:
    """Decisions drawn by hypothesis; the first option is the simplest."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def pick(self, options: Sequence[Item]) -> Item:
        return options[self.data.draw(st.integers(0, len(options) - 1))] if len(options) > 1 else options[0]


class Seeded:
    """Decisions of a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[Item]) -> Item:
        return self.random.choice(options)


def paths_of(program: Program) -> list[str]:
    return [f"proj{index + 1}" for index in range(program.sites)]


def serve_program(gm: fx.GraphModule, program: Program, adapters: Mapping[str, Adapter]) -> Any:
    """The served program, or None where it is refused by a typed error."""
    try:
        return serve(gm, {"x": program.example}, {"x": 0}, adapters)
    except FxloraError:
        return None


@torch.no_grad()
def check(gm: fx.GraphModule, lora: Any, x: torch.Tensor, adapters: Mapping[str, Adapter]) -> Truth:
    """Compare one mixed batch with the truth; rows without adapter keep the bits they have with no adapter at all."""
    truth, names = truth_of(gm, x, adapters), NAMES[: len(x)]
    got, nothing = lora(x.clone(), adapters=list(names)), lora(x.clone(), adapters=None)
    wrong, lost, unexplained = faults(truth, got, nothing, names)
    if not mixed_outputs(lora):  # of an output that mixes requests nothing is promised
        assert wrong == 0, f"{wrong} of {got.numel()} elements are not those of their request alone"
        assert lost == 0, f"{lost} elements without adapter lost their bits"
        assert unexplained == 0, f"{unexplained} elements mix requests and nothing says so"
    return truth


def faults(truth: Truth, got: torch.Tensor, nothing: torch.Tensor, names: Sequence[str | None]) -> tuple[int, int, int]:
    """Elements that are wrong, that lost the bits of the base, and that no single request explains."""
    wrong, unexplained = truth.wrong(got, names)
    bare = torch.tensor([name is None for name in names])
    base = (truth.owners.sum(0) == 1) & truth.owners[bare].any(0)
    return wrong, int((got.flatten() != nothing.flatten())[base].sum()), unexplained


@pytest.mark.parametrize("sizes", [DISTINCT, SQUARE], ids=["distinct", "square"])
@SETTINGS
@hypothesis.given(data=st.data(), symbolic=st.booleans(), length=st.integers(1, 7))
def test_accepted_programs_are_right(sizes: Sizes, data: st.DataObject, symbolic: bool, length: int) -> None:
    """Wild programs: any op along any dim. Accepted means right."""
    gm, program = draw(Drawn(data), sizes, careful=False, symbolic=symbolic, length=length)
    adapters = adapters_for(gm, paths_of(program))
    lora = serve_program(gm, program, adapters)
    if lora is not None:
        hypothesis.event("accepted")
        check(gm, lora, program.example, adapters)


@SETTINGS
@hypothesis.given(data=st.data(), careful=st.booleans(), length=st.integers(1, 7))
def test_a_batch_of_one_proves_nothing_for_more(data: st.DataObject, careful: bool, length: int) -> None:
    """Shown one request, then called with three: a typed error or the right answer."""
    gm, program = draw(Drawn(data), SINGLE, careful=careful, symbolic=True, length=length)
    adapters = adapters_for(gm, paths_of(program))
    lora = serve_program(gm, program, adapters)
    if lora is None:
        return
    check(gm, lora, program.example, adapters)
    three = torch.randn(3, *program.example.shape[1:], generator=torch.Generator().manual_seed(9))
    try:
        gm(three.clone())
    except (RuntimeError, IndexError):
        return
    try:
        lora(three.clone(), adapters=list(NAMES[:3]))
    except FxloraError:
        return
    check(gm, lora, three, adapters)


@pytest.mark.parametrize("sizes", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_careful_programs_are_accepted_and_right(sizes: Sizes) -> None:
    """Programs that keep requests apart: at least nine of ten accepted, most of them moved by the adapter."""
    accepted = changed = 0
    total = 60
    for seed in range(total):
        gm, program = draw(Seeded(seed), sizes, careful=True, symbolic=seed % 2 == 0, length=2 + seed % 6)
        adapters = adapters_for(gm, paths_of(program))
        lora = serve_program(gm, program, adapters)
        if lora is None:
            continue
        accepted += 1
        truth = check(gm, lora, program.example, adapters)
        assert not truth.mixes(), f"seed {seed}: not a careful program"
        changed += bool((truth.uniform["a"] - truth.uniform[None]).abs().max() > 1e-3)
    assert accepted >= 0.9 * total, f"{accepted} of {total} programs that keep requests apart were accepted"
    assert changed >= 0.8 * accepted
