"""The report: one page that needs nothing but itself, says what was captured and what was not, and escapes every name."""

from __future__ import annotations

import base64
import io
import re
import time
from datetime import datetime, timezone
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convtap
from convtap import LayerNotFound, StoreError, capture, load
from convtap._errors import InvalidType, InvalidValue, OutOfRange
from convtap._view.report.blocks import blocks
from convtap.report import report
from tests.process import run_python

VOID = {"meta", "img", "input", "wbr", "path", "rect"}
HOSTILE = [
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "' onclick='x",
    "</title></style><b>",
    "line\nbreak\x00",
    "right\u202eleft",
    "&amp;",
]


class Page(HTMLParser):
    """What a browser would make of the page: its tags, their attributes and its text; an unbalanced page is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def written(self):
        return "".join(self.text)

    def maps(self):
        return [attrs for attrs in self.all("img") if attrs.get("class") != "thumbnail"]

    def thumbnails(self):
        return [attrs for attrs in self.all("img") if attrs.get("class") == "thumbnail"]


class Entry:
    def __init__(self, start, stride, receptive_field):
        self.start, self.stride, self.receptive_field = start, stride, receptive_field

    def centre(self, t):
        return self.start + t * self.stride + Fraction(self.receptive_field - 1, 2)


def small():
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 8, 3))


class Together(nn.ModuleDict):
    """Runs each of its layers on the input."""

    def forward(self, x):
        return [layer(x) for layer in self.values()]


def read(acts, path, **options):
    acts.report(path, **options)
    return Page(path.read_text(encoding="utf-8"))


def image_of(attrs):
    data = attrs["src"].removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


@pytest.fixture
def acts():
    model = small()
    with capture(model) as found:
        model(torch.randn(2, 1, 50))
    return found


# -- self-contained


def test_the_page_refers_to_nothing_outside_itself(acts, tmp_path):
    page = read(acts, tmp_path / "r.html", model=small(), signal=torch.randn(2, 1, 50))
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
        assert not any(name.startswith("on") for name in attrs)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<link|<iframe|fetch\(|XMLHttp", text)
    assert len(page.all("script")) == 1
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert any(attrs.get("name") == "viewport" for attrs in page.all("meta"))


def test_the_page_needs_no_matplotlib(tmp_path):
    code = (
        "import sys, torch; sys.modules['matplotlib'] = None\n"
        "from torch import nn\n"
        "from convtap import capture\n"
        "model = nn.Sequential(nn.Conv1d(1, 4, 3))\n"
        "with capture(model) as acts: model(torch.randn(1, 1, 50))\n"
        f"acts.report({str(tmp_path / 'r.html')!r}, model=model)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").stat().st_size > 1000


def test_hostile_names_are_only_ever_text(tmp_path):
    def page_of(names, **options):
        model = Together({name: nn.Conv1d(1, 2, 1) for name in names})
        with capture(model) as acts:
            model(torch.zeros(1, 1, 9))
        return read(acts, tmp_path / "r.html", **dict.fromkeys(options, model))

    harmless = [f"layer{i}" for i in range(len(HOSTILE))]
    for options in ({"model": ...}, {}):
        page = page_of(HOSTILE, **options)
        assert [tag for tag, _ in page.tags] == [tag for tag, _ in page_of(harmless, **options).tags]
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        written = page.written()
        for name in HOSTILE[:4] + HOSTILE[6:]:
            assert written.count(name) == 4  # in the index, in the table, above its picture, in the tree
        assert written.count("line\\nbreak\\x00") == 4
        assert written.count("right\\u202eleft") == 4
        assert not re.search("[\x00\u202e]", written)


class Noise(nn.Module):
    """Layers of noise, which no image format makes smaller."""

    def __init__(self, layers, frames):
        super().__init__()
        self.frames = frames
        self.encoder = nn.ModuleList(nn.ModuleDict({"convolution": nn.Conv1d(2, 64, 1)}) for _ in range(layers))

    def forward(self, x):
        for layer in self.encoder:
            layer["convolution"](torch.randn(1, 2, self.frames))


@pytest.mark.parametrize(("layers", "frames"), [(74, 640), (300, 320)])
def test_layers_of_noise_stay_under_3_mb(tmp_path, layers, frames):
    model = Noise(layers, frames)
    with capture(model) as acts:
        model(torch.randn(1, 2, frames))
    page = read(acts, tmp_path / "r.html", model=model, signal=torch.randn(1, 8, 1000))
    assert len(page.maps()) == layers
    assert (tmp_path / "r.html").stat().st_size < 3e6


def test_300_outputs_without_a_time_axis_stay_under_3_mb(tmp_path):
    model = nn.ModuleList(nn.Linear(2, 300) for _ in range(300))
    with capture(model, types=nn.Linear, strict=False) as acts:
        for layer in model:
            layer(torch.randn(1, 2))
    page = read(acts, tmp_path / "r.html", model=model)
    assert len([attrs for attrs in page.all("div") if attrs.get("data-kind") == "bars"]) == 300
    assert (tmp_path / "r.html").stat().st_size < 3e6


def test_pictures_are_limited_and_the_page_says_so(tmp_path):
    conv = nn.Conv1d(1, 1, 1)
    model = nn.Sequential(*[conv] * 310)
    with capture(model) as acts:
        model(torch.randn(1, 1, 6))
    page = read(acts, tmp_path / "r.html")
    assert len(page.maps()) == 300
    assert "Shown: the first 300 of 310 calls" in page.written()


def test_the_table_is_limited_and_the_page_says_so(acts, tmp_path, monkeypatch):
    monkeypatch.setattr("convtap._view.report.table.MAX_ROWS", 1)
    monkeypatch.setattr("convtap._view.report.entries.MAX_ROWS", 1)
    page = read(acts, tmp_path / "r.html")
    assert len(page.all("tr")) == 2  # the headings and one call
    assert "Shown: the first 1 of 2 calls. acts.summary() has all." in page.written()


# -- its head


def facts(page):
    """Returns what the head says, by name."""
    head = page.written().split("Coverage")[-2]
    names = ["Model", "Mode", "Device", "Data type", "Inputs", "Outputs", "Captured", "Report written"]
    parts = re.split("|".join(names), head)
    return dict(zip(re.findall("|".join(names), head), parts[1:], strict=True))


@pytest.fixture
def clock(monkeypatch):
    """Stops the clock for captures and reports, and returns what sets it."""

    def set_to(text):
        moment = datetime.strptime(text, "%Y-%m-%d %H:%M UTC").replace(tzinfo=timezone.utc)
        monkeypatch.setattr(time, "time", moment.timestamp)

    return set_to


VERSIONS = f"convtap {convtap.__version__}, torch {torch.__version__}"


def test_the_head_says_what_ran_how_and_when(tmp_path, clock):
    model = small().double()
    clock("2026-01-02 03:04 UTC")
    with capture(model) as acts:
        model.eval()  # the mode is that of the passes
        model(torch.randn(2, 1, 50).double())
        model(torch.randn(3, 1, 50).double())
    model.train()
    clock("2026-05-06 07:08 UTC")
    assert facts(read(acts, tmp_path / "r.html")) == {
        "Model": "Sequential",
        "Mode": "eval",
        "Device": "cpu",
        "Data type": "float64",
        "Inputs": "5 inputs in 2 forward passes",
        "Outputs": "4, 21.9 KiB",
        "Captured": f"2026-01-02 03:04 UTC, {VERSIONS}",
        "Report written": "2026-05-06 07:08 UTC",
    }


def test_a_file_keeps_where_its_outputs_come_from(tmp_path, clock, monkeypatch):
    model = torch.compile(small(), backend="eager")  # of which the class is a wrapper's
    clock("2026-01-02 03:04 UTC")
    with capture(model) as acts:
        model(torch.randn(2, 1, 50))
        model.eval()
        model(torch.randn(2, 1, 50))
    acts.save(tmp_path / "a.safetensors")
    clock("2027-05-06 07:08 UTC")
    monkeypatch.setattr("convtap.__version__", "9.9")
    found = facts(read(load(tmp_path / "a.safetensors"), tmp_path / "r.html"))
    assert found["Model"] == "Sequential"
    assert found["Mode"] == "train and eval"
    assert found["Inputs"] == "4 inputs in 2 forward passes of shape (2, 1, 50)"
    assert found["Captured"] == f"2026-01-02 03:04 UTC, {VERSIONS}"
    assert found["Report written"] == f"2027-05-06 07:08 UTC, convtap 9.9, torch {torch.__version__}"


def test_joined_captures_say_both_origins_and_a_cleared_one_forgets_its_passes(acts, tmp_path):
    other = nn.Conv1d(1, 2, 1)
    with capture(other) as found:
        other(torch.zeros(1, 1, 5))
        found.clear()
        other.eval()
        other(torch.zeros(1, 1, 5))
    assert facts(read(found, tmp_path / "r.html"))["Mode"] == "eval"
    both = facts(read(acts.join(found), tmp_path / "r.html"))
    assert both["Model"] == "Sequential, Conv1d"
    assert both["Mode"] == "train and eval"


def test_title_and_notes_are_text_of_which_the_lines_stay(acts, tmp_path):
    notes = "a <script>alert(1)</script>\r\n\n\tb \u202e & 'c'"
    page = read(acts, tmp_path / "r.html", title="</title><b>Run 7", notes=notes)
    assert page.written().count("</title><b>Run 7") == 2
    assert "a <script>alert(1)</script>\n\n    b \\u202e & 'c'" in page.written()
    assert len(page.all("script")) == 1
    assert {attrs.get("class") for attrs in page.all("b")} == {"name"}
    assert [attrs["class"] for attrs in page.all("p") if attrs.get("class") == "notes"] == ["notes"]


# -- blocks, thumbnails and links


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"c{i}" for i in range(40)], None),
        (
            ["stem", *(f"blocks.{i}.{part}.conv" for i in range(20) for part in "ab"), "head"],
            [("outside any block", 2), *((f"blocks.{i}", 2) for i in range(20))],
        ),
        (
            [*(f"features.{i}.conv" for i in range(10)), *(f"deep.{i}.{j}" for i in range(4) for j in range(8))],
            [("features", 10), *((f"deep.{i}", 8) for i in range(4))],
        ),
        ([str(i) for i in range(45)], [("0 … 19", 20), ("20 … 39", 20), ("40 … 44", 5)]),
    ],
)
def test_a_block_is_the_innermost_module_with_several_layers(names, expected):
    found = blocks([(name, name) for name in names])
    assert expected == (None if found is None else [(" … ".join(names), len(positions)) for names, positions in found])
    assert found is None or sorted(i for _, positions in found for i in positions) == list(range(len(names)))


def test_each_row_has_a_thumbnail_that_shows_nan_and_a_link_to_its_map_and_back(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 40, 1), nn.Conv1d(40, 3, 1), nn.Flatten(), nn.Linear(6000, 2))
    with torch.no_grad():
        model[1].bias[2] = torch.nan
    with capture(model, types=(nn.Conv1d, nn.Linear)) as acts:
        model(torch.randn(1, 1, 2000))
    page = read(acts, tmp_path / "r.html", layers=["0", "1"])
    first, second = map(image_of, page.thumbnails())
    assert len(page.all("tr")) == 4  # the headings and three layers; the last has no picture
    assert first.shape == (16, 48, 3)
    assert not (first == 0).all(axis=-1).any()
    assert (second[2] == 0).all()
    assert not (second[:2] == 0).all(axis=-1).any()
    anchors = [attrs["id"] for _, attrs in page.tags if attrs.get("id", "").startswith(("row-", "map-"))]
    links = [attrs["href"].removeprefix("#") for attrs in page.all("a")]
    assert anchors == ["row-0", "row-1", "row-2", "map-0", "map-1"]
    assert {anchor: links.count(anchor) for anchor in anchors} == {
        "row-0": 1,
        "row-1": 1,
        "row-2": 1,  # of the index
        "map-0": 3,  # of the index, the thumbnail and the name
        "map-1": 3,
    }


# -- what it says


def test_the_table_has_the_statistics_that_numpy_computes(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 4, 3))
    with capture(model) as acts:
        values = model(torch.randn(2, 1, 50)).detach().numpy()
    page = read(acts, tmp_path / "r.html")
    numbers = [attrs["data-value"] for attrs in page.all("td") if "data-value" in attrs]
    size, low, mean, high, std, zeros, dead, bad, median = map(float, numbers)
    assert size == 2 * 4 * 48 * 4
    expected = [
        values.min(),
        values.mean(dtype=np.float64),
        values.max(),
        values.std(dtype=np.float64),
        np.median(values),
    ]
    np.testing.assert_allclose([low, mean, high, std, median], expected, rtol=1e-5)
    assert (zeros, dead, bad) == (0, 0, 0)


def test_every_heading_sorts(acts, tmp_path):
    page = read(acts, tmp_path / "r.html")
    assert len(page.all("th")) - 1 == len(page.all("button")) == 10  # the column of maps has nothing to sort by
    assert {attrs["type"] for attrs in page.all("button")} == {"button"}


def test_a_map_of_the_page_has_the_pixels_of_the_values(tmp_path):
    values = torch.tensor([[[0.0, 1.0, -1.0, float("nan"), float("inf"), 0.5]] * 2])

    class Given(nn.Conv1d):
        def forward(self, x):
            return values * 1

    model = nn.Sequential(Given(1, 1, 1))
    with capture(model) as acts:
        model(torch.zeros(1, 1, 6))
    page = read(acts, tmp_path / "r.html")
    row = [tuple(pixel) for pixel in image_of(page.maps()[0])[0]]
    assert row[:5] == [(255, 255, 255), (168, 32, 46), (23, 88, 159), (0, 0, 0), (255, 205, 0)]
    assert row[5] == (240, 160, 124)  # the anchor half-way to red
    assert "2 NaN, 2 Inf" in page.written()
    assert page.written().count("▼") == 2


def test_pictures_lie_on_the_time_axis(acts, tmp_path):
    line = {"0": Entry(0, 1, 3), "2": Entry(0, 2, 3)}
    page = read(acts, tmp_path / "r.html", timeline=line, signal=torch.randn(2, 1, 100), sample_rate=10)
    # the axis: 100 samples from -0.5 to 99.5. 48 frames around 1 … 48: from 0.5 to 48.5. 46 frames around 1, 3 … 91: 0 to 92
    places = [attrs["style"] for attrs in page.all("div") if attrs.get("style", "").startswith("left:")][1:]
    assert places == ["left:1.000%;width:48.000%", "left:0.500%;width:92.000%"]
    assert "time in seconds" in page.written()


def test_what_was_not_captured_is_named_with_its_reason(tmp_path):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.fused = nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1), nn.Conv1d(1, 1, 1)

        def forward(self, x):
            return self.used(x) + self.fused.weight.squeeze(1).sum()

    model = Part()
    with pytest.warns(match="fused"), capture(model, strict=False) as acts:
        model(torch.randn(1, 1, 9))
    page = read(acts, tmp_path / "r.html", model=model)
    written = page.written()
    assert "3 layers: 1 captured, 1 idle, 1 bypassed" in written
    assert "weight read by torch.Tensor.squeeze" in written
    marks = [attrs["class"] for attrs in page.all("span") if attrs.get("class") in ("captured", "idle", "bypassed")]
    assert marks == ["captured", "idle", "bypassed"]


def test_a_layer_without_an_activation_is_in_the_list_and_in_the_tree(tmp_path):
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 2, 1))
    with capture(model, at="activation", strict=False) as acts:
        model(torch.randn(1, 1, 9))
    page = read(acts, tmp_path / "r.html", model=model)
    assert page.written().count("ran 1 time without an activation after it") == 2
    assert "○ ran 1 time without" in page.written()
    assert [attrs["class"] for attrs in page.all("td") if attrs.get("class") == "not-activated"] == ["not-activated"]


def test_the_list_of_what_was_not_captured_is_limited_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("convtap._view.report.coverage.MAX_ROWS", 2)

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv1d(1, 1, 1) for _ in range(5))

        def forward(self, x):
            return self.convs[0](x)

    model = Lazy()
    with capture(model, strict=False) as acts:
        model(torch.zeros(1, 1, 4))
    acts.report(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Shown: the first 2 of 4 layers without outputs." in page
    assert page.count("<td class='idle'>") == 2


def test_the_tree_is_the_models_with_the_captured_marked(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU()), nn.Sequential(nn.Linear(5, 5)))
    with capture(model) as acts:
        model(torch.randn(1, 1, 5))
    page = read(acts, tmp_path / "r.html", model=model)
    opened = [("open" in attrs) for attrs in page.all("details")]
    assert opened == [True, True, True, False]  # the index, the root, 0 (a layer of it was captured), 1 (none)
    tree = page.written().split("Layer tree")[-1]
    assert (
        re.sub(r"\s+", " ", tree).strip()
        == "Sequential0 Sequential0 Conv1d ● captured 1 time1 ReLU1 Sequential0 Linear"
    )


def test_functions_and_loose_parameters_are_in_the_tree(tmp_path):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(1, 1, 3))

        def forward(self, x):
            return nn.functional.conv1d(x, self.kernel) + nn.functional.conv1d(x, self.kernel * 2)

    model = Loose()
    with capture(model) as acts:
        model(torch.randn(1, 1, 9))
    tree = read(acts, tmp_path / "r.html", model=model).written().split("Layer tree")[-1]
    assert "kernel ● captured 1 time" in tree
    assert "F.conv1d ● captured 1 time" in tree


def test_an_empty_capture_still_makes_a_page(acts, tmp_path):
    acts.clear()
    written = read(acts, tmp_path / "r.html", model=small()).written()
    assert "No outputs were captured." in written
    assert "The capture has no outputs to draw." in written


def test_bars_and_structures_are_on_the_page(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 7)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    model = Recurrent()
    with capture(model, types=(nn.LSTM, nn.Linear)) as acts:
        model(torch.randn(2, 9, 3))
    page = read(acts, tmp_path / "r.html")
    written = page.written()
    assert "lstm[0] (9, 5) · time is axis -2" in written
    assert "axis 0 is 1 and the input batch is 2" in written
    assert "no time axis: one bar per channel" in written
    assert sum(attrs["d"].count("M") for attrs in page.all("path") if attrs.get("class") in ("up", "down")) == 7


def test_calls_of_other_passes_are_counted(tmp_path):
    model = small()
    with capture(model) as acts:
        model(torch.randn(1, 1, 9))
        model(torch.randn(1, 1, 9))
    assert (
        "Other forward passes have 2 calls. Pass sample= to draw another input."
        in read(acts, tmp_path / "r.html").written()
    )


def test_a_signal_with_gaps_is_drawn(acts, tmp_path):
    signal = torch.randn(2, 3, 5000)
    signal[0, 1, 100] = float("nan")
    page = read(acts, tmp_path / "r.html", signal=signal)
    assert len([attrs for attrs in page.all("path") if attrs.get("stroke") == "#b00000" and "v100" in attrs["d"]]) == 1
    assert "(3, 5,000) 1 NaN" in page.written()


# -- writing


def test_the_file_is_replaced_whole_and_nothing_else_is_left(acts, tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    acts.report(str(path))
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_the_page_is_the_same_every_time(acts, tmp_path, clock):
    clock("2026-01-02 03:04 UTC")
    acts.report(tmp_path / "a.html")
    acts.report(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_an_error_leaves_the_old_file(acts, tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(OutOfRange):
        acts.report(path, sample=9)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("no/such/r.html", {}, StoreError, "cannot be written.*Pass a path in an existing, writable folder"),
        (".", {}, StoreError, "cannot be written"),
        ("r.html", {"model": 3}, InvalidType, "model is a int, not a torch.nn.Module"),
        ("r.html", {"layers": "nope"}, LayerNotFound, "no captured layer matches 'nope'"),
        ("r.html", {"channels": 0}, InvalidValue, "channels=0 is less than 1"),
        ("r.html", {"title": 3}, InvalidType, "title is a int, not text. Pass a string: title='…'."),
        ("r.html", {"notes": ["a"]}, InvalidType, "notes is a list, not text. Pass a string: notes='…'."),
    ],
)
def test_a_bad_argument_is_named(acts, tmp_path, path, options, error, message):
    with pytest.raises(error, match=message):
        acts.report(tmp_path / path, **options)


def test_what_is_no_capture_is_named(tmp_path):
    with pytest.raises(InvalidType, match="acts is a dict, not the result of a capture"):
        report({}, tmp_path / "r.html")


def test_a_path_that_is_none_is_named(acts):
    with pytest.raises(InvalidType, match="path is a BytesIO, not the path of a file"):
        acts.report(io.BytesIO())
