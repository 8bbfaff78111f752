"""Everything that a person reads keeps the rules of plain English that a machine can check."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.py", "examples/*.py")
    for path in ROOT.glob(pattern)
    if path.suffix == ".md" or path.name != "__init__.py"
)
SOURCES = sorted((ROOT / "src").rglob("*.py"))

#: What plain English does without, and what to write instead.
PHRASES = {
    r"\b(?:is|was|are|were) no (?!longer\b|more\b|later\b|less\b)": "is not a …",
    r"\bnobody\b": "name the actor",
    r"\bwhat (?:it|they|the layer|the model|you) (?:was|were) given\b": "its input",
    r"\bwhat the (?:layer|layers|model|module) (?:gives?|gave)\b": "its output",
    r"\b(?:all|nothing) but\b": "only",
    r"\bof (?:ours|yours)\b": "name the owner",
    r"\bNamed (?:is|are)\b": "subject first",
    r"\bhas an end\b": "ends, or fails",
    r"\bgoes on (?!to\b)": "resumes, or continues",
    r"\b(?:is|are) left out\b": "is skipped",
}

#: The longest first line of a docstring.
SUMMARY = 80


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Each line that a person reads: all of a page without its code; the docstrings, comments and texts of a module."""
    if path.suffix == ".md":
        is_code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            is_code ^= line.startswith(("```", "~~~"))
            if not is_code:
                yield number, line
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                yield number, line


def found(path: Path) -> list[str]:
    """Each line that breaks a rule, with what to write instead."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r} ({instead}): {line.strip()[:100]}"
        for number, line in prose(path)
        for phrase, instead in PHRASES.items()
        if (match := re.search(phrase, line))
    ]


def long_summaries(path: Path) -> list[str]:
    """Each docstring whose first line is longer than ``SUMMARY``."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    lines = [((ast.get_docstring(node) or "").split("\n")[0], getattr(node, "lineno", 1)) for node in nodes]
    return [f"{path.relative_to(ROOT)}:{number}: {line}" for line, number in lines if len(line) > SUMMARY]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_prose_is_plain(path):
    assert found(path) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_summary_lines_are_short(path):
    assert long_summaries(path) == []


@pytest.mark.parametrize("line", ["there is no way", "is what it was given", "nobody reads it", "a block of ours"])
def test_the_check_finds_what_it_looks_for(line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"It says:\n{line}.\n")
    assert len(found(page)) == 1


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 180
