// Section 6: what a name means, one file or a set of shards.
import { Refused, check, quoted } from "./errors.js";
import { isNatural, parseBytes, readFile } from "./container.js";
import { blake2b } from "./hashes.js";
import { canonical } from "./json.js";
import { checkNames, common, readManifest } from "./manifest.js";
import { exactly, fromURL } from "./sources.js";

const MAX_INDEX = 67_108_864;
const MAX_SHARDS = 256;
const SUFFIX = ".index.json";
const TRIES = 3; // how often a set is read when its index is replaced meanwhile

const own = (value, names) => value instanceof Map && value.size === names.length && names.every((name) => value.has(name));

/** Read the state in one file. */
async function openFile(source) {
  const state = readManifest(await readFile(source));
  const { set, ...rest } = state;
  check(set === null, "R23", () => `this is shard ${set?.index} of ${set?.count}, and no state by itself: open the index of its set`);
  return { ...rest, files: [source.name] };
}

function readIndex(bytes) {
  const index = parseBytes(bytes, "R25");
  check(own(index, ["metadata", "shards", "weight_map"]), "R25", "the index has other members");
  const [metadata, shards, places] = [index.get("metadata"), index.get("shards"), index.get("weight_map")];
  check(own(metadata, ["format", "set", "total_size"]), "R25", "the metadata of the index have other members");
  check(metadata.get("format") === "named-optimizer-state", "R25", "this is the index of another format");
  check(typeof metadata.get("set") === "string" && isNatural(metadata.get("total_size")), "R25", "the metadata of the index");
  check(Array.isArray(shards) && shards.length >= 1 && shards.length <= MAX_SHARDS, "R25", "the shards of the index");
  for (const shard of shards) {
    check(own(shard, ["file", "digest"]) && typeof shard.get("digest") === "string", "R25", "a shard of the index");
    const file = shard.get("file");
    check(typeof file === "string" && /^(?!\.\.?$)[^/\\\0]+$/s.test(file), "R25", () => `${quoted(file)} is not a file next to the index`);
  }
  check(places instanceof Map, "R25", "the weight_map of the index");
  return { set: metadata.get("set"), total: metadata.get("total_size"), shards, places };
}

/** Return bytes with every occurrence of a text replaced by zeros. */
function withoutText(bytes, text) {
  const wanted = Uint8Array.from(text, (char) => char.charCodeAt(0));
  const result = bytes.slice();
  for (let at = bytes.indexOf(wanted[0]); at >= 0; at = bytes.indexOf(wanted[0], at + 1)) {
    if (wanted.every((byte, n) => bytes[at + n] === byte)) {
      result.fill(0x30, at, at + wanted.length);
      at += wanted.length - 1;
    }
  }
  return result;
}

async function readPart(source) {
  try {
    const file = await readFile(source);
    return { file, part: readManifest(file) };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    throw new Refused(error.rule, `${quoted(source.name)}: ${error.message.slice(error.rule.length + 2)}`, error.kind);
  }
}

async function readShard(index, number, resolve) {
  const name = index.shards[number - 1].get("file");
  const source = await resolve(name);
  check(source !== null, "R25", () => `the shard ${quoted(name)} is not there`);
  const { file, part } = await readPart(source);
  const { id, index: place, count } = part.set ?? {};
  const fits = id === index.set && place === number && count === index.shards.length;
  check(fits, "R23", () => `${quoted(name)} is not shard ${number} of ${index.shards.length} of this set`);
  check(file.digest === index.shards[number - 1].get("digest"), "R25", () => `the index states another digest of ${quoted(name)}`);
  const alone = number === 1 || part.globals.size + part.origin.size + part.extra.size === 0;
  check(alone, "R23", () => `${quoted(name)} has globals, origin or extra, and is not the first shard`);
  for (const [key, tensor] of part.tensors) {
    check(index.places.get(key) === name, "R25", () => `the weight_map has another file for ${quoted(key)}`);
  }
  const digest = blake2b(withoutText(file.head, index.set));
  return { part, digest, common: canonical(common(file.manifest)), name };
}

/** Put the parameters of the shards in their places (R26). */
function united(parts, groups) {
  const total = parts.reduce((sum, part) => sum + part.parameters.length, 0);
  const runs = [];
  let at = 0;
  for (const group of groups) runs.push([at, (at += group.count)]);
  runs.push([at, total]);
  const result = new Array(total).fill(null);
  for (const part of parts) {
    const counts = [...part.groups.map((group) => group.count), Infinity];
    let run = 0;
    let left = counts[0];
    part.parameters.forEach((parameter, n) => {
      while (left === 0) left = counts[++run];
      left--;
      const position = part.set.positions[n];
      const fits = position >= runs[run][0] && position < runs[run][1] && result[position] === null;
      check(fits, "R26", () => `${quoted(parameter.name)} is at position ${position}, outside of its group or taken`);
      result[position] = parameter;
    });
  }
  return result;
}

