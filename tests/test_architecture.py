"""The map of the code is what the code is now: its picture, its lists, its notes, and the private names of torch."""

from __future__ import annotations

import itertools
import re

import pytest

from docs.draw_flow import WIDTH, direct, layout, picture
from docs.make_architecture import PAGE, PICTURE, defined_notes, named_notes, page, places, unexplained, using
from docs.private_names import PRIVATE
from tests.structure import ORDER, ROOT, arrows

STALE = "run: make architecture"


def test_the_committed_page_is_what_the_code_makes():
    assert PAGE.read_text() == page(PAGE.read_text()), STALE


def test_the_committed_picture_is_what_the_imports_make():
    assert PICTURE.read_text() == picture(), STALE


def test_a_list_is_written_anew():
    text = "before\n<!-- made: modules _public -->\nold\n<!-- end -->\nafter\n"
    made = page(text)
    assert "old" not in made
    assert "[_public.py](../src/convtap/_public.py)" in made
    assert page(made) == made


def test_every_folder_has_a_paragraph_and_a_box():
    text = PAGE.read_text()
    folders = [name for name in ORDER if (ROOT / "src" / "convtap" / name).is_dir()]
    assert [name for name in folders if f"### `{name}`\n\n" not in text] == []
    assert {room.name for room in layout()[0]} == set(ORDER)


def test_arrows_of_the_picture_imply_every_import_and_no_other():
    def reached(room: str) -> set[str]:
        return edges[room].union(*map(reached, edges[room]))

    edges = direct(arrows())
    assert edges.keys() == arrows().keys()
    assert all(others <= reached(room) and edges[room] <= others for room, others in arrows().items())


def test_no_arrow_crosses_a_box():
    rooms, lines = layout()
    for points in lines.values():
        for (x, y), (to_x, to_y) in itertools.pairwise(points):
            for room in rooms:
                aside = max(x, to_x) <= room.left or min(x, to_x) >= room.left + WIDTH
                apart = max(y, to_y) <= room.top or min(y, to_y) >= room.top + room.height
                assert aside or apart, f"an arrow crosses {room.name}"


def test_every_arrow_is_inside_the_picture():
    width = float(re.search(r'width="([\d.]+)"', picture())[1])
    assert max(x for points in layout()[1].values() for x, _ in points) < width


@pytest.mark.parametrize("what", ["a snapshot is taken", "a key is formatted", "a shard becomes visible"])
def test_the_page_names_the_place_where(what):
    assert any(line.startswith(f"| {what}") for line in places())


def test_every_reference_to_a_note_leads_to_one_note():
    defined = [note for note, _ in defined_notes()]
    assert sorted(set(defined)) == sorted(defined)
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "tests").glob("*.py")]
    named = named_notes().union(*(re.findall(r"See Note: \[(\w[^\]]+)\]", path.read_text()) for path in pages))
    assert named - set(defined) - {"Name"} == set()


def test_every_private_name_of_torch_has_a_sentence():
    assert unexplained() == {}, "say in docs/private_names.py what happens if it goes away"


def test_every_sentence_is_about_a_name_in_use():
    assert [name for names, _ in PRIVATE for name in names if not using(name)] == []


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()))))
def test_every_link_of_the_page_leads_to_a_file(link):
    assert (PAGE.parent / link).exists()
