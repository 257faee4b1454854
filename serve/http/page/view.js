// What is on display: one run, one selected image, one step. Also the playback of the steps.

import { $, setText } from "./dom.js";
import { paintDetail } from "./detail.js";
import { markSelected, paintTiles } from "./gallery.js";
import { updateAddressSoon } from "./link.js";
import { state } from "./state.js";

const PLAY_MS = 4000; // from noise to data

let frame = 0;

/** Paint at the next frame: steps arrive faster than frames. */
export function refreshSoon() {
  frame ||= requestAnimationFrame(refresh);
}

export function refresh() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!state.run) return;
  $("progress").value = state.run.stepsDone;
  paintSlider();
  paintTiles();
  paintDetail();
}

function paintSlider() {
  const { images, selected, step, steps } = state.run;
  const at = step ?? 0;
  const t = images[selected].steps[at]?.t.toFixed(2);
  $("at").value = at;
  $("at").setAttribute("aria-valuetext", at < steps ? `step ${at + 1} of ${steps}, t = ${t}` : "finished");
}

export function selectImage(index, { focus = false } = {}) {
  state.run.selected = index;
  markSelected(focus);
  refresh();
  updateAddressSoon();
}

/** Display a step, from 0; the number of steps stands for the finished images. */
export function showStep(step) {
  const { run } = state;
  run.step = Math.max(0, Math.min(step, run.steps));
  refresh();
  updateAddressSoon();
}

let playing = 0; // the handle of the next frame; 0 while paused

export function pause() {
  cancelAnimationFrame(playing);
  playing = 0;
  setText("play", "Play");
}

/** Play the steps from the one on display, or from the start if that is the end. */
export function togglePlay() {
  if (playing) pause();
  else play();
}

function play() {
  const { run } = state;
  const first = run.step >= run.steps ? 0 : run.step;
  const started = performance.now();
  setText("play", "Pause");
  const advance = (now) => {
    const step = first + Math.floor(((now - started) / PLAY_MS) * run.steps);
    if (step !== run.step) showStep(step);
    if (step >= run.steps) pause();
    else playing = requestAnimationFrame(advance);
  };
  playing = requestAnimationFrame(advance);
}
