// The two hashes of the format, on pairs of 32-bit halves (low, high): BigInt is some thirty times slower.

const HALF = 0x1_0000_0000;

/** Return the hex digits of bytes. */
export function hex(bytes) {
  let result = "";
  for (const byte of bytes) result += byte.toString(16).padStart(2, "0");
  return result;
}

// --- BLAKE2b with 16 bytes of output and no key: RFC 7693 ------------------------------------------------------------

const IV = Uint32Array.of(
  0xf3bcc908, 0x6a09e667, 0x84caa73b, 0xbb67ae85, 0xfe94f82b, 0x3c6ef372, 0x5f1d36f1, 0xa54ff53a,
  0xade682d1, 0x510e527f, 0x2b3e6c1f, 0x9b05688c, 0xfb41bd6b, 0x1f83d9ab, 0x137e2179, 0x5be0cd19,
);
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((row) => Uint8Array.from(row, (digit) => 2 * parseInt(digit, 16)));
const ROUNDS = [...SIGMA, SIGMA[0], SIGMA[1]];

const v = new Uint32Array(32);
const m = new Uint32Array(32);

function mix(a, b, c, d, x, y) {
  let low = v[a] + v[b] + m[x];
  v[a + 1] += v[b + 1] + m[x + 1] + ((low / HALF) | 0);
  v[a] = low;
  let p = v[d] ^ v[a];
  let q = v[d + 1] ^ v[a + 1];
  v[d] = q;
  v[d + 1] = p;
  low = v[c] + v[d];
  v[c + 1] += v[d + 1] + (low >= HALF ? 1 : 0);
  v[c] = low;
  p = v[b] ^ v[c];
  q = v[b + 1] ^ v[c + 1];
  v[b] = (p >>> 24) | (q << 8);
  v[b + 1] = (q >>> 24) | (p << 8);
  low = v[a] + v[b] + m[y];
  v[a + 1] += v[b + 1] + m[y + 1] + ((low / HALF) | 0);
  v[a] = low;
  p = v[d] ^ v[a];
  q = v[d + 1] ^ v[a + 1];
  v[d] = (p >>> 16) | (q << 16);
  v[d + 1] = (q >>> 16) | (p << 16);
  low = v[c] + v[d];
  v[c + 1] += v[d + 1] + (low >= HALF ? 1 : 0);
  v[c] = low;
  p = v[b] ^ v[c];
  q = v[b + 1] ^ v[c + 1];
  v[b] = (p << 1) | (q >>> 31);
  v[b + 1] = (q << 1) | (p >>> 31);
}

/**
 * Return the BLAKE2b hash of bytes, with 16 bytes of output and no key, as 32 hex digits.
 *
 * @param {Uint8Array} bytes fewer than 2^53
 */
export function blake2b(bytes) {
  const h = IV.slice();
  h[0] ^= 0x01010010;
  const block = new Uint8Array(128);
  const view = new DataView(block.buffer);
  for (let at = 0; at === 0 || at < bytes.length; at += 128) {
    const end = Math.min(at + 128, bytes.length);
    block.fill(0).set(bytes.subarray(at, end));
    for (let i = 0; i < 32; i++) m[i] = view.getUint32(4 * i, true);
    v.set(h);
    v.set(IV, 16);
    v[24] ^= end;
    v[25] ^= Math.floor(end / HALF);
    if (end === bytes.length) {
      v[28] = ~v[28];
      v[29] = ~v[29];
    }
    for (const s of ROUNDS) {
      mix(0, 8, 16, 24, s[0], s[1]);
      mix(2, 10, 18, 26, s[2], s[3]);
      mix(4, 12, 20, 28, s[4], s[5]);
      mix(6, 14, 22, 30, s[6], s[7]);
      mix(0, 10, 20, 30, s[8], s[9]);
      mix(2, 12, 22, 24, s[10], s[11]);
      mix(4, 14, 16, 26, s[12], s[13]);
      mix(6, 8, 18, 28, s[14], s[15]);
    }
    for (let i = 0; i < 16; i++) h[i] ^= v[i] ^ v[i + 16];
  }
  const digest = new DataView(new ArrayBuffer(16));
  for (let i = 0; i < 4; i++) digest.setUint32(4 * i, h[i], true);
  return hex(new Uint8Array(digest.buffer));
}

