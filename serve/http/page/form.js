// The form: its fields have the names of the API, and the server provides the choices, limits and defaults.

import { conditionBody, conditionFields, conditionText, setUpCondition } from "./condition.js";
import { $, element, form, setText } from "./dom.js";
import { state } from "./state.js";

const MAX_PREVIEWS = 2000; // per run; longer runs get a preview every few steps
const DEFAULT_IMAGES = 12;

const EXPLANATIONS = {
  full: "all experts at every step, weighted by alpha",
  top_k: "the k most likely experts",
  nucleus: "the most likely experts that together reach probability p",
  fixed: "one expert, sampled at the start and kept",
  stochastic: "one expert per step, sampled from alpha",
  balanced: "one expert per step, sampled with error feedback",
  switching: "one expert at a time, sampled again from alpha at random times",
  adaptive: "one expert per step, and a second one where alpha is undecided",
  prior: "alpha is the mixture weights",
  posterior: "alpha is predicted by the posterior net",
  derivative: "alpha is integrated from its predicted time derivative",
  combined: "alpha is integrated from its time derivative and relaxed to the posterior net",
  gaussian: "alpha is the posterior of one Gaussian per cluster",
  analytic: "alpha is the exact posterior of the training set",
};

// Fields that only some choices use. While unused they are hidden, and neither sent nor part of the link.
const USED = {
  top_k: ({ policy }) => policy === "top_k",
  nucleus_p: ({ policy }) => policy === "nucleus",
  budget: ({ policy }) => policy === "adaptive",
  order: ({ sampler }) => ["unipc", "ipndm"].includes(sampler),
  relaxation_rate: ({ source }) => source === "combined",
  switch_rate: ({ policy }) => policy === "switching",
  control_variate: ({ policy }) => !["switching", "fixed"].includes(policy), // which follow an expert's own path
  guidance: ({ condition }) => condition !== "",
  autoguidance: () => Boolean(state.model?.seeded),
  guidance_interval: ({ condition, guidance, autoguidance }) =>
    (condition !== "" && guidance !== 1) || (Boolean(state.model?.seeded) && autoguidance !== 1),
  strength: ({ image }) => image !== null,
};

const clusterBoxes = () => [...form.querySelectorAll("[name=clusters]")];

/** Fill the form with the choices, limits and defaults of the model. */
export function setUpForm(model) {
  for (const [name, choices] of Object.entries(model.choices)) {
    form[name].append(...choices.map((choice) => new Option(choice)));
  }
  form.n.max = model.limits.n;
  form.steps.max = model.limits.steps;
  const { clusters: weights, ...defaults } = model.defaults;
  fillForm({ n: Math.min(DEFAULT_IMAGES, model.limits.n), ...defaults });
  $("clusters").append(...model.clusters.map((name) => clusterBox(name, weights)));
  setUpCondition(model);
  updateForm();
}

function clusterBox(name, weights) {
  const box = element("input", { type: "checkbox", name: "clusters", value: name });
  box.checked = Object.keys(weights).length === 0 || weights[name] > 0;
  return element("label", { class: "tick" }, box, name);
}

export function fillForm(values) {
  for (const [name, value] of Object.entries(values)) {
    const field = form.elements.namedItem(name);
    if (!field?.name) continue; // not a field of this form
    if (field.type === "checkbox") field.checked = String(value) === "true";
    else field.value = value;
    // A choice that this server does not have is kept: the server explains what is wrong with it.
    const unknown = field.tagName === "SELECT" && field.value !== String(value);
    if (unknown) field.append(new Option(value, value, true, true));
  }
}

export function selectClusters(names) {
  for (const box of clusterBoxes()) box.checked = names.includes(box.value);
}

/** The names of the selected clusters, or null if a request does not need to say them. */
export function selectedClusters() {
  const boxes = clusterBoxes();
  const selected = boxes.filter((box) => box.checked);
  const hasWeights = Object.keys(state.model.defaults.clusters).length > 0;
  if (selected.length === boxes.length && !hasWeights) return null;
  return selected.map((box) => box.value);
}

