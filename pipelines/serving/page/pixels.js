// From the pixels of a photograph to what a model reads: mantis_core/pixels.py after decoding.
//
// `resize` and `overWhite` give the bytes of Pillow 13 on x86-64; tests compare them. What stands
// before them is the browser's: a large JPEG is decoded in full here, while Pillow has its decoder
// shrink it first, so its pixels differ a little. They also do where a photograph is stored turned,
// since Pillow resizes it before it turns it, and where it is half transparent, since a canvas
// keeps colours multiplied by alpha.
//
// H W pixels. A picture is {data, width, height}, its data RGB, row by row.

import { roundHalfEven } from "./coding.js";

const PRECISION_BITS = 32 - 8 - 2;
const SUPPORT = 2; // pixels to either side that the bicubic filter reaches
const MAX_PIXELS = 64e6;
const [RGB, RGBA] = [3, 4];

/**
 * The pixels of a photograph as evaluation has them, (1, 3, H, W) as Uint8Array.
 *
 * `image` is ImageData, or {data, width, height} of RGBA. `image_size` is [H, W] and `short_side`
 * in pixels, both facts of a client. The short side is resized, then the centre is cut out. Error
 * for a photograph of more than 64 million pixels as it comes or as it is resized.
 */
export function prepare(image, { image_size: [height, width], short_side: shortSide }) {
  checkPixels(image);
  const scale = shortSide / Math.min(image.width, image.height);
  const sides = [image.width, image.height];
  const wanted = sides.map((side) => Math.max(shortSide, roundHalfEven(side * scale)));
  checkPixels({ width: wanted[0], height: wanted[1] });
  const whole = cover(resize(overWhite(image), ...wanted), width, height);
  const left = Math.floor((whole.width - width) / 2);
  const top = Math.floor((whole.height - height) / 2);
  const data = new Uint8Array(RGB * height * width);
  for (let at = 0, channel = 0; channel < RGB; channel++) {
    for (let y = top; y < top + height; y++) {
      for (let x = left; x < left + width; x++) {
        data[at++] = whole.data[RGB * (y * whole.width + x) + channel];
      }
    }
  }
  return data;
}

function checkPixels({ width, height }) {
  if (width * height <= MAX_PIXELS) return;
  throw new Error(`${width} x ${height} is more than ${MAX_PIXELS} pixels; cut the photograph`);
}

/** A picture that is at least of `width` and `height`, enlarged where it is not. */
function cover(picture, width, height) {
  const scale = Math.max(height / picture.height, width / picture.width);
  if (scale <= 1) return picture;
  const larger = (wanted, side) => Math.max(wanted, roundHalfEven(side * scale));
  return resize(picture, larger(width, picture.width), larger(height, picture.height));
}

/** RGBA pixels over white as a picture, as Image.alpha_composite rounds them. */
export function overWhite({ data, width, height }) {
  const found = new Uint8Array(RGB * width * height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const alpha = data[RGBA * pixel + RGB];
    for (let channel = 0; channel < RGB; channel++) {
      // Seven more bits, and a rounded division by 255, as Pillow does.
      const mixed = (data[RGBA * pixel + channel] * alpha + 255 * (255 - alpha) + 128) << 7;
      found[RGB * pixel + channel] = (mixed + (mixed >> 8)) >> 15;
    }
  }
  return { data: found, width, height };
}

/**
 * A picture resized to `width` and `height` by Pillow's antialiased bicubic filter, to the bit.
 *
 * Coefficients are integers of 22 bits. Rows are resized first, then columns; from Pillow 13 on the
 * other way round where the height shrinks by more than twice as many pixels as the width.
 */
export function resize(picture, width, height) {
  const [less, lower] = [picture.width - width, picture.height - height];
  const inRows = (found) => (less ? resizedRows(found, width) : found);
  const inColumns = (found) => (lower ? resizedColumns(found, height) : found);
  if (lower > Math.max(0, 2 * less)) return inRows(inColumns(picture));
  return inColumns(inRows(picture));
}

function resizedRows({ data, width: from, height }, width) {
  const found = new Uint8Array(RGB * width * height);
  const filters = filtersOf(from, width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const { first, weights } = filters[x];
      const start = RGB * (y * from + first);
      for (let channel = 0; channel < RGB; channel++) {
        found[RGB * (y * width + x) + channel] = weighted(data, start + channel, RGB, weights);
      }
    }
  }
  return { data: found, width, height };
}

function resizedColumns({ data, width, height: from }, height) {
  const row = RGB * width;
  const found = new Uint8Array(row * height);
  const filters = filtersOf(from, height);
  for (let y = 0; y < height; y++) {
    const { first, weights } = filters[y];
    for (let x = 0; x < row; x++) {
      found[y * row + x] = weighted(data, first * row + x, row, weights);
    }
  }
  return { data: found, width, height };
}

/** The sum of values from `start` on, `step` apart, by integer weights, rounded to 0..255. */
function weighted(data, start, step, weights) {
  let sum = 1 << (PRECISION_BITS - 1);
  for (let tap = 0; tap < weights.length; tap++) sum += data[start + tap * step] * weights[tap];
  return Math.max(0, Math.min(255, sum >> PRECISION_BITS));
}

/** For each of `to` pixels the first of `from` pixels that it is made of, and their weights. */
function filtersOf(from, to) {
  const scale = from / to;
  const wide = Math.max(scale, 1);
  const narrow = 1 / wide; // multiplied, not divided by, as in C: the last bit differs
  return Array.from({ length: to }, (_, at) => {
    const centre = (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - SUPPORT * wide + 0.5));
    const end = Math.min(from, Math.trunc(centre + SUPPORT * wide + 0.5));
    const shares = Array.from({ length: end - first }, (_, tap) =>
      bicubic((tap + first - centre + 0.5) * narrow),
    );
    const total = shares.reduce((sum, share) => sum + share, 0);
    return { first, weights: Int32Array.from(shares, (share) => fixed(share / total)) };
  });
}

const fixed = (share) => Math.trunc(share * (1 << PRECISION_BITS) + (share < 0 ? -0.5 : 0.5));

/** Keys' cubic convolution with a = -0.5, the terms in the order of Pillow. */
function bicubic(offset) {
  const x = Math.abs(offset);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}
