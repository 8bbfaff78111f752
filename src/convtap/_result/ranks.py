"""Merges the statistics of all ranks of a distributed run."""

from __future__ import annotations

from typing import Any

import torch.distributed

from convtap._errors import ConvtapError
from convtap._result.layer_statistics import LayerStatistics
from convtap._result.statistics import merged_layer

# Note: [Ranks]
# Assumption: all ranks compute statistics of one model, and reach the end of the ``with`` statement.
# Failure: a rank without data, or a rank that failed, may lack layers that other ranks have. Collectives that do not match
#   wait forever. The states of all layers and ranks at once may exceed the memory of one rank.
# Choice: the ranks first exchange the names of their layers, and whether they failed. Then they gather and merge one layer at
#   a time. A rank whose model raised does not take part. torch ends the wait of the other ranks as for any collective.


def rank_count() -> int:
    """Returns the number of ranks, which is 1 without ``torch.distributed``."""
    found = torch.distributed
    return found.get_world_size() if found.is_available() and found.is_initialized() else 1


def merge_ranks(layers: dict[str, LayerStatistics], failure: str | None) -> dict[str, LayerStatistics]:
    """Returns the merged statistics of all ranks, on each rank. See Note: [Ranks].

    Raises:
        ConvtapError: a rank failed.
        InvalidValue: a layer has different channels on two ranks.
    """
    names = _gathered((list(layers), failure))
    failed = {rank: text for rank, (_, text) in enumerate(names) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        raise ConvtapError(f"the statistics of rank {rank} are incomplete: {text}")
    found: dict[str, LayerStatistics] = {}
    for name in dict.fromkeys(name for own, _ in names for name in own):
        mine = layers.get(name)
        parts = _gathered(None if mine is None else merged_layer([mine]))  # on the CPU
        found[name] = merged_layer([part for part in parts if part is not None])
    return found


def _gathered(own: Any) -> list[Any]:
    found: list[Any] = [None] * rank_count()
    torch.distributed.all_gather_object(found, own)
    return found
