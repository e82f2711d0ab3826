// The form: what it shows, what of it a job is made of, and how a picture's settings come back into it.

import { $, Problem, afterQuiet, make } from "./dom.js";
import { post } from "./server.js";

const DRAFT = "sdtrt.settings";
const PADDING = 32; // pixels around a mask that is looked at closely
const RANDOM_SEEDS = 2 ** 32;
const SLIDES = { steps: "steps-slide", guidance: "guidance-slide", strength: "strength-slide" };
const LARGE = 512; // from this size on, sizes go by 64
const TEXTS = { prompt: "prompt", negative_prompt: "negative" };
const CHOICES = { scheduler: "scheduler", sigmas: "sigmas", prompt_syntax: "syntax", model: "model" };
const NUMBERS = {
  width: "width",
  height: "height",
  steps: "steps",
  guidance_scale: "guidance",
  count: "count",
  strength: "strength",
  mask_blur: "blur",
  clip_skip: "clip-skip",
};
const QUALITIES = {
  exact: "Nothing is left out.",
  high: "Leaves out what is hardly seen.",
  balanced: "Leaves more out: faster, and a somewhat different picture.",
  fast: "Leaves most out: fastest, and a different picture.",
};

let there = null; // the server's capabilities
let kept = {}; // of a picture whose settings were taken: fields that the form has no place for

const usual = { prompt: "", negative_prompt: "", locked: false, seed: "", count: 1, quality: "exact", loras: {} };
Object.assign(usual, { scheduler: "", sigmas: "", prompt_syntax: "plain", clip_skip: 0, mask_blur: 4, closely: false });

/** Fill the lists of the form with what the server has. */
export function offer(capabilities) {
  const isFirst = there === null;
  const before = isFirst ? { ...usual, ...draft() } : read();
  there = capabilities;
  $("model").replaceChildren(...there.models.map((one) => new Option(one.name)));
  $("model-line").hidden = there.models.length < 2;
  for (const [id, names] of [["scheduler", there.schedulers], ["sigmas", there.sigmas]]) {
    $(id).replaceChildren($(id).options[0], ...names.map((name) => new Option(name)));
  }
  $("loras").hidden = there.loras.length === 0;
  $("loras-list").replaceChildren(...there.loras.map(lora));
  $("steps").max = there.limits.steps;
  $("steps-slide").max = Math.min(60, there.limits.steps);
  $("count").max = there.limits.images;
  for (const id of ["prompt", "negative"]) $(id).maxLength = there.limits.prompt;
  write({ ...defaults(before.model), ...stripped(before) });
}

/** What was typed when the page was open last. */
function draft() {
  try {
    return JSON.parse(localStorage.getItem(DRAFT)) ?? {};
  } catch {
    return {};
  }
}

function stripped(values) {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== null && value !== undefined));
}

export function model(name = $("model").value) {
  return there.models.find((one) => one.name === name) ?? there.models[0];
}

/** What a model's pictures have where nobody says anything. */
function defaults(name) {
  const own = model(name ?? there.default_model);
  const { steps, guidance_scale, strength } = there.defaults;
  return { model: own.name, width: own.width, height: own.height, steps, guidance_scale, strength };
}

function lora(name, number) {
  const box = make("input", { type: "checkbox", id: `lora-${number}`, value: name });
  const weight = make("input", { type: "number", step: "0.05", min: "-100", max: "100", value: "1" });
  weight.setAttribute("aria-label", `Weight of ${name}`);
  return make("div", { className: "lora" }, box, make("label", { htmlFor: box.id }, name), weight);
}

/** The form's values, as they are typed. */
export function read() {
  const values = { locked: $("lock").getAttribute("aria-pressed") === "true", seed: $("seed").value.trim() };
  for (const [name, id] of Object.entries({ ...TEXTS, ...CHOICES })) values[name] = $(id).value;
  for (const [name, id] of Object.entries(NUMBERS)) values[name] = $(id).value === "" ? null : Number($(id).value);
  values.quality = document.querySelector("[name=quality]:checked").value;
  values.closely = $("closely").checked;
  values.loras = {};
  for (const row of $("loras-list").children) {
    const [box, , weight] = row.children;
    if (box.checked) values.loras[box.value] = weight.value === "" ? NaN : Number(weight.value);
  }
  return values;
}

