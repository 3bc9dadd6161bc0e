// The latest requests, each with its waterfall: a lane for every stage, from the request's arrival to its last byte.

import { each, el, say, set } from "./dom.js";
import { ago, count, plural, rate, span, time } from "./format.js";
import { LETTERS, NAMES } from "./stages.js";

const KEPT = 300;
const CANDIDATES = 5; // shown of those that an engine was chosen of
const SHOWN = matchMedia("(max-width: 720px)").matches ? 10 : 24;
const LANES = { encode: 0, prefill: 1, decode: 2 };
const TICKS = [0, 0.25, 0.5, 0.75, 1];

export function makeRequests(section) {
  const failures = el("button", { type: "button", class: "quiet", "aria-pressed": "false" }, "Failures only");
  const pause = el("button", { type: "button", class: "quiet", "aria-pressed": "false" }, "Pause");
  section.firstElementChild.after(el("div", { class: "buttons" }, failures, pause));
  const scale = el("div", { class: "scale", "aria-hidden": "true" }, ...TICKS.map(() => el("span")));
  const names = ["", "Path", "What", "First", "Total"].map((name) => el("span", {}, name));
  const head = el("div", { class: "head", "aria-hidden": "true" }, ...names, scale);
  const list = el("ol");
  const nothing = el("p", { class: "empty" }, "No request has ended yet.");
  section.append(head, list, nothing);

  const kept = new Map(); // by key, the latest last
  let shown = [];
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const open = () => list.querySelector("[aria-expanded=true]") !== null;
  const draw = (fresh) => {
    if (!shown.length || fresh || !(pressed(pause) || open())) {
      const wanted = [...kept.values()].filter((one) => !pressed(failures) || failed(one));
      shown = wanted.sort((a, b) => ended(b) - ended(a)).slice(0, SHOWN);
    }
    const full = reach(shown);
    TICKS.forEach((part, place) => say(scale.children[place], part ? span(full * part) : "0"));
    set(head, "hidden", !shown.length);
    set(nothing, "hidden", shown.length > 0);
    say(nothing, pressed(failures) && kept.size ? "No failure among the latest." : "No request has ended yet.");
    each(list, shown, name, makeRow, (row, one) => changeRow(row, one, full));
  };
  for (const button of [failures, pause]) {
    button.addEventListener("click", () => {
      set(button, "aria-pressed", String(!pressed(button)));
      draw(button === failures);
    });
  }
  return (latest) => {
    for (const one of latest) kept.set(name(one), one);
    const order = [...kept.values()].sort((a, b) => ended(b) - ended(a));
    for (const old of order.slice(KEPT)) kept.delete(name(old));
    draw(false);
  };
}

const name = (one) => `${one.id} ${one.at}`;
const ended = (one) => one.at + one.seconds;
const left = (one) => one.status === 499;
const failed = (one) => one.status >= 400 && !left(one);
const broken = (leg) => !["ok", "cancelled", null].includes(leg.outcome);

// The seconds that a waterfall has room for: the few that take much longer than the others are cut.
function reach(shown) {
  const times = shown.map((one) => one.seconds).sort((a, b) => a - b);
  const most = times[Math.floor((times.length - 1) * 0.92)] ?? 1;
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 0.001)));
  return power * [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 5, 6, 8, 10].find((step) => step * power >= most * 0.999);
}

function makeRow(one) {
  const id = `receipt-${Math.random().toString(36).slice(2)}`;
  const when = new Date(ended(one) * 1000);
  const button = el(
    "button",
    { type: "button", class: "row", "aria-expanded": "false", "aria-controls": id, onclick: () => toggle(row, one) },
    el("time", { datetime: when.toISOString(), title: when.toLocaleString() }),
    el("span", { class: "path" }, one.path === "none" ? "–" : one.path),
    el("span", { class: `what${failed(one) ? " bad" : left(one) ? " left" : ""}` }, what(one)),
    el("span", { class: "number" }, ...unit(one.ttft)),
    el("span", { class: "number" }, ...unit(one.seconds)),
    fall(one),
  );
  const row = el("li", {}, button, el("div", { class: "receipt", id, hidden: true }));
  return row;
}

function unit(seconds) {
  const [number, name] = time(seconds);
  return [number, el("small", {}, ` ${name}`)];
}

function what(one) {
  if (left(one)) return "client left";
  if (failed(one)) return [one.status, one.code === String(one.status) ? null : one.code].filter(Boolean).join(" ");
  const items = one.items ? `${plural(one.items, "item")}, ` : "";
  return `${items}${plural(one.prompt_tokens, "token")} in, ${count(one.output_tokens)} out`;
}

function changeRow(row, one, full) {
  const when = row.querySelector("time");
  say(when, ago(Date.now() / 1000 - ended(one)));
  if (row.full === full) return;
  row.full = full;
  const part = (seconds) => Math.min(100, (100 * seconds) / full);
  const picture = row.querySelector(".fall");
  set(picture, "data-cut", one.seconds > full * 1.001);
  for (const bar of picture.children) {
    bar.style.insetInlineStart = `${part(bar.begin).toFixed(2)}%`;
    bar.style.inlineSize = bar.end === undefined ? "" : `${(part(bar.end) - part(bar.begin)).toFixed(2)}%`;
  }
}

