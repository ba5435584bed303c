
// ---- Look inside: the attention of the query tokens, in the terms and numbers of the widget TokenExplorer ----
const TO_FEATURE = "token_to_feature", FROM_FEATURE = "feature_to_token";

function tokenMap(weights, { heads, count }, token, head, direction) {  // [heads, queries, keys] -> [pixels]; head 0: mean
  const pixels = weights.length / heads / count, map = new Float32Array(pixels), chosen = head ? [head - 1] : [...Array(heads).keys()];
  for (const h of chosen) for (let n = 0; n < pixels; n++) {
    map[n] += weights[direction === TO_FEATURE ? (h * count + token) * pixels + n : (h * pixels + n) * count + token] / chosen.length;
  }
  return map;
}

function summary(map, columns, stride, wins, size) {  // over the pixels of the image [size, size]; wins: pixel -> true or false
  const found = { least: Infinity, most: -Infinity, sum: 0, inside: 0, area: 0 };
  for (let y = 0, at = 0; y < size; y++) for (let x = 0; x < size; x++, at++) {
    const share = map[Math.floor(y / stride) * columns + Math.floor(x / stride)];
    found.least = Math.min(found.least, share);
    found.most = Math.max(found.most, share);
    found.sum += share;
    if (wins(at)) { found.inside += share; found.area++; }
  }
  return found;
}

function sentence({ least, most, sum, inside, area }, size, direction, token, even) {
  const percent = (part) => `${Math.round(100 * part)} %`, all = size * size;
  const won = (words) => (area ? words : "it wins no pixel");
  return direction === TO_FEATURE
    ? `the largest weight of ${token} is ${(most * all / sum).toFixed(1)} times the mean; ${
      won(`the ${percent(area / all)} of the pixels that it wins get ${percent(inside / sum)} of its attention`)}.`
    : `pixels give ${token} shares of ${least.toFixed(3)} to ${most.toFixed(3)} (even: ${even.toFixed(3)}); ${
      won(`those that it wins give ${(inside / area).toFixed(3)} on average`)}.`;
}

