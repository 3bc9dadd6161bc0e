// Numbers for people: three digits that matter, and a unit.

const NONE = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (known(value) ? grouped.format(value) : NONE);

export function rate(value) {
  if (!known(value)) return NONE;
  if (value >= 99950) return `${grouped.format(value / 1000)}k`;
  if (value >= 9995) return `${(value / 1000).toFixed(1)}k`;
  if (value >= 99.95) return grouped.format(value);
  return value === 0 ? "0" : value.toFixed(value >= 9.995 ? 1 : 2);
}

// [number, unit] of a time in seconds.
export function time(value) {
  if (!known(value)) return [NONE, ""];
  if (value < 0.00995) return [(value * 1000).toFixed(1), "ms"];
  if (value < 0.9995) return [(value * 1000).toFixed(0), "ms"];
  if (value < 9.995) return [value.toFixed(2), "s"];
  if (value < 99.95) return [value.toFixed(1), "s"];
  return [grouped.format(value), "s"];
}

export const span = (value) => time(value).filter(Boolean).join(" ");

// The same without the zeros that a round number ends with, for axes.
export const round = (text) => text.replace(/(\.\d*?)0+(?!\d)/, "$1").replace(/\.(?!\d)/, "");

export function share(value) {
  return known(value) ? `${(value * 100).toFixed(value > 0 && value < 0.0995 ? 1 : 0)} %` : NONE;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export const netloc = (url) => url.slice(url.indexOf("://") + 3);

export function ago(seconds) {
  if (seconds < 59.5) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5970) return `${round((seconds / 60).toFixed(seconds < 570 ? 1 : 0))} min`;
  return `${Math.round(seconds / 3600)} h`;
}
