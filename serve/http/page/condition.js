// What the samples show: a class, or attributes that are wanted or not. Only for a model with a vocabulary.

import { $, element } from "./dom.js";
import { state } from "./state.js";

/** The controls, one per attribute or one for the class. They have no names: their text is one field of the API. */
export const conditionFields = () => [...document.querySelectorAll("#class:not([hidden]) select, #attributes:not([hidden]) select")];

export function setUpCondition({ vocabulary, defaults }) {
  if (!vocabulary) return;
  const isLabel = vocabulary.kind === "label";
  $(isLabel ? "class" : "attributes").hidden = false;
  if (isLabel) $("class").querySelector("select").append(...vocabulary.names.map((name) => new Option(name)));
  else $("attributes").querySelector("fieldset").append(...vocabulary.names.map(attribute));
  fillCondition(textOf(defaults.condition));
}

function attribute(name) {
  const plain = name.replaceAll("_", " ");
  const select = element("select", { "data-name": name, "aria-label": plain });
  select.append(new Option("any", ""), new Option("yes", "1"), new Option("no", "0"));
  return element("label", {}, plain, select);
}

/** The condition as text for a link: `frog`, or `Smiling=1,Male=0`; empty for none. */
export function conditionText() {
  if (state.model?.vocabulary?.kind !== "attributes") return conditionFields()[0]?.value ?? "";
  const chosen = conditionFields().filter((field) => field.value);
  return chosen.map((field) => `${field.dataset.name}=${field.value}`).join(",");
}

function textOf(condition) {
  const isLabel = state.model.vocabulary.kind === "label";
  return Object.entries(condition).map(([name, value]) => (isLabel ? name : `${name}=${value}`)).join(",");
}

export function fillCondition(text) {
  if (state.model.vocabulary?.kind === "attributes") {
    const chosen = Object.fromEntries(pairs(text));
    for (const field of conditionFields()) field.value = chosen[field.dataset.name] ?? "";
    $("attributes").open = text !== "";
  } else if (state.model.vocabulary) {
    const [field] = conditionFields();
    field.value = text;
    // As with other choices, the server explains what is wrong with one that it does not have.
    if (field.value !== text) field.append(new Option(text, text, true, true));
  }
}

const pairs = (text) => text.split(",").filter(Boolean).map((part) => part.split("="));

/** The condition for the body of a request. */
export function conditionBody(text) {
  if (state.model.vocabulary.kind === "label") return text;
  return Object.fromEntries(pairs(text).map(([name, value]) => [name, Number(value)]));
}
