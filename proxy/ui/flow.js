// The picture above the columns: who hands what to whom, how much of it in a second.

import { each, el, say, set, svg } from "./dom.js";
import { rate } from "./format.js";
import { LETTERS, PATHS } from "./stages.js";

const CLIENTS = "clients";
const ANSWERS = "answers";
const RADIUS = 17;
const ARC = 46; // how high a stage is passed over
const NARROW = 640;

export function makeFlow(figure) {
  const edges = svg("g");
  const nodes = svg("g");
  const picture = svg("svg", { role: "img" }, edges, nodes);
  const caption = el("figcaption", { class: "hidden" });
  figure.append(picture, caption);
  let last = null;
  const draw = (roles, now) => {
    last = [roles, now];
    const width = figure.clientWidth;
    if (!width) return;
    const shape = layout(roles, width);
    const flows = flowing(roles, now);
    picture.setAttribute("viewBox", `0 0 ${width} ${shape.height}`);
    each(edges, flows, (flow) => `${flow.from}>${flow.to}`, makeEdge, (node, flow) => changeEdge(node, flow, shape));
    each(nodes, roles, (role) => role, makeNode, (node, role) => placeNode(node, shape.at[role], shape.base));
    const told = flows.filter((flow) => flow.rate).map((flow) => `${flow.from} to ${flow.to}: ${flow.what(false)}`);
    say(caption, told.join("; ") || "Nothing flows.");
    set(picture, "aria-label", caption.textContent);
  };
  new ResizeObserver(() => last && draw(...last)).observe(figure);
  return draw;
}

function layout(roles, width) {
  const at = { [CLIENTS]: 0, [ANSWERS]: width };
  roles.forEach((role, place) => (at[role] = (width * (place + 0.5)) / roles.length));
  const order = [CLIENTS, ...roles, ANSWERS];
  return { at, order, base: 74, height: 100, narrow: width < NARROW };
}

// What goes from where to where, at least along the line of all stages.
function flowing(roles, now) {
  const found = new Map();
  const flow = (from, to) => {
    const key = `${from}>${to}`;
    if (!found.has(key)) found.set(key, { from, to, rate: 0 });
    return found.get(key);
  };
  const line = [CLIENTS, ...roles.filter((role) => role !== "both" || roles.length < 3), ANSWERS];
  line.slice(1).forEach((to, place) => flow(line[place], to));
  for (const [path, stages] of Object.entries(PATHS)) {
    const stops = [CLIENTS, ...stages, ANSWERS];
    if (!now[path] || !stages.every((role) => roles.includes(role))) continue;
    stops.slice(1).forEach((to, place) => (flow(stops[place], to).rate += now[path]));
  }
  const all = [...found.values()];
  for (const one of all) one.what = (short) => described(one, all, now, short);
  return all;
}

function described(flow, all, now, short) {
  if (!flow.rate) return "";
  const part = flow.rate / all.filter((other) => (flow.to === ANSWERS ? other.to : other.from) === (flow.to === ANSWERS ? ANSWERS : flow.from)).reduce((sum, other) => sum + other.rate, 0);
  if (flow.to === ANSWERS) return `${rate((now.tokens ?? 0) * part)} ${short ? "tok/s" : "tokens/s"}`;
  if (flow.from === CLIENTS) return short ? `${rate(flow.rate)}/s` : `${rate(flow.rate)} requests/s`;
  if (flow.from === "encode") return short ? `${rate((now.items ?? 0) * part)}/s` : `${rate((now.items ?? 0) * part)} items/s`;
  return short ? `${rate(flow.rate)}/s` : `${rate(flow.rate)} KV/s`;
}

function makeEdge(flow) {
  const stage = flow.to === ANSWERS ? flow.from : flow.to;
  return svg(
    "g",
    { class: `edge stage-${stage}` },
    svg("path", { class: "band" }),
    svg("path", { class: "dots" }),
    svg("text", { "text-anchor": "middle" }),
  );
}

function changeEdge(node, flow, shape) {
  const [band, dots, label] = node.children;
  const { at, order, base, narrow } = shape;
  const passed = order.indexOf(flow.to) - order.indexOf(flow.from) - 1;
  const begin = at[flow.from] + (flow.from === CLIENTS ? 0 : RADIUS + 3);
  const end = at[flow.to] - (flow.to === ANSWERS ? 0 : RADIUS + 3);
  const middle = (begin + end) / 2;
  let line, y;
  if (passed) {
    // Leaves and arrives level, and has its top over what it passes.
    const top = base - ARC - 8 * (passed - 1);
    const bend = Math.min(0.5 * (end - begin), 110);
    line = `M${begin} ${base - 6}C${begin + bend} ${base - 6} ${middle - bend} ${top} ${middle} ${top}S${end - bend} ${base - 6} ${end} ${base - 6}`;
    y = top - 9;
  } else {
    line = `M${begin} ${base}H${end}`;
    y = base - 10;
  }
  set(band, "d", line);
  set(dots, "d", line);
  set(band, "stroke-width", flow.rate ? Math.min(11, 2 + 1.4 * Math.log2(1 + flow.rate)).toFixed(1) : 1);
  set(node, "data-speed", flow.rate ? (flow.rate < 2 ? "slow" : flow.rate < 20 ? "brisk" : "fast") : "none");
  set(label, "x", middle.toFixed(1));
  set(label, "y", y.toFixed(1));
  say(label, flow.what(narrow));
}

function makeNode(role) {
  return svg(
    "g",
    { class: `node stage-${role}` },
    svg("circle", { r: RADIUS }),
    svg("text", { "text-anchor": "middle", dy: "0.36em" }, LETTERS[role]),
  );
}

function placeNode(node, x, y) {
  set(node, "transform", `translate(${x.toFixed(1)} ${y})`);
}
