// Small tools for the document.

export const $ = (id) => document.getElementById(id);
export const form = $("form");
export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");

const SVG = "http://www.w3.org/2000/svg";

export const element = (tag, attributes, ...children) => assemble(document.createElement(tag), attributes, children);
export const svg = (tag, attributes, ...children) => assemble(document.createElementNS(SVG, tag), attributes, children);

function assemble(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Set the text of an element. Equal text is left alone, so that a live region is not read out again. */
export function setText(id, text) {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
}

export function expertColour(k) {
  if (k < 16) return `var(--e${k})`;
  return `hsl(${(k * 137.5) % 360} 60% ${k % 2 ? 40 : 60}%)`;
}

/** Whether these settings keep an image's expert from step to step. */
export const keepsExperts = ({ policy }) => policy === "fixed" || policy === "switching";

/** Whether alpha is evaluated only where an image gets an expert, and held in between; a source that integrates is not. */
export const holdsAlpha = (settings) => keepsExperts(settings) && !["derivative", "combined"].includes(settings.source);

export const indexOfLargest = (values) => values.indexOf(Math.max(...values));
export const formatNumber = (n) => n.toLocaleString("en", { maximumFractionDigits: 1 });
export const plural = (n, noun) => `${formatNumber(n)} ${noun}${n === 1 ? "" : "s"}`;
export const imageNumber = ({ first }, index) => first + index + 1;
export const pngUrl = (b64) => `data:image/png;base64,${b64}`;
