// Paints a mask over a picture, with a pointer or with keys. Knows the picture and its mask alone.

import { $ } from "./dom.js";

const COLOUR = "#ff3b30"; // of the screen; the mask itself is white on black
const STEP = 0.02; // of the longer side, of an arrow key

let picture = null;
let marks = []; // strokes, and the mask that was there
let stroke = null;
let at = { x: 0.5, y: 0.5 };
let finish = () => {};

const canvas = () => $("mask-canvas");
const context = () => canvas().getContext("2d");
const isErasing = () => $("mask-erase").getAttribute("aria-pressed") === "true";
const radius = () => ($("mask-size").value / 200) * Math.max(canvas().width, canvas().height);

/** Open the editor. Returns a mask (a PNG, white where it was painted), or null where nothing was changed. */
export async function paint(file, width, height, mask) {
  picture = URL.createObjectURL(file);
  $("mask-image").src = picture;
  Object.assign(canvas(), { width, height });
  marks = mask ? [{ mask: await createImageBitmap(mask) }] : [];
  at = { x: width / 2, y: height / 2 };
  tool(false);
  draw();
  $("mask").showModal();
  canvas().focus();
  moveBrush();
  return new Promise((resolve) => (finish = resolve));
}

async function close(isDone) {
  const file = isDone && painted() ? await exported() : null;
  if ($("mask").open) $("mask").close();
  URL.revokeObjectURL(picture);
  finish(file);
}

function painted() {
  const { width, height } = canvas();
  const data = context().getImageData(0, 0, width, height).data;
  for (let place = 3; place < data.length; place += 4) if (data[place] > 127) return true;
  return false;
}

function exported() {
  const { width, height } = canvas();
  const out = new OffscreenCanvas(width, height);
  const drawing = out.getContext("2d");
  drawing.drawImage(canvas(), 0, 0);
  drawing.globalCompositeOperation = "source-in";
  drawing.fillStyle = "#fff";
  drawing.fillRect(0, 0, width, height);
  drawing.globalCompositeOperation = "destination-over";
  drawing.fillStyle = "#000";
  drawing.fillRect(0, 0, width, height);
  return out.convertToBlob({ type: "image/png" });
}

function draw() {
  const { width, height } = canvas();
  context().clearRect(0, 0, width, height);
  marks.forEach(drawMark);
  $("mask-undo").disabled = marks.length === 0;
}

function drawMark(mark) {
  if (mark.mask) drawMask(mark.mask);
  else if (mark.isInverse) invert();
  else if (mark.isClear) context().clearRect(0, 0, canvas().width, canvas().height);
  else drawStroke(mark);
}

function drawStroke({ points, size, erases }) {
  const drawing = context();
  drawing.save();
  drawing.globalCompositeOperation = erases ? "destination-out" : "source-over";
  drawing.strokeStyle = COLOUR;
  Object.assign(drawing, { lineWidth: size * 2, lineCap: "round", lineJoin: "round" });
  drawing.beginPath();
  drawing.moveTo(points[0].x, points[0].y);
  for (const point of points) drawing.lineTo(point.x, point.y);
  drawing.stroke();
  drawing.restore();
}

function invert() {
  const drawing = context();
  drawing.save();
  drawing.globalCompositeOperation = "source-out";
  drawing.fillStyle = COLOUR;
  drawing.fillRect(0, 0, canvas().width, canvas().height);
  drawing.restore();
}

/** A mask that was painted before: its white becomes what is painted. */
function drawMask(bitmap) {
  const { width, height } = canvas();
  const other = new OffscreenCanvas(width, height);
  const drawing = other.getContext("2d");
  drawing.drawImage(bitmap, 0, 0, width, height);
  const data = drawing.getImageData(0, 0, width, height);
  for (let place = 0; place < data.data.length; place += 4) {
    data.data[place + 3] = data.data[place];
    data.data.set([0xff, 0x3b, 0x30], place);
  }
  drawing.putImageData(data, 0, 0);
  context().drawImage(other, 0, 0);
}

function begin() {
  stroke = { points: [{ ...at }], size: radius(), erases: isErasing() };
  marks.push(stroke);
  draw();
}

function go(x, y) {
  const { width, height } = canvas();
  at = { x: Math.min(width, Math.max(0, x)), y: Math.min(height, Math.max(0, y)) };
  moveBrush();
  if (!stroke) return;
  stroke.points.push({ ...at });
  drawStroke({ ...stroke, points: stroke.points.slice(-2) });
}

function end() {
  stroke = null;
}

function moveBrush() {
  const shown = canvas().getBoundingClientRect();
  const scale = shown.width / canvas().width;
  const size = `${2 * radius() * scale}px`;
  Object.assign($("mask-brush").style, { left: `${at.x * scale}px`, top: `${at.y * scale}px`, width: size, height: size });
}

function tool(erases) {
  $("mask-paint").setAttribute("aria-pressed", !erases);
  $("mask-erase").setAttribute("aria-pressed", erases);
}

function point(event) {
  const shown = canvas().getBoundingClientRect();
  const scale = canvas().width / shown.width;
  return [(event.clientX - shown.left) * scale, (event.clientY - shown.top) * scale];
}

function key(event) {
  const step = STEP * (event.shiftKey ? 5 : 1) * Math.max(canvas().width, canvas().height);
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (moves[event.key]) go(at.x + moves[event.key][0], at.y + moves[event.key][1]);
  else if (event.key === " ") stroke ?? begin();
  else if (event.key === "[" || event.key === "]") resize(event.key === "]" ? 2 : -2);
  else if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else return;
  event.preventDefault();
}

function resize(change) {
  $("mask-size").value = Number($("mask-size").value) + change;
  moveBrush();
}

function undo() {
  marks.pop();
  draw();
}

function add(mark) {
  marks.push(mark);
  draw();
}

/** Listen to the editor. */
export function listen() {
  canvas().addEventListener("pointerdown", (event) => {
    canvas().setPointerCapture(event.pointerId);
    go(...point(event));
    begin();
  });
  canvas().addEventListener("pointermove", (event) => {
    for (const one of event.getCoalescedEvents?.() ?? []) go(...point(one));
    go(...point(event));
  });
  for (const name of ["pointerup", "pointercancel", "blur"]) canvas().addEventListener(name, end);
  canvas().addEventListener("keydown", key);
  canvas().addEventListener("keyup", (event) => event.key === " " && end());
  $("mask-paint").addEventListener("click", () => tool(false));
  $("mask-erase").addEventListener("click", () => tool(true));
  $("mask-size").addEventListener("input", moveBrush);
  $("mask-undo").addEventListener("click", undo);
  $("mask-invert").addEventListener("click", () => add({ isInverse: true }));
  $("mask-clear").addEventListener("click", () => add({ isClear: true }));
  $("mask-cancel").addEventListener("click", () => close(false));
  $("mask-done").addEventListener("click", () => close(true));
  $("mask").addEventListener("cancel", (event) => {
    event.preventDefault();
    close(false);
  });
  addEventListener("resize", () => $("mask").open && moveBrush());
}
