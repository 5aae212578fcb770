// The page: what the form says is drawn, while one types where the model is fast enough.

import { askJson, draw } from "./api.js";
import * as editor from "./editor.js";
import * as gallery from "./gallery.js";

const $ = (id) => document.getElementById(id);
const PAUSE = 90; // ms without a key before a picture is drawn
const FAST = 1.5; // seconds a picture may take to be drawn while one types
const own = ["steps", "guidance", "width", "height"];
const state = { models: [], words: [], drawing: null, seconds: 0, slow: 0, picture: null };

const mode = () => document.querySelector("[name=mode]:checked").value;
const variant = () => document.querySelector("[name=variant]:checked")?.value ?? null;
const model = () => state.models.find((m) => m.id === $("model").value);
const number = (id) => ($(id).value === "" ? null : Number($(id).value));
const side = (id) => number(id) ?? Number($(id).placeholder);

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// ---- the form

function fields(keep) {
  return {
    prompt: $("prompt").value.trim(),
    model: $("model").value,
    variant: variant(),
    seed: number("seed"),
    n: mode() === "draw" ? number("count") ?? 1 : 1,
    steps: number("steps"),
    guidance: number("guidance"),
    size: number("width") || number("height") ? `${side("width")}x${side("height")}` : "auto",
    negative: $("negative").value.trim() || null,
    partial_images: state.seconds > FAST ? 20 : 0,
    keep,
  };
}

function chooseModel() {
  const { variants, variant: wide, settings } = model();
  $("variants").replaceChildren(...variants.map((name) => {
    const label = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), {
      type: "radio", name: "variant", value: name, checked: name === wide,
    });
    const span = Object.assign(document.createElement("span"), { textContent: name });
    radio.addEventListener("change", redraw);
    label.append(radio, span);
    return label;
  }));
  for (const name of own) {
    $(name).value = "";
    $(name).placeholder = settings[name];
  }
  document.querySelector("[name=mode][value=compare]").disabled = variants.length < 2;
  loadWords();
}

async function loadWords() {
  const { words } = await askJson(`/words?model=${encodeURIComponent($("model").value)}`);
  state.words = words;
  suggest();
}

function suggest() {
  const text = $("prompt").value;
  const start = text.slice(0, $("prompt").selectionStart).match(/[\p{L}\d-]*$/u)[0].toLowerCase();
  const fits = start.length < 2 ? [] : state.words
    .filter((w) => w !== start && (w.startsWith(start) || w.includes(` ${start}`)))
    .sort((a, b) => b.startsWith(start) - a.startsWith(start)).slice(0, 6);
  $("suggestions").replaceChildren(...fits.map((word) => {
    const chip = Object.assign(document.createElement("button"), {
      type: "button", textContent: word,
    });
    chip.addEventListener("click", () => {
      const end = $("prompt").selectionStart;
      $("prompt").setRangeText(word, end - start.length, end, "end");
      $("prompt").focus();
      suggest();
      redraw();
    });
    return chip;
  }));
}

// Fill in the form; returns what of the settings it cannot hold.
function apply(settings) {
  $("prompt").value = settings.prompt;
  const radio = [...document.querySelectorAll("[name=variant]")]
    .find((r) => r.value === settings.variant);
  if (radio) radio.checked = true;
  for (const name of [...own, "seed"]) $(name).value = settings[name] ?? "";
  $("negative").value = settings.negative ?? "";
  $("count").value = 1;
  if (settings.vary) {
    const [seed, amount] = settings.vary.split(":");
    $("blend-b").value = seed;
    $("blend-amount").value = 100 * amount;
  }
  setMode(settings.vary ? "blend" : "draw");
  if (settings.image) return "It was made from another picture, and this is drawn from words alone.";
  return radio ? "" : `It was drawn at ${settings.variant}, and this at ${variant()}.`;
}

async function again(settings) {
  const note = apply(settings);
  clearTimeout(timer);
  await run(false);
  const status = $("status");
  if (note && !status.classList.contains("error")) say(`${status.textContent}. Note: ${note}`);
}

// ---- the pictures

function figure() {
  const f = document.createElement("figure");
  const image = Object.assign(document.createElement("img"), { alt: "", className: "checkered" });
  image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";
  f.append(image, document.createElement("figcaption"));
  return f;
}

