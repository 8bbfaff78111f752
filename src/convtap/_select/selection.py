"""Resolves names, globs, patterns, types, positions and predicates to modules."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.ao.nn.quantized as nnq
from torch import nn
from torch.nn.parameter import is_lazy

from convtap._errors import InvalidType, InvalidValue, LayerNotFound, did_you_mean, listed, plural
from convtap._select.module_tree import ModuleTree, is_keras, is_kind, kind_name
from convtap._select.parts import outermost, read_part

#: The default ``types``: every module whose forward is one 1-D convolution. The fused and dynamic quantized classes are
#: subclasses of ``nnq.Conv1d``. The parametrized, lazy and QAT classes are subclasses of ``nn.Conv1d``.
CONV1D: tuple[type[nn.Module], ...] = (nn.Conv1d, nnq.Conv1d)

FUNCTION = "F.conv1d"

Types: TypeAlias = "type[nn.Module] | Sequence[type[nn.Module]]"
Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | nn.Module | int | Callable[[str, nn.Module], bool]"
Layers: TypeAlias = "Selector | Iterable[Selector] | None"


class Selection:
    """The selected layers of one model.

    Attributes:
        modules: the selected modules by clean name, in definition order.
        name_of: the names of the selected modules by identity.
        parts: the paths of the selected parts, such as ``[0]``, for each module that is not selected as a whole.
        exact: the names, as in ``names``, that were selected by exact name or by instance.
        tree: all modules of the model.
    """

    def __init__(self, tree: ModuleTree, layers: Layers, types: tuple[type[nn.Module], ...]) -> None:
        self.tree = tree
        self.types = types
        self.typed = {name: module for name, module in tree.names.items() if isinstance(module, types)}
        if tree.has_script or tree.has_keras:
            self.typed = {name: module for name, module in tree.names.items() if is_kind(module, types)}
        self.parts: dict[str, tuple[str, ...]] = {}
        self.exact: set[str] = set()
        self.function_names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        self._everything = layers is None
        self.modules = self.typed if layers is None else self._chosen(layers)
        self.name_of = {id(module): name for name, module in self.modules.items()}

    def _chosen(self, layers: Layers) -> dict[str, nn.Module]:
        whole: set[str] = set()
        parts: dict[str, list[str]] = {}
        for selector in _selectors(layers):
            part = read_part(selector, self.tree, self.typed, self._owners) if isinstance(selector, str) else None
            if part is None:
                whole.update(self._choose(selector))
                continue
            for name in part.names:
                parts.setdefault(name, []).append(part.path)
            self.exact.update(name + part.path for name in part.names if part.exact)
        self.parts = {name: outermost(paths) for name, paths in parts.items() if name not in whole}
        self.exact -= {
            name + path for name, paths in parts.items() for path in set(paths) - {*self.parts.get(name, ())}
        }
        return {name: module for name, module in self.tree.names.items() if name in whole or name in parts}

    @property
    def names(self) -> Mapping[str, nn.Module | None]:
        """The selected modules or their parts, then the selected parameters (None)."""
        found: Mapping[str, nn.Module | None] = self.modules
        if self.parts:
            found = {name + part: m for name, m in self.modules.items() for part in self.parts.get(name, ("",))}
        return {**found, **dict.fromkeys(self.function_names)} if self.function_names else found

    @property
    def paths(self) -> dict[str, str]:
        """The paths of the selected parts by name."""
        return {name + part: part for name, parts in self.parts.items() for part in parts}

    @property
    def includes_conv1d(self) -> bool:
        """Whether ``types`` includes Conv1d, and so convolutions without a module."""
        return any(issubclass(nn.Conv1d, kind) for kind in self.types)

    @property
    def scripted(self) -> list[str]:
        """The selected convolutions that TorchScript runs."""
        if not self.tree.has_script:
            return []
        script = torch.jit.ScriptModule
        return [name for name, m in self.modules.items() if isinstance(m, script) and is_kind(m, CONV1D)]

    @property
    def keras(self) -> dict[str, nn.Module]:
        """The selected Keras layers."""
        return {name: m for name, m in self.modules.items() if is_keras(type(m))} if self.tree.has_keras else {}

    @property
    def includes_functions(self) -> bool:
        """Whether a convolution that is called as a function could be selected."""
        return self.includes_conv1d or bool(self.modules)

    def wants(self, name: str) -> bool:
        """Returns whether an ``F.conv1d`` call is selected, by its weight's name."""
        if self._everything:
            return self.includes_conv1d or name in self.modules
        if name in self.modules or name in self.function_names:
            return True
        return any(pattern.fullmatch(name) for pattern in self._patterns)

    def has_parameter(self, name: str) -> bool:
        """Returns whether a parameter that is not a module's weight has this name."""
        return name in self._loose

    def _choose(self, selector: Any) -> Iterable[str]:
        if isinstance(selector, str):
            return self._by_name(selector)
        if isinstance(selector, re.Pattern):
            return self._by_pattern(selector, repr(selector.pattern), selector)
        if isinstance(selector, nn.Module):
            return self._by_instance(selector)
        if isinstance(selector, type):
            return self._by_type(selector)
        if callable(selector):
            return self._by_predicate(selector)
        return self._by_position(selector)

    def _by_name(self, name: str) -> Iterable[str]:
        resolved = self.tree.resolve(name)
        if resolved is not None:
            self.exact.add(resolved)
            return [resolved]
        if name == FUNCTION or name in self._owners:
            self.exact.add(name)
            self.function_names.add(name)
            return []
        if not any(mark in name for mark in "*?["):
            known = [*self.tree.names, *self._owners]
            hint = did_you_mean(name, list(self.typed)) or did_you_mean(name, known)
            raise LayerNotFound(f"no layer is named {name!r}. {self._here()}{hint} {_SHOW}")
        return self._by_pattern(re.compile(fnmatch.translate(name)), repr(name), name)

    def _by_pattern(self, pattern: re.Pattern[str], shown: str, selector: Any) -> Iterable[str]:
        found = [name for name in self.typed if pattern.fullmatch(name)]
        self._patterns.append(pattern)
        if self.includes_conv1d:  # kernels without a module: parameters (C_out, C_in / groups, K)
            self.function_names.update(
                name for name, axes in self._loose.items() if axes == 3 and pattern.fullmatch(name)
            )
        if found or self.function_names or (self.includes_conv1d and pattern.fullmatch(FUNCTION)):
            return found
        others = sum(1 for name in self.tree.names if pattern.fullmatch(name))
        if others:
            raise LayerNotFound(
                f"{shown} matches {plural(others, 'module')} of other types, but no {_kinds(self.types)}. "
                f"Pass types={self._any_type()} or their type, or select other names. {self._here()}"
            )
        hint = did_you_mean(selector, list(self.typed)) if isinstance(selector, str) else ""
        tensors = [name for name, _ in self.tree.model.named_parameters() if pattern.fullmatch(name)]
        if tensors:
            hint = (
                f" It matches parameters ({listed(tensors, 3)}), but a selection names layers. Write the layer's name."
            )
        raise LayerNotFound(f"no layer matches {shown}. {self._here()}{hint} {_SHOW}")

    def _by_instance(self, module: nn.Module) -> Iterable[str]:
        name = self.tree.name_of(module)
        if name is None:
            raise LayerNotFound(
                f"the {type(module).__name__} in layers is not a module of this {type(self.tree.model).__name__}. A copy of "
                f"a module is another module. {self._here()} Pass a module of the model that you capture."
            )
        self.exact.add(name)
        return [name]

    def _by_type(self, kind: type) -> Iterable[str]:
        if not issubclass(kind, nn.Module):
            raise InvalidType(f"layers: {kind.__name__} is not a module type. Pass a subclass of nn.Module.")
        found = [name for name, module in self.tree.names.items() if is_kind(module, (kind,))]
        if not found:
            theirs = self.tree.keras_namesakes(kind)
            hint = f"Pass {kind_name(theirs[0])} for its Keras layers. " if theirs else ""
            raise LayerNotFound(f"the model has no {kind_name(kind)}, but it has {self.tree.census()}. {hint}{_SHOW}")
        return found

    def _by_predicate(self, predicate: Callable[[str, nn.Module], bool]) -> Iterable[str]:
        found = [name for name, module in self.typed.items() if predicate(name, module)]
        if not found:
            label = getattr(predicate, "__name__", repr(predicate))
            raise LayerNotFound(
                f"the predicate {label} selects none of {plural(len(self.typed), 'layer')}. {self._here()}"
            )
        return found

    def _by_position(self, selector: Any) -> Iterable[str]:
        position = _as_index(selector)
        names = self._typed_names
        if not -len(names) <= position < len(names):
            raise LayerNotFound(
                f"layer {position} is out of range: the model has {len(names)} {_kinds(self.types)}"
                + (f", numbered 0 to {len(names) - 1} (or -1 to -{len(names)}). {self._here()}" if names else ".")
            )
        return [names[position]]

    @cached_property
    def _typed_names(self) -> list[str]:
        return list(self.typed)

    @cached_property
    def _loose(self) -> dict[str, int]:
        """The parameters outside of modules, by name, each with its number of axes."""
        return {
            name: 0 if is_lazy(tensor) else tensor.dim()
            for name, tensor in self.tree.parameters()
            if name not in self.tree.names
        }

    @property
    def _owners(self) -> Collection[str]:
        """The names that calls of convolution functions may have."""
        return self._loose if self.includes_conv1d else ()

    def _here(self) -> str:
        return f"The model has these {_kinds(self.types)} layers: {listed(self.typed)}."

    def nothing(self) -> str:
        """Returns the message for a model that has none of the selected types."""
        kinds = Counter(type(module) for module in self.tree.names.values())
        namesakes = [kind for wanted in self.types for kind in self.tree.keras_namesakes(wanted)]
        others = [*namesakes, *(kind for kind, _ in kinds.most_common() if "Conv" in kind.__name__)]
        has = (
            ", ".join(f"{kinds[kind]} {kind_name(kind) if is_keras(kind) else kind.__name__}" for kind in others[:3])
            or self.tree.census()
        )
        first = kind_name(others[0]) if others else ""
        remedy = f"Pass types={first if '.' in first else self._any_type()}"
        return f"the {type(self.tree.model).__name__} has no {_kinds(self.types)}, but it has {has}. {remedy}."

    def _any_type(self) -> str:
        """Returns the code for ``types=`` that selects every layer of the model."""
        return "keras.layers.Layer" if is_keras(type(self.tree.model)) else "nn.Module"


