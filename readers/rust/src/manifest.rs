//! Section 4: the manifest of one file.

use crate::container::{shape, Container, Digest, Dtype, Tensor};
use crate::error::{check, malformed, Kind, Refused};
use crate::json::{get, Json};
use crate::values::{decode, mapping, Slot, Value};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// The minor version of this reader, 1.0.
const MINOR: u32 = 0;

#[derive(Clone, Debug)]
pub struct Optimizer {
    pub class: Option<String>,
    pub id: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Group {
    /// An index into the optimizers.
    pub optimizer: u64,
    /// How many of the parameters it has: the next ones. Those behind the last group are carried.
    pub count: u64,
    pub name: Option<String>,
    pub options: Vec<(String, Value)>,
}

/// The digest of a parameter's own bytes.
#[derive(Clone, Debug)]
pub struct Weights {
    pub dtype: Dtype,
    pub digest: Digest,
}

#[derive(Clone, Debug)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: Option<Dtype>,
    pub adapter: Option<String>,
    /// Other names of the same tensor.
    pub tied: Vec<String>,
    /// What others call it, by who calls it so.
    pub keys: Vec<(String, String)>,
    /// Its id in the file that the state was converted from: `Int`, `Big` or `Text`.
    pub id: Option<Value>,
    /// Its slot tree, a `Mapping`; `None` says that the optimizer never made a step with it.
    pub slots: Option<Value>,
    pub weights: Option<Weights>,
}

#[derive(Clone, Debug)]
pub struct Naming {
    pub source: String,
    pub rule: Option<String>,
    pub details: Value,
}

/// A state. `globals`, `origin`, `extra` and `extensions` are mappings.
#[derive(Clone, Debug)]
pub struct State {
    pub version: String,
    pub optimizers: Vec<Optimizer>,
    pub groups: Vec<Group>,
    pub parameters: Vec<Parameter>,
    pub globals: Value,
    pub naming: Naming,
    pub origin: Value,
    pub extra: Value,
    pub extensions: Value,
    pub global_step: Option<u64>,
    /// Every tensor, in the order of its bytes.
    pub tensors: Vec<Rc<Tensor>>,
}

/// What a shard says of its set.
pub(crate) struct Place {
    pub id: String,
    pub index: u64,
    pub count: u64,
    pub positions: Vec<u64>,
}

/// A member of table 2: its name, the letters of its types (string, array, object, natural, null), whether it may be absent.
type Member = (&'static str, &'static str, bool);

const MANIFEST: &[Member] = &[
    ("format", "s", false),
    ("version", "s", false),
    ("optimizers", "a", false),
    ("groups", "a", false),
    ("parameters", "a", false),
    ("states", "a", false),
    ("naming", "o", false),
    ("digests", "o", false),
    ("globals", "o", true),
    ("origin", "o", true),
    ("extra", "o", true),
    ("extensions", "o", true),
    ("global_step", "n", true),
    ("weights", "o", true),
    ("set", "o", true),
];
const OPTIMIZER: &[Member] = &[("class", "s0", false), ("id", "s", true)];
const GROUP: &[Member] =
    &[("optimizer", "n", false), ("count", "n", false), ("options", "a", false), ("name", "s", true)];
const PARAMETER: &[Member] = &[
    ("name", "s", false),
    ("shape", "a", false),
    ("state", "n0", false),
    ("dtype", "s", true),
    ("adapter", "s", true),
    ("tied", "a", true),
    ("keys", "o", true),
    ("id", "nso", true),
];
const NAMING: &[Member] = &[("source", "s", false), ("rule", "s", true), ("details", "o", true)];
const DIGESTS: &[Member] = &[("algorithm", "s", false), ("values", "a", false)];
const SET: &[Member] = &[("id", "s", false), ("index", "n", false), ("count", "n", false), ("positions", "a", false)];

/// An object whose members are checked by R12.
struct Members<'a> {
    kind: &'static str,
    members: &'a [(String, Json)],
}

