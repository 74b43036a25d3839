"""Words through which the programs of one launch meet, zero at first.

Stage: run time. Outside a CUDA-graph capture one block of words serves one kernel and grid on one stream, whose
launches run one after another. Each call that is captured gets words of its own, for good: graphs captured on one
stream may be replayed side by side.
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
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _private(words, device)
    return _grown((device, stream), words, device)


def _grown(key: Hashable, words: int, device: torch.device) -> torch.Tensor:
    found = _of_stream.get(key)
    if found is None or found.numel() < words:
        found = _of_stream[key] = torch.zeros(max(words, 4096), dtype=torch.int32, device=device)
    return found


def _private(words: int, device: torch.device) -> torch.Tensor:
    """A piece that no other call ever gets. A new block is cleared on a stream of its own: nothing of it is captured."""
    words = -(-words // 4) * 4
    with _lock:
        block, used = _free.get(device.index, (None, 0))
        if block is None or used + words > block.numel():
            side = torch.cuda.Stream(device)
            with torch.cuda.stream(side):
                block = torch.zeros(max(words, _BLOCK_WORDS), dtype=torch.int32, device=device)
            _kept.append(block)
            used = 0
        _free[device.index] = (block, used + words)
    return block[used : used + words]
