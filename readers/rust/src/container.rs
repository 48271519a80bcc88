//! Section 3: a safetensors file, and the envelope in its metadata.

use crate::error::{check, malformed, Error, Kind, Refused};
use crate::hashes::{blake2b, Xxh3};
use crate::json::{get, parse, Json, MAX_INT};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const MAX_HEADER: u64 = 33_554_432;
pub const MAX_DIMENSIONS: usize = 64;
const ALIGNMENT: usize = 64;
const PREFIX: &[u8] = br#"{"__metadata__":{"optimizer_state":"{\"digest\":\""#;
/// Where the digits of the digest are in a file.
const DIGEST: std::ops::Range<usize> = 58..90;

/// A type of elements (table 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtype {
    pub name: &'static str,
    pub bits: u64,
}

const DTYPES: [Dtype; 22] = [
    Dtype { name: "BOOL", bits: 8 },
    Dtype { name: "U8", bits: 8 },
    Dtype { name: "I8", bits: 8 },
    Dtype { name: "F8_E5M2", bits: 8 },
    Dtype { name: "F8_E4M3", bits: 8 },
    Dtype { name: "F8_E8M0", bits: 8 },
    Dtype { name: "F8_E4M3FNUZ", bits: 8 },
    Dtype { name: "F8_E5M2FNUZ", bits: 8 },
    Dtype { name: "U16", bits: 16 },
    Dtype { name: "I16", bits: 16 },
    Dtype { name: "F16", bits: 16 },
    Dtype { name: "BF16", bits: 16 },
    Dtype { name: "U32", bits: 32 },
    Dtype { name: "I32", bits: 32 },
    Dtype { name: "F32", bits: 32 },
    Dtype { name: "U64", bits: 64 },
    Dtype { name: "I64", bits: 64 },
    Dtype { name: "F64", bits: 64 },
    Dtype { name: "C64", bits: 64 },
    Dtype { name: "F4", bits: 4 },
    Dtype { name: "F6_E2M3", bits: 6 },
    Dtype { name: "F6_E3M2", bits: 6 },
];

impl Dtype {
    /// Return the dtype of a name.
    pub fn named(name: &str) -> Option<Dtype> {
        DTYPES.iter().find(|dtype| dtype.name == name).copied()
    }
}

/// A digest as a file states it; `value` is hex.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    pub algorithm: String,
    pub value: String,
}

/// A tensor of a file. Nothing is read until you ask for it.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub path: Arc<PathBuf>,
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    /// Where its bytes begin in its file.
    pub offset: u64,
    pub size: u64,
    pub digest: Option<Digest>,
}

impl Tensor {
    /// Read its bytes, little-endian and in C order.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let size = usize::try_from(self.size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = vec![0; size];
        let mut file = self.open()?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Compare its bytes with its digest (R21): `Some(true)`, `Some(false)`, or `None` where the algorithm is not known here.
    pub fn verify(&self) -> io::Result<Option<bool>> {
        let digest = match &self.digest {
            Some(digest) if digest.algorithm == "xxh3-128" => digest,
            _ => return Ok(None),
        };
        let mut left = self.open()?.take(self.size);
        let mut buffer = vec![0; 1 << 20];
        let mut hash = Xxh3::default();
        loop {
            match left.read(&mut buffer)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        if left.limit() > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some(hash.digest() == digest.value))
    }

    fn open(&self) -> io::Result<File> {
        let mut file = File::open(&*self.path)?;
        file.seek(SeekFrom::Start(self.offset))?;
        Ok(file)
    }
}

/// A file as far as its manifest.
pub(crate) struct Container {
    /// The first 8 + N bytes, with zeros for the digest.
    pub head: Vec<u8>,
    pub digest: String,
    pub manifest: Json,
    /// In data order.
    pub tensors: Vec<Tensor>,
}

/// Read a file as far as its manifest (R1 to R9).
pub(crate) fn read(path: &Path) -> Result<Container, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    check(size >= 8, "R1", || "the file has fewer than 8 bytes".into())?;
    let mut head = vec![0; 8];
    file.read_exact(&mut head).map_err(io)?;
    let length = head.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    check(length <= MAX_HEADER, "R1", || format!("a header of {} bytes; at most {} are allowed", length, MAX_HEADER))?;
    check(8 + length <= size, "R1", || format!("a header of {} bytes in a file of {}", length, size))?;
    head.resize(8 + length as usize, 0); // at most 32 MiB
    file.read_exact(&mut head[8..]).map_err(io)?;
    Ok(parse_head(Arc::new(path.to_owned()), head, size)?)
}