// --- XXH3 with 128 bits and seed 0: github.com/Cyan4973/xxHash, doc/xxhash_spec.md ------------------------------------

const SECRET = Uint8Array.from(
  ("b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221" +
   "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8" +
   "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb" +
   "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e").match(/../g),
  (pair) => parseInt(pair, 16),
);
const SECRET_VIEW = new DataView(SECRET.buffer);
const MASK = (1n << 64n) - 1n;
const P32 = [0x9e3779b1n, 0x85ebca77n, 0xc2b2ae3dn];
const P64 = [0x9e3779b185ebca87n, 0xc2b2ae3d27d4eb4fn, 0x165667b19e3779f9n, 0x85ebca77c2b2ae63n, 0x27d4eb2f165667c5n];
const BLOCK = 1024; // bytes between two scrambles: 16 stripes of 64

const u64 = (value) => value & MASK;
const secret = (at) => SECRET_VIEW.getBigUint64(at, true);
const fold = (a, b) => {
  const product = a * b;
  return u64(product) ^ (product >> 64n);
};
const swapped = (value, bytes) => {
  let result = 0n;
  for (let i = 0; i < bytes; i++) result = (result << 8n) | ((value >> BigInt(8 * i)) & 0xffn);
  return result;
};

function avalanche(h) {
  h = u64((h ^ (h >> 37n)) * 0x165667919e3779f9n);
  return h ^ (h >> 32n);
}

function avalanche64(h) {
  h = u64((h ^ (h >> 33n)) * P64[1]);
  h = u64((h ^ (h >> 29n)) * P64[2]);
  return h ^ (h >> 32n);
}

const digits = (low, high) => ((high << 64n) | low).toString(16).padStart(32, "0");

/** Hash at most 240 bytes. */
function short(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.length;
  const n = BigInt(length);
  const read = (at) => view.getBigUint64(at, true);
  const read32 = (at) => BigInt(view.getUint32(at, true));
  if (length === 0) return digits(avalanche64(secret(64) ^ secret(72)), avalanche64(secret(80) ^ secret(88)));
  if (length <= 3) {
    const low = BigInt(((bytes[0] << 16) | (bytes[length >> 1] << 24) | bytes[length - 1] | (length << 8)) >>> 0);
    const turned = swapped(low, 4);
    const high = ((turned << 13n) | (turned >> 19n)) & 0xffffffffn;
    const flip = (at) => (secret(at) & 0xffffffffn) ^ (secret(at) >> 32n);
    return digits(avalanche64(low ^ flip(0)), avalanche64(high ^ flip(8)));
  }
  if (length <= 8) {
    const keyed = (read32(0) | (read32(length - 4) << 32n)) ^ secret(16) ^ secret(24);
    const product = keyed * (P64[0] + (n << 2n));
    let low = u64(product);
    const high = u64((product >> 64n) + (low << 1n));
    low ^= high >> 3n;
    low = u64((low ^ (low >> 35n)) * 0x9fb21c651e98df25n);
    return digits(low ^ (low >> 28n), avalanche(high));
  }
  if (length <= 16) {
    let last = read(length - 8);
    const product = (read(0) ^ last ^ secret(32) ^ secret(40)) * P64[0];
    let low = u64(u64(product) + ((n - 1n) << 54n));
    last ^= secret(48) ^ secret(56);
    const high = u64((product >> 64n) + last + (last & 0xffffffffn) * (P32[1] - 1n));
    low ^= swapped(high, 8);
    const second = low * P64[1];
    return digits(avalanche(u64(second)), avalanche(u64((second >> 64n) + high * P64[1])));
  }
  let low = u64(n * P64[0]);
  let high = 0n;
  const mix16 = (at, key) => fold(read(at) ^ secret(key), read(at + 8) ^ secret(key + 8));
  const mix32 = (one, two, key) => {
    low = u64(low + mix16(one, key)) ^ u64(read(two) + read(two + 8));
    high = u64(high + mix16(two, key + 16)) ^ u64(read(one) + read(one + 8));
  };
  if (length <= 128) {
    for (let i = Math.floor((length - 1) / 32); i >= 0; i--) mix32(16 * i, length - 16 * (i + 1), 32 * i);
  } else {
    for (let at = 0; at < 128; at += 32) mix32(at, at + 16, at);
    low = avalanche(low);
    high = avalanche(high);
    for (let at = 128; at + 32 <= length; at += 32) mix32(at, at + 16, 3 + at - 128);
    mix32(length - 16, length - 32, 103);
  }
  const mixed = u64(low * P64[0] + high * P64[3] + n * P64[1]);
  return digits(avalanche(u64(low + high)), u64(-avalanche(mixed)));
}