impl<'a> Members<'a> {
    fn new(kind: &'static str, table: &[Member], value: &'a Json, newer: bool) -> Result<Self, Refused> {
        let broken = |what: String| malformed("R12", format!("{}: {}", kind, what));
        let members = value.as_object().ok_or_else(|| broken("not an object".into()))?;
        for (name, letters, optional) in table {
            match get(members, name) {
                Some(value) if letters.chars().any(|letter| is(letter, value)) => {}
                Some(_) => return Err(broken(format!("{} is of another type", name))),
                None if *optional => {}
                None => return Err(broken(format!("no {}", name))),
            }
        }
        let unknown = members.iter().find(|(name, _)| !table.iter().any(|(known, _, _)| known == name));
        match unknown {
            Some((name, _)) if !newer => Err(broken(format!("the unknown member {:?}", name))),
            _ => Ok(Members { kind, members }),
        }
    }

    fn get(&self, name: &str) -> Option<&'a Json> {
        get(self.members, name)
    }

    /// Return a member that is text, where there is one.
    fn text(&self, name: &str) -> Option<String> {
        self.get(name).and_then(Json::as_text).map(str::to_owned)
    }

    fn required<T>(&self, name: &str, read: impl Fn(&'a Json) -> Option<T>) -> Result<T, Refused> {
        self.get(name).and_then(read).ok_or_else(|| malformed("R12", format!("{}: {}", self.kind, name)))
    }

    /// Return a member as a mapping without tensors, empty where there is none.
    fn mapping(&self, name: &str) -> Result<Value, Refused> {
        match self.get(name) {
            Some(value) => mapping(value, "R12", name, &mut None),
            None => Ok(Value::Mapping(Vec::new())),
        }
    }
}

fn is(letter: char, value: &Json) -> bool {
    match letter {
        's' => value.as_text().is_some(),
        'a' => value.as_array().is_some(),
        'o' => value.as_object().is_some(),
        'n' => value.as_natural().is_some(),
        _ => *value == Json::Null,
    }
}

fn texts(value: &Json) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_text().map(str::to_owned)).collect()
}

/// Return the minor version (R11).
fn minor(version: Option<&Json>) -> Result<(String, u32), Refused> {
    let natural = |text: &str| match text.as_bytes() {
        [b'0'] => Some(0),
        [b'1'..=b'9', rest @ ..] if rest.len() < 6 && rest.iter().all(u8::is_ascii_digit) => text.parse::<u32>().ok(),
        _ => None,
    };
    let version = version.and_then(Json::as_text).unwrap_or("");
    let parts = version.split_once('.').map(|(major, minor)| (natural(major), natural(minor)));
    match parts {
        Some((Some(1), Some(minor))) => Ok((version.to_owned(), minor)),
        Some((Some(_), Some(_))) => {
            let message = format!("version {}; this reader reads version 1", version);
            Err(Refused { rule: "R11", kind: Kind::Unsupported, message })
        }
        _ => Err(malformed("R11", "the version is not MAJOR.MINOR")),
    }
}

fn extensions(manifest: &Members<'_>) -> Result<Value, Refused> {
    let found = manifest.mapping("extensions")?;
    if let Value::Mapping(pairs) = &found {
        for (name, extension) in pairs {
            match extension.get("must_understand") {
                Some(Value::Bool(false)) => {}
                Some(Value::Bool(true)) => {
                    let message = format!("the extension {:?} must be understood, and is not known here", name);
                    return Err(Refused { rule: "R13", kind: Kind::Unsupported, message });
                }
                _ => {
                    let what = format!("the extension {:?} does not say whether it must be understood", name);
                    return Err(malformed("R13", what));
                }
            }
        }
    }
    Ok(found)
}

fn read_group(value: &Json, newer: bool) -> Result<Group, Refused> {
    let found = Members::new("groups", GROUP, value, newer)?;
    let mut options: Vec<(String, Value)> = Vec::new();
    for option in found.required("options", Json::as_array)? {
        match option.as_array() {
            Some([Json::Text(name), value]) => {
                let twice = options.iter().any(|(each, _)| each == name);
                check(!twice, "R15", || format!("the option {:?} twice in a group", name))?;
                options.push((name.clone(), decode(value, &mut None)?));
            }
            _ => return Err(malformed("R12", "an option of a group")),
        }
    }
    Ok(Group {
        optimizer: found.required("optimizer", Json::as_natural)?,
        count: found.required("count", Json::as_natural)?,
        name: found.text("name"),
        options,
    })
}

