"""The config of a PEFT LoRA adapter, checked key by key.

Stage: first of an adapter's way, beside `adapter.py`, which reads the file. Every key is known to be read here, to be
inert, or to be refused: a key that could change the arithmetic is never ignored.

Format: `LoraConfig` of peft (src/peft/tuners/lora/config.py), as `save_pretrained` writes it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fxlora.errors import AdapterConfigError, NonFiniteError, RankError, UnsupportedAdapterError

READ_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "fan_in_fan_out",
        "base_model_name_or_path",
        "peft_version",
        "init_lora_weights",
    }
)
"""Keys whose value is used here."""

INERT_KEYS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "revision",
        "inference_mode",
        "runtime_config",
        "lora_dropout",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "ensure_weight_tying",
        "merge_weights",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    }
)
"""Keys that leave the answer of a saved adapter alone: where to put layers (absent tensors say so themselves), how to
train, how to initialise (`init_lora_weights` says whether that touched the base), sizes of features that are off."""

REFUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA rescales the sum of base and adapter by a magnitude vector",
        "lora_bias": "lora_B carries a bias",
        "bias": "the adapter carries trained biases of the base model",
        "modules_to_save": "whole modules were trained and saved beside the LoRA",
        "trainable_token_indices": "rows of the embedding were trained outside the LoRA",
        "layer_replication": "the model the adapter was trained on has repeated layers",
        "alora_invocation_tokens": "activated LoRA starts at its invocation tokens, not at the first token",
        "use_qalora": "QA-LoRA pools the input features before lora_A",
        "use_bdlora": "BD-LoRA stores block-diagonal factors",
        "arrow_config": "Arrow routes each token among several adapters",
        "kasa_config": "KaSA truncates the base weight and puts a diagonal between A and B",
        "monteclora_config": "MonteCLoRA adds sampled terms to the weights",
        "velora_config": "VeLoRA saves compressed activations beside A and B",
        "megatron_config": "the adapter was trained on Megatron's parallel linears",
        "enable_lora": "merged linears with some outputs left out (peft before 0.3)",
    }
)
"""Keys that change the arithmetic in a way fxlora does not serve, with the reason. `none` and empty values are off."""

_PLAIN_INITS = frozenset(("gaussian", "orthogonal", "eva", "mica"))
_BASE_CHANGING_INITS = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that decides an answer; what is not here is inert or was refused.

    r, lora_alpha: the defaults; rank_pattern, alpha_pattern: per module, in file order. target_parameters: parameters
    (not modules) that were wrapped, as `module.parameter` suffixes. fan_in_fan_out describes the base layer only.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None
    peft_version: str | None = None

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Checks every key of a config as PEFT writes it.

        Raises UnsupportedAdapterError for a feature fxlora does not serve or a key it does not know, AdapterConfigError
        for a missing or mistyped value, RankError for a rank that is not positive.
        """
        _refuse_unsupported(raw)
        read = _ConfigReader(raw)
        return cls(
            r=_positive_rank("r", read.required("r", int)),
            lora_alpha=_finite("lora_alpha", read.required("lora_alpha", float)),
            use_rslora=read.optional("use_rslora", bool, False),
            rank_pattern=read.pattern("rank_pattern", int, _positive_rank),
            alpha_pattern=read.pattern("alpha_pattern", float, _finite),
            target_modules=read.names("target_modules"),
            target_parameters=read.name_list("target_parameters"),
            fan_in_fan_out=read.optional("fan_in_fan_out", bool, False),
            base_model_name_or_path=read.optional("base_model_name_or_path", str, None),
            peft_version=read.optional("peft_version", str, None),
        )

    def rank_of(self, path: str) -> int:
        """Rank at a module path (`module.parameter` for a wrapped parameter), by PEFT's pattern rules."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, path), self.r)

    def scaling_of(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, at a path."""
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, path), self.lora_alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def pattern_key(patterns: Collection[str], path: str) -> str:
    """The first pattern that matches the end of `path` at a dot, else `path` itself.

    The rule of `get_pattern_key` (peft/utils/other.py): patterns are regular expressions and their order decides.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).match(path)), path)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    peft_type = raw.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedAdapterError(f"peft_type is {_plain(peft_type)}; fxlora serves LORA adapters only")
    refused = [f"{key} = {raw[key]!r}: {why}" for key, why in REFUSED_KEYS.items() if _is_on(raw.get(key))]
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        refused.append(f"init_lora_weights = {init!r}: {_init_reason(init)}")
    unknown = [key for key in raw if key not in READ_KEYS | INERT_KEYS | REFUSED_KEYS.keys() and _is_on(raw[key])]
    refused += [f"{key} = {raw[key]!r}: fxlora does not know this key, so it may change the answer" for key in unknown]
    if refused:
        raise UnsupportedAdapterError("adapter config asks for what fxlora does not serve: " + "; ".join(refused))


def _init_reason(init: str) -> str:
    if _BASE_CHANGING_INITS.fullmatch(init.lower()):
        return (
            "this initialisation changed the base weights, which the file does not hold; save the adapter with "
            "path_initial_model_for_weight_conversion, or set the key to true if this model is the changed base"
        )
    return f"unknown initialisation; those known to leave the base weights alone are {sorted(_PLAIN_INITS)}"


def _is_on(value: object) -> bool:
    if isinstance(value, str | list | tuple | dict | set):
        return bool(value) and value != "none"
    return value is not None and value is not False


def _plain(value: object) -> object:
    return getattr(value, "value", value)


class _ConfigReader:
    """Typed look-ups in a config mapping; a wrong type raises AdapterConfigError with the key and the value."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def required(self, key: str, kind: type) -> Any:
        if self._raw.get(key) is None:
            raise AdapterConfigError(f"adapter config has no {key}; it has {sorted(map(str, self._raw))}")
        return _typed(key, self._raw[key], kind)

    def optional(self, key: str, kind: type, default: Any) -> Any:
        value = self._raw.get(key)
        return default if value is None else _typed(key, value, kind)

    def name_list(self, key: str) -> tuple[str, ...]:
        value = self._raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple | set | frozenset):
            raise AdapterConfigError(f"adapter config {key} is {value!r}; expected a list of names")
        names = tuple(_typed(key, name, str) for name in value)
        return tuple(sorted(names)) if isinstance(value, set | frozenset) else names

    def names(self, key: str) -> tuple[str, ...] | str | None:
        value = self._raw.get(key)
        return value if value is None or isinstance(value, str) else self.name_list(key)

    def pattern(self, key: str, kind: type, check: Callable[[str, Any], Any]) -> Mapping[str, Any]:
        checked: dict[str, Any] = {}
        for pattern, value in self.optional(key, Mapping, {}).items():
            name = f"{key}[{pattern!r}]"
            try:
                _compiled(_typed(name, pattern, str))
            except re.error as error:
                raise AdapterConfigError(f"adapter config {name} is not a regular expression: {error}") from error
            checked[pattern] = check(name, _typed(name, value, kind))
        return MappingProxyType(checked)


def _typed(key: str, value: Any, kind: type) -> Any:
    """`value` if it is a `kind` (a float may be given as an int, nothing else is converted)."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise AdapterConfigError(f"adapter config {key} is {value!r}; expected {kind.__name__}")
    return value


def _positive_rank(key: str, rank: int) -> int:
    if rank <= 0:
        raise RankError(f"adapter config {key} is {rank}; a rank is at least 1")
    return rank


def _finite(key: str, value: float) -> float:
    if not abs(value) <= sys.float_info.max:
        raise NonFiniteError(f"adapter config {key} is {value}; expected a finite number")
    return float(value)
