"""What rules claim of single ops, held against numbers: an element changes only with the request it is said to be of.

Each op runs with the requests along every dim of its operand in turn. Wherever rows are claimed, one request's input
is redrawn, and no element of another request may move. With requests along the first dim of a batch they must be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from fxlora.passes.rows.labels import Label, broadcast_ids
from fxlora.passes.rows.propagate import Prover
from tests.passes.build import proved, returned

Tensor = torch.Tensor
Body = Callable[[Tensor], Tensor]


@functools.cache
def w(*shape: int) -> Tensor:
    """A fixed random weight."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def zeros(x: Tensor) -> Tensor:
    """A first state [1, B, 5]."""
    return x.new_zeros((1, x.shape[0], 5))


IMAGES: dict[str, Body] = {  # x [B, 4, 8, 8]
    "conv2d": lambda x: F.conv2d(x, w(4, 4, 3, 3)),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, w(4, 4, 3, 3)),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "area": lambda x: F.interpolate(x, size=(5, 5), mode="area"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 2),
    "fold": lambda x: F.fold(F.unfold(x, 2), (7, 7), 1),
    "patches": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "affine_grid": lambda x: F.affine_grid(x[:, 0, :2, :3], (3, 4, 8, 8), align_corners=False),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "batch_norm": lambda x: F.batch_norm(x, w(4), w(4).abs()),
    "local_response_norm": lambda x: F.local_response_norm(x, 2),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "flip": lambda x: x.flip(2, 3),
    "fliplr": torch.fliplr,
    "roll": lambda x: torch.roll(x, (1, 2), (2, 3)),
    "fft2": lambda x: torch.fft.fft2(x).real,
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1),
    "fftn": lambda x: torch.fft.fftn(x, dim=(1, 2)).imag,
    "fftshift": lambda x: torch.fft.fftshift(x, dim=(2,)),
    "stft": lambda x: torch.stft(x[:, 0].flatten(1), n_fft=8, window=torch.ones(8), return_complex=True).abs(),
    "einsum": lambda x: torch.einsum("bchw,bchv->bcwv", x, x),
    "einsum_three": lambda x: torch.einsum("bchw,bcwv,bdhv->bdcv", x, x, x),
    "einsum_turned": lambda x: torch.einsum("bchw->wcbh", x),
    "diagonal": lambda x: x.diagonal(1, 2, 3),
    "diagonal_behind": lambda x: x.diagonal(0, -1, 1),
    "diag_embed": lambda x: torch.diag_embed(x[:, 0, 0]),
    "tensordot": lambda x: torch.tensordot(x, w(8, 5), dims=([3], [0])),
    "inner": lambda x: torch.inner(x, w(5, 8)),
    "multi_dot": lambda x: torch.linalg.multi_dot([x[:, 0, 0], w(8, 4), w(4, 3)]),
    "svdvals": torch.linalg.svdvals,
    "qr": lambda x: torch.linalg.qr(x)[1],
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "matrix_norm": torch.linalg.matrix_norm,
    "vecdot": lambda x: torch.linalg.vecdot(x, x),
    "cross": lambda x: torch.linalg.cross(x[..., :3], x[..., 1:4]),
    "vstack": lambda x: torch.vstack([x, x * 2]),
    "hstack": lambda x: torch.hstack([x, x * 2]),
    "dsplit": lambda x: torch.dsplit(x, 2)[1],
    "prelu": lambda x: F.prelu(x, w(4)),
    "baddbmm": lambda x: torch.baddbmm(w(1, 8, 8), x[:, 0], x[:, 1]),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "squeezed": lambda x: x.unsqueeze(1).squeeze(1),
    "normalize": F.normalize,
}
TOKENS: dict[str, Body] = {  # x [B, 7, 8]
    "conv1d": lambda x: F.conv1d(x, w(4, 7, 3)),
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(-1), dim=-1),
    "cosine_of_dim_1": lambda x: F.cosine_similarity(x, x * 2),
    "cosine_with_weight": lambda x: F.cosine_similarity(x, w(7, 8), dim=-1),
    "pairwise": lambda x: F.pairwise_distance(x, x.flip(-1)),
    "cdist": lambda x: torch.cdist(x, x * 2),
    "cdist_with_weight": lambda x: torch.cdist(x, w(5, 8)),
    "outer": lambda x: torch.outer(x[:, 0, 0], w(5)),
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
    "kthvalue": lambda x: x.kthvalue(2, dim=-1)[0],
    "median": lambda x: x.median(-1)[0],
    "mode": lambda x: x.round().mode(-1)[0],
    "quantile": lambda x: x.quantile(0.3, dim=-1),
    "scatter_reduce": lambda x: torch.zeros_like(x).scatter_reduce(1, torch.ones_like(x).long(), x, "amax"),
    "index_add": lambda x: torch.zeros_like(x).index_add(1, torch.arange(6, -1, -1), x),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(1, torch.arange(6, -1, -1), x),
    "index_fill": lambda x: x.index_fill(1, torch.arange(2), 1.0),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "searchsorted": lambda x: torch.searchsorted(torch.arange(9.0), x.contiguous()).float(),
    "searchsorted_own": lambda x: torch.searchsorted(x.sort(-1)[0], x.contiguous()).float(),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(1).values,
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "bilinear": lambda x: F.bilinear(x, x * 2, w(5, 8, 8)),
    "diag_embed": torch.diag_embed,
    "tril_": lambda x: x.clone().tril_(),
    "cumsum_": lambda x: x.clone().cumsum_(1),
    "addmm_": lambda x: x[:, 0].clone().addmm_(x[:, 1], w(8, 8)),
    "clamp_": lambda x: x.clone().clamp_(0, 1),
    "std_mean": lambda x: torch.std_mean(x, -1)[0],
    "aminmax": lambda x: torch.aminmax(x, dim=-1)[0],
    "gradient": lambda x: torch.gradient(x, dim=1)[0],
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 2),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3),
    "window": lambda x: x.unfold(1, 3, 1) @ w(3, 2),
    "frexp": lambda x: torch.frexp(x)[0],
    "lstm_cell": lambda x: torch.lstm_cell(x[:, 0], (x[:, 1], x[:, 2]), w(32, 8), w(32, 8))[0],
    "gru_cell": lambda x: torch.gru_cell(x[:, 0], x[:, 1], w(24, 8), w(24, 8)),
    "lstm": lambda x: torch.lstm(x, (x[None, :, 0, :5], x[None, :, 1, :5]), LSTM, False, 1, 0.0, False, False, True)[0],
    "lstm_state": lambda x: torch.lstm(x, (zeros(x), zeros(x)), LSTM, False, 1, 0.0, False, False, True)[2],
    "gru_time_first": lambda x: torch.gru(x.transpose(0, 1), zeros(x), GRU, False, 1, 0.0, False, False, False)[0],
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "index_put_by_mask": lambda x: torch.index_put(x, (x[..., 0] > 0,), torch.tensor(0.5)),
    "masked_rows": lambda x: torch.index_put(x @ w(8, 8), (x[..., 0] > 0,), w(8)),
}  # fmt: skip
LSTM, GRU = [w(20, 8), w(20, 5)], [w(15, 8), w(15, 5)]
ONE_IMAGE: dict[str, Body] = {  # x [4, 8, 8], with no batch: rows may be refused along every dim
    name: IMAGES[name] for name in ("conv2d", "pixel_shuffle", "pixel_unshuffle", "unfold", "fold", "max_pool2d")
} | {"grid_sample": lambda x: F.grid_sample(x[None], w(1, 5, 5, 2), align_corners=False)}
CASES = [
    (f"{kind}-{name}", body, shape)
    for kind, bodies, shape in (
        ("images", IMAGES, (3, 4, 8, 8)),
        ("tokens", TOKENS, (3, 7, 8)),
        ("image", ONE_IMAGE, (4, 8, 8)),
    )
    for name, body in bodies.items()
]


