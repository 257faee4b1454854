// The selected image: enlarged, with its experts, the chart of alpha, and the same as a table.

import { chart } from "./chart.js";
import { $, element, expertColour, imageNumber, plural, setText } from "./dom.js";
import { fileName } from "./download.js";
import { appearance } from "./gallery.js";
import { state } from "./state.js";

const MOST_LIKELY = 3; // experts in the list
const DEFAULT_WIDTH = 320; // of a chart that is not laid out yet, pixels

export function paintDetail() {
  const { run } = state;
  const image = run.images[run.selected];
  const now = appearance(image);
  const number = `Image ${imageNumber(run, run.selected)}`;
  setText("which", now ? `${number}: ${run.experts[now.expert]}` : number);
  if (!now) {
    clearDetail();
    return;
  }
  if (now.source) $("large").src = now.source;
  else $("large").removeAttribute("src");
  offerDownload(image);
  $("large").alt = `${number}, enlarged`;
  $("large").style.color = expertColour(now.expert);
  setText("when", when(now, image));
  $("alphas").replaceChildren(...mostLikely(now.alpha));
  $("chart").replaceChildren(chart(image.steps, $("chart").clientWidth || DEFAULT_WIDTH));
  if ($("numbers").open) paintTable(image.steps);
}

function offerDownload({ final }) {
  $("download").hidden = final === null;
  if (final === null) return;
  $("download").href = final;
  $("download").download = fileName(state.run, state.run.selected);
}

function clearDetail() {
  $("download").hidden = true;
  $("large").removeAttribute("src");
  for (const id of ["when", "alphas", "chart"]) $(id).replaceChildren();
}

function when({ chosen, finished, t }, { steps }) {
  const { run } = state;
  const names = expertNames(chosen);
  if (finished) return `Finished after ${plural(run.steps, "step")}.\nLast denoised by ${names}.`;
  const step = run.step === null || run.step >= run.steps ? steps.length : run.step + 1;
  return `Step ${step} of ${run.steps}, t = ${t.toFixed(2)}.\nDenoised by ${names}.`;
}

function expertNames(chosen) {
  const { experts } = state.run;
  if (chosen.length === 0) return "unknown experts";
  if (chosen.length === experts.length && chosen.length > 1) return "all experts";
  return chosen.map((k) => experts[k]).join(", ");
}

function mostLikely(alpha) {
  const ranked = alpha.map((p, k) => ({ p, k })).sort((one, other) => other.p - one.p);
  return ranked.slice(0, MOST_LIKELY).flatMap(({ p, k }) => {
    const name = element("dt", {}, state.run.experts[k]);
    name.style.setProperty("--expert", expertColour(k));
    return [name, element("dd", {}, p.toFixed(2))];
  });
}

function paintTable(steps) {
  const { experts } = state.run;
  const head = ["step", "t", "denoised by", ...experts].map((name) => element("th", { scope: "col" }, name));
  const rows = steps.map(({ t, alpha, chosen }, i) => {
    const values = [i + 1, t.toFixed(3), expertNames(chosen), ...alpha.map((p) => p.toFixed(3))];
    return element("tr", {}, ...values.map((value) => element("td", {}, value)));
  });
  $("table").replaceChildren(element("table", {}, element("tr", {}, ...head), ...rows));
}
