"""Reading a PEFT LoRA adapter: a folder, a file that diffusers wrote, or a config and tensors at hand.

Stage: first of an adapter's way, file -> Adapter -> BoundAdapter -> pool. Nothing here knows a model. Weights are read
from safetensors alone, one tensor at a time; a pickle is refused unopened.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from fxlora.adapter_config import AdapterConfig
from fxlora.errors import AdapterDtypeError, AdapterFileError, AdapterFormatError, NonFiniteError, PickledAdapterError
from fxlora.single_file import FILE_NAME, read_layout

_log = logging.getLogger(__name__)

AdapterSource: TypeAlias = "str | os.PathLike[str] | tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]"

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
PICKLE_NAME = "adapter_model.bin"


class AdapterTensors(Mapping[str, torch.Tensor]):
    """Adapter tensors by key, read when asked for and checked on the way: floating point and finite.

    Over safetensors files (Paths) a file is opened at its first read, and all are let go by `close`.
    """

    def __init__(self, source: Sequence[Path] | Mapping[str, torch.Tensor]) -> None:
        self._given = dict(source) if isinstance(source, Mapping) else {}
        self._files: dict[Path, Any] = {}
        self._keys: dict[str, Path | None] = dict.fromkeys(self._given)
        self._stored: Mapping[str, str] = {}
        for path in () if isinstance(source, Mapping) else source:
            own = dict.fromkeys(self._opened(path).keys(), path)
            if twice := sorted(own.keys() & self._keys.keys()):
                raise AdapterFormatError(f"{path} holds {twice}, which another file of the adapter holds too")
            self._keys |= own

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor, where it is stored. Raises KeyError, AdapterError or one of its kind, naming the key."""
        path = self._keys[key]
        tensor = (
            self._given[key].detach() if path is None else self._opened(path).get_tensor(self._stored.get(key, key))
        )
        if not tensor.is_floating_point():
            raise AdapterDtypeError(f"adapter tensor {key} is {tensor.dtype}; expected a floating-point dtype")
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "on the meta device, without values" if tensor.is_meta else f"stored as {tensor.layout}"
            raise AdapterFormatError(f"adapter tensor {key} is {kind}; expected a dense tensor with its values")
        if bad := count_nonfinite(tensor):
            raise NonFiniteError(f"adapter tensor {key} holds {bad} NaN or infinite values among {tensor.numel()}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def file_of(self, key: str) -> str | None:
        """The name of the file that holds a tensor, if one does."""
        path = self._keys.get(key)
        return None if path is None else path.name

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it where it is in a file."""
        path = self._keys[key]
        return tuple(self._given[key].shape if path is None else self._opened(path).get_slice(key).get_shape())

    def number(self, key: str) -> float:
        """The one value of a tensor. Raises AdapterFormatError where there are more or none."""
        tensor = self[key]
        if tensor.numel() != 1:
            raise AdapterFormatError(f"adapter tensor {key} has the shape {tuple(tensor.shape)}; expected one number")
        return float(tensor)

    def header(self) -> dict[str, str]:
        """What the files say beside their tensors."""
        paths = dict.fromkeys(path for path in self._keys.values() if path is not None)
        return {key: value for path in paths for key, value in (self._opened(path).metadata() or {}).items()}

    def name_as(self, names: Mapping[str, str]) -> None:
        """Goes by other names from here on, each with the key of the tensor in its file; leaves out the rest."""
        self._keys = {name: self._keys[key] for name, key in names.items()}
        self._stored = dict(names)

    def close(self) -> None:
        """Lets the files go; a later read opens them again. A tensor read before stays valid (it may map its file)."""
        self._files.clear()

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise AdapterFormatError(f"{path} is not a readable safetensors file: {error}") from error
        return self._files[path]


@dataclass(frozen=True)
class Adapter:
    """One adapter as read: what it is called in messages (`origin`), its config, and its tensors by key."""

    origin: str
    config: AdapterConfig
    tensors: AdapterTensors

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.tensors.close()


def read_adapter(source: AdapterSource) -> Adapter:
    """Reads a PEFT folder, its weights in adapter_model.safetensors or in shards, or a pair (config, tensors by key).

    Or a safetensors file by itself, as diffusers writes it, or a folder with one (see `single_file.py`).

    Config and tensor names are checked here, values when a tensor is read. In a `with` the file is let go at the end.
    Raises AdapterFileError, PickledAdapterError, AdapterFormatError, AdapterConfigError, NonFiniteError, RankError or
    UnsupportedAdapterError.
    """
    if isinstance(source, tuple):
        origin, raw, tensors = "(config, tensors)", *_from_pair(source)
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        alone = path if path.is_file() else path / FILE_NAME
        is_alone = alone.is_file() and not (alone.parent / CONFIG_NAME).is_file()
        origin, raw, tensors = str(path), *(_from_file(alone) if is_alone else _from_folder(path))
    else:
        raise AdapterFormatError(
            f"an adapter is a folder, a file or a pair (config, tensors), not {type(source).__name__}"
        )
    config = AdapterConfig.from_mapping(raw)
    if not tensors:
        raise AdapterFormatError(f"adapter {origin} holds no tensors")
    _log.debug("read adapter %s: %d tensors, rank %d", origin, len(tensors), config.r)
    return Adapter(origin, config, tensors)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """How many values are NaN or infinite; one synchronisation for a tensor on a device."""
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return int(values.numel() - torch.isfinite(values).sum())


def _from_pair(pair: tuple[Any, ...]) -> tuple[Mapping[str, Any], AdapterTensors]:
    if len(pair) != 2 or not all(isinstance(part, Mapping) for part in pair):
        found = ", ".join(type(part).__name__ for part in pair)
        raise AdapterFormatError(f"expected a pair of mappings (config, tensors by key), found ({found})")
    config, tensors = pair
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterFormatError(f"tensors maps {key!r} to {type(tensor).__name__}; expected names and tensors")
    return config, AdapterTensors(tensors)


def _from_file(path: Path) -> tuple[Mapping[str, Any], AdapterTensors]:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise PickledAdapterError(f"{path} is a pickle, which is not opened; save it again as safetensors")
    tensors = AdapterTensors([path])
    config, names = read_layout(str(path), tensors, tensors.header())
    tensors.name_as(names)
    return config, tensors


def _from_folder(folder: Path) -> tuple[Mapping[str, Any], AdapterTensors]:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise AdapterFileError(
            f"adapter folder {folder} {found}; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    files = sorted(entry.name for entry in folder.iterdir())
    if CONFIG_NAME not in files:
        nested = [name for name in files if (folder / name / CONFIG_NAME).is_file()]
        hint = f"; its folders {nested} have one" if nested else ""
        raise AdapterFileError(f"{folder} has no {CONFIG_NAME}{hint}; found {files}")
    if WEIGHTS_NAME not in files and INDEX_NAME in files:
        return _read_json(folder / CONFIG_NAME), _from_index(folder / INDEX_NAME)
    if WEIGHTS_NAME not in files:
        if PICKLE_NAME in files:
            raise PickledAdapterError(
                f"{folder} holds its weights as {PICKLE_NAME} only, a pickle, which is not opened; "
                f"save it again with safe_serialization=True to get {WEIGHTS_NAME}"
            )
        raise AdapterFileError(f"{folder} has no {WEIGHTS_NAME}; found {files}")
    return _read_json(folder / CONFIG_NAME), AdapterTensors([folder / WEIGHTS_NAME])


def _from_index(index: Path) -> AdapterTensors:
    """Tensors in several files of one folder: all that the index names, each in the file it names."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise AdapterFormatError(f"{index} has no weight_map of tensor names and files")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise AdapterFormatError(f"{index} names files that are not beside it: {outside}")
    tensors = AdapterTensors([index.parent / name for name in names])
    wrong = [key for key, name in listed.items() if tensors.file_of(key) != name]
    unlisted = [key for key in tensors if key not in listed]
    if wrong or unlisted:
        raise AdapterFormatError(f"{index} and its files differ: not where it says {wrong}, not listed {unlisted}")
    return tensors


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterFormatError(f"{path} holds a JSON {type(raw).__name__}; expected an object")
    return raw
