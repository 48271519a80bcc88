// What the members of a state mean, in sentences.
import { Scalar, Slot, Tuple } from "../readers/js/src/index.js";

export const count = (n, one, many = `${one}s`) => `${Number(n).toLocaleString("en")} ${Number(n) === 1 ? one : many}`;

/** Return a number of bytes with a unit. */
export function bytes(n) {
  const units = ["bytes", "KB", "MB", "GB", "TB"];
  let unit = 0;
  let size = n;
  for (; size >= 1000 && unit < units.length - 1; unit++) size /= 1000;
  return unit === 0 ? count(n, "byte") : `${size.toPrecision(3)} ${units[unit]}`;
}

const SOURCES = {
  model: "a live model: the names were taken from it by identity",
  checkpoint: "the checkpoint itself, which held names",
  names: "a list of names that was given",
  adapter: "the keys of an adapter's weights next to the checkpoint",
  configs: "a model rebuilt from its configuration",
};
const VERDICTS = {
  confirmed: "The weights confirm this order.",
  partly: "The weights rule out every other whole order; some exchanges of single modules stay undecided.",
  contradicted: "The weights contradict this order.",
  inconclusive: "The weights neither confirm nor contradict this order.",
};
const ROLES = {
  param: "one value for each element of the parameter",
  row: "reduced over the last axis of the parameter",
  col: "reduced over the last but one axis of the parameter",
  block: "codes or scales of blocks of elements",
  opaque: "nothing is known of how its axes relate to the parameter's",
};

export const role = (name) => ROLES[name];

const own = (table, name) => (Object.hasOwn(table, name) ? table[name] : null);

/** Return sentences on where the names came from; strings of the file stay apart as {text}. */
export function naming({ source, rule, details }) {
  const result = [own(SOURCES, source) === null ? ["Names are from ", { text: source }, "."] : [`Names are from ${own(SOURCES, source)}.`]];
  if (rule !== null) result.push(["Positions became names by the rule ", { text: rule }, "."]);
  const alike = details.get("interchangeable");
  if (typeof alike === "bigint" && alike > 0n) {
    result.push([`${count(alike, "parameter shares its", "parameters share their")} shape with another, so shapes alone cannot tell them apart.`]);
  }
  const evidence = details.get("evidence");
  if (evidence instanceof Map) {
    const verdict = evidence.get("verdict");
    const pairs = evidence.get("pairs");
    if (typeof verdict === "string") {
      result.push(own(VERDICTS, verdict) === null ? ["The verdict of the weights is ", { text: verdict }, "."] : [VERDICTS[verdict]]);
    }
    const [excluded, undecided] = pairs instanceof Map ? [pairs.get("excluded"), pairs.get("undecided")] : [];
    if (typeof excluded === "bigint" && typeof undecided === "bigint") {
      result.push([`Of the exchanges of two modules, ${count(excluded, "is", "are")} ruled out and ${count(undecided, "is", "are")} undecided.`]);
    }
  }
  return result;
}

/** Return a typed value as text, cut where it is long. */
export function value(item, room = 400) {
  const text = written(item, 0);
  return text.length > room ? `${text.slice(0, room)}… (${text.length.toLocaleString("en")} characters)` : text;
}

function written(item, depth) {
  if (depth > 4) return "…";
  const each = (items) => [...items].slice(0, 100).map((inner) => written(inner, depth + 1)).concat(items.length > 100 ? "…" : []).join(", ");
  if (item === null) return "null";
  if (typeof item === "string") return JSON.stringify(item);
  if (typeof item === "number") return Number.isInteger(item) ? item.toFixed(1) : String(item);
  if (item instanceof Uint8Array) return `${count(item.length, "byte")}`;
  if (item instanceof Scalar) return `${item.item()} (${item.dtype})`;
  if (item instanceof Slot) return `tensor ${item.label}`;
  if (item instanceof Tuple) return `(${each(item)}${item.length === 1 ? "," : ""})`;
  if (Array.isArray(item)) return `[${each(item)}]`;
  if (!(item instanceof Map)) return String(item);
  const pairs = [...item].slice(0, 100).map(([key, inner]) => `${typeof key === "string" ? key : written(key, depth + 1)}: ${written(inner, depth + 1)}`);
  return `{${pairs.join(", ")}${item.size > 100 ? ", …" : ""}}`;
}
