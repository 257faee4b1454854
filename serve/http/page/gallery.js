// The gallery: one tile per image, with a frame in the expert's colour and a strip of the experts used at each step.

import { $, element, expertColour, imageNumber, indexOfLargest, keepsExperts, svg } from "./dom.js";
import { state } from "./state.js";

/** An image at the step on display: that step's record, its expert, and the PNG. Null before the first step. */
export function appearance(image) {
  const { run } = state;
  const isLast = run.step === null || run.step >= run.steps;
  const record = isLast ? image.steps.at(-1) : image.steps[run.step];
  if (!record) return null;
  // An image that keeps its expert is that expert's, whatever alpha is.
  const kept = keepsExperts(run.settings) ? record.chosen[0] : undefined; // nor of a skipped step
  const expert = kept ?? indexOfLargest(record.alpha);
  const finished = isLast && image.final !== null;
  return { ...record, expert, finished, source: finished ? image.final : record.preview };
}

export function buildGallery() {
  const { images } = state.run;
  for (const [i, image] of images.entries()) image.parts = buildTile(i);
  $("gallery").replaceChildren(...images.map(({ parts }) => parts.tile));
}

function buildTile(index) {
  const { experts, shape: [, height, width], steps } = state.run;
  const rows = experts.length;
  const img = element("img", { alt: "", hidden: "" });
  const placeholder = element("div", { class: "placeholder" });
  for (const part of [img, placeholder]) part.style.aspectRatio = `${width} / ${height}`;
  const paths = experts.map((_, k) => svg("path", { "data-expert": k, d: "" }));
  paths.forEach((path, k) => (path.style.color = expertColour(k)));
  const cursor = svg("rect", { class: "cursor", y: 0, width: 1, height: rows, visibility: "hidden" });
  const view = { viewBox: `0 0 ${steps} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" };
  const strip = svg("svg", view, ...paths, cursor);
  strip.style.height = `${Math.max(8, rows * (rows > 8 ? 3 : 4))}px`;
  const name = element("span", { class: "name" });
  const tile = element("div", { class: "tile", role: "option", "data-index": index }, img, placeholder, strip, name);
  return { tile, img, placeholder, paths, cursor, name, cells: experts.map(() => ""), painted: 0 };
}

export function paintTiles() {
  state.run.images.forEach(paintTile);
}

function paintTile(image, index) {
  const { run } = state;
  const { tile, img, placeholder, cursor, name } = image.parts;
  paintStrip(image);
  const now = appearance(image);
  const expert = now ? run.experts[now.expert] : "";
  const label = `Image ${imageNumber(run, index)}`;
  tile.setAttribute("aria-label", expert ? `${label}, ${expert}` : label);
  if (!now) return;
  if (now.source && img.getAttribute("src") !== now.source) img.src = now.source;
  img.hidden = !now.source;
  placeholder.hidden = !img.hidden;
  tile.style.color = expertColour(now.expert);
  name.textContent = expert;
  const isAtStep = run.step !== null && run.step < run.steps;
  cursor.setAttribute("x", run.step ?? 0);
  cursor.setAttribute("visibility", isAtStep ? "visible" : "hidden");
}

/** One column per step and one row per expert, a cell where the expert was used. */
function paintStrip({ steps, parts }) {
  const { cells, paths } = parts;
  const changed = new Set();
  for (; parts.painted < steps.length; parts.painted += 1) {
    for (const k of steps[parts.painted].chosen) {
      cells[k] += `M${parts.painted} ${k}h.85v.85h-.85z`;
      changed.add(k);
    }
  }
  for (const k of changed) paths[k].setAttribute("d", cells[k]);
}

/** Only the selected tile takes part in the Tab order. */
export function markSelected(focus) {
  const { images, selected } = state.run;
  images.forEach(({ parts: { tile } }, i) => {
    tile.setAttribute("aria-selected", String(i === selected));
    tile.tabIndex = i === selected ? 0 : -1;
  });
  if (focus) images[selected].parts.tile.focus();
}
