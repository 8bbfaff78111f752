"""Probes every tensor that a module takes or returns, until the first NaN or Inf."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from convtap._debug.finding import Event, Finding, ModuleRun, SeenTensor, judge
from convtap._debug.probe import locate, probe, read_all
from convtap._errors import NonFiniteOutput
from convtap._select.module_tree import ROOT
from convtap._tensors.nested import walk_tensors
from convtap._torch.call_stack import CALL, Members
from convtap._torch.frame_marks import Marks
from convtap._torch.hooks import Hooks
from convtap._torch.modes import Token, backward_task, open_tokens

# Note: [The first bad tensor]
# Assumption: every tensor that a watched module takes or returns is probed, in execution order.
# Choice: the first bad tensor shows where it was made. If the outermost module takes it, the caller made it. If a submodule
#   takes it, the code of the module around it made it, after the previous submodule. If a module returns it, that module
#   made it, since its inputs and its submodules' outputs were finite. Later tensors need no probe.
#
# Note: [Gradients by tensor hooks]
# Assumption: after a full backward hook on a module, an in-place activation raises. After a hook on a tensor it does not.
# Choice: each tensor that a module takes or returns has a hook. If a module took the tensor, that module's backward made
#   its gradient. If not, the code around it made the gradient, or the loss. Parameters have hooks while the watch is open,
#   and count only in backward passes through the watched tensors.

_READ_AFTER = 2048  # unread tensors on an accelerator: few enough to hold, many enough to wait rarely
_KNOWN = 512  # remembered tensors, so that one that passes between two modules is probed once


class _Here(threading.local):
    def __init__(self) -> None:
        self.stack: list[ModuleRun] = []
        self.last: str | None = None


class Watch:
    """Probes the tensors that modules take and return.

    Attributes:
        calls: the number of watched runs of modules.
        gradients: the number of probed gradients.
        elsewhere: the names of threads in which the model ran and ``finite`` was not open.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        token: Token,
        *,
        inf: bool,
        backward: bool,
        now: bool,
        hint: str,
    ) -> None:
        self.calls = 0
        self.gradients = 0
        self.elsewhere: set[str] = set()
        self._model = model
        self._modules = modules
        self._token = token
        self._inf = inf
        self._backward = backward
        self._now = now
        self._hint = hint
        self._first: Finding | None = None
        self._closed = False
        self._hooks = Hooks()
        self._handles: list[Callable[[], None]] = []
        self._here = _Here()
        self._known: dict[int, SeenTensor] = {}
        self._pending: list[Event] = []
        self._counts: dict[str, int] = {}
        self._forwards = itertools.count()
        self._forward = -1
        self._tasks: set[int] = set()
        self._members: Members | None = None
        self._marks = Marks()

    def open(self) -> None:
        """Registers the hooks."""
        for name, module in self._modules.items():
            self._hooks.before(module, self._entered, name, module)
            self._hooks.after(module, self._left, module, always=True)
        for name, module in self._modules.items() if self._backward else ():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self._listen_to_parameter(name, module, key, parameter)

    def close(self) -> None:
        """Removes the hooks and forgets the tensors.

        Hooks on tensors of a graph that is still alive do nothing from then on.
        """
        self._closed = True
        self._marks.clear()
        if self._members is not None:
            self._members.forget()
        self._hooks.remove()
        for handle in self._handles:
            handle()
        self._handles.clear()
        self._known.clear()

    def first(self) -> Finding | None:
        """Returns the first finding, after reading the pending tensors."""
        pending, self._pending = self._pending, []
        read_all([event.found for event in pending])
        for event in pending:
            if self._first is None and event.found.is_bad(self._inf):
                read_all(event.run.inputs if event.run is not None else [])
                self._first = judge(event, self._hint)
        return self._first

    # -- forward

    def _entered(self, name: str, watched: nn.Module, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not watched or self._first is not None or not self._is_here():
            return
        repeated = backward_task() != -1  # activation checkpointing repeats a run that was probed before
        if repeated and not self._backward:
            return
        stack = self._here.stack
        if module is self._model:
            stack.clear()  # the rest of an interrupted pass
        parent = stack[-1] if stack else None
        if not stack and not repeated:
            parent = self._method(module)
            self._forward = next(self._forwards) if parent is None else parent.forward
        run = ModuleRun(name, module, parent, -1 if repeated else self._count(name), self._forward)
        run.before = None if module is self._model else self._here.last
        stack.append(run)
        given = args[0] if len(args) == 1 and not kwargs else {**dict(enumerate(args)), **kwargs}
        self._look("input", run, given, repeated)

    def _left(self, watched: nn.Module, module: nn.Module, args: Any, output: Any) -> None:
        stack = self._here.stack
        if module is not watched or not stack or self._token not in open_tokens():
            return
        while stack and stack[-1].module is not module:
            if not any(run.module is module for run in stack):
                return
            stack.pop()
        run = stack.pop()
        if self._first is None:
            self._look("output", run, output, run.index < 0)
            if run.parent is not None:
                run.parent.last = run.name
            self._here.last = run.name

    def _method(self, module: nn.Module) -> ModuleRun | None:
        """Returns the run of a method that calls a layer outside of module calls, or None."""
        if module is self._model:
            return None
        if self._members is None:
            self._members = Members(self._model)
        found = self._members.entry(sys._getframe(1))
        if found is None or found[1].f_code is CALL:
            return None
        owner, python_frame = found
        known = self._marks.of(python_frame)
        if isinstance(known, ModuleRun):
            return known
        name = next((name for name, other in self._modules.items() if other is owner), ROOT)
        method = ModuleRun(name, owner, None, -1, next(self._forwards))
        method.method = python_frame.f_code.co_name
        self._marks.set(python_frame, method)
        return method

    def _is_here(self) -> bool:
        if self._token in open_tokens():
            return True
        self.elsewhere.add(threading.current_thread().name)
        return False

    def _count(self, name: str) -> int:
        self.calls += 1
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        return index

    def _look(self, where: str, run: ModuleRun, value: Any, repeated: bool) -> None:
        for path, tensor in walk_tensors(value):
            seen = self._seen(where, run, path, tensor, repeated)
            if where == "output":
                seen.sources.append(run)
            else:
                seen.targets.append(run)
                if seen.found is not None:
                    run.inputs.append(seen.found)
            if self._backward and tensor.requires_grad and not seen.listened:
                seen.listened = True
                tensor.register_hook(partial(self._gradient, seen))  # type: ignore[no-untyped-call]

    def _seen(self, where: str, run: ModuleRun, path: str, tensor: Tensor, repeated: bool) -> SeenTensor:
        """Returns the record of a tensor. Probes the tensor if its version is new."""
        version = -1 if tensor.is_inference() else tensor._version
        seen = self._known.get(id(tensor))
        if seen is not None and seen.version == version >= 0 and seen.reference() is tensor:
            return seen
        seen = SeenTensor(weakref.ref(tensor), version, None if repeated else probe(tensor, path))
        if len(self._known) >= _KNOWN:
            self._known.clear()
        self._known[id(tensor)] = seen
        if seen.found is not None:
            self._judge_or_defer(Event(where, seen.found, run, seen), tensor)
        return seen

    def _judge_or_defer(self, event: Event, tensor: Tensor) -> None:
        """Judges a tensor that can be read at once, or defers it."""
        if not event.found.here:
            self._pending.append(event)
            if self._now or len(self._pending) >= _READ_AFTER:
                self.first()
        elif self._first is None and event.found.is_bad(self._inf) and self.first() is None:
            locate(event.found, tensor, self._inf)
            self._first = judge(event, self._hint)
        if self._now and self._first is not None:
            raise NonFiniteOutput(self._first.message)

    # -- backward

    def _gradient(self, seen: SeenTensor, gradient: Tensor) -> None:
        self._tasks.add(backward_task())
        self._look_at_gradient(gradient, seen=seen)

    def _parameter_gradient(self, run: ModuleRun, key: str, gradient: Tensor) -> None:
        if backward_task() in self._tasks:
            self._look_at_gradient(gradient, run=run, parameter=key)

    def _look_at_gradient(self, gradient: Tensor, **whose: Any) -> None:
        if self._closed or self._first is not None:
            return
        self.gradients += 1
        found = probe(gradient)
        if found is not None:
            self._judge_or_defer(Event("gradient", found, **whose), gradient)

    def _listen_to_parameter(self, name: str, module: nn.Module, key: str, parameter: Tensor) -> None:
        untouched = parameter._backward_hooks is None
        run = ModuleRun(name, module, None, -1, -1)
        handle = parameter.register_hook(partial(self._parameter_gradient, run, key))  # type: ignore[no-untyped-call]

        def undo() -> None:
            handle.remove()
            if untouched and not parameter._backward_hooks:
                parameter._backward_hooks = None

        self._handles.append(undo)
