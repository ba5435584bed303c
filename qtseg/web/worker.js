"use strict";
// The text of worker.js, inside.js and page.js runs twice: as the page, and in a worker, which decodes images and runs
// the network.

// ---- Resampling: the arithmetic of OpenCV's INTER_AREA and INTER_LINEAR ----
const float = Math.fround;
const even = (value) => {  // to the nearest whole number; halves to the even one
  const near = Math.floor(value + 0.5);
  return near - value === 0.5 && near % 2 ? near - 1 : near;
};

function areaTaps(from, to, whole) {  // one axis: which source index adds to which target index, with which weight
  const scale = from / to, taps = { at: [], source: [], weight: [] };
  const add = (at, source, weight) => {
    taps.at.push(at); taps.source.push(source); taps.weight.push(whole ? 1 : float(weight));
  };
  for (let at = 0; at < to; at++) {
    const start = at * scale, end = start + scale, width = Math.min(scale, from - start);
    const last = Math.min(Math.floor(end), from - 1), first = Math.min(Math.ceil(start), last);
    if (first - start > 1e-3) add(at, first - 1, (first - start) / width);
    for (let index = first; index < last; index++) add(at, index, 1 / width);
    if (end - last > 1e-3) add(at, last, Math.min(end - last, 1, width) / width);
  }
  return { at: Int32Array.from(taps.at), source: Int32Array.from(taps.source), weight: Float32Array.from(taps.weight) };
}

function shrink(source, [h, w], [H, W], c) {  // bytes or floats [h, w, c] -> [H, W, c], H <= h and W <= w
  if (h === H && w === W) return source;
  const whole = h % H === 0 && w % W === 0, four = h === 2 * H && w === 2 * W, share = float(1 / ((h / H) * (w / W)));
  const x = areaTaps(w, W, whole), y = areaTaps(h, H, whole), line = new Float32Array(W * c), sum = new Float32Array(W * c);
  const bytes = !(source instanceof Float32Array), out = new source.constructor(H * W * c);
  for (let tap = 0; tap < y.at.length; tap++) {
    line.fill(0);
    for (let i = 0, row = y.source[tap] * w; i < x.at.length; i++) {
      const to = x.at[i] * c, from = (row + x.source[i]) * c, weight = x.weight[i];
      for (let k = 0; k < c; k++) line[to + k] += float(source[from + k] * weight);
    }
    for (let i = 0; i < sum.length; i++) sum[i] += float(y.weight[tap] * line[i]);
    if (y.at[tap] === y.at[tap + 1]) continue;
    for (let i = 0, to = y.at[tap] * W * c; i < sum.length; i++) {
      const mean = whole ? float(sum[i] * share) : sum[i];
      out[to + i] = bytes ? (four ? (sum[i] + 2) >> 2 : even(mean)) : mean;
    }
    sum.fill(0);
  }
  return out;
}

function linearTaps(from, to) {
  return Array.from({ length: to }, (_, at) => {
    const place = float((at + 0.5) * (from / to) - 0.5), low = Math.floor(place);
    return [low, float(place - low)];
  });
}

function enlarge(source, [h, w], [H, W], c, emit) {  // [h, w, c] -> emit(row number, row [W, c]), H >= h and W >= w
  const bytes = !(source instanceof Float32Array), row = new source.constructor(W * c);
  const weights = (part) => (bytes ? [even(float(1 - part) * 2048), even(part * 2048)] : [float(1 - part), part]);
  const x = linearTaps(w, W).map(([low, part]) => (
    low < 0 ? [0, 0, ...weights(0)] : low >= w - 1 ? [w - 1, w - 1, ...weights(0)] : [low, low + 1, ...weights(part)]));
  const y = linearTaps(h, H), inside = (at) => Math.min(Math.max(at, 0), h - 1);
  let kept = new Map();
  const line = (at) => {
    if (kept.has(at)) return kept.get(at);
    const values = bytes ? new Int32Array(W * c) : new Float32Array(W * c);
    for (let i = 0; i < W; i++) {
      const [low, high, a, b] = x[i];
      for (let k = 0; k < c; k++) values[i * c + k] = source[(at * w + low) * c + k] * a + source[(at * w + high) * c + k] * b;
    }
    return values;
  };
  for (let at = 0; at < H; at++) {
    const low = inside(y[at][0]), high = inside(y[at][0] + 1), [a, b] = weights(y[at][1]), first = line(low);
    kept = new Map([[low, first]]);
    const second = line(high);
    kept.set(high, second);
    for (let i = 0; i < row.length; i++) {
      row[i] = bytes ? (((a * (first[i] >> 4)) >> 16) + ((b * (second[i] >> 4)) >> 16) + 2) >> 2 : first[i] * a + second[i] * b;
    }
    emit(at, row);
  }
}

