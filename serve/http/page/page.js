// The page for people: asks for images, hears of every step as it happens, and shows who moved what.
//
// In order: small tools, the server, the form, a run, its images, the one that is looked at, what hands do.

const $ = (id) => document.getElementById(id);
const form = $("form");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const PREVIEWS = 2000; // kept a run; beyond that not every step gets one
const PLAY_MS = 4000; // from noise to data

const WORDS = {
  full: "all experts at every step, weighted by alpha",
  top_k: "the k likeliest",
  nucleus: "as many of the likeliest as carry the mass p",
  fixed: "one expert, drawn at the start and kept",
  stochastic: "one expert a step, drawn from alpha",
  balanced: "one expert a step, with error feedback",
  adaptive: "one expert a step, and a second where alpha is undecided",
  prior: "alpha is the clusters' shares",
  posterior: "alpha comes from a network at every step",
  derivative: "alpha's time derivative, integrated along the path",
  combined: "alpha's derivative, integrated, with a pull towards the posterior net",
  analytic: "alpha is the exact posterior of the training set",
};
// Fields that mean something only beside others: those are hidden otherwise, and neither sent nor linked.
const MATTERS = {
  top_k: (v) => v.policy === "top_k",
  nucleus_p: (v) => v.policy === "nucleus",
  budget: (v) => v.policy === "adaptive",
  order: (v) => v.sampler === "unipc",
  relaxation_rate: (v) => v.source === "combined",
};

let card = null; // what /v1/models says of the model
let run = null; // what is shown
let drawing = null; // the AbortController of the request under way
let nearest = null; // which step a place in the chart belongs to, from its left edge in pixels
let linked = null; // what the address asked for, until it is drawn

// ---------------------------------------------------------------- tools

const SVG = new Set(["svg", "path", "line", "rect", "text", "g"]);

function node(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const colour = (k) => (k < 16 ? `var(--e${k})` : `hsl(${(k * 137.5) % 360} 60% ${k % 2 ? 40 : 60}%)`);
const png = (b64) => `data:image/png;base64,${b64}`;
const largest = (values) => values.indexOf(Math.max(...values));
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const say = (id, text) => $(id).textContent === text || ($(id).textContent = text); // the same twice is not news

// ---------------------------------------------------------------- the server

class Refused extends Error {
  constructor(message, { param = null, status = 0, wait = null } = {}) {
    super(wait ? `${message} (try again in ${wait} s)` : message);
    Object.assign(this, { param, status });
  }
}

async function ask(path, body, signal) {
  const token = sessionStorage.getItem("ddm-token");
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(body && { "Content-Type": "application/json" }) };
  let reply;
  try {
    reply = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(`the server cannot be reached: ${error.message}`);
  }
  if (reply.ok) return reply;
  const { error } = await reply.json().catch(() => ({ error: { message: `the server answered ${reply.status}` } }));
  throw new Refused(error.message, { param: error.param, status: reply.status, wait: reply.headers.get("retry-after") });
}

/** The server-sent events of a body, [name, data] each. An EventSource would do the same, but it cannot POST. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, name, data] = part.match(/^event: (\w+)\ndata: (.*)$/) ?? [];
      if (name) yield [name, JSON.parse(data)];
    }
  }
}

async function meet() {
  const { data } = await (await ask("v1/models")).json();
  card = data[0];
  const [channels, height, width] = card.shape;
  document.title = `${card.id} · ddm`;
  say("model", `${card.id}: ${counted(card.clusters.length, "expert")}, ${width}×${height} images${channels === 1 ? " in grey" : ""}, version ${card.version.slice(0, 12)}`);
  document.documentElement.style.setProperty("--tile", width < 32 ? "5.5rem" : "7.5rem");
  $("large").style.aspectRatio = `${width} / ${height}`;
  for (const [name, values] of Object.entries(card.choices)) form[name].append(...values.map((value) => new Option(value)));
  form.n.max = card.limits.n;
  form.steps.max = card.limits.steps;
  const { clusters, ...plain } = card.defaults;
  fill({ n: Math.min(12, card.limits.n), ...plain });
  $("clusters").append(...card.clusters.map((name) => {
    const box = node("input", { type: "checkbox", name: "clusters", value: name });
    box.checked = !Object.keys(clusters).length || clusters[name] > 0;
    return node("label", { class: "tick" }, box, name);
  }));
  $("gate").hidden = true;
  form.hidden = $("empty").hidden = false;
  follow();
}

// ---------------------------------------------------------------- the form

const boxes = () => [...form.querySelectorAll("[name=clusters]")];

/** What the fields say, in the API's names: text, but for what is ticked. */
function values() {
  const said = {};
  for (const field of form.elements) {
    if (!field.name || field.name === "clusters") continue;
    const label = field.closest("label");
    if (field.type === "checkbox") said[field.name] = String(field.checked);
    else if (!label?.hidden && (field.value || field.validity.badInput)) said[field.name] = field.value || "?";
  }
  return said;
}

