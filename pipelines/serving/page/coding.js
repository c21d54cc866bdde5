// Codes one image by integer tables, to the very bytes that mantis_core/bitstream writes.
// No networks, no DOM, no decoder. What the format is stands in coder.py, task_field.py, wire.py
// and container.py there.
//
// K tasks, C latent channels, h w latent size, X contexts of a channel, L table entries of the
// longest channel. `spec` is "stream" of an export's manifest.json.

const PRECISION = 16;
const TOTAL = 1 << PRECISION;
const CODER_PRECISION = 24;
const WHOLE = 1 << CODER_PRECISION;
const FINER = CODER_PRECISION - PRECISION;
const MAX_SYMBOL = (1 << 20) - 1;
const [REACH, MOST] = [2, 3];
const SUMS = 2 * MOST + 1;
const CONTEXTS = 1 + 2 * SUMS;
const ESCAPE_CLASSES = 21;
const MAX_LEVEL = 15;
const SURE = 6; // from this level of confidence on, "that is all" has even odds

const [MAGIC, LEVELS, ANSWERS] = [[0xab, 0x4d], 2, 8];
const ARRAYS = { "|u1": Uint8Array, "<i4": Int32Array };
const ascii = (bytes) => String.fromCharCode(...bytes);

/** A number rounded to an integer, half to even, as Python and numpy do. */
export function roundHalfEven(value) {
  const nearest = Math.round(value); // of two, the one above
  return nearest - value === 0.5 && nearest % 2 ? nearest - 1 : nearest;
}

/** A latent rounded and clamped to +-MAX_SYMBOL, Int32Array; Error on NaN. */
export function toSymbols(latent) {
  const clamped = (value) => Math.min(MAX_SYMBOL, Math.max(-MAX_SYMBOL, roundHalfEven(value)));
  if (latent.some(Number.isNaN)) {
    throw new Error("the latent holds NaN: the image or the encoder's weights are not finite");
  }
  return Int32Array.from(latent, clamped);
}

/**
 * The tables in the bytes of tables.npz, for `tableFor`. `tasks` is K, `levels` the model's number
 * of rate levels. Error for a file that holds no such tables.
 */
export async function openTables(npz, { prior, contexts, tasks, levels, channels }) {
  try {
    const { counts, offsets, lengths } = readNpz(npz);
    if (!counts || lengths?.length !== channels || offsets?.length !== channels) {
      throw new Error(`it has no counts, offsets and lengths of ${channels} channels`);
    }
    const rows = { shared: 1, primary: tasks, per_task: tasks, request: tasks + 1 }[prior];
    if (!rows) throw new Error(`prior is ${prior}`);
    const cdf = await unpackCounts(counts, lengths, rows * levels, contexts);
    return { prior, rows, levels, contexts, cdf, offsets, lengths };
  } catch (error) {
    throw new Error(`tables.npz holds no coding tables: ${error.message}`);
  }
}

/** The arrays of a file of numpy.savez, rows of uint8 or int32, by name. Error for others. */
export function readNpz(buffer) {
  const view = new DataView(buffer);
  const end = buffer.byteLength - 22; // of a zip file without comment
  if (end < 0 || view.getUint32(end, true) !== 0x06054b50) throw new Error("it is no zip file");
  const arrays = {};
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const [flags, method] = [view.getUint16(at + 8, true), view.getUint16(at + 10, true)];
    const [crc, size, full] = [16, 20, 24].map((field) => view.getUint32(at + field, true));
    const [name, extra, comment] = [28, 30, 32].map((field) => view.getUint16(at + field, true));
    const own = view.getUint32(at + 42, true);
    const text = ascii(new Uint8Array(buffer, at + 46, name));
    if (view.getUint32(at, true) !== 0x02014b50) throw new Error("its list of files is damaged");
    if (flags & 1 || method || size !== full) throw new Error(`${text} is packed or encrypted`);
    const start = own + 30 + view.getUint16(own + 26, true) + view.getUint16(own + 28, true);
    const content = new Uint8Array(buffer, start, size);
    if (crc32(content) !== crc) throw new Error(`${text} is damaged`);
    arrays[text.replace(/\.npy$/, "")] = readNpy(content, text);
    at += 46 + name + extra + comment;
  }
  return arrays;
}

function readNpy(bytes, name) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (ascii(bytes.subarray(0, 7)) !== "\x93NUMPY\x01") throw new Error(`${name} is no array`);
  const start = 10 + view.getUint16(8, true);
  const header = ascii(bytes.subarray(10, start));
  const [, type] = /'descr': '([^']*)'/.exec(header) ?? [];
  const [, count] = /'shape': \((\d+),\)/.exec(header) ?? [];
  const kind = ARRAYS[type];
  if (!kind || !count) throw new Error(`${name} is no row of uint8 or int32: ${header.trim()}`);
  const data = bytes.slice(start);
  if (data.length !== count * kind.BYTES_PER_ELEMENT) throw new Error(`${name} is cut short`);
  return new kind(data.buffer);
}

