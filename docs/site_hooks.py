"""Hooks of the site's build: links to files outside ``docs``, the command line's help, and what must be documented.

A page links to other files of the project by their place in the tree, as a reader of the tree needs it. The site has no
such files, so each linked one becomes a page of it: Markdown as it is, any other file as a listing.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

#: Where the pages of other files stand in the site.
OUTSIDE = "project"

_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])")
_LISTED = re.compile(r"^::: convtap\.([\w.]+)", re.MULTILINE)
_HELP = "<!-- help of every command -->"

#: Names that are written in small letters, and the classes that they are.
_CLASSES = {"capture": "Capture", "tapped": "Tapped", "finite": "Finite", "statistics": "StatisticsCapture"}


def on_pre_build(config: Any) -> None:
    """Raises when a public name has no docstring or stands on no page of the reference."""
    package = griffe.load("convtap", search_paths=[str(ROOT / "src")])
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    listed = set(_LISTED.findall(pages))
    names = {package[name].final_target.name if package[name].is_alias else name for name in package.exports or ()}
    missing = sorted(name for name in names if _CLASSES.get(name, name) not in listed)
    silent = sorted(name for name in listed if not package[name].has_docstring)
    if missing or silent:
        raise PluginError(f"docs/reference lists no {missing}; no docstring: {silent}. Add them.")


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each file outside ``docs`` that a page links to."""
    todo, seen = [DOCS / file.src_uri for file in files.documentation_pages()], set()
    while todo:
        page = todo.pop()
        for target in _targets(page):
            if target in seen or _is_of_site(target) or target == ROOT / "README.md" or not target.is_file():
                continue
            seen.add(target)
            is_page = target.suffix == ".md"
            place = _place(target)
            if target.suffix == ".png":
                files.append(File.generated(config, place, content=target.read_bytes()))
                continue
            files.append(File.generated(config, place, content=target.read_text() if is_page else _listing(target)))
            if is_page:
                todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the site's pages, and writes the help of the command line where its mark stands."""
    source = _source(page.file.src_uri)
    if source is None:
        return markdown

    def link(found: re.Match[str]) -> str:
        target = (source.parent / found[1]).resolve()
        there = DOCS / _place(target)
        if target == ROOT / "README.md":
            there = DOCS / "README.md"
        return os.path.relpath(there, (DOCS / page.file.src_uri).parent) if target.exists() else found[1]

    return _LINK.sub(link, markdown.replace(_HELP, help_of_commands()) if _HELP in markdown else markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Writes ``capture(`` in the signature of the class ``Capture``, as users write it, and so on."""
    for name, kind in _CLASSES.items():
        html = html.replace(
            f'<span class="nf">{kind}</span><span class="p">(', f'<span class="nf">{name}</span><span class="p">('
        )
    return html


def _targets(page: Path) -> Iterator[Path]:
    for found in _LINK.finditer(page.read_text()):
        yield (page.parent / found[1]).resolve()


def _is_of_site(target: Path) -> bool:
    """Returns whether MkDocs itself copies a file to the site: those of ``docs`` but Python files."""
    return target.is_relative_to(DOCS) and target.suffix != ".py"


def _place(target: Path) -> str:
    """Returns where a file of the project stands in the site's source."""
    if _is_of_site(target):
        return target.relative_to(DOCS).as_posix()
    path = target.relative_to(ROOT).as_posix()
    return f"{OUTSIDE}/{path}" if target.suffix in (".md", ".png") else f"{OUTSIDE}/{path}.md"


def _source(src_uri: str) -> Path | None:
    """The file that a page of the site was made from; None for a listing."""
    if not src_uri.startswith(f"{OUTSIDE}/"):
        return DOCS / src_uri
    path = ROOT / src_uri.removeprefix(f"{OUTSIDE}/")
    return path if path.exists() else None


def _listing(target: Path) -> str:
    language = {".py": "python", ".toml": "toml", ".ipynb": "json"}.get(target.suffix, "")
    head = f"---\nsearch:\n  exclude: true\n---\n# {target.relative_to(ROOT).as_posix()}\n\n"
    return f"{head}~~~~{language}\n{target.read_text()}\n~~~~\n"


def help_of_commands() -> str:
    """Returns the help of the program and of each command, at a width of 100."""
    from convtap.cli import _parser

    before = {key: os.environ.get(key) for key in ("COLUMNS", "NO_COLOR", "PYTHON_COLORS")}
    os.environ.update(COLUMNS="100", NO_COLOR="1", PYTHON_COLORS="0")
    try:
        parser = _parser()
        parts = [f"```text\n{parser.format_help().rstrip()}\n```"]
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, command in action.choices.items():
                    parts.append(f"## convtap {name}\n\n```text\n{command.format_help().rstrip()}\n```")
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
    return "\n\n".join(parts)
