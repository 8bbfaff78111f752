"""The rule of each operation by name. Operations without a rule are not followed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from convtap._time import products, rules, views, windows
from convtap._time.axis import LONGEST, TooFine
from convtap._time.join import cat, each_axis, halves
from convtap._time.mark import Mark, unknown
from convtap._time.operation import Op, Rule, not_along, of_input
from convtap._time.views import VIEWS

#: The operations with one relevant input. Each rule is a function of the operation and the mark of that input.
_OF_INPUT = {
    windows.convolution: "convolution _convolution convolution_overrideable mkldnn_convolution",
    windows.pool: "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d_with_indices "
    "avg_pool1d avg_pool2d avg_pool3d mkldnn_max_pool2d",
    windows.adaptive_pool: "_adaptive_avg_pool2d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool1d",
    windows.pad: "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pad",
    windows.roll: "roll",
    windows.upsample: "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d upsample_nearest2d "
    "_upsample_nearest_exact2d upsample_bilinear2d",
    views.fold: "col2im",
    views.unfold: "im2col",
    views.shuffle: "pixel_shuffle pixel_unshuffle",
    products.recurrence: "lstm gru rnn_tanh rnn_relu",
    products.softmax: "_softmax _log_softmax softmax log_softmax _safe_softmax",
    rules.scan: "cumsum cumprod cummax cummin logcumsumexp",
    rules.layer_norm: "native_layer_norm _fused_rms_norm",
    rules.group_norm: "native_group_norm",
    rules.reduction: "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm prod any all "
    "argmax argmin logsumexp nansum nanmean median count_nonzero aminmax",
    not_along(1, -1, "frames were reordered"): "sort argsort",
    not_along(2, -1, "frames were reordered"): "topk kthvalue",
    not_along(1, -1, "one half of the frames gates the other"): "glu",
}

#: The other operations. Each rule is a function of the operation alone.
_OF_ALL: dict[Rule, str] = {
    cat: "cat concat",
    rules.stack: "stack",
    products.product: "mm bmm addmm baddbmm addbmm addmv mv dot _addmm_activation _int_mm",
    products.linear: "linear _linear_pointwise mkldnn_linear linear_dynamic linear_relu",
    products.attention: "scaled_dot_product_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable",
    lambda op: op.mark(op.args[1]): "embedding",  # features are added after the last axis of the indices
    rules.batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "cudnn_batch_norm _batch_norm_no_update miopen_batch_norm",
    rules.scatter: "scatter scatter_add scatter_reduce",
    rules.index_put: "index_put _index_put_impl _unsafe_index_put",
    rules.fourier: "_fft_r2c _fft_c2c _fft_c2r",
    lambda op: None: "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones "
    "new_empty new_full new_empty_strided empty_strided",
    rules.elementwise: "clone contiguous _to_copy to lift_fresh lift_fresh_copy copy masked_fill where triu tril "
    "native_dropout dropout bernoulli rrelu_with_noise _prelu_kernel prelu hardswish log_sigmoid_forward floor_divide "
    "complex polar normal_functional quantize_per_tensor quantize_per_tensor_dynamic dequantize "
    "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask _fused_moving_avg_obs_fq_helper",
}

RULES: dict[str, Rule] = {
    **{name: of_input(rule) for rule, names in _OF_INPUT.items() for name in names.split()},
    **{name: rule for rule, names in _OF_ALL.items() for name in names.split()},
    **VIEWS,
}

#: Operations that write values which depend neither on the old values nor on the input.
CONSTANT = {"fill", "zero", "uniform", "normal", "random", "exponential"}


def rule_for(func: Any, name: str) -> Rule | None:
    """Returns the rule of an operation, or None if it is not followed."""
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in getattr(func, "tags", ()):
        return rules.elementwise
    return rule


def apply(op: Op) -> Mark | None:
    """Returns the mark of an operation's result."""
    rule = rule_for(op.func, op.name)
    if rule is None:
        return unknown(f"{op.what} is not followed")
    try:
        found = _by_axis(rule, op)
    except TooFine:
        return unknown(f"{op.what}: more than {LONGEST} frames before the rate repeats itself")
    if found is None or found.zeroed is None or op.name in VIEWS or op.name in rules.KEEP_ZEROS:
        return found
    return replace(found, zeroed=None)


def _by_axis(rule: Rule, op: Op) -> Mark | None:
    """Runs a rule, for each of two time axes if a mark has two.

    See Note: [Frames against frames].
    """
    marked = [(tensor.dim(), mark) for tensor in op.tensors() if (mark := op.mark(tensor)) is not None]
    matrices = [(rank, halves(mark)) for rank, mark in marked if mark.across]
    if not matrices:
        return rule(op)
    rank, pair = matrices[0]

    def number_of(mark: Mark, value: Any) -> int:
        """Returns to which of the two axes the time axis of another argument belongs."""
        dims = {dim - value.dim() for dim in mark.dims}
        if RULES.get(op.name) is products.product:  # the matrix's axis that is summed over
            dims = {-2} if value is op.args[products.AHEAD.get(op.name, 0)] else {-1}
        return next((i for i, half in enumerate(pair) if {dim - rank for dim in half.dims} == dims), 0)

    def seen(number: int) -> Mark | None:
        def mark_of(value: Any) -> Mark | None:
            mark = op.mark(value)
            if mark is not None and mark.across is not None:
                return halves(mark)[number]
            if mark is None or mark.unknown or number_of(mark, value) == number:
                return mark
            return replace(mark, digits=(), edge=None)

        return rule(replace(op, mark=mark_of, partner=pair[1 - number]))

    return each_axis(seen, op.what)