_SHOW = "list_layers(model) shows all layers."


def _kinds(types: tuple[type[nn.Module], ...]) -> str:
    if types == CONV1D:
        return "Conv1d"
    return " or ".join(dict.fromkeys(kind.__name__ for kind in types))


def _as_index(selector: Any) -> int:
    try:
        if isinstance(selector, bool):
            raise TypeError
        return operator.index(selector)
    except TypeError:
        raise InvalidType(
            f"layers holds a {type(selector).__name__}, which selects nothing. Pass a name, a glob, a re.Pattern, a module "
            "type, a module of the model, an int, or a function of (name, module)."
        ) from None


def _selectors(layers: Layers) -> list[Any]:
    if isinstance(layers, (str, re.Pattern, nn.Module, type)):
        return [layers]
    if callable(layers) or not isinstance(layers, Iterable):
        return [layers]
    selectors = list(layers)
    if not selectors:
        raise InvalidValue("layers is empty, so nothing would be captured. Pass None for every 1-D convolution.")
    return selectors


def select(model: nn.Module, layers: Layers, types: tuple[type[nn.Module], ...]) -> Selection:
    """Resolves a selection against a model.

    Raises:
        LayerNotFound: if a selector matches nothing. The message names the model's layers and the nearest name.
    """
    return Selection(ModuleTree(model), layers, types)
