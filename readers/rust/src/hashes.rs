//! The two hashes of the format: BLAKE2b with 16 bytes of output (RFC 7693), and XXH3 with 128 bits and seed 0.

const IV: [u64; 8] = [
    0x6a09e667f3bcc908,
    0xbb67ae8584caa73b,
    0x3c6ef372fe94f82b,
    0xa54ff53a5f1d36f1,
    0x510e527fade682d1,
    0x9b05688c2b3e6c1f,
    0x1f83d9abfb41bd6b,
    0x5be0cd19137e2179,
];

const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];

const LANES: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];

/// Return the hex digits of bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{:02x}", byte)).collect()
}

/// Return eight bytes as a number; there have to be eight.
fn word(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(eight)
}

/// Return the BLAKE2b hash of bytes with 16 bytes of output and no key, as 32 hex digits.
pub fn blake2b(bytes: &[u8]) -> String {
    let mut h = IV;
    h[0] ^= 0x0101_0010;
    let mut at = 0;
    loop {
        let end = bytes.len().min(at + 128);
        let mut block = [0; 128];
        block[..end - at].copy_from_slice(&bytes[at..end]);
        compress(&mut h, &block, end as u64, end == bytes.len());
        at = end;
        if end == bytes.len() {
            break;
        }
    }
    hex(&[h[0].to_le_bytes(), h[1].to_le_bytes()].concat())
}

fn compress(h: &mut [u64; 8], block: &[u8; 128], count: u64, last: bool) {
    let mut m = [0; 16];
    for (i, each) in m.iter_mut().enumerate() {
        *each = word(&block[8 * i..]);
    }
    let mut v = [0; 16];
    v[..8].copy_from_slice(h);
    v[8..].copy_from_slice(&IV);
    v[12] ^= count;
    if last {
        v[14] = !v[14];
    }
    for round in 0..12 {
        let s = SIGMA[round % 10];
        for (i, &[a, b, c, d]) in LANES.iter().enumerate() {
            v[a] = v[a].wrapping_add(v[b]).wrapping_add(m[s[2 * i]]);
            v[d] = (v[d] ^ v[a]).rotate_right(32);
            v[c] = v[c].wrapping_add(v[d]);
            v[b] = (v[b] ^ v[c]).rotate_right(24);
            v[a] = v[a].wrapping_add(v[b]).wrapping_add(m[s[2 * i + 1]]);
            v[d] = (v[d] ^ v[a]).rotate_right(16);
            v[c] = v[c].wrapping_add(v[d]);
            v[b] = (v[b] ^ v[c]).rotate_right(63);
        }
    }
    for i in 0..8 {
        h[i] ^= v[i] ^ v[i + 8];
    }
}

const P32: [u64; 3] = [0x9e3779b1, 0x85ebca77, 0xc2b2ae3d];
const P64: [u64; 5] =
    [0x9e3779b185ebca87, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0x85ebca77c2b2ae63, 0x27d4eb2f165667c5];

#[rustfmt::skip]
const SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// Bytes between two scrambles: 16 stripes of 64.
const BLOCK: usize = 1024;

fn secret(at: usize) -> u64 {
    word(&SECRET[at..])
}

fn product(a: u64, b: u64) -> (u64, u64) {
    let whole = u128::from(a) * u128::from(b);
    (whole as u64, (whole >> 64) as u64)
}

fn fold(a: u64, b: u64) -> u64 {
    let (low, high) = product(a, b);
    low ^ high
}

fn avalanche(mut h: u64) -> u64 {
    h = (h ^ (h >> 37)).wrapping_mul(0x165667919e3779f9);
    h ^ (h >> 32)
}

fn avalanche64(mut h: u64) -> u64 {
    h = (h ^ (h >> 33)).wrapping_mul(P64[1]);
    h = (h ^ (h >> 29)).wrapping_mul(P64[2]);
    h ^ (h >> 32)
}

