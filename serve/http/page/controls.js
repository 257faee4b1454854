// The user's input: buttons, slider, keys, and pointers.

import { stepAt } from "./chart.js";
import { paintDetail } from "./detail.js";
import { downloadAll } from "./download.js";
import { $, form, reducedMotion, setText } from "./dom.js";
import { updateForm } from "./form.js";
import { updateAddress } from "./link.js";
import { sample } from "./run.js";
import { state } from "./state.js";
import { listenToUploads } from "./upload.js";
import { pause, refreshSoon, selectImage, showStep, togglePlay } from "./view.js";

export function listen() {
  listenToForm();
  listenToTime();
  listenToGallery();
  listenToUploads();
  $("copy").addEventListener("click", copyLink);
  $("save").addEventListener("click", downloadAll);
  $("next").addEventListener("click", () => {
    const { n, first, settings } = state.run;
    form.seed.value = settings.seed;
    form.first_index.value = first + n;
    sampleForm();
  });
  $("numbers").addEventListener("toggle", () => state.run && paintDetail());
  addEventListener("resize", () => state.run && refreshSoon());
}

/** Sample what the form says now, instead of what a link asked for. */
export function sampleForm() {
  state.link = null;
  return sample();
}

function listenToForm() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sampleForm();
  });
  // While typing: a field that appears at the blur of another would move the button away from under the click.
  form.addEventListener("input", updateForm);
  $("new-seed").addEventListener("click", () => {
    form.first_index.value = "";
    form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
    sampleForm();
  });
  $("stop").addEventListener("click", () => state.request?.abort());
}

function listenToTime() {
  $("play").addEventListener("click", togglePlay);
  $("at").addEventListener("input", (event) => {
    pause();
    showStep(Number(event.target.value));
  });
  // The chart is replaced at every change, so its container listens.
  $("chart").addEventListener("pointerdown", seek);
  $("chart").addEventListener("pointermove", (event) => event.buttons && seek(event));
}

function seek({ clientX }) {
  const step = stepAt(clientX - $("chart").getBoundingClientRect().left);
  if (!state.run.done || step === null) return;
  pause();
  showStep(step);
}

function listenToGallery() {
  $("gallery").addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    selectImage(Number(tile.dataset.index), { focus: true });
    const isBelow = $("detail").offsetTop > $("gallery").offsetTop;
    if (isBelow) $("detail").scrollIntoView({ block: "nearest", behavior: reducedMotion.matches ? "auto" : "smooth" });
  });
  $("gallery").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
    const index = indexAfter(event.key);
    if (index === undefined) return;
    event.preventDefault();
    if (state.run.images[index]) selectImage(index, { focus: true });
  });
}

/** The index that a key leads to, which may be outside the gallery; undefined for other keys. */
function indexAfter(key) {
  const { selected } = state.run;
  const tiles = [...$("gallery").children];
  const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
  switch (key) {
    case "ArrowLeft": return selected - 1;
    case "ArrowRight": return selected + 1;
    case "ArrowUp": return selected - columns;
    case "ArrowDown": return selected + columns;
    case "Home": return 0;
    case "End": return tiles.length - 1;
  }
}

async function copyLink() {
  updateAddress();
  try {
    await navigator.clipboard.writeText(location.href);
    setText("copy", "Copied");
  } catch {
    setText("copy", "See address bar"); // over plain HTTP from another host there is no clipboard
  }
  setTimeout(() => setText("copy", "Copy link"), 2000);
}
