// The address: a link to the samples on display, with the image and the step that are selected.

import { fillCondition } from "./condition.js";
import { fillForm, selectClusters, updateForm } from "./form.js";
import { state } from "./state.js";

const SHORT_VERSION = 12; // characters
const DELAY_MS = 200;

export const shortVersion = (version) => version.slice(0, SHORT_VERSION);

let timer = 0;

/** Make the address a link to what is on display. */
export function updateAddress() {
  clearTimeout(timer);
  history.replaceState(null, "", link());
}

/** The same after a short delay, for what changes many times per second: browsers limit the rate. */
export function updateAddressSoon() {
  clearTimeout(timer);
  timer = setTimeout(updateAddress, DELAY_MS);
}

function link() {
  const { run } = state;
  const several = state.names.length > 1;
  if (run.fromImage) { // which no link can hold
    return several ? `${location.pathname}?${new URLSearchParams({ model: state.model.id })}` : location.pathname;
  }
  const query = new URLSearchParams(run.settings);
  for (const name of run.clusters ?? []) query.append("clusters", name);
  query.set("version", shortVersion(run.version));
  if (several) query.set("model", state.model.id);
  if (run.selected > 0) query.set("image", run.selected);
  if (run.step !== null && run.step < run.steps) query.set("at", run.step);
  return `${location.pathname}?${query}`;
}

/** Fill the form from the address. Without a seed the address is not a link to samples. */
export function readAddress() {
  const query = new URLSearchParams(location.search);
  if (!query.has("seed")) return;
  state.link = Object.fromEntries(query);
  fillForm(settingsOf(state.link));
  fillCondition(query.get("condition") ?? "");
  if (query.has("clusters")) selectClusters(query.getAll("clusters"));
  updateForm();
}

function settingsOf({ clusters, condition, version, model, image, at, ...settings }) {
  return settings;
}
