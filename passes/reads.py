"""How a call reads a weight: every spelling of a linear or an embedding seen as one form.

``F.linear``, ``x @ w.T``, matmul, mm, addmm, Conv1D's ``addmm(b, x, w)``, einsum and ``w @ x`` are all a linear;
``F.embedding``,
``w[ids]`` and index_select are all an embedding. What reads a weight in another way is refused with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxlora.passes.expert_reads import gathered_root, read_product
from fxlora.passes.experts import ExpertProduct
from fxlora.passes.graph import argument, invoke, op_name, operand
from fxlora.passes.rows.worlds import TensorFacts, World
from fxlora.passes.weights import CASTS, PASS_ON, Weights

_INDEXED = {"getitem", "index", "index_select"}
_NO_READ = {
    "size",
    "shape",
    "dtype",
    "device",
    "dim",
    "ndim",
    "numel",
    "is_floating_point",
    "requires_grad",
    "sym_size",
    "element_size",
    "new_zeros",
    "new_empty",
    "new_ones",
    "new_full",
    "zeros_like",
    "empty_like",
    "ones_like",
    "_assert_tensor_metadata",
}


_RANKINGS = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min"}
_MAX_ROUTING = 100


def _is_float(facts: TensorFacts) -> bool:
    return facts.dtype.is_floating_point


@dataclass(frozen=True)
class Read:
    """One call that reads a whole weight as a linear, an embedding or experts.

    Attributes:
        kind: ``linear``, ``embedding`` or ``experts``.
        root: The node of the weight itself.
        operand: The weight operand of the call (behind casts and transposes of the root).
        operand_is_KN: True when that operand is [K, N] (a linear wants [N, K]).
        stored_KN: True when the weight itself is stored [K, N] ([E, K, N]).
        x: The activation [..., K], or the ids.
        bias: [N], or None.
        addend: Anything else an addmm adds to the product.
        x_order: Dim order that moves K of ``x`` last; None where it is.
        out_order: Dim order from [..., N] to the call's own result; None where they are equal.
        product: How an expert call combines x with the experts' weights.
        experts: E, 0 for other kinds.
    """

    kind: str
    root: fx.Node
    operand: fx.Node
    operand_is_KN: bool
    stored_KN: bool
    x: fx.Node
    bias: fx.Node | None = None
    addend: fx.Node | None = None
    x_order: tuple[int, ...] | None = None
    out_order: tuple[int, ...] | None = None
    product: ExpertProduct | None = None
    experts: int = 0


@dataclass(frozen=True)
class Orientation:
    """An operand that is a whole weight: leading broadcast dims, and whether it is the weight's transpose."""

    lead: int
    transposed: bool


@dataclass(frozen=True)
class Refusal:
    """A call that reads a weight in a way no site can serve."""

    root: fx.Node
    reason: str