// Bars know their seconds; `changeRow` puts them where the common scale has them.
function fall(one) {
  const bar = (look, begin, end) => Object.assign(el("span", { class: look }), { begin, end });
  const bars = [bar("wait", 0, one.legs.length ? Math.min(...one.legs.map((leg) => leg.began)) : one.seconds)];
  for (const leg of one.legs) {
    const end = leg.ended ?? one.seconds;
    const bad = broken(leg) ? " failed" : "";
    const begun = leg.stage === "decode" ? (leg.first ?? end) : leg.began;
    const look = `lane-${LANES[leg.stage]} stage-${leg.stage}${bad}`;
    if (begun > leg.began) bars.push(bar(`${look} early`, leg.began, begun));
    if (end > begun) bars.push(bar(look, begun, end));
  }
  if (one.ttft !== null) bars.push(bar("first", one.ttft));
  const told = one.legs.map((leg) => `${leg.stage} ${span(leg.began)} to ${span(leg.ended ?? one.seconds)}`).join(", ");
  return el("span", { class: "fall", role: "img", "aria-label": told || "no engine was asked" }, ...bars);
}

// ---- the receipt

async function toggle(row, one) {
  const [button, place] = row.children;
  const open = button.getAttribute("aria-expanded") !== "true";
  set(button, "aria-expanded", String(open));
  set(place, "hidden", !open);
  if (!open || place.firstChild) return;
  place.append(el("p", { class: "empty" }, "…"));
  place.replaceChildren(...(await receipt(one)));
}

async function receipt(one) {
  try {
    const answer = await fetch(`requests/${encodeURIComponent(one.id)}`);
    const found = await answer.json();
    return answer.ok ? told(found) : [el("p", { class: "empty" }, found.error.message)];
  } catch {
    return [el("p", { class: "empty" }, "The proxy does not answer.")];
  }
}

function told(found) {
  const facts = [
    ["Request", el("code", {}, found.id)],
    ["Model", found.model || "–"],
    ["Route", found.reason ? `${found.path}: ${found.reason}` : found.path],
    found.error && ["Error", el("span", { class: "bad" }, found.error)],
    found.key && ["Key", found.key],
    ["Attempts", count(found.attempts)],
    ["Tokens", `${count(found.prompt_tokens)} in, ${count(found.output_tokens)} out${pace(found)}`],
  ].filter(Boolean);
  const list = el("dl", {}, ...facts.map(([term, text]) => el("div", {}, el("dt", {}, term), el("dd", {}, text))));
  return [list, legs(found), ...events(found)];
}

function pace(found) {
  const seconds = found.ttft === null ? 0 : found.seconds - found.ttft;
  const tokens = found.output_tokens - 1;
  return found.stream && seconds > 0 && tokens > 0 ? ` at ${rate(tokens / seconds)}/s` : "";
}

function legs(found) {
  const heads = ["Stage", "Engine", "Items", "Began", "First", "Took", "Outcome"];
  const choices = (leg) => leg.choices.map((choice) => choiceRow(choice, heads.length));
  const rows = found.legs.flatMap((leg) => [legRow(leg), ...choices(leg)]);
  if (!rows.length) return el("p", { class: "empty" }, "No engine was asked.");
  const head = el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function legRow(leg) {
  const outcome = [leg.outcome ?? "runs", leg.attempt > 1 ? `attempt ${leg.attempt}` : null].filter(Boolean).join(", ");
  return el(
    "tr",
    { class: `leg stage-${leg.stage}` },
    el("th", { scope: "row" }, el("b", {}, LETTERS[leg.stage]), ` ${NAMES[leg.stage]}`),
    el("td", {}, el("code", {}, leg.instance)),
    el("td", {}, leg.items ? count(leg.items) : ""),
    el("td", {}, span(leg.began)),
    el("td", {}, leg.first === null ? "" : span(leg.first)),
    el("td", {}, leg.ended === null ? "" : span(leg.ended - leg.began)),
    el("td", { class: broken(leg) ? "bad" : null }, outcome),
  );
}

const SCORES = {
  seconds: ["by when it would be done", span],
  tokens: ["by the work it had", (score) => plural(score, "token")],
};

// Among whom the engine was chosen, the best first.
function choiceRow(choice, width) {
  const [by, tell] = SCORES[choice.unit] ?? [choice.unit, rate];
  const row = (...told) => el("tr", { class: "choice" }, el("td", { colspan: width }, ...told));
  if (choice.joined) return row("joined: the same item was being encoded there");
  const best = choice.candidates.filter((one, place) => place < CANDIDATES || one.chosen);
  const shown = best.map((one) => el(one.chosen ? "b" : "span", {}, `${one.instance} ${tell(one.score)}`));
  const more = choice.of - shown.length;
  const rest = more > 0 ? el("span", {}, `and ${count(more)} more`) : null;
  return row(`chosen of ${count(choice.of)}, ${by}:`, ...shown, rest);
}

function events(found) {
  if (!found.events.length) return [];
  const told = (event) => el("li", {}, el("span", {}, span(event.at)), el("b", {}, event.name), ` ${event.detail}`);
  return [el("ul", { class: "events" }, ...found.events.map(told))];
}