function fill(given) {
  for (const [name, value] of Object.entries(given)) {
    const field = form[name];
    if (field.type === "checkbox") field.checked = String(value) === "true";
    else field.value = value;
    // A choice that this server does not have stays what it is: the server says what is wrong with it.
    if (field.tagName === "SELECT" && field.value !== String(value)) field.append(new Option(value, value, true, true));
  }
}

/** Show the fields that matter beside the others, and say what the choices mean. */
function follow() {
  const now = Object.fromEntries(["policy", "sampler", "source"].map((name) => [name, form[name].value]));
  for (const [name, matters] of Object.entries(MATTERS)) form[name].closest("label").hidden = !matters(now);
  say("hint", [now.policy, now.source].filter((name) => WORDS[name]).map((name) => `${name}: ${WORDS[name]}`).join(" · "));
}

/** The body of a request for what the fields say. */
function request() {
  const { seed, ...said } = values();
  const body = { stream: true, trace: true };
  for (const [name, value] of Object.entries(said)) {
    const number = form[name].type === "number" && value !== "?";
    body[name] = number ? Number(value) : form[name].type === "checkbox" ? value === "true" : value;
  }
  body.preview_every = Math.min(1000, Math.max(1, Math.ceil((body.n * body.steps) / PREVIEWS) || 1));
  const weights = card.defaults.clusters;
  if (Object.keys(weights).length || boxes().some((box) => !box.checked)) {
    body.clusters = Object.fromEntries(boxes().map(({ value, checked }) => [value, checked ? weights[value] || 1 : 0]));
  }
  // A seed has up to 63 bits and a number here 53, so its digits are put in as they are.
  const whole = /^-?\d+$/.test(seed ?? "");
  if (seed && !whole) body.seed = seed;
  return JSON.stringify(body).replace(/}$/, whole ? `,"seed":${BigInt(seed)}}` : "}");
}

/** The address of what is shown. */
function link() {
  const query = new URLSearchParams(run.asked);
  for (const name of run.clusters) query.append("clusters", name);
  query.set("version", run.version.slice(0, 12));
  if (run.selected) query.set("image", run.selected);
  if (run.at !== null && run.at < run.calls) query.set("at", run.at);
  return `${location.pathname}?${query}`;
}

let soon = 0;
function address() {
  clearTimeout(soon);
  history.replaceState(null, "", link());
}

/** Soon, for what changes many times a second: browsers refuse so many addresses. */
function addressSoon() {
  clearTimeout(soon);
  soon = setTimeout(address, 200);
}

function readLink() {
  const query = new URLSearchParams(location.search);
  if (!query.has("seed")) return;
  linked = Object.fromEntries(query);
  const { clusters, version, image, at, ...given } = linked;
  fill(Object.fromEntries(Object.entries(given).filter(([name]) => form.elements.namedItem(name)?.name)));
  if (clusters !== undefined) for (const box of boxes()) box.checked = query.getAll("clusters").includes(box.value);
  follow();
}

function complain(error) {
  if (error.status === 401) {
    const tried = sessionStorage.getItem("ddm-token");
    sessionStorage.removeItem("ddm-token");
    $("gate").hidden = false;
    $("token").value = "";
    $("token").focus();
    say("alert", tried ? "The server does not know this token." : "");
    say("note", "This server answers only those who have its token.");
    return;
  }
  say("alert", error.message);
  const name = error.param?.split(".")[0];
  const field = name === "clusters" ? boxes()[0] : name && form.elements[name];
  if (!field?.focus) return;
  if ($("more").contains(field)) $("more").open = true;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "alert");
  field.focus();
}

