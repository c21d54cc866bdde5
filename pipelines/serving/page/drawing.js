// What is drawn: the photograph with masks over it, and the curve of its levels.

const COLOURS = [
  [0, 0, 0], [230, 75, 53], [77, 187, 213], [0, 160, 135], [243, 155, 127], [60, 84, 136],
  [145, 209, 194], [220, 0, 0], [126, 97, 72], [176, 156, 133], [255, 200, 0], [120, 80, 200],
];
const OPACITY = 0.5;
const colourOf = (value) => COLOURS[value % COLOURS.length];

/** Draws a photograph, and over it `masks`, pixel maps of label values. Value 0 stays clear. */
export function drawPicture(canvas, picture, masks) {
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  for (const mask of masks) {
    const shown = new ImageData(mask.width, mask.height);
    mask.values.forEach((value, at) => {
      if (value) shown.data.set([...colourOf(value), 255 * OPACITY], 4 * at);
    });
    const layer = new OffscreenCanvas(mask.width, mask.height);
    layer.getContext("2d").putImageData(shown, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  }
}

/** Fills a list with the names of the label values that masks hold; `names` are by value. */
export function drawLegend(list, shares, names) {
  const items = Object.entries(shares).filter(([value]) => value !== "0" && value !== "255");
  list.hidden = !items.length;
  list.replaceChildren(
    ...items.map(([value, share]) => {
      const item = document.createElement("li");
      const patch = document.createElement("i");
      patch.style.background = `rgb(${colourOf(Number(value))})`;
      item.append(patch, `${names[value] ?? `value ${value}`} ${(100 * share).toFixed(0)} %`);
      return item;
    }),
  );
}

/** A mask of the service, a grey PNG in base64, as {width, height, values}. */
export async function maskOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const options = { colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const values = data.filter((_, at) => at % 4 === 0);
  return { width: canvas.width, height: canvas.height, values };
}

const LEFT = 44, RIGHT = 12, TOP = 14, BOTTOM = 34;

/**
 * Draws what a photograph takes and how sure the answer is.
 *
 * `points` are {level, bytes, sure (0 to 1), same (as at level 0)}, `rival` is {bytes, name} or
 * null. Bytes are on a logarithmic axis.
 */
export function drawCurve(svg, points, chosen, rival) {
  const { width, height } = svg.viewBox.baseVal;
  const bytes = [...points.map((point) => point.bytes), ...(rival ? [rival.bytes] : [])];
  const [low, high] = [Math.min(...bytes) / 1.2, Math.max(...bytes) * 1.2];
  const x = (value) =>
    LEFT + ((width - LEFT - RIGHT) * Math.log(value / low)) / Math.log(high / low);
  const y = (value) => height - BOTTOM - (height - TOP - BOTTOM) * value;
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    parts.push(element("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(share), y2: y(share) }));
    parts.push(label(LEFT - 6, y(share) + 4, `${100 * share} %`, "end"));
  }
  for (const value of ticks(low, high)) {
    parts.push(label(x(value), height - BOTTOM + 16, value.toLocaleString("en"), "middle"));
  }
  parts.push(label(width - RIGHT, height - 3, "bytes", "end"));
  const line = points.map((point) => `${x(point.bytes)},${y(point.sure)}`).join(" ");
  parts.push(element("polyline", { class: "line", points: line }));
  for (const point of points) {
    const kinds = ["point", point.same && "same", point.level === chosen && "chosen"];
    const [cx, cy] = [x(point.bytes), y(point.sure)];
    const radius = point.level === chosen ? 7 : 4.5;
    const dot = element("circle", { class: kinds.filter(Boolean).join(" "), cx, cy, r: radius });
    dot.append(element("title", {}, `level ${point.level}: ${point.bytes} bytes`));
    parts.push(dot);
  }
  if (rival) {
    parts.push(element("rect", { class: "rival", x: x(rival.bytes) - 5, y: y(0) - 5, width: 10, height: 10 }));
    parts.push(label(x(rival.bytes), y(0) - 10, rival.name, "end"));
  }
  svg.replaceChildren(...parts);
}

function ticks(low, high) {
  const found = [];
  for (let power = 1; power < high; power *= 10) {
    for (const step of [1, 2, 5]) found.push(step * power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  return inside.length > 6 ? inside.filter((_, at) => at % 2 === 0) : inside;
}

function element(name, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

const label = (x, y, text, anchor) => element("text", { x, y, "text-anchor": anchor }, text);
