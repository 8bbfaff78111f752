"""Captures with each library after one set-up, as contexts.

In ``with library(model, names) as run: found = run(x)``, ``found`` is ``{name: value}`` of one forward pass. The context
sets up on entry and removes hooks on exit, so that a timing can include or exclude both. Of several ways that a library
offers it uses the fastest. With ``stop=True`` the forward ends after the last of ``names``. A library without such an
option raises NotOffered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.libraries import _envoy

Run = Callable[[Tensor], dict[str, Any]]


class NotOffered(Exception):
    """A library does not offer the feature."""


def _runs_whole(stop: bool) -> None:
    if stop:
        raise NotOffered("no way to end the forward pass")


@contextlib.contextmanager
def convtap(model: nn.Module, names: Sequence[str], stop: bool = False, **options: Any) -> Iterator[Run]:
    from convtap import capture

    def stopped(x: Tensor) -> dict[str, Any]:
        with capture(model, list(names), stop=True) as acts:
            model(x)
        return dict(acts)

    if stop:  # a capture ends with its forward pass, so each pass has its own
        yield stopped
        return
    with capture(model, list(names), **options) as acts:

        def run(x: Tensor) -> dict[str, Any]:
            acts.clear()
            model(x)
            return dict(acts)

        yield run


def convtap_modules(model: nn.Module, names: Sequence[str], stop: bool = False) -> Any:
    """Captures with ``functional=False``: modules, but not function calls."""
    _runs_whole(stop)  # the row of the same name has it
    return convtap(model, names, functional=False)


@contextlib.contextmanager
def raw_hooks(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    """Captures with hooks into a dict, and stops by an exception from the last hook."""

    class Enough(Exception):
        pass

    kept: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        last = stop and name == names[-1]

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output.detach()
            if last:
                raise Enough

        return keep

    def run(x: Tensor) -> dict[str, Any]:
        kept.clear()
        model(x)
        return dict(kept)

    def stopped(x: Tensor) -> dict[str, Any]:
        with contextlib.suppress(Enough):
            run(x)
        return dict(kept)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield stopped if stop else run
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def torchvision(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    """Builds a graph that ends after the last layer, with or without ``stop``."""
    from torchvision.models.feature_extraction import create_feature_extractor

    yield create_feature_extractor(model, {name: name for name in names})


@contextlib.contextmanager
def torchlens(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    """Uses ``record``, which is several times faster than ``trace``."""
    import torchlens as library

    wanted = library.func("conv1d")
    halt = (lambda event: event.kind == "op" and event.address == names[-1]) if stop else None

    def run(x: Tensor) -> dict[str, Any]:
        records = list(library.record(model, x, save=wanted, halt=halt))
        by_address = {record.ctx.address: record.ram_payload for record in records}
        if set(names) <= set(by_address):
            return {name: by_address[name] for name in names}
        # a functional convolution has no address, so the order of the calls identifies it
        return {name: record.ram_payload for name, record in zip(names, records, strict=False)}

    yield run


@contextlib.contextmanager
def nnsight(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    from nnsight import NNsight

    tapped = NNsight(model)
    envoys = [_envoy(tapped, model, name) for name in names]

    def run(x: Tensor) -> dict[str, Any]:
        with tapped.trace(x):
            values = [envoy.output.save() for envoy in envoys].save()
        return dict(zip(names, values, strict=True))

    def stopped(x: Tensor) -> dict[str, Any]:
        with tapped.trace(x) as tracer:
            values = [envoy.output.save() for envoy in envoys].save()
            tracer.stop()
        return dict(zip(names, values, strict=True))

    yield stopped if stop else run


@contextlib.contextmanager
def captum(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    from captum.attr import LayerActivation

    _runs_whole(stop)
    layers = LayerActivation(model, [model.get_submodule(name) for name in names])
    yield lambda x: dict(zip(names, layers.attribute(x), strict=True))


@contextlib.contextmanager
def torchextractor(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    from torchextractor import Extractor

    _runs_whole(stop)
    extractor = Extractor(model, list(names))
    yield lambda x: dict(extractor(x)[1])


@contextlib.contextmanager
def surgeon(model: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Run]:
    from surgeon_pytorch import Extract, Inspect

    if stop:
        cut = Extract(model, node_out=list(names))
        yield lambda x: dict(zip(names, cut(x), strict=True))
    else:
        inspected = Inspect(model, layer=list(names))
        yield lambda x: dict(zip(names, inspected(x)[1], strict=True))


#: By the name of the library's row.
PREPARED: dict[str, Callable[..., Any]] = {
    "convtap": convtap,
    "convtap, functional=False": convtap_modules,
    "raw hooks": raw_hooks,
    "torchvision": torchvision,
    "torchlens": torchlens,
    "nnsight": nnsight,
    "captum": captum,
    "torchextractor": torchextractor,
    "surgeon": surgeon,
}


@contextlib.contextmanager
def compiled(library: str, model: nn.Module, names: Sequence[str]) -> Iterator[Run]:
    """Compiles the model inside the library if possible, else before it."""
    if library == "convtap":
        from convtap import tapped

        both = torch.compile(tapped(model, list(names)), fullgraph=True)
        yield lambda x: dict(both(x)[1])
    elif library == "torchvision":
        with torchvision(model, names) as extractor:
            yield torch.compile(extractor, fullgraph=True)  # type: ignore[call-overload]
    elif library in ("raw hooks", "torchextractor", "surgeon"):  # their hooks are registered when the model is compiled
        with PREPARED[library](model, names) as run:
            yield torch.compile(run)
    else:
        with PREPARED[library](torch.compile(model), names) as run:
            yield run
