"""One entry into a capture: wires selection, taps, recorder and log together, and undoes all of it on exit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from convtap._budget import Budget
from convtap._call import Tally
from convtap._errors import LayerNotFound, OffloadWarning, StopForward, Unsupported, listed
from convtap._grad import Gradients
from convtap._keep import Keeper
from convtap._layer_layout import LayerLayouts
from convtap._log import Log
from convtap._offload import Offloader, first_failure
from convtap._owners import Owners
from convtap._passes import Passes
from convtap._policy import Policy
from convtap._record import Recorder
from convtap._reduce import Reductions
from convtap._select import CONV1D, Layers, Selection, select
from convtap._torch import compile_stance, modes, self_test
from convtap._tree import ModuleTree
from convtap._verdict import conclude
from convtap.taps.activation import Follower
from convtap.taps.convolutions import ConvolutionTap
from convtap.taps.keras import KerasTap
from convtap.taps.module import ModuleTap, is_plain
from convtap.taps.parts import Parted, PartTap


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

    def reductions(self, selection: Selection) -> Reductions | None:
        """Returns the function of each layer, if ``reduce`` is a mapping from layers to functions."""
        return Reductions(self.policy.reduce, selection) if isinstance(self.policy.reduce, Mapping) else None


class Block:
    """One entry into a capture: everything that is put on the model and taken off again."""

    def __init__(self, asked: Asked) -> None:
        selection = select(asked.model, asked.layers, asked.types)
        _check_replicas(selection.tree)
        self.broken = broken = self_test.run()
        self.uses_key = self_test.KEY not in broken
        self.functional = asked.functional is not False and selection.takes_functions and self_test.STACK not in broken
        self.eager = _why_eager(asked, selection, self.uses_key)
        if not selection.modules and not self.functional:
            raise LayerNotFound(selection.nothing())
        self.selection = selection
        self.offloader = asked.offloader
        self.log = log = Log(selected=selection.names, exact=selection.exact, aliases=selection.tree.aliases)
        self._note()
        token = self.token = modes.Token()
        self.passes = passes = Passes(
            asked.model, token, selection.tree.name_of, uses_shim=self_test.SHIM not in broken
        )
        log.inputs, log.unclear = passes.inputs, passes.unclear
        self.recorder = Recorder(
            token,
            log,
            selection,
            passes,
            Keeper(asked.policy, asked.offloader, asked.reductions(selection)),
            last=asked.last,
            budget=None if asked.max_bytes is None else Budget(asked.max_bytes, log),
            stop_after=set(selection.names) if asked.stop else None,
            grads=_gradients(asked),
            new_tally=_tallies(asked, selection),
        )
        self.steps: list[Callable[[], object]] = []
        self.parted = Parted(self.recorder, selection, log)
        self.convolutions: ConvolutionTap | None = None
        self._parts = [*self._taps(asked), passes]  # a pass is around what the taps see

    def _note(self) -> None:
        if self.selection.tree.compiled:
            how = "compiled" if self.eager is None else f"eagerly in this capture ({self.eager})"
            self.log.notes.append(f"the compiled model ran {how}")

    def _taps(self, asked: Asked) -> list[Any]:
        selection, recorder, passes, at = self.selection, self.recorder, self.passes, asked.at
        owners = Owners(selection.tree, selection.modules)
        taps: list[Any] = []
        if selection.tree.has_script:
            _check_script(asked, sorted(selection.scripted))
        keras = selection.keras
        follower = self._follower(asked, owners) if at == "activation" else None
        if selection.tree.has_keras:
            taps.append(KerasTap(asked.model, keras, self.parted, passes, at=at, follower=follower))
        compiled = selection.tree.compiled if self.eager is None else {}
        others, modules = {*selection.scripted, *keras}, selection.modules
        if others:
            modules = {name: module for name, module in modules.items() if name not in others}
        outside = modules
        if compiled:
            outside = {name: module for name, module in modules.items() if name not in compiled}
        modules = modules if at == "output" else outside  # a hook would become part of what is compiled
        if follower is not None:
            taps.append(follower)
        # what may be replaced by a snapshot is compared with the keyword arguments as well
        alone = asked.policy.detach and not asked.grads
        plainly = alone and self_test.SHIM not in self.broken
        module_tap = ModuleTap(self.parted.others(modules), recorder, self.token, at=at, plainly=plainly)
        taps.extend((PartTap(modules, self.parted, at=at), module_tap))
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

    def _follower(self, asked: Asked, owners: Owners) -> Follower:
        if not self.functional:
            raise Unsupported(
                "at='activation' follows the outputs through the functions that the model calls, and functional=False does "
                "not watch those. Leave functional out."
            )
        follower = Follower(self.selection.tree.names, owners, self.recorder, asked.activations)
        self.recorder.follow = follower.emit
        return follower

    def open(self) -> None:
        """Puts everything on; ``steps`` takes it off, also what is half done."""
        token, steps = self.token, self.steps
        steps.append(self._land)
        if self.eager is not None:
            steps.append(lambda: compile_stance.leave(token))
            compile_stance.enter(token)
        steps.append(lambda: modes.leave(token))
        modes.enter(token)
        for part in self._parts:
            steps.append(part.close)
            part.open()

    def close(self, error: BaseException | None, strict: bool | None) -> bool:
        """Says what is missing once ``steps`` were undone, and returns whether the body ended by ``stop``.

        If it ended well, what is missing is an error (``strict``), a warning, or (None) for the caller to see.
        """
        log, selection = self.log, self.selection
        if self.recorder.reads:
            log.settle()
        lacking = [name for name in log.lacking if name not in log.tallies]
        if lacking:
            log.notes.append(f"no such part: {listed(lacking)}")
        # the names only: what was collected keeps no module alive
        log.selected = tuple(name for name in log.selected if name not in lacking)
        stopped = isinstance(error, StopForward) and error.token is self.token
        if self.recorder.failure is not None and error is not None and selection.tree.has_script and strict is not None:
            raise self.recorder.failure from error  # TorchScript has made a RuntimeError without a text of it
        try:
            if strict is not None and (error is None or stopped):
                self._warn()
                if not self._is_complete():
                    conclude(
                        log,
                        self.recorder,
                        self.passes,
                        selection,
                        strict=strict,
                        functional=self.functional,
                        compiled=self._compiled(),
                    )
        finally:
            self.recorder.failure = None  # its traceback leads back here: a cycle
            self.recorder.follow = None  # which has the recorder: another one
        return stopped

    def _compiled(self) -> Collection[str]:
        """The selected layers that may have run in compiled code, where they are seen only if a convolution runs."""
        tap, tree = self.convolutions, self.selection.tree
        if self.eager is not None or tap is None:
            return ()
        calls = self.log.calls.values()
        is_around = tap.compiled_code_ran and (not calls or any(call.via == "compiled" for call in calls))
        return self.selection.modules if is_around else tree.compiled

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
        quiet = not (recorder.reads or recorder.elsewhere or recorder.outside or self.passes.elsewhere)
        return everything and recorder.failure is None and quiet


def _why_eager(asked: Asked, selection: Selection, uses_key: bool) -> str | None:
    """Why the compiled parts of a model have to run eagerly for this capture, or None if they need not."""
    compiled = selection.tree.compiled
    if not compiled:
        return None
    for option, wanted in (
        ("detach=False", not asked.policy.detach),
        ("grads=True", asked.grads),
        (f"at={asked.at!r}", asked.at == "activation"),
        ("functional=False", asked.functional is False),
        ("this torch has no convolution key", not uses_key),
        (f"the compiler's stance is {compile_stance.current()!r}", compile_stance.current() != "default"),
        ("its graph is replayed by CUDA", any(map(compile_stance.uses_cuda_graphs, selection.tree.wrappers))),
    ):
        if wanted:
            return option
    selected = {name: module for name, module in selection.modules.items() if name in compiled}
    others = [name for name, m in selected.items() if not is_plain(m) or (asked.at == "input" and _pads(m))]
    if others:
        return (
            f"{listed(others)} is not a plain Conv1d" if len(others) == 1 else f"{listed(others)} are not plain Conv1d"
        )
    weights = [id(module.weight) for module in selected.values()]
    return "two layers have one weight" if len(set(weights)) < len(weights) else None


def _pads(module: nn.Module) -> bool:
    return getattr(module, "padding_mode", "zeros") != "zeros"


def _tallies(asked: Asked, selection: Selection) -> Callable[[str], Tally]:
    """Returns what opens a layer's account: it knows the layer's type, and where its output has its channels."""
    layouts = LayerLayouts(selection.tree, asked.at)
    reduce = Reductions(asked.policy.reduce, selection)
    names, paths = selection.names, selection.paths

    def new(name: str) -> Tally:
        tally = Tally(name, isinstance(names.get(name), CONV1D), paths.get(name, ""))
        tally.layout = layouts.of(tally.layer, reduced=reduce.of(name) is not None)
        return tally

    return new


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
