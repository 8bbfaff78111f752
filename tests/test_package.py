"""What the package says of itself holds: links of the index page, the versions that were run, one place for the version."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import convtap
from matrix.rows import PYTHONS, TORCHES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Returns the links of a page that are not addresses; code such as ``model[0](x)`` has none."""
    return re.findall(r"\]\((?!\w+:)([^)]+)\)", CODE.sub("", text))


def index_page() -> str:
    """Returns what an index shows: the README with the substitutions of pyproject.toml."""
    text = README
    for rule in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    return text


def test_the_index_page_has_no_link_that_leads_nowhere():
    assert links(README)
    assert links(index_page()) == []


def test_the_index_page_names_the_file_that_a_link_of_the_readme_leads_to():
    page = index_page()
    for target in links(README):
        file = target.partition("#")[0]
        assert (ROOT / file).exists(), target
        assert f"(`{file}`)" in page or file.endswith(".png")


def test_the_index_page_has_the_code_of_the_readme():
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(index_page()) == blocks.findall(README)


def test_the_classifiers_name_the_pythons_of_the_matrix():
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert named == list(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_floor_of_torch_is_the_oldest_of_the_matrix():
    oldest = min(TORCHES, key=lambda torch: [int(part) for part in torch.split(".")])
    assert f"torch>={oldest.removesuffix('.0')}" in PROJECT["dependencies"]


def test_the_version_is_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert SETTINGS["tool"]["hatch"]["version"]["path"] == "src/convtap/__init__.py"
    assert convtap.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
