"""One row rule per op family: given the rows of the operands, the rows of the result.

A rule answers ``Mixed`` whenever an output element could depend on two requests. What no rule knows is ``Mixed``.
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand, varargs
from fxlora.passes.rows import contractions, moves
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, remap, shift

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

Rule = Callable[["Prover", fx.Node], Any]
RULES: dict[str, Rule] = {}

# Values that say nothing of any request, whatever they are computed from.
_NO_DATA = {
    "size", "shape", "sym_size", "sym_stride", "sym_numel", "numel", "dim", "ndim", "ndimension", "stride", "dtype", "device", "layout",
    "requires_grad", "is_floating_point", "is_complex", "is_contiguous", "element_size", "nelement", "get_device", "itemsize",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros", "new_ones", "new_full",
    "new_empty_strided", "storage_offset", "is_cuda", "type_promotion", "result_type", "isinstance", "hasattr", "len", "_assert_tensor_metadata",
    "_assert_async", "_log_api_usage_once", "_check", "_check_is_size", "sym_constrain_range", "sym_constrain_range_for_size", "data_ptr",
    "_assert_scalar", "is_nonzero_assert",
}
_SCALARS = {"item", "tolist", "_local_scalar_dense", "bool", "int", "is_nonzero", "equal", "allclose", "__bool__", "__int__", "numpy"}
# Elementwise ops that carry no pointwise tag, or are spelled by a torch function of another name.
_POINTWISE = {
    "to", "float", "double", "half", "bfloat16", "bool", "long", "int", "type", "type_as", "contiguous", "clone", "detach", "alias", "data",
    "dropout", "native_dropout", "alpha_dropout", "feature_dropout", "floor_divide", "lift_fresh_copy", "lift_fresh", "requires_grad_",
    "silu", "gelu", "relu", "relu6", "elu", "selu", "celu", "leaky_relu", "mish", "softplus", "hardswish", "hardsigmoid", "hardtanh",
    "sigmoid", "tanh", "logsigmoid", "softsign", "tanhshrink", "threshold", "softshrink", "hardshrink", "prelu", "rrelu", "masked_fill",
    "where", "clamp", "clamp_min", "clamp_max", "lerp", "addcmul", "addcdiv", "pow", "rsub", "neg", "abs", "nan_to_num", "square", "isnan",
    "isinf", "isfinite", "cpu", "cuda", "positive", "real", "view_as_real_same", "bernoulli", "maximum", "minimum", "fill", "logical_and",
    "logical_or", "bitwise_and", "bitwise_or", "one_minus", "log_sigmoid_forward", "quick_gelu", "identity", "pos", "max_pairwise", "exp2", "set_",
}
_ALONG_DIM = {"softmax": None, "log_softmax": None, "softmin": None, "cumsum": None, "cumprod": None, "cummax": None, "cummin": None, "logcumsumexp": None, "diff": -1, "flip": None, "roll": None, "glu": -1, "_safe_softmax": None, "normalize": 1, "rot90": None}
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "prod", "var", "std", "logsumexp", "norm", "argmax", "argmin", "median",
    "nanmean", "nansum", "nanmedian", "mode", "var_mean", "std_mean", "aminmax", "count_nonzero", "vector_norm", "linalg_vector_norm", "kthvalue",
}
_PER_SAMPLE = {
    "conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "group_norm",
    "native_group_norm", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d", "pixel_shuffle", "pixel_unshuffle", "instance_norm",
    "max_pool2d_with_indices", "local_response_norm",
}
_pointwise_cache: set[str] = set()


def is_pointwise(name: str) -> bool:
    """True for ops whose output element depends on the operands' elements at the same (broadcast) place alone."""
    if not _pointwise_cache:
        for op in dir(torch.ops.aten):
            packet = getattr(torch.ops.aten, op)
            if isinstance(packet, torch._ops.OpOverloadPacket) and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads()):
                _pointwise_cache.add(op)
        _pointwise_cache.update(_POINTWISE)
    return name in _pointwise_cache


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def rows_of(p: Prover, node: fx.Node) -> Any:
    """The rows of a call: a Rows, or a tuple of them for an op that returns several tensors."""
    name = op_name(node)
    if name in _NO_DATA:
        return None
    incoming = [r for n in node.all_input_nodes for r in _flat(p.labels.get(n))]
    if not any(r is not None for r in incoming):
        return None
    if name in _SCALARS and not p.is_tensor(node):
        return Mixed(f"{name} turns rows into a number that all requests see")
    found = RULES.get(name)
    if found is not None:
        return found(p, node)
    if name in _PER_SAMPLE:
        return per_sample(p, node)
    if name in _REDUCTIONS:
        return reduce(p, node)
    if name in _ALONG_DIM:
        return along_dim(p, node)
    if is_pointwise(name):
        return pointwise(p, node)
    return Mixed(f"no row rule for {name.lstrip('?')}")


