// The page as a whole: puts its parts together, and knows the keys.

import * as beside from "./beside.js";
import { $, Problem, complain, hush, say } from "./dom.js";
import * as gallery from "./gallery.js";
import * as inputs from "./inputs.js";
import * as jobs from "./jobs.js";
import * as mask from "./mask.js";
import * as server from "./server.js";
import * as settings from "./settings.js";
import * as stage from "./stage.js";

const SINGLE_KEYS = "sdtrt.single-keys";
const NARROW = matchMedia("(max-width: 46rem)");
const WORDS = { ready: "Ready", starting: "The server is getting ready…", gone: "The server doesn't answer" };

let there = null; // the server's capabilities
let maskFile = null;

const init = new inputs.Input("init", initChanged);
const places = { init, control: beside.control, ip: beside.ip };
const details = { init: "start", control: "control", ip: "ip" };

// What is asked for ---------------------------------------------------------------------------------------------------

async function generate() {
  hush();
  try {
    known();
    const body = settings.body(init.file !== null, maskFile !== null);
    settings.changed();
    const more = await beside.fields(`${body.prompt} ${body.negative_prompt}`);
    await jobs.submit(body, { ...(await pictures()), ...more }, told());
    if (NARROW.matches) $("stage").scrollIntoView({ behavior: "smooth" });
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    complain(problem);
  }
}

/** What a picture has beside its settings, in a few words. */
function told() {
  const start = init.file ? (maskFile ? "a picture and its mask" : "a picture") : "";
  return [start, beside.words()].filter(Boolean).join(", ");
}

/** What the server has. Throws a `Problem` before that is known. */
function known() {
  if (!there) throw new Problem("the server is not there yet", "wait a moment");
  return there;
}

async function pictures() {
  const given = {};
  if (init.file) given.init_image = await init.text();
  if (init.file && maskFile) given.mask = await inputs.asText(maskFile);
  return given;
}

async function takePicture(place, file) {
  hush();
  try {
    const picture = await inputs.fitted(file, known().limits);
    if (place === "init") maskFile = null;
    await places[place].set(picture);
    if (place === "init") settings.sizeFor(picture.width, picture.height);
    $(details[place]).open = true;
  } catch (problem) {
    complain(problem);
  }
}

/** The settings in a picture's text. */
async function takeSettings(file) {
  hush();
  try {
    const told = await server.post("/api/v1/settings", { image: await inputs.asText(file) });
    const left = [...told.left, ...settings.take(told.settings)];
    say(`Settings taken from ${file.name || "the picture"}.${left.length ? ` Not taken: ${left.join("; ")}.` : ""}`);
  } catch (problem) {
    complain(problem);
  }
}

function initChanged() {
  if (!init.file) maskFile = null;
  $("init-options").hidden = !init.file;
  maskChanged();
}

function maskChanged() {
  const words = [init.file ? `${init.width}×${init.height}` : "", maskFile ? "with a mask" : ""];
  $("start-value").textContent = words.filter(Boolean).join(", ");
  $("mask-open").textContent = maskFile ? "Change the mask" : "Paint a mask";
  $("mask-remove").hidden = $("blur-line").hidden = $("closely-line").hidden = !maskFile;
  $("mask-note").textContent = maskFile
    ? "Only what you painted is made anew."
    : "The whole picture changes. With a mask, only what you paint does.";
}

async function paintMask() {
  const painted = await mask.paint(init.file, init.width, init.height, maskFile);
  if (painted) maskFile = painted;
  maskChanged();
  $("mask-open").focus();
}

// What is done with a picture -----------------------------------------------------------------------------------------

async function choose(id) {
  const isKept = Boolean(gallery.facts(id)?.small);
  if (stage.isPicking() && isKept && id !== stage.current()) {
    await stage.compare(id);
  } else {
    await stage.show(id);
  }
}

const kept = () => (gallery.facts(stage.current())?.small ? stage.current() : null);

const actions = {
  useSettings() {
    const own = gallery.facts(kept()).settings;
    settings.take(own);
    const { more } = gallery.facts(kept());
    say(`The form has this picture's settings, and its seed.${more ? ` Give again: ${more}.` : ""}`);
  },
  async usePicture() {
    await takePicture("init", await gallery.file(kept()));
    say("The next picture starts from this one.");
  },
  async useMask() {
    await actions.usePicture();
    if (init.file) await paintMask();
  },
  compare() {
    const isPicking = stage.pick();
    say(isPicking ? "Choose the other picture in the gallery." : "");
    if (isPicking) gallery.focus();
  },
  download() {
    $("download").click();
  },
  async remove() {
    const id = kept();
    const hadFocus = $("gallery").contains(document.activeElement);
    const next = gallery.neighbour(id, 1) ?? gallery.neighbour(id, -1);
    if (stage.isPicking()) stage.pick();
    await gallery.remove(id);
    await stage.show(next);
    if (hadFocus) gallery.focus();
    else if (next) $("delete").focus();
    say("Deleted.");
  },
};

