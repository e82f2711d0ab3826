// Pictures that go in: chosen, dropped or pasted; made fit for the server's limits. Knows no job.

import { $, Problem, say } from "./dom.js";

const JPEG_QUALITY = 0.95;

/** A place for one picture in the form. */
export class Input {
  constructor(name, onChange) {
    Object.assign(this, { name, onChange, file: null, width: 0, height: 0 });
    $(`${name}-file`).addEventListener("change", (event) => this.choose(event.target));
    $(`${name}-remove`).addEventListener("click", () => this.set(null));
  }

  choose(input) {
    const [file] = input.files;
    input.value = ""; // so that the same file can be chosen again
    if (file) this.take(file);
  }

  /** Set by the page: reads a file, and tells of what is wrong with it. */
  take = () => {};

  async set(picture) {
    const shown = $(`${this.name}-shown`);
    if (shown.src) URL.revokeObjectURL(shown.src);
    Object.assign(this, picture ?? { file: null, width: 0, height: 0 });
    if (this.file) shown.src = URL.createObjectURL(this.file);
    else shown.removeAttribute("src");
    shown.hidden = $(`${this.name}-remove`).hidden = !this.file;
    $(`${this.name}-empty`).hidden = Boolean(this.file);
    this.onChange();
  }

  /** As a job takes it. */
  async text() {
    return this.file && asText(this.file);
  }
}

/** A file as a data URL. */
export function asText(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem("the file can't be read", "choose it again"));
    reader.readAsDataURL(file);
  });
}

/** A picture of a file, no larger than the server takes. Throws a `Problem` for what is none. */
export async function fitted(file, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Problem(`the file ${file.name ?? ""} is no picture that a browser reads`, "use a PNG, JPEG or WebP file");
  }
  const { width, height } = bitmap;
  const room = (limits.body_bytes / 4) * 3 * 0.45; // of base64, with a mask and words beside it
  const scale = Math.min(1, Math.sqrt(limits.pixels / (width * height)));
  if (scale === 1 && file.size <= room) return { file, width, height };
  const canvas = new OffscreenCanvas(Math.floor(width * scale), Math.floor(height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const smaller = await canvas.convertToBlob({ type: "image/jpeg", quality: JPEG_QUALITY });
  say(`The picture was scaled from ${width}×${height} to ${canvas.width}×${canvas.height}, which this server takes.`);
  return { file: smaller, width: canvas.width, height: canvas.height };
}

/** Take pictures that are dropped anywhere, or pasted. `targets` are actions by the name of the place. */
export function listen(targets) {
  let depth = 0;
  const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const end = () => {
    depth = 0;
    $("dropping").hidden = true;
  };
  const mark = (target) => {
    for (const one of $("dropping").children) one.classList.toggle("over", one === target);
  };
  addEventListener("dragenter", (event) => {
    if (!hasFile(event) || document.querySelector("dialog[open]")) return;
    depth += 1;
    $("dropping").hidden = false;
  });
  addEventListener("dragleave", () => (depth = Math.max(0, depth - 1)) || end());
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    mark(event.target.closest?.("[data-target]"));
  });
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    const place = event.target.closest?.("[data-target]")?.dataset.target ?? "init";
    const [file] = event.dataTransfer.files;
    end();
    if (file) targets[place](file);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    targets.init(file);
  });
}

