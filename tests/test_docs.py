"""Every code block of the README and the docs runs, and what it says it prints is what it prints; docstring examples too.

A ``python`` block that begins with ``# name.py`` is that file as well. A ``console`` block of ``$ convtap`` commands runs them.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import re
import shlex
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

from convtap.cli import main
from tests.structure import MODULES

ROOT = Path(__file__).parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


FILE = re.compile(r"# (\w+\.py)\n")
COMMAND = re.compile(r"^\$ convtap (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def commands_run(body: str) -> str:
    """Runs the commands of a ``console`` block. Returns the block with what they really print, where it shows something."""
    text = ""
    for command, shown in COMMAND.findall(body):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(shlex.split(command)) < 2, command
        text += f"$ convtap {command}\n{out.getvalue() if shown else ''}"
    return text


def shown_and_printed(page: Path) -> list[tuple[str, str]]:
    """Runs a page's blocks. Returns each ``text`` block with what the block before it printed, and each ``console`` block."""
    torch.manual_seed(0)
    module = sys.modules["page"] = types.ModuleType("page")  # torch 2.6 imports the module of what it compiles
    del module.__spec__  # Python 3.15 warns about a module whose __spec__ is None, unlike __main__
    printed, pairs = "", []
    for kind, body in BLOCK.findall(page.read_text()):
        if kind == "text":
            pairs.append((body, printed))
        elif kind == "console" and body.startswith("$ convtap"):
            pairs.append((body, commands_run(body)))
        elif kind == "python":
            if file := FILE.match(body):
                Path(file[1]).write_text(body)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, f"{page.stem}.py", "exec"), vars(module))
            printed = out.getvalue()
    return pairs


@pytest.fixture
def no_model():
    """Removes the module of the model on the page of the command line, before and after a test."""
    sys.modules.pop("mynet", None)
    yield
    sys.modules.pop("mynet", None)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_python_block_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch, no_model):
    monkeypatch.chdir(tmp_path)
    for shown, printed in shown_and_printed(page):
        assert printed.strip() == shown.strip()


def rewrite() -> None:
    """Puts what the blocks really print into the pages: ``python -m tests.test_docs``."""
    for page in PAGES:
        text = page.read_text()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            pairs = shown_and_printed(page)
        for shown, printed in pairs:
            kind = "console" if shown.startswith("$ convtap") else "text"
            text = text.replace(f"```{kind}\n{shown}```", f"```{kind}\n{printed.rstrip()}\n```", 1)
        page.write_text(text)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstring_examples_run(name):
    module = importlib.import_module("convtap" if name == "__init__" else f"convtap.{name}")
    torch.manual_seed(0)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    defined = [node.name for node in ast.parse(MODULES[name].read_text()).body if hasattr(node, "name")]
    for thing in [getattr(module, found) for found in defined]:
        is_public = thing.__module__ == "convtap"  # its examples import what they use, and only what users can import
        for test in finder.find(thing, module=False, globs={} if is_public else vars(module).copy()):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


if __name__ == "__main__":
    rewrite()
