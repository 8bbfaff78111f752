"""One open capture: connects the selection, the taps, the recorder and the log."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from types import TracebackType
from typing import Any

from torch import nn

from convtap._capture.model_checks import check_replicas, check_script, why_eager
from convtap._capture.options import CaptureOptions
from convtap._errors import LayerNotFound, NotCaptured, OffloadWarning, StopForward, Unsupported, listed, warn_user
from convtap._offload.offloader import Offloader, first_failure
from convtap._record.budget import Budget
from convtap._record.checks import report_missing
from convtap._record.forward_passes import Passes
from convtap._record.gradients import Gradients
from convtap._record.keeper import Keeper
from convtap._record.recorder import Recorder
from convtap._record.reductions import Reductions
from convtap._result.call import LayerRecord
from convtap._result.log import Log
from convtap._result.origin import Origin
from convtap._select.layer_layout import LayerLayouts, channels_first
from convtap._select.module_tree import ROOT
from convtap._select.selection import CONV1D, Selection, select
from convtap._select.weight_owners import Owners
from convtap._taps.activations import Follower
from convtap._taps.convolutions import ConvolutionTap
from convtap._taps.keras import KerasTap
from convtap._taps.modules import InputTap, ModuleTap
from convtap._taps.parts import Parted, PartTap
from convtap._torch import compile_stance, modes, self_test
from convtap._torch.cleanup import Guard, Spent, undo


class Session:
    """One open capture, as a context manager.

    It registers hooks, shims and modes on entry, and removes them on exit.

    Attributes:
        log: the recorded calls.
        selection: the selected layers.
        recorder: the object that the taps emit to.
    """

    def __init__(self, options: CaptureOptions) -> None:
        selection = select(options.model, options.layers, options.types)
        check_replicas(selection.tree)
        self.broken = broken = self_test.run()
        self.uses_key = self_test.KEY not in broken
        self.functional = (
            options.functional is not False and selection.includes_functions and self_test.STACK not in broken
        )
        self.eager = why_eager(options, selection, self.uses_key)
        if not selection.modules and not self.functional:
            raise LayerNotFound(selection.nothing())
        self.selection = selection
        self.offloader = options.offloader
        self.log = log = Log(
            selected=selection.names, exact=selection.exact, aliases=selection.tree.aliases, is_open=True
        )
        self._note()
        token = self.token = modes.Token()
        self.passes = passes = Passes(
            options.model, token, selection.tree.name_of, every=options.every, uses_shim=self_test.SHIM not in broken
        )
        log.inputs, log.unclear = passes.inputs, passes.unclear
        log.origin = origin = Origin.of(root := selection.tree.names.get(ROOT, options.model))  # without wrappers
        passes.noted = partial(origin.note, root)
        self.recorder = Recorder(
            token,
            log,
            selection,
            passes,
            Keeper(options.policy, options.offloader, options.reductions(selection)),
            last=options.last,
            keeps_inputs=options.inputs,
            budget=None if options.max_bytes is None else Budget(options.max_bytes, log),
            stop_after=set(selection.names) if options.stop else None,
            grads=_gradients(options),
            new_record=_new_records(options, selection),
        )
        self._strict = options.strict
        self._steps: list[Callable[[], object]] = []
        self.parted = Parted(self.recorder, selection, log)
        self.convolutions: ConvolutionTap | None = None
        self._parts = [*self._taps(options), passes]  # a pass encloses the calls that the taps see

    def _note(self) -> None:
        if self.selection.tree.compiled:
            how = "compiled" if self.eager is None else f"eagerly in this capture ({self.eager})"
            self.log.notes.append(f"the compiled model ran {how}")

    def _taps(self, options: CaptureOptions) -> list[Any]:
        selection, recorder, passes, at = self.selection, self.recorder, self.passes, options.at
        owners = Owners(selection.tree, selection.modules)
        taps: list[Any] = []
        if selection.tree.has_script:
            check_script(options, sorted(selection.scripted))
        keras = selection.keras
        follower = self._follower(options, owners) if at == "activation" else None
        if selection.tree.has_keras:
            taps.append(KerasTap(options.model, keras, self.parted, passes, at=at, follower=follower))
        compiled = selection.tree.compiled if self.eager is None else {}
        others, modules = {*selection.scripted, *keras}, selection.modules
        if others:
            modules = {name: module for name, module in modules.items() if name not in others}
        outside = modules
        if compiled:
            outside = {name: module for name, module in modules.items() if name not in compiled}
        modules = modules if at == "output" else outside  # a hook would be compiled with the model
        if follower is not None:
            taps.append(follower)
        # an output that a snapshot may replace is compared with the keyword arguments too
        alone = options.policy.detach and not options.grads
        plainly = alone and self_test.SHIM not in self.broken
        module_tap = ModuleTap(self.parted.others(modules), recorder, self.token, at=at, plainly=plainly)
        taps.extend((PartTap(modules, self.parted, at=at), module_tap))
        if options.inputs:
            taps.append(InputTap(modules, recorder))
        if self.functional or selection.tree.has_script:
            tap = ConvolutionTap(
                selection,
                recorder,
                passes,
                self.token,
                owners,
                at=at,
                functions=self.functional,
                tapped=modules,
                shimmed=module_tap.shimmed,
                watched=outside,
                compiled=compiled,
                follower=follower,
                uses_key=self.uses_key,
            )
            taps.append(tap)
            self.convolutions = tap
        return taps

    def _follower(self, options: CaptureOptions, owners: Owners) -> Follower:
        if not self.functional:
            raise Unsupported(
                "at='activation' does not work with functional=False, since it follows outputs through the functions that "
                "the model calls. Pass functional=True."
            )
        follower = Follower(self.selection.tree.names, owners, self.recorder, options.activations)
        self.recorder.follow = follower.emit
        return follower

    def __enter__(self) -> Session:
        token, steps = self.token, self._steps
        self._guard = Guard(steps)
        try:
            # without self, which would be a reference cycle
            steps.append(partial(_finish_transfers, self.offloader, self.recorder, self.log))
            if self.eager is not None:
                steps.append(lambda: compile_stance.leave(token))
                compile_stance.enter(token)
            steps.append(lambda: modes.leave(token))
            modes.enter(token)
            for part in self._parts:
                steps.append(part.close)
                part.open()
        except BaseException:
            self.undo()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            self.undo()
        finally:
            self.undo()
        return self.conclude(error)

    def undo(self) -> None:
        """Removes everything from the model and the thread.

        It also removes what a failed entry registered. A second call does nothing.
        """
        undo(self._steps)

    def conclude(self, error: BaseException | None) -> bool:
        """Reports missing outputs. Returns whether ``stop`` ended the body.

        It is called after ``undo``. If the body did not raise, a missing output is an error, a warning, or
        (``strict=None``) left to the caller.
        """
        self._guard.__class__ = Spent  # type: ignore[assignment]
        strict = self._strict
        log, selection = self.log, self.selection
        if self.recorder.reads:
            log.count_bypasses()
        lacking = [name for name in log.lacking if name not in log.records]
        if lacking:
            log.notes.append(f"no such part: {listed(lacking)}")
        # only the names, so that the log keeps no module alive
        log.selected = dict.fromkeys(name for name in log.selected if name not in lacking)
        log.is_open = False
        stopped = isinstance(error, StopForward) and error.token is self.token
        if self.recorder.failure is not None and error is not None and selection.tree.has_script and strict is not None:
            raise self.recorder.failure from error  # TorchScript replaced it by a RuntimeError without its text
        try:
            if strict is not None and (error is None or stopped):
                self._warn()
                if not self._is_complete():
                    report_missing(
                        log,
                        self.recorder,
                        self.passes,
                        selection,
                        strict=strict,
                        functional=self.functional,
                        compiled=self._compiled(),
                    )
        finally:
            self.recorder.failure = None  # its traceback refers to this frame, which is a reference cycle
            self.recorder.follow = None  # it refers to the recorder, which is another one
        return stopped

    def check(self, *, needs_output: bool) -> None:
        """Raises if a layer ran and was not captured, for callers with ``strict=None``.

        Args:
            needs_output: whether it is also an error if nothing was captured.

        Raises:
            NotCaptured: a layer was bypassed or ran in another thread, or nothing was captured.
        """
        recorder, log = self.recorder, self.log
        if recorder.failure is not None:
            raise recorder.failure
        states = log.states()
        if any(state.bypassed for state in states) or (needs_output and not any(state.captured for state in states)):
            log.exact = ()
            report_missing(log, recorder, self.passes, self.selection, strict=True, functional=self.functional)
        if recorder.elsewhere:
            where = listed([f"{name} in {thread}" for thread, name in recorder.elsewhere.items()])
            raise NotCaptured(
                f"layers ran in threads that the model started, which convtap does not see: {where}. Start these threads "
                "with contextvars.copy_context().run, or run the layers in the thread of the model."
            )

    def _compiled(self) -> Collection[str]:
        """Returns the selected layers that may have run in compiled code.

        There, convtap sees a layer only if a convolution runs.
        """
        tap, tree = self.convolutions, self.selection.tree
        if self.eager is not None or tap is None:
            return ()
        calls = self.log.calls.values()
        is_around = tap.compiled_code_ran and (not calls or any(call.via == "compiled" for call in calls))
        return self.selection.modules if is_around else tree.compiled

    def _warn(self) -> None:
        message = None if self.offloader is None else self.offloader.warning()
        if message is not None:
            warn_user(message, OffloadWarning)

    def _is_complete(self) -> bool:
        """Returns whether nothing is missing, without a look at each layer."""
        log, recorder = self.log, self.recorder
        everything = recorder.reached == len(log.selected) and bool(log.records)
        quiet = not (recorder.reads or recorder.elsewhere or recorder.outside or self.passes.elsewhere)
        return everything and recorder.failure is None and quiet


def _finish_transfers(offloader: Offloader | None, recorder: Recorder, log: Log) -> None:
    """Waits for the pending copies. A failed copy makes the capture fail."""
    if offloader is not None and not offloader.drain():
        recorder.failure = recorder.failure or first_failure(log.calls.values())


def _new_records(options: CaptureOptions, selection: Selection) -> Callable[[str], LayerRecord]:
    """Returns a function that makes a layer's record.

    The record knows the layer's type and the channel axis of its output.
    """
    layouts = LayerLayouts(selection.tree, options.at)
    reduce = Reductions(options.policy.reduce, selection)
    names, paths = selection.names, selection.paths
    usual = options.at == "output" and options.policy.reduce is None and not paths

    def new(name: str) -> LayerRecord:
        module = names.get(name)
        if usual and type(module) is nn.Conv1d:
            record = LayerRecord(name, True)
            record.layout = channels_first(module.out_channels)
            return record
        record = LayerRecord(name, isinstance(names.get(name), CONV1D), paths.get(name, ""))
        record.layout = layouts.of(record.layer, reduced=reduce.of(name) is not None)
        return record

    return new


def _gradients(options: CaptureOptions) -> Gradients | None:
    if not options.grads:
        return None
    offloader = options.offloader
    return Gradients(options.policy.dtype, (lambda tensor: tensor) if offloader is None else offloader.move)