fn parse_head(path: Arc<PathBuf>, mut head: Vec<u8>, size: u64) -> Result<Container, Refused> {
    let digest = take_digest(&mut head)?;
    let text = std::str::from_utf8(&head[8..]).map_err(|_| malformed("R2", "the header is not UTF-8"))?;
    let whole = text.starts_with('{') && text.trim_end_matches(' ').ends_with('}');
    check(whole, "R2", || "the header is not an object followed by spaces".into())?;
    let header = match parse(text)? {
        Json::Object(members) => members,
        _ => return Err(malformed("R2", "the header is not an object")),
    };
    let metadata = metadata(&header)?;
    let mut tensors = Vec::new();
    for (key, entry) in header.iter().filter(|(key, _)| key != "__metadata__") {
        tensors.push(tensor(&path, key, entry, head.len() as u64)?);
    }
    check_layout(&mut tensors, head.len() as u64, size)?;
    let (digest, text) = match (digest, metadata.as_slice()) {
        (Some(digest), [(name, text)]) if *name == "optimizer_state" => (digest, *text),
        _ => return Err(malformed("R7", "this is not named optimizer state")),
    };
    check(head.len() % ALIGNMENT == 0, "R8", || format!("the tensors begin at byte {}", head.len()))?;
    let manifest = match parse(text)? {
        Json::Object(members) if members.len() == 2 && get(&members, "digest").is_some() => {
            members.into_iter().find(|(name, _)| name == "manifest").map(|(_, manifest)| manifest)
        }
        _ => None,
    };
    match manifest {
        Some(manifest @ Json::Object(_)) => Ok(Container { head, digest, manifest, tensors }),
        _ => Err(malformed("R7", "the envelope is not a digest and a manifest")),
    }
}

/// Put zeros in place of the digest and return it, after R9; `None` where the file does not begin as R7 says.
fn take_digest(head: &mut [u8]) -> Result<Option<String>, Refused> {
    if head.len() < DIGEST.end || &head[8..DIGEST.start] != PREFIX {
        return Ok(None);
    }
    if !head[DIGEST].iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return Ok(None);
    }
    let stated: String = head[DIGEST].iter().map(|byte| char::from(*byte)).collect();
    head[DIGEST].fill(b'0');
    if blake2b(head) != stated {
        let message = "the header was changed after it was written".into();
        return Err(Refused { rule: "R9", kind: Kind::Digest, message });
    }
    Ok(Some(stated))
}

fn metadata(header: &[(String, Json)]) -> Result<Vec<(&str, &str)>, Refused> {
    let members = match get(header, "__metadata__") {
        None => return Ok(Vec::new()),
        Some(value) => value.as_object().ok_or_else(|| malformed("R4", "__metadata__ is not an object"))?,
    };
    let texts = members.iter().map(|(name, value)| value.as_text().map(|text| (name.as_str(), text)));
    texts.collect::<Option<_>>().ok_or_else(|| malformed("R4", "__metadata__ has a member that is not a string"))
}

/// Return the sizes of a shape: at most 64 naturals.
pub(crate) fn shape(value: &Json) -> Option<Vec<u64>> {
    value.as_array().filter(|sizes| sizes.len() <= MAX_DIMENSIONS)?.iter().map(Json::as_natural).collect()
}

fn product(mut sizes: impl Iterator<Item = u64>) -> Option<u64> {
    sizes.try_fold(1, |all: u64, size| all.checked_mul(size))
}

fn tensor(path: &Arc<PathBuf>, key: &str, entry: &Json, end: u64) -> Result<Tensor, Refused> {
    let broken = |what| malformed("R4", format!("{} of {:?}", what, key));
    let members = entry.as_object().filter(|members| members.len() == 3).ok_or_else(|| broken("the entry"))?;
    let dtype = get(members, "dtype").and_then(Json::as_text).and_then(Dtype::named);
    let dtype = dtype.ok_or_else(|| broken("the dtype"))?;
    let shape = get(members, "shape").and_then(shape).ok_or_else(|| broken("the shape"))?;
    let offsets = get(members, "data_offsets").and_then(Json::as_array);
    let offsets: Option<Vec<u64>> = offsets.and_then(|both| both.iter().map(Json::as_natural).collect());
    let (begin, stop) = match offsets.as_deref() {
        Some(&[begin, stop]) => (begin, stop),
        _ => return Err(broken("the offsets")),
    };
    let others = product(shape.iter().copied().filter(|size| *size > 0));
    if shape.contains(&0) {
        check(others.map_or(false, |n| n <= MAX_INT as u64), "R4", || format!("the shape of {:?} overflows", key))?;
    }
    let elements = if shape.contains(&0) { Some(0) } else { others };
    // Offsets are at most 2^53 - 1, so their bits fit; a product that does not fit is not their number.
    let bits = elements.and_then(|n| n.checked_mul(dtype.bits));
    let size = stop.checked_sub(begin).filter(|size| bits == Some(8 * size));
    let size = size.ok_or_else(|| malformed("R5", format!("the bytes of {:?} are not those of its shape", key)))?;
    Ok(Tensor { path: path.clone(), key: key.to_owned(), dtype, shape, offset: end + begin, size, digest: None })
}

fn check_layout(tensors: &mut [Tensor], end: u64, size: u64) -> Result<(), Refused> {
    tensors.sort_by(|a, b| (a.offset, a.size, &a.key).cmp(&(b.offset, b.size, &b.key)));
    let mut at = end;
    for tensor in tensors.iter() {
        check(tensor.offset == at, "R6", || format!("{:?} begins at {}, not at {}", tensor.key, tensor.offset, at))?;
        at += tensor.size;
    }
    check(at == size, "R6", || format!("the tensors end at byte {}, and the file at {}", at, size))
}
