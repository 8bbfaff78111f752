"""The checked options of ``extract``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convtap._capture.options import CaptureOptions, capture_options
from convtap._dataset.layout import check_part
from convtap._errors import InvalidType, InvalidValue, Unsupported
from convtap._record.policy import Policy
from convtap._record.reductions import Reduce, Reductions
from convtap._select.batch import Inputs
from convtap._select.selection import CONV1D, Layers, Selection, Types, select
from convtap._tensors.memory import parse_bytes
from convtap._time.signal import checked_time_dim

#: The options that are functions of a batch.
FUNCTIONS = ("inputs", "ids", "lengths", "labels")


@dataclass(frozen=True)
class ExtractOptions:
    """The options of an extraction; the others are the arguments of ``extract``.

    The constructor checks the options that do not depend on the model.

    Attributes:
        capture: the options of the capture of each batch. With ``lengths``, ``reduce`` and ``dtype`` apply after rows are cut.
        selection: the selected layers.
        reductions: the function of each layer.
        device: the device of the inputs.
    """

    capture: CaptureOptions
    selection: Selection
    reductions: Reductions
    device: torch.device
    reduce: Reduce | None
    dtype: torch.dtype | None
    reduce_id: str | None = None
    inputs: Inputs | None = None
    ids: Callable[[Any], Any] | None = None
    lengths: Callable[[Any], Any] | None = None
    labels: Callable[[Any], Any] | None = None
    signal: str | int | None = None
    time_dim: int | None = None
    calls: str = "error"
    batch_size: int = 1
    num_workers: int = 0
    collate_fn: Callable[[Any], Any] | None = None
    method: str | None = None
    mode: str = "eval"
    autocast: torch.dtype | None = None
    compile: bool = False
    part: tuple[int, int] | None = None
    shard_bytes: int = 32_000_000
    resume: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("calls", ("error", "cat", "keys")), ("mode", ("eval", "train"))):
            if getattr(self, name) not in choices:
                shown = ", ".join(map(repr, choices))
                raise InvalidValue(f"{name}={getattr(self, name)!r} is invalid. Pass one of {shown}.")
        for name in (*FUNCTIONS, "collate_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise InvalidType(
                    f"{name} is a {type(function).__name__}, not a function. Pass a function of a batch: {name}=lambda batch: "
                    "..."
                )
        if self.compile and self.capture.stop:
            raise InvalidValue(
                "stop=True cannot end a compiled forward pass. Pass stop=True or compile=True, not both."
            )
        if self.compile and self.method is not None:
            raise Unsupported(
                f"compile=True compiles the model's forward, not method={self.method!r}. Remove one of them."
            )
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise InvalidType(f"autocast={self.autocast!r} is not a dtype. Pass one such as torch.bfloat16, or None.")
        if self.time_dim is not None:
            checked_time_dim(self.time_dim)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.capture.model

    @property
    def functions(self) -> list[str]:
        """The names of the functions of a batch that the user passed."""
        return [name for name in FUNCTIONS if getattr(self, name) is not None]


def extract_options(
    model: nn.Module,
    layers: Layers = None,
    *,
    types: Types = CONV1D,
    at: str = "output",
    reduce: Reduce | None = None,
    dtype: torch.dtype | None = None,
    stop: bool = False,
    device: str | torch.device | None = None,
    lengths: Callable[[Any], Any] | None = None,
    part: tuple[int, int] | None = None,
    shard_bytes: int | str = "32MB",
    **others: Any,
) -> ExtractOptions:
    """Checks the arguments of ``extract`` and returns them as one object.

    Raises:
        LayerNotFound: a selector, or an entry of ``reduce``, matches nothing.
        InvalidType, InvalidValue, Unsupported: an argument is invalid.
    """
    policy = Policy(reduce=reduce, dtype=dtype)
    # layers that did not run are reported after all batches
    capture = capture_options(model, layers, types=types, at=at, stop=stop).without_checks(
        policy if lengths is None else None
    )
    selection = select(model, capture.layers, capture.types)
    return ExtractOptions(
        capture=capture,
        selection=selection,
        reductions=Reductions(reduce, selection),
        device=find_device(model, device),
        reduce=reduce,
        dtype=dtype,
        lengths=lengths,
        part=None if part is None else check_part(part),
        shard_bytes=parse_bytes(shard_bytes, "shard_bytes"),
        **others,
    )


def find_device(model: nn.Module, device: Any) -> torch.device:
    """Returns the device of the inputs, by default the first parameter's.

    Raises:
        InvalidValue: ``device`` is not a device, or is not the model's.
    """
    tensors = [*model.parameters(), *model.buffers()]
    own = tensors[0].device if tensors else torch.device("cpu")
    if device is None:
        return own
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidValue(f"device={device!r} is not a device. Pass device='cuda', or remove device=.") from None
    if tensors and asked.type not in {tensor.device.type for tensor in tensors}:
        raise InvalidValue(
            f"device={str(asked)!r}, but the model is on {str(own)!r}. Move it first: model.to({str(asked)!r})."
        )
    return asked
