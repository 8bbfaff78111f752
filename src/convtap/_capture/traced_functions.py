"""Records the functional convolutions of a tapped model in a traceable way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from convtap._capture.traced_hooks import Sink, is_convolution, keep_value
from convtap._record.policy import Policy
from convtap._select.module_tree import parameter_name
from convtap._select.selection import FUNCTION, Selection
from convtap._torch.convolution_key import FUNCTIONS

# Note: [Functions in a trace]
# Assumption: Dynamo and exporters trace a function mode with the model, and a weight stays the same object meanwhile.
# Failure: the kernels that ``capture`` uses lie below Python, where Dynamo does not look. A mode switches off the fast path
#   of ``nn.TransformerEncoder`` and its parts, so that values differ in the last digits. The mode also sees the
#   convolution in a layer's own call.
# Choice: the mode is on while a tapped model's own forward runs. If the model has such a fast path, the mode is on only if
#   a selected kernel belongs to a module that is not torch's. A layer notes that it runs, and owns its convolution.

_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True)
class Kernel:
    """A tensor that may be a convolution's weight, known by its place in a module.

    Attributes:
        module: the module that holds it.
        kept: the module's dictionary that holds it: ``"_parameters"``, ``"_buffers"``, or ``"__dict__"`` for a plain
            attribute.
        key: its key in that dictionary.
        name: the name of its convolution.
        wanted: whether that convolution is selected.
    """

    module: nn.Module
    kept: str
    key: str
    name: str
    wanted: bool

    def tensor(self) -> Any:
        """Returns the tensor that the module holds there now."""
        if self.kept == "__dict__":
            return getattr(self.module, self.key, None)
        tensors = self.module._parameters if self.kept == "_parameters" else self.module._buffers
        return tensors.get(self.key)

    def is_now(self, weight: Any) -> bool:
        """Returns whether a tensor is this kernel."""
        return self.tensor() is weight


@dataclass(frozen=True)
class Kernels:
    """The tensors that may be weights of a model's convolutions.

    Attributes:
        known: the kernels.
        takes_others: whether convolutions with other weights are selected.
        layers: the convolution layers that their weight does not identify, since it is computed or belongs to another layer.
    """

    known: tuple[Kernel, ...]
    takes_others: bool
    layers: dict[str, nn.Module]

    def by_identity(self) -> dict[int, Kernel]:
        """Returns the kernels by tensor identity, the first one of each shared tensor."""
        return {id(kernel.tensor()): kernel for kernel in reversed(self.known)}

    def name_of(self, weight: Any, likely: Kernel | None = None) -> str | None:
        """Returns the name of a convolution with this weight; None if not selected.

        Args:
            weight: the tensor.
            likely: the kernel to look at first.
        """
        for kernel in self.known if likely is None or not likely.is_now(weight) else (likely,):
            if kernel.is_now(weight):
                return kernel.name if kernel.wanted else None
        return FUNCTION if self.takes_others else None


def kernels_of(selection: Selection) -> Kernels | None:
    """Returns the kernels of a model, or None if the mode has to stay off.

    See Note: [Functions in a trace].
    """
    tree = selection.tree
    known = [
        Kernel(module, kept, key, (name := parameter_name(owner, key)), selection.wants(name))
        for owner, module in tree.names.items()
        for kept, tensors in (
            ("_parameters", module._parameters),
            ("_buffers", module._buffers),
            ("__dict__", {"weight": module.__dict__.get("weight")}),
        )
        for key, tensor in tensors.items()
        if isinstance(tensor, Tensor) and _may_be_kernel(module, key, tensor)
    ]
    takes_others = selection.wants(FUNCTION)
    wanted = [kernel for kernel in known if kernel.wanted]
    loose = bool(selection.function_names) or any(
        not type(kernel.module).__module__.startswith("torch.nn.") for kernel in wanted
    )
    if not (wanted or takes_others) or (tree.instances(_FAST_PATHS) and not (loose or selection.function_names)):
        return None
    convolutions = {name: module for name, module in tree.names.items() if is_convolution(module)}
    kernels = Kernels(tuple(known), takes_others, {})
    owners = kernels.by_identity()
    kernels.layers.update(
        {name: layer for name, layer in convolutions.items() if not _is_told_by_weight(layer, owners)}
    )
    return kernels


def _may_be_kernel(module: nn.Module, key: str, tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return key == "weight" and is_convolution(module)
    return tensor.dim() == 3


def _is_told_by_weight(module: nn.Module, owners: dict[int, Kernel]) -> bool:
    weight = module._parameters.get("weight")
    owner = None if weight is None else owners.get(id(weight))
    return owner is not None and owner.module is module


class FunctionalTap(TorchFunctionMode):
    """Records the outputs or inputs of convolutions that are called as functions."""

    def __init__(self, sink: Sink, kernels: Kernels, policies: Mapping[str, Policy], at: str) -> None:
        super().__init__()
        self.sink = sink
        self.kernels = kernels
        self.policies = policies
        self.at = at
        self._by_identity: dict[int, Kernel] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a torch function and records it if it is a selected convolution."""
        kwargs = {} if kwargs is None else kwargs
        name = self._name(FUNCTIONS[func], args, kwargs) if func in FUNCTIONS else None
        if name is None:
            return func(*args, **kwargs)
        if self.at == "input":
            self._keep(name, args[0] if args else kwargs["input"])
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        self._keep(name, output)
        return output

    def _name(self, transposed: int | None, args: Any, kwargs: Any) -> str | None:
        """Returns the name to record a convolution under, or None to skip it.

        It is skipped if it is not one-dimensional, not selected, or part of a layer's own call.
        """
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if transposed is not None and (args[transposed] if len(args) > transposed else kwargs.get("transposed", False)):
            return None
        if weight is None or weight.dim() != 3:
            return None
        running = self.sink.running
        for _, layer in running:
            if layer._parameters.get("weight") is weight:
                return None
        name = self._owner(weight)
        if name is None:
            return None
        for around, layer in running:
            if name == around or (is_convolution(layer) and (name == FUNCTION or name.startswith(around + "."))):
                return None
        return name

    def _owner(self, weight: Any) -> str | None:
        """Returns the name of a kernel. A tensor keeps its identity outside of a trace."""
        if torch.compiler.is_compiling():
            return self.kernels.name_of(weight)
        if self._by_identity is None:
            self._by_identity = self.kernels.by_identity()
        return self.kernels.name_of(weight, self._by_identity.get(id(weight)))

    def _keep(self, name: str, value: Any) -> None:
        calls = self.sink.calls
        if calls is not None:
            calls.append((name, "", keep_value(value, name, self.policies[name])))
