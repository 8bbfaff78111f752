"""Removes the padding of a batch from statistics, by the model's timeline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convtap._capture.session import Session
from convtap._errors import ConvtapError, InvalidType, InvalidValue, Unsupported, plural
from convtap._result.call import Call, layout_of
from convtap._result.samples import Pass, whole_numbers
from convtap._select.module_tree import is_keras
from convtap._tensors.layout import axes_of
from convtap._torch import call_shim
from convtap._torch.call_stack import pass_by_in_dynamo, skip_in_dynamo
from convtap._torch.modes import open_tokens, outside_modes


class _Here(threading.local):
    """The lengths of the inputs of this thread's current pass."""

    lengths: list[int] | None = None
    depth = 0


class ValidFrames:
    """Cuts outputs to their valid frames, by the lengths of the model's inputs.

    Args:
        model: the model.
        lengths: a function of the model's arguments that returns the samples of each input; None for all frames.
        timeline: the model's timeline.

    Raises:
        InvalidValue: only one of ``lengths`` and ``timeline`` is passed.
        InvalidType: one of them has the wrong type.
    """

    def __init__(self, model: nn.Module, lengths: Any, timeline: Any) -> None:
        if (lengths is None) != (timeline is None):
            missing = "lengths" if lengths is None else "timeline"
            raise InvalidValue(
                f"{missing}= is missing. Pass lengths= and timeline= together: statistics(model, "
                "lengths=lambda x, mask: mask.sum(-1), timeline=timeline(model, example))."
            )
        if lengths is not None and not callable(lengths):
            raise InvalidType(
                f"lengths is a {type(lengths).__name__}. Pass a function of the model's arguments that returns the samples "
                "of each input: lengths=lambda x, mask: mask.sum(-1)."
            )
        if timeline is not None and not hasattr(timeline, "__cutter__"):
            raise InvalidType(
                f"timeline is a {type(timeline).__name__}. Pass the result of timeline(model, example): timeline=axis."
            )
        if lengths is not None and is_keras(type(model)):
            raise Unsupported("lengths= does not work for a Keras model. Run its unpadded inputs one by one.")
        self._model = model
        self._lengths = lengths
        self._timeline = timeline
        self._here = _Here()
        self._is_open = False

    @property
    def are_known(self) -> bool:
        """Whether lengths were passed."""
        return self._lengths is not None

    def open(self, session: Session) -> None:
        """Starts to listen to the calls of the model."""
        if not self.are_known:
            return
        self._inputs, self._token, self._recorder = session.log.inputs, session.token, session.recorder
        self._cutter = self._timeline.__cutter__()
        self._is_open = True
        call_shim.listen(self._model, self._heard)

    def close(self) -> None:
        """Stops listening. A second call does nothing."""
        if self._is_open:
            call_shim.leave([self._model], self._heard)
            self._is_open = False

    def warn(self) -> None:
        """Warns about layers whose valid frames differ from those of each input alone."""
        if self.are_known:
            self._cutter.warn()

    @pass_by_in_dynamo
    def _heard(self, call: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = self._here
        if here.depth or self._token not in open_tokens():
            return call(*args, **kwargs)
        try:
            here.depth, here.lengths = 1, self._asked(args, kwargs)
            return call(*args, **kwargs)
        finally:
            here.depth, here.lengths = 0, None

    @skip_in_dynamo
    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        with outside_modes(), torch.no_grad():
            try:
                found = self._lengths(*args, **kwargs)
            except Exception as error:
                raise ConvtapError(
                    f"lengths failed on the model's arguments: {type(error).__name__}: {error}. Pass a function with the "
                    "parameters of the model's forward."
                ) from error
            return whole_numbers(found, "lengths")

    def choose(self, call: Call, path: str, tensor: Tensor) -> tuple[Tensor, int | None]:
        """Returns the valid frames of all inputs, joined over time, with the channel axis.

        Raises:
            Unsupported: the layer ran outside of a call of the model, or the rows of its output are not the inputs.
            InvalidValue: the number of lengths is not the number of inputs.
        """
        lengths, shape = self._here.lengths, self._inputs.get(call.forward)
        if lengths is None:
            raise Unsupported(
                f"{call.name!r} ran outside of a call of the model, so its lengths are not known. Call the model itself, or "
                "remove lengths=."
            )
        layout = layout_of(call, path)
        rows = Pass([call], shape)
        if len(lengths) != rows.size:
            raise InvalidValue(
                f"lengths returned {plural(len(lengths), 'number')} for {plural(rows.size, 'input')}. Return the number of "
                "samples of each input."
            )
        cut = self._cutter.of(lengths, shape)
        batch = axes_of(tensor.shape, layout).batch
        ones = [rows.cut(call.name, tensor, row, batch) for row in range(rows.size)]
        valid = [cut(call, call.part + path, one, row) for row, one in enumerate(ones)]
        axes = axes_of(valid[0].shape, layout, batched=False)
        if axes.time is None:
            return torch.stack(valid), -1 if axes.channel is not None else None
        return torch.cat(valid, axes.time), axes.channel
