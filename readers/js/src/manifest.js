// Section 4: the manifest of one file.
import { check, quoted } from "./errors.js";
import { BITS, isNatural, isShape } from "./container.js";
import { Slot, decode, mapping } from "./values.js";

const MINOR = 0; // this reader's version is 1.0

// Table 2: string, array, object, natural, null, any typed value. A question mark: may be absent.
const TABLE = {
  manifest: {
    format: "s", version: "s", optimizers: "a", groups: "a", parameters: "a", states: "a", naming: "o", digests: "o",
    "globals?": "o", "origin?": "o", "extra?": "o", "extensions?": "o", "global_step?": "n", "weights?": "o", "set?": "o",
  },
  optimizers: { class: "s0", "id?": "s" },
  groups: { optimizer: "n", count: "n", options: "a", "name?": "s" },
  parameters: {
    name: "s", shape: "a", state: "n0", "dtype?": "s", "adapter?": "s", "tied?": "a", "keys?": "o", "id?": "sno",
  },
  naming: { source: "s", "rule?": "s", "details?": "o" },
  weights: { algorithm: "s", values: "a" },
  digests: { algorithm: "s", values: "a" },
  set: { id: "s", index: "n", count: "n", positions: "a" },
};
const IS = {
  s: (value) => typeof value === "string",
  a: Array.isArray,
  o: (value) => value instanceof Map,
  n: isNatural,
  0: (value) => value === null,
};
const NUMBER = "(0|[1-9][0-9]{0,5})";
const VERSION = new RegExp(`^${NUMBER}\\.${NUMBER}$`);

/** Whether all items are strings. */
const areText = (items) => items.every((item) => typeof item === "string");

/** Return the members of an object of table 2 under their names, after R12. */
function members(kind, value, newer) {
  check(value instanceof Map, "R12", () => `${kind}: not an object`);
  const result = {};
  const known = new Set();
  for (const [member, letters] of Object.entries(TABLE[kind])) {
    const name = member.replace("?", "");
    known.add(name);
    check(value.has(name) || name !== member, "R12", () => `${kind}: no ${name}`);
    if (!value.has(name)) continue;
    check([...letters].some((letter) => IS[letter](value.get(name))), "R12", () => `${kind}: ${name} is of another type`);
    result[name] = value.get(name);
  }
  const unknown = [...value.keys()].find((name) => !known.has(name));
  check(newer || unknown === undefined, "R12", () => `${kind}: the unknown member ${quoted(unknown)}`);
  return result;
}

/** Check the names of parameters: none twice, none empty or with a dollar sign in front (R14, R26). */
export function checkNames(parameters, rule) {
  const seen = new Set();
  for (const { name, tied } of parameters) {
    for (const each of [name, ...tied]) {
      check(each !== "" && !each.startsWith("$") && !seen.has(each), rule, () => `the name ${quoted(each)} is not allowed, or twice`);
      seen.add(each);
    }
  }
}

function readExtensions(value) {
  const extensions = mapping(value ?? new Map(), "R12", "extensions");
  for (const [name, extension] of extensions) {
    const needed = extension instanceof Map ? extension.get("must_understand") : undefined;
    check(typeof needed === "boolean", "R13", () => `the extension ${quoted(name)} does not say whether it must be understood`);
    check(!needed, "R13", () => `the extension ${quoted(name)} must be understood, and is not known here`, "unsupported");
  }
  return extensions;
}

function readParameter(value, newer, states) {
  const found = members("parameters", value, newer);
  const where = () => quoted(found.name);
  check(isShape(found.shape), "R12", () => `${where()}: its shape`);
  check(found.dtype === undefined || Object.hasOwn(BITS, found.dtype), "R12", () => `${where()}: its dtype`);
  check(areText(found.tied ?? []), "R12", () => `${where()}: tied names that are not strings`);
  check(areText([...(found.keys ?? new Map()).values()]), "R12", () => `${where()}: keys that are not strings`);
  const id = found.id === undefined ? null : decode(found.id);
  check(id === null || ["bigint", "string"].includes(typeof id), "R12", () => `${where()}: its id`);
  check(found.state === null || found.state < states.length, "R16", () => `${where()}: state ${found.state} of ${states.length}`);
  return {
    name: found.name, shape: found.shape, dtype: found.dtype ?? null, adapter: found.adapter ?? null,
    tied: found.tied ?? [], keys: found.keys ?? new Map(), id, state: found.state, slots: null, weights: null,
  };
}

function readGroup(value, newer) {
  const found = members("groups", value, newer);
  const options = new Map();
  for (const option of found.options) {
    check(Array.isArray(option) && option.length === 2 && typeof option[0] === "string", "R12", "an option of a group");
    check(!options.has(option[0]), "R15", () => `the option ${quoted(option[0])} twice in a group`);
    options.set(option[0], decode(option[1]));
  }
  return { optimizer: found.optimizer, count: found.count, name: found.name ?? null, options };
}

function checkGroups(groups, optimizers, parameters) {
  let last = 0;
  let count = 0;
  for (const group of groups) {
    check(group.optimizer < optimizers.length, "R15", () => `a group of optimizer ${group.optimizer} of ${optimizers.length}`);
    check(group.optimizer >= last, "R15", "groups that are not in the order of the optimizers");
    last = group.optimizer;
    count += group.count;
  }
  check(count <= parameters.length, "R15", () => `groups of ${count} parameters, and ${parameters.length} parameters`);
}

/** Whether the shape of a tensor agrees with its role (R18). */
function agrees(role, own, shape) {
  const is = (other) => own.length === other.length && own.every((size, axis) => size === other[axis]);
  const [rest, second, last] = [shape.slice(0, -2), shape.at(-2), shape.at(-1)];
  if (role === "param") return is(shape);
  if (role === "row") return shape.length > 1 && (is([...rest, second]) || is([...rest, second, 1]));
  if (role === "col") return shape.length > 1 && (is([...rest, last]) || is([...rest, 1, last]));
  return true;
}

