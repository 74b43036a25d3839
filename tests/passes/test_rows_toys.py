"""Toys through the row prover: what mixes requests is refused by a typed error, what does not gives right rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from fxlora.errors import FxloraError
from tests.toys.base import (
    DISTINCT,
    SINGLE,
    SQUARE,
    Forward,
    Sizes,
    Toy,
    Verdict,
    adapters_for,
    clone,
    is_independent,
)
from tests.toys.hostile import HOSTILE, token_ids
from tests.toys.negative import NEGATIVE
from tests.toys.positive import POSITIVE
from tests.toys.serve import FORMS, check_mixed, graph_of, mixed_outputs, serve

CASES = [(toy, sizes) for toy in NEGATIVE + HOSTILE + POSITIVE for sizes in toy.sizes]
REFUSED = [toy for toy in NEGATIVE + HOSTILE if toy.verdict in (Verdict.MIXED, Verdict.SHARED)]
REPORTED = [toy for toy in NEGATIVE if toy.verdict is Verdict.REPORTED]


def identity(case: object) -> str:
    return case.name if isinstance(case, Toy) else "x".join(map(str, vars(case).values())) if case else ""


def forms_of(toy: Toy) -> list[str]:
    possible = {"symbolic_trace": toy.traceable, "capture": TorchVersion(torch.__version__) >= toy.since}
    return [form for form in FORMS if possible[form]]


def names_for(sizes: Sizes) -> list[str | None]:
    return ["b", None, "a", "a", None][: sizes.batch]


@pytest.mark.parametrize(("toy", "sizes"), CASES, ids=identity)
def test_the_verdict_is_true(toy: Toy, sizes: Sizes) -> None:
    """Every verdict below rests on numerics: requests are redrawn, and where it can each request runs alone."""
    assert is_independent(toy, sizes) == (toy.verdict in (Verdict.ROWS, Verdict.SHARED))


@pytest.mark.parametrize("toy", REFUSED, ids=identity)
def test_mixed_rows_are_refused(toy: Toy) -> None:
    """At distinct sizes and at B == T == H, as any graph form: an error of apply or of the load, never an answer."""
    for sizes in toy.sizes:
        module, inputs = toy.module(sizes), toy.inputs(sizes)
        for form in forms_of(toy):
            gm = graph_of(form, module, inputs)
            with pytest.raises(FxloraError):
                serve(gm, inputs, toy.batch_dims, adapters_for(module))


@pytest.mark.parametrize("toy", REFUSED, ids=identity)
def test_a_batch_of_one_does_not_fool_the_prover(toy: Toy) -> None:
    """Shown a batch of one, a mixing graph is refused then or when a larger batch comes; or its answers are right."""
    if SQUARE in toy.sizes and len(toy.sizes) == 1:
        pytest.skip("needs equal dims")
    module, small, large = toy.module(SINGLE), toy.inputs(SINGLE), toy.inputs(DISTINCT)
    adapters = adapters_for(module)
    try:
        lora = serve(graph_of(forms_of(toy)[0], module, small), small, toy.batch_dims, adapters)
    except FxloraError:
        return
    check_mixed(toy, module, lora, small, adapters, ["a"])
    with pytest.raises(FxloraError):
        lora(**clone(large), adapters=names_for(DISTINCT))


def ids_of_other_sequences(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.proj(self.table(x) + self.table(x.flip(0)))


def keys_of_another_sequence(self: Any, x: torch.Tensor) -> torch.Tensor:
    tokens = self.table(x)
    others = tokens[:, 0][(torch.arange(x.shape[0]) + 1) % x.shape[0]][:, None]
    return self.proj(F.scaled_dot_product_attention(tokens, others, others))


@pytest.mark.parametrize("forward", [ids_of_other_sequences, keys_of_another_sequence])
@pytest.mark.parametrize("form", FORMS)
def test_packed_rows_keep_sequences_apart(forward: Forward, form: str) -> None:
    """Adapters per token trust a mask within a sequence, never across sequences."""
    toy = Toy(forward.__name__, forward, Verdict.MIXED, token_ids)
    module, inputs = toy.module(), toy.inputs()
    gm = graph_of(form, module, inputs)
    with pytest.raises(FxloraError):
        serve(gm, inputs, {"x": (0, 1)}, adapters_for(module))


@pytest.mark.parametrize("toy", REPORTED, ids=identity)
def test_mixed_outputs_are_reported(toy: Toy) -> None:
    """Rows are clean at the site and mixed in an output: refused, or served and said so."""
    module, inputs = toy.module(), toy.inputs()
    for form in forms_of(toy):
        try:
            lora = serve(graph_of(form, module, inputs), inputs, toy.batch_dims, adapters_for(module))
        except FxloraError:
            continue
        assert mixed_outputs(lora)


@pytest.mark.parametrize("toy", POSITIVE, ids=identity)
def test_rows_get_their_own_adapter(toy: Toy) -> None:
    """A mixed batch equals each request under its own adapter; nothing is reported as mixed."""
    for sizes in toy.sizes:
        module, inputs = toy.module(sizes), toy.inputs(sizes)
        adapters = adapters_for(module)
        for form in forms_of(toy):
            lora = serve(graph_of(form, module, inputs), inputs, toy.batch_dims, adapters)
            check_mixed(toy, module, lora, inputs, adapters, names_for(sizes))
            assert not mixed_outputs(lora)


@pytest.mark.parametrize("toy", [toy for toy in POSITIVE if toy.alone and toy.traceable], ids=identity)
def test_one_graph_serves_other_batch_sizes(toy: Toy) -> None:
    """The row maps are part of the graph, so they follow the batch: proven at one size, right at another."""
    module, inputs = toy.module(), toy.inputs()
    adapters = adapters_for(module)
    lora = serve(graph_of("symbolic_trace", module, inputs), inputs, toy.batch_dims, adapters)
    larger = Sizes(6, DISTINCT.tokens, DISTINCT.features)
    check_mixed(toy, module, lora, toy.inputs(larger, seed=4), adapters, [None, "a", "b", "b", None, "a"])


@pytest.mark.parametrize("name", ["plain_rows", "beams", "expert_dispatch_and_return"])
def test_swapped_slots_change_the_answer(name: str) -> None:
    toy = next(toy for toy in POSITIVE if toy.name == name)
    module, inputs = toy.module(), toy.inputs()
    lora = serve(graph_of("symbolic_trace", module, inputs), inputs, toy.batch_dims, adapters_for(module))
    with torch.no_grad():
        one = lora(**clone(inputs), adapters=["a", "b", "a", "b"])
        two = lora(**clone(inputs), adapters=["b", "a", "b", "a"])
    assert all((left - right).abs().max() > 1e-3 for left, right in zip(one, two, strict=True))
