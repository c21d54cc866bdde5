// An exported client at work in a browser, as DeviceClient.encode of mantis_core/device/client.py,
// without early exit and max_bytes. The networks run in onnxruntime-web.
//
// K tasks, n classes, H W pixels.

import { openTables, roundHalfEven, toSymbols, writeStream } from "./coding.js";

const [FORMAT, VERSION] = ["mantis-export", 1];
const CONTEXTS = [1, 15]; // tables of a channel, without and with neighbours
const EVEN = 0.5; // of each task, for a client that detects nothing
const MAX_LEVEL = 15;
const EDGES = [0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97].map(Math.fround); // of levels of confidence
const NO_ANSWER = { label: null, confidence: null };

/**
 * Opens an exported client. `files` is an async function from the name of one of its files to an
 * ArrayBuffer, `ort` the module of onnxruntime-web.
 *
 * Error for an export of another version, for a file that is not the one that was exported, and
 * where onnxruntime cannot load a graph. A page that came without TLS has no SHA-256: there only
 * the sizes of files are compared.
 */
export async function openClient({ files, ort }) {
  const manifest = readManifest(await files("manifest.json"));
  const { facts, stream, prior, contexts } = manifest;
  const names = ["look.onnx", "code.onnx", "tables.npz"];
  const [look, code, npz] = await Promise.all(
    names.map(async (name) => checked(name, await files(name), manifest.files[name])),
  );
  const [tasks, levels, channels] = [stream.num_tasks, stream.rate_levels, stream.latent_channels];
  const tables = await openTables(npz, { prior, contexts, tasks, levels, channels });
  const sessions = { look: await session(ort, look), code: await session(ort, code) };
  const client = { manifest, tables, ort, sessions };
  return {
    facts,
    /** What the networks see of an image, (1, 3, H, W) as Uint8Array, for `code`. */
    see: (image) => see(client, image),
    /**
     * The stream of an image that was seen: {stream, tasks, probabilities, level, primary}.
     *
     * `tasks` are names that are asked for, or one name; null or undefined detects them. `level` is
     * a rate level. Back come the names of active tasks, what the detector says of all K tasks and
     * the name of the primary task. Error for what this model cannot be asked.
     */
    code: (seen, wish = {}) => codeSeen(client, seen, wish),
    /** `see` and `code` in one. */
    encode: async (image, wish = {}) => codeSeen(client, await see(client, image), wish),
  };
}

function readManifest(data) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(data));
  } catch (error) {
    throw new Error(`manifest.json cannot be read: ${error.message}`);
  }
  const { format, version, facts, stream, contexts, mask_threshold: threshold } = manifest ?? {};
  if (format !== FORMAT || version !== VERSION) {
    throw new Error(
      `manifest.json has format ${format} version ${version}; this reads ${FORMAT} version ` +
        `${VERSION}: export the model with the same release`,
    );
  }
  const ours = [facts?.tasks?.length, facts?.image_size, facts?.labels, facts?.rate_levels];
  const theirs = [stream?.num_tasks, stream?.input_shape, stream?.labels, stream?.rate_levels];
  const fits = JSON.stringify(ours) === JSON.stringify(theirs) && CONTEXTS.includes(contexts);
  if (!fits || ![1, 2].includes(stream.version) || !(0 <= threshold && threshold <= 1)) {
    throw new Error("manifest.json describes no client of this version");
  }
  return manifest;
}

async function checked(name, data, wanted) {
  let same = data.byteLength === wanted?.bytes;
  if (same && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const digits = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    same = digits === wanted.sha256;
  }
  if (same) return data;
  throw new Error(
    `${name} is not the file of this export (${data.byteLength} bytes, damaged or cut short): ` +
      "copy the folder again",
  );
}

function session(ort, graph) {
  const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
  return ort.InferenceSession.create(new Uint8Array(graph), options);
}

async function see({ manifest, ort, sessions }, image) {
  const { image_size: [height, width], tasks } = manifest.facts;
  if (!(image instanceof Uint8Array) || image.length !== 3 * height * width) {
    throw new Error(`an image is a Uint8Array of 3 x ${height} x ${width}: use prepare`);
  }
  const given = { image: new ort.Tensor("uint8", image, [1, 3, height, width]) };
  const found = await sessions.look.run(given);
  const { probabilities, class_probabilities: classes, ...features } = found;
  const detected = probabilities?.data ?? new Float32Array(tasks.length).fill(EVEN);
  return { detected, classes: classes?.data ?? null, features };
}

