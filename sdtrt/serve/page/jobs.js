// Jobs: submitted, followed to their end, cancelled; taken up again after a reload. Knows the server and the gallery.

import { $, complain, say } from "./dom.js";
import * as gallery from "./gallery.js";
import * as server from "./server.js";
import * as stage from "./stage.js";

const OPEN = "sdtrt.jobs"; // of this tab, over a reload
const MOST_STREAMS = 2; // browsers have six connections to a server for all its tabs

const running = new Map(); // id → job, the oldest first
const turns = []; // of jobs that are not followed yet
let streams = 0;

/** Submit a job of a body, with its pictures; follow it. `more` tells of the pictures, in words. Returns when it is taken. */
export async function submit(body, pictures, more) {
  const told = await server.post("/api/v1/jobs", { ...body, ...pictures });
  const settings = { ...body, count: undefined };
  const job = { id: told.id, settings, more, seeds: told.images.map((one) => one.seed), created: Date.now() };
  follow(job);
}

/** Follow what was being made when the page was left. */
export function resume() {
  for (const job of JSON.parse(sessionStorage.getItem(OPEN) ?? "[]")) follow(job);
}

export const isBusy = () => running.size > 0;

/** The job whose picture is on the stage; nothing where that one is done. */
const onStage = () => [...running.values()].find((job) => stage.current()?.startsWith(`${job.id} `));

/** The job that is told of: the one on the stage, else the oldest. */
const foremost = () => onStage() ?? running.values().next().value;

/** Cancel the job that is told of. */
export async function cancel() {
  const job = foremost();
  if (!job) return;
  job.isLeaving = true;
  $("progress-text").textContent = "Cancelling…";
  try {
    await server.remove(`/api/v1/jobs/${job.id}`);
  } catch (problem) {
    complain(problem);
  }
}

const pendingId = (job, index) => `${job.id} ${index}`;

async function follow(job) {
  const isSeen = onStage() === undefined;
  running.set(job.id, job);
  remember();
  [...job.seeds.entries()].reverse().forEach(([index, seed]) => {
    const settings = { ...job.settings, seed };
    gallery.begin({ id: pendingId(job, index), created: job.created, settings, more: job.more });
  });
  if (isSeen) stage.show(pendingId(job, 0));
  tell(job, "Waiting for its turn", null);
  await turn();
  const keeping = [];
  try {
    for await (const { name, data } of server.events(job.id)) {
      if (name === "image") keeping.push(keep(job, data));
      else happen(job, name, data);
    }
    await Promise.all(keeping);
  } catch (problem) {
    complain(problem);
  }
  leave();
  end(job);
}

/** Wait until a job can be followed: what happens before is told then. */
async function turn() {
  if (streams === MOST_STREAMS) await new Promise((resolve) => turns.push(resolve));
  else streams += 1;
}

function leave() {
  const next = turns.shift();
  if (next) next();
  else streams -= 1;
}

/** One event of a job that is no picture. */
function happen(job, name, data) {
  const id = pendingId(job, data.index ?? 0);
  if (name === "queued") tell(job, "Waiting for its turn", null);
  else if (name === "building") tell(job, "Building an engine: this takes a while, and is done once", null);
  else if (name === "running") tell(job, "Starting", null);
  else if (name === "step") step(job, id, data);
  else if (name === "preview") {
    gallery.progress(id, null, data.image);
    stage.preview(id, data.image);
  } else if (name === "error") complain(data);
  else if (name === "cancelled") say("Cancelled.");
}

function step(job, id, { step: at, steps, seconds_left: left, index }) {
  gallery.progress(id, at / steps, null);
  if (index !== 0 && stage.current() !== id) return;
  tell(job, `Step ${at} of ${steps}${left === null ? "" : ` · ${spoken(left)} left`}`, at / steps);
  const quarter = Math.floor((4 * at) / steps);
  if (quarter > (job.quarter ?? 0) && quarter < 4) {
    job.quarter = quarter;
    say(`${25 * quarter} %${left === null ? "" : `, ${spoken(left)} left`}`); // not each step: it is read aloud
  }
}

function spoken(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

function tell(job, text, share) {
  if (job.isLeaving || job !== foremost()) return;
  $("progress-text").textContent = running.size > 1 ? `${text} · ${running.size - 1} more` : text;
  if (share === null) $("progress").removeAttribute("value");
  else $("progress").value = share;
  busy(true);
}

function busy(isBusy) {
  $("progress").hidden = $("cancel").hidden = !isBusy;
  $("stage").classList.toggle("busy", isBusy);
  if (!isBusy) $("progress-text").textContent = "";
}

async function keep(job, { index, id, seed, url, width, height }) {
  job.made ??= new Set();
  if (job.made.has(id)) return; // told again, after the connection broke
  job.made.add(id);
  try {
    const file = await server.file(url);
    const asked = { width: job.settings.width ?? width, height: job.settings.height ?? height };
    const settings = { ...job.settings, ...asked, seed };
    // Of one job the first picture is the newest, so that it comes first.
    const facts = { id, created: job.created - index / 1000, settings, more: job.more, width, height };
    await gallery.keep(pendingId(job, index), facts, file);
    if (stage.current() === pendingId(job, index)) {
      job.shown = id;
      await stage.show(id);
    }
  } catch (problem) {
    job.made.delete(id);
    complain(problem.hint === undefined ? { message: "the picture can't be kept", hint: `${problem}` } : problem);
  }
}

function end(job) {
  const wasSeen = onStage() === job || job.shown === stage.current();
  running.delete(job.id);
  remember();
  for (const index of job.seeds.keys()) gallery.drop(pendingId(job, index));
  const next = foremost();
  if (next && wasSeen) stage.show(pendingId(next, 0));
  else if (stage.current() && !gallery.facts(stage.current())) stage.show(gallery.ids()[0] ?? null);
  if (job.made?.size) {
    const seconds = ((Date.now() - job.created) / 1000).toFixed(1);
    say(`${job.made.size === 1 ? "The picture is" : `${job.made.size} pictures are`} there, after ${seconds} s.`);
  }
  if (running.size === 0) busy(false);
}

function remember() {
  const open = [...running.values()].map(({ id, settings, more, seeds, created }) => ({ id, settings, more, seeds, created }));
  sessionStorage.setItem(OPEN, JSON.stringify(open));
}
