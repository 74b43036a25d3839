"""Tensors that are zero whatever the requests are: no adapter adds anything to a linear of one.

Stage: planning. A model that shifts a projection by one token (ZAYA1's delayed values) calls it on zeros for the token
before the first; such rows carry no request, and need none.
"""

from __future__ import annotations

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.families import MAY_RETURN_OPERAND, VIEWS
from fxlora.passes.rows.writes import is_write

_ZEROS = {"zeros", "new_zeros", "zeros_like"}
_FILL = {"full": 1, "full_like": 1, "new_full": 2}
"""Where the value stands among positional arguments."""

_MOVES = (VIEWS - MAY_RETURN_OPERAND) | {
    "to", "type_as", "contiguous", "clone", "detach", "alias", "float", "double", "half", "bfloat16",
}  # fmt: skip


def is_zero(node: object) -> bool:
    """Whether a value of the graph is zeros, made here, looked at or cast, and never written to."""
    if not isinstance(node, fx.Node):
        return False
    name = op_name(node)
    if name in _ZEROS or (name in _FILL and argument(node, _FILL[name], "fill_value") == 0):
        return not _is_written(node)
    return name in _MOVES and is_zero(operand(node))


def _is_written(node: fx.Node) -> bool:
    """Whether a tensor, or one that may share its memory, is changed in place."""
    return any(is_write(user) or (op_name(user) in VIEWS and _is_written(user)) for user in node.users)
