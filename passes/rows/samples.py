"""Row rules of ops over batches of signals: images, audio, sequences. Each sample is computed by itself.

Which dim the batch is, the op says, and whether there is one, the number of dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.families import PER_PLANE, PER_SAMPLE, rule
from fxlora.passes.rows.labels import Label, Mixed, Rows

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

# Dims of an input that has a batch dim, where its name does not end with them (`max_pool2d`).
_BATCHED_NDIM = {"im2col": 4, "fold": 3, "col2im": 3, "pixel_shuffle": 4, "pixel_unshuffle": 4, "stft": 2, "unfold": 4}
_BATCHED_NDIM |= {"native_channel_shuffle": 4, "channel_shuffle": 4}


@rule(*PER_SAMPLE)
def per_sample(p: Prover, node: fx.Node) -> Any:
    """Ops over [batch, channel, ...]: each sample for itself, where the input has a batch dim and only it tells
    requests.
    """
    x, name = operand(node), op_name(node)
    own = p.rows(x)
    if not isinstance(own, Label):
        return own
    if "conv" in name:
        batched = p.ndim(x) == p.ndim(argument(node, 1, "weight"))
    else:
        spatial = {"1": 3, "2": 4, "3": 5}.get(name.rstrip("d")[-1] if name.endswith("d") else "")
        spatial = _BATCHED_NDIM.get(name, spatial)
        batched = p.ndim(x) == spatial if spatial else p.ndim(x) >= 3 or "norm" in name
    if own.dims != (0,) or not batched:
        return Mixed(f"{name} mixes rows along a channel or spatial dim")
    return own


@rule(*PER_PLANE)
def per_plane(p: Prover, node: fx.Node) -> Any:
    """Pooling and resizing of each plane of an image by itself."""
    x, name = operand(node), op_name(node)
    rows = p.rows(x)
    space = next((int(digit) for digit in "123" if f"{digit}d" in name), p.ndim(x) - 2)
    if isinstance(rows, Label) and any(d >= p.ndim(x) - space for d in rows.dims):
        return Mixed(f"{name} along the request dim")
    facts = p.worlds[0].facts(node)
    return (rows,) * len(facts) if isinstance(facts, tuple) else rows


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
)
def batch_norm(p: Prover, node: fx.Node) -> Any:
    """Batch norm: per channel, and over the batch only in training."""
    rows = p.rows(operand(node))
    training = False if "no_training" in str(node.target) else argument(node, 5, "training", default=False)
    if training is not False:
        return Mixed("batch_norm in training mode takes its statistics over all requests")
    if isinstance(rows, Label) and rows.dims != (0,):
        return Mixed("batch_norm over rows of requests")
    return rows


@rule("grid_sample", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d", "max_unpool2d", "max_unpool3d")
def sampled(p: Prover, node: fx.Node) -> Rows:
    """Samples out of, or into, an image at the places that a second operand gives for each sample."""
    image, places = operand(node), argument(node, 1, "grid", "indices")
    batched = 5 if op_name(node).endswith("3d") else 4
    rows = [p.rows(x) for x in (image, places)]
    mixed = next((r for r in rows if isinstance(r, Mixed)), None)
    labels = [r for r in rows if isinstance(r, Label)]
    if mixed is not None or not labels:
        return mixed
    if p.ndim(image) < batched or any(label.dims != (0,) or label != labels[0] for label in labels):
        return Mixed(f"{op_name(node)} at places of other requests, or of one image")
    return labels[0]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(p: Prover, node: fx.Node) -> Any:
    """Recurrent layers over [batch, time, H] or [time, batch, H]: outputs, and the states [layers, batch, H]."""
    x, state, weights, name = operand(node), argument(node, 1, "hx"), argument(node, 2, "params"), op_name(node)
    batch = 0 if argument(node, 8, "batch_first") else 1
    if not isinstance(weights, list | tuple) or p.ndim(x) != 3:
        return Mixed(f"{name} of packed sequences")
    if any(p.rows(w) is not None for w in weights):
        return Mixed(f"{name} with weights that depend on requests")
    states = state if isinstance(state, list | tuple) else [state]
    own, before = p.rows(x), [p.rows(s) for s in states]
    mixed = next((r for r in (own, *before) if isinstance(r, Mixed)), None)
    if mixed is not None:
        return mixed
    placed = [(r, where) for r, where in [(own, batch), *((r, 1) for r in before)] if isinstance(r, Label)]
    maps = {r.map for r, where in placed if r.dims == (where,)}
    if len(maps) != 1 or any(r.dims != (where,) for r, where in placed):
        return Mixed(f"{name} along the request dim, or from states of other requests")
    row_map = maps.pop()
    return (Label(row_map, (batch,)), *(Label(row_map, (1,)) for _ in states))


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(p: Prover, node: fx.Node) -> Any:
    """One step of a recurrent layer: each row of x [batch, K] with its own row of the states [batch, H]."""
    x, state, name = operand(node), argument(node, 1, "hx"), op_name(node)
    states = list(state) if isinstance(state, list | tuple) else [state]
    rest = [w for w in (*node.args[2:], *node.kwargs.values()) if isinstance(w, fx.Node) and w not in (x, *states)]
    own = [p.rows(n) for n in (x, *states)]
    mixed = next((r for r in (*own, *map(p.rows, rest)) if isinstance(r, Mixed)), None)
    if mixed is not None:
        return mixed
    labels = [r for r in own if isinstance(r, Label)]
    if any(p.rows(w) is not None for w in rest):
        return Mixed(f"{name} with weights that depend on requests")
    if any(p.ndim(n) != 2 for n in (x, *states)) or any(r.dims != (0,) or r.map != labels[0].map for r in labels):
        return Mixed(f"{name} along the request dim, or from states of other requests")
    rows = labels[0] if labels else None
    return (rows, rows) if name == "lstm_cell" else rows


@rule("embedding_bag")
def bag(p: Prover, node: fx.Node) -> Rows:
    """One sum of table rows for each row of ids."""
    ids, rows = operand(node), p.rows(operand(node))
    if p.ndim(ids) != 2 or (isinstance(rows, Label) and rows.dims != (0,)):
        return Mixed("embedding_bag over bags that offsets cut out, or that hold several requests")
    return rows
