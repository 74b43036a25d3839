"""Words through which the programs of one launch meet, zero at first.

Stage: run time. Outside a CUDA-graph capture one block of words serves a stream, whose launches run one after another.
Each call that is captured gets words of its own, for good: graphs captured on one stream may be replayed side by side.
Everything else an op needs beside its outputs is plain `torch.empty`, which streams and captures keep apart already.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch

_BLOCK_WORDS = 1 << 20

_lock = threading.Lock()
_of_stream: dict[Hashable, torch.Tensor] = {}
_free: dict[int, tuple[torch.Tensor, int]] = {}
_kept: list[torch.Tensor] = []


def counters(words: int, device: torch.device, stream: int) -> torch.Tensor:
    """At least `words` int32 that are zero, and that every launch has to leave at zero.

    stream: the raw handle of the current stream; ignored on CPU (interpreted kernels).
    """
    if device.type != "cuda":
        return _of_stream_grown(("cpu", 0), words, device)
    if torch.cuda.is_current_stream_capturing():
        return _private(words, device)
    prepare(device)
    return _of_stream_grown((device, stream), words, device)


def prepare(device: torch.device) -> None:
    """Sees to it that calls captured from now on find words: they cannot make any while capturing."""
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    block, used = _free.get(index, (None, 0))
    if (block is None or 2 * used > block.numel()) and not torch.cuda.is_current_stream_capturing():
        _new_block(index)


def _of_stream_grown(key: Hashable, words: int, device: torch.device) -> torch.Tensor:
    found = _of_stream.get(key)
    if found is None or found.numel() < words:
        found = _of_stream[key] = torch.zeros(max(words, 4096), dtype=torch.int32, device=device)
    return found


def _private(words: int, device: torch.device) -> torch.Tensor:
    """A piece that no other call ever gets."""
    words = -(-words // 4) * 4
    with _lock:
        block, used = _free.get(device.index, (None, 0))
        if block is None or used + words > block.numel():
            raise RuntimeError(
                f"a captured call needs {words} counters, {0 if block is None else block.numel() - used} are left: "
                "call the op once outside of the capture, which makes new ones"
            )
        _free[device.index] = (block, used + words)
    return block[used : used + words]


def _new_block(index: int) -> None:
    block = torch.zeros(_BLOCK_WORDS, dtype=torch.int32, device=torch.device("cuda", index))
    torch.cuda.current_stream(index).synchronize()  # captured calls may be replayed on any stream
    with _lock:
        _kept.append(block)
        _free[index] = (block, 0)
