// One run: the request, its events as they arrive, and the samples that they describe.

import { ApiError, streamSamples } from "./api.js";
import { $, form, formatNumber, keepsExperts, plural, pngUrl, reducedMotion, setText } from "./dom.js";
import { clearErrors, formValues, requestBody, selectedClusters, showError } from "./form.js";
import { showGate } from "./gate.js";
import { buildGallery } from "./gallery.js";
import { shortVersion, updateAddress } from "./link.js";
import { state } from "./state.js";
import { pause, refresh, refreshSoon, selectImage } from "./view.js";

/** Sample what the form describes. A request in progress is cancelled. */
export async function sample() {
  state.request?.abort();
  const request = new AbortController();
  state.request = request;
  const previous = state.run;
  clearErrors();
  $("stop").hidden = false;
  try {
    await readEvents(request.signal);
    if (state.run === previous || !state.run.done) {
      throw new ApiError("the response ended before the images were finished");
    }
  } catch (error) {
    if (state.request !== request) return; // a newer request has replaced this one
    const isPartial = state.run && !state.run.done; // also an earlier one, which this request has ended
    if (isPartial) endRun(request.signal.aborted ? "Stopped." : "Not finished.");
    if (!request.signal.aborted) report(error);
  } finally {
    request.abort(); // closes the stream if an error has left it open
    if (state.request === request) hideStop();
  }
}

async function readEvents(signal) {
  const started = performance.now();
  const asked = { settings: formValues(), clusters: selectedClusters(), fromImage: state.image !== null };
  for await (const [name, data] of streamSamples(requestBody(), signal)) {
    if (name === "start") startRun(data, asked);
    else if (name === "step") addStep(data);
    else if (name === "image") imageOf(data).final = pngUrl(data.b64_json);
    else if (name === "done") finishRun(data, (performance.now() - started) / 1000);
    else if (name === "error") throw new ApiError(data.error.message, { param: data.error.param });
  }
}

/** The server counts from the first image of the seed. */
const imageOf = ({ index }) => state.run.images[index - state.run.first];

function hideStop() {
  state.request = null;
  if (document.activeElement === $("stop")) $("sample").focus();
  $("stop").hidden = true;
}

export function report(error) {
  if (error.status === 401) showGate();
  else showError(error);
}

function newRun(start, { settings, clusters, fromImage }) {
  const seed = settings.seed ?? String(start.seed); // text, because a seed has more digits than a number here
  return {
    n: start.n,
    first: start.first_index,
    experts: start.experts,
    shape: start.shape,
    version: start.version,
    steps: start.steps,
    // The seed comes first whether it was given or not, for one link per run; n is what the server took.
    settings: { seed, ...settings, n: String(start.n) },
    clusters,
    fromImage,
    images: Array.from({ length: start.n }, () => ({ steps: [], evaluations: 0, final: null })),
    stepsDone: 0, // over all images
    selected: toIndex(state.link?.image ?? 0, start.n - 1),
    step: null, // the step on display, from 0; `steps` is the finished image, null the newest step
    done: false,
  };
}

function startRun(start, asked) {
  const { settings } = asked;
  state.run = newRun(start, asked);
  form.seed.value = state.run.settings.seed;
  const linked = state.link?.version;
  if (linked && !start.version.startsWith(linked)) {
    const served = shortVersion(start.version);
    const warning = `This link was made with version ${linked} of the model. The server has version ${served}`;
    setText("note", `${warning}, so the images may differ.`);
  }
  $("empty").hidden = true;
  $("results").hidden = false;
  pause();
  $("time").hidden = true;
  if ($("actions").contains(document.activeElement)) $("stop").focus(); // a hidden button loses the focus
  $("actions").hidden = true;
  $("progress").hidden = false;
  $("progress").max = start.n * start.steps;
  $("progress").value = 0;
  setText("status", `Sampling ${plural(start.n, "image")} …`);
  setText("labelled", keepsExperts(settings) ? "the expert that moves it" : "the most likely expert (largest alpha)");
  buildGallery();
  selectImage(state.run.selected);
  updateAddress();
}

/** A number from a link as an integer in [0, largest]. */
function toIndex(text, largest) {
  const index = Math.trunc(Number(text)) || 0;
  return Math.max(0, Math.min(index, largest));
}

/**
 * Add an evaluation to its image. A step may have several; the first has the step's time, alpha and experts.
 * The server skips steps for a reader that is too slow: a skipped step looks like the next one, without experts.
 */
function addStep({ index, step, call, t, alpha, chosen, b64_json: preview }) {
  const { run } = state;
  const image = imageOf({ index });
  const { steps } = image;
  image.evaluations = call;
  while (steps.length < step) {
    const skipped = steps.length < step - 1;
    steps.push({ t, alpha, chosen: skipped ? [] : chosen, preview: steps.at(-1)?.preview ?? null });
    run.stepsDone += 1;
  }
  if (preview) steps.at(-1).preview = pngUrl(preview); // a slow reader may have missed steps
  announceQuarters();
  if (reducedMotion.matches) $("progress").value = run.stepsDone;
  else refreshSoon();
}

/** A screen reader reads every change of the status, so it changes only at each quarter. */
function announceQuarters() {
  const { run } = state;
  const quarter = Math.floor((4 * run.stepsDone) / (run.n * run.steps));
  if (quarter > 0 && quarter < 4) setText("status", `Sampling ${plural(run.n, "image")}: ${25 * quarter} % …`);
}

function finishRun({ nfe, degraded }, duration_s) {
  const { run, link } = state;
  run.done = true;
  $("at").max = run.steps;
  run.step = toIndex(link?.at ?? run.steps, run.steps);
  state.link = null;
  endRun(summary(nfe / run.n, degraded, duration_s));
  $("time").hidden = false;
  $("actions").hidden = false;
  $("copy").hidden = run.fromImage; // which no link can hold
  $("progress").hidden = true;
  updateAddress();
}

function summary(nfePerImage, unavailable, duration_s) {
  const { n, steps, settings, images, experts } = state.run;
  const what = `${plural(n, "image")} in ${duration_s.toFixed(1)} s, seed ${settings.seed}`;
  const evaluations = images.reduce((sum, image) => sum + image.evaluations, 0); // some samplers need several per step
  const nfeOfAll = (evaluations * experts.length) / n;
  // With guidance some calls count more than once.
  const isGuided = ["guidance", "autoguidance"].some((name) => Number(settings[name] ?? 1) !== 1);
  const compared = !isGuided && nfePerImage < nfeOfAll ? ` (all experts: ${formatNumber(nfeOfAll)})` : "";
  const cost = `${plural(steps, "step")}, ${formatNumber(nfePerImage)} NFE per image${compared}`;
  const without = unavailable.length ? ` Unavailable experts: ${unavailable.join(", ")}.` : "";
  return `${what}: ${cost}.${without}`;
}

function endRun(text) {
  setText("status", text);
  refresh();
}
