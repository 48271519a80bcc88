// Section 5: typed values. Integers become BigInt and floats become numbers, so that 1 and 1.0 stay two values.
import { Refused, check, quoted } from "./errors.js";
import { BITS, numbers } from "./container.js";
import { Float, HUGE, MAX_INT } from "./json.js";

const ROLES = ["param", "row", "col", "block", "opaque"];

/** An array that is told apart from a list. */
export class Tuple extends Array {}

/** A tensor without axes. */
export class Scalar {
  constructor(dtype, bytes) {
    Object.assign(this, { dtype, bytes });
  }

  /** Return its value, as `Tensor.values` gives elements; a C64 as an array of two. */
  item() {
    const array = numbers(this.dtype, this.bytes);
    return array.length > 1 ? array : array[0];
  }
}

/** A tensor in a slot tree, with its role. */
export class Slot {
  constructor(label, role, tensor) {
    Object.assign(this, { label, role, tensor });
  }
}

const unhex = (text) => Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/**
 * Decode a typed value (R22).
 *
 * @param {unknown} value as `parse` gives it
 * @param {(label: string, role: string) => unknown} [tensor] makes tensors; without it they are refused
 */
export function decode(value, tensor) {
  if (Array.isArray(value)) return value.map((item) => decode(item, tensor));
  if (typeof value === "number") return BigInt(value);
  check(value !== HUGE, "R22", "an integer outside ±(2^53 - 1) as a number");
  if (value instanceof Float) return value.value;
  if (!(value instanceof Map)) return value;
  const tag = [...value.keys()].find((key) => key.startsWith("$"));
  if (tag === undefined) return new Map([...value].map(([key, item]) => [key, decode(item, tensor)]));
  const body = value.get(tag);
  const members = tag === "$tensor" ? value.size === 2 && value.has("role") : value.size === 1;
  check(members, "R22", () => `other members next to ${quoted(tag)}`);
  if (tag === "$tensor" && tensor && typeof body === "string" && ROLES.includes(value.get("role"))) {
    return tensor(body, value.get("role"));
  }
  return TAGS[tag]?.(body, tensor) ?? malformed(tag);
}

function malformed(tag) {
  throw new Refused("R22", `${quoted(tag)} in another form, or where it is not allowed`);
}

const FLOATS = { inf: Infinity, "-inf": -Infinity, nan: NaN };

// One function for each tag; undefined says that the body has another form.
const TAGS = {
  __proto__: null,
  $tuple: (body, tensor) => (Array.isArray(body) ? Tuple.from(body, (item) => decode(item, tensor)) : undefined),
  $float: (body) => (typeof body === "string" && Object.hasOwn(FLOATS, body) ? FLOATS[body] : undefined),
  $int(body) {
    if (typeof body !== "string" || !/^-?[1-9][0-9]{15,999}$/.test(body)) return undefined;
    const value = BigInt(body);
    return value > BigInt(MAX_INT) || value < -BigInt(MAX_INT) ? value : undefined;
  },
  $bytes: (body) => (typeof body === "string" && /^([0-9a-f]{2})*$/.test(body) ? unhex(body) : undefined),
  $scalar(body) {
    if (!Array.isArray(body) || body.length !== 2 || !body.every((item) => typeof item === "string")) return undefined;
    const [dtype, digits] = body;
    const fits = Object.hasOwn(BITS, dtype) && BITS[dtype] >= 8 && digits.length * 4 === BITS[dtype];
    return fits && /^[0-9a-f]+$/.test(digits) ? new Scalar(dtype, unhex(digits)) : undefined;
  },
  $dict(body, tensor) {
    if (!Array.isArray(body) || !body.every((pair) => Array.isArray(pair) && pair.length === 2)) return undefined;
    const seen = new Set();
    const pairs = body.map(([key, item]) => [decode(key), decode(item, tensor)]);
    for (const [key] of pairs) {
      const identity = identified(key);
      check(!seen.has(identity), "R22", "a $dict with two equal keys");
      seen.add(identity);
    }
    return new Map(pairs);
  },
};

/** Return a text that is the same for equal keys of a $dict: numbers by value, false and true as 0 and 1. */
function identified(key) {
  if (key === null) return "null";
  if (typeof key === "string") return JSON.stringify(key);
  if (typeof key === "boolean") return `#${Number(key)}`;
  if (typeof key === "bigint") return `#${key}`;
  if (typeof key === "number") return Number.isInteger(key) ? `#${BigInt(key)}` : `#${key}`;
  check(key instanceof Tuple, "R22", "a key of a $dict that is a list, bytes, a mapping or a tensor");
  return `(${key.map(identified).join()})`;
}

/** Decode a value that has to be a mapping with string keys. */
export function mapping(value, rule, what, tensor) {
  const result = decode(value, tensor);
  const fits = result instanceof Map && [...result.keys()].every((key) => typeof key === "string");
  check(fits, rule, () => `${what} is not a mapping with string keys`);
  return result;
}
