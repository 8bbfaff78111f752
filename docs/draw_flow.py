"""Draws the folders of the package and their imports as an SVG picture."""

from __future__ import annotations

import ast
import itertools
import textwrap
from dataclasses import dataclass
from html import escape
from statistics import median_low
from typing import TypeAlias

from tests.structure import MODULES, ORDER, arrows

WIDTH, GAP, RISE, MARGIN = 256, 22, 40, 14
TITLE, TEXT, SMALL = 14, 11, 10  # pixels

#: An object that needs a lane: a room, or an arrow that passes a rank, as (importing room, imported room).
Node: TypeAlias = "str | tuple[str, str]"

#: The colours of the rooms, by the first room that has them.
COLOURS = {
    "_public": ("#eceff1", "what every step uses"),
    "_select": ("#dcedc8", "select"),
    "_result": ("#fff3c4", "record and result"),
    "_taps": ("#ffe0cc", "tap and capture"),
    "_time": ("#d6e8fa", "around a capture"),
    "_view": ("#eadcf5", "view"),
    "_cli": ("#f5d9df", "command line"),
}


@dataclass
class Room:
    """One box: a folder, or a module beside the folders.

    Attributes:
        name: the folder.
        about: the lines with its summary.
        implied: the lines with its imports that have no arrow.
        rank: its rank, counted from the top.
        lane: its lane, counted from the left.
        colour: the colour of its step of the flow.
        top: its upper edge.
    """

    name: str
    about: list[str]
    implied: list[str]
    rank: int
    lane: int = 0
    colour: str = ""
    top: float = 0

    @property
    def height(self) -> float:
        """The height of the box."""
        return 30 + 14 * len(self.about) + (4 + 12 * len(self.implied) if self.implied else 0)

    @property
    def left(self) -> float:
        """The left edge of the box."""
        return MARGIN + self.lane * (WIDTH + GAP)


def direct(imported: dict[str, set[str]]) -> dict[str, set[str]]:
    """Removes the imports that others imply.

    If a imports b and c, and b imports c, only the import of b by a remains.
    """

    def reached(room: str) -> set[str]:
        return imported[room].union(*map(reached, imported[room]))

    return {
        room: {other for other in others if not any(other in reached(via) for via in others)}
        for room, others in imported.items()
    }


def ranks(edges: dict[str, set[str]]) -> dict[str, int]:
    """Returns the rank of each room, below all rooms that it imports.

    A room without imports is one rank above the first room that imports it.
    """
    found: dict[str, int] = {}
    for room in ORDER:
        found[room] = 1 + max((found[other] for other in edges[room]), default=-1)
    for room in ORDER:
        users = [found[other] for other in ORDER if room in edges[other]]
        if not edges[room] and users:
            found[room] = min(users) - 1
    return found


# -- the lanes of rooms, and of arrows over several ranks


def place(rooms: dict[str, Room], edges: dict[str, set[str]]) -> dict[tuple[str, str], list[int]]:
    """Chooses the lane of each room. Returns the lanes that arrows pass through."""
    passed: dict[tuple[str, str], list[int]] = {
        (low, high): [] for low in ORDER for high in ORDER if high in edges[low]
    }
    deepest = max(room.rank for room in rooms.values())
    most = max(len(_nodes(rooms, passed, rank)) for rank in range(deepest + 1))
    for rank in range(deepest + 1):
        nodes = _nodes(rooms, passed, rank)
        ends = {node: _ends(node, rooms, passed, edges) for node in nodes}
        best = min(itertools.permutations(range(most), len(nodes)), key=lambda lanes: _cost(lanes, nodes, ends, most))
        for node, lane in zip(nodes, best, strict=True):
            if isinstance(node, tuple):
                passed[node].append(lane)
            else:
                rooms[node].lane = lane
    return passed


def _nodes(rooms: dict[str, Room], passed: dict[tuple[str, str], list[int]], rank: int) -> list[Node]:
    """Returns the rooms of a rank and the arrows that pass it, which all need a lane."""
    found: list[Node] = [room.name for room in rooms.values() if room.rank == rank]
    return found + [edge for edge in passed if rooms[edge[1]].rank < rank < rooms[edge[0]].rank]


def _ends(
    node: Node,
    rooms: dict[str, Room],
    passed: dict[tuple[str, str], list[int]],
    edges: dict[str, set[str]],
) -> list[int]:
    """Returns the lanes in the rank above that the arrows of a node come from."""
    links = [node] if isinstance(node, tuple) else [(node, other) for other in edges[node]]
    return sorted(passed[link][-1] if passed[link] else rooms[link[1]].lane for link in links)


def _cost(lanes: tuple[int, ...], nodes: list[Node], ends: dict[Node, list[int]], most: int) -> tuple[float, ...]:
    lines = [(end, lane) for node, lane in zip(nodes, lanes, strict=True) for end in ends[node]]
    crossings = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in itertools.combinations(lines, 2))
    wanted = [median_low(ends[node]) if ends[node] else (most - 1) / 2 for node in nodes]
    return crossings, sum(abs(want - lane) for want, lane in zip(wanted, lanes, strict=True)), *lanes


