// JSON as rule R3 allows it. JSON.parse takes the last of two equal members, and gives one number for 1 and 1.0.
import { Refused, quoted } from "./errors.js";

export const MAX_DEPTH = 64;
export const MAX_VALUES = 2_097_152;
export const MAX_INT = Number.MAX_SAFE_INTEGER; // 2^53 - 1

/** A JSON number with a fraction or an exponent. Integers are plain numbers. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

/** A JSON integer outside ±(2^53 - 1), which no rule takes. */
export const HUGE = Symbol("an integer outside ±(2^53 - 1)");

const LITERALS = new Map([["t", ["true", true]], ["f", ["false", false]], ["n", ["null", null]]]);
const NUMBER = /(-?(?:0|[1-9][0-9]*))((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)/y;
const LONE_SURROGATE = /\p{Surrogate}/u;

/**
 * Parse one JSON text.
 *
 * @param {string} text
 * @returns {unknown} objects as Map, floats as Float, integers as number (or HUGE), and the rest as JSON.parse does
 */
export function parse(text) {
  let at = 0;
  let values = 0;

  const fail = (what) => {
    throw new Refused("R3", `${what}, at character ${at} of the JSON text`);
  };
  const skip = () => {
    for (let c = text.charCodeAt(at); c === 0x20 || c === 0x0a || c === 0x0d || c === 0x09; ) c = text.charCodeAt(++at);
  };
  const count = () => {
    if (++values > MAX_VALUES) fail(`more than ${MAX_VALUES} values`);
  };

  function string() {
    const start = at++;
    let escaped = false;
    for (let c; (c = text.charCodeAt(at)) !== 0x22; at++) {
      if (!(c >= 0x20)) fail("a control character in a string, or an unfinished string"); // NaN behind the end
      if (c === 0x5c) {
        escaped = true;
        at++;
      }
    }
    at++;
    if (!escaped) return text.slice(start + 1, at - 1);
    let value;
    try {
      value = JSON.parse(text.slice(start, at));
    } catch {
      fail("an escape that JSON does not have");
    }
    if (LONE_SURROGATE.test(value)) fail("a lone surrogate");
    return value;
  }

  function number() {
    // Most numbers are naturals of a few digits, read some five times faster so.
    const start = at;
    let natural = 0;
    for (let c; at - start < 15 && (c = text.charCodeAt(at) - 0x30) >= 0 && c < 10; at++) natural = 10 * natural + c;
    if (at > start && (text[start] !== "0" || at === start + 1) && !"0123456789.eE".includes(text[at])) return natural;
    at = start;
    NUMBER.lastIndex = at;
    const found = NUMBER.exec(text);
    if (found === null) fail("not a value");
    const [whole, integer, rest] = found;
    if (whole === "-0") fail("the integer -0");
    at += whole.length;
    const value = Number(whole);
    if (rest === "") return Math.abs(value) <= MAX_INT ? value : HUGE;
    if (!Number.isFinite(value)) fail(`the float ${integer}..., beyond the range of 64 bits`);
    return new Float(value);
  }

  function members(depth) {
    const result = new Map();
    count();
    at++;
    skip();
    if (text[at] === "}") return at++, result;
    for (;;) {
      if (text[at] !== '"') fail("a member without a name");
      const name = string();
      if (result.has(name)) fail(`the member ${quoted(name)} twice`);
      skip();
      if (text[at++] !== ":") fail("a name without a colon");
      result.set(name, value(depth));
      if (text[at] === "}") return at++, result;
      if (text[at] !== ",") fail("an object that goes on without a comma");
      count();
      at++;
      skip();
    }
  }

  function items(depth) {
    const result = [];
    count();
    at++;
    skip();
    if (text[at] === "]") return at++, result;
    for (;;) {
      result.push(value(depth));
      if (text[at] === "]") return at++, result;
      if (text[at] !== ",") fail("an array that goes on without a comma");
      count();
      at++;
    }
  }

  function value(depth) {
    skip();
    const result = start(depth);
    skip();
    return result;
  }

  function start(depth) {
    const first = text[at];
    if (first === '"') return string();
    if (first === "{" || first === "[") {
      if (depth === MAX_DEPTH) fail(`nesting of more than ${MAX_DEPTH} levels`);
      return first === "{" ? members(depth + 1) : items(depth + 1);
    }
    if (LITERALS.has(first)) {
      const [word, meaning] = LITERALS.get(first);
      if (!text.startsWith(word, at)) fail("not a value");
      at += word.length;
      return meaning;
    }
    return number();
  }

  const result = value(0);
  if (at < text.length) fail("more than one value");
  return result;
}

/** Return a text that is the same for equal values of `parse`, and different for others. */
export function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join()}]`;
  if (value instanceof Map) {
    const names = [...value.keys()].sort();
    return `{${names.map((name) => `${JSON.stringify(name)}:${canonical(value.get(name))}`).join()}}`;
  }
  if (value instanceof Float) return Object.is(value.value, -0) ? "float -0" : `float ${value.value}`;
  return typeof value === "symbol" ? String(value) : JSON.stringify(value);
}