def _flat(rows: Any) -> list[Rows]:
    return list(rows) if isinstance(rows, tuple) else [rows]


def pointwise(p: Prover, node: fx.Node) -> Rows:
    out = p.ndim(node)
    parts: list[Rows] = []
    nodes = [operand(node)] if op_name(node) in ("to", "type_as", "type") else node.all_input_nodes
    for n in nodes:
        rows = p.rows(n)
        if isinstance(rows, Label) and p.ndim(n) > out:
            return Mixed(f"{op_name(node)} of a larger tensor")
        parts.append(shift(rows, out - p.ndim(n)) if isinstance(rows, Label) else rows)
    return moves.fit(p, join(parts, out, p.count, op_name(node)), node)


def dims_of(p: Prover, node: fx.Node, position: int) -> list[int] | None:
    """The dims an op works along; None for all."""
    dim = argument(node, position, "dim", "axis", "dims")
    if dim is None or isinstance(dim, str):
        return None
    ndim = max(p.ndim(operand(node)), 1)
    listed = [dim] if isinstance(dim, int) else list(dim)
    return [d % ndim for d in listed] or None


def reduce(p: Prover, node: fx.Node) -> Any:
    name, rows = op_name(node), p.rows(operand(node))
    if name in ("max", "min") and len(node.args) > 1 and p.is_tensor(node.args[1]):
        return pointwise(p, node)
    if not isinstance(rows, Label):
        return rows
    position = 2 if name in ("norm", "vector_norm", "linalg_vector_norm", "logsumexp_", "kthvalue") else 1
    if position < len(node.args) and isinstance(node.args[position], bool):
        position = len(node.args)  # var(x, unbiased)
    dims = dims_of(p, node, position)
    ndim = p.ndim(operand(node))
    reduced = list(range(ndim)) if dims is None else dims
    if any(rows.map.ids[w].shape[rows.dims.index(d)] != 1 for d in reduced if d in rows.dims for w in range(p.count)):
        return Mixed(f"{name} over the request dim mixes requests")
    for d in sorted((d for d in reduced if d in rows.dims), reverse=True):
        j = rows.dims.index(d)
        rest = rows.dims[:j] + rows.dims[j + 1 :]
        rows = moves.derive(p, node, rows, [i.select(j, 0) for i in rows.map.ids], rest, moves._select(j), "select")
    facts = p.worlds[0].facts(node)
    first = facts[0] if isinstance(facts, tuple) else facts
    if len(first.shape) == ndim:
        return rows
    return remap(rows, lambda d: d - sum(r < d for r in reduced))


def along_dim(p: Prover, node: fx.Node) -> Rows:
    """Ops that combine or move elements along given dims only (softmax, cumsum, roll, flip, ...)."""
    name, rows = op_name(node), p.rows(operand(node))
    if not isinstance(rows, Label):
        return rows
    default = _ALONG_DIM[name]
    if name in ("flip",):
        dims: list[int] | None = [d % p.ndim(operand(node)) for d in varargs(node, 1, "dims")]
    elif name in ("roll", "diff", "rot90", "normalize"):
        dims = dims_of(p, node, 2)
    else:
        dims = dims_of(p, node, 1)
    if dims is None and default is not None:
        dims = [default % p.ndim(operand(node))]
    if dims is None or any(d in rows.dims for d in dims):
        return Mixed(f"{name} along the request dim mixes requests")
    return moves.fit(p, rows, node)


def per_sample(p: Prover, node: fx.Node) -> Rows:
    """Ops over [batch, channel, ...]: each sample for itself, where the input has a batch dim and only it tells requests."""
    x, name = operand(node), op_name(node)
    rows = [p.rows(n) for n in node.all_input_nodes if n is not x]
    own = p.rows(x)
    if any(r is not None for r in rows):
        return Mixed(f"{name} with weights that depend on a request")
    if not isinstance(own, Label):
        return own
    if "conv" in name:
        batched = p.ndim(x) == p.ndim(argument(node, 1, "weight"))
    else:
        spatial = {"1": 3, "2": 4, "3": 5}.get(name.rstrip("d")[-1] if name.endswith("d") else "")
        batched = p.ndim(x) == spatial if spatial else p.ndim(x) >= 3 or "norm" in name
    if own.dims != (0,) or not batched:
        return Mixed(f"{name} mixes rows along a channel or spatial dim")
    return own


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(p: Prover, node: fx.Node) -> Any:
    rows = p.rows(operand(node))
    over = len(argument(node, 1, "normalized_shape"))
    if isinstance(rows, Label) and any(d >= p.ndim(operand(node)) - over for d in rows.dims):
        return Mixed(f"{op_name(node)} over the request dim mixes requests")
    return rows


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(p: Prover, node: fx.Node) -> Any:
    rows = p.rows(operand(node))
    training = False if "no_training" in str(node.target) else argument(node, 5, "training", default=False)
    if training is not False:
        return Mixed("batch_norm in training mode takes its statistics over all requests")
    if isinstance(rows, Label) and rows.dims != (0,):
        return Mixed("batch_norm over rows of requests")
    return rows


