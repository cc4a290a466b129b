"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#1f77b4", "#d9622b", "#2ca02c", "#c42f3d", "#8a5fc0", "#8c564b", "#d667ad", "#5f6b6d", "#a5a520", "#17a2b8"];
const DASHES = ["", "6 3", "2 3"];
const WIDTH = 420, HEIGHT = 240, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 34;
const AXES = { tokens: "tokens", step: "steps", hours: "hours of training", flops: "FLOPs" };
const chosen = { axis: "tokens", smooth: 0.9, log: false, hidden: new Set() };
const NEAR = 12; // of the pointer, in the units of WIDTH
const FOLDED = 24; // maps; of more, the later quantities are folded away
const redraw = [];

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g", "image"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const colour = (i) => COLOURS[i % COLOURS.length];
const dash = (i) => DASHES[Math.floor(i / COLOURS.length) % DASHES.length];
const breakable = (name) => name.replace(/[-_/@]|\.(?!\d)/g, "$&\u200b"); // long names break there, and not within a word
const swatch = (i) => make("span", { class: "swatch", style: `background:${colour(i)}` });

function short(value) {
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (size >= limit) return `${Number((value / limit).toPrecision(3))}${unit}`;
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : `${Number(value.toPrecision(4))}`;
}

/* The value of a run's x axis at a step. A phase may change the tokens of a step. */
function place(run, step) {
  if (chosen.axis === "step") return step;
  if (chosen.axis === "hours") return between(run.hours, step);
  const tokens = run.seen[0].length > 1 ? between(run.seen, step) : step * run.tokens;
  if (chosen.axis === "tokens") return tokens;
  return run.flops === null ? null : tokens * (run.flops / run.tokens);
}

/* What is recorded at some steps, at a step between them. */
function between([steps, values], step) {
  let i = steps.findIndex((s) => s >= step);
  if (i === 0) return values[0];
  if (i < 0) i = steps.length - 1;
  if (i === 0) return 0;
  const share = Math.min(1, (step - steps[i - 1]) / Math.max(1, steps[i] - steps[i - 1]));
  return values[i - 1] + share * (values[i] - values[i - 1]);
}

/* An exponential average without the bias towards the first value; only of long curves. */
function smoothed(values) {
  if (values.length < 50 || chosen.smooth === 0) return values;
  let total = 0, weight = 0;
  return values.map((value) => {
    total = chosen.smooth * total + value;
    weight = chosen.smooth * weight + 1;
    return total / weight;
  });
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    if (found.length > 1) return found.filter((_, i) => i % Math.ceil(found.length / 6) === 0);
    return [low, high];
  }
  const step = 10 ** Math.floor(Math.log10((high - low) / 4 || 1));
  const size = [1, 2, 5, 10].map((m) => m * step).find((s) => (high - low) / s <= 5);
  const found = [];
  for (let t = Math.ceil(low / size) * size; t <= high + size * 1e-9; t += size) found.push(Number(t.toPrecision(12)));
  return found;
}