// Reuse what is there, so that a redrawn picture replaces the old one without a flash.
function frames(n) {
  const box = $("pictures");
  while (box.children.length > n) box.lastChild.remove();
  while (box.children.length < n) box.append(figure());
  return [...box.children];
}

function caption(frame, name, more = "") {
  const strong = Object.assign(document.createElement("strong"), { textContent: name });
  frame.lastChild.replaceChildren(strong, ` ${more}`);
}

function show(frame, event, isDraft = false) {
  frame.classList.toggle("draft", isDraft);
  frame.firstChild.src = `data:image/${event.output_format};base64,${event.b64_json}`;
}

function watch(frame, event, part, parts) {
  if (event.kind === "completed") {
    show(frame, event);
    frame.firstChild.alt = event.settings.prompt;
    state.seconds = event.seconds;
    state.picture = event;
    return;
  }
  if (event.b64_json) show(frame, event, true);
  $("progress").value = (part + event.step / event.steps) / parts;
  if (event.seconds_left >= 1) say(`About ${Math.ceil(event.seconds_left)} s left`);
}

const bySeconds = (s) => `${s < 1 ? s.toFixed(2) : s.toFixed(1)} s`;

async function drawing(work) {
  state.drawing?.abort();
  const control = new AbortController();
  state.drawing = control;
  $("cancel").disabled = false;
  try {
    await work(control.signal);
    if (state.drawing === control) {
      $("actions").hidden = false;
      $("progress").value = 1;
    }
  } catch (e) {
    if (e.name !== "AbortError" && state.drawing === control) say(e.message, true);
  } finally {
    if (state.drawing === control) {
      state.drawing = null;
      $("cancel").disabled = true;
    }
  }
}

async function drawOnce(keep, signal) {
  const wanted = fields(keep);
  if (mode() === "blend") wanted.vary = `${number("blend-b") ?? 0}:${$("blend-amount").value / 100}`;
  const pictures = [];
  let boxes = null;
  await draw(wanted, (event) => {
    const n = Math.max(event.picture + 1, wanted.n, boxes?.length ?? 0);
    boxes = frames(n);
    watch(boxes[event.picture], event, event.picture, n);
    if (event.kind === "completed") {
      pictures.push(event);
      boxes[event.picture].lastChild.textContent = n > 1 ? event.settings.prompt : "";
    }
  }, signal);
  frames(pictures.length);
  const { settings, seconds, notes } = pictures.at(-1);
  say(`${settings.variant}, seed ${settings.seed}, ${settings.steps} steps, ` +
    `${settings.width} × ${settings.height}: ${bySeconds(seconds)}${keep ? ", kept" : ""}` +
    notes.map((note) => `. Note: ${note}`).join(""));
  state.slow = seconds > FAST ? state.slow + 1 : 0;
  if (state.slow > 1 && $("live").checked && !keep) { // twice: once may be chance
    $("live").checked = false;
    liveChanged();
    say(`A picture takes ${bySeconds(seconds)} here, so the page waits for the button now.`);
  }
}

async function compare(keep, signal) {
  const { variants } = model();
  const boxes = frames(variants.length);
  variants.forEach((name, i) => caption(boxes[i], name));
  const seconds = [];
  for (const [i, name] of variants.entries()) {
    await draw({ ...fields(keep), variant: name, n: 1 }, (event) => {
      watch(boxes[i], event, i, variants.length);
      if (event.kind !== "completed") return;
      seconds.push(event.seconds);
      caption(boxes[i], name, bySeconds(event.seconds));
    }, signal);
  }
  say(`One model, three widths, the same seed: ${seconds.map(bySeconds).join(", ")}`);
}

