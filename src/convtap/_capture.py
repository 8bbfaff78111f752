"""The context manager: wires selection, taps, recorder and result together, and undoes all of it on exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from convtap import _eager, _process
from convtap._budget import Budget
from convtap._errors import ConvtapError, InvalidType, InvalidValue, LayerNotFound, Unsupported, listed
from convtap._grad import Gradients
from convtap._log import Log
from convtap._memory import parse_bytes
from convtap._offload import Offloader
from convtap._owners import Owners
from convtap._passes import FAST_PATHS, Passes
from convtap._policy import Policy
from convtap._record import Recorder, StopForward
from convtap._result import Activations
from convtap._select import CONV1D, Layers, Types, check_arguments, select
from convtap._tree import ModuleTree
from convtap._undo import undo
from convtap._verdict import conclude
from convtap.taps.activation import Follower, check_activations
from convtap.taps.function import FunctionTap
from convtap.taps.keras import KerasTap
from convtap.taps.module import ModuleTap
from convtap.taps.script import ScriptTap


class Capture:
    """Collects the outputs of a model's 1-D convolutions while the block runs the model.

    Nothing of the model changes: not its definition, weights, mode or results; and nothing stays on it afterwards.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import capture
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv1d(4, 8, 3, padding=1))
        >>> with capture(model) as acts:
        ...     y = model(torch.zeros(2, 1, 50))
        >>> {name: tuple(output.shape) for name, output in acts.items()}
        {'0': (2, 4, 50), '2': (2, 8, 50)}

    Args:
        model: any PyTorch model.
        layers: what to capture; None for every 1-D convolution. One of these, or several in a list: an exact name, a glob
            (``"encoder.*.conv?"``), a ``re.Pattern`` (full match), a module type, a module of the model, an int (position
            among the layers of ``types``), a function ``(name, module) -> bool``. An exact name or a module selects
            whatever type it has; the others choose among modules of ``types``.
        types: the module types to choose from; Conv1d and its quantized forms by default.
        at: ``"output"``; ``"input"`` for what the layer was given; or ``"activation"`` for the output of the first
            activation that consumes the layer's output, through normalization, dropout, reshaping and an added bias.
        detach: keep no autograd graph. With False the captured tensor is upstream of the loss, so that
            ``torch.autograd.grad(loss, acts[name])`` works.
        copy: the captured value survives later in-place operations. With False an alias is kept, and reading one that was
            changed since raises ``ModifiedInPlace``.
        offload: a device to move what is kept to, such as ``"cpu"``.
        dtype: what to cast floating-point outputs to.
        reduce: a function of the output, run on its own device before anything else: ``lambda t: t.mean(-1)``.
        keep: ``"all"`` calls of a layer, or only the ``"last"``.
        max_bytes: a limit on the memory kept, as an int or ``"2GB"``.
        grads: also collect d(loss)/d(output) of every call, as ``Call.grad``, when a backward pass runs, inside the block
            or after it. ``dtype`` and ``offload`` apply to it, ``reduce`` does not; ``max_bytes`` counts it beforehand.
        stop: end the forward pass once every selected layer has run once. Needs ``layers``; for the block's last statement.
        activations: module types that count as activations, besides the ones that PyTorch brings.
        functional: also capture convolutions that are called as functions (``F.conv1d``), under the name of their weight's
            owner. None: yes, unless the model contains a module whose own fast path watching functions would switch off
            (``nn.TransformerEncoder``, ``nn.MultiheadAttention``).
        strict: leaving the block raises ``NotCaptured`` where something that was asked for is missing; False only warns.

    Raises:
        LayerNotFound: a selector matches nothing.
        NotCaptured: on exit: nothing was captured, a layer asked for by exact name did not run, or one was bypassed.
        MemoryLimitExceeded: in the forward pass: the next output would go over ``max_bytes``.
        ConvtapError: an argument cannot be used (then it is a TypeError or a ValueError as well), or ``reduce`` failed.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        types: Types = CONV1D,
        at: Literal["output", "input", "activation"] = "output",
        detach: bool = True,
        copy: bool = True,
        offload: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        keep: Literal["all", "last"] = "all",
        max_bytes: int | str | None = None,
        grads: bool = False,
        stop: bool = False,
        activations: Sequence[type[nn.Module]] = (),
        functional: bool | None = None,
        strict: bool = True,
    ) -> None:
        _eager.refuse_inside_compiled()
        self._types = check_arguments(model, layers, types)
        _check_choice("at", at, ("output", "input", "activation"))
        _check_choice("keep", keep, ("all", "last"))
        if stop and layers is None:
            raise InvalidValue(
                "stop=True needs layers: without them nobody can say which layer is the last. "
                "Write for example capture(model, 'encoder.conv3', stop=True)."
            )
        if grads and at == "input":
            raise InvalidValue(
                "grads=True collects gradients of outputs, and at='input' captures none. Leave at= out, or capture "
                "with detach=False and take torch.autograd.grad(loss, acts[name])."
            )
        self._model = model
        self._layers = layers
        self._at = at
        self._policy = Policy(detach=detach, copy=copy, reduce=reduce, dtype=dtype)
        self._offloader = None if offload is None else Offloader(offload)
        self._last = keep == "last"
        self._max_bytes = None if max_bytes is None else parse_bytes(max_bytes, "max_bytes")
        self._grads = grads
        self._stop = stop
        self._activations = check_activations(activations)
        if self._activations and at != "activation":
            raise InvalidValue(f"activations= says what counts as one with at='activation', and at is {at!r}.")
        self._functional = functional
        self._strict = strict
        self._judges = True
        self._open: _Block | None = None
        if layers is not None:
            select(model, layers, self._types)  # a wrong name is an error here, where it was written

    def __enter__(self) -> Activations:
        if self._open is not None:
            raise ConvtapError(
                "this capture is open already, and one object holds one block. Open a second one with capture(model)."
            )
        _eager.refuse_inside_compiled()
        block = _Block(self)
        try:
            self._open = block
            block.open()
            return Activations(block.log)
        except BaseException:
            undo(block.steps)
            self._open = None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        block = self._open
        assert block is not None
        try:  # and no call before it
            undo(block.steps)
        finally:
            undo(block.steps)  # nothing, unless an interrupt struck. See Note: [Interrupts]
            self._open = None
        return block.close(error, self._strict if self._judges else None)

    def __del__(self) -> None:
        block = self.__dict__.get("_open")
        if block is not None:
            undo(block.steps)

    def __getitem__(self, key: object) -> NoReturn:
        raise InvalidType(
            f"this is the capture itself, not what it collects, so [{key!r}] means nothing here. "
            "Run the model inside a block: with capture(model) as acts: model(x)"
        )

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if hasattr(Activations, name):
            hint = f" Activations have {name!r}: with capture(model) as acts: model(x), and then acts.{name}."
        raise AttributeError(f"a capture has no attribute {name!r}.{hint}")


