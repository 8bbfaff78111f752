"""Checks one model of the gallery in its environment, and prints a line of JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import declare_torchvision_operators, interleave, paired_ratio, quartiles
from convtap import Call, capture
from gallery.reference import Convolution, convolutions

#: The largest relative difference from the reference that rounding to float32 explains.
TOLERANCE = 1e-4
ROUNDS = 30


def difference(output: Tensor, expected: Tensor) -> float:
    """Returns the largest difference, relative to the largest expected value.

    It is infinite if the shapes differ.
    """
    if output.shape != expected.shape:
        return float("inf")
    return ((output.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def differences(calls: Sequence[Call], expected: Sequence[Tensor]) -> list[float]:
    """Returns the difference of each captured convolution.

    Calls and convolutions are in execution order.
    """
    found, rest = [], list(calls)
    for value in expected:
        for i, call in enumerate(rest):
            if (apart := difference(call.output, value)) <= TOLERANCE:
                found.append(apart)
                del rest[: i + 1]
                break
    return found


def check(module: ModuleType) -> dict[str, Any]:
    """Returns the row of one model."""
    with torch.no_grad():
        model, run = module.load()
        ran = convolutions(run)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with capture(model) as acts:
                run()
        calls = acts.calls()
        after: Callable[[Any, str, Convolution], Tensor] = getattr(module, "captured", by_hand)
        names = [call.layer for call in calls] + [""] * len(ran)
        found = differences(calls, [after(model, name, each) for name, each in zip(names, ran, strict=False)])

        def captured() -> None:
            with capture(model):
                run()

        seconds = interleave({"plain": run, "capture": captured}, ROUNDS)
    warned_of = [str(w.message) for w in warned if w.category.__module__.startswith("convtap")]
    return {
        "title": module.TITLE,
        "layers": len({call.layer for call in calls}),
        "via": sorted({call.via for call in calls}),
        "convolutions": len(ran),
        "captured": len(found),
        "difference": max(found, default=None),
        "reason": reason(len(found), len(ran), len(calls), warned_of),
        "milliseconds": 1000 * quartiles(seconds["plain"])[1],
        "ratio": paired_ratio(seconds["capture"], seconds["plain"]),
    }


def reason(found: int, ran: int, calls: int, warned: Sequence[str]) -> str:
    """Returns why a convolution is missing or wrong, or an empty string."""
    if found == ran == calls:
        return ""
    return "; ".join([f"{calls} calls captured, {found} of them right", *warned])


def by_hand(model: Any, name: str, convolution: Convolution) -> Tensor:
    """Returns the expected value of a captured convolution."""
    return convolution.by_hand()


def main(name: str) -> None:
    """Prints the row of one model, or its error."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    declare_torchvision_operators()
    row: dict[str, Any] = {"package": name.replace("_", "-")}
    try:
        row["version"] = importlib.metadata.version(name)
        row |= check(importlib.import_module(f"gallery.models.{name}"))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(json.dumps(row | {"torch": torch.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])
