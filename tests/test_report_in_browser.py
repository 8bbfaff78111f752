"""The report in a browser: headless Chromium opens the file, sorts, filters, follows links, unfolds and points at maps."""

from __future__ import annotations

import itertools
import os
import re
import shutil

import pytest
import torch
from playwright.sync_api import sync_playwright
from torch import nn

from convtap import capture, load, timeline

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

if BROWSER is None and not os.environ.get("CI"):  # there it is an error
    pytest.skip("there is no Chromium here. Install it: apt-get install chromium", allow_module_level=True)

WIDE, ISSUE, PHONE = 1600, 1100, 400


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter, self.gate = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.skip_connection = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return x + self.skip_connection(self.filter(x).tanh() * self.gate(x).sigmoid())


class Deep(nn.Module):
    """48 layers: 15 blocks of three convolutions, two convolutions at the start, and one at the end, which returns NaN."""

    def __init__(self):
        super().__init__()
        self.start = nn.Sequential(nn.Conv1d(1, 8, 5, stride=2), nn.Conv1d(8, 8, 3))
        self.a_stack_of_blocks_with_a_long_name_as_in_large_models = nn.ModuleList(Block() for _ in range(15))
        self.end = nn.Conv1d(8, 6, 1)
        with torch.no_grad():
            self.end.weight[3] = torch.nan

    def forward(self, x):
        x = self.start(x)
        for block in self.a_stack_of_blocks_with_a_long_name_as_in_large_models:
            x = block(x)
        return self.end(x)


class Small(nn.Module):
    """Two maps, of which the second has bins of frames and rows of channels, and bars."""

    def __init__(self):
        super().__init__()
        self.few, self.many, self.head = nn.Conv1d(2, 4, 3, stride=100), nn.Conv1d(2, 70, 1), nn.Linear(70, 5)

    def forward(self, x):
        self.few(x)
        return self.head(self.many(x)[..., :40].mean(-1))