/** Put values into the form; what is not named stays. */
export function write(values) {
  for (const [name, id] of Object.entries({ ...TEXTS, ...NUMBERS })) {
    if (values[name] !== undefined && values[name] !== null) $(id).value = values[name];
  }
  for (const [name, id] of Object.entries(CHOICES)) {
    const known = values[name] !== undefined && [...$(id).options].some((one) => one.value === (values[name] ?? ""));
    if (known) $(id).value = values[name] ?? "";
  }
  if (values.seed !== undefined) $("seed").value = values.seed;
  if (values.locked !== undefined) lock(values.locked);
  if (values.closely !== undefined) $("closely").checked = values.closely;
  const quality = document.querySelector(`[name=quality][value="${CSS.escape(values.quality ?? "")}"]`);
  if (quality) quality.checked = true;
  if (values.loras !== undefined) {
    for (const row of $("loras-list").children) {
      const weight = values.loras[row.children[0].value];
      row.children[0].checked = weight !== undefined;
      if (weight !== undefined) row.children[2].value = weight;
    }
  }
  changed();
}

/** The settings of a picture; what it does not name gets the usual value. Returns what of it the form can't have. */
export function take(settings) {
  const loras = Object.fromEntries((settings.loras ?? []).map((one) => [one.name, one.weight]));
  const left = [];
  const own = { ...usual, ...defaults(settings.model), ...stripped(settings), loras, count: 1, locked: true };
  own.closely = (settings.padding_crop ?? null) !== null;
  if (settings.seed !== undefined && !Number.isSafeInteger(settings.seed)) {
    Object.assign(own, { seed: "", locked: false });
    left.push("its seed, which is larger than browsers count");
  }
  const placed = new Set([...Object.keys(usual), ...Object.keys(defaults()), "loras"]);
  write(own);
  keep(Object.fromEntries(Object.entries(settings).filter(([name, value]) => !placed.has(name) && value !== null)));
  return left;
}

/** Keep what the form has no place for, and say so. */
function keep(fields) {
  kept = fields;
  const names = Object.keys(fields).filter((name) => !["edit", "padding_crop"].includes(name));
  $("kept-note").hidden = names.length === 0;
  const words = names.map((name) => `${name.replaceAll("_", " ")} ${fields[name]}`).join(", ");
  $("kept-note").textContent = `Of the picture, too: ${words}. “Reset settings” drops that.`;
}

export function reset() {
  keep({});
  write({ ...usual, ...defaults() });
}

/** The body of a job, without pictures. Throws a `Problem` for what can't be one. */
export function body(usesImage, usesMask) {
  const values = read();
  if (!values.locked) $("seed").value = values.seed = drawn();
  if (!/^\d+$/.test(values.seed) || !Number.isSafeInteger(Number(values.seed))) {
    throw problemAt("seed", `the seed is a whole number from 0 to ${Number.MAX_SAFE_INTEGER}`, "press Random for one");
  }
  for (const [name, id] of Object.entries(NUMBERS)) {
    const unused = (name === "strength" && !usesImage) || (name === "mask_blur" && !usesMask);
    if (!unused && !$(id).checkValidity()) throw problemAt(id, `${labelOf(id)}: ${$(id).validationMessage}`);
  }
  for (const [name, weight] of Object.entries(values.loras)) {
    if (!Number.isFinite(weight)) throw new Problem(`the LoRA ${name} has no weight`, "use 1");
  }
  const { locked, quality, scheduler, sigmas, loras, strength, mask_blur, closely, ...plain } = values;
  const own = { ...kept, ...plain, seed: Number(values.seed) };
  own.scheduler = scheduler || null;
  own.sigmas = sigmas || null;
  own.quality = quality === "exact" ? null : quality;
  own.loras = Object.entries(loras).map(([name, weight]) => ({ name, weight }));
  if (usesImage) Object.assign(own, { strength, edit: model(values.model).task === "edit" });
  else for (const name of ["edit", "image_guidance_scale"]) delete own[name];
  if (usesMask) own.mask_blur = mask_blur;
  if (usesMask && closely) own.padding_crop ??= PADDING;
  else delete own.padding_crop;
  return own;
}