function forgive() {
  say("alert", "");
  say("note", "");
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  follow();
}

// ---------------------------------------------------------------- a run

async function draw() {
  drawing?.abort();
  const mine = (drawing = new AbortController());
  const before = run;
  forgive();
  $("stop").hidden = false;
  try {
    const began = performance.now();
    const asked = values();
    const reply = await ask("v1/samples", request(), mine.signal);
    for await (const [name, data] of events(reply.body)) {
      if (name === "start") begin(data, asked);
      else if (name === "step") step(data);
      else if (name === "image") run.images[data.index].final = png(data.b64_json);
      else if (name === "done") finish(data, (performance.now() - began) / 1000);
      else if (name === "error") throw new Refused(data.error.message, { param: data.error.param });
    }
    if (run === before || !run.done) throw new Refused("the answer ended before the images were done");
  } catch (error) {
    if (drawing !== mine) return; // another has taken its place
    if (run !== before && !run.done) settle(mine.signal.aborted ? "Stopped." : "Not finished.");
    if (!mine.signal.aborted) complain(error);
  } finally {
    mine.abort(); // whatever ended it, nobody reads on
    if (drawing === mine) {
      drawing = null;
      if (document.activeElement === $("stop")) $("draw").focus();
      $("stop").hidden = true;
    }
  }
}

function begin(start, asked) {
  const seed = asked.seed ?? String(start.seed); // a given one keeps all its digits
  form.seed.value = seed;
  const ticked = boxes().filter((box) => box.checked).map((box) => box.value);
  run = {
    ...start,
    asked: { ...{ seed }, ...asked, seed }, // the seed first, given or not: the same images have the same address
    clusters: ticked.length < boxes().length || Object.keys(card.defaults.clusters).length ? ticked : [],
    images: Array.from({ length: start.n }, () => ({ steps: [], final: null })),
    calls: start.nfe_per_image,
    heard: 0,
    selected: Math.min(Number(linked?.image) || 0, start.n - 1),
    at: null, // which call is shown; null is the newest
    done: false,
  };
  if (linked?.version && !start.version.startsWith(linked.version)) {
    say("note", `The link was made with version ${linked.version} of this model and ${start.version.slice(0, 12)} is served now, so these may be other images.`);
  }
  $("empty").hidden = true;
  $("shown").hidden = false;
  play(false);
  $("time").hidden = $("copy").hidden = true;
  $("progress").hidden = false;
  $("progress").max = start.n * run.calls;
  $("progress").value = 0;
  say("status", `Drawing ${counted(start.n, "image")} …`);
  say("holds", asked.policy === "fixed" ? "which was drawn at the start" : "which is the one with the largest alpha");
  hang();
  address();
}

function step({ index, t, alpha, chosen, b64_json }) {
  const { steps } = run.images[index];
  steps.push({ t, alpha, chosen, preview: b64_json ? png(b64_json) : (steps.at(-1)?.preview ?? null) });
  run.heard += 1;
  // A screen reader hears of quarters, not of steps.
  const quarter = Math.floor((4 * run.heard) / (run.n * run.calls));
  if (quarter > 0 && quarter < 4) say("status", `Drawing ${counted(run.n, "image")}: ${25 * quarter} % …`);
  if (!calm.matches) refresh();
  else $("progress").value = run.heard;
}

function finish({ calls, degraded }, took_s) {
  run.done = true;
  run.calls = run.images[0].steps.length; // some samplers save a call at the end
  $("at").max = run.calls;
  run.at = Math.min(linked?.at === undefined ? run.calls : Number(linked.at) || 0, run.calls);
  const all = run.n * run.calls * run.experts.length;
  const of = calls < all ? ` (all experts at every step: ${all.toLocaleString("en")})` : "";
  const without = degraded.length ? ` Done without ${degraded.join(", ")}.` : "";
  settle(`${counted(run.n, "image")} in ${took_s.toFixed(1)} s, seed ${run.asked.seed}: ${counted(calls, "expert call")}${of}.${without}`);
  $("time").hidden = $("copy").hidden = false;
  $("progress").hidden = true;
  linked = null;
  address();
}