/** Show the fields that the choices use, and explain the choices. */
export function updateForm() {
  const choices = {
    policy: form.policy.value,
    sampler: form.sampler.value,
    source: form.source.value,
    condition: conditionText(),
    image: state.image,
    guidance: Number(form.guidance.value),
    autoguidance: Number(form.autoguidance.value),
  };
  for (const [name, isUsed] of Object.entries(USED)) form[name].closest("label").hidden = !isUsed(choices);
  const explained = [choices.policy, choices.source].filter((name) => EXPLANATIONS[name]);
  setText("hint", explained.map((name) => `${name}: ${EXPLANATIONS[name]}`).join(" · "));
}

/** The values of the fields as text, under the names of the API, without the clusters. */
export function formValues() {
  const values = {};
  for (const field of form.elements) {
    if (!field.name || ["clusters", "image"].includes(field.name) || field.closest("label")?.hidden) continue;
    if (field.type === "checkbox") values[field.name] = String(field.checked);
    else if (field.validity.badInput) values[field.name] = "?"; // browsers hide text that is not a number
    else if (field.value) values[field.name] = field.value;
  }
  if (conditionText()) values.condition = conditionText();
  const interval = form.guidance_interval;
  const isCleared = !interval.value && !interval.closest("label").hidden && state.model.defaults.guidance_interval;
  if (isCleared) values.guidance_interval = interval.placeholder; // all times, whatever the default
  return values;
}

/** The JSON body of a request for the samples that the form describes. */
export function requestBody() {
  const { seed, condition, ...values } = formValues();
  const body = { model: state.model.id, stream: true, trace: true };
  for (const [name, text] of Object.entries(values)) body[name] = parsed(form[name], text);
  const steps = body.n * body.steps || 0;
  body.preview_every = Math.min(1000, Math.max(1, Math.ceil(steps / MAX_PREVIEWS)));
  if (selectedClusters()) body.clusters = clusterWeights();
  if (state.image) body.image = state.image.split(",")[1];
  if (condition) body.condition = conditionBody(condition);
  else if (Object.keys(state.model.defaults.condition).length > 0) body.condition = {}; // none, whatever the default
  return withSeed(body, seed);
}

function parsed(field, text) {
  if (field.type === "checkbox") return text === "true";
  if (field.name === "guidance_interval") {
    const times = text.split(",").map(parseFloat);
    return times.some(Number.isNaN) ? text : times; // the server says what is wrong with the text
  }
  return field.type === "number" && text !== "?" ? Number(text) : text;
}

function clusterWeights() {
  const weights = state.model.defaults.clusters;
  return Object.fromEntries(clusterBoxes().map(({ value, checked }) => [value, checked ? weights[value] || 1 : 0]));
}

/** A seed has up to 63 bits and a JavaScript number only 53, so its digits are inserted into the JSON as they are. */
function withSeed(body, seed) {
  if (!seed) return JSON.stringify(body);
  const isWhole = /^-?\d+$/.test(seed);
  if (!isWhole) return JSON.stringify({ ...body, seed });
  return JSON.stringify(body).replace(/}$/, `,"seed":${BigInt(seed)}}`);
}

/** Show an error where it is seen, and put the focus on the field at fault. */
export function showError(error) {
  setText("alert", error.message);
  const name = error.param?.split(".")[0];
  const groups = { clusters: clusterBoxes, condition: conditionFields };
  const field = groups[name] ? groups[name]()[0] : name && form.elements[name];
  if (field?.focus) markField(field);
  $("alert").scrollIntoView({ block: "nearest" }); // it may be far below the field
}

function markField(field) {
  const details = field.closest("details");
  if (details) details.open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", ["alert", ...descriptions(field)].join(" "));
  field.focus();
  field.scrollIntoView({ block: "nearest" }); // also where it had the focus before
}

const descriptions = (field) => (field.getAttribute("aria-describedby") ?? "").split(" ").filter((id) => id !== "alert");

export function clearErrors() {
  setText("alert", "");
  setText("note", "");
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.setAttribute("aria-describedby", descriptions(field).join(" "));
  }
  updateForm();
}