# -- the picture


def layout() -> tuple[list[Room], dict[tuple[str, str], list[tuple[float, float]]]]:
    """Returns the boxes, and the points of each arrow to an imported room."""
    imported = arrows()
    edges = direct(imported)
    found, rooms, colour = ranks(edges), {}, ""
    for name in ORDER:
        colour = COLOURS[name][0] if name in COLOURS else colour
        others = [other for other in ORDER if other in imported[name] - edges[name]]
        implied = textwrap.wrap("also " + ", ".join(others), 50) if others else []
        rooms[name] = Room(name, textwrap.wrap(summary(name).replace("`", ""), 42), implied, found[name], colour=colour)
    passed = place(rooms, edges)
    top, tops, bottoms = MARGIN + 30.0, {}, {}
    for rank in range(max(found.values()) + 1):
        here = [room for room in rooms.values() if room.rank == rank]
        for room in here:
            room.top = top
        tops[rank], bottoms[rank] = top, top + max(room.height for room in here)
        top = bottoms[rank] + RISE
    return list(rooms.values()), {
        (low, high): _points(rooms, edges, low, high, lanes, tops, bottoms) for (low, high), lanes in passed.items()
    }


def _points(
    rooms: dict[str, Room],
    edges: dict[str, set[str]],
    low: str,
    high: str,
    lanes: list[int],
    tops: dict[int, float],
    bottoms: dict[int, float],
) -> list[tuple[float, float]]:
    """Returns the points of one arrow, through the free lanes between its ends."""
    users = sorted((room for room in ORDER if high in edges[room]), key=lambda room: rooms[room].lane)
    above = sorted((room for room in ORDER if room in edges[low]), key=lambda room: rooms[room].lane)
    start = _port(rooms[low].left, above.index(high), len(above)), rooms[low].top
    end = _port(rooms[high].left, users.index(low), len(users)), rooms[high].top + rooms[high].height
    points = [start]
    for rank, lane in reversed(list(enumerate(lanes, rooms[high].rank + 1))):
        x = MARGIN + lane * (WIDTH + GAP) + WIDTH / 2
        points += [(x, bottoms[rank]), (x, tops[rank])]
    return [*points, (end[0], bottoms[rooms[high].rank]), end]


def _port(left: float, number: int, count: int) -> float:
    return left + WIDTH / 2 + 26 * (number - (count - 1) / 2)


def summary(name: str) -> str:
    """Returns the first line of the docstring of a folder or a module."""
    return (ast.get_docstring(ast.parse(MODULES[name].read_text())) or "").splitlines()[0].replace("``", "`")


def picture() -> str:
    """Returns the SVG file."""
    rooms, lines = layout()
    ends = [x for points in lines.values() for x, _ in points] + [room.left + WIDTH for room in rooms]
    wide = max(ends) + MARGIN
    high = max(room.top + room.height for room in rooms) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" width="{wide:g}" height="{high:g}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>The folders of convtap and their imports</title>",
        f'<rect width="{wide:g}" height="{high:g}" fill="#ffffff"/>',
    ]
    x = MARGIN
    for colour, meaning in COLOURS.values():
        parts.append(f'<rect x="{x}" y="{MARGIN}" width="12" height="12" fill="{colour}" stroke="#78909c"/>')
        parts.append(_text(x + 17, MARGIN + 10, meaning, TEXT, "#37474f"))
        x += 30 + 7 * len(meaning)
    parts += [_arrow(points) for points in lines.values()]
    for room in rooms:
        parts += _box(room)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(points: list[tuple[float, float]]) -> str:
    (x, y), path = points[0], []
    for i, (to_x, to_y) in enumerate(points[1:]):
        middle = (y + to_y) / 2
        path.append(f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}" if i % 2 == 0 else f"V{to_y:g}")
        x, y = to_x, to_y
    start = "M{:g} {:g}".format(*points[0])
    head = f"{x - 4:g},{y + 8:g} {x + 4:g},{y + 8:g} {x:g},{y:g}"
    return (
        f'<path d="{start} {" ".join(path)}" fill="none" stroke="#546e7a" stroke-width="1.4"/>'
        f'<polygon points="{head}" fill="#546e7a"/>'
    )


def _box(room: Room) -> list[str]:
    x, y = room.left, room.top
    found = [
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{room.height:g}" rx="6" fill="{room.colour}" '
        'stroke="#78909c"/>',
        _text(x + 10, y + 19, room.name, TITLE, "#102027", "bold"),
    ]
    y += 22
    for line in room.about:
        y += 14
        found.append(_text(x + 10, y, line, TEXT, "#37474f"))
    y += 4
    for line in room.implied:
        y += 12
        found.append(_text(x + 10, y, line, SMALL, "#78909c"))
    return found


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
