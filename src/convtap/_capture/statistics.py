"""The public ``statistics``: a context manager like ``capture`` that keeps no outputs, only running statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from convtap._capture.options import capture_options, check_choice
from convtap._capture.session import Session
from convtap._capture.valid_frames import ValidFrames
from convtap._errors import ConvtapError, InvalidType, brief
from convtap._public import public
from convtap._record.recorder import Recorder
from convtap._result.accumulate import Accumulator, row_options
from convtap._result.call import Call
from convtap._result.layer_statistics import LayerStatistics
from convtap._result.log import Log
from convtap._result.ranks import merge_ranks, rank_count
from convtap._result.statistics import Statistics
from convtap._select.selection import CONV1D, Layers, Types
from convtap._torch import compile_stance
from convtap._torch.lock import Lock

#: Of so many passes, the shapes of their inputs stay in memory.
_PASSES = 64


@public
class StatisticsCapture:
    """Collects statistics of the outputs of a model's 1-D convolutions while the model runs, and keeps no output.

    Memory does not grow with the data. On an accelerator the statistics stay beside the layers until they are read, and no
    layer waits for them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from convtap import statistics
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))
        >>> with statistics(model) as stats:
        ...     for batch in torch.ones(10, 2, 1, 50):
        ...         y = model(batch)
        >>> stats["0"].mean.shape, int(stats["0"].count[0]), stats["2"].dead
        (torch.Size([4]), 960, [0, 1, 2, 3, 4, 5, 6, 7])

    Args:
        model: any PyTorch model.
        layers: what to collect statistics of, as in ``capture``; None for every 1-D convolution.
        types: the module types to choose from.
        at: ``"output"``, ``"input"`` or ``"activation"`` of the layers, as in ``capture``.
        every: look at forward passes 0, n, 2n, … only.
        per: ``"channel"`` for one number a channel, or ``"layer"`` for one number a layer. The channels are axis 1, or the
            last axis of layers that are known to have them there (LayerNorm, Linear, attention, Keras).
        calls: what to do with a layer that runs several times in one forward pass: ``"join"`` adds all of its runs to one
            row, ``"keys"`` has a row for each, named ``conv#0``, ``conv#1``.
        quantiles: the relative error of quantiles, which decides the memory that they take: 16 KiB a channel at 0.01. None
            for no quantiles.
        lengths: leaves out padding: a function of the model's arguments that returns the (B,) samples of each input before
            it was padded, ``lambda x, mask: mask.sum(-1)``. Needs ``timeline``. On exit a warning names the layers whose
            frames are still not those of each input alone.
        timeline: ``convtap.timeline(model, example)``, which knows how many frames of each layer those are.
        activations: module types that count as activations, besides the ones that PyTorch brings.
        functional: as in ``capture``.
        strict: as in ``capture``.
        all_reduce: under ``torch.distributed``, merge the statistics of all ranks on exit, so that every rank has the whole.
            Then every rank has to collect. False if only some do.

    Raises:
        LayerNotFound: a selector matches nothing.
        NotCaptured: on exit: no layer ran on any rank, a layer asked for by exact name did not run, or one was bypassed.
        Unsupported: in the forward pass: a layer's output has no ordinary values, or other channels than before.
        ConvtapError: an argument cannot be used (then it is a TypeError or a ValueError as well).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = None,
        *,
        types: Types = CONV1D,
        at: Literal["output", "input", "activation"] = "output",
        every: int = 1,
        per: Literal["channel", "layer"] = "channel",
        calls: Literal["join", "keys"] = "join",
        quantiles: float | None = 0.01,
        lengths: Callable[..., Sequence[int] | Tensor] | None = None,
        timeline: Any = None,
        activations: Sequence[type[nn.Module]] = (),
        functional: bool | None = None,
        strict: bool = True,
        all_reduce: bool = True,
    ) -> None:
        compile_stance.refuse_inside_compiled()
        check_choice("all_reduce", all_reduce, (True, False))
        self._rows = row_options(per, calls, quantiles)
        asked: dict[str, Any] = {"types": types, "at": at, "activations": activations}
        # What follows an output to its activation may take one back, so the newest of each layer has to keep its value.
        copy = at == "activation"
        self._options = capture_options(
            model, layers, **asked, functional=functional, strict=strict, copy=copy, every=every
        )
        self._frames = ValidFrames(model, lengths, timeline)
        self._all_reduce = all_reduce
        self._session: Session | None = None

    def __enter__(self) -> Statistics:
        if self._session is not None:
            raise ConvtapError("these statistics are being collected already. Open others with statistics(model).")
        compile_stance.refuse_inside_compiled()
        self._layers: dict[str, LayerStatistics] = {}
        self._session = session = Session(self._options)
        try:
            self._frames.open(session)
            session.__enter__()
            choose = self._frames.choose if self._frames.are_known else None
            accumulator = Accumulator(self._layers, **self._rows, choose=choose)
            kept = _Added(accumulator, session.recorder, session.log, self._options.at == "activation")
            session.log.calls = self._kept = kept
            self._result = Statistics(self._layers)
            return self._result
        except BaseException:
            self._close(session)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        session = self._session
        assert session is not None
        try:  # and no call before it
            session.undo()
        finally:
            self._close(session)
        if error is None:
            self._kept.add_rest()
            self._merge_ranks(session)
        if error is None and not session.log.records and self._layers:
            return False  # the model ran on other ranks
        stopped = session.conclude(error)
        self._frames.warn()
        return stopped

    def _close(self, session: Session) -> None:
        session.undo()  # nothing, unless an interrupt struck. See Note: [Interrupts]
        self._frames.close()
        self._session = None

    def _merge_ranks(self, session: Session) -> None:
        if not self._all_reduce or rank_count() == 1:
            return
        found = merge_ranks(self._layers, None if session.recorder.failure is None else str(session.recorder.failure))
        self._layers.clear()
        self._layers.update(found)

    def __getitem__(self, key: object) -> NoReturn:
        raise InvalidType(
            f"this collects statistics and is not their mapping, so [{brief(key)}] has no meaning here. "
            "Run the model inside: with statistics(model) as stats: model(x)"
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidType(
            "statistics(model) is not called. Run the model inside: with statistics(model) as stats: model(x)"
        )


statistics = StatisticsCapture


class _Added(dict[Any, Call]):
    """Stands where a capture keeps its calls, and adds each to the statistics instead of keeping it.

    With ``delays``, the newest call of each layer is kept until the next one, since it may be taken back.
    """

    def __init__(self, accumulator: Accumulator, recorder: Recorder, log: Log, delays: bool) -> None:
        super().__init__()
        self._accumulator = accumulator
        self._recorder = recorder
        self._log = log
        self._delays = delays
        self._lock = Lock()  # torch runs branches of a model in threads of its own

    def __setitem__(self, key: Any, call: Call) -> None:
        with self._lock:
            self._trim()
            if not self._delays:
                self._add(call)
                return
            for old in [old for old, other in self.items() if other.name == call.name]:
                self._add(self.pop(old))
            super().__setitem__(key, call)

    def add_rest(self) -> None:
        """Adds the calls that cannot be taken back any more."""
        with self._lock:
            while self:
                self._add(self.pop(next(iter(self))))

    def _add(self, call: Call) -> None:
        try:
            self._accumulator.add(call)
        except ConvtapError as error:  # remembered, since a model may swallow it
            self._recorder.failure = error
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"layer {call.name!r}: its statistics failed: {type(error).__name__}: {error}"
            self._recorder.failure = ConvtapError(what)
            raise self._recorder.failure from error

    def _trim(self) -> None:
        """Forgets the inputs of all but the newest passes."""
        for known in (self._log.inputs, self._log.unclear):
            while len(known) > _PASSES:
                del known[next(iter(known))]
