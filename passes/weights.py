"""Which tensor stands behind a node, and every name it has. Identity is the tensor's memory, never a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fxlora.passes.errors import PeftModelError
from fxlora.passes.graph import attribute, fake_value, op_name, operand

# Reading a weight through these still reads the whole weight, in one of two orientations.
TRANSPOSES = {"t", "T", "mT", "transpose", "permute"}
CASTS = {
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "bfloat16",
    "double",
    "detach",
    "contiguous",
    "clone",
    "alias",
    "data",
    "lift_fresh_copy",
}
# Calls that hand a weight (or a part or another view of it) on to the call that reads it.
PASS_ON = (
    TRANSPOSES
    | CASTS
    | {
        "getitem",
        "index",
        "index_select",
        "select",
        "slice",
        "narrow",
        "chunk",
        "split",
        "view",
        "reshape",
        "expand",
        "unsqueeze",
        "squeeze",
        "unbind",
        "flatten",
        "gather",
    }
)
_GATHERS = {"getitem", "index", "index_select", "gather"}
_PEFT_PARTS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"}


def tensor_key(tensor: torch.Tensor) -> Any:
    """One key per weight: two Parameter objects over the same memory are one weight."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type != "meta" and tensor.numel():
        return (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
    return id(tensor)


class Weights:
    """The weights of one graph: tensor behind each placeholder or get_attr node, all names of each tensor.

    Args:
        gm: The graph module. Its ``get_attr`` nodes name tensors, its parameters name them by path.
        bound: Tensors behind placeholders (graphs that take parameters as inputs).
        models: Modules whose parameter paths are names too (the module the graph was traced from).
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        bound: Mapping[fx.Node, torch.Tensor] | None = None,
        models: Iterable[torch.nn.Module] = (),
    ) -> None:
        self.names: dict[str, torch.Tensor] = {}
        self._paths: dict[Any, list[str]] = {}
        self._behind: dict[fx.Node, torch.Tensor] = dict(bound or {})
        for model in (*models, gm):
            for path, parameter in model.named_parameters(remove_duplicate=False):
                self._add(path, parameter)
            for path, buffer in model.named_buffers(remove_duplicate=False):
                if path.endswith(".weight"):  # what a module computes with, though nothing trains it
                    self._add(path, buffer)
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self.bind(node, gm)
        self.refuse_peft(self.names)

    def _add(self, path: str, tensor: torch.Tensor) -> None:
        if path not in self.names:
            self.names[path] = tensor
            self._paths.setdefault(tensor_key(tensor), []).append(path)

    @staticmethod
    def refuse_peft(names: Iterable[str]) -> None:
        """Raise when parameter names show PEFT's wrappers."""
        wrapped = [path for path in names if _PEFT_PARTS & set(path.split("."))]
        if wrapped:
            raise PeftModelError(
                f"the model already holds PEFT's LoRA layers ({len(wrapped)} parameters such as {wrapped[0]!r}); "
                "expected the bare base model. Save the adapter with `peft_model.save_pretrained(folder)`, take the "
                "wrappers off with `model = peft_model.unload()` (its weights stay as they were), and load the folder "
                "with `lora.load_adapter(name, folder)`."
            )

    def bind(self, node: fx.Node, gm: fx.GraphModule) -> None:
        """Record the tensor behind a ``get_attr`` node."""
        value = attribute(gm, str(node.target))
        if isinstance(value, torch.Tensor):
            self._behind[node] = value

    def tensor_of(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor behind a placeholder or ``get_attr`` node; None for model inputs and computed values."""
        return self._behind.get(node)

    def is_weight(self, node: fx.Node) -> bool:
        """True for nodes that read a named parameter."""
        tensor = self._behind.get(node)
        return tensor is not None and tensor_key(tensor) in self._paths

    def paths_of(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """Every parameter path of a tensor, the model's own first; empty for tensors that are no parameters."""
        return tuple(self._paths.get(tensor_key(tensor), ()))

    def root(self, node: Any) -> tuple[fx.Node | None, list[str]]:
        """The weight node behind an operand, and the ops on the way from the operand down to it.

        Returns ``(None, [])`` where the operand is computed from anything but one weight.
        """
        chain: list[str] = []
        while isinstance(node, fx.Node):
            if self.is_weight(node):
                return node, chain
            if node.op not in ("call_function", "call_method"):
                break
            name = op_name(node)
            if name not in PASS_ON:
                break
            others = [n for n in node.all_input_nodes if n is not operand(node)]
            if name in _GATHERS and any(not isinstance(fake_value(n), torch.SymInt) for n in others):
                break  # a gather reads the weight itself
            chain.append(name)
            node = operand(node)
        return None, []
