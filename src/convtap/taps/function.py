"""Taps calls of ``F.conv1d``: convolutions that no module's hook sees, named after the owner of their weight."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convtap._owners import Owners
from convtap._passes import Passes
from convtap._record import Recorder
from convtap._select import CONV1D, FUNCTION, Selection
from convtap._structure import walk_tensors
from convtap._torch import modes
from convtap._torch.call_stack import called_conv1d, module_calls
from convtap.taps.activation import Follower

_aten = torch.ops.aten

#: What runs a 1-D convolution when its weight has three axes, and which of its arguments says that it is transposed.
_CONVOLUTIONS: dict[Any, int | None] = {
    torch.conv1d: None,
    _aten.conv1d: None,
    _aten.conv1d.default: None,
    _aten.conv1d.padding: None,
    torch.convolution: 6,
    torch._convolution: 6,
    _aten.convolution: 6,
    _aten.convolution.default: 6,
    _aten._convolution: 6,
    _aten._convolution.default: 6,
    _aten._convolution.deprecated: 6,
}

_frame = sys._getframe

# Note: [What reads a weight]
# Assumption: a kernel that computes a convolution by itself takes the weight through some torch call first (squeeze, to,
#   T, data_ptr, …).
# Failure: so do harmless things: shapes are asked, weights are initialized or renormalized in place.
# Choice: attributes count only if they give the values; methods count unless they are in this list or end in ``_``.
_GETTERS = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")}
_METADATA = frozenset(
    (  # noqa: SIM905 (thirty quoted words read worse)
        "size dim ndimension numel nelement stride storage_offset is_contiguous element_size is_floating_point is_complex "
        "is_signed is_conj is_neg is_inference is_pinned is_shared is_set_to get_device has_names type dim_order "
        "new_ones new_zeros new_empty new_full new_tensor zeros_like ones_like empty_like full_like rand_like randn_like "
        "type_as result_type expand_as view_as reshape_as storage untyped_storage "
        "register_hook register_post_accumulate_grad_hook retain_grad backward _is_view "
        "__len__ __hash__ __repr__ __format__ __bool__ __deepcopy__ __reduce_ex__ __setstate__ __set__ __delete__"
    ).split()
)


# These alone are no use of the values, but what they give may be used.
_PASSING_ON = frozenset(("detach", "cpu", "data"))


def _reads_values(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func in _GETTERS
    return name not in _METADATA and not (name.endswith("_") and not name.endswith("__"))


class FunctionTap:
    """Emits the convolutions that are called as functions, and notices weights that something else reads."""

    def __init__(
        self,
        selection: Selection,
        recorder: Recorder,
        passes: Passes,
        token: modes.Token,
        *,
        at: str,
        follower: Follower | None,
    ) -> None:
        self._token = token
        self._selection = selection
        self._recorder = recorder
        self._passes = passes
        self._at = at
        self._follower = follower
        self._name_of = selection.name_of
        self._owners = Owners(selection.tree)
        self._wanted: dict[str, bool] = {}
        self._weights: dict[int, str] = {}
        self._derived: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._thread: int | None = None
        self._dead: list[Any] = []
        self._kept: list[Tensor] = []

    def open(self) -> None:
        """Begins to watch this thread's torch calls."""
        weights, keep = self._weights, self._kept.append  # kept so that no identity is used again
        for name, module in self._selection.modules.items():
            if isinstance(module, CONV1D):
                weight = module._parameters.get("weight")
                if weight is not None:
                    weights[id(weight)] = name
                    keep(weight)
                else:
                    sources = _sources_of_weight(module)
                    weights.update((id(source), name) for source in sources)
                    self._kept += sources
        self._passes.companion = self
        self._thread = threading.get_ident()  # first: see Note: [Interrupts]
        self.visit()

    def close(self) -> None:
        """Ends it."""
        self._passes.companion = None
        if self._thread is not None:
            modes.functions.end(self._token, self._thread)
        self._derived.clear()
        self._kept.clear()

    def visit(self) -> int:
        """Begins to watch another thread, in which a pass of this block runs."""
        if self._follower is not None:
            return modes.functions.begin(self._token, self._watch_and_follow)
        return modes.functions.begin(self._token, self._watch, (_CONVOLUTIONS, self._weights))

    def leave(self, visit: int) -> None:
        """Ends that."""
        modes.functions.end(self._token, visit)

    def _watch(self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _CONVOLUTIONS:
            if len(args) > 1 and id(args[1]) in self._weights and id(called_conv1d(_frame(2))) in self._name_of:
                # the usual case: a module that was called, whose hook emits it
                return call(*args, **kwargs) if kwargs else call(*args)
            if not self._recorder.muted:
                return self._convolution(call, func, args, kwargs)
        result = call(*args, **kwargs)
        self._look_for_reads(func, args, kwargs, result)
        return result

    def _watch_and_follow(
        self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = self._watch(call, func, args, kwargs)
        if self._follower is None or self._recorder.muted:
            return result
        replacement = self._follower.see(func, args, kwargs, result)
        return result if replacement is None else replacement

    def _look_for_reads(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for arg in (*args, *kwargs.values()):
            for item in arg if arg.__class__ in modes.SEQUENCES else (arg,):
                name = self._weights.get(id(item))
                if name is not None and self._is_stale(id(item), item):
                    self._forget(id(item))
                elif name is not None:
                    self._read(name, func, result)

    # -- convolutions

    def _convolution(self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if not isinstance(weight, Tensor) or not _is_one_dimensional(func, weight, args, kwargs):
            return call(*args, **kwargs)
        enclosing = None if self._recorder.claimed else self._enclosing()
        if self._selection.tree.has_keras and weight.device.type == "meta":
            enclosing = None  # Keras asks for shapes
        name = None if enclosing is None else self._name(weight, enclosing)
        if name is None:
            return call(*args, **kwargs)
        if self._at == "input":
            self._recorder.emit_input(name, args[0] if args else kwargs.get("input"), "function")
            return call(*args, **kwargs)
        output = call(*args, **kwargs)
        replacement = self._recorder.emit(name, output, "function", (args, kwargs))
        return output if replacement is None else replacement

    def _enclosing(self) -> list[str] | None:
        """Returns the selected modules around the call, innermost first, or None if the TorchScript tap emits it."""
        found: list[str] = []
        name_of = self._name_of
        root = self._selection.tree.model
        innermost = True
        for module, _ in module_calls(sys._getframe(3)):
            if innermost and isinstance(module, torch.jit.ScriptModule):
                return None
            innermost = False
            name = name_of.get(id(module))
            if name is not None:
                found.append(name)
            if module is root:
                break
        return found

    def _name(self, weight: Tensor, enclosing: list[str]) -> str | None:
        """Returns the name to record a convolution under, or None if it is not selected or not the model's.

        Nor if a module around it emits it: the owner of the weight, or a convolution that computes the weight itself or
        takes one of its own parameters.
        """
        name = self._owners.find(weight, self._passes.number)
        if name in enclosing:
            return None
        for around in enclosing:
            is_own = name is None or (name.rpartition(".")[0] == around and name not in self._selection.tree.names)
            if is_own and isinstance(self._selection.modules[around], CONV1D):
                return None
        if name is None:
            if not self._passes.in_method() or self._is_inside_conv1d():
                return None
            name = FUNCTION
            derived = self._derived.get(id(weight))
            if derived is not None and derived[0]() is weight:
                self._recorder.seen_as_function(derived[1])
        wanted = self._wanted.get(name)
        if wanted is None:
            wanted = self._wanted[name] = self._selection.wants(name)
        return name if wanted else None

    def _is_inside_conv1d(self) -> bool:
        """Whether a Conv1d that is not selected is being called: what it computes its weight for is its own affair."""
        return any(isinstance(module, CONV1D) for module, _ in module_calls(sys._getframe(4)))

    def _is_called(self, name: str) -> bool:
        """Whether a selected layer is being called: then its hook emits what it returns, or it raises."""
        layer = self._selection.modules.get(name)
        return any(module is layer for module, _ in module_calls(sys._getframe(4)))

    # -- reads

    def _read(self, name: str, func: Any, result: Any) -> None:
        recorder = self._recorder
        if recorder.muted or not _reads_values(func) or not self._passes.in_forward() or not recorder.is_here(name):
            return
        reader = _function_name(func)
        if reader.rpartition(".")[2] not in _PASSING_ON and not self._is_called(name):
            recorder.weight_read(name, reader)
        for _, tensor in walk_tensors(result):
            self._derive(tensor, name)

    def _derive(self, tensor: Tensor, name: str) -> None:
        """Follows a tensor computed from a weight, so that a convolution with it is known to be that layer's."""
        key = id(tensor)
        if len(self._dead) > 64:
            self._dead.clear()
            for other, (known, _) in list(self._derived.items()):
                if known() is None:
                    self._forget(other)
        if key not in self._weights or self._is_stale(key, tensor):
            # The callback is no Python code: Python loses an interrupt that strikes in one.
            self._derived[key] = (weakref.ref(tensor, self._dead.append), name)
            self._weights[key] = name

    def _is_stale(self, key: int, tensor: Any) -> bool:
        """Whether what is known under an identity is a computed weight that is gone, and the tensor another one."""
        derived = self._derived.get(key)
        return derived is not None and derived[0]() is not tensor

    def _forget(self, key: int) -> None:
        self._derived.pop(key, None)
        self._weights.pop(key, None)


def _sources_of_weight(module: nn.Module) -> list[Tensor]:
    """The parameters that a convolution without a ``weight`` of its own computes it from."""
    parametrizations = module._modules.get("parametrizations")
    if isinstance(parametrizations, nn.ModuleDict) and "weight" in parametrizations:
        return list(parametrizations["weight"].parameters())
    return [tensor for key, tensor in module._parameters.items() if key.startswith("weight") and tensor is not None]


def _is_one_dimensional(func: Any, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    position = _CONVOLUTIONS[func]
    if position is None:
        return True
    transposed = args[position] if len(args) > position else kwargs.get("transposed", False)
    return weight.dim() == 3 and not transposed


@functools.lru_cache(256)  # torch takes 20 µs to look a name up
def _function_name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return f"Tensor.{getattr(getattr(func, '__self__', None), '__name__', name)}"
    return str(torch.overrides.resolve_name(func) or name)
