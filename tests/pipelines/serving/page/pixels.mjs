// Resizes and prepares the pictures of a JSON file, for test_pixels_in_javascript.py.
//
//     node pixels.mjs GIVEN.json FOUND.json

import { readFileSync, writeFileSync } from "node:fs";
import { overWhite, prepare, resize } from "../../../../pipelines/serving/page/pixels.js";

const [given, found] = process.argv.slice(2);
const base64 = (bytes) => Buffer.from(bytes).toString("base64");

const kinds = {
  resize: (picture, { size }) => base64(resize(picture, ...size).data),
  white: (picture) => base64(overWhite(picture).data),
  prepare: (picture, { facts }) => base64(prepare(picture, facts)),
};

const results = [];
for (const { kind, pixels, width, height, ...rest } of JSON.parse(readFileSync(given, "utf8"))) {
  const picture = { data: new Uint8ClampedArray(Buffer.from(pixels, "base64")), width, height };
  try {
    results.push(kinds[kind](picture, rest));
  } catch (error) {
    results.push(`Error: ${error.message}`);
  }
}
writeFileSync(found, JSON.stringify(results));
