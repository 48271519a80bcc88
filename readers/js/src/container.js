// Section 3: a safetensors file, and the envelope in its metadata.
import { Refused, check, quoted } from "./errors.js";
import { Xxh3, blake2b } from "./hashes.js";
import { MAX_INT, parse } from "./json.js";
import { exactly } from "./sources.js";

export const MAX_HEADER = 33_554_432;
export const MAX_DIMENSIONS = 64;
const ALIGNMENT = 64;
const PREFIX = '{"__metadata__":{"optimizer_state":"{\\"digest\\":\\"';
const DIGEST = [8 + PREFIX.length, 8 + PREFIX.length + 32];
const PIECE = 4 << 20; // bytes that are read at a time: whole elements of every dtype

/** Bits of each dtype (table 1). */
export const BITS = {
  BOOL: 8, U8: 8, I8: 8, F8_E5M2: 8, F8_E4M3: 8, F8_E8M0: 8, F8_E4M3FNUZ: 8, F8_E5M2FNUZ: 8,
  U16: 16, I16: 16, F16: 16, BF16: 16, U32: 32, I32: 32, F32: 32, U64: 64, I64: 64, F64: 64, C64: 64,
  F4: 4, F6_E2M3: 6, F6_E3M2: 6,
};

const ARRAYS = {
  I8: Int8Array, U16: Uint16Array, I16: Int16Array, U32: Uint32Array, I32: Int32Array, F32: Float32Array,
  U64: BigUint64Array, I64: BigInt64Array, F64: Float64Array, C64: Float32Array,
};

/** Return bytes, of whole elements, as the typed array of a dtype; see `Tensor.values`. */
export function numbers(dtype, bytes) {
  if (dtype === "BF16") {
    return new Float32Array(Uint32Array.from(new Uint16Array(bytes.slice().buffer), (bits) => bits << 16).buffer);
  }
  if (dtype === "F16") return Float32Array.from(new Uint16Array(bytes.slice().buffer), half);
  return dtype in ARRAYS ? new ARRAYS[dtype](bytes.slice().buffer) : bytes;
}

function half(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent === 31 ? (fraction ? NaN : Infinity) : exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits & 0x8000 ? -size : size;
}

/** Whether a value is a natural of at most 2^53 - 1. */
export function isNatural(value) {
  return typeof value === "number" && value >= 0;
}

/** Whether a value is a shape: at most 64 naturals. */
export function isShape(value) {
  return Array.isArray(value) && value.length <= MAX_DIMENSIONS && value.every(isNatural);
}

/** A tensor of a file: where its bytes are. Nothing is read until you ask for it. */
export class Tensor {
  constructor(source, key, dtype, shape, offset, byteLength) {
    Object.assign(this, { source, key, dtype, shape, offset, byteLength, digest: null });
  }

  /** Read its bytes. */
  bytes() {
    return exactly(this.source, this.offset, this.offset + this.byteLength, "R6");
  }

  /** Read its elements, in C order. */
  async values() {
    return numbers(this.dtype, await this.bytes());
  }

  /** Read its bytes in pieces of 4 MiB; an AbortSignal ends that before the next piece. */
  async *pieces(signal) {
    const end = this.offset + this.byteLength;
    for (let at = this.offset; at < end; at += PIECE) {
      signal?.throwIfAborted();
      yield exactly(this.source, at, Math.min(at + PIECE, end), "R6");
    }
  }

  /** Compare its bytes with its digest (R21): true, or null where the algorithm is not known here. */
  async verify(signal) {
    if (this.digest?.algorithm !== "xxh3-128") return null;
    const hash = new Xxh3();
    for await (const piece of this.pieces(signal)) hash.update(piece);
    check(hash.digest() === this.digest.value, "R21", () => `the tensor ${quoted(this.key)} was changed`, "digest");
    return true;
  }
}

function decode(bytes, rule) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new Refused(rule, "the text is not UTF-8");
  }
}

/** Parse bytes as JSON; `rule` is the one that asks for UTF-8. */
export function parseBytes(bytes, rule) {
  return parse(decode(bytes, rule));
}

/** Read the first 8 + N bytes of a file (R1). */
async function readHead(source) {
  const first = await source.read(0, Math.min(source.size, 65_536));
  check(first.length >= 8, "R1", "the file has fewer than 8 bytes");
  const length = new DataView(first.buffer, first.byteOffset).getBigUint64(0, true);
  check(length <= MAX_HEADER, "R1", () => `a header of ${length} bytes; at most ${MAX_HEADER} are allowed`);
  const end = 8 + Number(length);
  check(end <= source.size, "R1", () => `a header of ${length} bytes in a file of ${source.size}`);
  if (end <= first.length) return first.subarray(0, end);
  const head = new Uint8Array(end);
  head.set(first);
  head.set(await exactly(source, first.length, end, "R1"), first.length);
  return head;
}

