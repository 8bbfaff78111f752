"""The public context manager ``statistics``."""

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

#: The number of passes whose input shapes stay in memory.
_PASSES = 64


@public
class StatisticsCapture:
    """Computes statistics of a model's 1-D convolutions while the model runs.

    Open it in a ``with`` statement and run the model inside, on one batch or on a whole data set. The result is a
    ``Statistics``, a mapping from each layer's name to a ``LayerStatistics`` with the mean, the standard deviation, the range
    and the quantiles of each channel.

    convtap does not keep the outputs, so memory does not grow with the data. On an accelerator the statistics stay on the
    layers' device until they are read, and no layer waits for them.

    Examples:
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
        layers: the layers to compute statistics of, as in ``capture``; None for every 1-D convolution.
        types: the module types that selectors choose from.
        at: ``"output"``, ``"input"`` or ``"activation"``, as in ``capture``.
        every: count only forward passes 0, n, 2n, ….
        per: ``"channel"`` for one value per channel, ``"layer"`` for one value per layer. The channel axis is axis 1, or the
            last axis for layers that are known to have channels there (LayerNorm, Linear, attention, Keras).
        calls: how to treat a layer that runs several times in one forward pass: ``"join"`` adds all of its calls to one row,
            ``"keys"`` makes a row for each call, named ``conv#0``, ``conv#1``.
        quantiles: the relative error of quantiles, or None for no quantiles. Smaller errors take more memory: 16 KiB per
            channel at 0.01.
        lengths: a function of the model's arguments that returns the number of samples of each input without its padding,
            (B,), such as ``lambda x, mask: mask.sum(-1)``. Statistics then skip padding. Needs ``timeline``. On exit, a
            warning names the layers whose remaining frames differ from those of each input alone.
        timeline: the result of ``convtap.timeline(model, example)``, which tells how many frames those samples make.
        activations: module types that count as activations, in addition to those of PyTorch.
        functional: as in ``capture``.
        strict: as in ``capture``.
        all_reduce: whether to merge the statistics of all ranks on exit, under ``torch.distributed``. Every rank then has the
            statistics of all data. Pass False if only some ranks compute statistics, since the merge waits for all ranks.

    Raises:
        LayerNotFound: a selector matches no layer.
        NotCaptured: on exit: no layer ran on any rank, a layer selected by its exact name did not run, or a selected layer
            was bypassed.
        Unsupported: in the forward pass: an output has no ordinary values, or its number of channels has changed.
        ConvtapError: an argument is invalid (also a TypeError or a ValueError).
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
        # The search for an activation may withdraw a call, so the newest call of each layer has to keep its value.
        copy = at == "activation"
        self._options = capture_options(
            model, layers, **asked, functional=functional, strict=strict, copy=copy, every=every
        )
        self._frames = ValidFrames(model, lengths, timeline)
        self._all_reduce = all_reduce
        self._session: Session | None = None

    def __enter__(self) -> Statistics:
        if self._session is not None:
            raise ConvtapError(
                "this statistics(model) is already open, and it cannot be opened twice. Open a second one with "
                "statistics(model)."
            )
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
        try:  # without a call before it. See Note: [Interrupts]
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
            f"[{brief(key)}] reads from statistics(model), which is not the mapping of statistics. "
            "Run the model inside: with statistics(model) as stats: model(x)"
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise InvalidType(
            "statistics(model) is not callable. Call the model inside it: with statistics(model) as stats: model(x)"
        )


statistics = StatisticsCapture


class _Added(dict[Any, Call]):
    """Replaces the calls of a log, and adds each call to the statistics.

    With ``delays``, it keeps the newest call of each layer until the next one, since the call may be withdrawn.
    """

    def __init__(self, accumulator: Accumulator, recorder: Recorder, log: Log, delays: bool) -> None:
        super().__init__()
        self._accumulator = accumulator
        self._recorder = recorder
        self._log = log
        self._delays = delays
        self._newest: dict[str, Any] = {}
        self._lock = Lock()  # torch may run branches of a model in its own threads

    def __setitem__(self, key: Any, call: Call) -> None:
        with self._lock:
            self._trim()
            if not self._delays:
                self._add(call)
                return
            old = self.pop(self._newest.get(call.name), None)
            if old is not None:
                self._add(old)
            self._newest[call.name] = key
            super().__setitem__(key, call)

    def add_rest(self) -> None:
        """Adds the remaining calls, which can no longer be withdrawn."""
        with self._lock:
            while self:
                self._add(self.pop(next(iter(self))))

    def _add(self, call: Call) -> None:
        try:
            self._accumulator.add(call)
        except ConvtapError as error:  # remembered, since a model may catch it
            self._recorder.failure = error
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"the statistics of layer {call.name!r} failed: {type(error).__name__}: {error}"
            self._recorder.failure = ConvtapError(what)
            raise self._recorder.failure from error

    def _trim(self) -> None:
        """Forgets the inputs of all passes except the newest ones."""
        for known in (self._log.inputs, self._log.unclear):
            while len(known) > _PASSES:
                del known[next(iter(known))]
