// The command under test of spec/conformance: a line of JSON for each path.
import { Refused, Scalar, Slot, Tuple, verify } from "./src/index.js";
import { hex } from "./src/hashes.js";
import { openPath } from "./src/node.js";

const SMALL = BigInt(Number.MAX_SAFE_INTEGER);

/** JSON text that stands for itself: JavaScript has one type of number. */
class Raw {
  constructor(text) {
    this.text = text;
  }
}

function write(value) {
  if (value instanceof Raw) return value.text;
  if (Array.isArray(value)) return `[${value.map(write).join()}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const members = value instanceof Map ? [...value] : Object.entries(value).filter(([, item]) => item !== undefined);
  return `{${members.map(([name, item]) => `${JSON.stringify(name)}:${write(item)}`).join()}}`;
}

function float(value) {
  if (Number.isNaN(value)) return { $float: "nan" };
  if (!Number.isFinite(value)) return { $float: value > 0 ? "inf" : "-inf" };
  const text = Object.is(value, -0) ? "-0" : String(value);
  return new Raw(/[.e]/.test(text) ? text : `${text}.0`);
}

/** Return a typed value as what `write` writes (section 5). */
async function typed(value) {
  const each = (items) => Promise.all(Array.from(items, typed));
  if (typeof value === "number") return float(value);
  if (typeof value === "bigint") return value <= SMALL && value >= -SMALL ? new Raw(String(value)) : { $int: String(value) };
  if (value instanceof Uint8Array) return { $bytes: hex(value) };
  if (value instanceof Scalar) return { $scalar: [value.dtype, hex(value.bytes)] };
  if (value instanceof Tuple) return { $tuple: await each(value) };
  if (Array.isArray(value)) return each(value);
  if (value instanceof Slot) {
    const { key, dtype, shape } = value.tensor;
    return { $tensor: key, role: value.role, dtype, shape, data: hex(await value.tensor.bytes()) };
  }
  if (!(value instanceof Map)) return value;
  const pairs = await Promise.all(Array.from(value, async ([key, item]) => [key, await typed(item)]));
  const plain = pairs.every(([key]) => typeof key === "string" && !key.startsWith("$"));
  return plain ? new Map(pairs) : { $dict: await Promise.all(pairs.map(async ([key, item]) => [await typed(key), item])) };
}

/** Return a value, or undefined where it is null or empty: such members are left out. */
const some = (value) => (value === null || value.length === 0 || value.size === 0 ? undefined : value);

async function described(state) {
  const list = (items, describe) => Promise.all(items.map(describe));
  return {
    optimizers: state.optimizers.map((each) => ({ class: each.class, id: some(each.id) })),
    groups: await list(state.groups, async (group) => ({
      optimizer: group.optimizer,
      count: group.count,
      name: some(group.name),
      options: await list([...group.options], async ([name, value]) => [name, await typed(value)]),
    })),
    parameters: await list(state.parameters, async ({ weights, ...parameter }) => ({
      name: parameter.name,
      shape: parameter.shape,
      dtype: some(parameter.dtype),
      adapter: some(parameter.adapter),
      tied: some(parameter.tied),
      keys: some(parameter.keys),
      id: parameter.id === null ? undefined : await typed(parameter.id),
      slots: await typed(parameter.slots),
      weights: some(weights && [weights.algorithm, weights.dtype, weights.value]),
    })),
    naming: {
      source: state.naming.source,
      rule: some(state.naming.rule),
      details: some(await typed(state.naming.details)),
    },
    globals: some(await typed(state.globals)),
    origin: some(await typed(state.origin)),
    extra: some(await typed(state.extra)),
    extensions: some(await typed(state.extensions)),
    global_step: some(state.globalStep),
  };
}

for (const path of process.argv.slice(2)) {
  try {
    const state = await openPath(path);
    const { verified } = await verify(state);
    console.log(write({ verified, state: await described(state) }));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    process.exitCode = 1;
    console.log(write({ rule: error.rule, kind: error.kind, message: error.message }));
  }
}
