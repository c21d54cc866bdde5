// Writes the stream of each case of a JSON file, and what else test_coding_in_javascript.py asks.
//
//     node coding.mjs GIVEN.json FOUND.json

import { readFileSync, writeFileSync } from "node:fs";
import { quantiseLog2 } from "../../../../pipelines/serving/page/client.js";
import {
  crc32,
  openTables,
  RangeWriter,
  toSymbols,
  writeStream,
} from "../../../../pipelines/serving/page/coding.js";

const [given, found] = process.argv.slice(2);
const hex = (bytes) => Buffer.from(bytes).toString("hex");

/** The bytes of base64 in an ArrayBuffer of their own. */
const buffer = (text) => Uint8Array.from(Buffer.from(text, "base64")).buffer;

const said = async (step) => {
  try {
    return await step();
  } catch (error) {
    return `Error: ${error.message}`;
  }
};

const kinds = {
  async stream({ npz, about, spec, images }) {
    const tables = await openTables(buffer(npz), about);
    const coded = ({ latent, ...image }) => ({ ...image, symbols: toSymbols(floats(latent)) });
    return images.map((image) => hex(writeStream(coded(image), tables, spec)));
  },
  async numbers({ values }) {
    const writer = new RangeWriter();
    for (const [value, count] of values) writer.putUniform(value, count);
    return hex(writer.close());
  },
  symbols: ({ latent }) => [...toSymbols(floats(latent))],
  levels: ({ probabilities }) => [...floats(probabilities)].map(quantiseLog2),
  checksum: ({ bytes }) => crc32(Buffer.from(bytes, "hex")),
};

/** float32 numbers of base64. */
const floats = (text) => new Float32Array(buffer(text));

const results = [];
for (const { kind, ...rest } of JSON.parse(readFileSync(given, "utf8"))) {
  results.push(await said(() => kinds[kind](rest)));
}
writeFileSync(found, JSON.stringify(results));
