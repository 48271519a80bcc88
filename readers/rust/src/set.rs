//! Section 6: a state in several files.

use crate::container;
use crate::error::{check, malformed, Error, Refused};
use crate::hashes::blake2b;
use crate::json::{get, parse, Json};
use crate::manifest::{self, check_names, Group, Parameter, Place, State};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

const MAX_INDEX: u64 = 67_108_864;
const MAX_SHARDS: usize = 256;

struct Index {
    set: String,
    total: u64,
    /// The name of each file, and its digest.
    shards: Vec<(String, String)>,
    /// The file of each tensor.
    places: HashMap<String, String>,
}

/// Return the members of an object that has exactly these.
fn own<'a>(value: Option<&'a Json>, names: &[&str]) -> Option<&'a [(String, Json)]> {
    let members = value?.as_object()?;
    (members.len() == names.len() && names.iter().all(|name| get(members, name).is_some())).then_some(members)
}

fn read_index(bytes: &[u8]) -> Result<Index, Refused> {
    let broken = |what: &str| malformed("R25", what);
    let text = std::str::from_utf8(bytes).map_err(|_| broken("the index is not UTF-8"))?;
    let json = parse(text)?;
    let index = own(Some(&json), &["metadata", "shards", "weight_map"]);
    let index = index.ok_or_else(|| broken("the index has other members"))?;
    let metadata = own(get(index, "metadata"), &["format", "set", "total_size"]);
    let metadata = metadata.ok_or_else(|| broken("the metadata of the index have other members"))?;
    let format = get(metadata, "format").and_then(Json::as_text);
    check(format == Some("named-optimizer-state"), "R25", || "this is the index of another format".into())?;
    let set = get(metadata, "set").and_then(Json::as_text).ok_or_else(|| broken("the set of the index"))?;
    let total = get(metadata, "total_size").and_then(Json::as_natural).ok_or_else(|| broken("the total_size"))?;
    let shards = get(index, "shards").and_then(Json::as_array);
    let shards = shards.filter(|shards| (1..=MAX_SHARDS).contains(&shards.len()));
    let shards = shards.ok_or_else(|| broken("the shards of the index"))?.iter().map(read_entry);
    let places = get(index, "weight_map").and_then(Json::as_object).ok_or_else(|| broken("the weight_map"))?;
    let places = places.iter().map(|(key, file)| Some((key.clone(), file.as_text()?.to_owned())));
    Ok(Index {
        set: set.to_owned(),
        total,
        shards: shards.collect::<Option<_>>().ok_or_else(|| broken("a shard of the index"))?,
        places: places.collect::<Option<_>>().ok_or_else(|| broken("the weight_map"))?,
    })
}

fn read_entry(entry: &Json) -> Option<(String, String)> {
    let members = own(Some(entry), &["file", "digest"])?;
    let (file, digest) = (get(members, "file")?.as_text()?, get(members, "digest")?.as_text()?);
    let plain = !matches!(file, "" | "." | "..") && !file.contains(['/', '\\', '\0']);
    plain.then(|| (file.to_owned(), digest.to_owned()))
}

struct Shard {
    state: State,
    place: Place,
    /// Of the header with zeros for the set's id too (R24).
    digest: String,
    common: String,
}

fn read_shard(index: &Index, number: usize, folder: &Path) -> Result<Shard, Error> {
    let (name, digest) = &index.shards[number];
    let path = folder.join(name);
    check(path.is_file(), "R25", || format!("the shard {:?} is not there", name))?;
    let inside = |refused: Refused| Refused { message: format!("{:?}: {}", name, refused.message), ..refused };
    let mut container = match container::read(&path) {
        Err(Error::Refused(refused)) => return Err(inside(refused).into()),
        other => other?,
    };
    let (state, place) = manifest::read(&mut container).map_err(inside)?;
    let (count, at) = (index.shards.len(), number as u64 + 1);
    let fits = |place: &Place| place.id == index.set && place.index == at && place.count == count as u64;
    let place = place.filter(fits);
    let place =
        place.ok_or_else(|| malformed("R23", format!("{:?} is not shard {} of {} of this set", name, at, count)))?;
    check(container.digest == *digest, "R25", || format!("the index states another digest of {:?}", name))?;
    let alone = number == 0 || [&state.globals, &state.origin, &state.extra].iter().all(|each| each.is_empty());
    check(alone, "R23", || format!("{:?} has globals, origin or extra, and is not the first shard", name))?;
    for tensor in &state.tensors {
        let here = index.places.get(&tensor.key) == Some(name);
        check(here, "R25", || format!("the weight_map has another file for {:?}", tensor.key))?;
    }
    let digest = blake2b(&without(container.head, index.set.as_bytes()));
    Ok(Shard { state, place, digest, common: manifest::common(&container.manifest) })
}

