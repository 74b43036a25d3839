"""fxlora: LoRA as a compiler pass. Serve many adapters in one batch of one graph."""

from __future__ import annotations

from fxlora.apply import apply
from fxlora.attach import attach, runtime
from fxlora.capture import capture
from fxlora.compile import compile
from fxlora.continuous import continuous_batching
from fxlora.dumps import dump, load_graph, to_networkx
from fxlora.errors import FxloraError
from fxlora.module import LoraModule
from fxlora.runtime import Runtime

__version__ = "0.1.0"
__all__ = [
    "FxloraError",
    "LoraModule",
    "Runtime",
    "apply",
    "attach",
    "capture",
    "compile",
    "continuous_batching",
    "dump",
    "load_graph",
    "runtime",
    "to_networkx",
]
