"use strict";
// The page shows everything without this script. The script sorts and folds tables, filters layers, and shows values.
const root = document.documentElement, index = document.querySelector(".index");
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
root.classList.add("script");
for (const element of all("[data-script]")) element.hidden = false;

// -- the table: blocks that fold, headings that sort up, down, and back to the order of execution

const table = document.querySelector("table.layers");
const bodies = table ? [...table.tBodies] : [];
const rows = bodies.flatMap((body) => all("tr:not(.block)", body));
const home = new Map(rows.map((row) => [row, row.parentElement]));
const sorted = document.createElement("tbody");

const fold = (body, folded) => {
  body.classList.toggle("folded", folded);
  body.querySelector(".block button").setAttribute("aria-expanded", String(!folded));
};
const foldable = bodies.filter((body) => body.querySelector(".block"));
for (const body of foldable) {
  fold(body, true);
  body.querySelector(".block button").addEventListener("click", () => fold(body, !body.classList.contains("folded")));
}

const byColumn = (column, numeric, sign) => (a, b) => {
  const text = (row) => row.cells[column].textContent;
  if (!numeric) return sign * text(a).localeCompare(text(b), undefined, { numeric: true });
  const number = (row) => (row.cells[column].dataset.value === "" ? NaN : Number(row.cells[column].dataset.value));
  const x = number(a), y = number(b);
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
  return sign * (x - y);
};
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
for (const button of all("thead button", table ?? document.createElement("div"))) {
  button.addEventListener("click", () => {
    const head = button.parentElement, order = NEXT[head.getAttribute("aria-sort") ?? "none"];
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    for (const body of bodies) body.hidden = order !== "none";
    if (order === "none") {
      sorted.remove();
      for (const row of rows) home.get(row).append(row);
    } else {
      const numeric = head.classList.contains("number"), sign = order === "ascending" ? 1 : -1;
      sorted.append(...[...rows].sort(byColumn(head.cellIndex, numeric, sign)));
      table.append(sorted);
      head.setAttribute("aria-sort", order);
    }
    filter();
  });
}

for (const button of all("button.unfold")) {
  const blocks = all("details.block", button.closest("section"));
  button.addEventListener("click", () => {
    const open = button.textContent === "unfold all";
    for (const block of blocks) block.open = open;
    if (!blocks.length) for (const body of foldable) fold(body, !open);
    button.textContent = open ? "fold all" : "unfold all";
  });
}

// -- the filter: of the index, the table and the pictures, but not of the signal

const field = index.querySelector("input"), count = index.querySelector("output");
const items = [...all(".index li"), ...rows, ...all("figure[id]")].map((element) => {
  const name = element.querySelector(".name");
  return { element, name: name ? name.textContent.toLowerCase() : "" };
});
const blocks = all("details.block"), wasOpen = new Map();

function filter() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean), active = words.length > 0;
  for (const { element, name } of items) element.hidden = active && !words.every((word) => name.includes(word));
  for (const block of blocks) {
    const matches = all("li, figure", block).some((element) => !element.hidden);
    if (active && !wasOpen.has(block)) wasOpen.set(block, block.open);
    if (active) block.open = matches;
    else if (wasOpen.has(block)) block.open = wasOpen.get(block);
    block.hidden = active && !matches;
  }
  if (!active) wasOpen.clear();
  if (table) table.classList.toggle("filtered", active);
  for (const body of foldable) body.hidden = sorted.isConnected || (active && !rows.some((row) => home.get(row) === body && !row.hidden));
  const shown = rows.filter((row) => !row.hidden).length;
  count.textContent = active ? `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} layers` : "";
}
field.addEventListener("input", () => { filter(); if (narrow.matches) list.open = field.value !== ""; });
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (event.target === field) { field.value = ""; filter(); }
  settle();
});

// -- the index: always open beside the page, a list that opens in a bar above it

