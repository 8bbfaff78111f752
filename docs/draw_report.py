"""Draws ``docs/report.png``, the demo's report: ``python -m docs.draw_report``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from convtap import capture, timeline
from convtap._cli.demo import SPEECH, AudioEncoder
from convtap._cli.sound import read_sound

PICTURE = Path(__file__).parent / "report.png"
SIZE = {"width": 1100, "height": 1500}


def draw() -> None:
    """Writes the picture of the head, the table, and a value under the pointer."""
    torch.manual_seed(0)
    model = AudioEncoder().eval()
    waveform, rate = read_sound(SPEECH)
    with torch.no_grad(), capture(model) as acts:
        model(waveform)
    times = timeline(model, waveform)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        notes = "Random weights, to show the time axis."
        acts.report(page, model=model, signal=waveform, sample_rate=rate, timeline=times, notes=notes)
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = chromium.new_page(viewport=SIZE)
        window.goto(page.as_uri())
        box = window.locator("#map-0 .track > div").bounding_box()
        window.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
        window.locator("#tip").wait_for(state="visible")
        window.screenshot(path=PICTURE)
        chromium.close()
    Image.open(PICTURE).convert("RGB").quantize(160).save(PICTURE, optimize=True)


if __name__ == "__main__":
    draw()
