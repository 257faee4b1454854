// The chart of one image: alpha over t as stacked bands, and below it one row per expert with a mark for each of its steps.

import { expertColour, holdsAlpha, indexOfLargest, keepsExperts, plural, svg } from "./dom.js";
import { state } from "./state.js";

const TOP = 6; // pixels, as all sizes here
const HEIGHT = 150; // of the bands
const AXIS = 30; // between the bands and the rows
const ROW = 20;
const RIGHT = 34; // for the counts
const MAX_LEFT = 124; // for the names
const CHARACTER = 6.5; // the width of one
const ROWS_TOP = TOP + HEIGHT + AXIS;

let layout = null; // of the chart that was made last

/** The chart as an SVG of this width. `steps` are those so far, `{t, alpha, chosen}` each. */
export function chart(steps, width) {
  layout = newLayout(steps, width);
  const { experts } = state.run;
  const view = { viewBox: `0 0 ${width} ${layout.bottom + 4}`, role: "img", "aria-label": description(steps) };
  const rows = experts.map((name, k) => row(name, k, steps));
  return svg("svg", view, ...axes(), ...bands(steps), ...rows.flat(), ...switches(steps), ...cursor(steps));
}

function newLayout(steps, width) {
  const { experts } = state.run;
  const longest = Math.max(4, ...experts.map((name) => name.length));
  const left = Math.min(MAX_LEFT, 26 + 7 * longest);
  const span = width - left - RIGHT;
  const x = (t) => left + (1 - t) * span;
  const bottom = ROWS_TOP + ROW * experts.length;
  return { steps, width, left, span, x, bottom };
}

const y = (p) => TOP + p * HEIGHT;
const text = (content, x, baseline, attributes = {}) => svg("text", { x, y: baseline, ...attributes }, content);
const vertical = (x, kind) => svg("line", { class: kind, x1: x, x2: x, y1: TOP, y2: layout.bottom });

function coloured(k, attributes) {
  const path = svg("path", attributes);
  path.style.color = expertColour(k);
  return path;
}

function axes() {
  const { left, x } = layout;
  const end = { "text-anchor": "end" };
  const labels = [text("1", left - 6, y(0) + 10, end), text("alpha", left - 6, y(0.5) + 4, end), text("0", left - 6, y(1), end)];
  const ticks = [[1, "noise, t = 1", "start"], [0.5, "0.5", "middle"], [0, "0, data", "end"]];
  for (const [t, label, anchor] of ticks) {
    labels.push(vertical(x(t), "rule"), text(label, x(t), y(1) + 16, { "text-anchor": anchor }));
  }
  return labels;
}

function bands(steps) {
  const { x } = layout;
  const ordered = [...steps].sort((a, b) => b.t - a.t); // some samplers evaluate an earlier time again
  const edges = ordered.map(({ alpha }) => cumulative(alpha));
  const held = holdsAlpha(state.run.settings);
  const point = (t, sum) => `${x(t).toFixed(1)} ${y(sum).toFixed(1)}`;
  const edge = (k) =>
    ordered.flatMap(({ t }, i) => {
      const before = held && i > 0 ? [point(t, edges[i - 1][k])] : [];
      return [...before, point(t, edges[i][k])];
    });
  return state.run.experts.map((_, k) => {
    const outline = [...edge(k), ...edge(k + 1).reverse()];
    return coloured(k, { class: "band", d: `M${outline.join("L")}Z` });
  });
}

/** 0, then the sum of the first value, of the first two, and so on. */
function cumulative(values) {
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  return sums;
}

/** The row of expert k: a swatch and its name, a mark for each of its steps, and how many they are. */
function row(name, k, steps) {
  const { x, left, span, width } = layout;
  const top = ROWS_TOP + ROW * k;
  const thickness = Math.max(1, Math.min(5, (0.6 * span) / state.run.steps));
  const used = steps.filter(({ chosen }) => chosen.includes(k));
  const mark = ({ t }) => `M${(x(t) - thickness / 2).toFixed(1)} ${top + 4}h${thickness}v${ROW - 8}h${-thickness}z`;
  const fitting = Math.floor((left - 24) / CHARACTER);
  const label = name.length > fitting ? `${name.slice(0, fitting - 1)}…` : name;
  return [
    coloured(k, { class: "marks", "data-expert": k, d: used.map(mark).join("") }),
    coloured(k, { d: `M0 ${top + 5}h10v10h-10z` }),
    text(label, 16, top + 14, { class: "expert" }),
    text(`${used.length}×`, width, top + 14, { "text-anchor": "end" }),
  ];
}

/** A line where an image that keeps its experts gets another. */
function switches(steps) {
  if (!keepsExperts(state.run.settings)) return [];
  const changes = steps.filter(({ chosen }, i) => i > 0 && chosen[0] !== steps[i - 1].chosen[0]);
  return changes.map(({ t }) => vertical(layout.x(t), "switch"));
}

function cursor(steps) {
  const { step } = state.run;
  if (step === null || step >= steps.length) return [];
  return [vertical(layout.x(steps[step].t), "cursor")];
}

function description(steps) {
  const { experts } = state.run;
  const last = steps.at(-1).alpha;
  const counts = experts.map((name, k) => `${name} ${steps.filter(({ chosen }) => chosen.includes(k)).length}`);
  const end = `${experts[indexOfLargest(last)]} has ${Math.max(...last).toFixed(2)} at the end`;
  return `Alpha over ${plural(steps.length, "step")}; ${end}. Steps per expert: ${counts.join(", ")}.`;
}

/** The step at a position in the chart, in pixels from its left edge; the number of steps is the finished image. */
export function stepAt(position) {
  if (!layout) return null;
  const { left, span, steps } = layout;
  const t = 1 - (position - left) / span;
  if (t < steps.at(-1).t / 2) return steps.length;
  const distances = steps.map((step) => Math.abs(step.t - t));
  return distances.indexOf(Math.min(...distances));
}