class Reader:
    """Recognises reads of the weights of a graph; shapes and sizes are those of one world."""

    def __init__(self, weights: Weights, world: World) -> None:
        self.weights, self.world = weights, world

    def ndim(self, node: fx.Node) -> int:
        """Dims of a tensor node."""
        return len(self.world.shape(node))

    def is_tensor(self, value: Any) -> bool:
        """True for a node that makes a tensor."""
        return isinstance(value, fx.Node) and isinstance(self.world.facts(value), TensorFacts)

    def take_place(self, new: fx.Node, old: fx.Node) -> None:
        """A rewritten call has the shape of the call it replaces."""
        self.world.values[new] = self.world.facts(old)

    def reads(self, node: fx.Node) -> list[Read | Refusal]:
        """All reads of weights by one call. Ops that only hand a weight on (transposes, casts, slices) read nothing
        themselves.
        """
        name = op_name(node)
        if not node.op.startswith("call") or name in _NO_READ:
            return []
        found = []
        for other in node.all_input_nodes:
            root, chain = self.weights.root(other)
            if root is None and name not in PASS_ON and (root := gathered_root(self.weights, other)) is not None:
                found.append(self._experts(node, name, other, root))
                continue
            if root is None or self._dim(root) < 2:
                continue
            read = self._read(node, name, other, root, chain)
            if read is not None:
                found.append(read)
        return found

    def read_as(self, node: fx.Node, kind: str) -> Read:
        """The read of one kind by a call that is known to have one."""
        return next(read for read in self.reads(node) if isinstance(read, Read) and read.kind == kind)

    def _dim(self, root: fx.Node) -> int:
        tensor = self.weights.tensor_of(root)
        return tensor.dim() if tensor is not None else 0

    def _read(self, node: fx.Node, name: str, other: fx.Node, root: fx.Node, chain: list[str]) -> Read | Refusal | None:
        if name in _INDEXED and other is operand(node) and self._gathers(node):
            if self._dim(root) == 3:
                return None  # what is picked here, the call that reads it tells
            if self._dim(root) == 2 and self._orientation(other, root) == Orientation(0, False):
                return self._lookup(node, root, other)
            return Refusal(root, "a gather of a transposed or sliced weight")
        if name in PASS_ON and other is operand(node):
            return None
        if node.kwargs.get("out") is not None:
            return Refusal(root, f"{name} puts its result into a tensor that it is given (out=)")
        if self._dim(root) == 3:
            return self._experts(node, name, other, root)
        if self._dim(root) != 2:
            return Refusal(root, f"a {self._dim(root)}-D weight, read by {name.lstrip('?')}")
        seen = self._orientation(other, root)
        if seen is None:
            return Refusal(root, f"{name.lstrip('?')} reads a part or a reshape of the weight ({' of '.join(chain)})")
        if name == "embedding":
            return self._embedding(node, root, other, seen)
        return self._linear(node, name, root, other, seen)

    def _experts(self, node: fx.Node, name: str, other: fx.Node, root: fx.Node) -> Read | Refusal:
        found = read_product(self, node, name, other)
        if isinstance(found, str):
            return Refusal(root, found)
        product, stored_KN, x, addend = found
        tensor = self.weights.tensor_of(root)
        assert tensor is not None
        return Read(
            "experts", root, other, False, stored_KN, x, addend=addend, product=product, experts=tensor.shape[0]
        )  # fmt: skip

    def gather_index(self, node: fx.Node) -> fx.Node | None:
        """The integer tensor that a call indexes one dim of its operand by, every other dim being taken whole."""
        if op_name(node) == "index_select":
            return argument(node, 2, "index")
        keys = self._keys(node, argument(node, 1, "indices"))
        left_out = None if op_name(node) == "index" else Ellipsis
        whole = all(key is left_out or key == slice(None) for key in keys[1:])
        return keys[0] if self._is_index(keys[0]) and whole else None

    def gathers(self, node: fx.Node) -> bool:
        """True for a call that picks elements of its operand by a tensor."""
        return op_name(node) in _INDEXED and self._gathers(node)

    def _gathers(self, node: fx.Node) -> bool:
        key = argument(node, 2, "index") if op_name(node) == "index_select" else argument(node, 1, "indices")
        return any(self.is_tensor(k) for k in self._keys(node, key))

    @staticmethod
    def _keys(node: fx.Node, key: Any) -> list[Any]:
        """The index of each dim: a tuple (or aten's list) holds several, anything else is one."""
        return list(key) if isinstance(key, tuple) or (isinstance(key, list) and op_name(node) == "index") else [key]

    def _is_index(self, value: Any) -> bool:
        if not self.is_tensor(value):
            return False
        dtype = self.world.facts(value).dtype
        return dtype not in (torch.bool, torch.uint8) and not dtype.is_floating_point

    def _lookup(self, node: fx.Node, root: fx.Node, other: fx.Node) -> Read | Refusal:
        """``w[ids]``: an embedding when one integer tensor indexes the first dim."""
        if op_name(node) == "index_select":
            dim, key = argument(node, 1, "dim"), argument(node, 2, "index")
            keys = [key] if dim in (0, -2) else [None, key]
        else:
            key = argument(node, 1, "indices")
            keys = self._keys(node, key)
        if not self._is_index(keys[0]) or any(k is not None and k != slice(None) for k in keys[1:]):
            return Refusal(root, f"{op_name(node)} reads a part of the weight")
        if self._is_routed(keys[0]):
            return Refusal(root, "a table of which routing picks rows (a bias for each expert), no embedding")
        return Read("embedding", root, other, False, False, keys[0])

    def _is_routed(self, ids: fx.Node) -> bool:
        """True for an index that ranks what the model computed, as a router does."""
        stack, seen = [ids], {ids}
        while stack and len(seen) < _MAX_ROUTING:
            node = stack.pop()
            ranks = op_name(node) in _RANKINGS and self.is_tensor(operand(node))
            if ranks and self.world.facts(operand(node)).dtype.is_floating_point:
                return True
            for other in node.all_input_nodes:
                facts = self.world.facts(other)
                whole = isinstance(facts, tuple) or (isinstance(facts, TensorFacts) and not _is_float(facts))
                if other not in seen and whole:
                    seen.add(other)
                    stack.append(other)
        return False

    def _embedding(self, node: fx.Node, root: fx.Node, other: fx.Node, seen: Orientation) -> Read | Refusal:
        first, second = operand(node), argument(node, 1, "weight", "indices")
        ids = second if first is other else first
        if node.target is torch.nn.functional.embedding and argument(node, 3, "max_norm") is not None:
            return Refusal(root, "an embedding with max_norm rewrites its weight at every call")
        if seen != Orientation(0, False):
            return Refusal(root, "an embedding over a transposed or sliced weight")
        return Read("embedding", root, other, False, False, ids)

    def _orientation(self, other: fx.Node, root: fx.Node) -> Orientation | None:
        """How the operand sees the (2-D) weight, told by running its views on a stand-in; None for a part or a
        reshape of it.
        """
        tensor = self.weights.tensor_of(root)
        assert tensor is not None
        path = []
        node: Any = other
        while node is not root:
            path.append(node)
            node = operand(node)
        view = stand_in = torch.empty_strided(tuple(tensor.shape), (2 * tensor.shape[1] + 3, 1), device="meta")
        for node in reversed(path):
            if op_name(node) not in CASTS:
                view = self.viewed(node, view)
        if not isinstance(view, torch.Tensor) or view.untyped_storage()._cdata != stand_in.untyped_storage()._cdata:
            return None
        lead = view.dim() - 2
        if lead < 0 or view.storage_offset() or any(view.shape[d] != 1 and view.stride(d) != 0 for d in range(lead)):
            return None
        shape, strides = tuple(view.shape[lead:]), view.stride()[lead:]
        own_shape, own_strides = tuple(stand_in.shape), stand_in.stride()
        if shape == own_shape and all(a == b for a, b, n in zip(strides, own_strides, shape, strict=True) if n > 1):
            return Orientation(lead, False)
        if shape == own_shape[::-1] and all(
            a == b for a, b, n in zip(strides, own_strides[::-1], shape, strict=True) if n > 1
        ):
            return Orientation(lead, True)
        return None

    def _number(self, node: fx.Node) -> Any:
        facts = self.world.facts(node)
        if not isinstance(facts, int):
            raise ValueError(f"a view by the tensor {node.name}")
        return facts

    def viewed(self, node: fx.Node, view: Any) -> Any:
        """A view-making call run on a stand-in for its operand; None where it does not run."""
        try:
            args = fx.map_arg(node.args[1:], self._number)
            kwargs = fx.map_arg(dict(node.kwargs), self._number)
            return invoke(node, (view, *args), kwargs)
        except Exception:
            return None

    def _linear(self, node: fx.Node, name: str, root: fx.Node, other: fx.Node, seen: Orientation) -> Read | Refusal:
        swapped = seen.transposed
        if name == "linear":
            if argument(node, 1, "weight") is not other or operand(node) is other:
                return Refusal(root, "linear over a weight as its input")
            return Read("linear", root, other, False, swapped, operand(node), argument(node, 2, "bias"))
        if name in ("mm", "matmul", "bmm"):
            if seen.lead and (name != "bmm" or argument(node, 1, "mat2") is not other):
                return Refusal(root, f"{name} of a weight with leading dims")
            return self._product(
                node, name, root, other, operand(node), argument(node, 1, "other", "mat2", "tensor"), swapped
            )
        if name == "addmm":
            if argument(node, 3, "beta", default=1) != 1 or argument(node, 4, "alpha", default=1) != 1:
                return Refusal(root, "addmm with alpha or beta")
            read = self._product(node, name, root, other, argument(node, 1, "mat1"), argument(node, 2, "mat2"), swapped)
            added = operand(node)
            if isinstance(read, Refusal):
                return read
            plain = read.out_order is None and self.ndim(added) == 1
            return replace(read, bias=added if plain else None, addend=None if plain else added)
        if name == "einsum" and not seen.lead:
            return self._einsum(node, root, other, swapped)
        return Refusal(root, f"read by {name.lstrip('?')}, which is no linear")

    def _product(
        self, node: fx.Node, name: str, root: fx.Node, other: fx.Node, left: fx.Node, right: fx.Node, swapped: bool
    ) -> Read | Refusal:
        if left is other and right is other:
            return Refusal(root, f"{name} of the weight with itself")
        if right is other:
            return Read("linear", root, other, True, not swapped, left)
        if left is not other or self.ndim(right) < 2:
            return Refusal(root, f"{name} of a weight with a vector")
        order = list(range(self.ndim(right)))
        order[-2:] = order[:-3:-1]
        return Read("linear", root, other, False, swapped, right, x_order=tuple(order), out_order=tuple(order))

    def _einsum(self, node: fx.Node, root: fx.Node, other: fx.Node, swapped: bool) -> Read | Refusal:
        from fxlora.passes.rows.contractions import parse_einsum

        parsed = parse_einsum(self, node)  # type: ignore[arg-type]
        if parsed is None or len(parsed[2]) != 2:
            return Refusal(root, "einsum of other than one weight and one activation")
        terms, result, operands = parsed
        at = 0 if operands[0] is other else 1
        weight, x_term, x = terms[at], terms[1 - at], operands[1 - at]
        if x is other or len(set(x_term)) != len(x_term) or len(set(weight)) != 2:
            return Refusal(root, "einsum of the weight with itself or over a diagonal")
        summed = [c for c in weight if c in x_term and c not in result]
        made = [c for c in weight if c in result and c not in x_term]
        if len(summed) != 1 or len(made) != 1 or any(c not in result for c in x_term if c != summed[0]):
            return Refusal(root, "einsum that is no linear over the weight")
        lead = [c for c in x_term if c != summed[0]]
        x_order = tuple(x_term.index(c) for c in [*lead, summed[0]])
        out_order = tuple([*lead, made[0]].index(c) for c in result)
        identity = tuple(range(len(x_term)))
        operand_is_KN = weight.index(summed[0]) == 0
        return Read(
            "linear", root, other, operand_is_KN, operand_is_KN != swapped, x,
            x_order=None if x_order == identity else x_order, out_order=None if out_order == identity else out_order,
        )  # fmt: skip