function labelOf(id) {
  return $(id).labels[0].textContent;
}

function problemAt(id, message, hint = "") {
  const details = $(id).closest("details");
  if (details) details.open = true;
  $(id).focus();
  return new Problem(message, hint);
}

export function drawn() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0] % RANDOM_SEEDS);
}

export function lock(isLocked = $("lock").getAttribute("aria-pressed") !== "true") {
  $("lock").setAttribute("aria-pressed", isLocked);
  $("lock").textContent = isLocked ? "Locked" : "Lock";
  $("seed-note").textContent = isLocked ? "Kept." : "New each time.";
}

/** A size of a model's area with other proportions. */
function sized(ratio) {
  const own = model();
  const area = own.width * own.height;
  const unit = Math.min(own.width, own.height) >= LARGE ? 64 : 8;
  const round = (length) => Math.max(unit, Math.round(length / unit) * unit);
  return { width: round(Math.sqrt(area * ratio)), height: round(Math.sqrt(area / ratio)) };
}

/** Take a picture's proportions: its own size where that is near the model's. */
export function sizeFor(width, height) {
  const own = model();
  const fits = width * height <= own.width * own.height * 1.3 && width * height >= own.width * own.height * 0.5;
  const round = (length) => Math.max(8, Math.floor(length / 8) * 8);
  write(fits ? { width: round(width), height: round(height) } : sized(width / height));
}

const count = afterQuiet(250, async () => {
  if (!there) return;
  const texts = [$("prompt").value, $("negative").value];
  try {
    const { counts, limit } = await post("/api/v1/tokens", { texts, model: $("model").value || null });
    if (texts[0] !== $("prompt").value || texts[1] !== $("negative").value) return;
    ["prompt-tokens", "negative-tokens"].forEach((id, number) => {
      const isOver = counts[number] > limit;
      const more = isOver ? `, read in ${Math.ceil(counts[number] / limit)} parts` : "";
      $(id).textContent = texts[number] ? `${counts[number]} / ${limit} tokens${more}` : "";
      $(id).classList.toggle("over", isOver);
    });
  } catch (problem) {
    if (problem.status === 503) setTimeout(count, 2000); // no worker is ready yet
  }
});

/** Bring along what follows from the values: sliders, words, the draft. */
export function changed() {
  if (!there) return;
  for (const [id, slide] of Object.entries(SLIDES)) $(slide).value = $(id).value;
  const values = read();
  const ratio = values.width / values.height;
  for (const button of $("ratios").children) {
    const { width, height } = sized(Number(button.dataset.ratio));
    button.setAttribute("aria-pressed", Math.abs(ratio - width / height) < 0.01);
  }
  $("quality-note").textContent = QUALITIES[values.quality];
  $("basics-value").textContent = `${values.width}×${values.height}, ${values.steps} steps`;
  $("sampling-value").textContent = [values.scheduler, values.sigmas].filter(Boolean).join(", ");
  const loras = Object.keys(values.loras);
  $("loras-value").textContent = loras.length ? loras.join(", ") : "";
  localStorage.setItem(DRAFT, JSON.stringify(values));
  count();
}

/** Listen to the form. */
export function listen() {
  for (const [id, slide] of Object.entries(SLIDES)) {
    $(slide).addEventListener("input", () => ($(id).value = $(slide).value));
  }
  $("settings").addEventListener("input", changed);
  $("model").addEventListener("change", () => {
    const { width, height } = model();
    write({ width, height });
  });
  $("swap").addEventListener("click", () => write({ width: $("height").value, height: $("width").value }));
  for (const button of $("ratios").children) {
    button.addEventListener("click", () => write(sized(Number(button.dataset.ratio))));
  }
  $("lock").addEventListener("click", () => {
    if (!$("seed").value) $("seed").value = drawn();
    lock();
    changed();
  });
  $("seed").addEventListener("input", () => lock(true));
  $("random").addEventListener("click", () => {
    write({ seed: drawn(), locked: true });
  });
  $("reset").addEventListener("click", reset);
}
