// Files of the images on display.

import { downloadZip } from "./client-zip.js";
import { element } from "./dom.js";
import { state } from "./state.js";

/** By model, seed and the image's index in the API, which counts from 0. */
export function fileName(run, index) {
  return `${stem(run)}-${run.first + index}.png`;
}

const stem = ({ settings }) => `${state.model.id}-${settings.seed}`.replace(/[^\w.-]+/g, "-");

/** Save the finished images as PNGs in one ZIP file. */
export async function downloadAll() {
  const { run } = state;
  const files = run.images.map(({ final }, index) => ({ name: fileName(run, index), input: bytes(final) }));
  const url = URL.createObjectURL(await downloadZip(files).blob());
  element("a", { href: url, download: `${stem(run)}.zip` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // once the browser has read it
}

const bytes = (dataUrl) => Uint8Array.from(atob(dataUrl.split(",")[1]), (letter) => letter.charCodeAt(0));