/** Read a slot tree; `bind(label, role)` makes its tensors. Labels are checked by R17. */
function readTree(tree, bind) {
  const labels = new Set();
  return mapping(tree, "R16", "a slot tree", (label, role) => {
    check(label !== "" && !label.includes("/") && !labels.has(label), "R17", () => `the label ${quoted(label)}`);
    labels.add(label);
    return bind(label, role);
  });
}

function bindAll(file, states, parameters, globals) {
  const used = new Set();
  const binder = (owner, shape) => (label, role) => {
    const key = `${owner}/${label}`;
    const tensor = file.tensors.get(key);
    check(tensor !== undefined, "R17", () => `no tensor ${quoted(key)} in the header`);
    used.add(key);
    check(tensor.shape.length > 0, "R18", () => `${quoted(key)} has no axes`);
    check(shape === null || agrees(role, tensor.shape, shape), "R18", () => `${quoted(key)} has the role ${role} and another shape`);
    return new Slot(label, role, tensor);
  };
  for (const tree of states) readTree(tree, () => null);
  for (const parameter of parameters) {
    if (parameter.state !== null) parameter.slots = readTree(states[parameter.state], binder(parameter.name, parameter.shape));
  }
  const result = readTree(globals, binder("$globals", null));
  const unused = [...file.tensors.keys()].find((key) => !used.has(key));
  check(unused === undefined, "R17", () => `the tensor ${quoted(unused)} belongs to no slot`);
  return result;
}

function checkDigest(value, algorithm, rule) {
  const form = algorithm === "xxh3-128" ? /^[0-9a-f]{32}$/ : /^([0-9a-f]{2})+$/;
  check(typeof value === "string" && form.test(value), rule, () => `${quoted(value)} is not a digest by ${quoted(algorithm)}`);
}

function readDigests(digests, tensors) {
  const { algorithm, values } = digests;
  check(values.length === tensors.size, "R20", () => `${values.length} digests for ${tensors.size} tensors`);
  [...tensors.values()].forEach((tensor, n) => {
    checkDigest(values[n], algorithm, "R20");
    tensor.digest = { algorithm, value: values[n] };
  });
}

function readWeights({ algorithm, values }, parameters) {
  check(values.length === parameters.length, "R19", () => `${values.length} digests for ${parameters.length} parameters`);
  parameters.forEach((parameter, n) => {
    if (values[n] === null) return;
    check(Array.isArray(values[n]) && values[n].length === 2, "R19", "a digest of weights that is not a pair");
    const [dtype, value] = values[n];
    check(typeof dtype === "string" && Object.hasOwn(BITS, dtype), "R19", "the dtype of a digest of weights");
    checkDigest(value, algorithm, "R19");
    parameter.weights = { algorithm, dtype, value };
  });
}

function readPlace(set, parameters) {
  const { id, index, count, positions } = set;
  check(/^[0-9a-f]{32}$/.test(id), "R23", "the id of a set is not 32 hex digits");
  check(index >= 1 && index <= count, "R23", () => `shard ${index} of ${count}`);
  const each = positions.every(isNatural) && new Set(positions).size === positions.length;
  check(each && positions.length === parameters.length, "R23", "the positions of a shard");
  return { id, index, count, positions };
}

/**
 * Read the manifest of a file (R10 to R23).
 *
 * @param {{manifest: Map<string, unknown>, tensors: Map<string, import("./container.js").Tensor>}} file
 */
export function readManifest(file) {
  const { manifest } = file;
  check(manifest.get("format") === "named-optimizer-state", "R10", "the format is not named-optimizer-state");
  const version = manifest.get("version");
  const parts = typeof version === "string" ? version.match(VERSION) : null;
  check(parts !== null, "R11", "the version is not MAJOR.MINOR");
  check(parts[1] === "1", "R11", () => `version ${version}; this reader reads version 1`, "unsupported");
  const newer = Number(parts[2]) > MINOR;
  const found = members("manifest", manifest, newer);
  const extensions = readExtensions(found.extensions);
  const optimizers = found.optimizers.map((each) => members("optimizers", each, newer));
  const groups = found.groups.map((group) => readGroup(group, newer));
  const parameters = found.parameters.map((parameter) => readParameter(parameter, newer, found.states));
  checkNames(parameters, "R14");
  checkGroups(groups, optimizers, parameters);
  const naming = members("naming", found.naming, newer);
  const globals = bindAll(file, found.states, parameters, found.globals ?? new Map());
  readDigests(members("digests", found.digests, newer), file.tensors);
  if (found.weights !== undefined) readWeights(members("weights", found.weights, newer), parameters);
  return {
    version,
    optimizers: optimizers.map((each) => ({ class: each.class, id: each.id ?? null })),
    groups,
    parameters,
    globals,
    naming: {
      source: naming.source,
      rule: naming.rule ?? null,
      details: mapping(naming.details ?? new Map(), "R12", "details of naming"),
    },
    origin: mapping(found.origin ?? new Map(), "R12", "origin"),
    extra: mapping(found.extra ?? new Map(), "R12", "extra"),
    extensions,
    globalStep: found.global_step ?? null,
    tensors: file.tensors,
    set: found.set === undefined ? null : readPlace(members("set", found.set, newer), parameters),
  };
}

/** Return what the shards of a set have to agree on (R23), to be compared. */
export function common(manifest) {
  const groups = manifest.get("groups").map((group) => new Map(group).set("count", 0));
  return [groups, ...["optimizers", "naming", "extensions", "global_step"].map((name) => manifest.get(name) ?? null)];
}
