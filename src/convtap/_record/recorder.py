"""Records the outputs that taps emit, in order, within the budget of the capture."""

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
        failure: the error of an output that could not be recorded, if the model swallowed it.
        elsewhere: the threads in which layers ran outside of this capture, with one such layer each.
        recomputed: the number of skipped outputs that a backward pass recomputed.
        fakes: the number of skipped outputs that were FakeTensors, which have no values.
        outside: whether a convolution ran whose module was not in the model when the capture was opened.
        unseen: layers whose compiled convolution differs from the layer's, with the reason.
        summed: layers whose output was added to another tensor before an activation.
        inputs: the kept inputs of the running layers.
        reached: the number of selected layers that were captured at least once.
        every, skips: as in ``Passes``.
        reads: whether code other than a convolution read the weight of a selected layer.
        follow: follows an output to its activation, or None if the output itself is recorded.
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
        me: Any = weakref.proxy(self)  # a strong reference would be a cycle
        self.inputs = Inputs(lambda: me.is_open_here(), lambda *of: me._noted(keeper.input, *of), keeps_inputs)
        keeps_all = passes.every == 1 and not last and budget is None and stop_after is None
        self._usual = self._plain and keeps_all and not (keeper.moves or keeps_inputs)

    @property
    def muted(self) -> bool:
        """Whether convtap itself, for example ``reduce``, calls torch in this thread."""
        return self._keeper.busy

    def is_open_here(self) -> bool:
        """Returns whether this capture is open and records in this context."""
        open_here = self._token in tokens_here() and not self._keeper.busy and backward_task() == -1
        return open_here and not self.skips()

    @skip_in_dynamo
    def is_here(self, name: str) -> bool:
        """Returns whether to record a layer here. If not, it notes the reason."""
        tokens = tokens_here()
        if self._token not in tokens:
            if not tokens:  # a thread or task with its own capture is not reported
                self.elsewhere.setdefault(self._passes.where(), name)
            return False
        if backward_task() != -1:
            self.recomputed += 1
            return False
        return not self.skips()

    @skip_in_dynamo
    def emit_plain(self, name: str, output: Tensor) -> Tensor:
        """Records the output of a plain Conv1d. Returns the output.

        For the usual options it repeats the code of ``record`` and ``_store``. Calling them would cost 0.6 µs per layer for the
        64 tiny layers of ``benchmarks/overhead.py``.
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
            self.reached += 1  # a tapped module is a selected one
        record.captured = number + 1
        record.held += 1
        call = Call(record, number - record.cleared, forward, "module", value)
        log.calls[next(self._serials)] = call  # atomic, since torch may run branches in its own threads
        return output

    def emit_shared(self, name: str, tapped: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Records a module's output that other code may hold or share memory with.

        Returns a replacement for the model, or None.
        """
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
        # An earlier hook already made this memory copy-on-write, so another snapshot is safe.
        fresh = is_copy_on_write(output) or not shares_memory(leaves.tensors, [t for _, t in known if t is not None])
        return self.record(name, leaves, "module", inputs, fresh=fresh, alone=alone)

    def emit(self, name: str, output: Any, via: str, inputs: Any = ()) -> Any:
        """Records an output from a tap. Returns a replacement for the model, or None."""
        if self.follow is not None:
            return self._follow(self.follow, name, output, via)
        return self.record(name, output, via, inputs)

    def _follow(self, follow: Callable[[str, Any, str], None], name: str, output: Any, via: str) -> None:
        """Starts to follow an output to its activation, which is recorded instead."""
        if self.is_here(name):
            record = self._log.records.get(name) or self._add_record(name)
            record.ran += 1
            follow(name, output, via)

    def record(
        self, name: str, output: Any, via: str, inputs: Any = (), *, fresh: bool = True, alone: bool = True
    ) -> Any:
        """Records an output. Returns a replacement for the model, or None.

        Args:
            name: the layer.
            output: the layer's output, or its leaves.
            via: the kind of tap that saw the output.
            inputs: the layer's inputs.
            fresh: whether the layer allocated the output's memory, instead of using an input, a parameter or a buffer.
            alone: whether only the caller holds the output object.
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
        """Removes the newest call of a layer, which another output replaces."""
        call = self._log.withdraw(name)
        if call is not None and self._budget is not None:
            self._budget.withdraw(call)

    def emit_input(self, name: str, value: Any, via: str) -> None:
        """Records a layer's input before the layer runs."""
        if not self.is_here(name):
            return
        with outside_modes() if tracing_state() is not None else nullcontext():  # keeps this out of the traced graph
            kept = self._noted(self._keeper.input, name, value)
        self._store(name, kept, via)

    def _noted(self, keep: Callable[..., Any], *args: Any) -> Any:
        """Calls ``keep``, and remembers its error, since the model may swallow it."""
        try:
            return keep(*args)
        except ConvtapError as error:
            self.failure = error
            raise

    def weight_read(self, name: str, by: object) -> None:
        """Notes that code reads a selected layer's weight.

        The layer is bypassed if no convolution of it follows.
        """
        record = self._log.records.get(name) or self._add_record(name)
        self.reads = True
        record.read_by(by, self._passes.current())

    def seen_as_function(self, name: str) -> None:
        """Notes a convolution whose weight was computed from a layer's weight."""
        record = self._log.records.get(name) or self._add_record(name)
        record.computed, record.pending, record.last_pass = True, None, self._passes.current()

    def _kept(self, name: str, output: Leaves, inputs: Any, fresh: bool, alone: bool) -> tuple[Any, Any]:
        if tracing_state() is None:
            kept: tuple[Any, Any] = self._noted(self._keeper.output, name, output, inputs, fresh, alone)
            return kept
        with outside_modes():  # keeps this out of the traced graph
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
