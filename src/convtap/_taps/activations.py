"""Taps activations: follows an emitted output to the first activation that consumes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from convtap._errors import InvalidType
from convtap._record.recorder import Recorder
from convtap._select.module_tree import is_keras
from convtap._select.weight_owners import Owners
from convtap._tensors.nested import walk_tensors
from convtap._torch.hooks import Hooks

#: Functions that are activations, by name: ``F.relu``, ``torch.relu``, ``Tensor.relu_`` and ``aten.relu`` are one.
ACTIVATIONS = frozenset(
    (  # noqa: SIM905 (forty quoted words read worse)
        "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish glu hardtanh hardswish hardsigmoid hardshrink "
        "softshrink tanhshrink threshold softplus softsign softmax softmin log_softmax sigmoid tanh logsigmoid log_sigmoid"
    ).split()
)

#: Functions that leave a convolution's output what it is: normalized, thinned out, reshaped, cut, cast.
TRANSPARENT = frozenset(
    (  # noqa: SIM905
        "batch_norm layer_norm group_norm instance_norm rms_norm normalize local_response_norm native_batch_norm "
        "native_layer_norm native_group_norm dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d native_dropout "
        "feature_dropout transpose t permute movedim moveaxis swapaxes swapdims contiguous view reshape view_as reshape_as "
        "flatten unflatten squeeze unsqueeze clone detach to type float half bfloat16 double type_as expand __getitem__ "
        "narrow slice pad constant_pad_nd unbind chunk split requires_grad mT T"
    ).split()
)
#: Functions that are an activation if they cut at zero (``clamp(min=0)`` is a ReLU), and else keep values in a safe range.
_CLAMPS = frozenset(("clamp", "clamp_min", "clamp_max", "clip"))
_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__", "__imul__"))
_ADDITIONS = frozenset(("add", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__isub__"))

#: Where Keras defines its activation layers, and the layers that thin out or normalize.
_KERAS_ACTIVATIONS = ("keras.src.layers.activations.",)
_KERAS_TRANSPARENT = ("keras.src.layers.normalization.", "keras.src.layers.regularization.")

# Note: [Following a tensor]
# Assumption: a tensor goes from one call to the next as the same Python object, and every call shows its arguments to the
#   function mode; modules that are named as activations, and modules without parts of a type called ...Norm, show theirs
#   to hooks. Keras writes normalization, and some activations, as sums and products, so its layers of those kinds show
#   theirs to a shim.
# Failure: identity is a number that Python uses again, and what consumes a tensor need not be an activation.
# Choice: tensors are known by identity for as long as a weak reference to them lives. What consumes one makes its result
#   another name of it (TRANSPARENT, an added parameter or number), ends the search (an activation), or is a branch that
#   goes elsewhere. A call that no activation ends is counted as such.


class _Search:
    """One convolution's output on its way to an activation."""

    __slots__ = ("done", "gate", "name", "via")

    def __init__(self, name: str, via: str) -> None:
        self.name = name
        self.via = via
        self.done = False
        self.gate: Callable[[], Any] = _nothing  # what an activation made of it, which may be its own factor


def _nothing() -> None:
    return None


