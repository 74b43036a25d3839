"""Adapter tensors onto expert weights, in every layout in which files hold them.

Stage: part of binding, for weights [E, N, K] of which each expert has a matrix, and for files that hold such a weight's
adapter where the model has a linear per expert. Layouts:
    one pair for all experts   A [E R, in], expert by expert, and B [out, R E], rank by rank (as PEFT saves those of
                               `target_parameters`), or A [E, R, in] and B [E, out, R]
    shared                     either half for all experts at once: A [R, in] or [1, R, in], B [out, R] or [1, out, R]
    a pair per expert          `experts.3.gate_proj.lora_A`: A [R, in], B [out, R]
    a pair per part            gate_proj and up_proj where the model keeps both in one weight, gate_up_proj

Letters: E experts, K in-features, N out-features, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fxlora.entries import Entry
from fxlora.errors import AdapterShapeError, ConflictingEntriesError, RankError
from fxlora.passes.sites import Site

# How files name the matrices of a gated MLP, beside gate_proj, up_proj and down_proj.
_SYNONYMS = {"w1": "gate", "w3": "up", "w2": "down"}
_FILLER = {"proj", "weight", "linear", "layer"}


class Part(NamedTuple):
    """Which of several matrices that one weight holds side by side along N: number `index` of `count`."""

    index: int
    count: int


@dataclass(frozen=True, eq=False)
class Piece:
    """One pair of tensors at an expert weight.

    a_rows: [R or E R, K]; b_rows: [R or E R, N or the part's share of it]. expert: whose they are, None for all.
    shared: (A, B) hold one expert's rows that are everybody's.
    """

    expert: int | None
    part: Part | None
    a_rows: torch.Tensor
    b_rows: torch.Tensor
    rank: int
    scaling: float
    keys: tuple[str, ...]
    shared: tuple[bool, bool]


def words_of(leaf: str) -> tuple[str, ...]:
    """The matrices a name speaks of: gate_up_proj → gate, up; w13 → gate, up; w2 → down."""
    found: list[str] = []
    for word in leaf.split("_"):
        names = [f"w{digit}" for digit in word[1:]] if re.fullmatch(r"w\d+", word) else [word]
        found += [_SYNONYMS.get(name, name) for name in names if name not in _FILLER]
    return tuple(found)


def find_part(leaf: str, names: Iterable[str]) -> tuple[str, Part | None] | None:
    """Which of some weights a file's name means, and which part of it; None where that is not just one."""
    names = list(names)
    if leaf in names:
        return leaf, None
    mine = words_of(leaf)
    whole = [name for name in names if words_of(name) == mine]
    if len(whole) == 1:
        return whole[0], None
    within = [name for name in names if len(mine) == 1 and mine[0] in words_of(name)]
    if whole or len(within) != 1:
        return None
    words = words_of(within[0])
    return within[0], Part(words.index(mine[0]), len(words))


def parts_of(name: str, leaves: Mapping[str, str]) -> list[str]:
    """The matrices that a parameter's name speaks of, in order, each by one leaf's path; empty if one is missing."""
    whole = [path for leaf, path in leaves.items() if words_of(leaf) == words_of(name)]
    if len(whole) == 1:
        return whole
    parts = [[path for leaf, path in leaves.items() if words_of(leaf) == (word,)] for word in words_of(name)]
    return [paths[0] for paths in parts] if all(len(paths) == 1 for paths in parts) else []


def features_of(pair: tuple[torch.Tensor, torch.Tensor], experts: int, rank: int) -> tuple[int, int] | None:
    """In- and out-features of a pair for all experts; None where its shapes are no such pair's."""
    if not {half.dim() for half in pair} <= {2, 3}:
        return None
    first, second = _rows_of_a(pair[0], experts, rank), _rows_of_b(pair[1], experts, rank)
    return None if first is None or second is None else (first[0].shape[1], second[0].shape[1])


def split_experts(
    pair: tuple[torch.Tensor, torch.Tensor], experts: int, rank: int, keys: tuple[str, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A [R, K] and B [R, N] of each expert, from a pair for all. Raises RankError."""
    first, second = _rows_of_a(pair[0], experts, rank), _rows_of_b(pair[1], experts, rank)
    if first is None or second is None:
        shapes = f"{keys[0]} is {list(pair[0].shape)} and {keys[-1]} is {list(pair[1].shape)}"
        raise RankError(f"{shapes}, which is not rank {rank} for each of {experts} experts, as the config has it")
    each = [rows.reshape(-1, rank, rows.shape[-1]).expand(experts, -1, -1) for rows in (first[0], second[0])]
    return list(zip(each[0].unbind(0), each[1].unbind(0), strict=True))


def make_piece(
    site: Site,
    pair: tuple[torch.Tensor, torch.Tensor],
    *,
    keys: tuple[str, ...],
    rank: int,
    scaling: float,
    expert: int | None = None,
    part: Part | None = None,
    wrapped: bool = False,
) -> Piece:
    """Reads a pair's layout off its shapes. wrapped: PEFT wrapped the parameter itself (`target_parameters`), so that
    its "in" and "out" are dims of the stored weight.

    Raises AdapterShapeError or RankError.
    """
    a, b = pair
    experts = 1 if expert is not None else site.num_experts
    shapes = f"{keys[0]} is {list(a.shape)} and {keys[-1]} is {list(b.shape)}"
    if not {a.dim(), b.dim()} <= {2, 3} or not a.numel() or not b.numel():
        raise AdapterShapeError(f"{shapes}; expected two dims each, or three with the experts first")
    first, second = _rows_of_a(a, experts, rank), _rows_of_b(b, experts, rank)
    if first is None or second is None:
        raise RankError(
            f"{shapes}, which is neither rank {rank}, as the config has it, for each of {experts} experts nor once for "
            f"all of them at expert site {site.name}"
        )
    width = site.out_features if part is None else site.out_features // part.count
    plain = (first[0].shape[1], second[0].shape[1]) == (site.in_features, width)
    turned = (second[0].shape[1], first[0].shape[1]) == (site.in_features, width)
    if not wrapped or part is not None:
        turned = False
    elif site.declared_KN is not None:
        plain, turned = plain and site.declared_KN == site.stored_KN, turned and site.declared_KN != site.stored_KN
    elif plain and turned and site.stored_KN:
        raise AdapterShapeError(
            f"{shapes}: expert site {site.name} is square and stored [E, in, out], so which half is A cannot be told "
            "from the graph alone; give apply the module that the graph was traced from (model=)"
        )
    if plain:
        return Piece(expert, part, first[0], second[0], rank, scaling, keys, (first[1], second[1]))
    if turned:
        return Piece(expert, part, second[0], first[0], rank, scaling, keys, (second[1], first[1]))
    raise AdapterShapeError(
        f"{shapes}; expert site {site.name} takes in-features {site.in_features} and out-features {width}, "
        f"for {experts} experts of rank {rank}"
    )


def _rows_of_a(a: torch.Tensor, experts: int, rank: int) -> tuple[torch.Tensor, bool] | None:
    """A as rank rows, expert by expert, and whether they are one expert's that all share."""
    shape = tuple(a.shape)
    if shape[:-1] in ((experts * rank,), (experts, rank)):
        return a.reshape(-1, shape[-1]), False
    return (a.reshape(rank, shape[-1]), True) if shape[:-1] in ((rank,), (1, rank)) else None


def _rows_of_b(b: torch.Tensor, experts: int, rank: int) -> tuple[torch.Tensor, bool] | None:
    """B as `_rows_of_a` gives A: in two dims its columns run rank by rank, each over all experts."""
    if b.dim() == 3:
        return _rows_of_a(b.transpose(1, 2), experts, rank)
    width, columns = b.shape
    if columns == experts * rank:
        return b.reshape(width, rank, experts).permute(2, 1, 0).reshape(-1, width), False
    return (b.t(), True) if columns == rank else None


def compose(site: Site, pieces: Sequence[Piece]) -> Entry:
    """All pieces of one adapter at one site as one entry.

    Experts and parts without a piece get zero rows. Where scalings differ, the ratio to the largest goes into B.
    Raises ConflictingEntriesError where two pieces are for the same place and differ.
    """
    distinct = _distinct(site, pieces)
    keys = tuple(key for piece in pieces for key in piece.keys)
    first = distinct[0]
    if len(distinct) == 1 and first.part is None and first.expert is None:
        every = tuple(range(site.num_experts))
        return Entry(first.a_rows, first.b_rows, first.scaling, first.rank, keys, first.shared, every)
    scaling = max((piece.scaling for piece in distinct), key=abs)
    parts = sorted({piece.part or Part(0, 1) for piece in distinct})
    ranks = [max(piece.rank for piece in distinct if (piece.part or Part(0, 1)) == part) for part in parts]
    starts = {part: sum(ranks[:i]) for i, part in enumerate(parts)}
    shared = tuple(all(piece.expert is None and piece.shared[half] for piece in distinct) for half in (0, 1))
    rows, total = site.num_experts, sum(ranks)
    dtype = first.a_rows.dtype
    for piece in distinct:
        dtype = torch.promote_types(torch.promote_types(dtype, piece.a_rows.dtype), piece.b_rows.dtype)
    a_ERK = torch.zeros(1 if shared[0] else rows, total, site.in_features, dtype=dtype)
    b_ERN = torch.zeros(1 if shared[1] else rows, total, site.out_features, dtype=dtype)
    for piece in distinct:
        part = piece.part or Part(0, 1)
        at = slice(starts[part], starts[part] + piece.rank)
        experts = slice(None) if piece.expert is None else slice(piece.expert, piece.expert + 1)
        a_ERK[experts, at] = piece.a_rows.reshape(-1, piece.rank, site.in_features).to(dtype)
        b_rows = piece.b_rows.reshape(-1, piece.rank, piece.b_rows.shape[-1])
        if piece.scaling != scaling:
            b_rows = b_rows.float() * (piece.scaling / scaling)
        b_ERN[experts, at, _columns(site, part)] = b_rows.to(dtype)
    bound = {e for piece in distinct for e in (range(rows) if piece.expert is None else (piece.expert,))}
    return Entry(
        a_ERK.flatten(0, 1), b_ERN.flatten(0, 1), scaling, total, keys, (shared[0], shared[1]), tuple(sorted(bound))
    )


def _columns(site: Site, part: Part) -> slice:
    """Where a part's out-features lie among the weight's."""
    if part.count == 1:
        return slice(None)
    if site.packing is not None and site.packing.strided:
        return slice(part.index, None, part.count)
    width = site.out_features // part.count
    return slice(part.index * width, (part.index + 1) * width)


def _distinct(site: Site, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces without repetitions under other names of the weight."""
    kept: dict[tuple[int | None, Part | None], Piece] = {}
    for piece in pieces:
        other = kept.setdefault((piece.expert, piece.part), piece)
        equal = (piece.scaling, piece.shared) == (other.scaling, other.shared) and all(
            one.shape == two.shape and bool((one == two).all())
            for one, two in ((piece.a_rows, other.a_rows), (piece.b_rows, other.b_rows))
        )
        if not equal:
            raise ConflictingEntriesError(f"{other.keys} and {piece.keys} are for one place of {site.name} and differ")
    _refuse_overlap(site, list(kept.values()))
    return list(kept.values())


def _refuse_overlap(site: Site, pieces: Sequence[Piece]) -> None:
    """A tensor for all experts (or the whole width) beside one for a single expert (or a part) has no one meaning."""
    for at, name in ((lambda p: p.expert is None, "experts"), (lambda p: p.part is None, "parts")):
        kinds = {at(piece) for piece in pieces}
        if len(kinds) > 1:
            one, two = (next(piece for piece in pieces if at(piece) is kind) for kind in (True, False))
            raise ConflictingEntriesError(
                f"{one.keys} speak of all {name} of {site.name}, {two.keys} of single ones; expected one kind"
            )
