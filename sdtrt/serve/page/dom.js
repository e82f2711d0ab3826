// Small words for the document. Knows no server and no settings.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; text goes in as text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Say something to everybody, screen readers included. */
export function say(text) {
  $("said").textContent = text;
}

/** Show an error in words, with its mend. */
export function complain(problem) {
  const close = make("button", { type: "button", ariaLabel: "Close this message" }, "×");
  close.addEventListener("click", hush);
  const hint = problem.hint ? problem.hint[0].toUpperCase() + problem.hint.slice(1) : "";
  const message = problem.message[0].toUpperCase() + problem.message.slice(1);
  $("problem").replaceChildren(make("strong", {}, message), make("span", {}, hint), close);
}

export function hush() {
  $("problem").replaceChildren();
}

/** What is wrong with what somebody gave, and what mends it. */
export class Problem extends Error {
  constructor(message, hint = "", status = 0, kind = "") {
    super(message);
    Object.assign(this, { hint, status, kind });
  }
}

/** A function that runs when its caller has been quiet for a while. */
export function afterQuiet(milliseconds, action) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), milliseconds);
  };
}