function resample(source, size, target, c, emit) {
  const smaller = size.map((side, axis) => Math.min(side, target[axis]));
  enlarge(shrink(source, size, smaller, c), smaller, target, c, emit);
}

// ---- The Predictor's steps before and after the network ----
function filledSize([h, w], { size, resize }) {
  const scale = size / Math.max(h, w);
  return resize === "squash" ? [size, size] : [h, w].map((side) => Math.max(1, even(side * scale)));
}

function networkInput(pixels, own, settings) {  // RGBA bytes [h, w, 4] -> float32 [channels, size, size]
  const { size, channels, color } = settings, plane = size * size, values = new Float32Array(channels * plane);
  const level = Float32Array.from({ length: 256 }, (_, byte) => float(byte / 127.5) - 1);
  const stored = channels === 1 ? (r, g, b) => [(9798 * r + 19235 * g + 3735 * b + 16384) >> 15]
    : color === "rgb" ? (r, g, b) => [r, g, b] : (r, g, b) => {
      const y = (4899 * r + 9617 * g + 1868 * b + 8192) >> 14;
      return [y, (11682 * (r - y) + 2105344) >> 14, (9241 * (b - y) + 2105344) >> 14]
        .map((value) => Math.min(Math.max(value, 0), 255));
    };
  stored(0, 0, 0).forEach((byte, k) => values.fill(level[byte], k * plane, (k + 1) * plane));  // padding is black
  resample(pixels, own, filledSize(own, settings), 4, (y, row) => {
    for (let x = 0; x < row.length / 4; x++) {
      const bytes = stored(row[4 * x], row[4 * x + 1], row[4 * x + 2]);
      for (let k = 0; k < channels; k++) values[k * plane + y * size + x] = level[bytes[k]];
    }
  });
  return values;
}

function probabilities(logits, [rows, columns], { size, classes }) {  // [classes, size, size] -> [rows, columns, 1 or K]
  const plane = size * size, depth = classes > 2 ? classes : 1, maps = new Float32Array(rows * columns * depth);
  for (let y = 0, to = 0; y < rows; y++) for (let x = 0; x < columns; x++, to += depth) {
    const at = y * size + x;
    if (depth === 1) {
      maps[to] = 1 / (1 + Math.exp(classes === 1 ? -logits[at] : logits[at] - logits[plane + at]));
    } else {
      let most = -Infinity, sum = 0;
      for (let k = 0; k < depth; k++) most = Math.max(most, logits[k * plane + at]);
      for (let k = 0; k < depth; k++) sum += maps[to + k] = Math.exp(logits[k * plane + at] - most);
      for (let k = 0; k < depth; k++) maps[to + k] /= sum;
    }
  }
  if (!Number.isFinite(maps.reduce((sum, value) => sum + value, 0))) throw Error("made the network answer NaN");
  return maps;
}

function decide(maps, filled, own, classes, threshold) {  // -> class index [h, w]; threshold 0: the most probable class
  const depth = classes > 2 ? classes : 1, mask = new Uint8Array(own[0] * own[1]), limit = float(threshold);
  resample(maps, filled, own, depth, (y, row) => {
    for (let x = 0, to = y * own[1]; x < own[1]; x++, to++) {
      if (depth === 1) { mask[to] = row[x] > limit; continue; }
      let best = threshold ? 1 : 0;
      for (let k = best + 1; k < depth; k++) if (row[x * depth + k] > row[x * depth + best]) best = k;
      mask[to] = threshold && !(float(1 - row[x * depth]) > limit) ? 0 : best;
    }
  });
  return mask;
}