class Follower:
    """Ends each search that a tap begins, or leaves it open: then no activation followed."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        owners: Owners,
        recorder: Recorder,
        activations: tuple[type[nn.Module], ...],
    ) -> None:
        self._modules = modules
        self._owners = owners
        self._recorder = recorder
        self._activations = activations
        self._hooks = Hooks()
        self._followed: dict[int, tuple[weakref.ref[Tensor], _Search]] = {}
        self._inside = 0

    def open(self) -> None:
        """Puts hooks on the modules that are followed as a whole (Keras layers have shims of their own tap)."""
        for module in self._modules.values():
            is_activation = isinstance(module, self._activations)
            kind = type(module)
            own_norm = "Norm" in kind.__name__ and not module._modules and not kind.__module__.startswith("torch.nn.")
            if (is_activation or own_norm) and not is_keras(kind):
                self._hooks.before(module, self._enter)
                self._hooks.after(module, self._leave, is_activation, always=True)

    def close(self) -> None:
        """Takes them off."""
        self._hooks.remove()
        self._followed.clear()

    def emit(self, name: str, output: Any, via: str) -> None:
        """Begins to follow the output of a convolution (of a structure, its first tensor)."""
        search = _Search(name, via)
        for _, tensor in walk_tensors(output):
            self._follow(tensor, search)
            break

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Looks at one torch call. Returns what its caller is to get instead of its result, or None."""
        given = (*args, *kwargs.values()) if kwargs else args
        if self._inside or self._followed.keys().isdisjoint(map(id, given)):
            return None
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        name = name.partition(".")[0]
        name = name if name.startswith("__") else name.strip("_")
        search = self._search(given)
        if search is None:
            return self._gated(name, given, result, (args, kwargs))
        if name in ACTIVATIONS or (name in _CLAMPS and _cuts_at_zero(args, kwargs)):
            replacement = self._found(search, result, (args, kwargs))
            self._remember(search, result if replacement is None else replacement)
            return replacement
        if name in _ADDITIONS and not self._is_bias(args):
            self._recorder.summed.add(search.name)
        if name in TRANSPARENT or name in _CLAMPS or (name in _ADDITIONS and self._is_bias(args)):
            self._follow_all(result, search)
        return None

    def _found(self, search: _Search, output: Any, inputs: Any) -> Any:
        search.done = True
        return self._recorder.record(search.name, output, search.via, inputs)

    def _remember(self, search: _Search, gate: Any) -> None:
        """Follows what an activation made, for the product with its own input: ``y * sigmoid(y)``."""
        if isinstance(gate, Tensor):
            search.gate = weakref.ref(gate)
            self._follow(gate, search)

    def _gated(self, name: str, given: tuple[Any, ...], result: Any, inputs: Any) -> Any:
        """Records the product of a layer's output and of what an activation made of it, in place of that."""
        entries = [(arg, self._followed[id(arg)][1]) for arg in given if id(arg) in self._followed]
        gates = [(arg, search) for arg, search in entries if search.gate() is arg]
        if not gates:
            return None
        search = gates[0][1]
        if name in ACTIVATIONS:
            self._remember(search, result)
        elif name in _PRODUCTS and any(other is search and arg is not gates[0][0] for arg, other in entries):
            self._recorder.withdraw(search.name)
            search.gate = _nothing
            return self._found(search, result, inputs)
        return None

    def _search(self, args: Any) -> _Search | None:
        for arg in args:
            entry = self._followed.get(id(arg))
            if entry is not None and entry[0]() is arg and not entry[1].done:
                return entry[1]
        return None

    def _follow_all(self, result: Any, search: _Search) -> None:
        for _, tensor in walk_tensors(result):
            self._follow(tensor, search)

    def _follow(self, tensor: Tensor, search: _Search) -> None:
        key = id(tensor)
        followed = self._followed

        def forget(reference: Any) -> None:
            if followed.get(key, (None,))[0] is reference:
                del followed[key]

        followed[key] = (weakref.ref(tensor, forget), search)

    def _is_bias(self, args: tuple[Any, ...]) -> bool:
        """Whether what is added is a number or a parameter."""
        others = [arg for arg in args[:2] if id(arg) not in self._followed]
        return all(not isinstance(other, Tensor) or self._owners.find(other) is not None for other in others) and bool(
            others
        )

    # -- modules that are followed as a whole

    def keras_layers(self) -> list[tuple[nn.Module, bool]]:
        """Returns the Keras layers that are followed as a whole, and whether each is an activation."""
        layers = [module for module in self._modules.values() if is_keras(type(module))]
        roles = [(layer, self._is_keras_activation(layer)) for layer in layers]
        return [(layer, is_activation) for layer, is_activation in roles if is_activation or _is_transparent(layer)]

    def _is_keras_activation(self, layer: nn.Module) -> bool:
        return isinstance(layer, self._activations) or (_is_of(layer, _KERAS_ACTIVATIONS) and not _is_linear(layer))

    def around(
        self, is_activation: bool, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a layer that is followed as a whole, and returns what its caller is to get."""
        self._inside += 1
        try:
            output = call(*args, **kwargs)
        finally:
            self._inside -= 1
        replacement = self._consumed(is_activation, (*args, *kwargs.values()), output)
        return output if replacement is None else replacement

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside += 1

    def _leave(self, is_activation: bool, module: nn.Module, args: Any, output: Any) -> Any:
        self._inside = max(0, self._inside - 1)
        return self._consumed(is_activation, args, output)

    def _consumed(self, is_activation: bool, args: tuple[Any, ...], output: Any) -> Any:
        """Goes on with what a module made of its inputs, if one of them is followed."""
        search = self._search(args)
        if search is None:
            return None
        if is_activation:
            return self._found(search, output, args)
        self._follow_all(output, search)
        return None


def _is_of(layer: nn.Module, places: tuple[str, ...]) -> bool:
    return any(f"{base.__module__}.".startswith(places) for base in type(layer).__mro__)


def _is_linear(layer: nn.Module) -> bool:
    """Whether a Keras layer has the activation ``linear``, which returns its input."""
    return getattr(getattr(layer, "activation", None), "__name__", "") == "linear"


def _is_transparent(layer: nn.Module) -> bool:
    """Whether a Keras layer does what TRANSPARENT lists. A layer with layers in it is followed inside."""
    if getattr(layer, "_layers", ()):
        return False
    return "Norm" in type(layer).__name__ or _is_of(layer, (*_KERAS_TRANSPARENT, *_KERAS_ACTIVATIONS))


def _cuts_at_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of ``clamp(x, min, max)`` or ``clamp_min(x, min)`` has a least value of zero."""
    least = args[1] if len(args) > 1 else kwargs.get("min")
    return isinstance(least, (int, float)) and least == 0


def check_activations(activations: Any) -> tuple[type[nn.Module], ...]:
    """Returns the module types that a user names as activations.

    Raises:
        InvalidType: one of them is no module type.
    """
    types = tuple(activations) if isinstance(activations, (list, tuple, set, frozenset)) else (activations,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidType(f"activations holds {kind!r}, which is no module type. Write activations=(Snake1d,).")
    return types
