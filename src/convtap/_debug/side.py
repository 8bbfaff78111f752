"""One of two compared models: its layers that run, and their calls one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from convtap._capture.tapped import tapped
from convtap._debug.comparison import Run
from convtap._debug.pairs import observe, signature
from convtap._debug.stream import Stream
from convtap._errors import Unsupported, listed
from convtap._select.example import arguments, fitted, looking, own_tensors, run_once
from convtap._select.parts import split_key
from convtap._select.selection import select
from convtap._torch.call_shim import compiled_call
from convtap._torch.cleanup import undone

_EIGHT_BITS = 2.0**-8

# Note: [Compiled sides]
# Assumption: compiled code does not contain hooks that are registered later, and the user does not ask about an eager run.
# Choice: a compiled side uses the same compiler (its backend, mode and options) on ``tapped(model)``, whose taps are traced
#   with the model. Taps can change which operations are fused, so the outputs of the model itself are compared as well. It
#   is an error if the compiler compiles nothing, or must not compile.


class Side:
    """One of the two models.

    Attributes:
        flow: how it runs.
        layers: the layers that ran, each with a value that must be equal for two structures to match.
        output: the model's output, once its calls were compared.
    """

    def __init__(
        self, label: str, model: nn.Module, layers: Any, types: tuple[type[nn.Module], ...], example: Any, mode: Any
    ) -> None:
        self.label = label
        self.model = model
        self._python = _python_model(label, model)
        self._types = types
        self._mode = mode
        self._example = fitted(example, self._python)
        self.selection = select(self._python, layers, types)
        modules = self.selection.modules
        self.flow = observe(self._python, list(modules), self.selection.tree, self._example, mode)
        self.layers = {name: signature(module) for name, module in modules.items() if name in self.flow.counts}
        self.output: Any = None

    def candidates(self, *more: Iterable[str] | None) -> dict[str, Any]:
        """Returns the layers, and the modules of other types that the user names."""
        tree = self.selection.tree
        extra = [name for names in more for name in names or () if name in tree.names and name not in self.layers]
        return {**self.layers, **{name: signature(tree.names[name]) for name in extra}}

    @property
    def is_compiled(self) -> bool:
        return self._python is not self.model

    def calls(self, layers: Any, modules: list[str], stack: ExitStack) -> Iterator[tuple[Run, Any]]:
        """Runs the model and yields the output of each call.

        Args:
            layers: the layers to capture of an eager model.
            modules: the modules to tap of a compiled model.
            stack: ends the run if the caller leaves early.
        """
        if self.is_compiled:  # a compiled graph returns all of its outputs at once
            outputs = self._run_compiled(modules) if modules else {}
            for key in list(outputs):
                name, number, _ = split_key(key, self.flow.kinds)
                yield Run(name, number or 0), outputs.pop(key)
            return
        stream = Stream(self._python, layers, self._types, self._example, self._mode)
        stack.enter_context(undone([stream.close]))
        for call in stream:
            yield Run(call.name, call.index), call.output
        self.output = stream.output

    def run_alone(self) -> None:
        """Sets ``output`` by a run without taps, if it is not known yet."""
        if self.output is None:
            self.output = run_once(self.model, self._example, self._mode)

    def _run_compiled(self, modules: list[str]) -> dict[str, Any]:
        import torch._dynamo as dynamo

        if dynamo.eval_frame._stance.stance != "default":
            raise Unsupported(
                f"side {self.label} is compiled, but compiled models run eagerly here (inside a capture, or under "
                "torch.compiler.set_stance). Call compare outside of it."
            )
        args, kwargs = arguments(own_tensors(self._example))
        before = dynamo.utils.counters["frames"]["ok"]
        with looking(self._python, self._mode), tapped(self._python, modules, types=self._types) as taps:
            if self._mode is not None:
                taps.train(self._mode == "train")
            _, outputs = self.model.dynamo_ctx(taps)(*args, **kwargs)  # type: ignore[operator]
        if dynamo.utils.counters["frames"]["ok"] == before:
            raise Unsupported(
                f"side {self.label} is compiled, but its compiler compiled nothing of it with taps. Compare the model that "
                "it was made from, or compile it with fullgraph=True to see why."
            )
        self.run_alone()
        return dict(outputs)

    def floor(self, name: str) -> float:
        """Returns the step of a layer with eight-bit weights, or 0 for other layers."""
        module = self.selection.tree.names.get(name)
        return _EIGHT_BITS if module is not None and ".quantized" in type(module).__module__ else 0.0


def _python_model(label: str, model: nn.Module) -> nn.Module:
    """Returns the model that a compiled one was made from, or the model itself."""
    inner = getattr(model, "_orig_mod", None) if type(model).__name__ == "OptimizedModule" else None
    found = model if inner is None else inner
    parts = [
        name or "the model"
        for name, module in found.named_modules()
        if type(module).__name__ == "OptimizedModule" or compiled_call(module) is not None
    ]
    if parts:
        raise Unsupported(
            f"side {label} has parts that are compiled by themselves, which compare cannot see: {listed(parts)}. Compile the "
            "whole model with torch.compile(model), or compare the model before it is compiled."
        )
    if isinstance(found, torch.jit.ScriptModule):
        raise Unsupported(
            f"side {label} is TorchScript, whose layers call no hooks. Capture both sides and compare the captures: "
            "with capture(model) as acts: model(x)."
        )
    return found
