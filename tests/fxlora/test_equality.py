"""Every family of the zoo against PEFT: one graph, one mixed batch, each request as PEFT answers it alone.

No family is named in the sources: those of `UNNAMED` must simply work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fxlora
from tests.models import DOCUMENTED, UNNAMED, ZOO, Entry, Inputs
from tests.oracle import TOLERANCE, Oracle, Recipe, answer_per_token, make_adapters, relative_error, tensors_of

MIXED: Sequence[str | None] = ("docs", None, "code", "sql", "docs")
SWAPPED: Sequence[str | None] = ("code", None, "docs", "sql", "code")
OTHERS: Sequence[str | None] = ("sql", None, None, "sql", "code")


def copied(inputs: Inputs) -> Inputs:
    return {name: value.clone() for name, value in inputs.items()}


def served(entry: Entry, adapters: Mapping[str, Path], example: Inputs, **options: Any) -> Any:
    """Capture, apply, load: the whole way from a model to a module that serves adapters."""
    gm = fxlora.capture(entry.build(), **copied(example))
    lora = fxlora.apply(gm, max_adapters=4, max_rank=16, example_inputs=copied(example), **options)
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)
    return lora


def same(got: Any, want: Any, index: int, exact: bool) -> bool:
    """Whether one request's rows agree between two runs of a batch: bit for bit, or within the tolerance."""
    left, right = tensors_of(got), tensors_of(want)
    if exact:
        return all(torch.equal(left[key][index], right[key][index]) for key in right)
    return all(relative_error(left[key][index], right[key][index]) <= TOLERANCE for key in right)


