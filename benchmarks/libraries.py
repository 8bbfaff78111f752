"""Captures outputs with each library, by functions of one signature.

``collect(model, names, calls, after)`` runs the model on every ``(args, kwargs)`` of ``calls``, passes each output to
``after`` if the library returns it, and returns ``{name: [value of each run of the layer]}``. Each function follows the
library's own documentation, without workarounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
Collected = dict[str, list[Any]]


def _nothing(output: Any) -> None:
    pass


def convtap(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    from convtap import capture

    with capture(model, list(names)) as acts:
        for args, kwargs in calls:
            after(model(*args, **kwargs))
    return {name: [call.output for call in acts.calls(name)] for name in names}


def raw_hooks(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    """Captures with the idiom of tutorials: a dict, a closure, ``output.detach()``."""
    kept: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output.detach()

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for args, kwargs in calls:
        after(model(*args, **kwargs))
    for handle in handles:
        handle.remove()
    return {name: [kept[name]] for name in names if name in kept}


def torchvision(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = {"conv1d" if name in model.state_dict() else name: name for name in names}  # a parameter's node is its call
    extractor = create_feature_extractor(model, nodes)
    found: Collected = {name: [] for name in names}
    for args, kwargs in calls:
        outputs = extractor(*args, **kwargs)
        for name in names:
            found[name].append(outputs[name])
    return found


def torchlens(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    import torchlens as library

    found: Collected = {name: [] for name in names}
    for args, kwargs in calls:
        log = library.trace(model, args, kwargs)
        for name in names:
            if name in model.state_dict():  # not a module: its operation is found by the weight that it uses
                found[name] += [op.out for op in log.ops if op.func_name == "conv1d" and name in op.param_names]
            else:
                calls_of = log.modules[name].calls
                found[name] += [calls_of[i].out for i in range(len(calls_of))]
    return found


def nnsight(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    from nnsight import NNsight

    tapped = NNsight(model)
    found: Collected = {name: [] for name in names}
    for args, kwargs in calls:
        envoys = [_envoy(tapped, model, name) for name in names]
        with tapped.trace(*args, **kwargs):
            values = [envoy.output.save() for envoy in envoys].save()
            result = tapped.output.save()
        after(result)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found


def _envoy(tapped: Any, model: nn.Module, name: str) -> Any:
    if name in model.state_dict():  # a parameter's call in the source of forward
        return tapped.source.F_conv1d_0
    return functools.reduce(_child, name.split("."), tapped)


def _child(envoy: Any, part: str) -> Any:
    return envoy[int(part)] if part.isdigit() else getattr(envoy, part)


def captum(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    from captum.attr import LayerActivation

    found: Collected = {}
    for name in names:
        layer = LayerActivation(model, model.get_submodule(name))
        found[name] = [layer.attribute(args) for args, _ in calls]  # it has no way to pass keyword arguments
    return found


def torchextractor(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]
) -> Collected:
    from torchextractor import Extractor

    extractor = Extractor(model, list(names))
    found: Collected = {name: [] for name in names}
    features: dict[str, Any] = {}
    for args, kwargs in calls:
        output, features = extractor(*args, **kwargs)
        after(output)
    for name in names:
        if name in features:
            found[name].append(features[name])
    return found


def surgeon(model: nn.Module, names: Sequence[str], calls: Sequence[Call], after: Callable[..., Any]) -> Collected:
    from surgeon_pytorch import Inspect

    inspected = Inspect(model, layer=list(names))
    found: Collected = {name: [] for name in names}
    for args, kwargs in calls:
        output, values = inspected(*args, **kwargs)
        after(output)
        for name, value in zip(names, values, strict=True):
            found[name] += [] if value is None else [value]  # None: the layer did not run
    return found


#: By name: the function that collects, the distribution with the version, and the name to import.
LIBRARIES: dict[str, tuple[Callable[..., Collected], str, str]] = {
    "convtap": (convtap, "convtap", "convtap"),
    "raw hooks": (raw_hooks, "torch", "torch"),
    "torchvision": (torchvision, "torchvision", "torchvision"),
    "torchlens": (torchlens, "torchlens", "torchlens"),
    "nnsight": (nnsight, "nnsight", "nnsight"),
    "captum": (captum, "captum", "captum"),
    "torchextractor": (torchextractor, "torchextractor", "torchextractor"),
    "surgeon": (surgeon, "surgeon-pytorch", "surgeon_pytorch"),
}
