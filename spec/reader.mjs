// Named optimizer state in JavaScript, after format.md: for browsers and node 18 or newer, without packages.
//   const state = await open((start, end) => file.slice(start, end).arrayBuffer()); // a File, or fetch with Range
//   await state.parameters.get(name).state.exp_avg.data();                          // reads these bytes only
// Numbers are JavaScript's, in which 1 and 1.0 are one. BF16 comes as Float32Array; types without a typed array come as
// their bits. Of a set, open each file with shard = true: manifest.set.positions says where its parameters belong.
const PREFIX = '{"__metadata__":{"optimizer_state":"{\\"digest\\":\\"';
const ARRAYS = {BOOL: Uint8Array, U8: Uint8Array, I8: Int8Array, U16: Uint16Array, I16: Int16Array, F16: Uint16Array,
  BF16: Uint16Array, U32: Uint32Array, I32: Int32Array, F32: Float32Array, U64: BigUint64Array, I64: BigInt64Array,
  F64: Float64Array, C64: Float32Array};
const fail = (rule, what) => { throw new Error(`${rule}: ${what}`); };
const hex = bytes => Array.from(bytes, byte => byte.toString(16).padStart(2, "0")).join("");
const unhex = text => Uint8Array.from(text.match(/../g) ?? [], pair => parseInt(pair, 16));

const IV = ["6a09e667f3bcc908", "bb67ae8584caa73b", "3c6ef372fe94f82b", "a54ff53a5f1d36f1", "510e527fade682d1",
  "9b05688c2b3e6c1f", "1f83d9abfb41bd6b", "5be0cd19137e2179"].map(word => BigInt("0x" + word));
const SIGMA = `0123456789abcdef ea489fd61c02b753 b8c052fdae367194 7931dcbe265a40f8 905724afe1bc683d
  2c6a0b834d75fe19 c51fed4a0763928b db7ec13950f4862a 6fe9b308c2d714a5 a2847615fb9e3cd0`.split(/\s+/);

function blake2b(bytes) { // RFC 7693: no key, 16 bytes of output
  const u64 = word => BigInt.asUintN(64, word), turn = (word, n) => u64((word >> n) | (word << (64n - n)));
  const h = [IV[0] ^ 0x01010010n, ...IV.slice(1)];
  for (let at = 0; at === 0 || at < bytes.length; at += 128) {
    const end = Math.min(at + 128, bytes.length), m = new BigUint64Array(16), v = [...h, ...IV];
    new Uint8Array(m.buffer).set(bytes.subarray(at, end));
    v[12] ^= BigInt(end), v[14] = end === bytes.length ? u64(~v[14]) : v[14];
    for (let n = 0; n < 96; n++) {
      const i = n % 8, row = i >> 2, s = SIGMA[(n >> 3) % 10];
      const [a, b, c, d] = [0, 1, 2, 3].map(k => 4 * k + (i + row * k) % 4);
      for (const [x, p, q] of [[2 * i, 32n, 24n], [2 * i + 1, 16n, 63n]]) {
        v[a] = u64(v[a] + v[b] + m[parseInt(s[x], 16)]), v[d] = turn(v[d] ^ v[a], p);
        v[c] = u64(v[c] + v[d]), v[b] = turn(v[b] ^ v[c], q);
      }
    }
    h.forEach((word, k) => { h[k] = word ^ v[k] ^ v[k + 8]; });
  }
  return new Uint8Array(BigUint64Array.of(h[0], h[1]).buffer);
}

function numbers(dtype, buffer) {
  const array = new (ARRAYS[dtype] ?? Uint8Array)(buffer);
  return dtype === "BF16" ? new Float32Array(Uint32Array.from(array, bits => bits << 16).buffer) : array;
}

function decode(value, tensor) { // a typed value (section 5)
  if (Array.isArray(value)) return value.map(item => decode(item, tensor));
  if (value === null || typeof value !== "object") return value;
  const tag = Object.keys(value).find(key => key.startsWith("$")), body = value[tag];
  switch (tag) {
    case undefined: return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, decode(item, tensor)]));
    case "$tuple": return decode(body, tensor);
    case "$float": return {inf: Infinity, "-inf": -Infinity, nan: NaN}[body] ?? fail("R22", body);
    case "$int": return BigInt(body);
    case "$dict": return new Map(body.map(([key, item]) => [decode(key), decode(item, tensor)]));
    case "$bytes": return unhex(body);
    case "$scalar": return (array => array.length > 1 ? array : array[0])(numbers(body[0], unhex(body[1]).buffer));
    default: return tag === "$tensor" ? tensor(body, value.role) : fail("R22", tag);
  }
}

export async function open(read, shard = false) {
  const length = Number(new DataView(await read(0, 8)).getBigUint64(0, true)), start = 8 + PREFIX.length;
  if (length > 33554432) fail("R1", `a header of ${length} bytes`);
  const raw = new Uint8Array(await read(0, 8 + length)), utf8 = new TextDecoder("utf-8", {fatal: true});
  const text = utf8.decode(raw.subarray(8)), digest = text.slice(PREFIX.length, PREFIX.length + 32);
  if (!text.startsWith(PREFIX)) fail("R7", "not named optimizer state");
  if (hex(blake2b(raw.map((byte, at) => at >= start && at < start + 32 ? 48 : byte))) !== digest) fail("R9", "changed");
  const entries = new Map(Object.entries(JSON.parse(text)));
  const {manifest} = JSON.parse(entries.get("__metadata__").optimizer_state);
  if (!/^1\.\d+$/.test(manifest.version)) fail("R11", `version ${manifest.version}`);
  for (const each of Object.values(manifest.extensions ?? {})) if (each.must_understand) fail("R13", "an extension");
  if ("set" in manifest !== shard) fail("R23", "a shard is no state by itself");
  const tensors = owner => (label, role) => {
    const {dtype, shape, data_offsets: ends} = entries.get(`${owner}/${label}`) ?? fail("R17", `${owner}/${label}`);
    return {dtype, shape, role, data: async () => numbers(dtype, await read(...ends.map(end => 8 + length + end)))};
  };
  const parameters = new Map(manifest.parameters.map(({state, ...rest}) =>
    [rest.name, {...rest, state: state === null ? null : decode(manifest.states[state], tensors(rest.name))}]));
  const groups = manifest.groups.map(({options, ...rest}) => ({...rest, options: new Map(decode(options))}));
  return {manifest, parameters, groups, globals: decode(manifest.globals ?? {}, tensors("$globals"))};
}
