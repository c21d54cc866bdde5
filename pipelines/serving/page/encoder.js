// Encodes photographs: in this browser where that is possible, else on the service.

import { openClient } from "./client.js";
import { prepare } from "./pixels.js";
import * as service from "./service.js";

/**
 * The encoder of a model: `where` it encodes, "browser" or "service"; `why` it is the service; and
 * `open(photograph)`, a Blob, to a function from {tasks, level} to a stream.
 */
export async function openEncoder(model) {
  const remote = (why) => ({
    where: "service",
    why,
    open: async (photograph) => (wish) => service.encode(model.stream_id, photograph, wish),
  });
  if (!model.exported) return remote("the service has no exported client of this model");
  if (!(await service.hasRuntime())) return remote("the service has no onnxruntime-web");
  try {
    const ort = await import("/runtime/ort.wasm.min.mjs");
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmPaths = "/runtime/";
    const files = (name) => service.clientFile(model.stream_id, name);
    return inBrowser(await openClient({ files, ort }));
  } catch (error) {
    return remote(`this browser cannot: ${error.message}`);
  }
}

function inBrowser(client) {
  return {
    where: "browser",
    why: "",
    async open(photograph) {
      const seen = await client.see(prepare(await pixelsOf(photograph), client.facts));
      return async (wish) => (await client.code(seen, wish)).stream;
    },
  };
}

/** The pixels of an image file, upright, as ImageData. Error for what the browser cannot read. */
export async function pixelsOf(photograph) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(photograph, options);
  } catch {
    throw new Error("this file is no photograph that the browser can read");
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** A photograph as a model of [height, width] sees it, on a canvas: to be shown and compressed. */
export async function canvasOf(photograph, [height, width]) {
  const data = await pixelsOf(photograph);
  const scale = Math.max(height / data.height, width / data.width);
  const whole = new OffscreenCanvas(data.width, data.height);
  whole.getContext("2d").putImageData(data, 0, 0);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [w, h] = [data.width * scale, data.height * scale];
  context.drawImage(whole, (width - w) / 2, (height - h) / 2, w, h);
  return canvas;
}
