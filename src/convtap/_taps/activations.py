"""Follows a convolution's output to the first activation that consumes it."""

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

#: The names of functions that are activations. ``F.relu``, ``torch.relu``, ``Tensor.relu_`` and ``aten.relu`` share one.
ACTIVATIONS = frozenset(
    (  # noqa: SIM905 (forty quoted words read worse)
        "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish glu hardtanh hardswish hardsigmoid hardshrink "
        "softshrink tanhshrink threshold softplus softsign softmax softmin log_softmax sigmoid tanh logsigmoid log_sigmoid"
    ).split()
)

#: Functions whose result still counts as the convolution's output: normalization, dropout, reshapes, slices and casts.
TRANSPARENT = frozenset(
    (  # noqa: SIM905
        "batch_norm layer_norm group_norm instance_norm rms_norm normalize local_response_norm native_batch_norm "
        "native_layer_norm native_group_norm dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d native_dropout "
        "feature_dropout transpose t permute movedim moveaxis swapaxes swapdims contiguous view reshape view_as reshape_as "
        "flatten unflatten squeeze unsqueeze clone detach to type float half bfloat16 double type_as expand __getitem__ "
        "narrow slice pad constant_pad_nd unbind chunk split requires_grad mT T"
    ).split()
)
#: Functions that are an activation if they clamp at zero (``clamp(min=0)`` is a ReLU). Else they limit values to a range.
_CLAMPS = frozenset(("clamp", "clamp_min", "clamp_max", "clip"))
_PRODUCTS = frozenset(("mul", "multiply", "__mul__", "__rmul__", "__imul__"))
_ADDITIONS = frozenset(("add", "__add__", "__radd__", "__iadd__", "sub", "__sub__", "__isub__"))

#: The modules of Keras that define activation layers, and those that define normalization and dropout.
_KERAS_ACTIVATIONS = ("keras.src.layers.activations.",)
_KERAS_TRANSPARENT = ("keras.src.layers.normalization.", "keras.src.layers.regularization.")

# Note: [Following a tensor]
# Assumption: a tensor passes from one call to the next as the same Python object, and the function mode sees the arguments
#   of every call. Hooks see the arguments of modules that count as activations, and of modules without submodules whose
#   type is called ...Norm. Keras computes normalization, and some activations, as sums and products, so a shim sees the
#   arguments of its layers of those kinds.
# Failure: Python reuses the number that identifies an object, and a call that consumes a tensor need not be an activation.
# Choice: a tensor is identified by its number as long as a weak reference to it lives. A call that consumes the tensor
#   continues the search with its result (TRANSPARENT, an added parameter or number), ends the search (an activation), or
#   is a branch that leads elsewhere. convtap counts a search that no activation ends.


class _Search:
    """One convolution's output on its way to an activation."""

    __slots__ = ("done", "gate", "name", "via")

    def __init__(self, name: str, via: str) -> None:
        self.name = name
        self.via = via
        self.done = False
        self.gate: Callable[[], Any] = _nothing  # the result of an activation, which may multiply its own input


def _nothing() -> None:
    return None


class Follower:
    """Follows the outputs that a tap emits, each until an activation consumes it."""

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
        """Registers hooks on the modules that are followed as a whole.

        Keras layers have the shims of ``KerasTap`` instead.
        """
        for module in self._modules.values():
            is_activation = isinstance(module, self._activations)
            kind = type(module)
            own_norm = "Norm" in kind.__name__ and not module._modules and not kind.__module__.startswith("torch.nn.")
            if (is_activation or own_norm) and not is_keras(kind):
                self._hooks.before(module, self._enter)
                self._hooks.after(module, self._leave, is_activation, always=True)

    def close(self) -> None:
        """Removes the hooks."""
        self._hooks.remove()
        self._followed.clear()

    def emit(self, name: str, output: Any, via: str) -> None:
        """Starts to follow a convolution's output, or the first tensor in a structure."""
        search = _Search(name, via)
        for _, tensor in walk_tensors(output):
            self._follow(tensor, search)
            break

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Inspects a torch call. Returns a replacement for its result, or None."""
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
        """Follows an activation's result, to see products such as ``y * sigmoid(y)``."""
        if isinstance(gate, Tensor):
            search.gate = weakref.ref(gate)
            self._follow(gate, search)

    def _gated(self, name: str, given: tuple[Any, ...], result: Any, inputs: Any) -> Any:
        """Records a product such as ``y * sigmoid(y)`` in place of the sigmoid."""
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
        """Returns whether the added value is a number or a parameter."""
        others = [arg for arg in args[:2] if id(arg) not in self._followed]
        return all(not isinstance(other, Tensor) or self._owners.find(other) is not None for other in others) and bool(
            others
        )

    # -- modules that are followed as a whole

    def keras_layers(self) -> list[tuple[nn.Module, bool]]:
        """Returns the Keras layers to follow as a whole, and which are activations."""
        layers = [module for module in self._modules.values() if is_keras(type(module))]
        roles = [(layer, self._is_keras_activation(layer)) for layer in layers]
        return [(layer, is_activation) for layer, is_activation in roles if is_activation or _is_transparent(layer)]

    def _is_keras_activation(self, layer: nn.Module) -> bool:
        return isinstance(layer, self._activations) or (_is_of(layer, _KERAS_ACTIVATIONS) and not _is_linear(layer))

    def around(
        self, is_activation: bool, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a layer that is followed as a whole. Returns its output or a replacement."""
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
        """Continues a search with a module's output, if the module took a followed tensor."""
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
    """Returns whether a Keras layer has the activation ``linear``, the identity."""
    return getattr(getattr(layer, "activation", None), "__name__", "") == "linear"


def _is_transparent(layer: nn.Module) -> bool:
    """Returns whether a Keras layer does the same as a function of TRANSPARENT.

    A layer that contains layers is followed inside instead.
    """
    if getattr(layer, "_layers", ()):
        return False
    return "Norm" in type(layer).__name__ or _is_of(layer, (*_KERAS_TRANSPARENT, *_KERAS_ACTIVATIONS))


def _cuts_at_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a call of ``clamp`` or ``clamp_min`` has a minimum of zero."""
    least = args[1] if len(args) > 1 else kwargs.get("min")
    return isinstance(least, (int, float)) and least == 0


def check_activations(activations: Any) -> tuple[type[nn.Module], ...]:
    """Returns the module types that the user lists as activations.

    Raises:
        InvalidType: one of them is not a module type.
    """
    types = tuple(activations) if isinstance(activations, (list, tuple, set, frozenset)) else (activations,)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidType(f"activations holds {kind!r}, which is not a module type. Write activations=(Snake1d,).")
    return types