const narrow = matchMedia("(max-width: 1279px)"), list = index.querySelector("details.list");
const settle = () => { list.open = !narrow.matches; };
narrow.addEventListener("change", settle);
settle();
document.addEventListener("click", (event) => { if (narrow.matches && !index.contains(event.target)) list.open = false; });

// -- links: unfold the target, and show it if the filter hides it

function reveal(hash) {
  const target = hash.length > 1 && document.getElementById(hash.slice(1));
  if (!target) return;
  if (target.hidden) { field.value = ""; filter(); }
  for (let at = target; at; at = at.parentElement) {
    if (at.localName === "details") at.open = true;
    if (at.localName === "tbody" && at.classList.contains("folded")) fold(at, false);
  }
  target.scrollIntoView();
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  if (narrow.matches) list.open = false;
  reveal(link.hash);
});
addEventListener("hashchange", () => reveal(location.hash));
reveal(location.hash);

// -- printing: unfold everything that the filter shows, and fold it again after printing

const folded = [];
addEventListener("beforeprint", () => {
  for (const details of all("details.block:not([open])")) { folded.push(details); details.open = true; }
});
addEventListener("afterprint", () => { for (const details of folded.splice(0)) details.open = false; });

// -- values under the pointer

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

const whole = (number) => number.toLocaleString("en");
const range = (noun, first, last) => first === last ? `${noun} ${whole(first)}` : `${noun}s ${whole(first)} – ${whole(last)}`;
const ends = (position, parts, all) => [Math.floor(position * all / parts), Math.floor((position + 1) * all / parts) - 1];
const about = (value, error) => {
  if (!error) return `${Number(value.toPrecision(4))}`;
  const digits = value ? Math.min(9, Math.max(1, Math.ceil(Math.log10(Math.abs(value) / error)) + 2)) : 1;
  const unit = 10 ** (Math.floor(Math.log10(error)) - 1), wide = Math.ceil(1.06 * error / unit) * unit; // includes the rounding
  return `≈ ${Number(value.toPrecision(digits))} ± ${Number(wide.toPrecision(2))}`;
};

// See Note: [Values in the image] in codes.py. This reads the bytes of the PNG, since a browser may alter those of a canvas.
const images = new WeakMap();
async function decode(image) {
  const bytes = Uint8Array.from(atob(image.src.split(",")[1]), (sign) => sign.charCodeAt(0)), view = new DataView(bytes.buffer);
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    if (String.fromCharCode(...bytes.subarray(at + 4, at + 8)) !== "IDAT") continue;
    const map = { columns: view.getUint32(16), rows: view.getUint32(20) };
    if (!("DecompressionStream" in window)) return map;
    const data = new Blob([bytes.subarray(at + 8, at + 8 + view.getUint32(at))]);
    const stream = data.stream().pipeThrough(new DecompressionStream("deflate"));
    return { ...map, codes: new Uint8Array(await new Response(stream).arrayBuffer()) };
  }
}
const valueOf = (code, limit, peak) => {
  const { linear, outer } = root.dataset, zero = Number(linear) + Number(outer), step = code - zero, size = Math.abs(step);
  if (size > zero) return ["", "NaN", "+Inf", "−Inf"][size - zero];
  if (!peak) return about(0, 0);
  const growth = Math.max(peak / limit, 1), half = limit / linear / 2, beyond = Math.max(size - linear, 0);
  const value = beyond ? limit * growth ** (beyond / outer) : limit * size / linear;
  return about(Math.sign(step) * value, size < linear ? half : Math.max(size > linear ? 0 : half, value * (growth ** (0.5 / outer) - 1)));
};

