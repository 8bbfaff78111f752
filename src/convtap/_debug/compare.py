"""Compares two captures, or two models: how far apart each layer is, and the first one over a tolerance."""

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
    """Compares two captures, or two models on an example, and marks the first layer over the tolerance.

    Two models run side by side, without gradients, and stop at each layer, so that no more than the outputs
    being compared is held. A compiled model runs compiled, through ``torch.compile(tapped(model))``, which holds all of its
    outputs. The row ``<output>`` compares what the models return when they are run without taps. ``a`` is the reference.
    A mapping from names to arrays takes the place of one capture, for the outputs of other runtimes.

    Two ``Statistics`` of one model over two data sets are compared by channel, without other arguments. The result is a
    ``Drift``.

    Example:
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
        a: the reference: a model, or a capture (``load(path)`` too), or statistics.
        b: what to compare with it, of the same kind. With a capture on the other side, either may be a mapping from names
            (``conv1``, ``conv1#0``, ``lstm[0]``) to NumPy arrays or tensors, such as the outputs of ONNX Runtime.
        example: with models: a tensor or array, a tuple of positional arguments, or a mapping of keyword arguments. Floating
            tensors in it are given to each model in its own type and on its own device.
        map: names in ``a`` to names in ``b``, for layers whose names differ. Layers that it leaves out are paired by name,
            or by order where the names differ and the structures match.
        layers: with models: which layers of ``a`` to compare, as in ``capture``.
        types: with models: the module types to choose from.
        atol: every element must have |a − b| ≤ atol + rtol · |a|.
        rtol: see ``atol``; one is 0 if only the other is given.
        sqnr_db: the least signal to quantization noise ratio of a layer. With none of the three, a layer's relative error
            ‖a − b‖ / ‖a‖ must be at most √ε of the coarsest type so far: 3.5e-4 for float32, 0.09 for bfloat16, 0.06 for
            eight bits.
        mode: with models: ``"eval"``, ``"train"``, or None for the mode in which each module is. Each gets its own back, and
            buffers are as they were. The result says so if it is not the mode that a model was in.
        calls: with captures: ``"keys"`` compares each call with the call of the same number; ``"cat"`` joins the calls of a
            layer on their time axis first, to compare one long input with its chunks. Tensors without a time axis are then
            those of the last call.

    Raises:
        InvalidType: the sides are not of one kind.
        InvalidValue: models without an example, no layer has a partner, or calls cannot be joined.
        LayerNotFound: ``map`` or ``layers`` names a layer that is not there, or a model has no layer of ``types``.
        Unsupported: a compiled side cannot run compiled here.
    """
    tolerance = Tolerance(*(_tolerance(name, v) for name, v in (("atol", atol), ("rtol", rtol), ("sqnr_db", sqnr_db))))
    if mode not in ("eval", "train", None):
        raise InvalidValue(f"mode={mode!r} is none of 'eval', 'train', None.")
    if calls not in ("keys", "cat"):
        raise InvalidValue(f"calls={calls!r} is not 'keys' or 'cat'. Pass calls='cat' to join the calls of each layer.")
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        if example is None:
            raise InvalidValue("two models are compared on an example. Write: compare(a, b, example=x)")
        if calls == "cat":
            raise InvalidValue(
                "calls='cat' joins the calls of captures, and these are models. Capture both, then compare the captures."
            )
        return compare_models(a, b, example, map, layers, types, tolerance, mode)
    is_one_captured = isinstance(a, Activations) or isinstance(b, Activations)
    if is_one_captured and isinstance(a, Mapping) and isinstance(b, Mapping):  # a capture is a mapping as well
        return compare_captures(a, b, map, tolerance, calls)
    if not isinstance(a, (nn.Module, Activations)):
        from convtap._debug.drift import drift_of, is_statistics  # which no other comparison needs

        if is_statistics(a) and is_statistics(b):
            given = {"example": example, "map": map, "layers": layers, "atol": atol, "rtol": rtol, "sqnr_db": sqnr_db}
            return drift_of(a, b, [name for name, value in given.items() if value is not None])
    raise InvalidType(
        f"compare takes two models, two captures or two statistics, and got {type(a).__name__} and {type(b).__name__}. Capture "
        "both first (with capture(model) as acts: model(x)), load both from files (load(path)), or pass both models with an "
        "example. Arrays are compared with a capture by name: compare(acts, {'conv1': array})."
    )


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} is a {type(value).__name__}, and it must be a number: {name}=1e-3.")
    if not (name == "sqnr_db" or value >= 0) or value != value:
        raise InvalidValue(f"{name}={value} is no tolerance: it must be at least 0.")
    return float(value)