capture = Capture


class _Block:
    """One entry into a capture: everything that is put on the model and taken off again."""

    def __init__(self, capture: Capture) -> None:
        selection = select(capture._model, capture._layers, capture._types)
        _check_replicas(selection.tree)
        functional = capture._functional
        slowed = selection.tree.instances(FAST_PATHS) if functional is None else []
        self.functional = (not slowed if functional is None else functional) and selection.takes_functions
        if not selection.modules and not self.functional:
            raise LayerNotFound(selection.nothing())
        self.selection = selection
        self.log = log = Log(selected=selection.names, exact=selection.exact, aliases=selection.tree.aliases)
        self._note(slowed)
        token = self.token = _process.Token()
        self.passes = passes = Passes(capture._model, token)
        log.inputs = passes.inputs
        self.recorder = Recorder(
            token,
            log,
            selection.modules,
            passes,
            capture._policy,
            last=capture._last,
            offloader=capture._offloader,
            budget=None if capture._max_bytes is None else Budget(capture._max_bytes, log),
            stop_after=set(selection.names) if capture._stop else None,
            watched=self.functional,
            grads=_gradients(capture),
        )
        self.steps: list[Callable[[], object]] = []
        self._parts = [passes, *self._taps(capture)]

    def _note(self, slowed: list[str]) -> None:
        notes = self.log.notes
        if slowed:
            notes.append(f"F.conv1d calls were not watched: that would change how {listed(slowed)} computes")
        if self.selection.tree.is_compiled:
            notes.append("the compiled model ran eagerly in this block; convtap.tapped(model) can be compiled")

    def _taps(self, capture: Capture) -> list[Any]:
        selection, recorder, passes, token, at = self.selection, self.recorder, self.passes, self.token, capture._at
        taps: list[Any] = []
        scripted = set(selection.scripted)
        if selection.tree.has_script:
            _check_script(capture, sorted(scripted))
            taps.append(ScriptTap(selection, recorder, passes, token, at=at))
        keras = selection.keras
        if selection.tree.has_keras:
            taps.append(KerasTap(capture._model, keras, recorder, passes, at=at))
        modules = selection.modules
        if scripted or keras:
            modules = {name: m for name, m in modules.items() if name not in scripted and name not in keras}
        follower = self._follower(capture) if at == "activation" else None
        if follower is not None:
            taps.append(follower)
        # what may be replaced by a snapshot is compared with the keyword arguments as well
        alone = capture._policy.detach and not capture._grads
        taps.append(ModuleTap(modules, recorder, at=at, detach=alone))
        if self.functional:
            taps.append(FunctionTap(selection, recorder, passes, token, at=at, follower=follower))
        return taps

    def _follower(self, capture: Capture) -> Follower:
        if not self.functional:
            raise Unsupported(
                "at='activation' follows the outputs through the functions that the model calls, and those are not watched "
                "here (functional=False, or a module whose fast path that would switch off). Pass functional=True."
            )
        tree = self.selection.tree
        self.recorder.follower = Follower(tree.names, Owners(tree), self.recorder, capture._activations)
        return self.recorder.follower

    def open(self) -> None:
        """Puts everything on; ``steps`` takes it off, also what is half done."""
        token, steps = self.token, self.steps
        steps.append(lambda: _eager.leave(token))
        _eager.enter(token)
        steps.append(lambda: _process.leave(token))
        _process.enter(token)
        for part in self._parts:
            steps.append(part.close)
            part.open()

    def close(self, error: BaseException | None, strict: bool | None) -> bool:
        """Says what is missing, and returns whether the body ended by ``stop``.

        If it ended well, what is missing is an error (``strict``), a warning, or (None) for the caller to see.
        """
        log, selection = self.log, self.selection
        if self.recorder.reads:
            log.settle()
        log.selected = tuple(log.selected)  # the names only: what was collected keeps no module alive
        stopped = isinstance(error, StopForward) and error.token is self.token
        if strict is not None and (error is None or stopped) and not self._is_complete():
            conclude(log, self.recorder, self.passes, selection, strict=strict, functional=self.functional)
        return stopped

    def _is_complete(self) -> bool:
        """Whether all is well, found out without a look at each layer."""
        log, recorder = self.log, self.recorder
        everything = recorder.reached == len(log.selected) and bool(log.tallies)
        return everything and recorder.failure is None and not recorder.reads