// Keys ----------------------------------------------------------------------------------------------------------------

const SINGLES = {
  "/": () => $("prompt").focus(),
  g: () => gallery.focus(),
  l: () => $("lock").click(),
  r: () => $("random").click(),
  s: () => kept() && actions.useSettings(),
  i: () => kept() && actions.usePicture(),
  c: () => kept() && actions.compare(),
  d: () => kept() && actions.download(),
  "?": () => $("help").showModal(),
};

const isText = (element) => element.matches?.("textarea, select, input:not([type=radio], [type=checkbox], [type=file])");

function key(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("settings").requestSubmit();
  } else if (event.key === "Escape") {
    if (stage.isPicking()) actions.compare();
    else jobs.cancel();
  } else if (event.key === "Delete" && $("pictures").contains(event.target) && kept()) {
    actions.remove();
  } else if (!isText(event.target) && $("single-keys").checked && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const action = SINGLES[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    action();
  }
}

// The server ----------------------------------------------------------------------------------------------------------

/** Ask for the key, once for all requests that want it. */
let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    $("open-key").hidden = false;
    $("key-problem").textContent = server.hasKey() ? "The server doesn't take this key: look for a typo." : "";
    $("key-text").value = "";
    $("key").returnValue = "";
    $("key").showModal();
    $("key").addEventListener("close", () => resolve($("key").returnValue === "ok"), { once: true });
  }).then((isGiven) => {
    if (isGiven) server.setKey($("key-text").value.trim());
    asking = null;
    return isGiven;
  });
  return asking;
}

async function watch() {
  const state = await server.health();
  if (state === "ready" && $("health").dataset.state !== "ready") await learn();
  if ($("health").dataset.state !== state) {
    $("health").dataset.state = state;
    $("health").textContent = WORDS[state];
  }
  setTimeout(watch, state === "ready" ? 10_000 : 1000);
}

/** Learn what the server has. */
async function learn() {
  try {
    const told = await server.get("/api/v1/capabilities");
    if (!("defaults" in told)) throw new Problem("this page is of another version than its server", "load it anew");
    there = told;
    settings.offer(there);
    beside.offer(there);
  } catch (problem) {
    complain(problem);
  }
}

// -------------------------------------------------------------------------------------------------------------------

function listen() {
  $("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("cancel").addEventListener("click", jobs.cancel);
  $("copy").addEventListener("click", async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText($("seed").value);
    else {
      $("seed").select(); // over plain HTTP from another machine browsers have no clipboard for pages
      document.execCommand("copy");
    }
    say("Seed copied.");
  });
  for (const [name, place] of Object.entries(places)) place.take = (file) => takePicture(name, file);
  $("settings-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) takeSettings(file);
  });
  inputs.listen({ settings: takeSettings, init: init.take, control: beside.control.take, ip: beside.ip.take });
  $("mask-open").addEventListener("click", paintMask);
  $("mask-remove").addEventListener("click", () => {
    maskFile = null;
    maskChanged();
  });
  $("reset").addEventListener("click", () => {
    init.set(null);
    beside.reset();
  });
  $("use-settings").addEventListener("click", actions.useSettings);
  $("use-picture").addEventListener("click", actions.usePicture);
  $("use-mask").addEventListener("click", actions.useMask);
  $("compare-open").addEventListener("click", actions.compare);
  $("delete").addEventListener("click", actions.remove);
  $("open-help").addEventListener("click", () => $("help").showModal());
  $("open-key").addEventListener("click", async () => (await askForKey()) && learn());
  $("key-close").addEventListener("click", () => $("key").close());
  $("key-form").addEventListener("submit", () => ($("key").returnValue = "ok"));
  $("sure").addEventListener("close", async () => {
    if ($("sure").returnValue !== "yes") return;
    await gallery.clear();
    if (!jobs.isBusy()) await stage.show(null);
    say("All pictures are deleted.");
  });
  $("single-keys").checked = localStorage.getItem(SINGLE_KEYS) !== "off";
  $("single-keys").addEventListener("change", (event) => localStorage.setItem(SINGLE_KEYS, event.target.checked ? "on" : "off"));
  addEventListener("keydown", key);
  addEventListener("unhandledrejection", (event) => {
    complain(new Problem(`the page failed: ${event.reason?.message ?? event.reason}`, "load it anew; your pictures stay"));
  });
}

async function start() {
  if (NARROW.matches) $("basics").open = false;
  settings.listen();
  mask.listen();
  gallery.listen();
  stage.listen();
  listen();
  server.onMissingKey(askForKey);
  await Promise.all([learn(), gallery.open(choose)]);
  jobs.resume();
  if (!jobs.isBusy() && gallery.ids().length) await stage.show(gallery.ids()[0]);
  document.documentElement.dataset.ready = "yes";
  watch();
}

start();