async function edit(signal) {
  const files = await editor.files();
  const margin = number("outpaint") ?? 0;
  const wanted = { ...fields(true), n: 1, size: "auto" };
  if (margin) wanted.outpaint = String(margin);
  else wanted.strength = $("strength").value / 100;
  if (margin) files.mask = null;
  let result;
  await draw(wanted, (event) => {
    $("progress").value = event.step / event.steps || 0;
    if (event.kind === "completed") result = event;
  }, signal, files);
  state.picture = result;
  state.seconds = result.seconds;
  await editor.open(blobOf(result));
  say(`Changed in ${bySeconds(result.seconds)}, and kept.`);
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

async function run(keep) {
  if (mode() === "edit") {
    if (!editor.isOpen()) return say("Open a picture, drop one here, or draw one first.");
    if (!$("prompt").value.trim()) return say("Say what the picture should show.");
    await drawing(edit);
    return gallery.refresh();
  }
  if (!$("prompt").value.trim()) {
    state.drawing?.abort();
    return say("Type something.");
  }
  await drawing((signal) => (mode() === "compare" ? compare : drawOnce)(keep, signal));
  if (keep) await gallery.refresh();
}

let timer;
function redraw() {
  clearTimeout(timer);
  if (!$("live").checked || mode() === "edit") return;
  timer = setTimeout(() => run(false), PAUSE);
}

function liveChanged() {
  $("keep").textContent = $("live").checked ? "Keep" : "Draw";
}

function setMode(name) {
  document.querySelector(`[name=mode][value=${name}]`).checked = true;
  $("editor").hidden = name !== "edit";
  $("pictures").hidden = name === "edit";
  $("blend").hidden = name !== "blend";
  $("keep").hidden = name === "edit";
  $("blend-a").textContent = $("seed").value;
  redraw();
}

async function openForEditing(blob) {
  try {
    await editor.open(blob);
    setMode("edit");
    say("Paint over what should change, and say what to put there.");
  } catch {
    say("This file is not a picture that the browser can read.", true);
  }
}

async function dropped(file) {
  const { settings } = await askJson("/settings", { method: "POST", body: file });
  if (!settings) return openForEditing(file); // any other picture
  return again(settings);
}

// ---- events

$("controls").addEventListener("submit", (e) => { e.preventDefault(); clearTimeout(timer); run(true); });
$("prompt").addEventListener("input", () => { suggest(); redraw(); });
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    clearTimeout(timer);
    run(true);
  }
});
for (const id of ["seed", "count", "negative", "blend-amount", "blend-b", ...own]) {
  $(id).addEventListener("input", () => { $("blend-a").textContent = $("seed").value; redraw(); });
}
$("dice").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 1e9);
  $("blend-a").textContent = $("seed").value;
  clearTimeout(timer);
  if (mode() !== "edit") run(!$("live").checked);
});
$("live").addEventListener("change", () => { state.slow = -1e9; liveChanged(); redraw(); });
$("model").addEventListener("change", () => { chooseModel(); redraw(); });
$("cancel").addEventListener("click", () => { state.drawing?.abort(); say("Stopped."); });
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape" && state.drawing) { state.drawing.abort(); say("Stopped."); }
  if (e.altKey && e.code === "KeyR") { e.preventDefault(); $("dice").click(); }
});
for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.addEventListener("change", async () => {
    if (radio.value === "edit" && !editor.isOpen() && state.picture) {
      await openForEditing(blobOf(state.picture));
    } else {
      setMode(radio.value);
      if (radio.value === "edit" && !editor.isOpen()) say("Open a picture, or drop one here.");
    }
  });
}
$("strength").addEventListener("input", () => {
  $("strength-shown").textContent = `${$("strength").value} %`;
});
$("apply").addEventListener("click", () => run(true));
$("open-image").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => $("file").files[0] && openForEditing($("file").files[0]));
$("edit-this").addEventListener("click", async () => openForEditing(blobOf(state.picture)));
$("save-png").addEventListener("click", () => save("png"));
$("save-webp").addEventListener("click", () => save("webp"));

async function save(kind) {
  // A draft is drawn again and kept, so that the file on disk and the download are one.
  if (!state.picture.name) await run(true);
  const { name } = state.picture;
  if (name) gallery.download(`/gallery/${name}?format=${kind}`, name.replace(/png$/, kind));
}

let inside = 0;
document.addEventListener("dragenter", (e) => { e.preventDefault(); inside++; $("drop").hidden = false; });
document.addEventListener("dragleave", () => { if (--inside <= 0) $("drop").hidden = true; });
document.addEventListener("dragover", (e) => e.preventDefault());
document.addEventListener("drop", (e) => {
  e.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  const file = e.dataTransfer.files[0];
  if (file) dropped(file).catch((error) => say(error.message, true));
});

async function start() {
  state.models = (await askJson("/v1/models")).data;
  $("model").replaceChildren(...state.models.map((m) => new Option(m.id)));
  $("model-choice").hidden = state.models.length < 2;
  chooseModel();
  liveChanged();
  await gallery.start((picture) => { again(picture); scrollTo({ top: 0, behavior: "smooth" }); });
  $("prompt").focus();
}
start().catch((e) => say(e.message, true));
