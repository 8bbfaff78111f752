"""Compares two captures, or two models: how far apart each layer is, and the first one over a tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from convtap._debug.compare_models import compare_models
from convtap._debug.comparison import Comparison, Ledger
from convtap._debug.metrics import Tolerance
from convtap._debug.pairs import match
from convtap._errors import InvalidType, InvalidValue
from convtap._public import public
from convtap._result.activations import Activations
from convtap._select.example import Example
from convtap._select.selection import CONV1D, Layers, Types
from convtap._tensors.nested import MISSING, part_of
from convtap._tensors.statistics import shapes

if TYPE_CHECKING:
    from convtap._debug.drift import Drift
    from convtap._result.statistics import Statistics


@overload
def compare(a: Statistics, b: Statistics) -> Drift: ...


@overload
def compare(
    a: nn.Module | Activations,
    b: nn.Module | Activations,
    *,
    example: Example | None = None,
    map: Mapping[str, str] | None = None,
    layers: Layers = None,
    types: Types = CONV1D,
    atol: float | None = None,
    rtol: float | None = None,
    sqnr_db: float | None = None,
    mode: Literal["eval", "train"] | None = "eval",
) -> Comparison: ...


@public
def compare(
    a: nn.Module | Activations | Statistics,
    b: nn.Module | Activations | Statistics,
    *,
    example: Example | None = None,
    map: Mapping[str, str] | None = None,
    layers: Layers = None,
    types: Types = CONV1D,
    atol: float | None = None,
    rtol: float | None = None,
    sqnr_db: float | None = None,
    mode: Literal["eval", "train"] | None = "eval",
) -> Comparison | Drift:
    """Compares two captures, or two models on an example, and marks the first layer over the tolerance.

    Two models run side by side, without gradients, and stop at each layer, so that no more than the outputs
    being compared is held. A compiled model runs compiled, through ``torch.compile(tapped(model))``, which holds all of its
    outputs. The row ``<output>`` compares what the models return when they are run without taps. ``a`` is the reference.

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
        a: the reference: a model, or what a block captured (``load(path)`` too); or statistics.
        b: what to compare with it, of the same kind.
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

    Raises:
        InvalidType: the sides are not of one kind.
        InvalidValue: models without an example, or no layer has a partner.
        LayerNotFound: ``map`` or ``layers`` names a layer that is not there, or a model has no layer of ``types``.
        Unsupported: a compiled side cannot run compiled here.
    """
    tolerance = Tolerance(*(_tolerance(name, v) for name, v in (("atol", atol), ("rtol", rtol), ("sqnr_db", sqnr_db))))
    if mode not in ("eval", "train", None):
        raise InvalidValue(f"mode={mode!r} is none of 'eval', 'train', None.")
    if isinstance(a, Activations) and isinstance(b, Activations):
        return _compare_captures(a, b, map, tolerance)
    if isinstance(a, nn.Module) and isinstance(b, nn.Module):
        if example is None:
            raise InvalidValue("two models are compared on an example. Write: compare(a, b, example=x)")
        return compare_models(a, b, example, map, layers, types, tolerance, mode)
    if not isinstance(a, (nn.Module, Activations)):
        from convtap._debug.drift import drift_of, is_statistics  # which no other comparison needs

        if is_statistics(a) and is_statistics(b):
            asked = {"example": example, "map": map, "layers": layers, "atol": atol, "rtol": rtol, "sqnr_db": sqnr_db}
            return drift_of(a, b, [name for name, value in asked.items() if value is not None])
    raise InvalidType(
        f"compare takes two models or two captures (or two statistics), and got {type(a).__name__} and "
        f"{type(b).__name__}. Capture both first "
        "(with capture(model) as acts: model(x)), load both from files (load(path)), or pass both models with an example."
    )


def _compare_captures(a: Activations, b: Activations, map: Any, tolerance: Tolerance) -> Comparison:
    pairs, note = match(_structure(a, b), _structure(b, a), map)
    ledger = Ledger(pairs, tolerance)
    ledger.parts.update({call.name: call.part for acts in (a, b) for call in acts.calls()})
    theirs = {(name, index): output for name, index, output in _outputs(b, a)}
    for name, index, output in _outputs(a, b):
        partner = (pairs.get(name, ""), index)
        if partner in theirs:
            ledger.compare(name, partner[0], index, output, theirs.pop(partner))
        else:
            ledger.lone(0, name, index)
    for name, index in theirs:
        ledger.lone(1, name, index)
    return ledger.close([note])


def _outputs(acts: Activations, other: Activations) -> Iterator[tuple[str, int, Any]]:
    """Yields name, number and output of each call; of what the other side has in part only, the same parts."""
    parts: dict[str, dict[str, None]] = {}
    for call in other.calls():
        if call.part:
            parts.setdefault(call.layer, {})[call.part] = None
    for call in acts.calls():
        for part in parts.get(call.layer, ("",)) if not call.part else ("",):
            found = part_of(call.output, part)
            if found is not MISSING:
                yield call.name + part, call.index, found


def _structure(acts: Activations, other: Activations) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for name, _, output in _outputs(acts, other):
        found.setdefault(name, []).append(shapes(output))
    return found


def _tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidType(f"{name} is a {type(value).__name__}, and it must be a number: {name}=1e-3.")
    if not (name == "sqnr_db" or value >= 0) or value != value:
        raise InvalidValue(f"{name}={value} is no tolerance: it must be at least 0.")
    return float(value)
