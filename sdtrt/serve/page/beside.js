// What a picture has beside its model, where the server has such: control, a picture as prompt, a refiner, a larger copy.

import { $ } from "./dom.js";
import { Input } from "./inputs.js";

const MAKERS = { canny: "any picture: its edges are found", none: "taken as it is, whatever it looks like" };
const LISTS = { "control-name": "controlnets", "ip-name": "ip_adapters", refiner: "refiners", upscaler: "upscalers" };

let embeddings = [];

export const control = new Input("control", () => told("control", control));
export const ip = new Input("ip", () => told("ip", ip));

function told(name, input) {
  $(`${name}-value`).textContent = input.file ? $(`${name}-name`).value : "";
}

/** Show what the server has, by the names of its capabilities. */
export function offer(capabilities) {
  for (const [id, list] of Object.entries(LISTS)) {
    const first = [...$(id).options].filter((one) => one.value === "");
    const before = $(id).value;
    $(id).replaceChildren(...first, ...(capabilities[list] ?? []).map((name) => new Option(name)));
    if ([...$(id).options].some((one) => one.value === before)) $(id).value = before;
  }
  const has = (list) => (capabilities[list] ?? []).length > 0;
  $("control").hidden = $("dropping-control").hidden = !has("controlnets");
  $("ip").hidden = $("dropping-ip").hidden = !has("ip_adapters");
  $("refiner-line").hidden = !has("refiners");
  $("upscale-line").hidden = !has("upscalers");
  const makers = (capabilities.preprocessors ?? []).map((name) => new Option(MAKERS[name] ?? `any picture: ${name} makes the map`, name));
  $("preprocessor").replaceChildren($("preprocessor").options[0], ...makers);
  $("preprocessor-line").hidden = makers.length === 0;
  embeddings = capabilities.embeddings ?? [];
  $("embeddings-note").hidden = embeddings.length === 0;
  $("embeddings-note").textContent = `Words of their own in prompts: ${embeddings.join(", ")}.`;
}

/** The fields of a job; those of which nothing was chosen are not there. */
export async function fields(words) {
  const own = {};
  if (control.file) own.control = [await scaled("control", control)];
  if (control.file && $("preprocessor").value) own.control[0].preprocessor = $("preprocessor").value;
  if (ip.file) own.ip_adapters = [await scaled("ip", ip)];
  if ($("refiner").value) own.refiner = { name: $("refiner").value };
  if ($("upscale").value) own.upscale = { factor: Number($("upscale").value), upscaler: $("upscaler").value };
  const used = embeddings.filter((name) => words.includes(name));
  if (used.length) own.embeddings = used;
  return own;
}

/** The same in a few words. */
export function words() {
  const own = [];
  if (control.file) own.push(`${$("control-name").value} ${$("control-scale").value}`);
  if (ip.file) own.push(`${$("ip-name").value} ${$("ip-scale").value}`);
  if ($("refiner").value) own.push($("refiner").value);
  if ($("upscale").value) own.push(`enlarged ${$("upscale").value} ×`);
  return own.join(", ");
}

/** Choose nothing of it. */
export function reset() {
  for (const id of ["refiner", "upscale", "preprocessor"]) $(id).value = "";
  for (const input of [control, ip]) input.set(null);
}

async function scaled(name, input) {
  const scale = $(`${name}-scale`).value;
  return { name: $(`${name}-name`).value, image: await input.text(), scale: scale === "" ? 1 : Number(scale) };
}
