// The columns: every engine by stage, with its load, what it runs, and why it is not well.

import { makeFlow } from "./flow.js";
import { each, el, say, set } from "./dom.js";
import { count, netloc, plural, share, span } from "./format.js";
import { NAMES, present } from "./stages.js";

const MANY = 8; // engines of a stage; more are shown in a line each
const LEAST = 2000; // tokens that a full bar stands for
const FADING = 0.98; // by the second, of the largest load seen
const SURE_MS = 4000;

// `actions` has `unlocked`, and `drain` and `join`, which take an instance.
export function makeFleet(figure, columns, actions) {
  const flow = makeFlow(figure);
  const full = {}; // what a full bar stands for, by role
  return (state, now) => {
    const instances = [...state.instances, ...actions.missing(state.instances)];
    const roles = present(instances);
    flow(roles, now);
    for (const role of roles) {
      const largest = Math.max(...instances.map((instance) => (instance.role === role ? (instance.load ?? 0) : 0)));
      full[role] = Math.max(largest, LEAST, (full[role] ?? 0) * FADING);
    }
    set(columns, "data-columns", roles.length);
    each(columns, roles, (role) => role, makeColumn, (column, role) => {
      const own = instances.filter((instance) => instance.role === role);
      const planned = state.plan.roles?.find((found) => found.role === role);
      changeColumn(column, own, planned, full[role], actions);
    });
  };
}

function makeColumn(role) {
  return el(
    "section",
    { class: `column stage-${role}`, "aria-label": NAMES[role] },
    el("h3", {}, el("span", {}, NAMES[role]), el("small")),
    el("ul"),
  );
}

function changeColumn(column, instances, planned, full, actions) {
  const [title, list] = column.children;
  const serving = instances.filter((instance) => instance.state === "READY").length;
  const all = plural(instances.length, "engine");
  const ready = serving === instances.length ? all : `${serving} of ${all} ready`;
  const busy = planned?.utilisation ?? null;
  say(title.lastChild, busy === null ? ready : `${ready}, ${share(busy)} busy`);
  const many = instances.length > MANY;
  set(column, "data-many", many);
  const well = (instance) => (trouble(instance) ? 0 : 1);
  const sorted = many ? instances.toSorted((a, b) => well(a) - well(b)) : instances;
  const make = (instance) => makeInstance(instance, actions);
  each(list, sorted, (instance) => instance.url, make, (row, instance) => {
    changeInstance(row, instance, full, actions);
    say(row.children[2], !instance.leases ? "" : many ? count(instance.leases) : `${count(instance.leases)} running`);
  });
}

function makeInstance(instance, actions) {
  const row = el(
    "li",
    {},
    el("span", { class: "dot", "aria-hidden": "true" }),
    el("span", { class: "host", title: described(instance) }, netloc(instance.url)),
    el("span", { class: "running" }),
    el("span", { class: "meter", "aria-hidden": "true" }, el("span")),
    el("span", { class: "said" }),
    el("button", { type: "button", class: "quiet", onclick: () => press(row, actions) }),
  );
  return row;
}

function changeInstance(row, instance, full, actions) {
  const [dot, , , meter, said, button] = row.children;
  row.instance = instance;
  set(row, "data-state", instance.state);
  set(row, "data-circuit", instance.circuit === "CLOSED" ? null : instance.circuit);
  set(dot, "title", instance.state);
  meter.firstChild.style.inlineSize = `${Math.min(100, (100 * (instance.load ?? 0)) / full).toFixed(1)}%`;
  say(said, trouble(instance) || work(instance));
  set(button, "hidden", !actions.unlocked());
  if (!row.sure) say(button, verb(instance));
}

function described({ url, dialect, version, model, weight, labels }) {
  const where = Object.entries(labels ?? {}).map(([name, value]) => `${name} ${value}`);
  const heavy = weight === 1 ? null : `weight ${weight}`;
  return [url, [dialect, version].filter(Boolean).join(" "), model, heavy, ...where].filter(Boolean).join("\n");
}

const verb = (instance) => (instance.state === "DRAINING" || instance.state === "GONE" ? "Take back" : "Drain");

function trouble(instance) {
  if (instance.state !== "READY") return `${instance.state.toLowerCase()}: ${instance.reason}`;
  if (instance.circuit === "CLOSED") return "";
  return `circuit ${instance.circuit.toLowerCase().replace("_", "-")}: its last requests failed`;
}

function work(instance) {
  const held = instance.items ? `, ${plural(instance.items, "item")} cached` : "";
  if (!instance.load) return `idle${held}`;
  const { load, pending_seconds: seconds } = instance;
  return `${seconds === undefined ? plural(load, "token") : `${span(seconds)} of work`}${held}`;
}

// Draining asks twice: it takes an engine away from everybody.
function press(row, actions) {
  const button = row.lastChild;
  const asked = verb(row.instance);
  if (asked === "Drain" && !row.sure) {
    row.sure = setTimeout(() => calm(row), SURE_MS);
    say(button, "Drain it?");
    return;
  }
  calm(row);
  if (asked === "Drain") actions.drain(row.instance);
  else actions.join(row.instance);
}

function calm(row) {
  clearTimeout(row.sure);
  row.sure = null;
  say(row.lastChild, verb(row.instance));
}
