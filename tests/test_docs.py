"""Every code block of the README and the docs runs, and what it says it prints is what it prints; docstring examples too."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
from pathlib import Path

import pytest
import torch

from tests.test_structure import ORDER

ROOT = Path(__file__).parent.parent
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_python_block_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch):
    """A ``text`` block right after a ``python`` block is what that block prints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = [(kind, body) for kind, body in BLOCK.findall(page.read_text()) if kind in ("python", "text")]
    assert any(kind == "python" for kind, _ in blocks)
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    for kind, body in blocks:
        if kind == "text":
            assert printed.strip() == body.strip()
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(body, f"{page.name}: {body.splitlines()[0]}", "exec"), namespace)
        printed = out.getvalue()


@pytest.mark.parametrize("name", ORDER)
def test_docstring_examples_run(name):
    module = importlib.import_module(f"convtap.{name}")
    torch.manual_seed(0)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