/**
 * The cumulative counts (rows, C * X, L + 1) that packed_tables.py packed, flat, as Int32Array.
 * Error for bytes that hold no such tables.
 */
export async function unpackCounts(packed, lengths, rows, contexts) {
  const count = rows * contexts * lengths.reduce((sum, length) => sum + length, 0);
  const bytes = await inflate(packed, 2 * count);
  const width = Math.max(...lengths) + 1;
  const cdf = new Int32Array(rows * lengths.length * contexts * width).fill(TOTAL);
  let read = 0; // channel by channel, row by row, context by context; low bytes, then high ones
  lengths.forEach((length, channel) => {
    for (let table = 0; table < rows * contexts; table++) {
      const [row, context] = [Math.floor(table / contexts), table % contexts];
      const start = ((row * lengths.length + channel) * contexts + context) * width;
      cdf[start] = 0;
      for (let entry = 0; entry < length; entry++, read++) {
        const own = bytes[read] | (bytes[count + read] << 8);
        if (!own) throw new Error("an entry of a table has no count");
        cdf[start + entry + 1] = cdf[start + entry] + own;
      }
      if (cdf[start + length] !== TOTAL) throw new Error(`a table does not sum to ${TOTAL}`);
    }
  });
  return cdf;
}

async function inflate(packed, size) {
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = new Uint8Array(await new Response(unpacked).arrayBuffer());
  if (found.length !== size) throw new Error("the packed tables are not of this model");
  return found;
}

/**
 * The table of an image: `mask` holds K booleans, `primary` is its most probable task, `level` its
 * rate level. Of several rows the floor of their mean, see TableSet.table_for.
 */
export function tableFor(tables, mask, primary, level) {
  const { prior, rows: own, cdf, contexts, offsets, lengths } = tables;
  let rows = [0];
  if (prior === "primary") rows = [primary];
  else if (prior !== "shared") rows = mask.flatMap((on, task) => (on ? [task] : []));
  if (prior === "request" && rows.length > 1) rows = [own - 1];
  const size = cdf.length / (own * tables.levels);
  const starts = rows.map((row) => (level * own + row) * size);
  const mean = new Int32Array(size);
  for (let at = 0; at < size; at++) {
    mean[at] = Math.floor(starts.reduce((sum, start) => sum + cdf[start + at], 0) / rows.length);
  }
  return { cdf: mean, width: Math.max(...lengths) + 1, contexts, offsets, lengths };
}

/**
 * Writes values one after the other into one range-coded number: 32-bit words, a state of 64 bits,
 * probabilities out of 2**24, as python_coder.py.
 */
export class RangeWriter {
  #words = [];
  #low = 0n;
  #width = (1n << 64n) - 1n;