/// Read a parameter without its slots; return its index into `states` with it.
fn read_parameter(value: &Json, newer: bool, states: usize) -> Result<(Parameter, Option<usize>), Refused> {
    let found = Members::new("parameters", PARAMETER, value, newer)?;
    let broken = |what: &str| malformed("R12", format!("{:?}: {}", found.text("name"), what));
    let dtype = match found.get("dtype") {
        Some(name) => Some(name.as_text().and_then(Dtype::named).ok_or_else(|| broken("its dtype"))?),
        None => None,
    };
    let tied = found.get("tied").map_or(Some(Vec::new()), texts).ok_or_else(|| broken("its tied names"))?;
    let keys: Option<Vec<_>> = match found.get("keys").and_then(Json::as_object) {
        Some(keys) => keys.iter().map(|(by, key)| Some((by.clone(), key.as_text()?.to_owned()))).collect(),
        None => Some(Vec::new()),
    };
    let id = match found.get("id").map(|id| decode(id, &mut None)).transpose()? {
        Some(id @ (Value::Int(_) | Value::Big(_) | Value::Text(_))) => Some(id),
        None => None,
        Some(_) => return Err(broken("its id")),
    };
    let state = match found.get("state").and_then(Json::as_natural) {
        Some(state) => {
            let index = usize::try_from(state).ok().filter(|index| *index < states);
            Some(index.ok_or_else(|| malformed("R16", format!("state {} of {}", state, states)))?)
        }
        None => None,
    };
    let parameter = Parameter {
        name: found.required("name", Json::as_text)?.to_owned(),
        shape: found.required("shape", shape)?,
        dtype,
        adapter: found.text("adapter"),
        tied,
        keys: keys.ok_or_else(|| broken("its keys"))?,
        id,
        slots: None,
        weights: None,
    };
    Ok((parameter, state))
}

/// Check the names of parameters: none twice, none empty or with a dollar sign in front (R14, R26).
pub(crate) fn check_names<'a>(
    parameters: impl Iterator<Item = &'a Parameter>,
    rule: &'static str,
) -> Result<(), Refused> {
    let mut seen = HashSet::new();
    for parameter in parameters {
        for name in std::iter::once(&parameter.name).chain(&parameter.tied) {
            let fits = !name.is_empty() && !name.starts_with('$') && seen.insert(name.as_str());
            check(fits, rule, || format!("the name {:?} is not allowed, or twice", name))?;
        }
    }
    Ok(())
}

fn check_groups(groups: &[Group], optimizers: usize, parameters: usize) -> Result<(), Refused> {
    let mut last = 0;
    let mut count = 0u64;
    for group in groups {
        let fits = group.optimizer < optimizers as u64 && group.optimizer >= last;
        check(fits, "R15", || format!("a group of optimizer {} behind one of {}", group.optimizer, last))?;
        last = group.optimizer;
        count = count.saturating_add(group.count);
    }
    check(count <= parameters as u64, "R15", || format!("groups of {} parameters, and {}", count, parameters))
}

/// Whether the shape of a tensor agrees with its role (R18).
fn agrees(role: &str, own: &[u64], shape: &[u64]) -> bool {
    let (rest, second, last) = match (role, shape) {
        ("param", _) => return own == shape,
        ("row" | "col", [rest @ .., second, last]) => (rest, *second, *last),
        ("row" | "col", _) => return false,
        _ => return true,
    };
    match own.strip_prefix(rest) {
        Some([kept]) => *kept == if role == "row" { second } else { last },
        Some(both) => both == if role == "row" { [second, 1] } else { [1, last] },
        None => false,
    }
}

/// What the labels of a slot tree are bound with.
struct Binder<'a> {
    tensors: &'a HashMap<&'a str, Rc<Tensor>>,
    used: HashSet<String>,
}

impl Binder<'_> {
    /// Read a slot tree; `shape` is that of its parameter, or `None` for globals.
    fn tree(&mut self, tree: &Json, owner: &str, shape: Option<&[u64]>) -> Result<Value, Refused> {
        walk(tree, &mut |label, role| {
            let key = format!("{}/{}", owner, label);
            let tensor = self.tensors.get(key.as_str());
            let tensor = tensor.ok_or_else(|| malformed("R17", format!("no tensor {:?} in the header", key)))?;
            check(!tensor.shape.is_empty(), "R18", || format!("{:?} has no axes", key))?;
            let fits = shape.map_or(true, |shape| agrees(role, &tensor.shape, shape));
            check(fits, "R18", || format!("{:?} has the role {} and another shape", key, role))?;
            self.used.insert(key);
            Ok(Value::Slot(Slot { label: label.to_owned(), role, tensor: tensor.clone() }))
        })
    }
}

