"""One entry into a capture: wires selection, taps, recorder and log together, and undoes all of it on exit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from convtap._budget import Budget
from convtap._errors import LayerNotFound, OffloadWarning, Unsupported, listed
from convtap._grad import Gradients
from convtap._keep import Keeper
from convtap._log import Log
from convtap._offload import Offloader, first_failure
from convtap._owners import Owners
from convtap._passes import FAST_PATHS, Passes
from convtap._policy import Policy
from convtap._record import Recorder, StopForward
from convtap._select import Layers, select
from convtap._torch import compile_stance, modes
from convtap._tree import ModuleTree
from convtap._verdict import conclude
from convtap.taps.activation import Follower
from convtap.taps.function import FunctionTap
from convtap.taps.keras import KerasTap
from convtap.taps.module import ModuleTap
from convtap.taps.script import ScriptTap


@dataclass
class Asked:
    """What a capture was asked for, checked."""

    model: nn.Module
    layers: Layers
    types: tuple[type[nn.Module], ...]
    at: str
    policy: Policy
    offloader: Offloader | None
    last: bool
    max_bytes: int | None
    grads: bool
    stop: bool
    activations: tuple[type[nn.Module], ...]
    functional: bool | None


class Block:
    """One entry into a capture: everything that is put on the model and taken off again."""

    def __init__(self, asked: Asked) -> None:
        selection = select(asked.model, asked.layers, asked.types)
        _check_replicas(selection.tree)
        functional = asked.functional
        slowed = selection.tree.instances(FAST_PATHS) if functional is None else []
        self.functional = (not slowed if functional is None else functional) and selection.takes_functions
        if not selection.modules and not self.functional:
            raise LayerNotFound(selection.nothing())
        self.selection = selection
        self.offloader = asked.offloader
        self.log = log = Log(selected=selection.names, exact=selection.exact, aliases=selection.tree.aliases)
        self._note(slowed)
        token = self.token = modes.Token()
        self.passes = passes = Passes(asked.model, token)
        log.inputs = passes.inputs
        self.recorder = Recorder(
            token,
            log,
            selection,
            passes,
            Keeper(asked.policy, asked.offloader),
            last=asked.last,
            budget=None if asked.max_bytes is None else Budget(asked.max_bytes, log),
            stop_after=set(selection.names) if asked.stop else None,
            watched=self.functional,
            grads=_gradients(asked),
        )
        self.steps: list[Callable[[], object]] = []
        self._parts = [passes, *self._taps(asked)]

    def _note(self, slowed: list[str]) -> None:
        notes = self.log.notes
        if slowed:
            notes.append(f"F.conv1d calls were not watched: that would change how {listed(slowed)} computes")
        if self.selection.tree.is_compiled:
            notes.append("the compiled model ran eagerly in this block; convtap.tapped(model) can be compiled")

    def _taps(self, asked: Asked) -> list[Any]:
        selection, recorder, passes, token, at = self.selection, self.recorder, self.passes, self.token, asked.at
        taps: list[Any] = []
        scripted = set(selection.scripted)
        if selection.tree.has_script:
            _check_script(asked, sorted(scripted))
            taps.append(ScriptTap(selection, recorder, passes, token, at=at))
        keras = selection.keras
        if selection.tree.has_keras:
            taps.append(KerasTap(asked.model, keras, recorder, passes, at=at))
        modules = selection.modules
        if scripted or keras:
            modules = {name: m for name, m in modules.items() if name not in scripted and name not in keras}
        follower = self._follower(asked) if at == "activation" else None
        if follower is not None:
            taps.append(follower)
        # what may be replaced by a snapshot is compared with the keyword arguments as well
        alone = asked.policy.detach and not asked.grads
        taps.append(ModuleTap(modules, recorder, at=at, detach=alone))
        if self.functional:
            taps.append(FunctionTap(selection, recorder, passes, token, at=at, follower=follower))
        return taps

    def _follower(self, asked: Asked) -> Follower:
        if not self.functional:
            raise Unsupported(
                "at='activation' follows the outputs through the functions that the model calls, and those are not watched "
                "here (functional=False, or a module whose fast path that would switch off). Pass functional=True."
            )
        tree = self.selection.tree
        self.recorder.follower = Follower(tree.names, Owners(tree), self.recorder, asked.activations)
        return self.recorder.follower

    def open(self) -> None:
        """Puts everything on; ``steps`` takes it off, also what is half done."""
        token, steps = self.token, self.steps
        steps.append(self._land)
        steps.append(lambda: compile_stance.leave(token))
        compile_stance.enter(token)
        steps.append(lambda: modes.leave(token))
        modes.enter(token)
        for part in self._parts:
            steps.append(part.close)
            part.open()
        self.passes.open_end()

    def close(self, error: BaseException | None, strict: bool | None) -> bool:
        """Says what is missing once ``steps`` were undone, and returns whether the body ended by ``stop``.

        If it ended well, what is missing is an error (``strict``), a warning, or (None) for the caller to see.
        """
        log, selection = self.log, self.selection
        if self.recorder.reads:
            log.settle()
        log.selected = tuple(log.selected)  # the names only: what was collected keeps no module alive
        stopped = isinstance(error, StopForward) and error.token is self.token
        if self.recorder.failure is not None and error is not None and selection.tree.has_script and strict is not None:
            raise self.recorder.failure from error  # TorchScript has made a RuntimeError without a text of it
        try:
            if strict is not None and (error is None or stopped):
                self._warn()
                if not self._is_complete():
                    conclude(log, self.recorder, self.passes, selection, strict=strict, functional=self.functional)
        finally:
            self.recorder.failure = None  # its traceback leads back here: a cycle
        return stopped

    def _land(self) -> None:
        """Waits for what is still being copied. One that failed makes the block fail, and raises whenever it is read."""
        if self.offloader is not None and not self.offloader.drain():
            self.recorder.failure = self.recorder.failure or first_failure(self.log.calls.values())

    def _warn(self) -> None:
        message = None if self.offloader is None else self.offloader.warning()
        if message is not None:
            warnings.warn(message, OffloadWarning, stacklevel=4)  # at the user's with statement

    def _is_complete(self) -> bool:
        """Whether all is well, found out without a look at each layer."""
        log, recorder = self.log, self.recorder
        everything = recorder.reached == len(log.selected) and bool(log.tallies)
        return everything and recorder.failure is None and not (recorder.reads or recorder.elsewhere)


def _gradients(asked: Asked) -> Gradients | None:
    if not asked.grads:
        return None
    offloader = asked.offloader
    return Gradients(asked.policy.dtype, (lambda tensor: tensor) if offloader is None else offloader.move)


def _check_replicas(tree: ModuleTree) -> None:
    """Refuses what runs copies of the model in threads of its own."""
    for wrapper in tree.wrappers:
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise Unsupported(
                f"nn.DataParallel on {len(wrapper.device_ids)} devices runs copies of the model, which no hook follows. "
                "Capture its module on one device: with capture(model.module) as acts: model.module(x); or use "
                "DistributedDataParallel, one process a device."
            )


def _check_script(asked: Asked, scripted: list[str]) -> None:
    """Refuses what TorchScript makes impossible."""
    for option, wanted, instead in (
        ("detach=False", not asked.policy.detach, "values there carry no autograd graph: capture the Python model"),
        ("at='activation'", asked.at == "activation", "its functions are not seen: use at='output'"),
        ("grads=True", asked.grads, "values there carry no autograd graph: capture the Python model"),
        ("stop=True", asked.stop, "no exception passes through TorchScript: leave stop out"),
    ):
        if wanted and scripted:
            raise Unsupported(f"{option} does not work for layers inside TorchScript ({listed(scripted)}): {instead}.")