function overMap(track, image, across, down) {
  const map = images.get(image), data = track.dataset, channels = Number(data.channels), frames = Number(data.frames);
  const row = Math.floor(down * map.rows), column = Math.floor(across * map.columns);
  const isJoined = map.columns < frames, bins = map.columns / (isJoined ? 2 : 1), bin = isJoined ? column >> 1 : column;
  const value = (at) => !map.codes ? "not shown by this browser" : valueOf(map.codes[row * (map.columns + 1) + 1 + at], Number(data.limit), Number(data.peak));
  const [first, last] = ends(row, map.rows, channels);
  const values = isJoined ? `min ${value(2 * bin)}\nmax ${value(2 * bin + 1)}` : value(bin);
  const joined = first === last ? "" : ", the furthest from zero";
  return `${range("channel", first, last)}${joined}\n${when(track, ...ends(bin, bins, frames), frames, "frame")}\n${values}`;
}
const when = (track, first, last, frames, noun) => {
  const { start, stop } = track.dataset, unit = document.getElementById("pictures").dataset.unit;
  if (start === undefined) return range(noun, first, last);
  const at = (frame) => Number((Number(start) + (frame + 0.5) / frames * (stop - start)).toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 9 });
  const time = first === last ? at(first) : `${at(first)} – ${at(last)}`;
  if (noun === "sample" && unit !== "seconds") return range(noun, first, last);
  return `${unit === "seconds" ? `${time} s` : `input sample ${time}`} (${range(noun, first, last)})`;
};

function overBars(track, svg, across) {
  const { channels, low, high } = track.dataset, number = svg.viewBox.baseVal.width / 10, bar = Math.floor(across * number);
  const scale = (high - low) / 1000, found = {};
  for (const path of all("path[class]", svg)) {
    const part = new RegExp(`M${10 * bar + 1} [\\d.]+v(-?\\d+)`).exec(path.getAttribute("d"));
    if (part) found[path.getAttribute("class")] = about(-part[1] * scale, scale / 2);
  }
  const [first, last] = ends(bar, number, Number(channels)), bad = ["NaN", "Inf"].find((kind) => kind in found);
  const isOne = first === last, { up, down } = found, zero = about(0, 0);
  const values = bad ?? (isOne ? up ?? down ?? zero : `min ${down ?? zero}\nmax ${up ?? zero}`);
  return `${range("channel", first, last)}\n${values}`;
}

function overLines(track, svg, across, down) {
  const { channels, frames, low, high } = track.dataset, bins = Math.min(600, Number(frames)), bin = Math.floor(across * bins);
  const channel = Math.min(Number(channels) - 1, Math.floor(down * channels)), path = all("path.line", svg)[channel];
  path.steps ??= new Map([...path.getAttribute("d").matchAll(/[ML]([\d.]+) ([-\d.]+)(?:V([-\d.]+))?/g)]
    .map(([, x, y, to]) => [Math.round(x * bins / 1000 - 0.5), [Number(to ?? y), Number(y)]]));
  const height = (high - low) * 1.1 || 1, middle = (Number(low) + Number(high)) / 2, found = path.steps.get(bin);
  const value = (y) => about(middle + (channel * 100 + 50 - y) / 100 * height, height / 2000);
  const [first, last] = ends(bin, bins, Number(frames));
  const values = !found ? "no finite value" : first === last ? value(found[1]) : `min ${value(found[0])}\nmax ${value(found[1])}`;
  return `channel ${channel}\n${when(track, first, last, Number(frames), "sample")}\n${values}`;
}

let latest = null;
async function point(event) {
  latest = event;
  const track = event.target.closest?.(".track[data-kind]");
  if (!track) { tip.hidden = true; return; }
  const image = track.querySelector("img, svg"), box = image.getBoundingClientRect(), kind = track.dataset.kind;
  const across = (event.clientX - box.left) / box.width, down = Math.min(0.9999, Math.max(0, (event.clientY - box.top) / box.height));
  if (!(across >= 0 && across < 1)) { tip.hidden = true; return; }
  if (kind === "map" && !images.has(image)) {
    images.set(image, await decode(image));
    if (latest !== event) return;
  }
  tip.textContent = (kind === "map" ? overMap : kind === "bars" ? overBars : overLines)(track, image, across, down);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, root.clientWidth - width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
}
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
