"""Names of adapter tensors: what each part of a key says, without knowing the model.

Stage: between reading an adapter and binding it. Rules of peft 0.21 (`save_and_load.py`, `lora/layer.py`), after
`base_model.model.`: `q_proj.lora_A.weight`; `embed.lora_embedding_A`; an adapter name may stand before `weight`;
`X.base_layer.lora_A.weight` belongs to a parameter of X wrapped inside another one; `X.base_layer.weight` is the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fxlora.errors import AdapterFormatError

_PREFIX = "base_model.model."
_PARALLEL = "module."
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_NESTING = "base_layer"
_HALVES = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b"}
_REFUSED_SEGMENTS = {
    "lora_magnitude_vector": "a DoRA magnitude, which is not served",
    "modules_to_save": "a module trained and saved whole, which is not served",
    "trainable_tokens_delta": "trained embedding rows, which are not served",
}


@dataclass(frozen=True)
class LoraKey:
    """The A and B that share one module path, as far as both are there.

    modules: the path without PEFT's prefix, then as written. nesting: how many `base_layer` stood at its end.
    owner: the module around this one that PEFT wrapped with it (attention around its output), whose patterns hold here.
    a, b: full keys, empty if absent.
    """

    modules: tuple[str, ...]
    nesting: int
    embedding: bool
    a: str = ""
    b: str = ""
    owner: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The full keys that are there."""
        return tuple(filter(None, (self.a, self.b)))


@dataclass(frozen=True)
class PlainKey:
    """A key that is no half of a pair: the copy of a base parameter if one of `paths` is one, else `reason` applies."""

    key: str
    paths: tuple[str, ...]
    reason: str


def clean_path(name: str) -> str:
    """A dotted name without what torch's own wrappers (compile, FSDP, checkpointing, DDP in front of PEFT) put in."""
    bare = ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)
    return bare.removeprefix(_PARALLEL) if bare.startswith(_PARALLEL + _PREFIX) else bare


def group_keys(keys: Iterable[str]) -> tuple[list[LoraKey], list[PlainKey]]:
    """Pairs A with B, in order of first appearance, and sets the rest apart.

    Raises AdapterFormatError when a module has two tensors for one half, as in a file that holds two adapters.
    """
    pairs: dict[tuple[str, int, bool, str], dict[str, str]] = {}
    plain: list[PlainKey] = []
    for key in keys:
        parsed = _parse(key)
        if isinstance(parsed, PlainKey):
            plain.append(parsed)
            continue
        path, nesting, embedding, owner, half = parsed
        halves = pairs.setdefault((path, nesting, embedding, owner), {})
        if half in halves:
            raise AdapterFormatError(
                f"{halves[half]} and {key} are one tensor of one module: two adapters in one file?"
            )
        halves[half] = key
    lora = [
        LoraKey(_without_prefix(path), nesting, embedding, owner=owner, **halves)
        for (path, nesting, embedding, owner), halves in pairs.items()
    ]
    return lora, plain


def _parse(key: str) -> PlainKey | tuple[str, int, bool, str, str]:
    """(module path, nesting, embedding, owner, half) of one half of a pair, or the key as a plain one."""
    segments = clean_path(key).split(".")
    for name, reason in _REFUSED_SEGMENTS.items():
        if name in segments:
            return PlainKey(key, (), reason)
    marked = [position for position, segment in enumerate(segments) if segment in _HALVES]
    if not marked:
        path = ".".join(segment for segment in segments if segment != _NESTING)
        return PlainKey(key, _without_prefix(path), "neither a LoRA tensor nor a parameter of this model")
    module, marker, tail = segments[: marked[-1]], segments[marked[-1]], segments[marked[-1] + 1 :]
    if tail[-1:] == ["bias"]:
        return PlainKey(key, (), "a bias of lora_B, which is not served")
    if len(tail) > 2 or (len(tail) == 2 and tail[1] != "weight"):
        return PlainKey(key, (), f"{'.'.join(tail)} after {marker}; expected weight, a name and weight, or nothing")
    nesting = 0
    while module and module[-1] == _NESTING:
        nesting += 1
        module = module[:-1]
    path = ".".join(segment for segment in module if segment != _NESTING)
    around = module[: module.index(_NESTING)] if _NESTING in module else []
    return path, nesting, "embedding" in marker, ".".join(around).removeprefix(_PREFIX), _HALVES[marker]


def _without_prefix(path: str) -> tuple[str, ...]:
    bare = path.removeprefix(_PREFIX)
    return (bare,) if bare == path else (bare, path)
