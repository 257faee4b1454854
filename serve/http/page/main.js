// The entry of the page: load the model's description, then sample what the address asks for.
//
// The modules, each importing only earlier ones:
// state, dom, api | condition, form, link, gate, upload | chart, gallery, download, detail, view | run, controls.

import { fetchModel } from "./api.js";
import { listen, sampleForm } from "./controls.js";
import { $, form, plural, setText } from "./dom.js";
import { clearErrors, setUpForm } from "./form.js";
import { hideGate, listenForToken } from "./gate.js";
import { readAddress, shortVersion } from "./link.js";
import { report, sample } from "./run.js";
import { state } from "./state.js";

async function start() {
  try {
    clearErrors();
    const { model, names } = await fetchModel(new URLSearchParams(location.search).get("model"));
    Object.assign(state, { model, names });
    showModel(model);
    showOthers(names.filter((name) => name !== model.id));
    setUpForm(state.model);
    hideGate();
    form.hidden = false;
    $("empty").hidden = false;
    readAddress();
    if (state.link) await sample();
  } catch (error) {
    report(error);
  }
}

function showModel({ id, clusters, shape: [channels, height, width], version }) {
  document.title = `${id} · ddm`;
  const kind = `${width}×${height} ${channels === 1 ? "grayscale " : ""}images`;
  setText("model", `${id}: ${plural(clusters.length, "expert")}, ${kind}, version ${shortVersion(version)}`);
  document.documentElement.style.setProperty("--tile", width < 32 ? "5.5rem" : "7.5rem");
  $("large").style.aspectRatio = `${width} / ${height}`;
}

/** Links to the other models of this server. */
function showOthers(names) {
  $("models").replaceChildren(
    ...names.map((name) => {
      const link = document.createElement("a");
      link.href = `?${new URLSearchParams({ model: name })}`;
      link.textContent = name;
      return link;
    }),
  );
  $("models").hidden = names.length === 0;
}

listen();
listenForToken(() => (state.model ? sampleForm() : start()));
start();