def _gradients(capture: Capture) -> Gradients | None:
    if not capture._grads:
        return None
    offloader = capture._offloader
    return Gradients(capture._policy.dtype, (lambda tensor: tensor) if offloader is None else offloader.move)


def _check_replicas(tree: ModuleTree) -> None:
    """Refuses what runs copies of the model in threads of its own."""
    for wrapper in tree.wrappers:
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise Unsupported(
                f"nn.DataParallel on {len(wrapper.device_ids)} devices runs copies of the model, which no hook follows. "
                "Capture its module on one device: with capture(model.module) as acts: model.module(x); or use "
                "DistributedDataParallel, one process a device."
            )


def _check_script(capture: Capture, scripted: list[str]) -> None:
    """Refuses what TorchScript makes impossible."""
    for option, asked, instead in (
        ("detach=False", not capture._policy.detach, "values there carry no autograd graph: capture the Python model"),
        ("at='activation'", capture._at == "activation", "its functions are not seen: use at='output'"),
        ("grads=True", capture._grads, "values there carry no autograd graph: capture the Python model"),
        ("stop=True", capture._stop, "no exception passes through TorchScript: leave stop out"),
    ):
        if asked and scripted:
            raise Unsupported(f"{option} does not work for layers inside TorchScript ({listed(scripted)}): {instead}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidValue(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
