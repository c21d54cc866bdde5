// The page: a photograph, a question, the answer and its bytes.

import { drawCurve, drawLegend, drawPicture, maskOf } from "./drawing.js";
import { canvasOf, openEncoder } from "./encoder.js";
import * as service from "./service.js";

const CURVE_POINTS = 8;
const QUALITIES = [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1];
const SAME_PIXELS = 0.95; // of a mask that counts as the same answer

const part = (id) => document.getElementById(id);
let models = [];
let model, opening, encoder, photograph, picture, coded; // of what is chosen now
let turn = 0; // counts questions, so that a late answer is dropped

start();

async function start() {
  part("token").addEventListener("submit", (event) => {
    event.preventDefault();
    service.setToken(part("token-text").value.trim());
    guarded(enter);
  });
  part("file").addEventListener("change", () => guarded(() => take(part("file").files[0])));
  part("model").addEventListener("change", () => guarded(() => choose(part("model").value)));
  part("level").addEventListener("input", () => guarded(ask));
  const drop = part("drop");
  drop.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") part("file").click();
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") guarded(() => take(event.dataTransfer.files[0]));
    });
  }
  await guarded(enter);
}

/** Runs a step and shows its error. */
async function guarded(step) {
  part("problem").hidden = true;
  try {
    await step();
  } catch (error) {
    const wanted = error.status === 401;
    part("token").hidden = !wanted;
    part("main").hidden = wanted || !models.length;
    if (wanted && !part("token-text").value) return;
    part("problem").textContent = error.message;
    part("problem").hidden = false;
    document.body.classList.remove("busy");
  }
}

async function enter() {
  models = await service.models();
  part("token").hidden = true;
  part("main").hidden = false;
  part("model").replaceChildren(
    ...models.map((each) => new Option(`${each.source} (${each.stream_id})`, each.stream_id)),
  );
  part("model-choice").hidden = models.length < 2;
  await choose(models[0].stream_id);
}

async function choose(id) {
  model = models.find((each) => each.stream_id === id);
  part("tasks").replaceChildren(part("tasks-legend"), ...choices(model));
  part("level-choice").hidden = model.rate_levels < 2;
  part("level").max = model.rate_levels - 1;
  part("level").value = Math.floor(model.rate_levels / 2);
  part("where").textContent = "";
  turn++;
  coded = undefined; // that of another model
  const own = (opening = openEncoder(model));
  const found = await own;
  if (own !== opening) return; // another model was chosen meanwhile
  encoder = found;
  document.body.dataset.where = encoder.where;
  const here = encoder.where === "browser";
  part("where").textContent = here
    ? "Encoded in this browser: the photograph stays here."
    : `The photograph goes to the service, which encodes it: ${encoder.why}.`;
  if (photograph) await take(photograph);
}

/** A box for each task, and one that lets the client decide where it can. */
function choices({ tasks, requests }) {
  const names = requests === "detect" ? [] : tasks;
  const boxes = names.map((name) => choice(name, name, false));
  if (requests !== "asked") boxes.unshift(choice("", "the client decides", true));
  else boxes[0].firstChild.checked = true;
  return boxes;
}

function choice(value, text, checked) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", value, checked });
  box.addEventListener("change", () => guarded(() => pick(box)));
  label.append(box, text);
  return label;
}

const boxes = () => [...part("tasks").querySelectorAll("input")];

/** "The client decides" excludes tasks, and something is always asked. */
async function pick(box) {
  for (const other of boxes()) {
    if (box.checked && other !== box && (box.value === "" || other.value === "")) other.checked = false;
  }
  if (!boxes().some((each) => each.checked)) box.checked = true;
  await ask();
}

async function take(file) {
  if (!file) return;
  await opening;
  const [opened, drawn] = [await encoder.open(file), await canvasOf(file, model.image_size)];
  [photograph, picture, coded] = [file, drawn, opened];
  drawPicture(part("picture"), picture, []);
  part("picture").hidden = false;
  part("hint").hidden = true;
  part("drop").classList.add("full");
  await ask();
}

function wish() {
  const chosen = boxes().filter((box) => box.checked).map((box) => box.value);
  return { tasks: chosen.includes("") ? null : chosen, level: Number(part("level").value) };
}

async function ask() {
  part("level-shown").textContent = `${part("level").value} of 0 to ${model.rate_levels - 1}`;
  if (!coded) return;
  const own = ++turn;
  const wanted = wish();
  const late = () => own !== turn;
  document.body.classList.add("busy");
  const found = await answered(coded, wanted);
  if (late()) return;
  await show(found);
  document.body.classList.remove("busy");
  part("curve").hidden = true;
  part("webp").textContent = "Looking for the smallest WebP with this answer …";
  const rival = await smallestWebp(found, wanted, late);
  if (late()) return;
  tell(rival, found);
  await curve(wanted, found, rival, late);
}