@rule("linear")
def linear(p: Prover, node: fx.Node) -> Rows:
    x, rows = operand(node), p.rows(operand(node))
    if any(p.rows(n) is not None for n in node.all_input_nodes if n is not x):
        return Mixed("linear with a weight that depends on a request")
    if isinstance(rows, Label) and p.ndim(x) - 1 in rows.dims:
        return Mixed("linear sums over the request dim")
    return rows


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def grouped_mm(p: Prover, node: fx.Node) -> Rows:
    """Row m of x times one expert's weight: the row stays its request's, whichever expert it goes to."""
    x, weight = operand(node), argument(node, 1, "mat2", "mat_b", "weight")
    rows = p.rows(x)
    if p.ndim(x) != 2 or p.rows(weight) is not None:
        return Mixed("grouped_mm of other than rows by expert weights")
    if isinstance(rows, Label) and rows.dims != (0,):
        return Mixed("grouped_mm sums over the request dim")
    return rows


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(p: Prover, node: fx.Node) -> Rows:
    return contractions.matmul(p, node, operand(node), argument(node, 1, "other", "mat2", "vec", "tensor"))


@rule("addmm", "baddbmm", "addmv")
def addmm(p: Prover, node: fx.Node) -> Rows:
    product = contractions.matmul(p, node, argument(node, 1, "mat1", "batch1", "mat"), argument(node, 2, "mat2", "batch2", "vec"))
    bias = operand(node)
    return join([product, shift(p.rows(bias), p.ndim(node) - p.ndim(bias))], p.ndim(node), p.count, op_name(node))


@rule("einsum")
def einsum(p: Prover, node: fx.Node) -> Rows:
    return contractions.einsum(p, node)


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math")
def attention(p: Prover, node: fx.Node) -> Any:
    rows = contractions.attention(p, node)
    facts = p.worlds[0].facts(node)
    if not isinstance(facts, tuple):
        return rows
    rest = [Mixed("inner result of attention") if isinstance(rows, Label) else rows] * (len(facts) - 1)
    return (rows, *rest)


@rule("getitem")
def getitem(p: Prover, node: fx.Node) -> Any:
    source = operand(node)
    if not p.is_tensor(source):
        rows = p.labels.get(source)
        key = argument(node, 1)
        if isinstance(rows, tuple):
            return rows[key] if isinstance(key, int) else Mixed("computed choice among results")
        return rows
    return moves.index(p, node, source, moves.index_items(p, node))


@rule("index", "slice", "select", "index_select", "narrow")
def index(p: Prover, node: fx.Node) -> Rows:
    return moves.index(p, node, operand(node), moves.index_items(p, node))


@rule("embedding")
def embedding(p: Prover, node: fx.Node) -> Rows:
    first, second = operand(node), argument(node, 1, "weight", "indices", "input")
    ids, weight = (first, second) if not p.dtype(first).is_floating_point else (second, first)
    if p.rows(weight) is not None:
        return Mixed("embedding table that depends on a request")
    return p.rows(ids)


@rule("gather", "take_along_dim")
def gather(p: Prover, node: fx.Node) -> Rows:
    x, indices = operand(node), argument(node, 2 if op_name(node) == "gather" else 1, "index", "indices")
    dim = argument(node, 1 if op_name(node) == "gather" else 2, "dim")
    rows = p.rows(x)
    if dim is None:
        return Mixed("gather over flattened rows")
    dim %= p.ndim(x)
    if isinstance(rows, Label):
        if dim in rows.dims:
            if rows.dims != (0,) or p.ndim(x) != 1:
                return Mixed(f"{op_name(node)} along the request dim")
            return moves.index(p, node, x, [indices])
        for w in range(p.count):
            if any(p.shape(indices, w)[d] != p.shape(x, w)[d] for d in rows.dims):
                return Mixed(f"{op_name(node)} of a part of the rows")
    return join([rows, p.rows(indices)], p.ndim(node), p.count, op_name(node))


