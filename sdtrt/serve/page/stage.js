// The stage: the picture that is looked at, what it was made with, and two compared. Knows no server.

import { $, make } from "./dom.js";
import * as gallery from "./gallery.js";

const SMALL = 384; // pixels: smaller ones are shown larger
const FACTS = {
  width: "size",
  steps: "steps",
  guidance_scale: "guidance",
  seed: "seed",
  scheduler: "scheduler",
  sigmas: "noise levels",
  strength: "change",
  quality: "quality",
  model: "model",
  loras: "LoRA",
  more: "with",
  negative_prompt: "without",
  prompt: "prompt",
};

let shown = null; // the id
let address = "";

export const current = () => shown;

/** Show a picture that is kept, or one that is being made. */
export async function show(id) {
  shown = id;
  gallery.mark(id, picked);
  const facts = gallery.facts(id);
  if (!facts) return clear();
  const file = facts.small ? await gallery.file(id) : null;
  if (shown !== id) return; // another one was chosen meanwhile
  display(file ? URL.createObjectURL(file) : facts.preview ?? "", !file);
  $("shown").alt = facts.settings.prompt || "a picture without a prompt";
  $("actions").hidden = !file;
  if (file) {
    $("download").href = address;
    $("download").download = named(facts);
  }
  tell(facts);
}

function clear() {
  shown = null;
  display("", false);
  $("actions").hidden = $("facts").hidden = true;
}

/** Show a preview of what is being made, if it is what is looked at. */
export function preview(id, data) {
  if (shown === id) display(data, true);
}

function display(next, isUnfinished) {
  if (address.startsWith("blob:")) URL.revokeObjectURL(address);
  address = next;
  const image = $("shown");
  image.classList.toggle("unfinished", isUnfinished);
  image.hidden = !next;
  $("nothing").hidden = Boolean(next) || shown !== null;
  if (!next) return image.removeAttribute("src");
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
  image.src = next;
}

function named({ settings }) {
  const words = settings.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return `${words.join("-").slice(0, 48)}-${settings.seed}.png`;
}

function tell(facts) {
  $("facts").hidden = false;
  const rows = Object.entries(FACTS).map(([name, title]) => [name, title, word(facts, name)]);
  $("facts").replaceChildren(
    ...rows
      .filter(([, , value]) => value !== "")
      .map(([name, title, value]) =>
        make("div", { className: name.includes("prompt") ? "wide" : "" }, make("dt", {}, title), make("dd", {}, value)),
      ),
  );
}

/** A setting as it is read; nothing where it says nothing. */
function word({ settings, ...facts }, name) {
  const value = settings[name] ?? facts[name];
  if (name === "width") return `${facts.width ?? value}×${facts.height ?? settings.height}`;
  if (name === "loras") return (value ?? []).map((one) => `${one.name} ${one.weight}`).join(", ");
  return value === null || value === undefined ? "" : String(value);
}

// Two compared -------------------------------------------------------------------------------------------------------

let picked = null;
let pair = [];

/** Pick the shown picture; the next one that is chosen is compared with it. Returns whether one is picked now. */
export function pick() {
  picked = picked === null ? shown : null;
  $("compare-open").setAttribute("aria-pressed", picked !== null);
  gallery.mark(shown, picked);
  return picked !== null;
}

export const isPicking = () => picked !== null;

/** Compare the picked picture with another one. */
export async function compare(id) {
  pair = [picked, id];
  pick();
  await lay();
  $("compare").showModal();
  $("compare-at").focus();
}

async function lay() {
  for (const [number, side] of ["left", "right"].entries()) {
    const image = $(`compare-${side}`);
    if (image.src) URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(await gallery.file(pair[number]));
    image.alt = `The ${side} picture: ${gallery.facts(pair[number]).settings.prompt}`;
  }
  const [one, other] = pair.map(gallery.facts);
  const rows = Object.entries(FACTS).filter(([name]) => word(one, name) !== word(other, name));
  $("compare-table").hidden = rows.length === 0;
  $("compare-table").tBodies[0].replaceChildren(
    ...rows.map(([name, title]) =>
      make("tr", {}, make("th", { scope: "row" }, title), make("td", {}, word(one, name)), make("td", {}, word(other, name))),
    ),
  );
  divide();
}

function divide() {
  const share = $("compare-at").value;
  $("compare-right").style.clipPath = `inset(0 0 0 ${share}%)`;
  $("compare-line").style.left = `${share}%`;
}

/** Listen to the comparison. */
export function listen() {
  $("compare-at").addEventListener("input", divide);
  $("compare-area").addEventListener("pointermove", (event) => {
    const room = $("compare-area").getBoundingClientRect();
    $("compare-at").value = (100 * (event.clientX - room.left)) / room.width;
    divide();
  });
  $("compare-swap").addEventListener("click", () => {
    pair.reverse();
    lay();
  });
  $("compare-close").addEventListener("click", () => $("compare").close());
}