async function codeSeen(client, seen, { tasks, level }) {
  const { facts, stream: spec, mask_threshold: threshold } = client.manifest;
  const asked = askedTasks(facts, tasks ?? null);
  const rateLevel = askedLevel(facts, level ?? 0);
  const condition = asked ? Float32Array.from(asked, Number) : Float32Array.from(seen.detected);
  const mask = asked ?? activeTasks(seen.detected, threshold, facts.max_active_tasks);
  const primary = largest(mask.map((on, task) => (on ? seen.detected[task] : -1)));
  const detects = asked === null;
  const probable = [...seen.detected].filter((_, task) => mask[task]);
  const image = {
    mask,
    primary,
    levels: detects && facts.send_probabilities ? probable.map(quantiseLog2) : null,
    ...(detects && facts.sends_answer ? ownAnswer(facts, seen.classes, primary) : NO_ANSWER),
    rateLevel,
    symbols: toSymbols(await latentOf(client, seen.features, condition, rateLevel)),
  };
  return {
    stream: writeStream(image, client.tables, spec),
    tasks: facts.tasks.filter((_, task) => mask[task]),
    probabilities: [...seen.detected],
    level: rateLevel,
    primary: facts.tasks[primary],
  };
}

/** The encoder's latent, Float32Array (C, h, w). Only what its graph takes is given to it. */
async function latentOf({ ort, sessions }, features, condition, level) {
  const given = {
    ...features,
    condition: new ort.Tensor("float32", condition, [1, condition.length]),
    level: new ort.Tensor("int64", BigInt64Array.of(BigInt(level)), [1]),
  };
  const wanted = sessions.code.inputNames.map((name) => [name, given[name]]);
  const { latent } = await sessions.code.run(Object.fromEntries(wanted));
  if (latent.data.every(Number.isFinite)) return latent.data;
  throw new Error("the latent is not finite: the export or this browser's onnxruntime");
}

/** The tasks that are asked for, K booleans; null where they are to be detected. */
function askedTasks({ requests, tasks: names }, tasks) {
  if (tasks === null && requests === "asked") {
    if (names.length === 1) return [true];
    throw new Error(
      "this model detects no tasks, its server asks for some: name one or more of " +
        names.join(", "),
    );
  }
  if (tasks === null) return null;
  if (requests === "detect") {
    throw new Error(
      "this model detects the tasks of an image and cannot be asked for some: name none, or " +
        "train it with model.requests=both",
    );
  }
  const wanted = typeof tasks === "string" ? [tasks] : [...tasks];
  const unknown = wanted.filter((name) => !names.includes(name));
  if (unknown.length || !wanted.length) {
    const which = unknown.join(", ") || "none";
    throw new Error(`tasks ${which} asked for; this model has ${names.join(", ")}`);
  }
  return names.map((name) => wanted.includes(name));
}

function askedLevel({ rate_levels: count }, level) {
  if (Number.isInteger(level) && 0 <= level && level < count) return level;
  const has = count > 1 ? `this model has levels 0 to ${count - 1}` : "this model has one rate";
  throw new Error(`level is ${level}: ${has}`);
}

/** The tasks above the threshold, K booleans: the `most` most probable, and at least one. */
function activeTasks(detected, threshold, most) {
  const order = [...detected.keys()].sort((one, other) => detected[other] - detected[one]);
  const likely = order.slice(0, most).filter((task) => detected[task] > Math.fround(threshold));
  return [...detected.keys()].map((task) => task === order[0] || likely.includes(task));
}

/** The client's label within a task and its level of confidence, null without labels. */
function ownAnswer({ classes }, probabilities, task) {
  const own = [...classes[task]].sort((one, other) => one - other);
  if (!own.length) return NO_ANSWER;
  const best = own[largest(own.map((index) => probabilities[index]))];
  const confidence = EDGES.filter((edge) => edge <= probabilities[best]).length;
  return { label: classes[task].indexOf(best), confidence };
}

/** The index of the largest value, the first of equal ones. */
const largest = (values) => values.indexOf(Math.max(...values));

/** The level 0..15 nearest to -2 log2(probability). Error on NaN. */
export function quantiseLog2(probability) {
  if (Number.isNaN(probability)) throw new Error("a task probability is NaN");
  if (probability <= 2 ** (-MAX_LEVEL / 2)) return MAX_LEVEL;
  return Math.max(0, roundHalfEven(-2 * Math.log2(probability)));
}
