// The kept pictures: search, choose, download, delete, and back to the settings of one.

import { ask, askJson } from "./api.js";

const $ = (id) => document.getElementById(id);
const PAGE = 60;
let shown = 0;
let use = () => {};

const url = (name) => `/gallery/${encodeURIComponent(name)}`;
const chosen = () => [...document.querySelectorAll("#shelf input:checked")].map((c) => c.value);

function card(picture) {
  const li = document.createElement("li");
  const choose = Object.assign(document.createElement("input"), {
    type: "checkbox", value: picture.name, ariaLabel: `Select ${picture.prompt}`,
  });
  const button = Object.assign(document.createElement("button"), {
    type: "button", title: "Again with these settings",
  });
  const image = Object.assign(document.createElement("img"), {
    src: url(picture.name), alt: "", loading: "lazy", className: "checkered",
  });
  const words = Object.assign(document.createElement("span"), {
    className: "words", textContent: picture.prompt,
  });
  const more = Object.assign(document.createElement("span"), {
    className: "help", textContent: `${picture.variant}, seed ${picture.seed}`,
  });
  button.append(image, words, more);
  button.addEventListener("click", () => use(picture));
  choose.addEventListener("change", update);
  li.append(button, choose);
  return li;
}

function update() {
  const n = chosen().length;
  $("zip").disabled = $("delete").disabled = n === 0;
  $("zip").textContent = n ? `Download ZIP (${n})` : "Download ZIP";
  $("delete").textContent = n ? `Delete (${n})` : "Delete";
}

async function load(from) {
  const query = new URLSearchParams({ search: $("search").value, offset: from, limit: PAGE });
  const { data, total } = await askJson(`/gallery?${query}`);
  if (from === 0) $("shelf").replaceChildren();
  $("shelf").append(...data.map(card));
  shown = from + data.length;
  $("total").textContent = total || "";
  $("empty").hidden = total > 0;
  $("empty").textContent = $("search").value
    ? "No kept picture has these words." : "Pictures that you keep appear here.";
  $("more").hidden = shown >= total;
  update();
}

export const refresh = () => load(0);

export function download(href, name) {
  Object.assign(document.createElement("a"), { href, download: name }).click();
}

export function start(onUse) {
  use = onUse;
  let timer;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(refresh, 150);
  });
  $("more").addEventListener("click", () => load(shown));
  $("zip").addEventListener("click", () => {
    const query = new URLSearchParams(chosen().map((name) => ["name", name]));
    download(`/gallery.zip?${query}`, "pictures.zip");
  });
  $("delete").addEventListener("click", () => {
    const n = chosen().length;
    $("confirm-text").textContent =
      n === 1 ? "Delete this picture for good?" : `Delete these ${n} pictures for good?`;
    $("confirm").returnValue = "";
    $("confirm").showModal();
  });
  $("confirm").addEventListener("close", async () => {
    if ($("confirm").returnValue !== "yes") return;
    for (const name of chosen()) await ask(url(name), { method: "DELETE" });
    await refresh();
  });
  return refresh();
}