def placed(body: Body, shape: tuple[int, ...], dim: int) -> Prover | None:
    """The op over an operand of this shape whose requests run along ``dim``, proven; None where it does not run."""
    example = torch.randn(shape[dim], *shape[:dim], *shape[dim + 1 :])
    try:
        return proved(fx.symbolic_trace(lambda x: body(x.movedim(0, dim))), example)
    except Exception:
        return None


def moved(prover: Prover, label: Label) -> list[int]:
    """Requests whose new input changes elements that are said to be of others."""
    node = next(n for n in prover.graph.nodes if n.op == "placeholder")
    gm = prover.graph.owning_module
    assert gm is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(prover.shape(node, 0), generator=generator)
    before = gm(x.clone())
    owners = broadcast_ids(label, before.dim(), 0).expand(before.shape)
    found = []
    for request in (0, len(x) // 2, len(x) - 1):
        other = x.clone()
        other[request] = torch.randn(x.shape[1:], generator=generator) * 3
        same = torch.isclose(gm(other), before, rtol=1e-4, atol=1e-5, equal_nan=True) | (owners == request)
        found += [] if bool(same.all()) else [request]
    return found


@pytest.mark.parametrize(("kind", "body", "shape"), CASES, ids=[case[0] for case in CASES])
def test_no_element_moves_with_another_request(kind: str, body: Body, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        prover = placed(body, shape, dim)
        if prover is None:
            continue
        rows = prover.rows(returned(prover.graph))
        assert dim or kind.startswith("image-") or isinstance(rows, Label), rows
        assert rows is not None
        if isinstance(rows, Label):
            assert moved(prover, rows) == [], f"requests along dim {dim}"