function readTensors(source, header, end) {
  const tensors = new Map();
  for (const [key, entry] of header) {
    check(entry instanceof Map && entry.size === 3, "R4", () => `the entry of ${quoted(key)} is not three members`);
    const [dtype, shape, offsets] = ["dtype", "shape", "data_offsets"].map((member) => entry.get(member));
    check(typeof dtype === "string" && Object.hasOwn(BITS, dtype), "R4", () => `the dtype of ${quoted(key)}`);
    check(isShape(shape), "R4", () => `the shape of ${quoted(key)}`);
    check(Array.isArray(offsets) && offsets.length === 2 && offsets.every(isNatural), "R4", () => `the offsets of ${quoted(key)}`);
    const product = (sizes) => sizes.reduce((all, size) => all * BigInt(size), 1n);
    const others = shape.filter((size) => size > 0);
    check(others.length === shape.length || product(others) <= BigInt(MAX_INT), "R4", () => `the shape of ${quoted(key)} overflows`);
    const [begin, stop] = offsets;
    const bits = product(shape) * BigInt(BITS[dtype]);
    check(bits === BigInt(stop - begin) * 8n, "R5", () => `${quoted(key)} has ${stop - begin} bytes, and a shape of ${bits} bits`);
    tensors.set(key, new Tensor(source, key, dtype, shape, end + begin, stop - begin));
  }
  return tensors;
}

function inDataOrder(tensors) {
  const order = [...tensors.values()];
  return order.sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength || compared(a.key, b.key));
}

/** Compare two texts by code points. */
function compared(a, b) {
  const [one, two] = [Array.from(a), Array.from(b)];
  for (let i = 0; i < one.length && i < two.length; i++) {
    if (one[i] !== two[i]) return one[i].codePointAt(0) - two[i].codePointAt(0);
  }
  return one.length - two.length;
}

/**
 * Read the header of any strict safetensors file (R1 to R6, and R9 where there is a digest).
 *
 * @returns {Promise<{head: Uint8Array, metadata: Map<string, string>, tensors: Map<string, Tensor>, digest: string | null}>}
 *   `tensors` in data order; `head` is the first 8 + N bytes with the digest as zeros; `digest` is null in a file that
 *   does not begin as R7 says.
 */
export async function readContainer(source) {
  const head = (await readHead(source)).slice();
  const latin = String.fromCharCode(...head.subarray(8, DIGEST[1]));
  const digest = latin.startsWith(PREFIX) && /^[0-9a-f]{32}$/.test(latin.slice(PREFIX.length)) ? latin.slice(-32) : null;
  if (digest !== null) {
    head.fill(0x30, ...DIGEST);
    check(blake2b(head) === digest, "R9", "the header was changed after it was written", "digest");
  }
  const text = decode(head.subarray(8), "R2");
  check(/^\{/.test(text) && /\}$/.test(text.replace(/ +$/, "")), "R2", "the header is not an object followed by spaces");
  const header = parse(text);
  const metadata = header.get("__metadata__") ?? new Map();
  check(!header.has("__metadata__") || header.get("__metadata__") instanceof Map, "R4", "__metadata__ is not an object");
  check([...metadata.values()].every((value) => typeof value === "string"), "R4", "__metadata__ has a member that is not a string");
  header.delete("__metadata__");
  const tensors = readTensors(source, header, head.length);
  const order = inDataOrder(tensors);
  let at = head.length;
  for (const tensor of order) {
    check(tensor.offset === at, "R6", () => `${quoted(tensor.key)} begins at byte ${tensor.offset}, not at ${at}`);
    at += tensor.byteLength;
  }
  check(at === source.size, "R6", () => `the tensors end at byte ${at}, and the file at ${source.size}`);
  return { head, metadata, tensors: new Map(order.map((tensor) => [tensor.key, tensor])), digest };
}

/** Read a file of the format as far as its manifest (R1 to R9). */
export async function readFile(source) {
  const file = await readContainer(source);
  const text = file.metadata.get("optimizer_state");
  check(file.digest !== null && file.metadata.size === 1 && text !== undefined, "R7", "this is not named optimizer state");
  check(file.head.length % ALIGNMENT === 0, "R8", () => `the tensors begin at byte ${file.head.length}`);
  const envelope = parse(text);
  check(envelope instanceof Map && envelope.size === 2 && envelope.has("digest"), "R7", "the envelope has other members");
  check(envelope.get("manifest") instanceof Map, "R7", "the manifest is not an object");
  return { ...file, source, manifest: envelope.get("manifest") };
}