/**
 * Read a state in several files.
 *
 * @param {import("./sources.js").Source} source of the index
 * @param {(name: string) => Promise<object | null>} resolve gives the source of a file next to the index, or null
 */
async function openSet(source, resolve) {
  check(source.size <= MAX_INDEX, "R25", () => `an index of ${source.size} bytes; at most ${MAX_INDEX} are allowed`);
  const index = readIndex(await exactly(source, 0, source.size, "R25"));
  const shards = [];
  for (let number = 1; number <= index.shards.length; number++) shards.push(await readShard(index, number, resolve));
  const parts = shards.map(({ part }) => part);
  check(new Set(shards.map((shard) => shard.common)).size === 1, "R23", "the shards do not agree");
  const digests = new TextEncoder().encode(shards.map(({ digest }) => digest).join(""));
  check(blake2b(digests) === index.set, "R24", "the id of the set is not the digest of its shards");
  const tensors = new Map(parts.flatMap((part) => [...part.tensors]));
  check(tensors.size === index.places.size, "R25", "the weight_map has other tensors than the shards");
  const bytes = [...tensors.values()].reduce((sum, tensor) => sum + tensor.byteLength, 0);
  check(bytes === index.total, "R25", () => `a total_size of ${index.total}, and tensors of ${bytes} bytes`);
  const groups = parts[0].groups.map((group, n) => ({
    ...group,
    count: parts.reduce((sum, part) => sum + part.groups[n].count, 0),
  }));
  const parameters = united(parts, groups);
  checkNames(parameters, "R26");
  const { set, ...first } = parts[0];
  return { ...first, groups, parameters, tensors, files: shards.map(({ name }) => name) };
}

/** Whether a name is that of the index of a set. */
export function isIndex(name) {
  return name.endsWith(SUFFIX);
}

/**
 * Open a state: read the headers, check every rule, and read no tensor.
 *
 * @param {object} source of a file, or of the index of a set
 * @param {(name: string) => Promise<object | null>} [resolve] gives the source of a file next to the index
 */
export async function open(source, resolve = async () => null) {
  return isIndex(source.name) ? openSet(source, resolve) : openFile(source);
}

/** Return a source whose bytes are read once, and stay the same. */
async function held(source) {
  check(source.size <= MAX_INDEX, "R25", `an index of ${source.size} bytes; at most ${MAX_INDEX} are allowed`);
  const bytes = await exactly(source, 0, source.size, "R25");
  return { ...source, read: async (start, end) => bytes.slice(start, end) };
}

/**
 * Open what a name means: its index if there is one, else the file. A set that cannot be read is read again if its index was
 * replaced meanwhile (section 6).
 *
 * @param {() => Promise<object | null>} findIndex
 * @param {() => Promise<object | null>} findFile
 * @param {(name: string) => Promise<object | null>} near
 */
export async function openMeant(findIndex, findFile, near) {
  const find = async () => {
    const index = await findIndex();
    return index === null ? findFile() : held(index);
  };
  let source = await find();
  for (let left = TRIES; source !== null; ) {
    try {
      return await open(source, near);
    } catch (error) {
      const now = isIndex(source.name) && --left > 0 ? await find() : null;
      if (now === null || (await same(source, now))) throw error;
      source = now;
    }
  }
  return null;
}

async function same(one, two) {
  if (one.name !== two.name || one.size !== two.size) return false;
  const [a, b] = await Promise.all([one, two].map((each) => each.read(0, each.size)));
  return a.every((byte, at) => byte === b[at]);
}

/** Open the state that a URL means: its index if there is one, else the file. */
export async function openURL(url, options = {}) {
  const base = new URL(url, globalThis.location?.href);
  const near = (name) => fromURL(new URL(encodeURIComponent(name), base), options);
  const index = new URL(base);
  if (!isIndex(base.pathname)) index.pathname += SUFFIX;
  const findFile = async () => (isIndex(base.pathname) ? null : fromURL(base, options));
  const state = await openMeant(() => fromURL(index, options), findFile, near);
  if (state === null) throw new Error(`${base}: there is no such file`);
  return state;
}

/**
 * Compare every tensor with its digest (R21).
 *
 * @param {object} state
 * @param {(done: number, total: number) => void} [progress] called behind each tensor
 * @param {AbortSignal} [signal] ends it, which rejects the promise with the signal's reason
 * @returns {Promise<{verified: boolean, compared: number, total: number}>} verified: every tensor was compared
 */
export async function verify(state, progress = () => {}, signal = undefined) {
  const total = state.tensors.size;
  let compared = 0;
  let done = 0;
  for (const tensor of state.tensors.values()) {
    signal?.throwIfAborted();
    if (await tensor.verify(signal)) compared++;
    progress(++done, total);
  }
  return { verified: compared === total, compared, total };
}