RATE = 1000
X = torch.randn(2, 2, 3000, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    model = Deep().eval()
    with torch.no_grad(), capture(model) as acts:
        model(torch.randn(2, 1, 400))
    return model, acts


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad(), capture(model, types=(nn.Conv1d, nn.Linear)) as acts:
        model(X)
    return model, acts


@pytest.fixture(scope="module")
def pages(deep, small, tmp_path_factory):
    """Returns the files of three reports: of many layers, of few, and of a file, without the model."""
    folder = tmp_path_factory.mktemp("reports")
    deep[1].report(folder / "deep.html", model=deep[0], notes="first line\n  <b>second</b> line")
    options = {"signal": X, "sample_rate": RATE, "timeline": timeline(small[0], X)}
    small[1].report(folder / "small.html", model=small[0], **options)
    small[1].save(folder / "small.safetensors")
    load(folder / "small.safetensors").report(folder / "loaded.html")
    return {name: folder / f"{name}.html" for name in ("deep", "small", "loaded")}


@pytest.fixture(scope="module")
def browser():
    assert BROWSER is not None, "CI has no Chromium. Install it: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, pages):
    """Opens a report in a window; after the test, nothing was written to the console or asked of the network."""
    complaints, contexts = [], []

    def show(name, width, fragment="", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        address = pages[name].as_uri()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: sent.url.partition("#")[0] == address or complaints.append(sent.url))
        page.goto(address + fragment)
        return page

    show.complaints = complaints
    yield show
    for context in contexts:
        context.close()
    assert complaints == []


def visible(page, selector):
    """Returns the texts of the elements that can be seen."""
    return page.locator(selector).filter(visible=True).all_inner_texts()


def is_in_view(page, selector):
    """Returns whether the beginning of an element is in the window, and nothing lies over it."""
    return page.locator(selector).evaluate("""(element) => {
      const { x, y, width } = element.getBoundingClientRect(), top = document.elementFromPoint(x + width / 2, y + 6);
      return y >= 0 && top !== null && element.contains(top);
    }""")


# -- it fits


TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const { left, right, width } = element.getBoundingClientRect();
  return width && (right > document.documentElement.clientWidth + 0.5 || left < -0.5);
}).map((element) => element.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("name", ["deep", "small", "loaded"])
def test_no_element_is_wider_than_the_window_and_the_index_stays_in_it(show, name):
    page = show(name, WIDE)
    for button in page.locator("button.unfold").all():
        button.click()
    for width in (WIDE, ISSUE, PHONE):
        page.set_viewport_size({"width": width, "height": 800})
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.evaluate("document.querySelectorAll('.index details').forEach((list) => list.open = false)")
        page.evaluate("scrollTo(0, 1000)")
        assert page.evaluate("scrollY") > 400
        assert 0 <= page.locator(".index input").bounding_box()["y"] < 200
        page.evaluate("scrollTo(0, 0)")


# -- the table


def names_by_std(acts, largest_first):
    """Sorts the names by the standard deviation of their finite values."""
    found = {name: output[output.isfinite()].double().std(correction=0) for name, output in acts.items()}
    return sorted(found, key=found.get, reverse=largest_first)


def test_a_heading_sorts_up_down_and_back_to_the_order_of_execution(show, deep):
    page = show("deep", ISSUE)
    heading = page.get_by_role("button", name="std")
    assert visible(page, "tbody td .name") == []  # folded
    heading.click()
    assert visible(page, "tbody td .name") == names_by_std(deep[1], False)
    heading.click()
    assert visible(page, "tbody td .name") == names_by_std(deep[1], True)
    heading.click()
    page.locator("section#layers button.unfold").click()
    assert visible(page, "tbody td .name") == list(deep[1])


def test_more_than_40_layers_are_folded_by_block_and_a_block_says_that_it_holds_nan(show):
    page = show("deep", ISSUE)
    blocks = visible(page, "table tr.block")
    assert len(blocks) == len(visible(page, "section#pictures summary")) == 17
    assert blocks[0].split() == ["start", "2", "outputs"]
    assert blocks[-1].split() == ["outside", "any", "block", "1", "output", "1", "with", "NaN", "or", "Inf"]
    page.locator("table tr.block button").nth(3).click()
    assert [name.rpartition(".")[2] for name in visible(page, "tbody td .name")] == [
        "filter",
        "gate",
        "skip_connection",
    ]
    assert visible(show("small", ISSUE), "table tr.block, section#pictures summary") == []


# -- filter and links


def test_the_filter_leaves_what_has_all_words_in_index_table_and_pictures(show):
    page = show("deep", WIDE)
    field = page.locator(".index input")
    field.fill("4.gate")
    expected = [f"a_stack_of_blocks_with_a_long_name_as_in_large_models.{number}.gate" for number in (4, 14)]
    for selector in (".index li .name", "tbody td .name", "figcaption .name"):
        assert visible(page, selector) == expected, selector
    assert visible(page, ".index output") == ["2 of 48 layers"]
    field.fill("LARGE skip 14.")
    assert [name.partition(".")[2] for name in visible(page, "tbody td .name")] == ["14.skip_connection"]
    field.fill("nothing has this name")
    assert visible(page, "tbody tr, figure, .index li") == []
    field.press("Escape")
    assert len(visible(page, "table tr.block")) == 17
    assert visible(page, "tbody td .name") == []


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_a_row_leads_to_its_map_and_the_map_back_to_the_row(show, width):
    page = show("deep", width)
    page.locator("table tr.block button").nth(9).click()
    row = page.locator("tbody tr:not(.block)").filter(visible=True).first
    name, anchor = row.locator(".name").inner_text(), row.get_attribute("id")
    row.locator("td:first-child a").click()
    target = page.evaluate("location.hash")
    assert page.locator(f"{target} .name").inner_text() == name
    assert is_in_view(page, target)
    page.locator("table tr.block button").nth(9).evaluate("button => button.click()")  # folded again
    page.locator(f"{target} .back").click()
    assert page.evaluate("location.hash") == f"#{anchor}"
    assert is_in_view(page, f"#{anchor}")
    page.go_back()
    assert is_in_view(page, target)


def test_the_index_leads_to_a_map_that_is_folded_and_filtered_away(show):
    page = show("deep", ISSUE)
    page.get_by_text("Index · 48").click()
    page.locator(".index details.block").last.locator("summary").click()
    page.locator(".index details.block").last.locator("a").click()
    target = page.evaluate("location.hash")
    assert page.locator(f"{target} .name").inner_text() == "end"
    assert is_in_view(page, target)
    page.locator(".index input").fill("filter")
    assert not page.locator(target).is_visible()
    page.evaluate(f"location.hash = ''; location.hash = '{target}'")
    page.locator(target).wait_for(state="visible")
    assert is_in_view(show("deep", ISSUE, target), target)


# -- values


def hover(page, selector, across, down):
    """Points at a part of a picture, and returns the lines of what the page says of it."""
    track = page.locator(f"{selector} .track > div")
    track.scroll_into_view_if_needed()
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # what scrolls hides the tip
    box = track.bounding_box()
    page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    page.locator("#tip").wait_for(state="visible")
    return page.locator("#tip").inner_text().splitlines()


def numbers(line):
    """Returns the whole numbers after the noun of a line such as ``channels 3 – 4`` or ``1.5 s (frame 7)``."""
    found = re.search(r"(?:channel|frame|sample)s? ([\d,]+)(?: – ([\d,]+))?", line)
    first, last = (int(number.replace(",", "")) for number in (found[1], found[2] or found[1]))
    return slice(first, last + 1)


def is_said(line, true):
    """Returns whether a line such as ``min ≈ -0.34 ± 0.01`` holds for the true value."""
    value, error = map(float, re.fullmatch(r"(?:min |max )?≈ (\S+) ± (\S+)", line).groups())
    return abs(value - float(true)) <= error + 1e-7


@pytest.mark.parametrize("name", ["small", "loaded"])
def test_pointing_at_a_map_of_single_cells_shows_channel_frame_and_value(show, small, name):
    page, output = show(name, ISSUE), small[1]["few"][0]  # (4, 30)
    for channel, frame in [(0, 0), (1, 7), (3, 29), (2, 15)]:
        lines = hover(page, "#map-0", (frame + 0.5) / 30, (channel + 0.5) / 4)
        assert lines[0] == f"channel {channel}"
        time = f"{(100 * frame + 1) / RATE:.9g} s (frame {frame})" if name == "small" else f"frame {frame}"
        assert lines[1] == time
        assert is_said(lines[2], output[channel, frame])


def test_pointing_at_a_bin_shows_the_minimum_and_the_maximum_of_its_frames(show, small):
    page, output = show("small", ISSUE), small[1]["many"][0]  # (70, 3000), in 64 rows of 300 bins
    extremes = list(divmod(int(output.abs().argmax()), 3000))
    for channel, frame in [(0, 0), (69, 2999), (33, 1234), extremes]:
        lines = hover(page, "#map-1", (frame + 0.5) / 3000, (channel + 0.5) / 70)
        channels, frames = numbers(lines[0]), numbers(lines[1])
        assert frames.start - 1 <= frame <= frames.stop <= frames.start + 12  # drawn equally wide, up to a frame apart
        assert channels.start - 1 <= channel <= channels.stop <= channels.start + 2
        part = output[channels, frames]
        furthest = part.gather(0, part.abs().argmax(0, keepdim=True))
        assert is_said(lines[2], furthest.min())
        assert is_said(lines[3], furthest.max())
        assert lines[2].startswith("min")
        assert lines[3].startswith("max")


def test_pointing_at_bars_and_at_the_signal_shows_their_values(show, small):
    page = show("small", ISSUE)
    for channel in range(5):
        lines = hover(page, "#map-2", (channel + 0.5) / 5, 0.5)
        assert lines[0] == f"channel {channel}"
        assert is_said(lines[1], small[1]["head"][0, channel])
    for channel, sample in itertools.product((0, 1), (0, 1700, 2999)):
        lines = hover(page, "figure:not([id])", (sample + 0.5) / 3000, (channel + 0.5) / 2)
        samples = numbers(lines[1])
        assert lines[0] == f"channel {channel}"
        assert samples.start <= sample < samples.stop == samples.start + 5
        assert is_said(lines[2], X[0, channel, samples].min())
        assert is_said(lines[3], X[0, channel, samples].max())


def test_nan_is_called_nan(show):
    page = show("deep", ISSUE, "#map-47")
    assert hover(page, "#map-47", 0.5, 3.5 / 6)[-1] == "NaN"
    assert hover(page, "#map-47", 0.5, 2.5 / 6)[-1].startswith("≈")


# -- without script, on paper, and without a network


def test_without_script_everything_is_there(show):
    page = show("deep", ISSUE, java_script_enabled=False)
    assert len(visible(page, "tbody td .name")) == 48
    assert visible(page, ".index input, button.unfold") == []
    assert visible(page, ".notes") == ["first line\n  <b>second</b> line"]
    page.locator("section#pictures summary").last.click()
    assert visible(page, "figcaption .name") == ["end"]
    page.locator("tbody tr:not(.block) a[href='#map-20'] .name").click()
    assert is_in_view(page, "#map-20")


def test_paper_has_every_row_and_picture_and_no_index(show):
    page = show("deep", ISSUE)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(visible(page, "tbody td .name")) == len(visible(page, "figcaption .name")) == 48
    assert visible(page, ".index, button.unfold, .back") == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert visible(page, "figcaption .name") == []


def test_the_policy_forbids_loading_anything(show, pages):
    page = show("small", ISSUE)
    other = pages["deep"].as_uri()
    for code in (
        f"new Image().src = '{other}'",
        "new Image().src = 'http://127.0.0.1/x.png'",
        f"fetch('{other}').catch(() => 0)",
    ):
        blocked = page.evaluate(
            f"""() => new Promise((done) => {{
              document.addEventListener("securitypolicyviolation", (event) => done(event.blockedURI), {{ once: true }});
              {code};
              setTimeout(() => done("loaded"), 2000);
            }})"""
        )
        assert blocked != "loaded", code
    show.complaints.clear()