@pytest.mark.parametrize("entry", DOCUMENTED + UNNAMED, ids=lambda entry: entry.name)
@torch.no_grad()
def test_a_mixed_batch_equals_peft(
    entry: Entry, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Three adapters of ranks 2 to 8 beside base rows; a row's bits do not follow its neighbours' adapters."""
    adapters = make_adapters(entry, tmp_path)
    oracle, inputs = Oracle(entry.build, adapters), entry.inputs(batch=len(MIXED), seed=3)
    lora = served(entry, {}, entry.inputs())
    graph, nothing = lora.graph_module, lora(**copied(inputs), adapters=None)
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)

    got = lora(**copied(inputs), adapters=list(MIXED))
    error = oracle.check(got, inputs, MIXED)
    record_property("peft_error", f"{error:.1e}")
    print(f"{entry.name}: {error:.1e}")

    swapped = lora(**copied(inputs), adapters=list(SWAPPED))
    oracle.check(swapped, inputs, SWAPPED)
    assert not same(swapped, got, 0, exact=False)
    assert not same(swapped, got, 2, exact=False)

    others = lora(**copied(inputs), adapters=list(OTHERS))
    exact = not entry.routed
    for index in (index for index, name in enumerate(MIXED) if name == OTHERS[index]):
        assert same(others, got, index, exact), f"request {index} follows its neighbours"
    for index in (index for index, name in enumerate(MIXED) if name is None):
        assert same(got, nothing, index, exact), f"base request {index} differs from the graph with nothing loaded"
    assert lora.graph_module is graph


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe", "t5"])
@torch.no_grad()
def test_one_graph_serves_every_size(name: str, tmp_path: Path) -> None:
    """Captured at [3, 7]; served at other batch sizes and lengths."""
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path)
    oracle, lora = Oracle(entry.build, adapters), served(entry, adapters, entry.inputs())
    for batch, length in ((5, 9), (2, 4)):
        inputs = entry.inputs(batch=batch, length=length, seed=7)
        names = MIXED[:batch]
        oracle.check(lora(**copied(inputs), adapters=list(names)), inputs, names)


TIED: Mapping[str, Mapping[str, Recipe]] = {
    "embedding": {"e": Recipe(rank=3, alpha=5, parts=("embedding",))},
    "head": {"h": Recipe(rank=6, alpha=4, parts=("head",), rslora=True)},
    "both": {
        "e": Recipe(rank=3, alpha=5, parts=("embedding",)),
        "h": Recipe(rank=6, alpha=4, parts=("head",), rslora=True),
        "eh": Recipe(rank=2, alpha=3, parts=("embedding", "head")),
        "he": Recipe(rank=5, alpha=3, parts=("head", "embedding", "attention")),
    },
}


@pytest.mark.parametrize("recipes", TIED.values(), ids=list(TIED))
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt2", "bert"])
@torch.no_grad()
def test_a_tied_table_is_two_sites(name: str, recipes: Mapping[str, Recipe], tmp_path: Path) -> None:
    """An adapter on the embedding leaves the head alone and the other way round, each with its own rank."""
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path, recipes)
    oracle, lora = Oracle(entry.build, adapters), served(entry, adapters, entry.inputs())
    names: list[str | None] = [None, *reversed(adapters), *adapters][:5]
    inputs = entry.inputs(batch=len(names), seed=4)
    oracle.check(lora(**copied(inputs), adapters=names), inputs, names)


@pytest.mark.parametrize("keep", [1, 3, (4, 0, 6)], ids=["last", "last_three", "indices"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3moe"])
@torch.no_grad()
def test_logits_to_keep(name: str, keep: int | tuple[int, ...], tmp_path: Path) -> None:
    """The head sees slices or picked tokens of each request."""
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path)
    kept = torch.tensor(keep) if isinstance(keep, tuple) else keep
    gm = fxlora.capture(entry.build(), **entry.inputs(), logits_to_keep=kept)
    lora = fxlora.apply(gm, max_adapters=4, max_rank=16, batch_dims={"input_ids": 0, "attention_mask": 0})
    for loaded, folder in adapters.items():
        lora.load_adapter(loaded, folder)
    inputs = entry.inputs(batch=len(MIXED), seed=5)
    got = lora(**copied(inputs), logits_to_keep=kept, adapters=list(MIXED))
    whole, index = Oracle(entry.build, adapters), torch.tensor(keep) if isinstance(keep, tuple) else slice(-keep, None)
    for row, adapter in enumerate(MIXED):
        mine = {key: value[row : row + 1] for key, value in inputs.items()}
        want, base = (whole.alone(each, mine)["logits"][:, index] for each in (adapter, None))
        assert relative_error(tensors_of(got)["logits"][row : row + 1], want) <= TOLERANCE
        assert adapter is None or relative_error(want, base) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3moe", "deepseekv3"])
@torch.no_grad()
def test_packed_requests_choose_per_token(name: str, tmp_path: Path) -> None:
    """Three requests in one row [1, 12], told apart by restarting positions; adapters nested as the ids are."""
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path)
    lengths, names = (5, 3, 4), ("code", None, "sql")
    ids = entry.inputs(batch=1, length=sum(lengths), seed=2)["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = {"input_ids": ids, "position_ids": positions}
    lora = served(entry, adapters, packed, batch_dims={"input_ids": (0, 1), "position_ids": (0, 1)})
    per_token = [chosen for chosen, length in zip(names, lengths, strict=True) for _ in range(length)]
    got = tensors_of(lora(**copied(packed), adapters=[per_token]))["logits"]
    oracle, start = Oracle(entry.build, adapters), 0
    for index, length in enumerate(lengths):
        chosen = names[index]
        mine = {"input_ids": ids[:, start : start + length]}
        want, base = (oracle.alone(each, mine)["logits"] for each in (chosen, None))
        assert relative_error(got[:, start : start + length], want) <= TOLERANCE
        assert chosen is None or relative_error(want, base) > 1e-3
        start += length


PER_TOKEN: Mapping[str, Recipe] = {
    "a": Recipe(rank=2, alpha=3, parts=("attention", "mlp"), patterned=True),
    "b": Recipe(rank=5, alpha=4, parts=("attention", "mlp", "head"), rslora=True),
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
@torch.no_grad()
def test_tokens_of_one_request_choose_their_own_adapters(name: str, tmp_path: Path) -> None:
    """Two requests whose adapter changes from token to token, as a decoder that switches adapters mid-way does."""
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path, PER_TOKEN)
    inputs = {"input_ids": entry.inputs(batch=2, length=6, seed=2)["input_ids"]}
    lora = served(entry, adapters, inputs, batch_dims={"input_ids": (0, 1)})
    names: list[list[str | None]] = [["a", "a", "b", None, "b", "a"], [None, "b", "b", "b", "a", None]]
    got = tensors_of(lora(**copied(inputs), adapters=names))["logits"]
    want = answer_per_token(entry.build, adapters, inputs, names)["logits"]
    assert relative_error(got, want) <= TOLERANCE
    for other in (None, "a", "b"):
        uniform = answer_per_token(entry.build, adapters, inputs, [[other] * 6] * 2)["logits"]
        assert all(relative_error(got[row], uniform[row]) > 1e-3 for row in range(2))
