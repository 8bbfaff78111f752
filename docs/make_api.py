"""Writes ``docs/api.md`` from the docstrings and the command line's help: ``python docs/make_api.py``.

A documentation generator writes a site. This is one page that is read beside the code, and a test compares it word for word.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convtap

PAGE = Path(__file__).parent / "api.md"

#: What the page shows, in this order: headings and the names of ``convtap`` under each.
GROUPS = {
    "Capturing": ["capture", "Activations", "Call", "load", "list_layers", "tapped"],
    "Statistics": ["statistics", "Statistics", "LayerStatistics"],
    "The time axis": ["timeline", "top", "windows"],
    "A data set to disk": ["extract", "Store"],
    "Debugging": ["finite", "compare"],
}

#: The same thing under its class's name.
SAME = {"capture": "Capture", "tapped": "Tapped", "finite": "Finite", "statistics": "StatisticsCapture"}

#: What a thing of a class is called in the headings of its methods, where that is not the class's name in small letters.
CALLED = {
    "Activations": "acts",
    "Statistics": "stats",
    "LayerStatistics": "layer",
    "LayerTime": "layer",
    "LayerView": "view",
    "LayerCoverage": "state",
    "Difference": "row",
    "LayerDrift": "row",
}

#: What the functions above return.
RETURNED = [
    "Coverage",
    "LayerCoverage",
    "LayerRow",
    "Timeline",
    "LayerTime",
    "Hit",
    "Window",
    "LayerView",
    "StoreDataset",
    "Finding",
    "Range",
    "Comparison",
    "Difference",
    "Drift",
    "LayerDrift",
    "Table",
]

SUBMODULES = {"plot": ["plot", "pages", "channels", "distributions", "windows", "statistics"], "report": ["report"]}

_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Example|Examples):$")
_ITEM = re.compile(r"^([\w*, ]+): (.*)$", re.DOTALL)


def page() -> str:
    """Returns the whole page."""
    parts = [
        "# API reference\n\nWritten by `python docs/make_api.py` from the docstrings; a test holds that it is up to date. "
        "[README](../README.md) has the examples, and [the other pages](README.md) one task each."
    ]
    shown = {name for names in GROUPS.values() for name in names} | set(SAME.values()) | set(RETURNED)
    for heading, names in {**GROUPS, "Errors": _errors(shown)}.items():
        parts.append(f"## {heading}")
        parts += [_entry(name, getattr(convtap, name)) for name in names]
    parts.append("## What these return")
    parts += [_entry(name, getattr(convtap, name), signature=False) for name in RETURNED]
    for module, names in SUBMODULES.items():
        found = importlib.import_module(f"convtap.{module}")
        parts.append(f"## convtap.{module}\n\n{_prose(found.__doc__ or '')}")
        parts += [_entry(f"{module}.{name}", getattr(found, name)) for name in names]
    parts.append(f"## The command line\n\n{commands()}")
    return "\n\n".join(parts) + "\n"


def _errors(shown: set[str]) -> list[str]:
    """Every public name that has no other place, the root of the errors first."""
    rest = [name for name in convtap.__all__ if name not in shown]
    return sorted(rest, key=lambda name: (name != "ConvtapError", name))


# -- one name


def _entry(name: str, thing: Any, signature: bool = True) -> str:
    if inspect.isclass(thing) and issubclass(thing, (Exception, Warning)):
        bases = ", ".join(f"`{base.__name__}`" for base in _public_bases(thing))
        return f"### `{name}` ({bases})\n\n{_docstring(thing)}"
    # what is made by the package itself has no constructor to call
    is_made = inspect.isclass(thing) and name in ("Activations", "Call", "Statistics", "LayerStatistics")
    called = _signature(name, thing) if signature and not is_made else ""
    parts = [f"### `{name}`", called, _docstring(thing), *(_members(name, thing) if inspect.isclass(thing) else ())]
    same = SAME.get(name)
    if same is not None:
        parts.insert(1, f"The class is `{same}`; `{name}` is what to write.")
    return "\n\n".join(part for part in parts if part)


def _public_bases(kind: type) -> Iterator[type]:
    for base in kind.__bases__:
        if base.__name__.startswith("_"):
            yield from _public_bases(base)
        else:
            yield base


def _signature(name: str, thing: Any) -> str:
    """The call as one writes it, an argument a line where it is long."""
    found = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing)
    parameters = [parameter for parameter in found.parameters.values() if parameter.name != "self"]
    found = found.replace(parameters=parameters)
    returned = found.return_annotation
    arrow = "" if inspect.isclass(thing) or returned is inspect.Signature.empty else f" -> {_annotation(returned)}"
    one_line = f"{name}({', '.join(_arguments(parameters))}){arrow}"
    if len(one_line) <= 100:
        return f"```\n{one_line}\n```"
    lines = "\n".join(f"    {argument}," for argument in _arguments(parameters))
    return f"```\n{name}(\n{lines}\n){arrow}\n```"


def _arguments(parameters: list[inspect.Parameter]) -> Iterator[str]:
    starred = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            starred = True
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        text = str(parameter.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty))
        if parameter.annotation is not inspect.Parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not inspect.Parameter.empty:
            text += f"{' = ' if ':' in text else '='}{_default(parameter.default)}"
        yield text


def _annotation(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.strip("\"'")


def _default(value: Any) -> str:
    if value == (importlib.import_module("convtap._select.selection")).CONV1D:
        return "CONV1D"
    return f"nn.{value.__name__}" if inspect.isclass(value) else repr(value)


def _members(name: str, kind: type) -> Iterator[str]:
    """The documented methods and properties that a class adds."""
    for key, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        document = getattr(function, "__doc__", None)
        own = inspect.isfunction(function) and function.__qualname__.startswith(kind.__qualname__ + ".")
        if not document or not own or (key.startswith("_") and key != "__getitem__") or key == "extra_repr":
            continue
        yield f"#### `{_member_title(name, key, member, function)}`\n\n{_docstring(function)}"


def _member_title(name: str, key: str, member: Any, function: Callable[..., Any]) -> str:
    owner = CALLED.get(name, name.lower())
    if isinstance(member, property):
        return f"{owner}.{key}"
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    arguments = ", ".join(_arguments(plain))
    return f"{owner}[{arguments}]" if key == "__getitem__" else f"{owner}.{key}({arguments})"


# -- docstrings


def _docstring(thing: Any) -> str:
    """A Google-style docstring as Markdown."""
    text = inspect.cleandoc(thing.__doc__ or "")
    parts: list[str] = []
    title, body = "", []
    for line in [*text.splitlines(), "End:"]:
        found = _SECTION.match(line)
        if found or line == "End:":
            parts.append(_section(title, "\n".join(body)))
            title, body = (found.group(1) if found else ""), []
        else:
            body.append(line)
    return "\n\n".join(part for part in parts if part)


def _section(title: str, body: str) -> str:
    if not title:
        return _prose(body)
    body = textwrap.dedent(body).strip("\n")
    if title.startswith("Example"):
        return f"```pycon\n{body.rstrip()}\n```"
    if title in ("Returns", "Yields"):
        return f"*{title}*\n\n{_prose(body)}"
    items = [_item(item) for item in re.split(r"\n(?=\S)", body)]
    return f"*{title}*\n\n" + "\n".join(items)


def _item(item: str) -> str:
    text = " ".join(line.strip() for line in item.splitlines())
    found = _ITEM.match(text)
    return f"- `{found.group(1)}`: {_code(found.group(2))}" if found else f"- {_code(text)}"


def _prose(text: str) -> str:
    """Paragraphs on one line each; ``code`` becomes `code`."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return _code("\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs))


def _code(text: str) -> str:
    return text.replace("``", "`")


# -- the command line


def commands() -> str:
    """The help of the program and of each command, at a width of 100."""
    from convtap.cli import _parser

    before = {key: os.environ.get(key) for key in ("COLUMNS", "NO_COLOR", "PYTHON_COLORS")}
    os.environ.update(COLUMNS="100", NO_COLOR="1", PYTHON_COLORS="0")
    try:
        parser = _parser()
        parts = [_block(parser)]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parts += [f"### `convtap {name}`\n\n{_block(command)}" for name, command in action.choices.items()]
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
    return "\n\n".join(parts)


def _block(parser: argparse.ArgumentParser) -> str:
    return f"```\n{parser.format_help().rstrip()}\n```"


if __name__ == "__main__":
    sys.exit(0 if PAGE.write_text(page()) else 1)
