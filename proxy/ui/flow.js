// The picture above the columns: who hands what to whom, how much of it in a second.

import { each, el, say, set, svg } from "./dom.js";
import { rate } from "./format.js";
import { LETTERS, PATHS } from "./stages.js";

const CLIENTS = "clients";
const ANSWERS = "answers";
const RADIUS = 17;
const ARC = 40; // how high one stage is passed over
const HIGHER = 24; // for each more
const UNDER = 34; // for what is written under the line
const NARROW = 230; // pixels for a stage; below that, labels are short

export function makeFlow(figure) {
  const edges = svg("g");
  const labels = svg("g");
  const nodes = svg("g");
  const picture = svg("svg", { role: "img" }, edges, labels, nodes);
  const caption = el("figcaption", { class: "hidden" });
  figure.append(picture, caption);
  let last = null;
  const draw = (roles, now) => {
    last = [roles, now];
    const width = figure.clientWidth;
    if (!width) return;
    const flows = flowing(roles, now);
    const shape = layout(roles, flows, width);
    set(picture, "viewBox", `0 0 ${width} ${shape.base + UNDER}`);
    set(picture, "height", shape.base + UNDER);
    const key = (flow) => `${flow.from}>${flow.to}`;
    each(edges, flows, key, makeEdge, (node, flow) => changeEdge(node, flow, shape));
    each(labels, flows, key, () => svg("text"), (node, flow) => changeLabel(node, flow, shape));
    each(nodes, roles, (role) => role, makeNode, (node, role) => placeNode(node, shape.at[role], shape.base));
    const told = flows.filter((flow) => flow.rate).map((flow) => `${flow.from} to ${flow.to}: ${flow.what(false)}`);
    say(caption, told.join("; ") || "Nothing flows.");
    set(picture, "aria-label", caption.textContent);
  };
  new ResizeObserver(() => last && draw(...last)).observe(figure);
  return draw;
}

function layout(roles, flows, width) {
  const at = { [CLIENTS]: 0, [ANSWERS]: width };
  roles.forEach((role, place) => (at[role] = (width * (place + 0.5)) / roles.length));
  const order = [CLIENTS, ...roles, ANSWERS];
  const passed = (flow) => order.indexOf(flow.to) - order.indexOf(flow.from) - 1;
  const rise = (flow) => (passed(flow) ? ARC + HIGHER * (passed(flow) - 1) : 0);
  const base = Math.max(RADIUS, ...flows.map((flow) => rise(flow) + 20)) + 4;
  return { at, passed, rise, base, narrow: width / roles.length < NARROW };
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

// Tokens and items are known in all; each edge has its part of the requests that bring them.
function described(flow, all, now, short) {
  if (!flow.rate) return "";
  const part = (end) => flow.rate / all.reduce((sum, other) => sum + (other[end] === flow[end] ? other.rate : 0), 0);
  if (flow.to === ANSWERS) return `${rate(now.tokens * part("to"))}${short ? "" : " tokens"}/s`;
  if (flow.from === "encode") return `${rate(now.items * part("from"))}${short ? "" : " items"}/s`;
  return `${rate(flow.rate)}${short ? "" : flow.from === CLIENTS ? " requests" : " KV handoffs"}/s`;
}

function makeEdge(flow) {
  const stage = flow.to === ANSWERS ? flow.from : flow.to;
  return svg(
    "g",
    { class: `edge stage-${stage}` },
    svg("path", { class: "band" }),
    svg("path", { class: "dots" }),
  );
}

function changeEdge(node, flow, shape) {
  const [band, dots] = node.children;
  const { base } = shape;
  const [begin, end] = ends(flow, shape);
  const line = shape.passed(flow) ? arc(begin, end, base - 6, base - shape.rise(flow)) : `M${begin} ${base}H${end}`;
  set(band, "d", line);
  set(dots, "d", line);
  set(band, "stroke-width", flow.rate ? Math.min(11, 2 + 1.4 * Math.log2(1 + flow.rate)).toFixed(1) : 1);
  set(node, "data-speed", flow.rate ? (flow.rate < 2 ? "slow" : flow.rate < 20 ? "brisk" : "fast") : "none");
}

function changeLabel(label, flow, shape) {
  const { at, base, narrow } = shape;
  const [begin, end] = ends(flow, shape);
  const passed = shape.passed(flow);
  const aside = narrow && !passed && (flow.to === ANSWERS ? "end" : flow.from === CLIENTS ? "start" : null);
  set(label, "text-anchor", aside || "middle");
  set(label, "x", aside ? at[aside === "end" ? ANSWERS : CLIENTS] : ((begin + end) / 2).toFixed(1));
  set(label, "y", passed ? base - shape.rise(flow) - 9 : base + 25);
  say(label, flow.what(narrow));
}

function ends({ from, to }, { at }) {
  return [at[from] + (from === CLIENTS ? 0 : RADIUS + 3), at[to] - (to === ANSWERS ? 0 : RADIUS + 3)];
}

// Leaves and arrives level, and has its top over what it passes.
function arc(begin, end, base, top) {
  const middle = (begin + end) / 2;
  const bend = Math.min((end - begin) / 3, 130);
  const up = `C${begin + bend} ${base} ${middle - bend} ${top} ${middle} ${top}`;
  return `M${begin} ${base}${up}S${end - bend} ${base} ${end} ${base}`;
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
