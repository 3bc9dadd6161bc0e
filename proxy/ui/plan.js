// The planner's advice: which stage gives way first, and what one more engine of each role buys.

import { el } from "./dom.js";
import { count, rate, share } from "./format.js";
import { NAMES } from "./stages.js";

export function makePlan(place) {
  let before = "";
  return (plan) => {
    const now = JSON.stringify(plan);
    if (now === before) return;
    before = now;
    place.replaceChildren(...(plan.roles ? advice(plan) : [el("p", { class: "empty" }, reason(plan))]));
  };
}

function reason(plan) {
  const asked = plan.offered.requests > 0;
  return asked ? `No advice: ${plan.reason}.` : "No advice yet: no request has ended in the last minutes.";
}

function advice(plan) {
  const { offered, carries, bottleneck, would_carry: would } = plan;
  const fits = carries >= offered.requests;
  const sentence = el(
    "p",
    { class: "sentence" },
    "Asked for ",
    el("b", {}, rate(offered.requests)),
    " requests/s; the fleet carries ",
    el("b", { class: fits ? null : "bad" }, rate(carries)),
    `. ${NAMES[bottleneck]} gives way first. `,
    advised(plan, would),
  );
  const heads = ["Role", "Engines", "Busy", "Carries", "One more", "Advised"];
  const head = el("tr", {}, ...heads.map((name) => el("th", { scope: "col" }, name)));
  const rows = plan.roles.map((role) => line(role, role.role === bottleneck));
  const table = el("table", { class: "plan" }, el("thead", {}, head), el("tbody", {}, ...rows));
  return [sentence, el("div", { class: "scroll" }, table)];
}

function advised(plan, would) {
  if (plan.roles.every((role) => role.advised === role.engines)) return "It has as many engines as advised.";
  const wanted = plan.roles.map((role) => `${count(role.advised)} ${NAMES[role.role].toLowerCase()}`);
  return `Advised are ${wanted.slice(0, -1).join(", ")} and ${wanted.at(-1)}, which carry ${rate(would)}.`;
}

function line(role, first) {
  const buys = role.one_more > 0.0005 ? `+${rate(role.one_more)}/s` : "nothing";
  return el(
    "tr",
    { class: `stage-${role.role}${first ? " bottleneck" : ""}` },
    el("th", { scope: "row" }, el("i"), NAMES[role.role], first ? el("small", {}, " gives way first") : null),
    el("td", {}, count(role.engines)),
    el("td", {}, busy(role)),
    el("td", {}, role.carries === null ? "any" : `${rate(role.carries)}/s`),
    el("td", {}, buys),
    el("td", { class: role.advised === role.engines ? null : "changed" }, count(role.advised)),
  );
}

function busy(role) {
  const bar = el("span", {});
  const mark = el("i", {});
  bar.style.inlineSize = `${Math.min(100, 100 * (role.utilisation ?? 1))}%`;
  mark.style.insetInlineStart = `${Math.min(100, 100 * role.limit)}%`;
  const over = role.utilisation === null || role.utilisation > role.limit;
  const meter = el("span", { class: over ? "meter over" : "meter", "aria-hidden": "true" }, bar, mark);
  return el("span", { class: "busy" }, meter, `${share(role.utilisation)} of ${share(role.limit)}`);
}