/// Return bytes with every occurrence of a text replaced by zeros.
fn without(mut bytes: Vec<u8>, text: &[u8]) -> Vec<u8> {
    let mut at = 0;
    while at + text.len() <= bytes.len() {
        if &bytes[at..at + text.len()] == text {
            bytes[at..at + text.len()].fill(b'0');
            at += text.len();
        } else {
            at += 1;
        }
    }
    bytes
}

/// Put the parameters of the shards in their places (R26).
fn united(shards: Vec<(Vec<Group>, Vec<Parameter>, Place)>, groups: &[Group]) -> Result<Vec<Parameter>, Refused> {
    let total: usize = shards.iter().map(|(_, parameters, _)| parameters.len()).sum();
    let mut ends: Vec<u64> = groups.iter().map(|group| group.count).collect();
    for i in 1..ends.len() {
        ends[i] += ends[i - 1]; // at most all parameters (R15)
    }
    ends.push(total as u64);
    let mut result: Vec<Option<Parameter>> = (0..total).map(|_| None).collect();
    for (own, parameters, place) in shards {
        let runs = own.iter().enumerate().flat_map(|(run, group)| (0..group.count).map(move |_| run));
        let runs = runs.chain(std::iter::repeat(groups.len()));
        for ((parameter, position), run) in parameters.into_iter().zip(place.positions).zip(runs) {
            let start = if run == 0 { 0 } else { ends[run - 1] };
            let name = parameter.name.clone();
            let free = match usize::try_from(position).ok().and_then(|position| result.get_mut(position)) {
                Some(free @ None) if (start..ends[run]).contains(&position) => free,
                _ => {
                    return Err(malformed("R26", format!("{:?} at {}, outside of its group or taken", name, position)))
                }
            };
            *free = Some(parameter);
        }
    }
    Ok(result.into_iter().flatten().collect())
}

/// How often a set is read anew when its index was replaced meanwhile.
const TRIES: usize = 3;

pub(crate) fn open(path: &Path) -> Result<State, Error> {
    open_latest(path, || read_bytes(path))
}

/// Open a set; `read` gives its index as it is now.
pub(crate) fn open_latest(path: &Path, mut read: impl FnMut() -> Result<Vec<u8>, Error>) -> Result<State, Error> {
    let mut bytes = read()?;
    for _ in 1..TRIES {
        match open_index(path, &bytes) {
            Ok(state) => return Ok(state),
            Err(error) => match read() {
                Ok(now) if now != bytes => bytes = now,
                _ => return Err(error),
            },
        }
    }
    open_index(path, &bytes)
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(io)?.len();
    check(size <= MAX_INDEX, "R25", || format!("an index of {} bytes; at most {} are allowed", size, MAX_INDEX))?;
    fs::read(path).map_err(io)
}

fn open_index(path: &Path, bytes: &[u8]) -> Result<State, Error> {
    let index = read_index(bytes)?;
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    let shards = (0..index.shards.len()).map(|number| read_shard(&index, number, folder));
    let shards = shards.collect::<Result<Vec<_>, _>>()?;
    let agree = shards.iter().all(|shard| shard.common == shards[0].common);
    check(agree, "R23", || "the shards do not agree".into())?;
    let digests: String = shards.iter().map(|shard| shard.digest.as_str()).collect();
    check(blake2b(digests.as_bytes()) == index.set, "R24", || {
        "the id of the set is not the digest of its shards".into()
    })?;
    let tensors: Vec<_> = shards.iter().flat_map(|shard| shard.state.tensors.iter().cloned()).collect();
    check(tensors.len() == index.places.len(), "R25", || "the weight_map has other tensors than the shards".into())?;
    let bytes: u64 = tensors.iter().map(|tensor| tensor.size).sum();
    check(bytes == index.total, "R25", || format!("a total_size of {}, and tensors of {}", index.total, bytes))?;
    let mut groups = shards[0].state.groups.clone();
    for shard in &shards[1..] {
        for (group, part) in groups.iter_mut().zip(&shard.state.groups) {
            group.count += part.count;
        }
    }
    let mut first = None;
    let mut parts = Vec::new();
    for Shard { mut state, place, .. } in shards {
        parts.push((std::mem::take(&mut state.groups), std::mem::take(&mut state.parameters), place));
        first.get_or_insert(state);
    }
    let parameters = united(parts, &groups)?;
    check_names(parameters.iter(), "R26")?;
    let first = first.ok_or_else(|| malformed("R25", "the shards of the index"))?;
    Ok(State { groups, parameters, tensors, ..first })
}