/** The XXH3 hash of bytes that come in pieces. */
export class Xxh3 {
  #length = 0;
  #pending = new Uint8Array(BLOCK + 64); // the last 64 bytes of what is done, then what is not
  #filled = 64;
  #lanes = new Uint32Array(16);

  constructor() {
    [P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]].forEach((lane, i) => {
      this.#lanes[2 * i] = Number(lane & 0xffffffffn);
      this.#lanes[2 * i + 1] = Number(lane >> 32n);
    });
  }

  /** @param {Uint8Array} bytes the next ones */
  update(bytes) {
    this.#length += bytes.length;
    for (let at = 0; at < bytes.length; ) {
      if (this.#filled === BLOCK + 64) { // only now: the last block is for the end
        this.#accumulate(this.#pending.subarray(64), 16);
        this.#scramble();
        this.#pending.copyWithin(0, BLOCK);
        this.#filled = 64;
      }
      const part = bytes.subarray(at, at + BLOCK + 64 - this.#filled);
      this.#pending.set(part, this.#filled);
      this.#filled += part.length;
      at += part.length;
    }
    return this;
  }

  /** Return the digest as 32 hex digits, its high 64 bits first. */
  digest() {
    if (this.#length <= 240) return short(this.#pending.subarray(64, this.#filled));
    this.#accumulate(this.#pending.subarray(64), Math.floor((this.#filled - 65) / 64));
    this.#stripe(new DataView(this.#pending.buffer, this.#filled - 64), 0, 121);
    const lane = (i) => BigInt(this.#lanes[2 * i]) | (BigInt(this.#lanes[2 * i + 1]) << 32n);
    const merged = (at, start) => {
      let result = start;
      for (let i = 0; i < 8; i += 2) result += fold(lane(i) ^ secret(at + 8 * i), lane(i + 1) ^ secret(at + 8 * i + 8));
      return avalanche(u64(result));
    };
    const n = BigInt(this.#length);
    return digits(merged(11, u64(n * P64[0])), merged(117, MASK - u64(n * P64[1])));
  }

  #accumulate(bytes, stripes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (let n = 0; n < stripes; n++) this.#stripe(view, 64 * n, 8 * n);
  }

  #stripe(view, at, key) {
    const lanes = this.#lanes;
    for (let i = 0; i < 16; i += 2) {
      const low = view.getUint32(at + 4 * i, true);
      const high = view.getUint32(at + 4 * i + 4, true);
      const a = (low ^ SECRET_VIEW.getUint32(key + 4 * i, true)) >>> 0;
      const b = (high ^ SECRET_VIEW.getUint32(key + 4 * i + 4, true)) >>> 0;
      const other = i ^ 2;
      let sum = lanes[other] + low;
      lanes[other + 1] += high + (sum >= HALF ? 1 : 0);
      lanes[other] = sum;
      sum = lanes[i] + (Math.imul(a, b) >>> 0);
      lanes[i + 1] += upper(a, b) + (sum >= HALF ? 1 : 0);
      lanes[i] = sum;
    }
  }

  #scramble() {
    const lanes = this.#lanes;
    const prime = Number(P32[0]);
    for (let i = 0; i < 16; i += 2) {
      const low = (lanes[i] ^ (lanes[i + 1] >>> 15) ^ SECRET_VIEW.getUint32(128 + 4 * i, true)) >>> 0;
      const high = (lanes[i + 1] ^ SECRET_VIEW.getUint32(132 + 4 * i, true)) >>> 0;
      lanes[i] = Math.imul(low, prime);
      lanes[i + 1] = Math.imul(high, prime) + upper(low, prime);
    }
  }
}

/** Return the upper half of the product of two 32-bit numbers. */
function upper(a, b) {
  const [al, ah, bl, bh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = ah * bl + ((al * bl) >>> 16);
  return ah * bh + (middle >>> 16) + ((al * bh + (middle & 0xffff)) >>> 16);
}
