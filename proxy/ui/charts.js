// Curves over the last minutes. One crosshair goes through all of them; the legends tell the values under it.

import { each, el, say, set, svg } from "./dom.js";
import { ago, rate, round, span } from "./format.js";

const CHARTS = [
  {
    title: "Requests",
    tell: (value) => `${rate(value)}/s`,
    curves: [
      { column: "served", name: "served", look: "ink", area: true },
      { column: "failed", name: "failed", look: "bad", rare: true },
      { column: "refused", name: "refused", look: "faint", rare: true },
      { column: "left", name: "left", look: "mid", rare: true },
    ],
  },
  {
    title: "First token",
    tell: span,
    curves: [
      { column: "ttft_p99", name: "p99", look: "faint" },
      { column: "ttft_p95", name: "p95", look: "mid" },
      { column: "ttft_p50", name: "median", look: "ink" },
    ],
  },
  {
    title: "Output tokens",
    tell: (value) => `${rate(value)}/s`,
    curves: [{ column: "tokens", name: "", look: "decode", area: true }],
  },
  {
    title: "Stages, on average",
    tell: span,
    curves: [
      { column: "encode", name: "encode", look: "encode" },
      { column: "prefill", name: "prefill", look: "prefill" },
      { column: "token", name: "per token", look: "decode" },
    ],
  },
];
const LEAST = 60; // seconds shown
const STEPS = [15, 30, 60, 120, 180]; // seconds between two marks of time
const HEIGHT = 132;
const MARGIN = { top: 8, right: 2, bottom: 20, left: 46 };

export function makeCharts(parent) {
  let curves = null;
  let pointed = null; // seconds before the last point; null: nobody points
  const drawn = CHARTS.map((spec) => makeChart(spec));
  const draw = () => {
    if (!curves) return;
    const shown = visible(curves);
    for (const chart of drawn) drawChart(chart, curves, shown, pointed);
  };
  const point = (seconds) => {
    pointed = seconds;
    draw();
  };
  for (const chart of drawn) {
    parent.append(chart.node);
    listen(chart, point, () => ({ pointed, curves, shown: curves && visible(curves) }));
  }
  new ResizeObserver(draw).observe(parent);
  return (latest) => {
    curves = latest;
    draw();
  };
}

function makeChart(spec) {
  const grid = svg("g", { class: "grid" });
  const times = svg("g");
  const lines = svg("g");
  const cross = svg("g", {}, svg("line"), svg("text", { "text-anchor": "middle" }));
  const look = { height: HEIGHT, role: "img", tabindex: "0", "aria-roledescription": "chart" };
  const picture = svg("svg", look, grid, times, lines, cross);
  const legend = el("p", { class: "legend" });
  const node = el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, spec.title), legend), picture);
  return { spec, node, picture, grid, times, lines, cross, legend };
}

// How many of the latest points there is something to see in.
function visible(curves) {
  const { columns, span: step } = curves;
  const outcomes = ["served", "failed", "refused", "left"].map((name) => columns[name]);
  const all = columns.served.length;
  const first = columns.served.findIndex((_, place) => outcomes.some((column) => column[place] > 0));
  return Math.min(all, Math.max(first < 0 ? 0 : all - first + 1, Math.ceil(LEAST / step) + 1));
}

function drawChart(chart, curves, shown, pointed) {
  const { spec, picture, grid, times, lines, cross, legend } = chart;
  const width = picture.clientWidth;
  if (!width) return;
  const step = curves.span;
  const all = spec.curves.map((curve) => [curve, curves.columns[curve.column].slice(-shown)]);
  const told = all.filter(([curve, column]) => !curve.rare || column.some((value) => value > 0));
  const columns = told.map(([, column]) => column);
  const top = ceiling(Math.max(0, ...columns.flat().map((value) => value ?? 0)));
  const x = (place) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * place) / (shown - 1);
  const y = (value) => HEIGHT - MARGIN.bottom - ((HEIGHT - MARGIN.top - MARGIN.bottom) * value) / top;
  set(picture, "viewBox", `0 0 ${width} ${HEIGHT}`);
  drawGrid(grid, spec, top, width, y);
  drawTimes(times, (shown - 1) * step, (mark) => x(shown - 1 - mark / step));
  each(lines, told, ([curve]) => curve.column, makeCurve, (node, [curve, column]) => {
    set(node.firstChild, "d", curve.area ? path(column, x, y, HEIGHT - MARGIN.bottom) : null);
    set(node.lastChild, "d", path(column, x, y));
  });
  const place = pointed === null ? shown - 1 : Math.max(0, shown - 1 - Math.round(pointed / step));
  drawCross(cross, x(place), pointed);
  set(times, "class", pointed === null ? null : "off");
  const values = told.map(([curve, column]) => [curve, spec.tell(column[place])]);
  tell(legend, values);
  const said = values.map(([curve, value]) => `${curve.name} ${value}`.trim());
  set(picture, "aria-label", `${spec.title}, ${pointed === null ? "now" : `${ago(pointed)} ago`}: ${said.join(", ")}`);
}

