"""Records what the taps emit: in order, counted, within the budget, and only for its own capture."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from convtap._errors import ConvtapError, StopForward
from convtap._record.budget import Budget
from convtap._record.forward_passes import Passes
from convtap._record.gradients import Gradients
from convtap._record.inputs import Inputs
from convtap._record.keeper import Keeper, are_fake, is_held_elsewhere
from convtap._result.call import Call, LayerRecord
from convtap._result.gradient import Gradient
from convtap._result.log import Log
from convtap._select.selection import Selection
from convtap._tensors.memory import shares_memory
from convtap._tensors.nested import Leaves, walk_tensors
from convtap._tensors.snapshot import snapshot, snapshot_of_result
from convtap._torch.call_stack import skip_in_dynamo
from convtap._torch.convolution_key import tokens_here
from convtap._torch.modes import (
    Token,
    backward_task,
    has_dispatch_modes,
    has_function_modes,
    outside_function_modes,
    outside_modes,
    tracing_state,
)
from convtap._torch.storage import is_copy_on_write
from convtap._torch.transforms import is_wrapped


class Recorder:
    """Records the outputs that taps emit into a log.

    Attributes:
        failure: the error that kept an output from being recorded, if the model swallowed it.
        elsewhere: threads in which layers ran that this block was not open in, with one such layer each.
        recomputed: how many outputs came from a recomputation during a backward pass, and were left out.
        fakes: how many outputs were FakeTensors, which have no values, and were left out.
        outside: whether a convolution ran whose module was not in the model when the capture was opened.
        unseen: layers whose compiled convolution is not the layer's, and why.
        summed: layers whose output was added to another tensor before any activation followed it.
        inputs: the inputs of the layers that run, if they are kept.
        reached: how many of the selected layers were captured at least once.
        every, skips: which forward passes are kept, and whether this thread is in another one.
        reads: whether the weight of a selected layer was read by something that is no convolution.
        follow: begins to follow an output to its activation, if that is to be recorded instead.
    """

    def __init__(
        self,
        token: Token,
        log: Log,
        selection: Selection,
        passes: Passes,
        keeper: Keeper,
        *,
        last: bool,
        keeps_inputs: bool,
        budget: Budget | None,
        stop_after: set[str] | None,
        grads: Gradients | None,
        new_record: Callable[[str], LayerRecord],
    ) -> None:
        self.failure: ConvtapError | None = None
        self.elsewhere: dict[str, str] = {}
        self.recomputed = 0
        self.fakes = 0
        self.outside = False
        self.unseen: dict[str, str] = {}
        self.summed: set[str] = set()
        self.reached = 0
        self.reads = False
        self.follow: Callable[[str, Any, str], None] | None = None
        self._token = token
        self._log = log
        self._new_record = new_record
        self.name_of = selection.name_of
        self._passes, self.every, self.skips = passes, passes.every, passes.skips
        self._here = passes.here
        self._keeper = keeper
        self._plain = keeper.is_plain and grads is None
        self._grads = grads
        self._last, self._budget = last, budget
        self._stop_after = stop_after
        self._has_numbers = "#" in "".join(log.selected)
        self._serials = itertools.count(1)
        me: Any = weakref.proxy(self)  # a reference would be a cycle
        self.inputs = Inputs(lambda: me.is_open_here(), lambda *of: me._noted(keeper.input, *of), keeps_inputs)
        keeps_all = passes.every == 1 and not last and budget is None and stop_after is None
        self._usual = self._plain and keeps_all and not (keeper.moves or keeps_inputs)

    @property
    def muted(self) -> bool:
        """Whether torch is called in this thread by the recording itself (by ``reduce``, say), and not by the model."""
        return self._keeper.busy

    def is_open_here(self) -> bool:
        """Whether this capture is open in this context, in a pass that is kept: no recording, no recomputation."""
        open_here = self._token in tokens_here() and not self._keeper.busy and backward_task() == -1
        return open_here and not self.skips()

    @skip_in_dynamo
    def is_here(self, name: str) -> bool:
        """Whether what runs now is to be recorded: this block is open in this context, and no recomputation runs."""
        tokens = tokens_here()
        if self._token not in tokens:
            if not tokens:  # with a block of its own, another thread or task has what it wants
                self.elsewhere.setdefault(self._passes.where(), name)
            return False
        if backward_task() != -1:
            self.recomputed += 1
            return False
        return not self.skips()

    @skip_in_dynamo
    def emit_plain(self, name: str, output: Tensor) -> Tensor:
        """Records what a plain Conv1d returned, and returns it: for the usual options all of the way, in one function.

        It repeats ``record`` and ``_store``, because calling them costs 0.6 µs a layer of the 64 tiny layers that
        ``benchmarks/overhead.py`` measures.
        """
        usual = self._usual and type(output) is Tensor and backward_task() == -1
        if not usual or has_dispatch_modes() or has_function_modes() or tracing_state() or is_wrapped(output):
            with outside_function_modes() if type(output) is Tensor else nullcontext():
                self.record(name, output, "module")
            return output
        value = snapshot_of_result(output)
        log = self._log
        record = log.records.get(name)
        if record is None:
            record = self._add_record(name)
        forward = self._here.number
        if forward < 0:
            forward = self._passes.current()
        record.last_pass = forward
        if record.pending is not None:
            record.pending = None
        number = record.captured
        if number == 0:
            self.reached += 1  # a module that is tapped was selected
        record.captured = number + 1
        record.held += 1
        call = Call(record, number - record.cleared, forward, "module", value)
        log.calls[next(self._serials)] = call  # counted in one step: torch runs branches in threads of its own
        return output

    def emit_shared(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Records what a module returned whose output may be a view of what somebody else has, or be held by somebody."""
        if module is not tapped:
            return None
        alone = not is_held_elsewhere(sys.getrefcount(output), output)
        with outside_function_modes() if has_function_modes() and type(output) is Tensor else nullcontext():
            return self._shared(name, module, (args, kwargs), output, alone)

    def _shared(self, name: str, module: nn.Module, inputs: Any, output: Any, alone: bool) -> Any:
        if self.follow is not None:
            return self._follow(self.follow, name, output, "module")
        leaves = Leaves(output)
        known = [*walk_tensors(inputs), *module._parameters.items(), *module._buffers.items()]
        # Memory that is copy-on-write already was given out here before: nobody's raw view of it can be hurt any more.
        fresh = is_copy_on_write(output) or not shares_memory(leaves.tensors, [t for _, t in known if t is not None])
        return self.record(name, leaves, "module", inputs, fresh=fresh, alone=alone)

    def emit(self, name: str, output: Any, via: str, inputs: Any = ()) -> Any:
        """Takes what a tap saw. Returns what the model is to go on with instead, or None to leave its output alone."""
        if self.follow is not None:
            return self._follow(self.follow, name, output, via)
        return self.record(name, output, via, inputs)

    def _follow(self, follow: Callable[[str, Any, str], None], name: str, output: Any, via: str) -> None:
        """Hands an output on to what follows it to its activation, which records that."""
        if self.is_here(name):
            record = self._log.records.get(name) or self._add_record(name)
            record.ran += 1
            follow(name, output, via)

    def record(
        self, name: str, output: Any, via: str, inputs: Any = (), *, fresh: bool = True, alone: bool = True
    ) -> Any:
        """Records an output; returns as ``emit`` does.

        Args:
            name: the layer.
            output: what it returned, or the leaves of that.
            via: how it was seen.
            inputs: what it was given.
            fresh: whether the output's memory is new, and no view of an input, a parameter or a buffer.
            alone: whether nobody but the caller holds the output object.
        """
        leaves = output if type(output) is Leaves else Leaves(output)
        if (self.every > 1 or self._token not in tokens_here() or backward_task() != -1) and not self.is_here(name):
            return None if self._grads is None else self._grads.recomputed(name, leaves, inputs)
        if self._keeper.busy:
            return None
        if are_fake(leaves.tensors) and not self._keeper.keeps_fakes:
            self.fakes += 1
            return None
        gradient, tensor = None, leaves.structure
        if (
            self._plain
            and fresh
            and type(tensor) is Tensor
            and self._keeper.stays((tensor,))
            and not is_wrapped(tensor)
        ):
            value, replacement = self._snapshot(tensor), None
        else:
            value, replacement = self._kept(name, leaves, inputs, fresh, alone)
            if self._grads is not None and tracing_state() is None:
                with outside_modes():
                    gradient, replacement = self._noted(self._grads.follow, name, leaves, inputs, replacement)
        self._store(name, value, via, gradient)
        return replacement

    def withdraw(self, name: str) -> None:
        """Takes the newest call of a layer back: another output is to be recorded in its place."""
        call = self._log.withdraw(name)
        if call is not None and self._budget is not None:
            self._budget.withdraw(call)

    def emit_input(self, name: str, value: Any, via: str) -> None:
        """Records a layer's input, before it runs."""
        if not self.is_here(name):
            return
        with outside_modes() if tracing_state() is not None else nullcontext():  # not part of what is traced
            kept = self._noted(self._keeper.input, name, value)
        self._store(name, kept, via)

    def _noted(self, keep: Callable[..., Any], *args: Any) -> Any:
        """Keeps a value, or follows its gradient. An error in that is remembered, since a model may swallow it."""
        try:
            return keep(*args)
        except ConvtapError as error:
            self.failure = error
            raise

    def weight_read(self, name: str, by: object) -> None:
        """Notes that something reads a selected layer's weight; a bypass, unless a convolution of the layer is seen."""
        record = self._log.records.get(name) or self._add_record(name)
        self.reads = True
        record.read_by(by, self._passes.current())

    def seen_as_function(self, name: str) -> None:
        """Notes that a convolution was seen whose weight was computed from a layer's weight."""
        record = self._log.records.get(name) or self._add_record(name)
        record.computed, record.pending, record.last_pass = True, None, self._passes.current()

    def _kept(self, name: str, output: Leaves, inputs: Any, fresh: bool, alone: bool) -> tuple[Any, Any]:
        if tracing_state() is None:
            kept: tuple[Any, Any] = self._noted(self._keeper.output, name, output, inputs, fresh, alone)
            return kept
        with outside_modes():  # nothing of this becomes part of the graph
            value, _ = self._noted(self._keeper.output, name, output, inputs, fresh, False)
            return value, None

    def _snapshot(self, output: Tensor) -> Tensor:
        if not (has_function_modes() or has_dispatch_modes() or tracing_state() is not None):
            return snapshot(output.detach() if output.requires_grad else output)
        with outside_modes():
            return snapshot(output.detach() if output.requires_grad else output)

    def _store(self, name: str, value: Any, via: str, gradient: Gradient | None = None) -> None:
        log = self._log
        forward = self._passes.current()
        record = log.records.get(name) or self._add_record(name)
        record.last_pass = forward
        if record.pending is not None:
            record.pending = None
        given = self.inputs.of(record.layer)
        call = Call(record, record.captured - record.cleared, forward, via, value, gradient, given)
        if self._budget is not None:
            self._noted(self._budget.reserve, call, log.calls.get(name) if self._last else None)
        if self._last:
            log.replace(name, call)
        else:
            record.held += 1
            log.calls[next(self._serials)] = call
        if record.captured == 0 and name in log.selected:
            self.reached += 1
        record.captured += 1
        if self._stop_after is not None:
            self._stop_after.discard(name)
            if not self._stop_after:
                raise StopForward(self._token)

    def _add_record(self, name: str) -> LayerRecord:
        log = self._log
        record = log.records[name] = self._new_record(name)
        if self._has_numbers or "#" in name:
            log.tell_apart(record)
        return record
