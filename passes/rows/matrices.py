"""Row rules of linear algebra beyond products: equations, factors and distances, one for each matrix of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows import contractions
from fxlora.passes.rows.families import rule
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, shift

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover


@rule("linalg_solve_triangular", "linalg_solve", "cholesky_solve")
def solve(p: Prover, node: fx.Node) -> Rows:
    """Systems of equations, one per batch element: the product of an inverse and the right sides."""
    name = op_name(node)
    matrix, right = argument(node, 0, "A", "input", "self"), argument(node, 1, "B")
    if name == "cholesky_solve":
        matrix, right = argument(node, 1, "L", "input2"), argument(node, 0, "B", "input", "self")
    rows = p.rows(matrix)
    if p.ndim(right) < 2 or (name == "linalg_solve" and p.ndim(right) < p.ndim(matrix)):
        return Mixed(f"{name} with vectors on the right side")  # which of its dims is which, its shape decides
    if isinstance(rows, Label) and any(d >= p.ndim(matrix) - 2 for d in rows.dims):
        return Mixed(f"{name} of equations of several requests")
    sides = (matrix, right) if argument(node, 3, "left", default=True) else (right, matrix)
    return contractions.matmul(p, node, *sides)


@rule(
    "inverse", "linalg_inv", "linalg_pinv", "linalg_cholesky", "cholesky", "matrix_exp", "linalg_matrix_exp",
    "matrix_power", "linalg_matrix_power", "det", "linalg_det", "logdet", "linalg_qr", "linalg_svd", "_linalg_svd",
    "linalg_svdvals", "linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "linalg_slogdet", "_linalg_slogdet",
    "_linalg_det", "linalg_lu_factor", "linalg_lu", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_lu_factor_ex",
    "linalg_matrix_rank",
)  # fmt: skip
def of_matrices(p: Prover, node: fx.Node) -> Any:
    """A matrix or a number, or several, out of each matrix of a batch."""
    rows = p.rows(operand(node))
    if isinstance(rows, Label) and any(d >= p.ndim(operand(node)) - 2 for d in rows.dims):
        return Mixed(f"{op_name(node)} of a matrix of several requests")
    facts = p.worlds[0].facts(node)
    return (rows,) * len(facts) if isinstance(facts, tuple) else rows


@rule("cdist", "_cdist_forward")
def distances(p: Prover, node: fx.Node) -> Rows:
    """Distances of vectors [*, M, K] from others [*, N, K]: as the product of one with the other transposed."""
    return contractions.pairs(p, node, operand(node), argument(node, 1, "x2"))


@rule("bilinear")
def bilinear(p: Prover, node: fx.Node) -> Rows:
    """`x1 @ W @ x2`, row by row."""
    pair = (operand(node), argument(node, 1, "input2"))
    if any(p.rows(n) is not None for n in node.all_input_nodes if n not in pair):
        return Mixed("bilinear with weights that depend on requests")
    if any(isinstance(rows := p.rows(x), Label) and p.ndim(x) - 1 in rows.dims for x in pair):
        return Mixed("bilinear sums over the request dim")
    return join([p.rows(x) for x in pair], p.ndim(node), p.count, "bilinear")


@rule("searchsorted")
def searched(p: Prover, node: fx.Node) -> Rows:
    """Where values [*, M] stand among sorted ones [*, N], or [N] for all."""
    among, values = operand(node), argument(node, 1, "input", "self")
    rows = [p.rows(among), p.rows(values)]
    if p.rows(node.kwargs.get("sorter")) is not None:
        return Mixed("searchsorted by an order that depends on requests")
    mixed = next((r for r in rows if isinstance(r, Mixed)), None)
    if mixed is not None or not p.is_tensor(values):
        return mixed or Mixed("searchsorted of a number")
    if isinstance(rows[0], Label) and p.ndim(among) - 1 in rows[0].dims:
        return Mixed("searchsorted among values of several requests")
    rows[0] = shift(rows[0], p.ndim(values) - p.ndim(among))
    return join(rows, p.ndim(node), p.count, "searchsorted")
