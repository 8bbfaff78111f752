"""How many frames of each layer are real, from how many samples of the input are: the rule of a chain of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convtap._errors import InvalidType, InvalidValue, Unsupported, listed
from convtap._hooks import Hooks
from convtap._tree import ModuleTree


@dataclass(frozen=True)
class _Step:
    """One convolution that ran: its geometry, and the frames that went in and came out."""

    name: str
    kernel: int
    stride: int
    padding: int
    dilation: int
    frames_in: int
    frames_out: int

    def frames(self, length: int) -> int:
        """The number of frames that it gives for an input of ``length``.

        floor((L + P - d (k - 1) - 1) / s) + 1 with P the padding of both sides together (torch.nn.Conv1d's documentation).
        """
        reach = self.dilation * (self.kernel - 1) + 1
        return max((length + self.padding - reach) // self.stride + 1, 0)


def _step(name: str, module: nn.Conv1d, frames_in: int, frames_out: int) -> _Step:
    kernel, stride, dilation = module.kernel_size[0], module.stride[0], module.dilation[0]
    if isinstance(module.padding, str):
        padding = dilation * (kernel - 1) if module.padding == "same" else 0
    else:
        padding = 2 * module.padding[0]
    return _Step(name, kernel, stride, padding, dilation, frames_in, frames_out)


class ValidLengths:
    """The rule of each layer, found by watching one forward pass of the whole model.

    The rule holds for a plain chain: every convolution takes what the one before it gave, and the numbers of frames that
    its geometry gives for the full input are the ones that are seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._convolutions = {
            name: module for name, module in ModuleTree(model).names.items() if isinstance(module, nn.Conv1d)
        }
        self._steps: list[_Step] = []

    @property
    def known(self) -> bool:
        """Whether a forward pass was watched already."""
        return bool(self._steps)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notes which convolutions run, in order, during one forward pass."""
        hooks = Hooks()
        self._steps = []
        try:
            for name, module in self._convolutions.items():
                hooks.after(module, self._note, name)
            yield
        finally:
            hooks.remove()

    def _note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self._steps.append(_step(name, self._convolutions[name], args[0].shape[-1], output.shape[-1]))

    def frames(self, layer: str, length: int) -> int:
        """Returns how many frames of a layer are real for an input of ``length`` samples.

        Raises:
            Unsupported: the layer is not part of a plain chain of convolutions.
        """
        for step in self._chain(layer):
            length = step.frames(length)
        return length

    def _chain(self, layer: str) -> list[_Step]:
        names = [step.name for step in self._steps]
        if layer not in names:
            raise Unsupported(_unknown(layer, f"it is no Conv1d that ran; those are: {listed(names)}"))
        if names.count(layer) > 1:
            raise Unsupported(_unknown(layer, f"it ran {names.count(layer)} times in one forward pass"))
        chain = self._steps[: names.index(layer) + 1]
        frames = chain[0].frames_in
        for step in chain:
            if step.frames_in != frames:
                raise Unsupported(
                    _unknown(
                        layer,
                        f"the convolutions are no plain chain: {step.name!r} was given {step.frames_in} frames "
                        f"where the one before it gave {frames}",
                    )
                )
            frames = step.frames(frames)
            if frames != step.frames_out:
                raise Unsupported(
                    _unknown(layer, f"{step.name!r} gave {step.frames_out} frames where its geometry gives {frames}")
                )
        return chain

    def check(self, layer: str, full: int, seen: int) -> None:
        """Compares the rule with what was seen for a padded batch of ``full`` samples.

        Raises:
            Unsupported: they differ.
        """
        expected = self.frames(layer, full)
        if expected != seen:
            raise Unsupported(
                _unknown(layer, f"for {full} input samples it gave {seen} frames, and its geometry {expected}")
            )


def _unknown(layer: str, why: str) -> str:
    return (
        f"lengths= needs the number of real frames of {layer!r}, and it is not known: {why}. Select layers of the plain "
        "chain, or extract without lengths= and cut the rows yourself."
    )


def checked_lengths(lengths: Callable[[Any], Any], batch: Any, size: int, full: int) -> list[int]:
    """Calls the user's ``lengths`` on a batch, and checks what it returns: one number of input samples a row.

    Raises:
        InvalidType: it is not a sequence of ints.
        InvalidValue: there are more or fewer than rows, or one is longer than the padded input.
    """
    found = lengths(batch)
    try:
        values = torch.as_tensor(found).reshape(-1)
        good = not values.is_floating_point() and values.dtype != torch.bool
    except (TypeError, ValueError, RuntimeError):
        good = False
    if not good:
        raise InvalidType(
            f"lengths(batch) returned a {type(found).__name__} that is no sequence of ints. Return one number of input "
            "samples for each row, such as batch['attention_mask'].sum(1)."
        )
    numbers: list[int] = values.tolist()
    if len(numbers) != size:
        raise InvalidValue(f"lengths(batch) returned {len(numbers)} lengths for {size} rows. Return one for each row.")
    for number in numbers:
        if not 0 <= number <= full:
            raise InvalidValue(
                f"lengths(batch) returned {number}, and the padded input has {full} samples: a row's length lies between."
            )
    return numbers
