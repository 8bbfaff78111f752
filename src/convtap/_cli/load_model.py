"""Makes the model that the command line is given as ``pkg.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from convtap._errors import InvalidType, InvalidValue, did_you_mean, one_line

_WRITE = (
    "Write pkg.module:factory, where factory is a function without arguments that returns the model (or is the model)."
)


def load_model(spec: str) -> nn.Module:
    """Returns the model that a factory makes. Modules are looked for in the current folder first.

    The random seed is 0 while it is made, so that a model with random weights is the same one every time.

    Raises:
        InvalidValue: there is no such module or factory, or importing or calling it fails.
        InvalidType: what it gives is no ``nn.Module``.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise InvalidValue(f"{spec!r} is no factory. {_WRITE}")
    found: Any = _import(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            raise InvalidValue(f"{module_name!r} has no {path!r}.{did_you_mean(name, dir(found))}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InvalidType(f"{spec!r} is a {type(found).__name__}, no function and no model. {_WRITE}")
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found = found()
        except Exception as error:
            raise InvalidValue(f"{spec!r} failed: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(found, nn.Module):
        raise InvalidType(f"{spec!r} returned a {type(found).__name__}, no torch.nn.Module. {_WRITE}")
    return found


def _import(name: str) -> Any:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InvalidValue(
                f"there is no module {name!r} in the current folder or among the installed packages."
            ) from None
        raise InvalidValue(f"importing {name!r} failed: {one_line(error)}") from error
    except Exception as error:
        raise InvalidValue(f"importing {name!r} failed: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(here)