/// Hash at most 240 bytes; return the low and the high half.
fn short(bytes: &[u8]) -> (u64, u64) {
    let length = bytes.len();
    let n = length as u64;
    let read = |at: usize| word(&bytes[at..]);
    let read32 = |at: usize| u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
    match length {
        0 => (avalanche64(secret(64) ^ secret(72)), avalanche64(secret(80) ^ secret(88))),
        1..=3 => {
            let [first, middle, last] = [bytes[0], bytes[length >> 1], bytes[length - 1]].map(u32::from);
            let low = first << 16 | middle << 24 | last | (length as u32) << 8;
            let high = low.swap_bytes().rotate_left(13);
            let flip = |at| (secret(at) & 0xffff_ffff) ^ (secret(at) >> 32);
            (avalanche64(u64::from(low) ^ flip(0)), avalanche64(u64::from(high) ^ flip(8)))
        }
        4..=8 => {
            let keyed = (read32(0) | read32(length - 4) << 32) ^ secret(16) ^ secret(24);
            let (mut low, mut high) = product(keyed, P64[0].wrapping_add(n << 2));
            high = high.wrapping_add(low << 1);
            low ^= high >> 3;
            low = (low ^ (low >> 35)).wrapping_mul(0x9fb21c651e98df25);
            (low ^ (low >> 28), avalanche(high))
        }
        9..=16 => {
            let mut last = read(length - 8);
            let (mut low, mut high) = product(read(0) ^ last ^ secret(32) ^ secret(40), P64[0]);
            low = low.wrapping_add((n - 1) << 54);
            last ^= secret(48) ^ secret(56);
            high = high.wrapping_add(last).wrapping_add((last & 0xffff_ffff).wrapping_mul(P32[1] - 1));
            low ^= high.swap_bytes();
            let (second, carry) = product(low, P64[1]);
            (avalanche(second), avalanche(carry.wrapping_add(high.wrapping_mul(P64[1]))))
        }
        _ => {
            let mut low = n.wrapping_mul(P64[0]);
            let mut high = 0u64;
            let mix16 = |at: usize, key: usize| fold(read(at) ^ secret(key), read(at + 8) ^ secret(key + 8));
            let mix32 = |low: &mut u64, high: &mut u64, one: usize, two: usize, key: usize| {
                *low = low.wrapping_add(mix16(one, key)) ^ read(two).wrapping_add(read(two + 8));
                *high = high.wrapping_add(mix16(two, key + 16)) ^ read(one).wrapping_add(read(one + 8));
            };
            if length <= 128 {
                for i in (0..=(length - 1) / 32).rev() {
                    mix32(&mut low, &mut high, 16 * i, length - 16 * (i + 1), 32 * i);
                }
            } else {
                for at in (0..128).step_by(32) {
                    mix32(&mut low, &mut high, at, at + 16, at);
                }
                low = avalanche(low);
                high = avalanche(high);
                for at in (128..=length - 32).step_by(32) {
                    mix32(&mut low, &mut high, at, at + 16, 3 + at - 128);
                }
                mix32(&mut low, &mut high, length - 16, length - 32, 103);
            }
            let mixed =
                low.wrapping_mul(P64[0]).wrapping_add(high.wrapping_mul(P64[3])).wrapping_add(n.wrapping_mul(P64[1]));
            (avalanche(low.wrapping_add(high)), avalanche(mixed).wrapping_neg())
        }
    }
}

/// The XXH3 hash of bytes that come in pieces.
pub struct Xxh3 {
    length: u64,
    /// The last 64 bytes of what is done, then what is not.
    pending: [u8; BLOCK + 64],
    filled: usize,
    lanes: [u64; 8],
}

impl Default for Xxh3 {
    fn default() -> Self {
        let lanes = [P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]];
        Xxh3 { length: 0, pending: [0; BLOCK + 64], filled: 64, lanes }
    }
}

impl Xxh3 {
    /// Take the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.filled == BLOCK + 64 {
                // Only now: the last block is for the end.
                accumulate(&mut self.lanes, &self.pending[64..], 16);
                for (i, lane) in self.lanes.iter_mut().enumerate() {
                    *lane = (*lane ^ (*lane >> 47) ^ secret(128 + 8 * i)).wrapping_mul(P32[0]);
                }
                self.pending.copy_within(BLOCK.., 0);
                self.filled = 64;
            }
            let size = bytes.len().min(BLOCK + 64 - self.filled);
            let (part, rest) = bytes.split_at(size);
            self.pending[self.filled..self.filled + size].copy_from_slice(part);
            self.filled += size;
            bytes = rest;
        }
    }

    /// Return the digest as 32 hex digits, its high 64 bits first.
    pub fn digest(&self) -> String {
        let (low, high) = if self.length <= 240 { short(&self.pending[64..self.filled]) } else { self.long() };
        format!("{:016x}{:016x}", high, low)
    }

    fn long(&self) -> (u64, u64) {
        let mut lanes = self.lanes;
        accumulate(&mut lanes, &self.pending[64..], (self.filled - 65) / 64);
        stripe(&mut lanes, &self.pending[self.filled - 64..], 121);
        let merged = |at: usize, start: u64| {
            avalanche((0..8).step_by(2).fold(start, |sum, i| {
                sum.wrapping_add(fold(lanes[i] ^ secret(at + 8 * i), lanes[i + 1] ^ secret(at + 8 * i + 8)))
            }))
        };
        (merged(11, self.length.wrapping_mul(P64[0])), merged(117, !self.length.wrapping_mul(P64[1])))
    }
}

fn accumulate(lanes: &mut [u64; 8], bytes: &[u8], stripes: usize) {
    for n in 0..stripes {
        stripe(lanes, &bytes[64 * n..], 8 * n);
    }
}

fn stripe(lanes: &mut [u64; 8], bytes: &[u8], key: usize) {
    for i in 0..8 {
        let value = word(&bytes[8 * i..]);
        let keyed = value ^ secret(key + 8 * i);
        lanes[i ^ 1] = lanes[i ^ 1].wrapping_add(value);
        lanes[i] = lanes[i].wrapping_add((keyed & 0xffff_ffff) * (keyed >> 32));
    }
}
