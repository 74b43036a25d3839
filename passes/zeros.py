"""Tensors that are zero whatever the requests are: no adapter adds anything to a linear of one.

Stage: planning. A model that shifts a projection by one token (ZAYA1's delayed values) calls it on zeros for the token
before the first; such rows carry no request, and need none.
"""

from __future__ import annotations

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.memory import Memory
from fxlora.passes.rows.families import MAY_RETURN_OPERAND, VIEWS

_ZEROS = {"zeros", "new_zeros", "zeros_like"}
_FILL = {"full": 1, "full_like": 1, "new_full": 2}
"""Where the value stands among positional arguments."""

_MOVES = (VIEWS - MAY_RETURN_OPERAND) | {
    "to", "type_as", "contiguous", "clone", "detach", "alias", "float", "double", "half", "bfloat16",
}  # fmt: skip


def zeros_behind(value: object) -> list[fx.Node]:
    """A value, what it is a copy, cast or view of, and so on, up to the zeros that all of these are if nothing is
    written to them; none for another value."""
    if not isinstance(value, fx.Node):
        return []
    name = op_name(value)
    if name in _ZEROS or (name in _FILL and argument(value, _FILL[name], "fill_value") == 0):
        return [value]
    behind = zeros_behind(operand(value)) if name in _MOVES else []
    return [value, *behind] if behind else []


def are_zero(values: list[fx.Node], call: fx.Node, memory: Memory) -> bool:
    """Whether nothing was written to these values of `zeros_behind` when a call reads the first."""
    return memory.write_between(values, memory.order[values[-1]], memory.order[call]) is None