/** Stream, answer, masks and times of one way to code a photograph. */
async function answered(code, wanted) {
  const began = performance.now();
  const stream = await code(wanted);
  const sent = performance.now();
  const answer = await service.answer(stream);
  const masks = {};
  for (const [name, text] of Object.entries(answer.masks ?? {})) masks[name] = await maskOf(text);
  const times = [sent - began, performance.now() - sent];
  return { ...wanted, bytes: stream.length, answer, masks, times };
}

async function show({ bytes, answer, masks, times }) {
  part("waiting").hidden = true;
  part("answer").hidden = false;
  part("bytes").textContent = bytes.toLocaleString("en");
  const where = encoder.where === "browser" ? "in this browser" : "by the service";
  part("times").textContent =
    `${times[0].toFixed(0)} ms to encode ${where}, ${times[1].toFixed(0)} ms to the answer`;
  part("answers").replaceChildren(...answer.tasks.map((task) => line(task, answer)));
  drawPicture(part("picture"), picture, Object.values(masks));
  const [first] = Object.keys(masks);
  drawLegend(part("legend"), first ? answer.segmentation[first] : {}, model.segmentation[first] ?? []);
}

function line(task, answer) {
  const item = document.createElement("li");
  const [over, said, sure] = ["div", "div", "meter"].map((name) => document.createElement(name));
  over.className = "task";
  over.textContent = task;
  said.className = "said";
  item.append(over, said);
  if (!(task in answer.label_names)) {
    said.textContent = "drawn over the photograph";
    return item;
  }
  const probability = answer.label_probability[task];
  const [name, share] = ["b", "span"].map((kind) => document.createElement(kind));
  name.textContent = answer.label_names[task];
  if (probability !== undefined) {
    share.textContent = `${(100 * probability).toFixed(0)} %`;
    Object.assign(sure, { min: 0, max: 1, value: probability });
    item.append(sure);
  }
  said.append(name, share);
  return item;
}

/** Whether two answers say the same: equal labels, and masks that are equal but for a few pixels. */
function same(one, other) {
  const labels = ({ answer }) => JSON.stringify([answer.tasks, answer.labels]);
  const masks = Object.keys(one.masks).every((name) => alike(one, other, name) >= SAME_PIXELS);
  return labels(one) === labels(other) && masks;
}

function alike(one, other, name) {
  const [a, b] = [one.masks[name]?.values, other.masks[name]?.values];
  if (!a || !b || a.length !== b.length) return 0;
  return a.reduce((count, value, at) => count + (value === b[at]), 0) / a.length;
}

/** The smallest WebP of the model's size whose pixels get the same answer; null for none. */
async function smallestWebp(found, wanted, late) {
  for (const quality of QUALITIES) {
    const blob = await picture.convertToBlob({ type: "image/webp", quality });
    if (blob.type !== "image/webp") return { unable: true };
    const other = await answered(await encoder.open(blob), wanted);
    if (late()) return null;
    if (same(found, other)) return { bytes: blob.size, name: "WebP" };
  }
  return null;
}

function tell(rival, found) {
  if (rival?.unable) part("webp").textContent = "This browser writes no WebP to compare with.";
  else if (!rival) part("webp").textContent = "No WebP of this size gets the same answer.";
  else {
    const [height, width] = model.image_size;
    const times = (rival.bytes / found.bytes).toFixed(1);
    part("webp").textContent =
      `The smallest WebP of ${width} x ${height} pixels with the same answer has ` +
      `${rival.bytes.toLocaleString("en")} bytes: ${times} times as many.`;
  }
}

async function curve(wanted, found, rival, late) {
  const last = model.rate_levels - 1;
  if (!last) return;
  const levels = new Set([wanted.level]);
  for (let at = 0; at < CURVE_POINTS; at++) levels.add(Math.round((at * last) / (CURVE_POINTS - 1)));
  const ways = [];
  for (const level of [...levels].sort((a, b) => a - b)) {
    ways.push(level === wanted.level ? found : await answered(coded, { ...wanted, level }));
    if (late()) return;
  }
  const points = ways.map((way) => ({
    level: way.level,
    bytes: way.bytes,
    sure: sureness(way, ways[0]),
    same: same(ways[0], way),
  }));
  const masks = Object.keys(ways[0].masks).length > 0;
  drawCurve(part("chart"), points, wanted.level, rival?.bytes ? rival : null);
  part("curve-text").textContent =
    `This photograph at each level: ${masks ? "pixels as at level 0" : "confidence"} over bytes. ` +
    "Full points say what level 0 says; the large one is the level chosen.";
  part("curve").hidden = false;
}

function sureness(way, first) {
  const names = Object.keys(way.masks);
  const shares = names.map((name) => alike(first, way, name));
  const labels = Object.values(way.answer.label_probability);
  const all = names.length ? shares : labels;
  return all.length ? all.reduce((sum, value) => sum + value, 0) / all.length : 0;
}
