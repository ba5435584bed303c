// ---- Files to download ----
const crcTable = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});
const crc = (bytes) => ~bytes.reduce((sum, byte) => crcTable[(sum ^ byte) & 255] ^ (sum >>> 8), -1) >>> 0;
const number = (value, size, little) => {
  const view = new DataView(new ArrayBuffer(size));
  if (size === 2) view.setUint16(0, value, little); else view.setUint32(0, value, little);
  return new Uint8Array(view.buffer);
};
const joined = async (...parts) => new Uint8Array(await new Blob(parts).arrayBuffer());

async function maskPng(mask, [h, w], colors) {  // class indices, with a palette that makes them visible
  const rows = new Uint8Array(h * (w + 1));
  for (let y = 0; y < h; y++) rows.set(mask.subarray(y * w, (y + 1) * w), y * (w + 1) + 1);
  const chunk = async (kind, ...data) => {
    const body = await joined(kind, ...data);
    return joined(number(body.length - 4, 4), body, number(crc(body), 4));
  };
  return joined(Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
    await chunk("IHDR", number(w, 4), number(h, 4), Uint8Array.of(8, 3, 0, 0, 0)), await chunk("PLTE", Uint8Array.from(colors.flat())),
    await chunk("IDAT", await through([rows], new CompressionStream("deflate"))), await chunk("IEND"));
}

async function zip(files) {  // [[name, bytes], …] -> an archive without compression
  const parts = [], entries = [];
  let at = 0;
  for (const [name, bytes] of files) {
    const letters = new TextEncoder().encode(name);
    const about = await joined(...[20, 0x800, 0, 0, 0x21].map((value) => number(value, 2, true)),  // the date 1980-01-01
      ...[crc(bytes), bytes.length, bytes.length].map((value) => number(value, 4, true)), number(letters.length, 2, true), number(0, 2));
    parts.push("PK\x03\x04", about, letters, bytes);
    entries.push("PK\x01\x02", number(20, 2, true), about, new Uint8Array(10), number(at, 4, true), letters);
    at += 30 + letters.length + bytes.length;
  }
  const directory = await joined(...entries), count = number(files.length, 2, true);
  const sizes = [directory.length, at].map((value) => number(value, 4, true));
  return joined(...parts, directory, "PK\x05\x06", number(0, 4), count, count, ...sizes, number(0, 2));
}

