// Talks to the server: its native interface, the key, events. Knows no form and no picture on the screen.

import { Problem } from "./dom.js";

const KEY = "sdtrt.key";
const CLIENT = "sdtrt.client";
const GONE = new Problem("the server doesn't answer", "see whether sdtrt serve still runs; what you typed stays here");
const TRIES = 6; // to follow a job whose stream broke

/** Asks for the key; the page sets it. Returns whether there is one now. */
let askForKey = async () => false;

export function onMissingKey(ask) {
  askForKey = ask;
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

/** This browser among those that share an address: they take turns. */
function client() {
  let name = localStorage.getItem(CLIENT);
  if (!name) localStorage.setItem(CLIENT, (name = `page-${crypto.getRandomValues(new Uint32Array(2)).join("")}`));
  return name;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "X-Client-Id": client(), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function send(path, options) {
  try {
    return await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch {
    throw GONE;
  }
}

/** An answer that is no error; where the key is missing or wrong it is asked for, and the request sent again. */
async function answered(path, options = {}) {
  let answer = await send(path, options);
  while (answer.status === 401 && (await askForKey())) answer = await send(path, options);
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  const error = told.error ?? { kind: "", message: `the server answered ${answer.status}`, hint: "see its log" };
  throw new Problem(error.message, error.hint, answer.status, error.kind);
}

export async function get(path) {
  return (await answered(path)).json();
}

export async function post(path, body) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  return (await answered(path, options)).json();
}

export async function remove(path) {
  return (await answered(path, { method: "DELETE" })).json();
}

export async function file(path) {
  return (await answered(path)).blob();
}

/** Whether the server takes pictures now: `ready`, `starting` or `gone`. */
export async function health() {
  try {
    return (await send("/readyz", {})).ok ? "ready" : "starting";
  } catch {
    return "gone";
  }
}

/** A job's events to its end, over breaks of the connection. */
export async function* events(job) {
  for (let broken = 0; ; broken += 1) {
    try {
      const answer = await answered(`/api/v1/jobs/${job}/events`);
      for await (const event of read(answer.body)) {
        broken = 0;
        yield event;
        if (["done", "error", "cancelled"].includes(event.name)) return;
      }
    } catch (problem) {
      if (problem.status || broken >= TRIES) throw problem;
    }
    await new Promise((resolve) => setTimeout(resolve, 500 * 2 ** broken));
    if (broken >= TRIES) throw GONE;
  }
}

/** Server-sent events of a stream; EventSource could send no key. */
async function* read(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").map((line) => line.split(/: (.*)/s));
      const found = Object.fromEntries(lines.filter(([name]) => name));
      if (found.event) yield { name: found.event, data: JSON.parse(found.data) };
    }
  }
}
