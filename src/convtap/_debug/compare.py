"""The public ``compare``, which finds the first layer where two sides differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from convtap._debug.compare_captures import compare_captures
from convtap._debug.compare_models import compare_models
from convtap._debug.comparison import Comparison
from convtap._debug.metrics import Tolerance
from convtap._errors import InvalidType, InvalidValue
from convtap._public import public
from convtap._result.activations import Activations
from convtap._select.example import Example
from convtap._select.selection import CONV1D, Layers, Types

if TYPE_CHECKING:
    from convtap._debug.drift import Drift
    from convtap._result.statistics import Statistics


@overload
def compare(a: Statistics, b: Statistics) -> Drift: ...


@overload
def compare(
    a: nn.Module | Activations | Mapping[str, Any],
    b: nn.Module | Activations | Mapping[str, Any],
    *,
    example: Example | None = None,
    map: Mapping[str, str] | None = None,
    layers: Layers = None,
    types: Types = CONV1D,
    atol: float | None = None,
    rtol: float | None = None,
    sqnr_db: float | None = None,
    mode: Literal["eval", "train"] | None = "eval",
    calls: Literal["keys", "cat"] = "keys",
) -> Comparison: ...


@public
def compare(
    a: nn.Module | Activations | Mapping[str, Any] | Statistics,
    b: nn.Module | Activations | Mapping[str, Any] | Statistics,
    *,
    example: Example | None = None,
    map: Mapping[str, str] | None = None,
    layers: Layers = None,
    types: Types = CONV1D,
    atol: float | None = None,
    rtol: float | None = None,
    sqnr_db: float | None = None,
    mode: Literal["eval", "train"] | None = "eval",
    calls: Literal["keys", "cat"] = "keys",
) -> Comparison | Drift:
    """Compares two models or captures and finds the first layer over a tolerance.

    ``a`` is the reference. Two models run side by side on ``example``, without gradients. Both pause at each layer, so that
    memory holds only the outputs under comparison. A compiled model runs compiled, as ``torch.compile(tapped(model))``,
    which holds all of its outputs. The row ``<output>`` compares the outputs of the models when they run without taps.

    Two captures are compared call by call. A mapping from names to arrays can replace one of them, to compare a capture with
    the outputs of another runtime.

    Two ``Statistics`` of one model over two data sets are compared channel by channel, without other arguments. The result is
    then a ``Drift``.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import compare
        >>> _ = torch.manual_seed(0)
        >>> a = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3)).eval()
        >>> b = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3)).eval()
        >>> _ = b.load_state_dict(a.state_dict())
        >>> compare(a, b, example=torch.randn(1, 1, 50)).first is None
        True
        >>> b[2].bias.data += 0.5
        >>> compare(a, b, example=torch.randn(1, 1, 50)).first.name
        '2'

    Args:
        a: the reference: a model, a capture (also one from ``load(path)``), or statistics.
        b: the other side, of the same kind. If one side is a capture, the other may be a mapping from names (``conv1``,
            ``conv1#0``, ``lstm[0]``) to NumPy arrays or tensors, such as the outputs of ONNX Runtime.
        example: for models: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments. Each model
            receives the floating-point tensors in its own type and on its own device.
        map: a mapping from names in ``a`` to names in ``b``, for layers whose names differ. Other layers are paired by name,
            or by order if the names differ and the structures match.
        layers: for models: the layers of ``a`` to compare, as in ``capture``.
        types: for models: the module types that selectors choose from.
        atol: the absolute tolerance: every element must have |a − b| ≤ atol + rtol · |a|.
        rtol: the relative tolerance, see ``atol``. If only one of the two is passed, the other is 0.
        sqnr_db: the minimum signal to quantization noise ratio of a layer, in dB. Without ``atol``, ``rtol`` and
            ``sqnr_db``, a layer's relative error ‖a − b‖ / ‖a‖ must be at most √ε of the coarsest type so far: 3.5e-4 for
            float32, 0.09 for bfloat16, 0.06 for eight bits.
        mode: for models: ``"eval"``, ``"train"``, or None to leave each module in its current mode. Modes and buffers are
            restored afterwards. The result notes if a model was in another mode before.
        calls: for captures: ``"keys"`` compares each call with the call of the same number. ``"cat"`` first joins the calls
            of a layer on their time axis, to compare one long input with its chunks. Of a tensor without a time axis, it
            compares the last call.

    Returns:
        A ``Comparison``, or a ``Drift`` for two ``Statistics``.

    Raises:
        InvalidType: ``a`` and ``b`` are not of the same kind.
        InvalidValue: an option is invalid, models have no example, no layer has a partner, or calls cannot be joined.
        LayerNotFound: ``map`` or ``layers`` names a layer that does not exist, or a model has no layer of ``types``.
        Unsupported: a compiled side cannot run compiled.
    """
    tolerance = Tolerance(*(_tolerance(name, v) for name, v in (("atol", atol), ("rtol", rtol), ("sqnr_db", sqnr_db))))
    if mode not in ("eval", "train", None):
        raise InvalidValue(f"mode={mode!r} is invalid. Pass 'eval', 'train' or None.")
    if calls not in ("keys", "cat"):
        raise InvalidValue(f"calls={calls!r} is invalid. Pass 'keys', or 'cat' to join the calls of each layer.")
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        if example is None:
            raise InvalidValue("compare needs an example to run two models. Pass one: compare(a, b, example=x).")
        if calls == "cat":
            raise InvalidValue(
                "calls='cat' works for captures only, and a and b are models. Capture both, then compare the captures."
            )
        return compare_models(a, b, example, map, layers, types, tolerance, mode)
    is_one_captured = isinstance(a, Activations) or isinstance(b, Activations)
    if is_one_captured and isinstance(a, Mapping) and isinstance(b, Mapping):  # a capture is a mapping as well
        return compare_captures(a, b, map, tolerance, calls)
    if not isinstance(a, (nn.Module, Activations)):
        from convtap._debug.drift import drift_of, is_statistics  # imported here, since only statistics need it

        if is_statistics(a) and is_statistics(b):
            given = {"example": example, "map": map, "layers": layers, "atol": atol, "rtol": rtol, "sqnr_db": sqnr_db}
            return drift_of(a, b, [name for name, value in given.items() if value is not None])
    raise InvalidType(
        f"compare got {type(a).__name__} and {type(b).__name__}, which are not two models, two captures or two statistics. "
        "Capture both first (with capture(model) as acts: model(x)), load both from files (load(path)), pass two models with "
        "an example, or pass a capture and arrays by name: compare(acts, {'conv1': array})."
    )


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} is a {type(value).__name__}. Pass a number: {name}=1e-3.")
    if not (name == "sqnr_db" or value >= 0) or value != value:
        raise InvalidValue(f"{name}={value} is not a tolerance. Pass a number of at least 0: {name}=1e-3.")
    return float(value)