@rule("sort", "topk", "argsort", "msort")
def ranking(p: Prover, node: fx.Node) -> Any:
    """Along other dims rows stay; a sort of one-dimensional rows permutes the map by the order it found."""
    name, x = op_name(node), operand(node)
    rows = p.rows(x)
    if not isinstance(rows, Label):
        return rows
    dim = argument(node, 2 if name == "topk" else 1, "dim", default=0 if name == "msort" else -1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        dim = argument(node, 2, "dim", default=-1)
    if dim % p.ndim(x) not in rows.dims:
        return rows
    order = Mixed(f"positions that a {name} over several requests chose")
    if name == "argsort":
        return order
    values = [p.integers.values[w].get(node) for w in range(p.count)]
    if p.ndim(x) != 1 or not all(isinstance(v, tuple) and isinstance(v[1], torch.Tensor) for v in values):
        return (Mixed(f"{name} over the request dim"), order)
    ids = [rows.map.ids[w][values[w][1]] for w in range(p.count)]

    def build(emit: moves.Emit, parent: fx.Node) -> fx.Node:
        return emit(operator.getitem, parent, emit(operator.getitem, node, 1))

    return (moves.derive(p, node, rows, ids, (0,), build, f"{name} order"), order)


@rule("cat", "stack", "vstack", "hstack")
def cat(p: Prover, node: fx.Node) -> Rows:
    parts: Sequence[fx.Node] = operand(node)
    dim = argument(node, 1, "dim", "axis", default=0)
    if op_name(node) in ("vstack", "hstack"):
        return Mixed(f"no row rule for {op_name(node)}")
    if op_name(node) == "stack":
        dim %= p.ndim(node)
        rows = [remap(p.rows(x), lambda d: d + (d >= dim)) for x in parts]
        return join(rows, p.ndim(node), p.count, "stack")
    return moves.cat(p, node, parts, dim % p.ndim(node))


@rule("chunk", "split", "unbind", "tensor_split")
def pieces(p: Prover, node: fx.Node) -> Any:
    x = operand(node)
    dim = argument(node, 1 if op_name(node) == "unbind" else 2, "dim", default=0)
    return moves.pieces(p, node, p.rows(x), dim % p.ndim(x))


@rule("transpose", "permute", "t", "T", "mT", "H", "moveaxis")
def transpose(p: Prover, node: fx.Node) -> Rows:
    return moves.permute(p, node, p.rows(operand(node)), moves.permutation_of(p, node))


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshape(p: Prover, node: fx.Node) -> Rows:
    x = operand(node)
    if op_name(node) in ("view", "reshape") and (len(node.args) > 1 and isinstance(node.args[1], torch.dtype)):
        return Mixed("view as another dtype")
    return moves.reshape(p, node, x, p.rows(x))


@rule("unsqueeze")
def unsqueeze(p: Prover, node: fx.Node) -> Rows:
    dim = argument(node, 1, "dim") % p.ndim(node)
    return remap(p.rows(operand(node)), lambda d: d + (d >= dim))


@rule("squeeze")
def squeeze(p: Prover, node: fx.Node) -> Rows:
    return moves.reshape(p, node, operand(node), p.rows(operand(node)))


@rule("expand", "expand_as")
def expand(p: Prover, node: fx.Node) -> Rows:
    x = operand(node)
    return moves.fit(p, shift(p.rows(x), p.ndim(node) - p.ndim(x)), node)


@rule("repeat_interleave")
def repeat_interleave(p: Prover, node: fx.Node) -> Rows:
    return moves.repeat_interleave(p, node, p.rows(operand(node)))


@rule("repeat")
def repeat(p: Prover, node: fx.Node) -> Rows:
    return moves.repeat(p, node, p.rows(operand(node)))


@rule("unfold")
def unfold(p: Prover, node: fx.Node) -> Rows:
    rows, dim = p.rows(operand(node)), argument(node, 1, "dimension")
    if node.target is torch.nn.functional.unfold:
        return Mixed("no row rule for the patch form of unfold")
    if isinstance(rows, Label) and dim % p.ndim(operand(node)) in rows.dims:
        return Mixed("unfold along the request dim")
    return rows


@rule("pad", "constant_pad_nd")
def pad(p: Prover, node: fx.Node) -> Rows:
    x, rows = operand(node), p.rows(operand(node))
    widths = list(argument(node, 1, "pad"))
    for i in range(0, len(widths), 2):
        dim = p.ndim(x) - 1 - i // 2
        if isinstance(rows, Label) and dim in rows.dims and (widths[i] != 0 or widths[i + 1] != 0):
            return Mixed("pad along the request dim")
    return rows


@rule("tril", "triu", "one_hot")
def keep_rows(p: Prover, node: fx.Node) -> Rows:
    return p.rows(operand(node))


@rule("view_as_complex", "view_as_real")
def complex_view(p: Prover, node: fx.Node) -> Rows:
    rows, last = p.rows(operand(node)), p.ndim(operand(node)) - 1
    if op_name(node) == "view_as_complex" and isinstance(rows, Label) and last in rows.dims:
        return Mixed("view_as_complex along the request dim")
    return rows