  /** A value whose interval begins at `start` and has `size` of 2**24. */
  put(start, size) {
    const scale = this.#width >> 24n;
    this.#low += scale * BigInt(start);
    this.#width = scale * BigInt(size);
    if (this.#low >> 64n) {
      this.#low = BigInt.asUintN(64, this.#low);
      this.#carry();
    }
    if (this.#width >> 32n) return;
    this.#words.push(Number(this.#low >> 32n));
    this.#low = (this.#low & 0xffffffffn) << 32n;
    this.#width <<= 32n;
  }

  /** A number from 0 to `count` - 1 of equal probability, 2 to 2**24 of them. */
  putUniform(value, count) {
    const each = Math.floor(WHOLE / count);
    this.put(value * each, value < count - 1 ? each : WHOLE - value * each);
  }

  /** The index `value` of an entry of `counts`, which sum to 2**`precision`. */
  putCounted(value, counts, precision = PRECISION) {
    const finer = CODER_PRECISION - precision;
    const before = counts.slice(0, value).reduce((sum, count) => sum + count, 0);
    this.put(before << finer, counts[value] << finer);
  }

  /** All that was put, in the fewest bytes that lie in the final interval with zeros behind. */
  close() {
    let dropped = 8n;
    const above = () => -(-this.#low >> (8n * dropped)); // rounded up
    while (above() << (8n * dropped) >= this.#low + this.#width) dropped--;
    let tail = above();
    if ((tail << (8n * dropped)) >> 64n) {
      tail = 0n;
      this.#carry();
    }
    const kept = 8 - Number(dropped);
    const bytes = new Uint8Array(4 * this.#words.length + kept);
    const view = new DataView(bytes.buffer);
    this.#words.forEach((word, at) => view.setUint32(4 * at, word));
    for (let at = bytes.length - 1; at >= 4 * this.#words.length; at--, tail >>= 8n) {
      bytes[at] = Number(tail & 0xffn);
    }
    return bytes;
  }

  #carry() {
    let at = this.#words.length - 1;
    for (; this.#words[at] === 0xffffffff; at--) this.#words[at] = 0;
    this.#words[at]++;
  }
}

const GAMMA_COUNTS = [...Array.from({ length: 20 }, (_, k) => 2 ** (23 - k)), 1 << 4];

const putGammaClass = (writer, k) => writer.putCounted(k, GAMMA_COUNTS, CODER_PRECISION);

/**
 * Codes a latent (C, h, w), Int32Array, by a table of `tableFor`. Error for one of another size,
 * or with a symbol beyond +-MAX_SYMBOL.
 */
export function putSymbols(writer, symbols, shape, table) {
  const [channels, height, width] = shape;
  const area = height * width;
  if (table.lengths.length !== channels || symbols.length !== channels * area) {
    throw new Error(`${symbols.length} symbols, must be ${shape.join(" x ")}`);
  }
  const escaped = [];
  const entries = symbols.map((symbol, at) => {
    const channel = Math.floor(at / area);
    const [entry, escape] = [symbol - table.offsets[channel], table.lengths[channel] - 1];
    if (Math.abs(symbol) > MAX_SYMBOL) throw new Error(`a symbol is beyond +-${MAX_SYMBOL}`);
    if (0 <= entry && entry < escape) return entry;
    escaped.push({ above: entry >= escape, distance: entry < 0 ? -entry : entry - escape + 1 });
    return escape;
  });
  for (const { row, at } of codingOrder(entries, shape, table)) {
    const place = row * table.width + entries[at];
    const start = table.cdf[place];
    writer.put(start << FINER, (table.cdf[place + 1] - start) << FINER);
  }
  putEscapes(writer, escaped);
}

/** The rows of the tables and the places in the flat latent, in coding order, see symbols.py. */
function* codingOrder(entries, [channels, height, width], table) {
  const area = height * width;
  if (table.contexts === 1) {
    for (let at = 0; at < entries.length; at++) yield { row: Math.floor(at / area), at };
    return;
  }
  const counted = Array.from({ length: channels }, (_, c) =>
    countedNeighbours(entries.subarray(c * area, (c + 1) * area), table.offsets[c], height, width),
  );
  for (const number of [0, 1, 2]) {
    const positions = positionsOf(number, height, width);
    const first = number ? 1 + SUMS * (number - 1) : 0;
    for (let c = 0; c < channels; c++) {
      const groups = Array.from({ length: number ? SUMS : 1 }, () => []);
      for (const at of positions) {
        groups[number ? sumAround(counted[c], at, width, number) : 0].push(c * area + at);
      }
      for (const [sum, own] of groups.entries()) {
        for (const at of own) yield { row: c * CONTEXTS + first + sum, at };
      }
    }
  }
}

/** The positions of a pass, row by row: both even, both odd, the rest. */
function positionsOf(number, height, width) {
  const passOf = (at) => {
    const [row, column] = [Math.floor(at / width) % 2, (at % width) % 2];
    return row === column ? row : 2;
  };
  return [...Array(height * width).keys()].filter((at) => passOf(at) === number);
}

/** What each symbol of a channel counts as a neighbour, (h + 2, w + 2) with a frame of zeros. */
function countedNeighbours(entries, offset, height, width) {
  const counted = new Int8Array((height + 2) * (width + 2));
  entries.forEach((entry, at) => {
    const place = (Math.floor(at / width) + 1) * (width + 2) + (at % width) + 1;
    counted[place] = Math.max(-REACH, Math.min(REACH, entry + offset));
  });
  return counted;
}

/** The sum of the neighbours of a position in pass 1 or 2, from 0 for -MOST on. */
function sumAround(counted, at, width, number) {
  const down = width + 2;
  const place = (Math.floor(at / width) + 1) * down + (at % width) + 1;
  const steps = number === 1 ? [down - 1, down + 1] : [1, down];
  const sum = steps.reduce((all, step) => all + counted[place - step] + counted[place + step], 0);
  return Math.max(-MOST, Math.min(MOST, sum)) + MOST;
}

/** Codes how far escaped symbols lie beyond their tables: all classes, all signs, low bits. */
function putEscapes(writer, escaped) {
  const classOf = ({ distance }) => 31 - Math.clz32(distance);
  for (const each of escaped) putGammaClass(writer, classOf(each));
  for (const each of escaped) writer.putUniform(Number(each.above), 2);
  for (let k = 1; k < ESCAPE_CLASSES; k++) {
    const own = escaped.filter((each) => classOf(each) === k);
    for (const { distance } of own) writer.putUniform(distance - (1 << k), 1 << k);
  }
}

/** Codes which tasks an image has, and their levels unless these are null. */
export function putTaskField(writer, { mask, primary, levels }) {
  const active = mask.filter(Boolean).length;
  if (!mask[primary]) throw new Error(`primary task ${primary} is not among the active tasks`);
  if (mask.length > 1) {
    writer.putUniform(primary, mask.length);
    const size = 31 - Math.clz32(active);
    putGammaClass(writer, size);
    if (size) writer.putUniform(active - (1 << size), 1 << size);
  }
  let toPlace = active - 1;
  for (let task = 0, left = mask.length - 1; 0 < toPlace && toPlace < left; task++) {
    if (task === primary) continue;
    const yes = Math.min(TOTAL - 1, Math.max(1, Math.floor((TOTAL * toPlace) / left)));
    writer.putCounted(Number(mask[task]), [TOTAL - yes, yes]);
    toPlace -= Number(mask[task]);
    left--;
  }
  if (levels) putLevels(writer, levels, mask.slice(0, primary).filter(Boolean).length);
}

const LEVEL_COUNTS = [...Array.from({ length: MAX_LEVEL }, (_, l) => TOTAL >> (l + 1)), 2];

/** Codes a level of each active task, of which the one at `place` is the primary task's. */
function putLevels(writer, levels, place) {
  const first = levels[place];
  writer.putCounted(first, LEVEL_COUNTS);
  const span = MAX_LEVEL + 1 - first;
  levels.forEach((level, at) => {
    if (at !== place && span > 1) writer.putUniform(level - first, span);
  });
}

/** Codes the client's label and confidence where it sends them, and "a latent follows". */
function putAnswer(writer, { mask, primary, levels, label, confidence }, spec) {
  const labels = spec.labels[primary] ?? 0;
  const mayEnd = labels > 0 && mask.filter(Boolean).length === 1;
  if (confidence === null) {
    if (mayEnd) writer.putUniform(0, 2);
    return;
  }
  const row = levels ? levels[mask.slice(0, primary).filter(Boolean).length] : MAX_LEVEL + 1;
  const counts = spec.confidence[row];
  if (!counts || !(0 <= label && label < labels) || !(confidence in counts)) {
    throw new Error(`label ${label}, confidence ${confidence}: this model sends no such answer`);
  }
  writer.putCounted(confidence, counts);
  if (labels > 1) writer.putUniform(label, labels);
  if (mayEnd && confidence >= SURE) writer.putUniform(0, 2);
  else if (mayEnd) writer.putCounted(0, [TOTAL - TOTAL / 16, TOTAL / 16]);
}

/**
 * The stream of one image of the model's own size, Uint8Array.
 *
 * `image` has `mask`, K booleans; `primary`, the index of its most probable active task; `levels`,
 * one for each active task, or null; `label` and `confidence`, the client's answer, or null;
 * `rateLevel`; and `symbols` (C, h, w), Int32Array. `tables` are of `openTables`. Error for what is
 * none of this model's.
 */
export function writeStream(image, tables, spec) {
  const { mask, primary, levels, rateLevel } = image;
  const sides = spec.input_shape.map((side) => Math.ceil(side / spec.stride));
  const writer = new RangeWriter();
  putTaskField(writer, image);
  putAnswer(writer, image, spec);
  if (spec.rate_levels > 1) writer.putUniform(rateLevel, spec.rate_levels);
  const table = tableFor(tables, mask, primary, rateLevel);
  putSymbols(writer, image.symbols, [spec.latent_channels, ...sides], table);
  const flags = (levels ? LEVELS : 0) | (image.confidence === null ? 0 : ANSWERS);
  const id = spec.model_id.match(/../g).map((digits) => parseInt(digits, 16));
  const data = [...MAGIC, (spec.version << 4) | flags, ...id, ...writer.close()];
  const stream = new Uint8Array(data.length + 4);
  stream.set(data);
  new DataView(stream.buffer).setUint32(data.length, crc32(data));
  if (stream.length > spec.max_stream_bytes) {
    throw new Error(`a stream of ${stream.length} bytes is over ${spec.max_stream_bytes}`);
  }
  return stream;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let rest = byte;
  for (let bit = 0; bit < 8; bit++) rest = rest & 1 ? (rest >>> 1) ^ 0xedb88320 : rest >>> 1;
  return rest;
});

/** The CRC-32 of bytes, as zlib has it. */
export function crc32(bytes) {
  let rest = 0xffffffff;
  for (const byte of bytes) rest = (rest >>> 8) ^ CRC_TABLE[(rest ^ byte) & 0xff];
  return (rest ^ 0xffffffff) >>> 0;
}
