// The image that samples start from: chosen or dropped, cut to its middle and scaled to the model's size.

import { ApiError } from "./api.js";
import { $, element } from "./dom.js";
import { clearErrors, showError, updateForm } from "./form.js";
import { state } from "./state.js";

export function listenToUploads() {
  $("image").addEventListener("change", () => $("image").files[0] && take($("image").files[0]));
  $("remove").addEventListener("click", () => {
    show(null);
    $("image").focus();
  });
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // says that a drop is welcome
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => !event.relatedTarget && document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (!file) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (state.model) take(file);
  });
}

async function take(file) {
  clearErrors();
  const image = await createImageBitmap(file).catch(() => null);
  show(image && scaled(image));
  if (!image) {
    showError(new ApiError(`${file.name} is not an image that this browser can read`, { param: "image" }));
  }
}

/** A data URL of a PNG with the pixels of the model; transparent ones stay transparent. */
function scaled(image) {
  const [, height, width] = state.model.shape;
  const scale = Math.max(width / image.width, height / image.height);
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const size = [image.width * scale, image.height * scale];
  context.drawImage(image, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
  return canvas.toDataURL("image/png");
}

function show(url) {
  state.image = url;
  $("given").hidden = $("remove").hidden = url === null;
  $("image").hidden = url !== null;
  if (url) $("given").src = url;
  else $("image").value = "";
  updateForm();
}