// ---- The page ----
function page() {
  const element = (id) => document.getElementById(id), data = (id) => element(id).textContent.trim();
  const settings = JSON.parse(data("settings")), { names, colors, classes } = settings, labels = names.map((_, label) => label).slice(1);
  const SIDE = 1600, CACHE = 2 ** 25, hidden = new Set(), images = [], waiting = new Map();
  let chosen, shown, looked, threshold = classes > 2 ? 0 : 0.5, busy = false, questions = 0;

  const helper = new Worker(URL.createObjectURL(new Blob([document.currentScript.textContent])));
  helper.onmessage = ({ data: { id, answer, problem } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (problem) reject(Error(problem)); else resolve(answer);
  };
  const ask = (name, given) => new Promise((resolve, reject) => {
    waiting.set(++questions, { resolve, reject });
    helper.postMessage({ id: questions, name, given });
  });

  const stored = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const unpacked = (base64) => through([stored(base64)], new DecompressionStream("gzip"));
  const fetched = async ([url, integrity]) => {
    const answer = await fetch(url, { integrity, credentials: "omit", referrerPolicy: "no-referrer" });
    return new Uint8Array(await answer.arrayBuffer());
  };
  async function start() {
    say("Loading the network …");
    try {
      const { runtime } = settings, [script, wasm] = await Promise.all(runtime
        ? [fetched(runtime.script), fetched(runtime.wasm)] : [unpacked(data("script")), unpacked(data("wasm"))]);
      await ask("start", { settings, script, wasm, network: await unpacked(data("network")) });
      say("Ready. Choose images, or drop them here; they stay on this computer.");
    } catch (error) {
      const remedy = settings.runtime ? " The page needs the internet for this; one exported with --offline does not." : "";
      say(`The network could not be loaded (${error.message}).${remedy}`);
      throw error;
    }
  }
  const say = (words) => { element("status").textContent = words; };

  async function open(image, infer) {  // fills in its size, its picture if it is the chosen one, its maps if wanted
    await ready;
    const answer = await ask("open", { file: image.file, side: image === chosen ? SIDE : 0, infer });
    Object.assign(image, { own: answer.own, filled: answer.filled, maps: answer.maps ?? image.maps });
    if (image === chosen) image.picture = answer.picture;
    let bytes = images.reduce((sum, one) => sum + (one.maps?.byteLength ?? 0), 0);
    for (const one of images.toReversed()) if (bytes > CACHE && one.maps && one !== image && one !== chosen) {
      bytes -= one.maps.byteLength;
      one.maps = undefined;  // computed again when it is needed
    }
  }
  async function maskOf(image) {
    if (!image.maps) await open(image, true);
    const mask = decide(image.maps, image.filled, image.own, classes, threshold);
    image.counts = new Array(names.length).fill(0);
    for (const label of mask) image.counts[label]++;
    image.threshold = threshold;
    return mask;
  }
  const share = (image, label) => `${(100 * image.counts[label] / (image.own[0] * image.own[1])).toFixed(2)} %`;

  async function segmentAll() {  // one image after the other, the chosen one first
    if (busy) return;
    busy = element("downloads").disabled = true;
    await ready;
    for (let image; (image = [chosen, ...images].find((one) => one && !one.problem && one.threshold !== threshold));) {
      say(`Segmenting ${image.name}: ${images.filter((one) => one.threshold === threshold || one.problem).length + 1} of ${images.length}`);
      try { await maskOf(image); } catch (error) { image.problem = `${image.name} ${error.message}.`; }
      list();
      choose();
      if (image === chosen) await show(image);
    }
    busy = false;
    const bad = images.filter((one) => one.problem).length;
    const problems = bad ? ` ${bad} could not be read: see the list.` : "";
    if (images.length) say(`${images.length - bad} of ${images.length} images segmented.${problems}`);
    element("downloads").disabled = images.length === bad;
  }

  async function look() {  // fills the part "Look inside", where it is unfolded
    if (!element("inside")?.open || looked === shown?.image) return;
    const image = looked = shown.image;
    element("inside-body").hidden = true;
    const { inside } = await ask("open", { file: image.file, side: 0, infer: true, inside: true });
    if (looked !== image || chosen !== image) return;
    element("inside-body").hidden = false;
    fillInside(inside, image.filled, image.picture);
  }
  async function show(image) {
    if (chosen && chosen !== image) chosen.picture = undefined;
    chosen = image;
    element("result").hidden = !image?.counts;
    if (!image?.counts) return;
    if (!image.picture) await open(image, false);
    const mask = await maskOf(image);
    if (chosen !== image || !image.picture) return;
    shown = { image, picture: image.picture, mask };
    draw();
    look();
  }
  function draw() {
    const { image, picture, mask } = shown, { width, height } = picture, [h, w] = image.own;
    const canvas = element("picture"), overlay = new ImageData(new Uint8ClampedArray(picture.data), width, height);
    const opacity = element("opacity").value / 100, thick = Math.max(1, Math.round(Math.max(width, height) / 400));
    const around = element("outline").checked ? [[-thick, 0], [thick, 0], [0, -thick], [0, thick]] : [];
    const across = Int32Array.from({ length: width }, (_, x) => Math.floor((x + 0.5) * w / width));
    const down = Int32Array.from({ length: height }, (_, y) => Math.floor((y + 0.5) * h / height) * w);
    const label = (x, y) => mask[down[Math.min(Math.max(y, 0), height - 1)] + across[Math.min(Math.max(x, 0), width - 1)]];
    for (let y = 0, at = 0; y < height; y++) for (let x = 0; x < width; x++, at += 4) {
      const own = mask[down[y] + across[x]];
      if (!own || hidden.has(own)) continue;
      const part = around.some(([dx, dy]) => label(x + dx, y + dy) !== own) ? 1 : opacity;
      for (let k = 0; k < 3; k++) overlay.data[at + k] = part * colors[own][k] + (1 - part) * overlay.data[at + k];
    }
    Object.assign(canvas, { width, height });
    canvas.getContext("2d").putImageData(overlay, 0, 0);
    canvas.setAttribute("aria-label", `${image.name} with its mask: ${labels.map((k) => `${names[k]} ${share(image, k)}`).join(", ")}`);
    element("caption").textContent = `${image.name}, ${w} × ${h} pixels`;
    for (const k of labels) {
      element(`pixels${k}`).textContent = image.counts[k].toLocaleString("en");
      element(`share${k}`).textContent = share(image, k);
    }
  }

  const make = (kind, properties, ...children) => {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...children);
    return made;
  };
  function list() {
    for (const image of images) {
      image.radio ??= make("input", { type: "radio", name: "image", onchange: () => show(image).then(segmentAll) });
      image.state ??= make("small");
      image.row ??= element("images").appendChild(make("label", {}, image.radio, make("span", { textContent: image.name }), image.state));
      image.state.textContent = image.problem ?? (image.counts ? labels.slice(0, 3).map((k) => share(image, k)).join(" · ") : "waiting");
      image.row.className = image.problem ? "problem" : "";
      image.radio.disabled = Boolean(image.problem);
    }
  }
  function choose() {  // the first image without a problem, if none is chosen
    if (chosen && !chosen.problem) return;
    chosen = images.find((image) => !image.problem);
    if (chosen) chosen.radio.checked = true;
  }
  function add(files) {
    const taken = new Set(images.map((image) => image.name));
    for (const file of files) {
      let name = file.name;
      for (let copy = 2; taken.has(name); copy++) name = file.name.replace(/(\.[^.]*)?$/, ` (${copy})$1`);
      taken.add(name);
      images.push({ file, name });
    }
    list();
    choose();
    segmentAll();
  }

  const save = (name, content, type) => {
    const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  const cell = (value) => {
    const word = /^[=+@\t\r-]/.test(value) ? `'${value}` : String(value);  // a spreadsheet would take it for a formula
    return /[",\r\n]/.test(word) ? `"${word.replaceAll('"', '""')}"` : word;
  };
  function table() {
    const rows = [["file", "width", "height", ...labels.flatMap((k) => [`${names[k]}_pixels`, `${names[k]}_percent`]), "problem"]];
    for (const { name, own, counts, problem } of images) {
      const values = labels.flatMap((k) => (problem ? ["", ""] : [counts[k], (100 * counts[k] / (own[0] * own[1])).toFixed(4)]));
      rows.push([name, own?.[1] ?? "", own?.[0] ?? "", ...values, problem ?? ""]);
    }
    return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
  }
  const maskName = (name) => {
    const stem = name.replace(/\.[^.]*$/, ""), twins = images.filter((image) => image.name.replace(/\.[^.]*$/, "") === stem);
    return `${twins.length > 1 ? name : stem}.png`;
  };
  const png = async (image) => [maskName(image.name), await maskPng(await maskOf(image), image.own, colors)];
  element("mask").onclick = async () => save(...await png(chosen), "image/png");
  element("csv").onclick = () => save("masks.csv", table(), "text/csv");
  element("zip").onclick = async () => {
    const files = [];
    for (const image of images) if (!image.problem) files.push(await png(image));
    save("masks.zip", await zip([...files, ["masks.csv", new TextEncoder().encode(table())]]), "application/zip");
  };

  for (const k of labels) {
    const swatch = make("i", {}), box = make("input", { type: "checkbox", checked: true });
    swatch.style.background = `rgb(${colors[k]})`;
    box.onchange = () => { hidden[box.checked ? "delete" : "add"](k); if (shown) draw(); };
    element("classes").append(make("tr", {}, make("th", { scope: "row" }, make("label", {}, box, swatch, names[k])),
      make("td", { id: `pixels${k}` }), make("td", { id: `share${k}` })));
  }
  for (const id of ["opacity", "outline"]) element(id).oninput = () => { if (shown) draw(); };
  const limit = Object.assign(element("threshold"), { min: classes > 2 ? 0 : 0.01, value: threshold, onchange: segmentAll });
  limit.oninput = () => {
    threshold = Number(limit.value);
    element("limit").textContent = threshold ? threshold.toFixed(2) : "the most probable class";
    if (chosen?.maps) show(chosen);
  };
  limit.oninput();
  element("files").onchange = ({ target }) => { add(target.files); target.value = ""; };
  element("clear").onclick = () => {
    images.splice(0).forEach((image) => image.row.remove());
    chosen = shown = looked = undefined;
    element("downloads").disabled = true;
    show();
    say("Ready.");
  };
  for (const { name, content } of settings.examples) {
    element("examples").append(make("button", { textContent: `Try ${name}`, onclick: () => add([new File([stored(content)], name)]) }));
  }
  const fillInside = settings.inside ? insidePart(settings, element, make) : element("inside").remove();
  if (fillInside) element("inside").ontoggle = look;
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => { event.preventDefault(); add(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => add(event.clipboardData.files));
  const ready = start();
}

if (typeof document === "undefined") worker(); else page();
