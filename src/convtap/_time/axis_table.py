"""Which rule of the time axis each operation follows, by its name; what is in no list is not followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from convtap._time import axis_folds as folds
from convtap._time import axis_products as products
from convtap._time import axis_rules as rules
from convtap._time import axis_windows as windows
from convtap._time.axis import LONGEST, TooFine
from convtap._time.axis_join import each_axis, halves
from convtap._time.axis_op import Op
from convtap._time.axis_views import VIEWS, pieces
from convtap._time.mark import Mark, unknown

Rule = Callable[[Op], "Mark | None"]


def _all(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_all(windows.convolution, "convolution _convolution convolution_overrideable mkldnn_convolution"),
    **_all(
        windows.pool, "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d_with_indices"
    ),
    **_all(windows.pool, "avg_pool1d avg_pool2d avg_pool3d mkldnn_max_pool2d"),
    **_all(windows.adaptive_pool, "_adaptive_avg_pool2d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool1d"),
    **_all(windows.pad, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pad"),
    **_all(windows.upsample, "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d"),
    **_all(windows.upsample, "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d"),
    **_all(rules.cat, "cat concat"),
    **_all(rules.stack, "stack"),
    **_all(products.product, "mm bmm addmm baddbmm addbmm addmv mv dot _addmm_activation _int_mm"),
    **_all(products.linear, "linear _linear_pointwise mkldnn_linear linear_dynamic linear_relu"),
    **_all(products.attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    **_all(products.attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_all(
        products.attention,
        "scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable",
    ),
    **_all(products.recurrence, "lstm gru rnn_tanh rnn_relu"),
    **_all(rules.embedding, "embedding"),
    **_all(products.over, "_softmax _log_softmax softmax log_softmax _safe_softmax"),
    **_all(rules.scan, "cumsum cumprod cummax cummin logcumsumexp"),
    **_all(rules.layer_norm, "native_layer_norm _fused_rms_norm"),
    **_all(rules.group_norm, "native_group_norm"),
    **_all(rules.batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    **_all(rules.batch_norm, "cudnn_batch_norm _batch_norm_no_update miopen_batch_norm"),
    **_all(
        rules.reduction, "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm prod any all"
    ),
    **_all(rules.reduction, "argmax argmin logsumexp nansum nanmean median count_nonzero aminmax"),
    **_all(rules.ordering, "sort topk argsort kthvalue"),
    **_all(rules.glu, "glu"),
    **_all(rules.scatter, "scatter scatter_add scatter_reduce"),
    **_all(rules.index_put, "index_put _index_put_impl _unsafe_index_put"),
    **_all(folds.roll, "roll"),
    **_all(folds.fold, "col2im"),
    **_all(folds.unfold, "im2col"),
    **_all(folds.shuffle, "pixel_shuffle pixel_unshuffle"),
    **_all(rules.fourier, "_fft_r2c _fft_c2c _fft_c2r"),
    **_all(rules.nothing, "zeros_like ones_like empty_like full_like rand_like randn_like randint_like"),
    **_all(rules.nothing, "new_zeros new_ones new_empty new_full new_empty_strided empty_strided"),
    **_all(rules.elementwise, "clone contiguous _to_copy to lift_fresh lift_fresh_copy masked_fill where bernoulli"),
    **_all(rules.elementwise, "native_dropout dropout _prelu_kernel prelu hardswish log_sigmoid_forward floor_divide"),
    **_all(rules.elementwise, "complex polar quantize_per_tensor dequantize fake_quantize_per_tensor_affine"),
    **_all(rules.elementwise, "rrelu_with_noise copy triu tril quantize_per_tensor_dynamic normal_functional"),
    **_all(rules.elementwise, "fake_quantize_per_tensor_affine_cachemask _fused_moving_avg_obs_fq_helper"),
    **VIEWS,
}

#: What these write does not depend on what was there, nor on the input.
CONSTANT = {"fill", "zero", "uniform", "normal", "random", "exponential"}


def rule_for(func: Any, name: str) -> Rule | None:
    """Returns the rule of an operation, or None if it is not followed."""
    rule = RULES.get(name)
    if rule is None and torch.Tag.pointwise in getattr(func, "tags", ()):
        return rules.elementwise
    return rule


def apply(func: Any, op: Op) -> Mark | None:
    """Returns what is known of the result of an operation, from what is known of its arguments."""
    rule = rule_for(func, op.name)
    if rule is None:
        return unknown(f"{op.what} is not followed")
    try:
        found = _by_axis(rule, op)
        kept = found is None or found.zeroed is None or op.name in VIEWS or op.name in rules.KEEP_ZEROS
        return found if kept else replace(found, zeroed=None)  # type: ignore[type-var]
    except TooFine:
        return unknown(f"{op.what}: more than {LONGEST} frames before the rate repeats itself")


def apply_pieces(op: Op) -> list[Mark | None]:
    """Returns what is known of each result of ``split``, ``chunk`` and ``unbind``."""
    mark = op.mark(op.args[0])
    if mark is None or mark.across is None:
        return pieces(op, mark)
    first, second = (pieces(op.seen_as(lambda value, one=one: one), one) for one in halves(mark))  # type: ignore[misc]
    return [each_axis([a, b].__getitem__, op.what) for a, b in zip(first, second, strict=True)]


def _by_axis(rule: Rule, op: Op) -> Mark | None:
    """Runs a rule; of frames against frames for each of the two axes. See Note: [Frames against frames]."""
    tensors = op.tensors()
    matrices = [
        (tensor.dim(), halves(mark)) for tensor in tensors if (mark := op.mark(tensor)) is not None and mark.across
    ]
    if not matrices:
        return rule(op)

    def seen(number: int) -> Mark | None:
        def mark_of(value: Any) -> Mark | None:
            mark = op.mark(value)
            if mark is None or mark.unknown:
                return mark
            if mark.across is not None:
                return halves(mark)[number]
            if _axis_of(mark, value, op, matrices) == number:
                return mark
            return replace(mark, digits=(), edge=None)

        return rule(op.seen_as(mark_of, matrices[0][1][1 - number]))

    return each_axis(seen, op.what)


def _axis_of(mark: Mark, value: Any, op: Op, matrices: list[tuple[int, tuple[Mark, Mark]]]) -> int:
    """To which of the two axes the time axis of another argument belongs."""
    rank, pair = matrices[0]
    dims = {dim - value.dim() for dim in mark.dims}
    if RULES.get(op.name) is products.product:
        dims = (
            {-2} if value is op.args[products.AHEAD.get(op.name, 0)] else {-1}
        )  # the matrix's axis that is summed over
    return next((i for i, half in enumerate(pair) if {dim - rank for dim in half.dims} == dims), 0)
