// The admin key: asked for, tried, kept in this tab; and what may be done with it. Without one the page only looks.

import { say, set } from "./dom.js";

const PLACE = "triptych-admin-key";
const GONE = { state: "GONE", reason: "drained here", circuit: "CLOSED", leases: 0, load: 0 };

// `changed` is called after everything that may have changed the fleet.
export function makeLock(button, dialog, changed) {
  const form = dialog.querySelector("form");
  const input = dialog.querySelector("input");
  const refused = dialog.querySelector("[role=alert]");
  const gone = new Map(); // drained here, and no longer in the fleet: by URL
  let needed = true;
  let key = sessionStorage.getItem(PLACE);

  const headers = () => (key ? { "x-api-key": key } : {});
  const keep = (found) => {
    key = found;
    if (found) sessionStorage.setItem(PLACE, found);
    else sessionStorage.removeItem(PLACE);
    draw({ locked: needed });
    changed();
  };
  const draw = (state) => {
    needed = state.locked;
    set(button, "hidden", !needed);
    say(button, key ? "Lock" : "Unlock");
    set(button, "title", key ? "Forget the admin key" : "Drain engines with the admin key");
  };
  const call = async (path, body) => {
    const answer = await fetch(path, {
      method: "POST",
      headers: { ...headers(), "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    if (answer.status === 401 || answer.status === 403) keep(null);
    changed();
    return answer.ok;
  };

  button.addEventListener("click", () => {
    if (key) return keep(null);
    say(refused, "");
    input.value = "";
    dialog.showModal();
  });
  form.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("ui/key", { headers: { "x-api-key": input.value } }).catch(() => null);
    if (answer?.ok) {
      keep(input.value);
      dialog.close();
    } else {
      say(refused, await why(answer));
      input.select();
    }
  });

  const actions = {
    unlocked: () => !needed || key !== null,
    drain: async (instance) => {
      if (await call("instances/drain", { url: instance.url })) gone.set(instance.url, instance);
    },
    join: async (instance) => {
      if (await call("instances", registration(instance))) gone.delete(instance.url);
    },
    // Those that were drained here and have left: they can be taken back.
    missing: (instances) => {
      const there = new Set(instances.map((instance) => instance.url));
      const left = [...gone.values()].filter((instance) => !there.has(instance.url));
      return left.map((instance) => ({ ...instance, ...GONE }));
    },
  };
  return { draw, actions };
}

async function why(answer) {
  if (!answer) return "The proxy does not answer.";
  return answer.status === 401 ? "That is not the admin key." : (await answer.json()).error.message;
}

// As what it was known before.
function registration({ role, url, dialect, labels, weight }) {
  return { role, url: dialect === "auto" ? url : `${dialect}+${url}`, labels: labels ?? {}, weight };
}
