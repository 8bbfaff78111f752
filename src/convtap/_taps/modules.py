"""Taps modules with hooks and shims that emit their outputs or inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from convtap._record.recorder import Recorder
from convtap._torch import call_shim
from convtap._torch.call_stack import pass_by_in_dynamo, skip_in_dynamo
from convtap._torch.convolution_key import run_without
from convtap._torch.hooks import Hooks, has_global_hooks
from convtap._torch.modes import Token, open_tokens

# Note: [Plain layers]
# Assumption: a plain Conv1d returns new memory that only its caller holds, and its call contains only one convolution.
# Failure: a hook on each layer costs as much as the rest of the tap, and so does a kernel that sees each convolution.
# Choice: a plain layer has a shim around its calls instead of a hook. The shim excludes the convolution key during the
#   call, unless the user's hooks run in it, and emits the result.


class ModuleTap:
    """Emits the outputs or inputs of modules.

    Attributes:
        shimmed: the plain layers, by name.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], recorder: Recorder, token: Token, *, at: str, plainly: bool
    ) -> None:
        self._recorder = recorder
        self._token = token
        self._at = at
        self.shimmed: dict[str, nn.Module] = {}
        self._others: dict[str, nn.Module] = {}
        shims = plainly and at == "output" and not recorder.inputs.are_kept
        for name, module in modules.items():
            (self.shimmed if shims and is_plain(module) else self._others)[name] = module
        self._name_of = recorder.name_of
        self._emit = recorder.emit_plain if recorder.every == 1 else self._emit_if_kept
        self._hooks = Hooks()

    def open(self) -> None:
        """Registers a shim or a hook on every module."""
        call_shim.listen_to_all(self.shimmed.values(), self._called)
        for name, module in self._others.items():
            if self._at == "input":
                self._hooks.before(module, self._emit_input, name, module)
            else:  # an output that may be a view, or that convtap may replace, needs a closer look
                self._hooks.after(module, self._recorder.emit_shared, name, module, kwargs=True)

    def close(self) -> None:
        """Removes the shims and hooks."""
        call_shim.leave(self.shimmed.values(), self._called)
        self._hooks.remove()

    @pass_by_in_dynamo
    def _called(self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Runs a plain layer."""
        name = self._name_of[id(module)]
        if self._token not in open_tokens():
            self._recorder.is_here(name)
            return call(*args, **kwargs)
        output = run_without(call, args, kwargs) if runs_alone(module) else call(*args, **kwargs)
        return self._emit(name, output)

    @skip_in_dynamo
    def _emit_if_kept(self, name: str, output: Any) -> Any:
        return output if self._recorder.skips() else self._recorder.emit_plain(name, output)

    def _emit_input(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is tapped:  # see Note: [Hooks and copies]
            self._recorder.emit_input(name, as_input(args, kwargs), "module")


class InputTap:
    """Keeps the inputs of modules with their outputs.

    It is opened after the taps that emit the outputs.
    """

    def __init__(self, modules: Mapping[str, nn.Module], recorder: Recorder) -> None:
        self._modules = modules
        self._recorder = recorder
        self._hooks = Hooks()

    def open(self) -> None:
        """Registers a hook before and after every module."""
        for name, module in self._modules.items():
            self._hooks.before(module, self._note, name, module)
            self._hooks.after(module, self._forget, name, module, always=True)

    def close(self) -> None:
        """Removes the hooks."""
        self._hooks.remove()

    def _note(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is tapped:  # see Note: [Hooks and copies]
            self._recorder.inputs.note(name, as_input(args, kwargs))

    def _forget(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
        if module is tapped:
            self._recorder.inputs.forget(name)


@skip_in_dynamo
def runs_alone(module: nn.Module) -> bool:
    """Returns whether no hooks run in a module's calls.

    A hook may run a convolution of its own.
    """
    own = module.__dict__
    return not (own["_forward_pre_hooks"] or own["_forward_hooks"] or has_global_hooks())


def is_plain(module: nn.Module) -> bool:
    """Returns whether a module is a Conv1d with PyTorch's own forward and parameter."""
    own, kind = module.__dict__, type(module)
    return (
        _runs_conv1d(kind)  # type: ignore[arg-type]
        and type(own["_parameters"].get("weight")) is nn.Parameter
        and "forward" not in own
        and "_conv_forward" not in own
    )


@functools.cache
def _runs_conv1d(kind: Any) -> bool:
    conv = nn.Conv1d
    return issubclass(kind, conv) and kind.forward is conv.forward and kind._conv_forward is conv._conv_forward


def as_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the arguments of a call as one value.

    A single argument is returned as it is, several as a tuple, keyword arguments as a dict, and both kinds as a dict with
    ``args``.
    """
    if not kwargs:
        return args[0] if len(args) == 1 else args
    if not args:
        return next(iter(kwargs.values())) if len(kwargs) == 1 else dict(kwargs)
    return {"args": args, "kwargs": dict(kwargs)} if "args" in kwargs else {"args": args, **kwargs}
