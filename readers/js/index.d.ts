/** Named optimizer state, version 1: the text is spec/format.md. */

/** Where bytes come from. */
export interface Source {
  /** The file's name, without a folder. */
  name: string;
  /** Its size in bytes. */
  size: number;
  /** Give the bytes from `start` to `end`, which is not included. */
  read(start: number, end: number): Promise<Uint8Array>;
}

export type Dtype =
  | "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ"
  | "U16" | "I16" | "F16" | "BF16" | "U32" | "I32" | "F32" | "U64" | "I64" | "F64" | "C64"
  | "F4" | "F6_E2M3" | "F6_E3M2";

export type Role = "param" | "row" | "col" | "block" | "opaque";

/**
 * Elements in C order. BF16 and F16 come widened to Float32Array, C64 as pairs in a Float32Array, and dtypes without a
 * typed array (BOOL, U8, F8_*, F6_*, F4) as their bytes.
 */
export type Elements =
  | Uint8Array | Int8Array | Uint16Array | Int16Array | Uint32Array | Int32Array
  | Float32Array | Float64Array | BigUint64Array | BigInt64Array;

/** A digest as the file states it; `value` is hex. */
export interface Digest {
  algorithm: string;
  value: string;
}

/** A tensor of a file. Nothing is read until you ask for it. */
export class Tensor {
  readonly source: Source;
  readonly key: string;
  readonly dtype: Dtype;
  readonly shape: number[];
  /** Where its bytes begin in its file. */
  readonly offset: number;
  readonly byteLength: number;
  /** Null in a plain safetensors file. */
  readonly digest: Digest | null;
  bytes(): Promise<Uint8Array>;
  values(): Promise<Elements>;
  /** Read the bytes in pieces of 4 MiB; a signal ends that before the next piece, which throws its reason. */
  pieces(signal?: AbortSignal): AsyncGenerator<Uint8Array>;
  /**
   * Compare the bytes with the digest (R21): true, or null where the algorithm is not known here.
   * @throws {Refused} R21, if the bytes were changed
   */
  verify(signal?: AbortSignal): Promise<true | null>;
}

/** A tensor without axes. */
export class Scalar {
  readonly dtype: Dtype;
  readonly bytes: Uint8Array;
  /** Its value, as `Tensor.values` gives elements; a C64 as an array of two. */
  item(): number | bigint | Float32Array;
}

/** A tensor in a slot tree, with its role. */
export class Slot {
  readonly label: string;
  readonly role: Role;
  readonly tensor: Tensor;
}

/** An array that is told apart from a list. */
export class Tuple extends Array<Value> {}

/** A typed value (section 5): integers are bigint and floats are number, so that 1 and 1.0 stay two values. */
export type Value =
  | null | boolean | string | bigint | number | Uint8Array | Scalar | Slot | Tuple | Value[] | Map<Value, Value>;

export interface Parameter {
  name: string;
  shape: number[];
  dtype: Dtype | null;
  adapter: string | null;
  /** Other names of the same tensor. */
  tied: string[];
  /** What others call it, by who calls it so. */
  keys: Map<string, string>;
  /** Its id in the file that the state was converted from, where the ids were not 0, 1, 2 and so on. */
  id: bigint | string | null;
  /** Its slot tree; null says that the optimizer never made a step with it. */
  slots: Map<string, Value> | null;
  /** The digest of the parameter's own bytes, with their dtype. */
  weights: (Digest & { dtype: Dtype }) | null;
}

export interface Group {
  /** An index into `optimizers`. */
  optimizer: number;
  /** How many parameters it has: the next ones of `parameters`. Those behind the last group are carried. */
  count: number;
  name: string | null;
  options: Map<string, Value>;
}

export interface State {
  version: string;
  optimizers: { class: string | null; id: string | null }[];
  groups: Group[];
  parameters: Parameter[];
  globals: Map<string, Value>;
  naming: { source: string; rule: string | null; details: Map<string, Value> };
  origin: Map<string, Value>;
  extra: Map<string, Value>;
  extensions: Map<string, Map<string, Value>>;
  globalStep: number | null;
  /** Every tensor by its key, in the order of its bytes. */
  tensors: Map<string, Tensor>;
  /** The names of the files that hold it. */
  files: string[];
}

/** A file that breaks a rule of the format. */
export class Refused extends Error {
  /** The rule's id in spec/format.md, such as "R9". */
  readonly rule: string;
  readonly kind: "malformed" | "digest" | "unsupported";
}

/** Gives the source of a file next to the index of a set, or null where there is none. */
export type Resolve = (name: string) => Promise<Source | null>;

/**
 * Open a state: read the headers, check every rule, and read no tensor.
 * @param source of a file, or of the index of a set (its name ends in `.index.json`)
 * @throws {Refused}
 */
export function open(source: Source, resolve?: Resolve): Promise<State>;

/** Open the state that a URL means, its index if there is one, else the file; the server has to answer Range requests. */
export function openURL(url: string | URL, options?: RequestInit): Promise<State>;

/**
 * Compare every tensor with its digest (R21).
 * @param progress called behind each tensor
 * @param signal ends it, which rejects the promise with the signal's reason
 * @returns `verified` only if every tensor was compared
 * @throws {Refused} R21, at the first tensor that was changed
 */
export function verify(
  state: State,
  progress?: (done: number, total: number) => void,
  signal?: AbortSignal,
): Promise<{ verified: boolean; compared: number; total: number }>;

/** Read the header of any strict safetensors file (R1 to R6), named optimizer state or not. */
export function readContainer(source: Source): Promise<{
  head: Uint8Array;
  metadata: Map<string, string>;
  tensors: Map<string, Tensor>;
  digest: string | null;
}>;

/** Return bytes, of whole elements, as `Tensor.values` gives elements. */
export function numbers(dtype: Dtype, bytes: Uint8Array): Elements;

/** Whether a name is that of the index of a set. */
export function isIndex(name: string): boolean;

export function fromBlob(blob: Blob, name?: string): Source;

/** Return a source that is read with Range requests, or null where the server answers 404. */
export function fromURL(url: string | URL, options?: RequestInit): Promise<Source | null>;

/** Return a name for a message: quoted, with control characters and marks of direction escaped. */
export function quoted(name: string): string;