// -> a function of the network's outputs, the rows and columns that an image fills, and an ImageData to show
function insidePart({ names, classes, size, inside: { depths, heads, heat } }, element, make) {
  const tokens = names.slice(-classes), shape = { heads, count: tokens.length }, padded = Math.ceil(size / 32) * 32;
  const canvas = element("gaze"), value = (id) => element(id).value, mark = { x: 0, y: 0 };
  let outputs, filled, paper;

  const mapOf = (stride, block, token, head, direction) => tokenMap(outputs[`stride${stride}.${block}.${direction}`], shape, token, head, direction);
  const logit = (token, pixel) => outputs.logits[token * size * size + pixel];
  const label = (pixel) => (classes === 1 ? Number(logit(0, pixel) > 0)
    : tokens.reduce((best, _, token) => (logit(token, pixel) > logit(best, pixel) ? token : best), 0));
  const options = (id, choices) => element(id).replaceChildren(
    ...choices.map(([key, words]) => make("option", { value: key, textContent: words })));

  function fit() {  // a stage with fewer blocks shows its last one; the final attention has one direction
    const block = value("block"), depth = depths[value("stride")];
    options("block", [...Array.from({ length: depth }, (_, k) => [`block${k + 1}`, k + 1]), ["final", "final"]]);
    element("block").value = block === "final" || !depth ? "final" : `block${Math.min(block.slice(5), depth)}`;
    element("direction").options[1].disabled = value("block") === "final";
    if (value("block") === "final") element("direction").value = TO_FEATURE;
  }

  function paint(map, columns, stride, { least, most }) {
    const cells = new OffscreenCanvas(columns, columns), colors = new ImageData(columns, columns);
    map.forEach((share, at) => {
      const color = most > least ? Math.round(255 * (share - least) / (most - least)) : 0;
      colors.data.set([...heat[Math.min(Math.max(color, 0), 255)], 255], 4 * at);
    });
    cells.getContext("2d").putImageData(colors, 0, 0);
    const [h, w] = filled, scale = 800 / Math.max(paper.width, paper.height);
    const [width, height] = [paper.width, paper.height].map((length) => Math.max(1, Math.round(length * scale)));
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d"), x = (mark.x + 0.5) / w * width, y = (mark.y + 0.5) / h * height;
    context.drawImage(paper, 0, 0, width, height);
    Object.assign(context, { imageSmoothingEnabled: false, globalAlpha: 0.6 });
    context.drawImage(cells, 0, 0, w / stride, h / stride, 0, 0, width, height);
    context.globalAlpha = 1;
    for (const [strokeStyle, lineWidth] of [["#000", 8], ["#fff", 3]]) {
      Object.assign(context, { strokeStyle, lineWidth });
      context.stroke(new Path2D(`M${x - 20} ${y}H${x + 20}M${x} ${y - 20}V${y + 20}`));
    }
  }

  function draw() {
    fit();
    const [stride, token, head] = ["stride", "token", "head"].map((id) => Number(value(id)));
    const [block, direction] = [value("block"), value("direction")], columns = padded / stride, name = tokens[token];
    const map = mapOf(stride, block, token, head, direction), own = token + names.length - tokens.length;
    const found = summary(map, columns, stride, (pixel) => label(pixel) === own, size);
    paint(map, columns, stride, found);

    const pixel = mark.y * size + mark.x, cell = Math.floor(mark.y / stride) * columns + Math.floor(mark.x / stride);
    const title = direction === TO_FEATURE ? `Attention of ${name} to pixels` : `Attention of pixels to ${name}`;
    const place = `pixel (${mark.x}, ${mark.y})`, here = map[cell].toPrecision(3), depth = depths[stride];
    const texts = { "gaze-title": title, here, least: found.least.toPrecision(3), most: found.most.toPrecision(3),
      pixel: `Class of ${place}: ${names[label(pixel)]}`,
      looked: `Stride ${stride}, ${block.replace("block", "block ")}, ${head ? `head ${head}` : "all heads"}: ${
        sentence(found, size, direction, name, 1 / tokens.length)}` };
    for (const [id, words] of Object.entries(texts)) element(id).textContent = words;
    canvas.setAttribute("aria-label", `${title}: ${here} at ${place}, which a cross marks`);
    const last = block === "final" ? `block${depth}` : block;  // the final attention has no shares
    element("shares").replaceChildren(...tokens.map((word, k) => make("tr", {}, make("th", { scope: "row", textContent: word }),
      make("td", { textContent: logit(k, pixel).toFixed(3) }),
      make("td", { textContent: depth ? mapOf(stride, last, k, head, FROM_FEATURE)[cell].toFixed(3) : "none" }))));
    Object.entries(mark).forEach(([axis, at]) => { element(axis).value = at; });
  }

  function move(x, y) {
    const within = (at, length) => Math.min(Math.max(Math.floor(at) || 0, 0), length - 1);
    Object.assign(mark, { x: within(x, filled[1]), y: within(y, filled[0]) });
    draw();
  }
  canvas.onpointerdown = canvas.onpointermove = (event) => {  // a finger that moves scrolls
    if (!event.buttons || (event.type === "pointermove" && event.pointerType !== "mouse")) return;
    const { width, height, clientWidth, clientHeight } = canvas, scale = Math.min(clientWidth / width, clientHeight / height);
    move(((event.offsetX - clientWidth / 2) / scale / width + 0.5) * filled[1],
      ((event.offsetY - clientHeight / 2) / scale / height + 0.5) * filled[0]);
  };
  for (const axis of ["x", "y"]) element(axis).onchange = () => move(value("x"), value("y"));
  for (const id of ["stride", "token", "block", "head", "direction"]) element(id).onchange = draw;
  options("token", tokens.map((name, k) => [k, name]));
  options("head", [[0, "mean"], ...Array.from({ length: heads }, (_, k) => [k + 1, k + 1])]);
  element("token").value = tokens.length - 1;
  const bar = new ImageData(256, 1);
  heat.forEach((color, at) => bar.data.set([...color, 255], 4 * at));
  element("bar").getContext("2d").putImageData(bar, 0, 0);

  return (given, ownFilled, picture) => {
    [outputs, filled, paper] = [given, ownFilled, new OffscreenCanvas(picture.width, picture.height)];
    const gray = new ImageData(new Uint8ClampedArray(picture.data), picture.width, picture.height);
    for (let at = 0; at < gray.data.length; at += 4) {
      gray.data.fill(0.299 * gray.data[at] + 0.587 * gray.data[at + 1] + 0.114 * gray.data[at + 2], at, at + 3);
    }
    paper.getContext("2d").putImageData(gray, 0, 0);
    Object.assign(element("x"), { max: filled[1] - 1 });
    Object.assign(element("y"), { max: filled[0] - 1 });
    move(filled[1] / 2, filled[0] / 2);
  };
}