function drawGrid(grid, spec, top, width, y) {
  const make = () => svg("g", {}, svg("line"), svg("text", { "text-anchor": "end" }));
  each(grid, [0, 0.5, 1], (part) => part, make, (node, part) => {
    const [line, label] = node.children;
    const at = y(top * part);
    put(line, { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at });
    put(label, { x: MARGIN.left - 8, y: at + 4 });
    say(label, part ? round(spec.tell(top * part)).replace("/s", "") : "0");
  });
}

function drawCross(cross, x, pointed) {
  const [line, label] = cross.children;
  set(cross, "class", pointed === null ? "cross off" : "cross");
  put(line, { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
  put(label, { x, y: HEIGHT - 4 });
  say(label, pointed ? `${ago(pointed)} ago` : "now");
}

function drawTimes(times, seconds, x) {
  const step = STEPS.find((step) => seconds / step <= 4) ?? seconds / 4;
  const marks = Array.from({ length: Math.floor(seconds / step) + 1 }, (_, number) => number * step);
  each(times, marks, (mark) => mark, () => svg("text"), (label, mark) => {
    put(label, { x: x(mark), y: HEIGHT - 4 });
    set(label, "text-anchor", mark === 0 ? "end" : x(mark) < MARGIN.left + 30 ? "start" : "middle");
    say(label, mark ? `${ago(mark)} ago` : "now");
  });
}

function makeCurve([curve]) {
  const [area, line] = ["area", "line"].map((name) => svg("path", { class: name }));
  return svg("g", { class: `curve look-${curve.look}` }, area, line);
}

function path(column, x, y, floor) {
  let found = "";
  let begin = -1;
  column.forEach((value, place) => {
    if (value === null) {
      if (begin >= 0 && floor) found += `V${floor}H${x(begin).toFixed(1)}Z`;
      begin = -1;
      return;
    }
    found += `${begin < 0 ? "M" : "L"}${x(place).toFixed(1)} ${y(value).toFixed(1)}`;
    if (begin < 0) begin = place;
  });
  if (begin >= 0 && floor) found += `V${floor}H${x(begin).toFixed(1)}Z`;
  return found;
}

function put(node, places) {
  for (const [name, value] of Object.entries(places)) set(node, name, value.toFixed(1));
}

// The next round number, of which half is one too.
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((step) => step * power >= value * 0.9999);
}

function tell(legend, values) {
  const make = ([curve]) => el("span", { class: `look-${curve.look}` }, el("i"), el("span"), " ", el("b"));
  each(legend, values, ([curve]) => curve.column, make, (node, [curve, value]) => {
    say(node.children[1], curve.name);
    say(node.lastChild, value);
  });
}

function listen(chart, point, present) {
  const { picture } = chart;
  const move = (event) => {
    const { curves, shown } = present();
    if (!curves) return;
    const box = picture.getBoundingClientRect();
    const part = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    point((1 - Math.min(1, Math.max(0, part))) * (shown - 1) * curves.span);
  };
  picture.addEventListener("pointermove", move);
  picture.addEventListener("pointerleave", () => point(null));
  picture.addEventListener("blur", () => point(null));
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: 1, ArrowRight: -1, PageUp: 10, PageDown: -10 }[event.key];
    const { pointed, curves, shown } = present();
    if (event.key === "Escape") point(null);
    if (!by || !curves) return;
    event.preventDefault();
    const moved = (pointed ?? 0) + by * curves.span;
    point(moved < 0 ? null : Math.min(moved, (shown - 1) * curves.span));
  });
}
