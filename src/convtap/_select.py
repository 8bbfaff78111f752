"""Which modules a selection means: names, globs, patterns, types, instances, positions and predicates."""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.ao.nn.quantized as nnq
from torch import nn

from convtap._errors import InvalidType, InvalidValue, LayerNotFound, did_you_mean, listed, plural

#: The default ``types``: every module whose forward is one 1-D convolution. The fused and dynamic quantized
#: classes are subclasses of ``nnq.Conv1d``; the parametrized, lazy and QAT ones of ``nn.Conv1d``.
CONV1D: tuple[type[nn.Module], ...] = (nn.Conv1d, nnq.Conv1d)

ROOT = "(root)"
FUNCTION = "F.conv1d"

Types: TypeAlias = "type[nn.Module] | Sequence[type[nn.Module]]"
Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | nn.Module | int | Callable[[str, nn.Module], bool]"
Layers: TypeAlias = "Selector | Iterable[Selector] | None"

# Wrappers that run another module and add their attribute to its names, by where their class is defined: importing
# the classes themselves would cost more than a second.
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"): "_checkpoint_wrapped_module",
    ("convtap._tapped", "Tapped"): "model",
}


@cache
def _wrapped_attribute(kind: type[Any]) -> str | None:
    """Returns the attribute under which a wrapper class keeps the wrapped module, or None for any other class."""
    for base in kind.__mro__:
        attribute = _WRAPPERS.get((base.__module__, base.__qualname__))
        if attribute is not None:
            return attribute
    return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def resolve_name(name: str, names: Container[str], aliases: Sequence[tuple[str, str]]) -> str | None:
    """Returns the clean form of a name: its prefixes replaced by what they are aliases of, until it is in ``names``."""
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


class ModuleTree:
    """The modules of a model under clean names: definition order, each module once, wrappers left out.

    A module that is reachable under two names has the first one; the others, and the names with a wrapper's
    attribute in them, are known to ``resolve``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[str, nn.Module] = {}
        self._name_of: dict[int, str] = {}
        self.aliases: list[tuple[str, str]] = []
        self._walk(model, "")

    def _walk(self, model: nn.Module, root: str) -> None:
        stack: list[tuple[nn.Module, str]] = [(model, root)]
        while stack:
            module, prefix = stack.pop()
            known = self._name_of.get(id(module))
            if known is not None:
                if known != prefix:
                    self.aliases.append((prefix, known))
                continue
            self._name_of[id(module)] = prefix
            attribute = _wrapped_attribute(type(module))  # type: ignore[arg-type]
            inner = module._modules.get(attribute) if attribute is not None else None
            if attribute is not None and inner is not None:
                self.aliases.append((_join(prefix, attribute), prefix))
                stack.append((inner, prefix))
                continue
            self.names[prefix or ROOT] = module
            if module._modules:
                children = [
                    (child, _join(prefix, name)) for name, child in module._modules.items() if child is not None
                ]
                stack.extend(reversed(children))

    def resolve(self, name: str) -> str | None:
        """Returns the clean name of a module, from any of its names, or None if there is no such module."""
        return resolve_name(name or ROOT, self.names, self.aliases)

    def name_of(self, module: nn.Module) -> str | None:
        """Returns the clean name of a module instance, or None if the model does not contain it."""
        name = self._name_of.get(id(module))
        return name if name is None else name or ROOT

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields each parameter and buffer under its owner's name: ``<module>.weight`` is named as the module."""
        for name, module in self.names.items():
            prefix = "" if name == ROOT else name
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    yield (name if key == "weight" else _join(prefix, key)), tensor

    def instances(self, kinds: tuple[type[nn.Module], ...]) -> list[str]:
        """Returns the names of the outermost modules of some types."""
        if not any(issubclass(kind, kinds) for kind in {type(module) for module in self.names.values()}):
            return []
        found: list[str] = []
        for name, module in self.names.items():
            if isinstance(module, kinds) and not any(name.startswith(outer + ".") for outer in found):
                found.append(name)
        return found

    def census(self) -> str:
        """Counts the leaf modules by type, most frequent first: ``4 Conv2d, 2 Linear``."""
        kinds = Counter(type(module).__name__ for module in self.names.values() if not module._modules)
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "no modules"


