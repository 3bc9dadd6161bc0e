// The stages' names and order, once.

export const ROLES = ["encode", "prefill", "decode", "both"];
export const NAMES = { encode: "Encode", prefill: "Prefill", decode: "Decode", both: "Prefill + decode" };
export const LETTERS = { encode: "E", prefill: "P", decode: "D", both: "PD" };

// The roles that a request goes through, by its path.
export const PATHS = {
  "E-P-D": ["encode", "prefill", "decode"],
  "E-PD": ["encode", "both"],
  "P-D": ["prefill", "decode"],
  "EP-D": ["prefill", "decode"],
  PD: ["both"],
  EPD: ["both"],
};

export const present = (instances) => ROLES.filter((role) => instances.some((instance) => instance.role === role));
