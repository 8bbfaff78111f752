"""Writes and reads statistics as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from convtap._atomic_write import write_whole
from convtap._errors import StoreError
from convtap._result.file import check_path, unwritable
from convtap._result.layer_statistics import LayerStatistics, is_by_channel, source_of
from convtap._tensors.channel_statistics import ChannelStatistics

_KEY, _FORMAT = "convtap_statistics", 1


def write(layers: Mapping[str, LayerStatistics], path: str | os.PathLike[str]) -> None:
    """Writes statistics to a file, which gets its name only when it is complete."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    check_path(target)
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for number, (name, layer) in enumerate(layers.items()):
        source = source_of(layer).to("cpu")
        tensors.update({f"{number}.{key}": tensor.contiguous() for key, tensor in source.tensors().items()})
        digits = None if source.sketch is None else source.sketch.digits
        about = {"name": name, "calls": layer.calls, "by_channel": is_by_channel(layer)}
        described.append({**about, "count": source.count, "digits": digits})
    metadata = {_KEY: json.dumps({"format": _FORMAT, "layers": described})}
    try:
        write_whole(target, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except (OSError, SafetensorError) as error:
        raise StoreError(unwritable(target, error)) from error


def read(path: str | os.PathLike[str]) -> dict[str, LayerStatistics]:
    """Reads statistics from a file that ``write`` wrote; see ``Statistics.load``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except FileNotFoundError:
        raise StoreError(f"the file {str(path)!r} does not exist. Write it with stats.save(path).") from None
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"{str(path)!r} cannot be read as a safetensors file: {error}. Write it again with stats.save(path)."
        ) from error
    if text is None:
        raise StoreError(
            f"{str(path)!r} does not hold statistics. Write them with stats.save(path), or read outputs with convtap.load."
        )
    try:
        content = json.loads(text)
        if content["format"] > _FORMAT:
            raise StoreError(
                f"{str(path)!r} has format {content['format']}, but this convtap reads formats up to {_FORMAT}. Update it: "
                "pip install -U convtap."
            )
        return {layer["name"]: _layer(layer, number, tensors) for number, layer in enumerate(content["layers"])}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(
            f"the metadata of {str(path)!r} does not describe its layers: {error!r}. Write the file again with "
            "stats.save(path)."
        ) from error


def _layer(about: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> LayerStatistics:
    prefix = f"{number}."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    source = ChannelStatistics.of_tensors(int(about["count"]), about["digits"], own)
    return LayerStatistics(about["name"], source, by_channel=bool(about["by_channel"]), calls=int(about["calls"]))
