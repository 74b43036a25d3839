"""Every layout in which files hold adapters of experts, against PEFT where it reads them, else merged weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxlora
from fxlora.commands.inspect import inspect_model
from fxlora.errors import AdapterShapeError, ConflictingEntriesError, RankError, UnboundTensorError
from fxlora.expert_binding import Part, find_part
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.rooms import round_up_rows
from tests.models import ZOO, Entry
from tests.oracle import Oracle, make_adapter
from tests.toys.base import clone, worst
from tests.toys.experts import SPELLINGS, STORED_KN, E, K, N, Routed, routed, tokens

Tensors = dict[str, Tensor]
Sizes = Mapping[str, tuple[int, int]]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none"}


def pairs(path: str, sizes: Sizes, rank: int, seed: int, experts: Sequence[int] = range(5)) -> Tensors:
    """A linear's pair for each expert and each name: in and out features by name."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for expert in experts:
        for name, (columns, rows) in sizes.items():
            key = f"base_model.model.{path}.{expert}.{name}"
            made[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            made[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 2
    return made


def write(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


PER_EXPERT: Mapping[str, tuple[str, Sizes]] = {
    "qwen3moe": ("mlp.experts", {"gate_proj": (48, 24), "up_proj": (48, 24), "down_proj": (24, 48)}),
    "mixtral": ("block_sparse_moe.experts", {"w1": (48, 80), "w3": (48, 80), "w2": (80, 48)}),
}


@pytest.mark.parametrize("name", PER_EXPERT)
@torch.no_grad()
def test_files_of_a_linear_per_expert_equal_peft(name: str, tmp_path: Path) -> None:
    """As models of transformers 4 were saved: PEFT converts such files, under today's names."""
    entry, (path, sizes) = ZOO[name], PER_EXPERT[name]
    adapters = {}
    for index, rank in enumerate((2, 3)):
        tensors: Tensors = {}
        for layer in range(2):
            tensors |= pairs(f"model.layers.{layer}.{path}", sizes, rank, seed=10 * index + layer)
        config = {**CONFIG, "r": rank, "target_modules": [*sizes]}
        adapters["ab"[index]] = write(tmp_path / "ab"[index], config, tensors)
    lora = served(entry)
    for adapter, folder in adapters.items():
        lora.load_adapter(adapter, folder)
    inputs, names = entry.inputs(batch=4, seed=3), ["a", None, "b", "a"]
    Oracle(entry.build, adapters).check(lora(**inputs, adapters=names), inputs, names)
    pools = {site.name: lora.pool._rooms[site].pool for site in lora.sites if site.num_experts}
    assert [pools[f"model.layers.0.mlp.experts.{leaf}"].rank.tolist() for leaf in ("gate_up_proj", "down_proj")] == [
        [4, 6],
        [2, 3],
    ]


def served(entry: Entry) -> Any:
    gm = fxlora.capture(entry.build(), **entry.inputs())
    return fxlora.apply(gm, max_adapters=2, max_rank=8, targets="all")


def merged(model: nn.Module, deltas: Mapping[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model)
    for path, delta in deltas.items():
        made.get_parameter(path).data += delta
    return made


@torch.no_grad()
def check(lora: Any, model: nn.Module, inputs: dict[str, Tensor], deltas: Mapping[str, Tensor]) -> None:
    """Adapter "a" beside rows without one equals the model with these deltas in its weights."""
    rows, other = next(iter(inputs.values())).shape[0], merged(model, deltas)
    names = ["a" if index % 2 == 0 else None for index in range(rows)]
    got = lora(**clone(inputs), adapters=names)
    for index, name in enumerate(names):
        mine = {key: value[index : index + 1] for key, value in inputs.items()}
        results = [m(**mine) for m in (other if name else model, other, model)]
        want, with_it, without = (getattr(result, "logits", result) for result in results)
        assert worst([getattr(got, "logits", got)[index : index + 1]], [want]) <= 1e-5
        assert worst([with_it], [without]) > 1e-3


@torch.no_grad()
def test_an_adapter_for_half_the_experts_binds_half_and_says_so(tmp_path: Path) -> None:
    """Only down_proj of experts 0, 1 and 4, and only gate_proj of expert 2: the rest stays as the base has it."""
    entry = ZOO["qwen3moe"]
    model, path = entry.build(), "model.layers.1.mlp.experts"
    tensors = pairs(path, {"down_proj": (24, 48)}, 2, 1, experts=(0, 1, 4))
    tensors |= pairs(path, {"gate_proj": (48, 24)}, 2, 2, experts=(2,))
    folder = write(tmp_path / "half", {**CONFIG, "target_modules": ["down_proj", "gate_proj"]}, tensors)
    lora = served(entry)
    lora.load_adapter("a", folder)
    deltas = {f"{path}.down_proj": torch.zeros(5, 48, 24), f"{path}.gate_up_proj": torch.zeros(5, 48, 48)}
    for expert, leaf, rows in ((0, "down_proj", 48), (1, "down_proj", 48), (4, "down_proj", 48), (2, "gate_proj", 24)):
        a, b = (tensors[f"base_model.model.{path}.{expert}.{leaf}.lora_{half}.weight"] for half in "AB")
        deltas[f"{path}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][expert, :rows] = 1.5 * b @ a
    check(lora, model, entry.inputs(batch=4, seed=5), deltas)
    model.save_pretrained(tmp_path / "model")
    console = Console(record=True, width=200)
    assert inspect_model(tmp_path / "model", [folder], console)
    text = console.export_text()
    assert "half: binds in full, 8 tensors to 2 sites" in text
    assert "3 of 5 experts: [0-1,4]" in text
    assert "1 of 5 experts: 2" in text
    assert 'only where apply is given targets="all"' in text


SHARED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "A for all, [R, K]": ((2, K), (E, N, 2)),
    "A for all, [1, R, K]": ((1, 2, K), (E, N, 2)),
    "B for all, [1, N, R]": ((E, 2, K), (1, N, 2)),
    "B for all, [N, R]": ((E * 2, K), (N, 2)),
    "both for all": ((2, K), (N, 2)),
    "neither": ((E * 2, K), (E, N, 2)),
}


@pytest.mark.parametrize("layout", SHARED)
@torch.no_grad()
def test_halves_that_all_experts_share_take_the_rows_of_one(layout: str) -> None:
    model = routed(SPELLINGS["bmm of w[ids]"])
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8, targets=["w"])
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=generator) / 3 for shape in SHARED[layout])
    lora.load_adapter("a", (CONFIG, {"w.lora_A.weight": a, "w.lora_B.weight": b}))
    first = a.reshape(-1, 2, K).expand(E, -1, -1)
    second = b.reshape(-1, N, 2).expand(E, -1, -1)
    check(lora, model, tokens(batch=4, seed=6), {"w": 1.5 * second @ first})
    (room,) = lora.pool._rooms.values()
    taken = [room.a_extents.rows - room.a_extents.free, room.b_extents.rows - room.b_extents.free]
    assert taken == [16 * -(-2 * (E if half.numel() > 2 * width else 1) // 16) for half, width in ((a, K), (b, N))]


def stacked(path: str, sizes: Sizes, experts: int, shared: Mapping[str, str]) -> Tensors:
    """Three dims, experts first, a name for each matrix; shared: the half of a name that has one expert's rows."""
    generator, made = torch.Generator().manual_seed(8), {}
    for name, (columns, rows) in sizes.items():
        for half, shape in (("A", (2, columns)), ("B", (rows, 2))):
            count = 1 if shared.get(name) == half else experts
            tensor = torch.randn(count, *shape, generator=generator) / 3
            made[f"base_model.model.{path}.{name}.lora_{half}.weight"] = tensor
    return made


def delta_of(tensors: Tensors, path: str, name: str) -> Tensor:
    a, b = (tensors[f"base_model.model.{path}.{name}.lora_{half}.weight"] for half in "AB")
    return 1.5 * b @ a


OUTER = {"w1": "A", "w3": "A", "w2": "B"}


@pytest.mark.parametrize("shared", [OUTER, {}], ids=["outer halves shared", "each expert its own"])
@pytest.mark.parametrize("name", ["qwen3moe", "gptoss"])
@torch.no_grad()
def test_stacked_matrices_by_name(name: str, shared: Mapping[str, str]) -> None:
    """w1, w3 and w2 of all experts, onto one weight for w1 and w3: side by side, or column by column in turn."""
    entry = ZOO[name]
    model, path = entry.build(), "model.layers.1.mlp.experts"
    inner = 24 if name == "qwen3moe" else 80
    tensors = stacked(path, {"w1": (48, inner), "w3": (48, inner), "w2": (inner, 48)}, 5, shared)
    lora = served(entry)
    lora.load_adapter("a", ({**CONFIG, "target_modules": ["w1", "w2", "w3"]}, tensors))
    gate, up, down = (delta_of(tensors, path, leaf) for leaf in ("w1", "w3", "w2"))
    if name == "qwen3moe":
        deltas = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
    else:
        turns = torch.stack([gate, up], 2).flatten(1, 2)
        deltas = {"gate_up_proj": turns.mT, "down_proj": down.mT}
    check(lora, model, entry.inputs(batch=4, seed=5), {f"{path}.{leaf}": delta for leaf, delta in deltas.items()})
    site = next(site for site in lora.sites if site.name == f"{path}.gate_up_proj")
    pool = lora.pool._rooms[site].pool
    assert (pool.rank[0], pool.a_step[0], pool.b_step[0]) == (4, 0 if shared else 4, 4)


@torch.no_grad()
def test_stacked_matrices_by_name_onto_a_list_of_experts() -> None:
    model = listed()
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8)
    tensors = stacked("experts", {"gate_proj": (16, 24), "up_proj": (16, 24), "w2": (24, 16)}, 4, {"gate_proj": "A"})
    lora.load_adapter("a", (CONFIG, tensors))
    deltas = {}
    for name, leaf in (("gate_proj", "w1"), ("up_proj", "w3"), ("w2", "w2")):
        delta = delta_of(tensors, "experts", name)
        deltas |= {f"experts.{e}.{leaf}.weight": delta[e] for e in range(4)}
    check(lora, model, tokens(batch=4, seed=6), deltas)


class Expert(nn.Module):
    """A gated MLP under the names w1, w2 and w3."""

    def __init__(self, features: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(features, inner, bias=False)
        self.w2 = nn.Linear(inner, features, bias=False)
        self.w3 = nn.Linear(features, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Listed(nn.Module):
    """A list of experts, each with the tokens that chose it; x [B, T, 16] -> [B, T, 16]."""

    def __init__(self, count: int = 4, features: int = 16, inner: int = 24) -> None:
        super().__init__()
        self.gate = nn.Linear(features, count, bias=False)
        self.experts = nn.ModuleList([Expert(features, inner) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = torch.topk(self.gate(flat).softmax(-1), 2, dim=-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(ids == e)
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.reshape(x.shape)


def listed() -> Listed:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Listed().eval().requires_grad_(False)


@torch.no_grad()
def test_a_file_of_stacked_experts_binds_to_a_list_of_them() -> None:
    """A as expert by expert, B rank by rank: cut into each expert's w1, w3 and w2."""
    model, generator = listed(), torch.Generator().manual_seed(4)
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8)
    assert sum(site.name.startswith("experts.") for site in lora.sites) == 12
    tensors = {
        "experts.base_layer.lora_A.weight": torch.randn(4 * 2, 16, generator=generator) / 4,
        "experts.base_layer.lora_B.weight": torch.randn(48, 2 * 4, generator=generator) / 2,
        "experts.lora_A.weight": torch.randn(4 * 3, 24, generator=generator) / 5,
        "experts.lora_B.weight": torch.randn(16, 3 * 4, generator=generator) / 2,
    }
    config = {
        **CONFIG,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {r".*\.down_proj|experts\.down_proj": 3},
    }
    lora.load_adapter("a", (config, tensors))
    first, second, third, fourth = tensors.values()
    gate_up = 1.5 * torch.einsum("ore,eri->eoi", second.view(48, 2, 4), first.view(4, 2, 16))
    down = torch.einsum("ore,eri->eoi", fourth.view(16, 3, 4), third.view(4, 3, 24))
    deltas = {f"experts.{e}.w1.weight": gate_up[e, :24] for e in range(4)}
    deltas |= {f"experts.{e}.w3.weight": gate_up[e, 24:] for e in range(4)}
    deltas |= {f"experts.{e}.w2.weight": down[e] for e in range(4)}
    check(lora, model, tokens(batch=4, seed=6), deltas)
    wrong = {key: value[:, :-1] if "lora_A" in key else value for key, value in tensors.items()}
    with pytest.raises(UnboundTensorError, match="do not have the shapes of any of"):
        lora.load_adapter("b", (config, wrong))


@torch.no_grad()
def test_an_adapter_of_each_linear_of_a_list_of_experts() -> None:
    model = listed()
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8)
    tensors = pairs("experts", {"w1": (16, 24), "w2": (24, 16), "w3": (16, 24)}, 2, 7, experts=range(4))
    lora.load_adapter("a", ({**CONFIG, "target_modules": ["w1", "w2", "w3"]}, tensors))
    deltas = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            path = key.removeprefix("base_model.model.").replace("lora_A.", "")
            deltas[path] = 1.5 * tensors[key.replace("lora_A", "lora_B")] @ a
    check(lora, model, tokens(batch=4, seed=6), deltas)


class Square(nn.Module):
    """Experts [E, 16, 16] read as [E, in, out]; `turned` is what the module itself says of its layout."""

    def __init__(self, turned: bool | None) -> None:
        super().__init__()
        self.inner = Routed(STORED_KN["bmm of w[ids]"], stored_KN=True)
        self.inner.w = nn.Parameter(torch.randn(E, 16, 16) / 4)
        self.inner.body = lambda own, x, weights, ids: (
            ((x.repeat_interleave(2, 0).unsqueeze(1) @ own.w[ids.reshape(-1)]).view(-1, 2, 16) * weights[:, :, None])
            .sum(1)
            .repeat(1, 2)[:, :N]
        )
        if turned is not None:
            self.inner.is_transposed = turned

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("turned", [True, False, None])
@torch.no_grad()
def test_square_experts_follow_what_their_module_says(turned: bool | None, tmp_path: Path) -> None:
    """PEFT calls in and out what `is_transposed` makes of the stored dims; shapes alone cannot tell."""

    def build() -> nn.Module:
        torch.manual_seed(9)
        return Square(turned).eval().requires_grad_(False)

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["inner.w"])
    adapters = {"a": make_adapter(build, config, tmp_path / "a")}
    lora = fxlora.apply(fxlora.capture(build(), **tokens()), max_adapters=2, max_rank=8, targets=["w"])
    lora.load_adapter("a", adapters["a"])
    inputs, names = tokens(batch=4, seed=6), ["a", None, "a", None]
    Oracle(build, adapters).check(lora(**inputs, adapters=names), inputs, names)
    dims = {"x": {0: torch.export.Dim("requests", min=2), 1: torch.export.Dim("tokens", min=2)}}
    model = build()
    bare = torch.export.export(model, (), tokens(), dynamic_shapes=dims).module()
    alone = fxlora.apply(bare, max_adapters=2, max_rank=8, targets=["w"])
    with pytest.raises(AdapterShapeError, match=r"square and stored \[E, in, out\].*model="):
        alone.load_adapter("a", adapters["a"])
    known = fxlora.apply(bare, max_adapters=2, max_rank=8, targets=["w"], model=model)
    known.load_adapter("a", adapters["a"])
    Oracle(build, adapters).check(known(**inputs, adapters=names), inputs, names)


class Product(nn.Module):
    """A 2-D parameter that is no `weight`, read as [in, out]."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, rows) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Flat(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.block = Product(rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("rows", [16, 24])
@torch.no_grad()
def test_a_flat_parameter_read_in_by_out(rows: int, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(9)
        return Flat(rows).eval().requires_grad_(False)

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["block.w"])
    adapters = {"a": make_adapter(build, config, tmp_path / "a")}
    lora = fxlora.apply(fxlora.capture(build(), **tokens()), max_adapters=2, max_rank=8)
    lora.load_adapter("a", adapters["a"])
    inputs, names = tokens(batch=3, seed=6), ["a", None, "a"]
    Oracle(build, adapters).check(lora(**inputs, adapters=names), inputs, names)


@pytest.mark.parametrize(
    ("leaf", "names", "found"),
    [
        ("gate_proj", ["gate_up_proj", "down_proj"], ("gate_up_proj", Part(0, 2))),
        ("up_proj", ["gate_up_proj", "down_proj"], ("gate_up_proj", Part(1, 2))),
        ("up_proj", ["up_gate_proj", "down_proj"], ("up_gate_proj", Part(0, 2))),
        ("w1", ["gate_up_proj", "down_proj"], ("gate_up_proj", Part(0, 2))),
        ("w3", ["w13_weight", "w2_weight"], ("w13_weight", Part(1, 2))),
        ("w2", ["gate_up_proj", "down_proj"], ("down_proj", None)),
        ("gate_up_proj", ["gate_up_proj", "down_proj"], ("gate_up_proj", None)),
        ("w13", ["gate_up_proj", "down_proj"], ("gate_up_proj", None)),
        ("gate", ["gate_proj", "up_proj", "down_proj"], ("gate_proj", None)),
        ("q_proj", ["gate_up_proj", "down_proj"], None),
        ("proj", ["gate_up_proj", "down_proj"], None),
    ],
)
def test_names_of_parts(leaf: str, names: list[str], found: tuple[str, Part | None] | None) -> None:
    assert find_part(leaf, names) == found


def refused(tensors: Tensors, error: type[Exception], match: str, **config: Any) -> None:
    """A load over one model fails by name and leaves nothing behind."""
    lora = fxlora.apply(
        fxlora.capture(routed(SPELLINGS["bmm of w[ids]"]), **tokens()), max_adapters=2, max_rank=8, targets="all"
    )
    with pytest.raises(error, match=match):
        lora.load_adapter("a", ({**CONFIG, **config}, tensors))
    assert lora.adapter_names == ()


def both(key: str, a: tuple[int, ...], b: tuple[int, ...]) -> Tensors:
    return {f"{key}.lora_A.weight": torch.randn(a), f"{key}.lora_B.weight": torch.randn(b)}


def test_wrong_files_are_refused_by_name() -> None:
    refused(both("w", (E * 3, K), (N, E * 3)), RankError, r"neither rank 2.*nor once for all", r=2)
    refused(both("w", (E * 2, K + 1), (N, E * 2)), AdapterShapeError, rf"takes in-features {K} and out-features {N}")
    refused(both("w", (E, 2, 2, K), (N, E * 2)), AdapterShapeError, "two dims each, or three")
    refused(both("0.w", (2, K), (N, 2)) | both("9.w", (2, K), (N, 2)), UnboundTensorError, "has 7 experts")
    refused(both("w", (E * 2, K), (N, E * 2)) | both("3.w", (2, K), (N, 2)), ConflictingEntriesError, "all experts")
    refused(both("3.gate.w", (2, K), (N, 2)), UnboundTensorError, "no weight of this name")


def test_the_same_expert_twice_must_agree() -> None:
    """A key with PEFT's prefix and one without it name one place."""
    model = routed(SPELLINGS["bmm of w[ids]"])
    pair: Tensors = {}
    for e in range(E):
        pair |= both(f"{e}.w", (2, K), (N, 2))
    twice = {**pair, **{f"base_model.model.{key}": value.clone() for key, value in pair.items()}}
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8, targets="all")
    lora.load_adapter("a", (CONFIG, twice))
    deltas = [1.5 * pair[f"{e}.w.lora_B.weight"] @ pair[f"{e}.w.lora_A.weight"] for e in range(E)]
    check(lora, model, tokens(batch=4, seed=6), {"w": torch.stack(deltas)})
    other = {key: value + 1 if key.startswith("base_model") else value for key, value in twice.items()}
    with pytest.raises(ConflictingEntriesError, match="for one place of w and differ"):
        lora.load_adapter("b", (CONFIG, other))


@torch.no_grad()
def test_experts_of_different_rank_and_scaling_are_one_entry() -> None:
    """Ranks are padded with zero rows; the ratio of scalings goes into B, whatever the largest is."""
    model = routed(SPELLINGS["bmm of w[ids]"])
    lora = fxlora.apply(fxlora.capture(model, **tokens()), max_adapters=2, max_rank=8, targets="all")
    ranks = {e: 2 + e % 3 for e in range(E)}
    tensors: Tensors = {}
    for e, rank in ranks.items():
        tensors |= both(f"{e}.w", (rank, K), (N, rank))
    patterns = {"rank_pattern": {f"{e}.w": rank for e, rank in ranks.items()}, "alpha_pattern": {"3.w": 9, "5.w": -20}}
    lora.load_adapter("a", ({**CONFIG, **patterns}, tensors))
    deltas = []
    for e, rank in ranks.items():
        scaling = {3: 9, 5: -20}.get(e, 3) / rank
        deltas.append(scaling * tensors[f"{e}.w.lora_B.weight"] @ tensors[f"{e}.w.lora_A.weight"])
    check(lora, model, tokens(batch=4, seed=6), {"w": torch.stack(deltas)})
    (room,) = [room for site, room in lora.pool._rooms.items() if site.name == "w"]
    assert (int(room.pool.rank[0]), float(room.pool.scaling[0])) == (4, -20 / 4)


def test_bytes_of_an_adapter_of_a_large_mixture() -> None:
    """128 experts over 48 layers, hidden 2048, inner 768, bf16: what the README says of rank 8 and 16."""
    hidden, inner = 2048, 768

    def of(rank: int, gate_up_rank: int, shared: bool = False) -> int:
        own, one = (round_up_rows(rank * count) for count in (128, 1 if shared else 128))
        gate_up_own, gate_up_one = (round_up_rows(gate_up_rank * count) for count in (128, 1 if shared else 128))
        gate_up = bytes_of(gate_up_one, gate_up_own, hidden, 2 * inner)
        return 48 * (gate_up + bytes_of(own, one, inner, hidden))

    def bytes_of(rows_a: int, rows_b: int, in_features: int, out_features: int) -> int:
        return ExpertPool.bytes_needed(
            num_experts=128, pool_rows_a=rows_a, pool_rows_b=rows_b, in_features=in_features, out_features=out_features,
            max_adapters=0, dtype=torch.bfloat16, device="cpu",
        )  # fmt: skip

    assert [round(of(r, r) / 1e6) for r in (8, 16)] == [629, 1258]
    assert round(of(8, 16) / 1e6) == 981  # gate and up trained apart: stacked, their rank is double
    assert round(of(8, 8, shared=True) / 1e6) == 233
