// The gallery: pictures that are kept, and those that are being made before them. Knows the store and no server.

import { $, make } from "./dom.js";
import * as store from "./store.js";

const PAGE = 60; // pictures that are listed at once

const listed = new Map(); // id → {facts, button, address}
let choose = () => {};
let current = null;

/** Open the store and list what is in it. */
export async function open(onChoose) {
  choose = onChoose;
  if (!(await store.open())) {
    note("This browser keeps no pictures here: they are lost when the tab is closed.");
  }
  await older();
  await tell();
}

function note(text) {
  $("gallery-note").textContent = text;
}

/** List older pictures below. */
async function older() {
  const kept = [...listed.values()].filter((one) => one.facts.small);
  const last = kept.length ? Math.min(...kept.map((one) => one.facts.created)) : Infinity;
  const found = await store.newest(PAGE, last);
  for (const facts of found) $("pictures").append(entry(facts));
  $("more").hidden = found.length < PAGE;
}

async function tell() {
  const count = await store.count();
  $("gallery-count").textContent = count === 0 ? "" : count === 1 ? "1 picture" : `${count} pictures`;
  $("empty").hidden = count === 0;
  if (![...listed.values()].some((one) => one.button.tabIndex === 0)) {
    const [first] = listed.values();
    if (first) first.button.tabIndex = 0;
  }
}

function entry(facts) {
  const button = make("button", { type: "button", tabIndex: -1, ariaLabel: described(facts) });
  button.dataset.id = facts.id;
  const one = { facts, button, address: "" };
  listed.set(facts.id, one);
  show(one);
  button.addEventListener("click", () => choose(facts.id));
  return make("li", {}, button);
}

function described(facts) {
  const words = facts.settings.prompt || "without a prompt";
  return facts.small ? `${words}, seed ${facts.settings.seed}` : `Being made: ${words}`;
}

function show(one) {
  const { facts, button } = one;
  if (one.address.startsWith("blob:")) URL.revokeObjectURL(one.address);
  one.address = facts.small ? URL.createObjectURL(facts.small) : facts.preview ?? "";
  button.classList.toggle("pending", !facts.small);
  button.replaceChildren(one.address ? make("img", { src: one.address, alt: "" }) : "waits");
}

/** Put a picture that is being made before all others. */
export function begin(facts) {
  $("pictures").prepend(entry(facts));
}

/** Show how far a picture is that is being made. */
export function progress(id, share, preview) {
  const one = listed.get(id);
  if (!one) return;
  if (share !== null) {
    one.button.style.setProperty("--share", `${Math.round(100 * share)}%`);
    if (!one.address) one.button.textContent = `${Math.round(100 * share)} %`;
  }
  if (preview) {
    one.facts.preview = preview;
    show(one);
  }
}

/** Keep a picture that is done, in the place of the one that was being made. */
export async function keep(pending, facts, file) {
  const kept = await store.put(facts, file);
  if (kept.isFleeting) note("This browser has no more room: newer pictures are lost with this tab. Delete some, or download.");
  const before = listed.get(pending)?.button.parentElement;
  const hadFocus = before?.contains(document.activeElement);
  listed.delete(pending);
  if (listed.has(kept.id)) before?.remove(); // another tab, or a reload, kept it already
  else if (before) before.replaceWith(entry(kept));
  else $("pictures").prepend(entry(kept));
  if (hadFocus) listed.get(kept.id).button.focus();
  await tell();
  return kept;
}

/** List it no more. */
export function drop(id) {
  const one = listed.get(id);
  if (!one) return;
  if (one.address.startsWith("blob:")) URL.revokeObjectURL(one.address);
  one.button.parentElement.remove();
  listed.delete(id);
  if (current === id) current = null;
}

export async function remove(id) {
  await store.remove(id);
  drop(id);
  await tell();
}

export async function clear() {
  await store.clear();
  for (const id of ids()) if (listed.get(id).facts.small) drop(id);
  await tell();
}

export const facts = (id) => listed.get(id)?.facts;
export const file = (id) => store.file(id);
export const ids = () => [...$("pictures").children].map((li) => li.firstChild.dataset.id);

/** Mark the picture that is on the stage. */
export function mark(id, picked = null) {
  current = id;
  for (const [name, one] of listed) {
    one.button.setAttribute("aria-current", name === id);
    one.button.tabIndex = name === id ? 0 : -1;
    one.button.classList.toggle("picked", name === picked);
  }
  if (!listed.has(id)) tell();
}

export function focus() {
  const one = listed.get(current) ?? listed.get(ids()[0]);
  one?.button.focus();
}

/** The picture so many places further on; null at the ends. */
export function neighbour(id, places) {
  const all = ids();
  return all[all.indexOf(id) + places] ?? null;
}

/** How many pictures are side by side. */
function columns() {
  return getComputedStyle($("pictures")).gridTemplateColumns.split(" ").length;
}

function walk(event) {
  const { id } = document.activeElement.dataset;
  if (!listed.has(id)) return;
  const places = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
  const all = ids();
  const next = { Home: all[0], End: all.at(-1) }[event.key] ?? (places && neighbour(id, places));
  if (!next) return;
  event.preventDefault();
  listed.get(next).button.focus();
  choose(next);
}

/** Listen to the gallery. */
export function listen() {
  $("pictures").addEventListener("keydown", walk);
  $("more").addEventListener("click", older);
  $("empty").addEventListener("click", async () => {
    $("sure-note").textContent = `${await store.count()} pictures are in this browser, and nowhere else.`;
    $("sure").returnValue = "no";
    $("sure").showModal();
  });
}
