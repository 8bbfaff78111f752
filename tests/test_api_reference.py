"""The API reference is what the docstrings say now, and leaves no public name out."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import convtap

DOCS = Path(__file__).parent.parent / "docs"
MAKE = runpy.run_path(str(DOCS / "make_api.py"))


def test_the_committed_page_is_what_the_docstrings_make():
    assert (DOCS / "api.md").read_text() == MAKE["page"](), "run: python docs/make_api.py"


@pytest.mark.parametrize("name", convtap.__all__)
def test_every_public_name_is_on_the_page(name):
    text = (DOCS / "api.md").read_text()
    assert f"### `{name}`" in text or f"The class is `{name}`" in text


@pytest.mark.parametrize("command", ["demo", "layers", "run", "compare", "info", "verify"])
def test_every_command_is_on_the_page(command):
    assert f"\nusage: convtap {command} " in (DOCS / "api.md").read_text()


def test_a_docstring_that_changes_changes_the_page():
    def documented(length: int = 3) -> int:
        """Does it.

        Args:
            length: of what, over
                two lines.

        Raises:
            ValueError: never.
        """
        return length

    assert MAKE["_entry"]("documented", documented) == (
        "### `documented`\n\n```\ndocumented(length: int = 3) -> int\n```\n\nDoes it.\n\n"
        "*Args*\n\n- `length`: of what, over two lines.\n\n*Raises*\n\n- `ValueError`: never."
    )
