"""Builds a command's model from ``pkg.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from convtap._cli.user_code import run_user_code
from convtap._errors import InvalidType, InvalidValue, did_you_mean, listed, one_line
from convtap._select.arguments import check_arguments
from convtap._select.module_tree import is_keras

_WHAT = "a function without arguments that returns the model, or the model itself"
_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".h5", ".keras")


@contextmanager
def own_path() -> Iterator[None]:
    """Restores ``sys.path`` on exit, since the model may import more while it runs."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def load_model(spec: str) -> nn.Module:
    """Returns the model that a factory builds.

    The current folder is the first on the import path. The random seed is 0 during the call, so that a model with random
    weights is the same each time.

    Raises:
        InvalidValue: the module or factory does not exist, or its import or call fails.
        InvalidType: the factory does not return an ``nn.Module``.
    """
    where, name = _split(spec)
    module = _import_file(where) if _is_file(where) else _import_module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidValue(f"{where!r} does not define {name!r}. {_instead(where, module, part)}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        found = _built(spec, name, found)
    if is_keras(type(found)):
        check_arguments(found, None, nn.Conv1d)  # its error names the setting for Keras's torch backend
    if not isinstance(found, nn.Module):
        raise InvalidType(f"{spec!r} returned a {type(found).__name__}, not a torch.nn.Module. Return the model.")
    return found


def _split(spec: str) -> tuple[str, str]:
    """Splits a spec into the module or file, and the name in it.

    Raises:
        InvalidValue: one of the two is missing.
    """
    where, _, name = spec.rpartition(":")
    if where and name.endswith("()"):
        raise InvalidValue(f"{spec!r} contains a call. Write it without parentheses: {spec[:-2]}")
    if where and all(part.isidentifier() for part in name.split(".")):
        return where, name
    if Path(spec).suffix.lower() in _WEIGHTS:
        raise InvalidValue(
            f"{spec!r} is a file of weights, not the code of a model. Write mynet.py:build, where build is a function that "
            "creates the model, loads the weights and returns the model."
        )
    code = where if where and not name else spec
    is_code = code.endswith(".py") or all(part.isidentifier() for part in code.split("."))
    raise InvalidValue(
        f"{spec!r} does not name a model. Write {code if is_code else 'mynet.py'}:build, where build is {_WHAT}."
    )


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or os.sep in where


def _built(spec: str, name: str, factory: Any) -> Any:
    if not callable(factory):
        raise InvalidType(f"{spec!r} is of type {type(factory).__name__}. Write the name of {_WHAT}.")
    try:
        required = [
            parameter.name
            for parameter in inspect.signature(factory).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # for example a class without a signature
        required = []
    if required:
        raise InvalidValue(
            f"{spec!r} requires the arguments {', '.join(required)}. Write a function without arguments in the same file: "
            f"def build(): return {name}({required[0]}=…)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run_user_code(f"{spec!r} failed", factory)


def _instead(where: str, module: ModuleType, name: str) -> str:
    """Returns a sentence with the names in a module that could return a model."""
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (isinstance(value, nn.Module) or (callable(value) and getattr(value, "__module__", "") == module.__name__))
    ]
    near = did_you_mean(name, own or dir(module))
    return near.strip() or (f"It defines {listed(own)}." if own else f"Define {_WHAT}.")


# -- importing


def _import_module(name: str) -> ModuleType:
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    found: ModuleType | None = run_user_code(f"importing {name!r} failed", _imported, name)
    if found is None:
        files = sorted(path.stem for path in Path(here).glob("*.py"))
        hint = did_you_mean(name, files) or " For a file in another folder write its path: folder/mynet.py:build."
        raise InvalidValue(
            f"the module {name!r} is neither in the current folder nor among the installed packages.{hint}"
        )
    return found


def _imported(name: str) -> ModuleType | None:
    """Imports a module. Returns None if the module itself is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _import_file(where: str) -> ModuleType:
    path = Path(os.path.abspath(where))
    if path.suffix != ".py" or not path.is_file():
        siblings = [str(Path(where).parent / file.name) for file in sorted(path.parent.glob("*.py"))]
        near = did_you_mean(where if where.endswith(".py") else f"{where}.py", siblings)
        raise InvalidValue(
            f"the Python file {where!r} does not exist.{near or ' Write the path of the file: mynet.py:build.'}"
        )
    names, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():  # a module of a package may use relative imports
        names.insert(0, folder.name)
        folder = folder.parent
    sys.path[:0] = [str(folder), os.getcwd()]
    importlib.invalidate_caches()
    what = f"importing {where!r} failed"
    if len(names) == 1:
        return run_user_code(what, _executed, path)  # type: ignore[no-any-return]
    name = ".".join(names).removesuffix(".__init__")
    module: ModuleType = run_user_code(what, importlib.import_module, name)
    if not os.path.samefile(module.__file__ or os.devnull, path):
        raise InvalidValue(f"importing {name} loaded {module.__file__}, not {where!r}. Rename the package.")
    return module


def _executed(path: Path) -> ModuleType:
    """Imports a file under its own name, or under another one if that name is taken."""
    known = sys.modules.get(path.stem)
    is_taken = known is not None and getattr(known, "__file__", None) != str(path)
    name = f"convtap_model_{path.stem}" if is_taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # before it runs, since its classes look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# -- types and devices


def types_of(texts: Sequence[str] | None, model: nn.Module) -> dict[str, Any]:
    """Returns the module types of ``--types`` as keyword arguments of ``capture``.

    A type is a class of ``torch.nn``, or the class of a module in the model. Without ``--types`` the result is empty.

    Raises:
        InvalidValue: a type does not exist.
    """
    kinds: dict[str, dict[type, None]] = {}
    for module in model.modules():
        for name in (type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}"):
            kinds.setdefault(name, {})[type(module)] = None
    found: dict[type, None] = {}
    for text in [name.strip() for name in ",".join(texts or ()).split(",") if name.strip()]:
        short = text.removeprefix("torch.").removeprefix("nn.")
        known = getattr(nn, short, None) if short.isidentifier() else None
        if isinstance(known, type) and issubclass(known, nn.Module):
            found[known] = None
        elif text in kinds:
            found.update(kinds[text])
        else:
            counts = Counter(type(module).__name__ for module in model.modules())
            near = did_you_mean(text, list(counts)) or did_you_mean(text, dir(nn)) or " Write for example --types ReLU."
            has = ", ".join(f"{count} {name}" for name, count in counts.most_common(8))
            raise InvalidValue(f"--types {text} is not a type of torch.nn or of the model, which has {has}.{near}")
    return {"types": tuple(found)} if found else {}


def on_device(model: nn.Module, text: str | None) -> nn.Module:
    """Moves the model to a device.

    Raises:
        InvalidValue: the device does not exist, or the model does not fit on it.
    """
    if text is None:
        return model
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise InvalidValue(f"--device {text} is not a device that computes. Write cpu, cuda, cuda:1 or mps.")
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # each backend raises its own type
        sees = "" if device.type != "cuda" else f", which sees {torch.cuda.device_count()} CUDA devices"
        raise InvalidValue(
            f"--device {text} cannot be used with torch {torch.__version__}{sees}: {one_line(error).rstrip('.')}. "
            "Remove --device to run on the CPU."
        ) from None
    try:
        return model.to(device)
    except Exception as error:
        raise InvalidValue(
            f"the model cannot be moved to {text}: {one_line(error).rstrip('.')}. Remove --device to run on the CPU."
        ) from error
