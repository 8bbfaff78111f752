"""Names the modules of a model, each once, without the prefixes of wrappers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from convtap._torch.compile_stance import is_compiled

ROOT = "(root)"
# Wrappers that run another module and add an attribute to its names. They are identified by the module and name of their
# class, since importing the classes would take more than a second.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("convtap", "Tapped"): "model",
}


@cache
def _wrapped_attribute(kind: Any) -> str | None:
    """Returns the attribute of a wrapper class that holds the wrapped module, or None."""
    for base in kind.__mro__:
        attribute = _WRAPPERS.get((base.__module__, base.__qualname__))
        if attribute is not None:
            return attribute
    return None


@cache
def _derives(kind: Any, module: str, name: str) -> bool:
    return any(base.__module__ == module and base.__name__ == name for base in kind.__mro__)


def is_keras(kind: type) -> bool:
    """Returns whether a class is a Keras 3 layer or model.

    On the torch backend, these are modules.
    """
    return _derives(kind, "keras.src.layers.layer", "Layer")


def _is_keras_conv1d(kind: type) -> bool:
    return _derives(kind, "keras.src.layers.convolutional.conv1d", "Conv1D")


def _is_keras_input(kind: type) -> bool:
    return _derives(kind, "keras.src.layers.core.input_layer", "InputLayer")


def _children(module: nn.Module) -> Iterable[tuple[str, nn.Module | None]]:
    """Returns the children of a module by name, including Keras layers."""
    if not is_keras(type(module)):
        return module._modules.items()
    found: dict[str, nn.Module] = {}
    for layer in getattr(module, "_layers", ()):
        name, number = layer.name, 1
        while name in found:  # in a subclassed Keras model, two layers may have the same name
            name, number = f"{layer.name}_{number}", number + 1
        found[name] = layer
    inner = {name: child for name, child in module._modules.items() if child is not None and name != "_torch_params"}
    known = {id(layer) for layer in found.values()}
    found.update((name, child) for name, child in inner.items() if id(child) not in known and not is_keras(type(child)))
    return found.items()


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def resolve_name(name: str, names: Container[str], aliases: Sequence[tuple[str, str]]) -> str | None:
    """Returns the clean form of a name, or None.

    It replaces prefixes that are aliases until the name is in ``names``.
    """
    if name in names:
        return name
    longest_first = sorted(aliases, key=lambda pair: -len(pair[0]))
    for _ in range(len(aliases) + 8):
        if name in names:
            return name
        for alias, clean in longest_first:
            if name == alias or name.startswith(alias + "."):
                name = (clean + name[len(alias) :]).lstrip(".") or ROOT
                break
        else:
            return None
    return None


def lies_in(name: str, names: Container[str]) -> bool:
    """Returns whether a module lies inside one of some others, by its name."""
    return any(name[:place] in names for place, mark in enumerate(name) if mark == ".")


def is_kind(module: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Returns whether a module has one of several types.

    A scripted module has the type that it was made from, and a Keras Conv1D counts as a Conv1d.
    """
    if isinstance(module, types):
        return True
    if _is_keras_conv1d(type(module)):
        return any(issubclass(nn.Conv1d, kind) for kind in types)
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    original = getattr(module, "original_name", None)
    return any(original == kind.__name__ for kind in types)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields a module's own parameters and buffers.

    It also yields a weight that is a plain attribute (FSDP, weight norm).
    """
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield key, tensor
    weight = module.__dict__.get("weight")
    if isinstance(weight, torch.Tensor):
        yield "weight", weight


def parameter_name(module: str, key: str) -> str:
    """Returns the name of a parameter. A weight has the name of its module."""
    return module if key == "weight" else _join("" if module == ROOT else module, key)


class ModuleTree:
    """The modules of a model by clean name, in definition order, without wrappers.

    A module with several names has the first one. ``resolve`` also accepts the other names, and names that contain the
    attribute of a wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[str, nn.Module] = {}
        self._name_of: dict[int, str] = {}
        self.aliases: list[tuple[str, str]] = []
        self.wrappers: list[nn.Module] = []
        self._walk(model)
        self._kinds = {type(module) for module in self.names.values()}
        self.has_keras = any(is_keras(kind) for kind in self._kinds)
        self.has_script = any(issubclass(kind, torch.jit.ScriptModule) for kind in self._kinds)
        self.compiled = self._compiled() if "torch._dynamo" in sys.modules else {}

    def _walk(self, model: nn.Module) -> None:
        names, name_of = self.names, self._name_of
        path: list[tuple[str, Iterator[tuple[str, nn.Module | None]]]] = [("", iter([("", model)]))]
        while path:
            prefix, parts = path[-1]
            for key, module in parts:
                if module is None:
                    continue
                name = f"{prefix}.{key}" if prefix and key else prefix or key
                known = name_of.get(id(module))
                if known is not None:
                    if known != name:
                        self.aliases.append((name, known))
                    continue
                name_of[id(module)] = name
                kind: Any = type(module)
                if not module._modules and not is_keras(kind):  # most modules are leaves, and a wrapper is never a leaf
                    names[name or ROOT] = module
                    continue
                path.append((name, self._parts(name, module)))
                break
            else:
                path.pop()

    def _parts(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
        """Adds a module that has children. Returns the children.

        The only child of a wrapper is the wrapped module, which has the wrapper's name.
        """
        kind: Any = type(module)
        attribute = _wrapped_attribute(kind)
        inner = module._modules.get(attribute) if attribute is not None else None
        if attribute is None or inner is None:
            self.names[name or ROOT] = module
            return iter(_children(module))
        self.aliases.append((_join(name, attribute), name))
        self.wrappers.append(module)
        return iter([("", inner)])

    def resolve(self, name: str) -> str | None:
        """Returns the clean name of a module from any of its names, or None."""
        return resolve_name(name or ROOT, self.names, self.aliases)

    @property
    def identities(self) -> Mapping[int, str]:
        """The names of the modules by identity."""
        return self._name_of

    def _compiled(self) -> dict[str, nn.Module]:
        """Returns the modules inside compiled parts of the model.

        A part may be compiled by ``torch.compile``, by ``compile()``, or through its ``forward``.
        """
        parts = [module for module in (*self.names.values(), *self.wrappers) if is_compiled(module)]
        inside = {id(module) for part in parts for module in part.modules()}
        return {name: module for name, module in self.names.items() if id(module) in inside}

    def name_of(self, module: nn.Module) -> str | None:
        """Returns the clean name of a module instance, or None if it is not in the model."""
        name = self._name_of.get(id(module))
        return name if name is None else name or ROOT

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each parameter and buffer with its name, as in ``parameter_name``."""
        for name, module in self.names.items():
            for key, tensor in tensors_of(module):
                yield parameter_name(name, key), tensor

    def keras_namesakes(self, wanted: type) -> list[type]:
        """Returns the model's Keras types with the same name as a PyTorch type.

        The PyTorch type does not select them.
        """
        kinds = dict.fromkeys(type(module) for module in self.names.values())
        return [kind for kind in kinds if is_keras(kind) and kind.__name__.lower() == wanted.__name__.lower()]

    def instances(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        """Returns the names of the outermost modules of some types."""
        if not any(issubclass(kind, kinds) for kind in self._kinds):
            return []
        found: dict[str, None] = {}
        for name, module in self.names.items():
            if isinstance(module, kinds) and not lies_in(name, found):
                found[name] = None
        return list(found)

    def census(self) -> str:
        """Counts the leaf modules by type, most frequent first: ``4 Conv2d, 2 Linear``."""
        leaves = [type(module) for module in self.names.values() if not any(_children(module))]
        kinds = Counter(kind.__name__ for kind in leaves if not _is_keras_input(kind))
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no modules"


def kind_name(kind: type) -> str:
    """Returns the name of a module type as in user code: ``nn.ReLU``."""
    if kind.__module__.startswith("torch.nn.") and hasattr(nn, kind.__name__):
        return f"nn.{kind.__name__}"
    return f"keras.layers.{kind.__name__}" if kind.__module__.startswith("keras.src.layers.") else kind.__name__
