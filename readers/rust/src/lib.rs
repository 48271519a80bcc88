//! Named optimizer state: optimizer state keyed by parameter name, in safetensors. The text is `spec/format.md`.
//!
//! [`open`] reads the headers of a file or a set and checks every rule; tensors are read, and compared with their digests,
//! when you ask for them.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let state = named_optimizer_state::open("optimizer.safetensors")?;
//! for parameter in &state.parameters {
//!     println!("{} {:?} {:?}", parameter.name, parameter.shape, parameter.slots);
//! }
//! assert!(named_optimizer_state::verify(&state)?);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod container;
mod error;
mod hashes;
mod json;
mod manifest;
mod set;
mod values;

#[cfg(test)]
mod tests;

pub use container::{Digest, Dtype, Tensor};
pub use error::{Error, Kind, Refused};
pub use hashes::{blake2b, hex, Xxh3};
pub use manifest::{Group, Naming, Optimizer, Parameter, State, Weights};
pub use values::{Slot, Value};

use std::path::{Path, PathBuf};

/// Open the state that a path means: its index if there is one, else the file. No tensor is read.
///
/// # Errors
///
/// `Error::Refused` names the rule that a file breaks; `Error::Io` is everything that the system says.
pub fn open(path: impl AsRef<Path>) -> Result<State, Error> {
    let path = path.as_ref();
    let mut name = path.as_os_str().to_owned();
    if !name.to_string_lossy().ends_with(".index.json") {
        name.push(".index.json");
    }
    let index = PathBuf::from(name);
    if index.is_file() {
        return set::open(&index);
    }
    let mut container = container::read(path)?;
    let (state, place) = manifest::read(&mut container)?;
    match place {
        None => Ok(state),
        Some(place) => {
            let what = "and no state by itself: open the index of its set";
            let message = format!("this is shard {} of {}, {}", place.index, place.count, what);
            Err(error::malformed("R23", message).into())
        }
    }
}

/// Compare every tensor with its digest (R21). Return whether every one was compared, which an unknown algorithm prevents.
///
/// # Errors
///
/// R21 names the first tensor that was changed.
pub fn verify(state: &State) -> Result<bool, Error> {
    let mut all = true;
    for tensor in &state.tensors {
        let found = tensor.verify().map_err(|source| Error::Io { path: tensor.path.to_path_buf(), source })?;
        if found == Some(false) {
            let message = format!("the tensor {:?} was changed", tensor.key);
            return Err(Refused { rule: "R21", kind: Kind::Digest, message }.into());
        }
        all &= found.is_some();
    }
    Ok(all)
}
