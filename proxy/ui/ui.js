// The page: asks ./ui/state once a second while somebody looks, and hands what it says to the parts that draw it.

import { makeCharts } from "./charts.js";
import { each, el, say, set } from "./dom.js";
import { makeFleet } from "./fleet.js";
import { count, rate, share, span, plural, time } from "./format.js";
import { makeLock } from "./lock.js";
import { makePlan } from "./plan.js";
import { makeRequests } from "./requests.js";
import { NAMES } from "./stages.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;

const $ = (id) => document.getElementById(id);
const lock = makeLock($("lock"), $("ask"), () => ask());
const drawFleet = makeFleet($("flow"), $("columns"), lock.actions);
const drawCharts = makeCharts($("charts"));
const drawRequests = makeRequests($("requests"));
const drawPlan = makePlan($("plan"));

let curves = null; // the points so far
let answered = 0; // when
let timer = 0;
let asking = false;

async function ask() {
  clearTimeout(timer);
  if (asking || document.hidden) return;
  asking = true;
  try {
    const since = curves ? `?since=${curves.last}` : "";
    const answer = await fetch(`ui/state${since}`, { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    draw(await answer.json());
    answered = Date.now();
  } catch (error) {
    lost(error);
  }
  asking = false;
  timer = setTimeout(ask, EVERY_MS);
}

function draw(state) {
  curves = joined(curves, state.curves);
  const now = Object.fromEntries(Object.entries(curves.columns).map(([name, column]) => [name, column.at(-1)]));
  document.querySelector("main").hidden = false;
  set(document.body, "data-lost", null);
  header(state);
  figures(state, now);
  lock.draw(state);
  drawFleet(state, now);
  drawCharts(curves);
  drawRequests(state.requests);
  drawPlan(state.plan);
}

// What has come since is put behind the points there are, and as many of the oldest go.
function joined(known, fresh) {
  const columns = fresh.columns;
  if (!known || fresh.last < known.last || columns.served.length >= known.columns.served.length) return fresh;
  const more = fresh.last - known.last;
  const grown = (name, column) => [...column.slice(more), ...(more ? columns[name].slice(-more) : [])];
  const all = Object.entries(known.columns).map(([name, column]) => [name, grown(name, column)]);
  return { ...fresh, columns: Object.fromEntries(all) };
}

function header(state) {
  const models = [...new Set(state.instances.map((instance) => instance.model).filter(Boolean))];
  const told = [models.join(", "), plural(state.workers, "worker"), `version ${state.version}`];
  say($("about"), told.filter(Boolean).join(" · "));
  set($("status"), "data-look", state.ready ? "well" : "bad");
  say($("status"), state.ready ? "Serving" : lacking(state.instances));
  document.title = state.ready ? "Triptych" : `! ${$("status").textContent} – Triptych`;
}

function lacking(instances) {
  const roles = [...new Set(instances.map((instance) => instance.role))];
  const none = roles.filter((role) => !instances.some((one) => one.role === role && one.state === "READY"));
  return none.length ? `${none.map((role) => NAMES[role]).join(", ")}: no engine` : "Cannot serve";
}

function lost(error) {
  set(document.body, "data-lost", true);
  set($("status"), "data-look", "bad");
  const since = answered ? ` for ${span((Date.now() - answered) / 1000)}` : "";
  say($("status"), error.name === "TypeError" || error.name === "TimeoutError" ? `No answer${since}` : error.message);
}

function figures(state, now) {
  const all = now.served + now.left + now.refused + now.failed;
  const bad = now.refused + now.failed;
  const told = [
    ["Requests", rate(all), "/s", `${count(state.in_flight)} in flight, ${count(state.queued)} waiting`],
    ["First token", ...time(now.ttft_p50), `95 % within ${span(now.ttft_p95)}`],
    ["Per token", ...time(now.token), `whole answers ${span(now.e2e_p50)}`],
    ["Output", rate(now.tokens), "tokens/s", now.items ? `${rate(now.items)} items/s encoded` : "nothing encoded"],
    ["Not served", ...(all ? share(bad / all) : "– ").split(" "), bad ? which(now) : "none failed, none refused"],
  ];
  const make = () => el("div", {}, el("dt"), el("dd", {}, el("b"), el("small")), el("dd", { class: "note" }));
  each($("figures"), told, ([name]) => name, make, (node, [name, number, unit, note]) => {
    const [term, value, below] = node.children;
    say(term, name);
    say(value.firstChild, number);
    say(value.lastChild, unit ? ` ${unit}` : "");
    say(below, note);
    set(node, "class", name === "Not served" && bad ? "bad" : null);
  });
}

const which = (now) => `failed ${rate(now.failed)}/s, refused ${rate(now.refused)}/s`;

document.addEventListener("visibilitychange", ask);
ask();
