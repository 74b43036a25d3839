"""A safetensors file by itself, as image and video pipelines of diffusers save LoRA: what it says beside its tensors.

Stage: first of an adapter's way, beside `adapter.py`, which opens the file. There is no adapter_config.json: alpha is
in the header (`lora_adapter_metadata`, PEFT's config under the component's name), or in an `.alpha` beside each pair,
or, in a pipeline's file with neither, the rank. Files of other trainers are refused by their form.

Format: `save_lora_weights` of diffusers (src/diffusers/loaders/lora_base.py), `get_peft_kwargs` (utils/peft_utils.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxlora.errors import AdapterConfigError, AdapterFileError, AdapterFormatError, UnsupportedAdapterError

if TYPE_CHECKING:
    from fxlora.adapter import AdapterTensors

FILE_NAME = "pytorch_lora_weights.safetensors"

_PEFT = "base_model.model."
_METADATA = "lora_adapter_metadata"
_ALPHA = ".alpha"
_B = ".lora_B.weight"
_COMPONENTS = re.compile(r"(unet|transformer|text_encoder)(_\d+)?\Z")
_CONVERT = "load it into its pipeline with diffusers (`load_lora_weights`) and save it with `save_lora_weights`"
_FOREIGN = (
    (r"lora_\w+\.(lora_(down|up|mid)\.weight|alpha|dora_scale)", "kohya-ss, with underscores for dots in its names"),
    (r".*lora\w*\.(down|up)\.weight", "matrices called down and up, as diffusers and XLabs once saved"),
    (r".*\.lora_(down|up)\.weight", "matrices called lora_down and lora_up"),
    (r".*\.(hada_\w+|lokr_\w+|oft_\w+|diff|diff_b)", "LyCORIS, without A and B"),
)


def read_layout(
    origin: str, tensors: AdapterTensors, metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config of a file by itself, and its tensors: the key within the model -> the key in the file.

    Raises UnsupportedAdapterError for another trainer's form or several components, AdapterFormatError for alphas that
    do not belong to the pairs, AdapterConfigError where the rules of the format leave a scaling open.
    """
    _refuse_foreign(origin, list(tensors))
    component = _only_component(origin, list(tensors))
    names = {key.removeprefix(component): key for key in tensors}
    alphas = {name.removesuffix(_ALPHA): key for name, key in names.items() if name.endswith(_ALPHA)}
    names = {name: key for name, key in names.items() if not name.endswith(_ALPHA)}
    if _METADATA in metadata:
        if alphas:
            raise AdapterFormatError(f"{origin} says alpha twice: in its header, and as {sorted(alphas.values())[:3]}")
        return _from_header(origin, metadata[_METADATA], component), names
    ranks = {name.removesuffix(_B): int(tensors.shape(key)[1]) for name, key in names.items() if name.endswith(_B)}
    if not ranks:
        raise AdapterFormatError(f"{origin} has no pair X.lora_A.weight and X{_B}; it holds {list(tensors)[:5]}")
    given = {path: tensors.number(key) for path, key in alphas.items()}
    if not given and not component:
        raise AdapterConfigError(
            f"{origin} says alpha nowhere, and no pipeline's component before its names implies it"
        )
    return _from_tensors(origin, ranks, given), names


def _refuse_foreign(origin: str, keys: Sequence[str]) -> None:
    if any(key.startswith(_PEFT) for key in keys):
        raise AdapterFileError(
            f"{origin} holds PEFT's tensors ({next(iter(keys))!r}) and has no adapter_config.json beside it, which "
            f"says alpha: give the folder with both"
        )
    for key in keys:
        if ".lora_A." in key or ".lora_B." in key:
            continue
        form = next((words for pattern, words in _FOREIGN if re.fullmatch(pattern, key)), None)
        if form is not None:
            raise UnsupportedAdapterError(
                f"{origin} is in another form than X.lora_A.weight and X.lora_B.weight ({form}; {key!r} among "
                f"{len(keys)} tensors), which does not say for sure which weights it means: {_CONVERT}"
            )


def _only_component(origin: str, keys: Sequence[str]) -> str:
    """What stands before the paths within the model, with its dot: the pipeline's component, or nothing."""
    firsts = Counter(key.partition(".")[0] for key in keys)
    found = {first: count for first, count in firsts.items() if _COMPONENTS.match(first)}
    rest = len(keys) - sum(found.values())
    if not found:
        return ""
    if len(found) > 1 or rest:
        held = ", ".join(f"{name} ({count})" for name, count in found.items()) + (f", others ({rest})" if rest else "")
        raise UnsupportedAdapterError(
            f"{origin} holds tensors of several models, {held}, and a graph serves one: give those of one as "
            f"(config, tensors), without the name of the model before their paths"
        )
    return f"{next(iter(found))}."


def _from_header(origin: str, text: str, component: str) -> dict[str, Any]:
    """PEFT's config out of the file's header."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{origin}: {_METADATA} in its header is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise AdapterFormatError(f"{origin}: {_METADATA} in its header is a JSON {type(given).__name__}, not an object")
    own = {key.removeprefix(component): value for key, value in given.items() if key.startswith(component)}
    if "r" not in own:
        raise AdapterConfigError(
            f"{origin}: {_METADATA} in its header has no {component}r; it has {sorted(map(str, given))[:10]}"
        )
    return own


def _from_tensors(origin: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The config that ranks, and alphas if the file has them, amount to; by whole paths, as `^` allows no other."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
    config["rank_pattern"] = {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank}
    if not alphas:
        if config["rank_pattern"]:
            raise AdapterConfigError(
                f"{origin} has ranks {sorted(set(ranks.values()))} and says alpha neither in its header nor beside its "
                f"tensors; what that means has changed between versions of diffusers: give (config, tensors)"
            )
        return config
    if odd := sorted(ranks.keys() ^ alphas.keys()):
        raise AdapterFormatError(f"{origin} has alphas for some pairs only, or for none: {odd[:5]}, {len(odd)} in all")
    config["alpha_pattern"] = {f"^{re.escape(path)}": alpha for path, alpha in alphas.items()}
    return config