function settle(text) {
  say("status", text);
  paint();
}

// ---------------------------------------------------------------- its images

/** What an image looks like at the time that is shown, and who holds it then. */
function look({ steps, final }) {
  const last = run.at === null || run.at >= run.calls;
  const seen = last ? steps.at(-1) : steps[run.at];
  if (!seen) return null;
  // An expert that was drawn once holds its image whatever alpha says.
  const holder = run.asked.policy === "fixed" ? seen.chosen[0] : largest(seen.alpha);
  return { ...seen, holder, source: last && final ? final : seen.preview, last: last && final !== null };
}

/** A path of one cell for each call that an expert was asked in. */
const cells = (steps, k) => steps.map(({ chosen }, i) => (chosen.includes(k) ? `M${i} ${k}h.85v.85h-.85z` : "")).join("");

function hang() {
  const { experts, calls, shape: [, height, width] } = run;
  const rows = experts.length;
  $("gallery").replaceChildren(...run.images.map((image, i) => {
    const img = node("img", { alt: "", hidden: "" });
    const none = node("div", { class: "none" });
    img.style.aspectRatio = none.style.aspectRatio = `${width} / ${height}`;
    const paths = experts.map((_, k) => {
      const path = node("path", { "data-expert": k });
      path.style.color = colour(k);
      return path;
    });
    const now = node("rect", { class: "now", y: 0, width: 1, height: rows, visibility: "hidden" });
    const strip = node("svg", { viewBox: `0 0 ${calls} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" }, ...paths, now);
    strip.style.height = `${Math.max(8, rows * (rows > 8 ? 3 : 4))}px`;
    const name = node("span", { class: "name" });
    const tile = node("div", { class: "tile", role: "option", "data-index": i }, img, none, strip, name);
    image.parts = { img, none, paths, now, strip, name, tile };
    return tile;
  }));
  choose(run.selected);
}

let frame = 0;
function refresh() {
  frame ||= requestAnimationFrame(paint); // steps come faster than frames
}

function paint() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!run) return;
  $("progress").value = run.heard;
  run.images.forEach((image, i) => paintTile(image, i));
  const at = run.at ?? 0;
  $("at").value = at;
  const t = run.images[run.selected].steps[at]?.t;
  $("at").setAttribute("aria-valuetext", at < run.calls ? `step ${at + 1} of ${run.calls}, t ${t?.toFixed(2)}` : "finished");
  paintDetail();
}

function paintTile(image, i) {
  const { img, none, paths, now, strip, name, tile } = image.parts;
  const seen = look(image);
  if (image.drawn !== image.steps.length) {
    paths.forEach((path, k) => path.setAttribute("d", cells(image.steps, k)));
    if (run.done) strip.setAttribute("viewBox", `0 0 ${run.calls} ${run.experts.length}`);
    image.drawn = image.steps.length;
  }
  const holder = seen ? run.experts[seen.holder] : "";
  tile.setAttribute("aria-label", `Image ${i + 1}${holder && `, ${holder}`}`);
  if (!seen) return;
  if (seen.source && img.getAttribute("src") !== seen.source) img.src = seen.source;
  img.hidden = !seen.source;
  none.hidden = !img.hidden;
  tile.style.color = colour(seen.holder);
  name.textContent = holder;
  now.setAttribute("x", run.at ?? 0);
  now.setAttribute("visibility", run.at === null || run.at >= run.calls ? "hidden" : "visible");
}

function choose(index, focus = false) {
  run.selected = index;
  run.images.forEach(({ parts: { tile } }, i) => {
    tile.setAttribute("aria-selected", String(i === index));
    tile.tabIndex = i === index ? 0 : -1;
  });
  if (focus) run.images[index].parts.tile.focus();
  paint();
  addressSoon();
}

function goTo(at) {
  run.at = Math.max(0, Math.min(at, run.calls));
  paint();
  addressSoon();
}

// ---------------------------------------------------------------- the one that is looked at

function paintDetail() {
  const { steps } = run.images[run.selected];
  const seen = look(run.images[run.selected]);
  say("which", `Image ${run.selected + 1}${seen ? `: ${run.experts[seen.holder]}` : ""}`);
  if (!seen) {
    $("large").removeAttribute("src");
    for (const id of ["when", "alphas", "chart"]) $(id).replaceChildren();
    return;
  }
  if (seen.source) $("large").src = seen.source;
  $("large").alt = `Image ${run.selected + 1}, enlarged`;
  $("large").style.color = colour(seen.holder);
  const call = run.at === null || run.at >= run.calls ? steps.length : run.at + 1;
  const moved = seen.chosen.map((k) => run.experts[k]).join(", ");
  const first = seen.last ? `Finished after ${counted(run.calls, "step")}` : `Step ${call} of ${run.calls}, t = ${seen.t.toFixed(2)}`;
  say("when", `${first}; ${seen.last ? "last " : ""}moved by ${seen.chosen.length === run.experts.length && run.experts.length > 1 ? "all" : moved}.`);
  const ranked = seen.alpha.map((p, k) => [p, k]).sort(([p], [q]) => q - p).slice(0, 3);
  $("alphas").replaceChildren(...ranked.flatMap(([p, k]) => {
    const term = node("dt", {}, run.experts[k]);
    term.style.setProperty("--expert", colour(k));
    return [term, node("dd", {}, p.toFixed(2))];
  }));
  $("chart").replaceChildren(chart(steps, $("chart").clientWidth || 320));
  if ($("numbers").open) tabulate(steps);
}

/** Alpha over t as bands, and under it an expert a row: its name, a mark where it moved the image, how often it did. */
function chart(steps, width) {
  const { experts } = run;
  const [left, right, top, high, row] = [Math.min(124, 26 + 7 * Math.max(...experts.map((name) => name.length), 4)), 34, 6, 150, 20];
  const span = width - left - right;
  const x = (t) => left + (1 - t) * span;
  const y = (p) => top + p * high;
  const under = top + high + 30;
  const made = node("svg", { viewBox: `0 0 ${width} ${under + row * experts.length + 4}`, role: "img" });
  // Some samplers look back to an earlier time: the bands are drawn in the order of t.
  const ordered = [...steps].sort((a, b) => b.t - a.t);
  const sums = ordered.map(({ alpha }) => alpha.reduce((all, p) => [...all, all.at(-1) + p], [0]));
  const text = (content, at, base, more = {}) => node("text", { x: at, y: base, ...more }, content);
  made.append(text("1", left - 6, top + 10, { "text-anchor": "end" }), text("alpha", left - 6, y(0.5) + 4, { "text-anchor": "end" }),
    text("0", left - 6, y(1), { "text-anchor": "end" }));
  for (const [t, label, anchor] of [[1, "noise, t = 1", "start"], [0.5, "0.5", "middle"], [0, "0, data", "end"]]) {
    made.append(node("line", { class: "rule", x1: x(t), x2: x(t), y1: top, y2: under + row * experts.length }),
      text(label, x(t), top + high + 16, { "text-anchor": anchor }));
  }
  const thick = Math.max(1, Math.min(5, (0.6 * span) / steps.length));
  experts.forEach((name, k) => {
    const point = (edge) => (_, i) => `${x(ordered[i].t).toFixed(1)} ${y(sums[i][k + edge]).toFixed(1)}`;
    const outline = [...ordered.map(point(0)), ...ordered.map(point(1)).reverse()];
    const band = node("path", { class: "band", d: `M${outline.join("L")}Z` });
    const base = under + row * k;
    const moves = steps.filter(({ chosen }) => chosen.includes(k));
    const marks = node("path", { class: "moves", "data-expert": k,
      d: moves.map(({ t }) => `M${(x(t) - thick / 2).toFixed(1)} ${base + 4}h${thick}v${row - 8}h${-thick}z`).join("") });
    const swatch = node("path", { d: `M0 ${base + 5}h10v10h-10z` });
    for (const part of [band, marks, swatch]) part.style.color = colour(k);
    const fits = Math.floor((left - 24) / 6.5);
    const short = name.length > fits ? `${name.slice(0, fits - 1)}…` : name;
    made.append(band, marks, swatch, text(short, 16, base + 14, { class: "who" }),
      text(`${moves.length}×`, width, base + 14, { "text-anchor": "end" }));
  });
  if (run.at !== null && run.at < steps.length) {
    const now = x(steps[run.at].t);
    made.append(node("line", { class: "now", x1: now, x2: now, y1: top, y2: under + row * experts.length }));
  }
  const counts = experts.map((name, k) => `${name} ${steps.filter(({ chosen }) => chosen.includes(k)).length}`).join(", ");
  const end = steps.at(-1).alpha;
  made.setAttribute("aria-label", `Alpha over ${counted(steps.length, "step")}; at the end ${experts[largest(end)]} has ${Math.max(...end).toFixed(2)}. Moves: ${counts}.`);
  nearest = (place) => {
    const t = 1 - (place - left) / span;
    const far = steps.map((taken) => Math.abs(taken.t - t));
    return t < steps.at(-1).t / 2 ? steps.length : far.indexOf(Math.min(...far));
  };
  return made;
}

function tabulate(steps) {
  const head = ["step", "t", "moved by", ...run.experts].map((name) => node("th", { scope: "col" }, name));
  const rows = steps.map(({ t, alpha, chosen }, i) => [i + 1, t.toFixed(3), chosen.map((k) => run.experts[k]).join(", "), ...alpha.map((p) => p.toFixed(3))]);
  $("numbers").lastElementChild.replaceChildren(node("table", {}, node("tr", {}, ...head),
    ...rows.map((row) => node("tr", {}, ...row.map((value) => node("td", {}, value))))));
}

// ---------------------------------------------------------------- what hands do

function play(go = $("play").textContent === "Play") {
  cancelAnimationFrame(play.frame);
  say("play", go ? "Pause" : "Play");
  if (!go) return;
  const from = run.at >= run.calls ? 0 : run.at;
  const began = performance.now();
  const turn = (now) => {
    const at = from + Math.floor(((now - began) / PLAY_MS) * run.calls);
    if (at !== run.at) goTo(at);
    if (at < run.calls) play.frame = requestAnimationFrame(turn);
    else say("play", "Play");
  };
  play.frame = requestAnimationFrame(turn);
}

function drawAnew() {
  linked = null;
  draw();
}

/** Go to the step at which the chart is touched; its SVG is a new one each time, so this listens around it. */
function seek({ clientX }) {
  if (run.done && nearest) goTo(nearest(clientX - $("chart").getBoundingClientRect().left));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  drawAnew();
});
form.addEventListener("change", follow);
$("another").addEventListener("click", () => {
  form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
  drawAnew();
});
$("stop").addEventListener("click", () => drawing?.abort());
$("play").addEventListener("click", () => play());
$("at").addEventListener("input", (event) => {
  play(false);
  goTo(Number(event.target.value));
});
$("chart").addEventListener("pointerdown", seek);
$("chart").addEventListener("pointermove", (event) => event.buttons && seek(event));
$("copy").addEventListener("click", async () => {
  address();
  try {
    await navigator.clipboard.writeText(location.href);
    say("copy", "Copied");
  } catch {
    say("copy", "It is the address"); // no clipboard where the page came over plain HTTP: the address bar has the link
  }
  setTimeout(() => say("copy", "Copy link"), 2000);
});
$("numbers").addEventListener("toggle", () => run && paintDetail());
$("gallery").addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (!tile) return;
  choose(Number(tile.dataset.index), true);
  const narrow = $("detail").offsetTop > $("gallery").offsetTop;
  if (narrow) $("detail").scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
});
$("gallery").addEventListener("keydown", (event) => {
  const tiles = [...$("gallery").children];
  const columns = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
  const to = { ArrowLeft: run.selected - 1, ArrowRight: run.selected + 1, ArrowUp: run.selected - columns,
    ArrowDown: run.selected + columns, Home: 0, End: tiles.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (tiles[to]) choose(to, true);
});
$("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("ddm-token", $("token").value);
  $("gate").hidden = true;
  if (card) drawAnew();
  else arrive();
});
addEventListener("resize", () => run && refresh());

async function arrive() {
  try {
    forgive();
    await meet();
    readLink();
    if (linked) await draw();
  } catch (error) {
    complain(error);
  }
}
arrive();