class Selection:
    """What a selection means in one model.

    Attributes:
        modules: the selected modules by clean name, in definition order.
        exact: the names of those that were asked for by exact name or by instance.
        tree: all modules of the model.
    """

    def __init__(self, tree: ModuleTree, layers: Layers, types: tuple[type[nn.Module], ...]) -> None:
        self.tree = tree
        self.types = types
        self.typed = {name: module for name, module in tree.names.items() if isinstance(module, types)}
        self.exact: set[str] = set()
        self.function_names: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []
        self._everything = layers is None
        if layers is None:
            self.modules = self.typed
            return
        chosen: set[str] = set()
        for selector in _selectors(layers):
            chosen.update(self._choose(selector))
        self.modules = {name: module for name, module in tree.names.items() if name in chosen}

    @property
    def takes_conv1d(self) -> bool:
        """Whether ``types`` includes Conv1d, so that a convolution without a module is selected as well."""
        return any(issubclass(nn.Conv1d, kind) for kind in self.types)

    @property
    def takes_functions(self) -> bool:
        """Whether a convolution that is called as a function could be selected."""
        return self.takes_conv1d or bool(self.modules)

    def wants(self, name: str) -> bool:
        """Says whether an ``F.conv1d`` call is selected, from the name of its weight's owner."""
        if self._everything:
            return self.takes_conv1d or name in self.modules
        if name in self.modules or name in self.function_names:
            return True
        return any(pattern.fullmatch(name) for pattern in self._patterns)

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
        if name == FUNCTION or name in self._owners():
            self.exact.add(name)
            self.function_names.add(name)
            return []
        if not any(mark in name for mark in "*?["):
            known = [*self.tree.names, *self._owners()]
            raise LayerNotFound(f"no layer is named {name!r}. {self._here()}{did_you_mean(name, known)} {_SHOW}")
        return self._by_pattern(re.compile(fnmatch.translate(name)), repr(name), name)

    def _by_pattern(self, pattern: re.Pattern[str], shown: str, selector: Any) -> Iterable[str]:
        found = [name for name in self.typed if pattern.fullmatch(name)]
        self._patterns.append(pattern)
        if found or any(pattern.fullmatch(name) for name in self._owners()):
            return found
        others = sum(1 for name in self.tree.names if pattern.fullmatch(name))
        if others:
            raise LayerNotFound(
                f"{shown} matches {plural(others, 'module')} of other types, and no {_kinds(self.types)}: "
                f"pass types=nn.Module (or their type), or select other names. {self._here()}"
            )
        hint = did_you_mean(selector, list(self.typed)) if isinstance(selector, str) else ""
        raise LayerNotFound(f"no layer matches {shown}. {self._here()}{hint} {_SHOW}")

    def _by_instance(self, module: nn.Module) -> Iterable[str]:
        name = self.tree.name_of(module)
        if name is None:
            raise LayerNotFound(
                f"the {type(module).__name__} given as a layer is not part of this {type(self.tree.model).__name__} "
                f"(a copy of a module is another module). {self._here()} Take it from the model you capture."
            )
        self.exact.add(name)
        return [name]

    def _by_type(self, kind: type) -> Iterable[str]:
        if not issubclass(kind, nn.Module):
            raise InvalidType(f"layers: {kind.__name__} is not a module type. Pass a subclass of nn.Module.")
        found = [name for name, module in self.tree.names.items() if isinstance(module, kind)]
        if not found:
            raise LayerNotFound(f"the model has 0 {kind.__name__}; it has {self.tree.census()}. {_SHOW}")
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
        names = list(self.typed)
        if not -len(names) <= position < len(names):
            raise LayerNotFound(
                f"layer {position} is out of range: the model has {len(names)} {_kinds(self.types)}"
                + (f", numbered 0 to {len(names) - 1} (or -1 to -{len(names)}). {self._here()}" if names else ".")
            )
        return [names[position]]

    def _owners(self) -> set[str]:
        """The names of parameters that a function call could be named after (those that are no module's weight)."""
        if not self.takes_conv1d:
            return set()
        return {name for name, _ in self.tree.parameters() if name not in self.tree.names}

    def _here(self) -> str:
        return f"The {_kinds(self.types)} layers here: {listed(self.typed)}."

    def nothing(self) -> str:
        """Says that the model has none of the selected types, what it has instead, and what to write."""
        others = Counter(
            type(module).__name__ for module in self.tree.names.values() if "Conv" in type(module).__name__
        )
        has = ", ".join(f"{count} {kind}" for kind, count in others.most_common(3)) or self.tree.census()
        first = others.most_common(1)
        remedy = f"pass types=nn.{first[0][0]}" if first and hasattr(nn, first[0][0]) else "pass types=nn.Module"
        return f"the {type(self.tree.model).__name__} has 0 {_kinds(self.types)}, {has}: {remedy}."


_SHOW = "list_layers(model) shows all."


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
            f"layers: {type(selector).__name__} selects nothing. A layer is a name, a glob, a re.Pattern, a module "
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


def check_arguments(model: Any, layers: Any, types: Any) -> tuple[type[nn.Module], ...]:
    """Checks the types of what selects, before any model is looked at. Returns ``types`` as a tuple.

    Raises:
        InvalidType: ``model`` is no module, ``layers`` is an input, or ``types`` holds something that is no module type.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(
            f"the first argument is a {type(model).__name__}, not a torch.nn.Module. "
            "Write: with capture(model) as acts: model(x)"
        )
    if isinstance(layers, (torch.Tensor, dict)) or (hasattr(layers, "__array__") and bool(getattr(layers, "ndim", 0))):
        raise InvalidType(
            f"the second argument is a {type(layers).__name__}, and it selects layers; "
            "run the model inside: with capture(model) as acts: model(x)"
        )
    kinds = tuple(types) if isinstance(types, (list, tuple, set, frozenset)) else (types,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidType(f"types holds {kind!r}, which is no module type. Pass for example types=nn.Conv2d.")
    if not kinds:
        raise InvalidValue("types is empty, so nothing could be captured. Leave it out for Conv1d.")
    return kinds


def select(model: nn.Module, layers: Layers, types: tuple[type[nn.Module], ...]) -> Selection:
    """Resolves a selection against a model.

    Raises:
        LayerNotFound: a selector matches nothing; the message names what is there and the nearest name.
    """
    return Selection(ModuleTree(model), layers, types)