/// Read a slot tree, with its labels checked by R17.
fn walk(tree: &Json, bind: &mut crate::values::Bind<'_>) -> Result<Value, Refused> {
    let mut labels = HashSet::new();
    let mut checked = |label: &str, role: &'static str| {
        let fits = !label.is_empty() && !label.contains('/') && labels.insert(label.to_owned());
        check(fits, "R17", || format!("the label {:?}", label))?;
        bind(label, role)
    };
    mapping(tree, "R16", "a slot tree", &mut Some(&mut checked))
}

/// Return a digest, after R19 or R20.
fn digest(value: &Json, algorithm: &str, rule: &'static str) -> Result<Digest, Refused> {
    let fits = |text: &&str| {
        let length = if algorithm == "xxh3-128" { text.len() == 32 } else { !text.is_empty() && text.len() % 2 == 0 };
        length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let found = value.as_text().filter(fits).map(|text| Digest { algorithm: algorithm.into(), value: text.into() });
    found.ok_or_else(|| malformed(rule, format!("not a digest by {:?}", algorithm)))
}

fn read_digests(value: &Json, newer: bool, tensors: &mut [Tensor]) -> Result<(), Refused> {
    let found = Members::new("digests", DIGESTS, value, newer)?;
    let (algorithm, values) = (found.required("algorithm", Json::as_text)?, found.required("values", Json::as_array)?);
    let count = tensors.len();
    check(values.len() == count, "R20", || format!("{} digests for {} tensors", values.len(), count))?;
    for (tensor, value) in tensors.iter_mut().zip(values) {
        tensor.digest = Some(digest(value, algorithm, "R20")?);
    }
    Ok(())
}

fn read_weights(value: &Json, newer: bool, parameters: &mut [Parameter]) -> Result<(), Refused> {
    let found = Members::new("weights", DIGESTS, value, newer)?;
    let (algorithm, values) = (found.required("algorithm", Json::as_text)?, found.required("values", Json::as_array)?);
    let count = parameters.len();
    check(values.len() == count, "R19", || format!("{} digests for {} parameters", values.len(), count))?;
    for (parameter, value) in parameters.iter_mut().zip(values) {
        parameter.weights = match value {
            Json::Null => None,
            Json::Array(pair) if pair.len() == 2 => {
                let dtype = pair[0].as_text().and_then(Dtype::named);
                let dtype = dtype.ok_or_else(|| malformed("R19", "the dtype of a digest of weights"))?;
                Some(Weights { dtype, digest: digest(&pair[1], algorithm, "R19")? })
            }
            _ => return Err(malformed("R19", "a digest of weights that is not a pair")),
        };
    }
    Ok(())
}

fn read_place(value: &Json, newer: bool, parameters: usize) -> Result<Place, Refused> {
    let found = Members::new("set", SET, value, newer)?;
    let id = found.required("id", Json::as_text)?.to_owned();
    let hex = id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    check(hex, "R23", || "the id of a set is not 32 hex digits".into())?;
    let (index, count) = (found.required("index", Json::as_natural)?, found.required("count", Json::as_natural)?);
    check(index >= 1 && index <= count, "R23", || format!("shard {} of {}", index, count))?;
    let positions = found.required("positions", Json::as_array)?.iter().map(Json::as_natural).collect();
    let positions: Vec<u64> = Option::unwrap_or_default(positions);
    let different = positions.iter().collect::<HashSet<_>>().len();
    check(different == parameters && positions.len() == parameters, "R23", || "the positions of a shard".into())?;
    Ok(Place { id, index, count, positions })
}

/// Read the manifest of a file (R10 to R23).
pub(crate) fn read(container: &mut Container) -> Result<(State, Option<Place>), Refused> {
    let json = &container.manifest;
    let format = json.get("format").and_then(Json::as_text);
    check(format == Some("named-optimizer-state"), "R10", || "the format is not named-optimizer-state".into())?;
    let (version, minor) = minor(json.get("version"))?;
    let newer = minor > MINOR;
    let manifest = Members::new("manifest", MANIFEST, json, newer)?;
    let extensions = extensions(&manifest)?;
    let mut optimizers = Vec::new();
    for each in manifest.required("optimizers", Json::as_array)? {
        let found = Members::new("optimizers", OPTIMIZER, each, newer)?;
        optimizers.push(Optimizer { class: found.text("class"), id: found.text("id") });
    }
    let groups = manifest.required("groups", Json::as_array)?.iter().map(|group| read_group(group, newer));
    let groups = groups.collect::<Result<Vec<_>, _>>()?;
    let states = manifest.required("states", Json::as_array)?;
    let parameters = manifest.required("parameters", Json::as_array)?.iter();
    let parameters = parameters.map(|each| read_parameter(each, newer, states.len())).collect::<Result<Vec<_>, _>>()?;
    let (mut parameters, indices): (Vec<_>, Vec<_>) = parameters.into_iter().unzip();
    check_names(parameters.iter(), "R14")?;
    check_groups(&groups, optimizers.len(), parameters.len())?;
    read_digests(manifest.required("digests", Some)?, newer, &mut container.tensors)?;
    if let Some(weights) = manifest.get("weights") {
        read_weights(weights, newer, &mut parameters)?;
    }
    let naming = Members::new("naming", NAMING, manifest.required("naming", Some)?, newer)?;
    let naming = Naming {
        source: naming.required("source", Json::as_text)?.to_owned(),
        rule: naming.text("rule"),
        details: naming.mapping("details")?,
    };
    let tensors: Vec<Rc<Tensor>> = container.tensors.iter().cloned().map(Rc::new).collect();
    let by_key = tensors.iter().map(|tensor| (tensor.key.as_str(), tensor.clone())).collect();
    let mut binder = Binder { tensors: &by_key, used: HashSet::new() };
    for tree in states {
        walk(tree, &mut |_, _| Ok(Value::Null))?;
    }
    for (parameter, index) in parameters.iter_mut().zip(indices) {
        if let Some(index) = index {
            parameter.slots = Some(binder.tree(&states[index], &parameter.name, Some(&parameter.shape))?);
        }
    }
    let globals = match manifest.get("globals") {
        Some(tree) => binder.tree(tree, "$globals", None)?,
        None => Value::Mapping(Vec::new()),
    };
    let unused = tensors.iter().find(|tensor| !binder.used.contains(&tensor.key));
    check(unused.is_none(), "R17", || format!("the tensor {:?} belongs to no slot", unused.map(|tensor| &tensor.key)))?;
    let place = manifest.get("set").map(|set| read_place(set, newer, parameters.len())).transpose()?;
    let state = State {
        version,
        optimizers,
        groups,
        parameters,
        globals,
        naming,
        origin: manifest.mapping("origin")?,
        extra: manifest.mapping("extra")?,
        extensions,
        global_step: manifest.get("global_step").and_then(Json::as_natural),
        tensors,
    };
    Ok((state, place))
}

/// Return what the shards of a set have to agree on (R23), as a text to be compared.
pub(crate) fn common(manifest: &Json) -> String {
    let mut groups = manifest.get("groups").cloned();
    if let Some(Json::Array(groups)) = &mut groups {
        for group in groups.iter_mut() {
            if let Json::Object(members) = group {
                members.retain(|(name, _)| name != "count");
            }
        }
    }
    let others = ["optimizers", "naming", "extensions", "global_step"].map(|name| manifest.get(name).cloned());
    let all: Vec<_> = std::iter::once(groups).chain(others).map(|value| value.map(sorted)).collect();
    format!("{:?}", all) // which keeps 1, 1.0 and -0.0 apart
}

/// Return a value with the members of its objects in the order of their names.
fn sorted(value: Json) -> Json {
    match value {
        Json::Array(items) => Json::Array(items.into_iter().map(sorted).collect()),
        Json::Object(members) => {
            let mut members: Vec<_> = members.into_iter().map(|(name, item)| (name, sorted(item))).collect();
            members.sort_by(|(a, _), (b, _)| a.cmp(b));
            Json::Object(members)
        }
        other => other,
    }
}