/* Draws lines [{run, x, y, faint, errors}] into a figure; the nearest points are told in its output. */
function plot(figure, lines, options) {
  const svg = figure.querySelector("svg"), output = figure.querySelector("output");
  svg.replaceChildren();
  output.replaceChildren();
  const shown = lines.filter((line) => line.x.length);
  if (!shown.length) {
    svg.append(make("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to draw over this axis"));
    return;
  }
  const logY = options.logY && shown.every((line) => line.y.every((v) => v > 0));
  const xs = shown.flatMap((line) => line.x);
  const ys = shown.filter((line) => !line.faint).flatMap((line) => {
    const skip = options.skip && line.y.length > 50 ? Math.floor(line.y.length / 20) : 0;
    const ends = (v, i) => (line.errors ? [v - line.errors[i], v + line.errors[i]] : [v]);
    return line.y.slice(skip).flatMap(ends).filter((v) => !logY || v > 0);
  });
  const range = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  let [x0, x1] = range(xs), [y0, y1] = range(ys);
  if (x0 === x1) [x0, x1] = options.logX ? [x0 / 2, x1 * 2] : [x0 - (Math.abs(x0) || 1), x1 + (Math.abs(x1) || 1)];
  const fromZero = options.zero && !logY;
  if (fromZero) y0 = Math.min(0, y0);
  if (y1 - y0 < 1e-9 * Math.abs(y1)) y0 = y1;
  const margin = logY ? 0 : (y1 - y0) * 0.05 || Math.abs(y1) * 0.1 || 1;
  if (!logY) [y0, y1] = [fromZero ? y0 : y0 - margin, y1 + margin];
  if (logY && y0 === y1) [y0, y1] = [y0 / 2, y1 * 2];
  const scale = (log) => (log ? Math.log : (v) => v);
  const fx = scale(options.logX), fy = scale(logY);
  const px = (x) => LEFT + ((fx(x) - fx(x0)) / (fx(x1) - fx(x0))) * (WIDTH - LEFT - RIGHT);
  const py = (y) => HEIGHT - BOTTOM - ((fy(y) - fy(y0)) / (fy(y1) - fy(y0))) * (HEIGHT - TOP - BOTTOM);
  for (const tick of ticks(y0, y1, logY)) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(tick), y2: py(tick), stroke: "#e4e4e4" }));
    svg.append(make("text", { x: LEFT - 5, y: py(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  let last = -Infinity;
  const marks = options.logX ? [...new Set(xs)].sort((a, b) => a - b) : ticks(x0, x1, false);
  for (const tick of marks) {
    if (px(tick) - last < 40) continue;
    last = px(tick);
    svg.append(make("text", { x: last, y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, short(tick)));
  }
  svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, stroke: "#888" }));
  svg.append(make("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, options.label));
  const clip = (y) => Math.max(TOP, Math.min(HEIGHT - BOTTOM, y));
  for (const line of shown) {
    const d = line.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${clip(py(line.y[i])).toFixed(1)}`).join("");
    const style = { d, fill: "none", stroke: colour(line.run), "stroke-width": line.faint ? 0.6 : 1.6 };
    svg.append(make("path", { ...style, opacity: line.faint ? 0.3 : 1, "stroke-dasharray": dash(line.run) }));
    if (line.faint || line.x.length > 30) continue;
    line.x.forEach((x, i) => {
      svg.append(make("circle", { cx: px(x), cy: clip(py(line.y[i])), r: 2.4, fill: colour(line.run) }));
      const error = line.errors && line.errors[i];
      if (error) svg.append(make("line", { x1: px(x), x2: px(x), y1: clip(py(line.y[i] - error)), y2: clip(py(line.y[i] + error)), stroke: colour(line.run) }));
    });
  }
  const cursor = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "#888", "stroke-dasharray": "2 2", visibility: "hidden" });
  svg.append(cursor);
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const found = shown.filter((line) => !line.faint).map((line) => {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(px(x) - at) < Math.abs(px(line.x[best]) - at)) best = i; });
      return { line, best, x: line.x[best] };
    });
    const nearest = found.reduce((a, b) => (Math.abs(px(b.x) - at) < Math.abs(px(a.x) - at) ? b : a)).x;
    // a run that has ended long before, or begins after, has nothing to say here
    const there = found.filter(({ line }) => at > px(line.x[0]) - NEAR && at < px(line.x.at(-1)) + NEAR);
    cursor.setAttribute("x1", px(nearest));
    cursor.setAttribute("x2", px(nearest));
    cursor.setAttribute("visibility", "visible");
    output.replaceChildren(`${short(nearest)} ${options.label}`, ...there.map(({ line, best }) => make("div", {}, swatch(line.run),
      ` ${data.runs[line.run].name}: ${short(line.y[best])}${line.errors ? ` ± ${short(line.errors[best])}` : ""}`)));
  };
  svg.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); output.replaceChildren(); };
}

function figure(title) {
  return make("figure", {}, make("figcaption", {}, breakable(title)),
    make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title }), make("output"));
}

function visible() {
  return data.runs.map((run, i) => [run, i]).filter(([run]) => !chosen.hidden.has(run.name));
}

function seriesFigure(key) {
  const node = figure(key);
  redraw.push(() => {
    const lines = [];
    for (const [run, i] of visible()) {
      if (!run.series[key]) continue;
      const [steps, values] = run.series[key];
      const kept = steps.map((step, j) => [place(run, step), values[j]]).filter(([x]) => x !== null);
      const x = kept.map(([at]) => at), y = kept.map(([, value]) => value);
      const mean = key === "lr" ? y : smoothed(y);
      if (mean !== y) lines.push({ run: i, x, y, faint: true });
      lines.push({ run: i, x, y: mean });
    }
    const zero = key === "tokens_per_second" || key === "data_share";
    plot(node, lines, { label: AXES[chosen.axis], logY: chosen.log, skip: key === "loss", zero });
  });
  return node;
}

function curveFigure(key) {
  const node = figure(key.replace("evaluation/", ""));
  redraw.push(() => {
    const lines = visible().filter(([run]) => run.curves[key]).map(([run, i]) => {
      const errors = run.curves[`${key}_stderr`];
      return { run: i, x: run.curves[key][0], y: run.curves[key][1], errors: errors && errors[1].length === run.curves[key][1].length ? errors[1] : null };
    });
    plot(node, lines, { label: key.includes("position") ? "tokens before it, up to" : "length", logX: true, logY: chosen.log });
  });
  return node;
}

/* What a quantity of telemetry is, and whether its colours follow the logarithm. */
const QUANTITIES = {
  half_life_p10: ["half-life, 10 % quantile (tokens)", true],
  half_life_p50: ["half-life, median (tokens)", true],
  half_life_p90: ["half-life, 90 % quantile (tokens)", true],
  beta: ["gain β, mean", false],
  key_write: ["k·k̃, mean", false],
  write: ["write β k·k̃, mean", false],
  write_max: ["write β k·k̃, largest", false],
  B: ["B, mean", false],
  B_spread: ["B, spread over channels", false],
  saturated: ["B, share at its bounds", false],
  log_A: ["log A, median", false],
  log_A_minus_mu: ["log A − μ, median", false],
  S_norm: ["‖S‖", true],
  S_rank: ["effective rank of S", false],
  attention_entropy: ["entropy of attention (nats)", false],
};
const inOrder = (keys) => {
  const names = Object.keys(QUANTITIES), place = (key) => (key in QUANTITIES ? names.indexOf(key) : names.length);
  return [...keys].sort((a, b) => place(a) - place(b));
};
const GREY = "rgb(200,200,200)";

/* From blue (the least) over white to red (the most); grey for what is not finite. */
function shade(value, low, high, log) {
  if (value === null) return GREY;
  const f = log ? Math.log : (v) => v;
  const t = high === low ? 0.5 : (f(value) - f(low)) / (f(high) - f(low)), away = Math.abs(t - 0.5) * 2;
  const other = Math.round(245 - 175 * away);
  return t < 0.5 ? `rgb(${other},${other},245)` : `rgb(245,${other},${other})`;
}

/* One pixel a value: thousands of rectangles would keep a telephone busy. */
function pixels(values, colourOf) {
  const canvas = document.createElement("canvas");
  canvas.width = values[0].length;
  canvas.height = values.length;
  const pen = canvas.getContext("2d");
  values.forEach((row, r) => row.forEach((value, c) => { pen.fillStyle = colourOf(value); pen.fillRect(c, r, 1, 1); }));
  return canvas.toDataURL();
}

/* The least and the largest value of a quantity in all runs: its maps have the same colours. */
function limits(key) {
  const known = data.runs.flatMap((run) => (run.maps[key] ? run.maps[key].values.flat() : [])).filter((value) => value !== null);
  return known.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
}

/* Rows are layers, or layer.head; columns steps. */
function mapFigure(run, key, title, [low, high]) {
  const map = run.maps[key], wide = (QUANTITIES[key] || [])[1];
  const node = figure(title), svg = node.querySelector("svg");
  const log = wide && low > 0, range = [WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
  const width = range[0] / map.steps.length, height = range[1] / map.rows.length;
  svg.append(make("image", {
    x: LEFT, y: TOP, width: range[0], height: range[1], preserveAspectRatio: "none", style: "image-rendering:pixelated",
    href: pixels(map.values, (value) => shade(value, low, high, log)),
  }));
  const layers = map.rows.map((row) => row.split(".")[0]);
  const first = layers.flatMap((layer, r) => (r === 0 || layer !== layers[r - 1] ? [r] : []));
  const each = Math.ceil(first.length / 12);
  first.forEach((r, i) => {
    if (r > 0 && first.length < map.rows.length) svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: TOP + r * height, y2: TOP + r * height, stroke: "#fff", "stroke-width": 0.6 }));
    if (i % each === 0) svg.append(make("text", { x: LEFT - 5, y: TOP + (r + 0.5) * height + 4, "text-anchor": "end" }, layers[r]));
  });
  svg.append(make("text", { x: 11, y: TOP + range[1] / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${TOP + range[1] / 2})` }, "layer"));
  for (const [step, row] of map.alarms || []) {
    const c = Math.max(0, map.steps.findIndex((s) => s >= step)), r = map.rows.indexOf(row);
    svg.append(make("circle", { cx: LEFT + (c + 0.5) * width, cy: TOP + (r + 0.5) * height, r: 5, fill: "none", stroke: "#000", "stroke-width": 1.6 }));
  }
  svg.append(make("text", { x: LEFT, y: HEIGHT - 18 }, short(map.steps[0])));
  svg.append(make("text", { x: WIDTH - RIGHT, y: HEIGHT - 18, "text-anchor": "end" }, short(map.steps.at(-1))));
  const scale = low === high ? `${short(low)} throughout` : low < high ? `from ${short(low)} (blue) to ${short(high)} (red)${log ? ", logarithmic" : ""}` : "nothing finite";
  svg.append(make("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, `steps · ${scale}`));
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const c = Math.floor((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / width);
    const r = Math.floor((((event.clientY - box.top) / box.height) * HEIGHT - TOP) / height);
    const value = map.values[r] && map.values[r][c];
    const [layer, head] = (map.rows[r] || "").split(".");
    node.querySelector("output").textContent = value === undefined ? ""
      : `layer ${layer}${head === undefined ? "" : `, head ${head}`}, step ${map.steps[c]}: ${value === null ? "not finite" : short(value)}`;
  };
  return node;
}

/* The maps of a quantity side by side, a heading for each where there are several runs. */
function mapSections() {
  const runs = data.runs.filter((run) => Object.keys(run.maps).length), keys = inOrder(data.charts.maps);
  const title = (key) => (QUANTITIES[key] || [key])[0];
  if (runs.length === 1) return [make("div", { class: "charts" }, ...keys.map((key) => mapFigure(runs[0], key, title(key), limits(key))))];
  return keys.map((key, i) => make("details", i === 0 || keys.length * runs.length <= FOLDED ? { open: "" } : {},
    make("summary", {}, title(key)), make("div", { class: "charts" },
      ...runs.filter((run) => run.maps[key]).map((run) => mapFigure(run, key, run.name, limits(key))))));
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));

function table(head, rows) {
  return make("div", { class: "wide" }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", {}, cell)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => (cell instanceof Node ? cell : make("td", {}, cell))))))));
}

const heads = () => data.runs.map((run, i) => make("span", {}, swatch(i), ` ${breakable(run.name)}`));

function resultRows() {
  return data.results.map(({ key, values, errors }) => {
    const lower = /perplexity|loss|bits_per_byte|ppl/.test(key);
    const given = values.filter((v) => v !== null);
    const best = given.length > 1 ? Math[lower ? "min" : "max"](...given) : null;
    return [key, ...values.map((value, i) => make("td", { class: value === best && value !== null ? "number best" : "number" },
      value === null ? "–" : `${short(value)}${errors[i] === null ? "" : ` ± ${short(errors[i])}`}`))];
  });
}

function eventRows() {
  const rows = data.runs.flatMap((run, i) => run.events.map((event) => ({ ...event, run, i })));
  return rows.sort((a, b) => a.step - b.step).map((event) => [
    make("td", { class: "number" }, `${event.step}`), make("td", {}, swatch(event.i), ` ${breakable(event.run.name)}`),
    make("td", { class: event.kind }, event.kind), event.text]);
}

function controls() {
  const draw = () => redraw.forEach((each) => each());
  const axis = make("select", { onchange: (e) => { chosen.axis = e.target.value; draw(); } },
    ...Object.entries(AXES).map(([key, name]) => make("option", { value: key }, name)));
  const smooth = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: chosen.smooth, oninput: (e) => { chosen.smooth = Number(e.target.value); draw(); } });
  const log = make("input", { type: "checkbox", onchange: (e) => { chosen.log = e.target.checked; draw(); } });
  const runs = data.runs.map((run, i) => make("label", {}, make("input", { type: "checkbox", checked: "", onchange: (e) => {
    chosen.hidden[e.target.checked ? "delete" : "add"](run.name); draw();
  } }), swatch(i), run.name));
  return make("div", { class: "bar" }, make("label", {}, "over", axis), make("label", {}, "smooth", smooth), make("label", {}, log, "log y"), ...runs);
}

function section(title, ...content) {
  return [make("h2", {}, title), ...content];
}

const main = document.getElementById("report");
main.append(make("h1", {}, document.title), controls());
main.append(...section("Runs", table(["", ...heads()], data.runs[0].about.map(([name], row) => [name, ...data.runs.map((run) => breakable(run.about[row][1]))]))));
main.append(...section("Training", make("div", { class: "charts" }, ...data.charts.series.map(seriesFigure))));
if (data.charts.curves.length) main.append(...section("Over lengths and positions", make("div", { class: "charts" }, ...data.charts.curves.map(curveFigure))));
if (data.results.length) main.append(...section("Evaluation: the last result of each", table(["", ...heads()], resultRows())));
if (data.charts.maps.length) main.append(...section("Inside the layers", ...mapSections()));
if (data.order.length) main.append(...section("Order of the samples", ...data.order.map((line) => make("p", {}, line))));
if (data.differences.length) main.append(...section("Differences of configuration", table(["", ...heads()],
  data.differences.map(([key, ...values]) => [breakable(key), ...values.map(breakable)]))));
const happened = table(["step", "run", "", ""], eventRows());
happened.className = "events";
main.append(...section("Events", happened));
redraw.forEach((each) => each());
