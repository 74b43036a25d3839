"""Families of ops by what they do to rows. An op that stands in none of these, and has no rule of its own, mixes
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

Rule = Callable[["Prover", fx.Node], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the row rule of some ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Values that say nothing of any request, whatever they are computed from.
NO_DATA = _words(
    """
    size shape sym_size sym_stride sym_numel numel dim ndim ndimension stride dtype device layout requires_grad
    is_floating_point is_complex is_contiguous element_size nelement get_device itemsize empty_like zeros_like
    ones_like rand_like randn_like new_empty new_zeros new_ones new_empty_strided
    storage_offset is_cuda result_type isinstance hasattr len _assert_tensor_metadata _assert_async
    _log_api_usage_once _check _check_is_size sym_constrain_range sym_constrain_range_for_size data_ptr
    _assert_scalar lazy_load_decompositions _vmap_increment_nesting _vmap_decrement_nesting
    """
)
# Ops that fill a tensor with a value.
CREATIONS = _words("full full_like new_full arange linspace scalar_tensor tensor as_tensor new_tensor")
# Ops where one operand only lends its shape, dtype or device.
LENDS_SHAPE = _words("expand_as view_as reshape_as type_as type to full_like new_full new_tensor")
# Ops whose rules look at all their operands. Every other op may depend on requests through its first operand alone.
JOINS = _words(
    """
    _grouped_mm grouped_mm grouped_mm_fallback matmul mm bmm mv dot addmm baddbmm addmv einsum cat stack embedding
    vstack hstack dstack column_stack
    linalg_solve linalg_solve_triangular associative_scan
    gather take_along_dim diff getitem index index_select slice select narrow scaled_dot_product_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math
    cholesky_solve cdist _cdist_forward bilinear searchsorted grid_sample grid_sampler grid_sampler_2d grid_sampler_3d
    max_unpool2d max_unpool3d lstm gru rnn_tanh rnn_relu masked_scatter
    lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    max min expand_as view_as reshape_as view reshape expand flatten unflatten repeat split paged_cache_update
    """
)
# Ops that may hand their operand on as it is (in eval mode, for the same dtype, by `inplace=True`).
MAY_RETURN_OPERAND = _words(
    """
    dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d relu relu6 elu selu celu leaky_relu silu mish
    hardswish hardsigmoid hardtanh threshold rrelu positive pos conj resolve_conj resolve_neg long int bool float double
    half bfloat16 short byte char chalf cfloat cdouble to type type_as contiguous cpu cuda detach alias data real
    """
)
# Ops whose result may share memory with their operand.
VIEWS = MAY_RETURN_OPERAND | _words(
    """
    view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze expand expand_as transpose permute
    t T mT H moveaxis slice select narrow getitem chunk split unbind tensor_split unfold diagonal as_strided
    linalg_diagonal _conj _neg_view pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    view_as_real view_as_complex imag lift_fresh requires_grad_ _add_batch_dim _remove_batch_dim
    """
)
# Where `inplace` stands among positional arguments.
INPLACE_AT = {
    **dict.fromkeys(_words("relu relu6 selu silu mish hardswish hardsigmoid"), 1),
    **dict.fromkeys(_words("elu celu leaky_relu"), 2),
    **dict.fromkeys(
        _words("hardtanh threshold dropout alpha_dropout feature_dropout dropout1d dropout2d dropout3d"), 3
    ),
    "rrelu": 4,
}
# Ops in whose training mode running statistics are written, which their schema does not say.
KEEPS_STATISTICS = _words(
    """
    batch_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm instance_norm
    _batch_norm_with_update _batch_norm_impl_index miopen_batch_norm
    """
)
# Ops that turn a tensor into a Python number (some also convert a tensor: then they are pointwise).
SCALARS = _words(
    """
    item tolist _local_scalar_dense bool int is_nonzero equal allclose __bool__ __int__ numpy
    """
)
# Elementwise ops that carry no pointwise tag, or are spelled by a torch function of another name.
_POINTWISE = _words(
    """
    to float double half bfloat16 bool long int type type_as contiguous clone detach alias data dropout
    native_dropout alpha_dropout feature_dropout floor_divide lift_fresh_copy lift_fresh silu gelu relu relu6
    elu selu celu leaky_relu mish softplus hardswish hardsigmoid hardtanh sigmoid tanh logsigmoid softsign
    tanhshrink threshold softshrink hardshrink prelu rrelu masked_fill where clamp clamp_min clamp_max lerp
    addcmul addcdiv pow rsub neg abs nan_to_num square isnan isinf isfinite cpu cuda positive real bernoulli
    maximum minimum fill logical_and logical_or bitwise_and bitwise_or log_sigmoid_forward log_sigmoid pos exp2
    arccos arccosh arcsin arcsinh arctan arctanh expit short byte char chalf cfloat cdouble float_power isclose isreal
    conj polar complex imag ndtr log_ndtr erfcx gammainc gammaincc gammaln multigammaln
    _conj _conj_physical frexp feature_dropout dropout1d dropout2d dropout3d
    """
)
# Ops that combine or move elements along one dim or a few, and the dim they take by default (None: it must be given).
ALONG_DIM: dict[str, int | None] = {
    **dict.fromkeys(
        _words(
            """
            softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp flip roll rot90 _safe_softmax
            _fft_c2c _fft_r2c _fft_c2r
            """
        )
    ),
    "glu": -1,
    "normalize": 1,
    "multinomial": None,
    "gumbel_softmax": -1,
}
REDUCTIONS = _words(
    """
    sum mean amax amin max min any all prod var std logsumexp norm argmax argmin median nanmean nansum nanmedian
    mode var_mean std_mean aminmax count_nonzero vector_norm linalg_vector_norm kthvalue
    """
)
# Ops over [batch, channel, ...] that treat each sample for itself.
PER_SAMPLE = _words(
    """
    conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d conv_transpose3d group_norm
    native_group_norm pixel_shuffle pixel_unshuffle instance_norm local_response_norm channel_shuffle
    native_channel_shuffle fold im2col col2im stft
    """
)
# Ops over [..., space] that treat each plane for itself: all dims before those of space stay apart.
PER_PLANE = _words(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d lp_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    fractional_max_pool2d fractional_max_pool3d interpolate upsample upsample_nearest upsample_bilinear
    upsample_nearest1d upsample_linear1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d upsample_trilinear3d
    """
)


@functools.cache
def _tagged() -> frozenset[str]:
    found = set()
    for op in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, op)
        if isinstance(packet, torch._ops.OpOverloadPacket) and any(
            torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
        ):
            found.add(op)
    return frozenset(found)


def is_pointwise(name: str) -> bool:
    """True for ops whose output element depends on the operands' elements at the same (broadcast) place alone."""
    plain = name.removeprefix("special_")
    return plain in _POINTWISE or plain in _tagged() or name in _tagged()