// ---- Reading files: the stored colors, without color profile, alpha or a canvas's rounding ----
const MOST_PIXELS = 2 ** 25;
const DAMAGED = "cannot be read to its end: it is damaged, or of a kind that this browser does not know";
const text = (bytes, at, length) => String.fromCharCode(...bytes.subarray(at, at + length));
const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const through = async (parts, stream) => new Uint8Array(await new Response(new Blob(parts).stream().pipeThrough(stream)).arrayBuffer());

function requirePixels(width, height) {
  if (!(width > 0 && height > 0)) throw Error(DAMAGED);
  if (width * height > MOST_PIXELS) {
    const [all, most] = [width * height, MOST_PIXELS].map((pixels) => Math.floor(pixels / 1e6));
    throw Error(`has ${all} million pixels, and this page takes ${most} million: reduce it`);
  }
}

function orientationOf(exif, xmp) {  // 1 to 8; what an EXIF block says, else what XMP says
  if (exif?.length > 8) {
    const view = viewOf(exif), little = exif[0] === 0x49, start = view.getUint32(4, little);
    for (let at = start + 2; at + 12 <= exif.length && at < start + 2 + 12 * view.getUint16(start, little); at += 12) {
      if (view.getUint16(at, little) === 0x0112) return view.getUint16(at + 8, little);
    }
  }
  return Number(/tiff:Orientation(?:="|>)([1-8])/.exec(xmp)?.[1] ?? 1);
}

function upright(pixels, [h, w], orientation) {  // Uint32Array [h, w] -> [turned, its size]
  if (!(orientation > 1 && orientation < 9)) return [pixels, [h, w]];
  const swap = orientation > 4, size = swap ? [w, h] : [h, w], out = new Uint32Array(pixels.length);
  const down = [3, 4, 6, 7].includes(orientation), across = [2, 3, 7, 8].includes(orientation);
  for (let y = 0, to = 0; y < size[0]; y++) for (let x = 0; x < size[1]; x++, to++) {
    const row = swap ? x : y, column = swap ? y : x;
    out[to] = pixels[(down ? h - 1 - row : row) * w + (across ? w - 1 - column : column)];
  }
  return [out, size];
}

async function readPng(bytes, white) {
  const view = viewOf(bytes), data = [], found = {};
  for (let at = 8, kind = ""; kind !== "IEND"; at += 12 + view.getUint32(at)) {
    kind = text(bytes, at + 4, 4);
    const part = bytes.subarray(at + 8, at + 8 + view.getUint32(at));
    if (kind === "IDAT") data.push(part); else found[kind] ??= part;
  }
  const head = viewOf(found.IHDR), w = head.getUint32(0), h = head.getUint32(4), [depth, color, , , interlaced] = found.IHDR.subarray(8);
  requirePixels(w, h);
  const channels = [1, 0, 3, 1, 2, 0, 4][color], step = Math.max(1, channels * depth / 8), most = 2 ** depth - 1;
  const raw = await through(data, new DecompressionStream("deflate")), out = new Uint8Array(4 * w * h);
  const passes = !interlaced ? [[0, 0, 1, 1]]
    : [[0, 0, 8, 8], [0, 4, 8, 8], [4, 0, 8, 4], [0, 2, 4, 4], [2, 0, 4, 2], [0, 1, 2, 2], [1, 0, 2, 1]];
  let at = 0;
  for (const [top, left, down, across] of passes) {
    const columns = Math.ceil((w - left) / across), length = Math.ceil(columns * channels * depth / 8);
    let above = new Uint8Array(length);
    for (let y = top; y < h && columns > 0; y += down) {
      const filter = raw[at], row = raw.subarray(at + 1, at + 1 + length);
      if (row.length < length) throw Error(DAMAGED);
      for (let i = 0; filter && i < length; i++) {
        const a = i < step ? 0 : row[i - step], b = above[i], c = i < step ? 0 : above[i - step];
        const [pa, pb, pc] = [Math.abs(b - c), Math.abs(a - c), Math.abs(a + b - 2 * c)];
        row[i] += [0, a, b, (a + b) >> 1, pa <= pb && pa <= pc ? a : pb <= pc ? b : c][filter];
      }
      for (let i = 0, to = 4 * (y * w + left); i < columns; i++, to += 4 * across) for (let k = 0; k < 3; k++) {
        const sample = i * channels + (channels > 2 ? k : 0), bit = sample * depth;
        const value = depth === 8 ? row[sample] : depth === 16 ? 256 * row[2 * sample] + row[2 * sample + 1]
          : (row[bit >> 3] >> (8 - depth - bit % 8)) & most;
        out[to + k] = color === 3 ? found.PLTE[3 * value + k] : depth === 8 ? value
          : depth === 16 ? Math.min(255, Math.floor((255 * value + (white >> 1)) / white)) : value * 255 / most;
      }
      above = row;
      at += 1 + length;
    }
  }
  return upright(new Uint32Array(out.buffer), [h, w], orientationOf(found.eXIf, found.iTXt ? text(found.iTXt, 0, 60000) : ""));
}

function barePicture(bytes) {  // JPEG, WebP or BMP -> { parts without metadata and alpha, w, h, exif, xmp }
  const view = viewOf(bytes), bare = { parts: [], xmp: "" };
  if (bytes[0] === 0xff) {
    bare.parts.push(bytes.subarray(0, 2));
    for (let at = 2; ; at += 2 + view.getUint16(at + 2)) {
      while (bytes[at + 1] === 0xff) at++;
      const kind = bytes[at + 1], part = bytes.subarray(at, at + 2 + view.getUint16(at + 2)), content = part.subarray(4);
      if (kind === 0xda) {
        bare.parts.push(bytes.subarray(at));
        for (let end = bytes.length - 2; bytes[end] !== 0xff || bytes[end + 1] !== 0xd9; end--) if (end <= at) throw Error(DAMAGED);
        return bare;
      }
      if (kind >= 0xc0 && kind < 0xd0 && ![0xc4, 0xc8, 0xcc].includes(kind)) {
        [bare.h, bare.w] = [5, 7].map((place) => view.getUint16(at + place));
      }
      if (kind === 0xe1 && text(content, 0, 4) === "Exif") bare.exif ??= content.subarray(6);
      else if (kind === 0xe1) bare.xmp += text(content, 0, 65533);
      else if (kind !== 0xe2) bare.parts.push(part);  // e2: color profiles
    }
  }
  if (bytes[0] === 0x42) {
    const bits = view.getUint16(28, true), kind = view.getUint32(30, true);
    [bare.w, bare.h] = [view.getInt32(18, true), Math.abs(view.getInt32(22, true))];
    if ([0, 3].includes(kind) && view.getUint32(10, true) + Math.ceil(bare.w * bits / 32) * 4 * bare.h > bytes.length) throw Error(DAMAGED);
    if (view.getUint32(14, true) >= 56) view.setUint32(66, 0);  // the mask of alpha
    return { ...bare, parts: [bytes] };
  }
  for (let at = 12; at + 8 < bytes.length;) {
    const kind = text(bytes, at, 4), length = view.getUint32(at + 4, true), content = bytes.subarray(at + 8, at + 8 + length);
    if (content.length < length) throw Error(DAMAGED);
    if (kind === "ANMF") throw Error("is an animation: save one picture of it");
    if (kind === "EXIF") bare.exif = text(content, 0, 4) === "Exif" ? content.subarray(6) : content;
    if (kind === "XMP ") bare.xmp = text(content, 0, 60000);
    if (kind === "VP8 ") [bare.w, bare.h] = [6, 8].map((place) => viewOf(content).getUint16(place, true) & 0x3fff);
    if (kind === "VP8L") {
      const bits = viewOf(content).getUint32(1, true);
      [bare.w, bare.h] = [(bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1];
    }
    at += 8 + length + length % 2;
    if (!kind.startsWith("VP8") || kind === "VP8X") continue;
    const head = Uint8Array.from("RIFF....WEBP", (letter) => letter.charCodeAt(0));
    viewOf(head).setUint32(4, 12 + length + length % 2, true);
    bare.parts = [head, bytes.subarray(at - 8 - length - length % 2, at)];
  }
  return bare;
}

async function readPicture(file, white) {  // -> [Uint32Array of RGBA, [h, w]]; errors continue the file's name
  const bytes = new Uint8Array(await file.arrayBuffer());
  const png = text(bytes, 1, 3) === "PNG";
  if (!png && !(bytes[0] === 0xff && bytes[1] === 0xd8) && text(bytes, 0, 2) !== "BM" && text(bytes, 8, 4) !== "WEBP") {
    throw Error("is no JPEG, PNG, WebP or BMP picture");
  }
  try {
    if (png) return await readPng(bytes, white);
    const { parts, w, h, exif, xmp } = barePicture(bytes);
    requirePixels(w, h);
    const bitmap = await createImageBitmap(new Blob(parts), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const pixels = new Uint8ClampedArray(4 * w * h), rows = Math.max(1, Math.min(h, Math.floor(2 ** 20 / w)));
    const canvas = new OffscreenCanvas(w, rows).getContext("2d", { willReadFrequently: true });
    for (let top = 0; top < h; top += rows) {  // in bands: phones allow small canvases only
      canvas.drawImage(bitmap, 0, -top);
      pixels.set(canvas.getImageData(0, 0, w, Math.min(rows, h - top)).data, 4 * top * w);
    }
    bitmap.close();
    for (let i = 3; i < pixels.length; i += 4) {
      if (pixels[i] < 255) throw Error("has transparent parts, whose colors browsers lose: save it as PNG");
    }
    return upright(new Uint32Array(pixels.buffer), [h, w], orientationOf(exif, xmp));
  } catch (error) {
    throw error.constructor === Error ? error : Error(DAMAGED, { cause: error });
  }
}

// ---- The worker ----
function worker() {
  let settings, ort, session;
  const answers = {
    async start(given) {
      settings = given.settings;
      ort = await import(URL.createObjectURL(new Blob([given.script], { type: "text/javascript" })));
      Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary: given.wasm });
      session = await ort.InferenceSession.create(given.network, { executionProviders: ["wasm"] });
    },
    // -> own size, a picture of at most `side` pixels a side (0: none), maps and the network's outputs if wanted
    async open({ file, side, infer, inside }) {
      const [words, own] = await readPicture(file, settings.white), pixels = new Uint8Array(words.buffer);
      const answer = { own, filled: filledSize(own, settings) };
      if (side) {
        const scale = Math.min(1, side / Math.max(...own)), [H, W] = own.map((length) => Math.max(1, Math.round(length * scale)));
        answer.picture = new ImageData(new Uint8ClampedArray(shrink(pixels, own, [H, W], 4)), W, H);
        for (let i = 3; i < answer.picture.data.length; i += 4) answer.picture.data[i] = 255;
      }
      if (infer) {
        const input = new ort.Tensor("float32", networkInput(pixels, own, settings), [1, settings.channels, settings.size, settings.size]);
        const found = await session.run({ images: input }, inside ? session.outputNames : ["logits"]);
        answer.maps = probabilities(found.logits.data, answer.filled, settings);
        if (inside) answer.inside = Object.fromEntries(session.outputNames.map((output) => [output, found[output].data]));
      }
      return answer;
    },
  };
  onmessage = async ({ data: { id, name, given } }) => {
    try { postMessage({ id, answer: await answers[name](given) }); } catch (error) { postMessage({ id, problem: error.message }); }
  };
}
