use crate::json::{get, parse, Json};
use crate::set::open_latest;
use crate::{blake2b, open, verify, Error, Kind, Value, Xxh3};
use std::fs;
use std::path::{Path, PathBuf};

fn vectors(kind: &str) -> Vec<(PathBuf, Json)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../spec/vectors").join(kind);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().map_or(false, |extension| extension == "json") {
            let description = parse(fs::read_to_string(&path).unwrap().trim_end()).unwrap();
            let set = path.with_extension("");
            let target =
                if set.is_dir() { set.join("optimizer.safetensors") } else { path.with_extension("safetensors") };
            found.push((target, description));
        }
    }
    found
}

fn text<'a>(json: &'a Json, name: &str) -> &'a str {
    json.get(name).and_then(Json::as_text).unwrap()
}

#[test]
fn valid_vectors_are_read() {
    let found = vectors("valid");
    assert!(found.len() >= 25);
    for (path, description) in found {
        let state = open(&path).unwrap_or_else(|error| panic!("{}: {}", path.display(), error));
        let whole = [("".to_owned(), description.clone())];
        let files = description.get("shards").and_then(Json::as_object).unwrap_or(&whole);
        let stated: Vec<_> =
            files.iter().flat_map(|(_, file)| file.get("tensors").unwrap().as_object().unwrap()).collect();
        assert_eq!(state.tensors.len(), stated.len(), "{}", path.display());
        for (key, entry) in stated {
            let tensor = state.tensors.iter().find(|tensor| tensor.key == *key).unwrap();
            assert_eq!(tensor.dtype.name, text(entry, "dtype"));
            let shape: Option<Vec<u64>> =
                entry.get("shape").unwrap().as_array().unwrap().iter().map(Json::as_natural).collect();
            assert_eq!(Some(&tensor.shape), shape.as_ref());
        }
        let count = |(_, file): &(String, Json)| {
            file.get("manifest").unwrap().get("parameters").unwrap().as_array().unwrap().len()
        };
        assert_eq!(state.parameters.len(), files.iter().map(count).sum::<usize>());
        assert_eq!(verify(&state).unwrap(), !path.ends_with("unknown-algorithm.safetensors"), "{}", path.display());
    }
}

#[test]
fn invalid_vectors_are_refused_by_their_rule() {
    let found = vectors("invalid");
    assert!(found.len() >= 250);
    for (path, description) in found {
        let result = open(&path).and_then(|state| verify(&state));
        let kind = match text(&description, "kind") {
            "malformed" => Kind::Malformed,
            "digest" => Kind::Digest,
            _ => Kind::Unsupported,
        };
        match result {
            Err(Error::Refused(refused)) => {
                assert_eq!((refused.rule, refused.kind), (text(&description, "rule"), kind), "{}", path.display());
            }
            other => panic!("{}: {:?}", path.display(), other.map(drop)),
        }
    }
}

#[test]
fn values_have_their_types() {
    let path = vectors("valid").into_iter().map(|(path, _)| path).find(|path| path.ends_with("values.safetensors"));
    let state = open(path.unwrap()).unwrap();
    assert!(matches!(state.extra.get("booleans"), Some(Value::List(items)) if items.len() == 2));
    assert!(matches!(state.extra.get("tuples"), Some(Value::Tuple(items)) if matches!(items[0], Value::Int(1))));
    assert!(
        matches!(state.extra.get("scalar"), Some(Value::Scalar(dtype, bytes)) if dtype.name == "I64" && bytes[0] == 251)
    );
    let numbers = match state.extra.get("by number") {
        Some(Value::Mapping(pairs)) => pairs,
        other => panic!("{:?}", other),
    };
    assert!(numbers.iter().any(|(key, _)| matches!(key, Value::Big(digits) if digits == "1152921504606846976")));
    assert!(numbers.iter().any(|(key, _)| matches!(key, Value::Float(value) if *value == 0.5)));
}

/// The same bytes as in the tests of the JavaScript reader.
fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i * 7 + (i >> 8) * 13 + 3) as u8).collect()
}

#[test]
fn hashes_are_those_of_others() {
    // Made by Python's hashlib and xxhash.
    for (n, digest) in BLAKE2B {
        assert_eq!(blake2b(&bytes(n)), digest, "{} bytes", n);
    }
    for (n, digest) in XXH3 {
        for piece in [1, 64, 777, 1 << 20] {
            let mut hash = Xxh3::default();
            bytes(n).chunks(piece).for_each(|part| hash.update(part));
            assert_eq!(hash.digest(), digest, "{} bytes in pieces of {}", n, piece);
        }
    }
}

#[test]
fn json_is_strict() {
    assert_eq!(
        parse(r#" [1, 1.0, 1e2, 9007199254740992, "\u0061\ud83d\ude00\n", -9007199254740991] "#).unwrap(),
        Json::Array(vec![
            Json::Int(1),
            Json::Float(1.0),
            Json::Float(100.0),
            Json::Huge,
            Json::Text("a\u{1f600}\n".into()),
            Json::Int(-9007199254740991),
        ])
    );
    for text in [
        "",
        "-",
        "1.",
        ".5",
        "1e",
        "+1",
        "-0",
        "01",
        "tru",
        "[1,]",
        r#"{"a":1,"a":1}"#,
        r#""\ud83d""#,
        r#""\ud83dx""#,
        "\"\t\"",
        "1 2",
        "1e400",
    ] {
        assert_eq!(parse(text).unwrap_err().rule, "R3", "{}", text);
    }
    assert_eq!(parse(&format!("[{}0]", "0,".repeat(2_097_151))).unwrap().as_array().unwrap().len(), 2_097_152);
    assert_eq!(
        parse(&format!("[{}0]", "0,".repeat(2_097_152))).unwrap_err().message,
        "more than 2097152 values, at byte 4194304 of the JSON text"
    );
    assert_eq!(
        parse(&"[".repeat(65)).unwrap_err().message,
        "nesting of more than 64 levels, at byte 64 of the JSON text"
    );
}

#[test]
fn messages_name_what_is_wrong() {
    let message = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../spec/vectors/invalid").join(name);
        open(path).and_then(|state| verify(&state)).unwrap_err().to_string()
    };
    assert_eq!(message("tensor-changed.safetensors"), "R21: the tensor \"w/momentum\" was changed");
    assert_eq!(message("version-major.safetensors"), "R11: version 2.0; this reader reads version 1");
    assert_eq!(
        message("shard-alone.safetensors"),
        "R23: this is shard 1 of 2, and no state by itself: open the index of its set"
    );
}

#[test]
fn a_set_that_is_replaced_while_it_is_read_is_read_again() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../spec/vectors/valid");
    let index = |set: &str| fs::read(folder.join(set).join("optimizer.safetensors.index.json")).unwrap();
    let path = folder.join("set").join("optimizer.safetensors.index.json");
    let mut indexes = vec![index("set"), index("set-of-one")];
    let state = open_latest(&path, || Ok(indexes.pop().unwrap())).unwrap();
    assert_eq!(state.parameters.len(), 6);
    let error = open_latest(&path, || Ok(index("set-of-one"))).unwrap_err().to_string();
    assert_eq!(error, "R25: the shard \"optimizer-353b19f4-00001-of-00001.safetensors\" is not there");
}

/// Every byte of the text of a header, replaced by each of a few others, with the digest made anew: read or refused, no panic.
#[test]
fn changed_headers_are_read_or_refused() {
    let folder = std::env::temp_dir().join(format!("named-optimizer-state-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("changed.safetensors");
    let (mut refused, mut read) = (0, 0);
    for (source, _) in vectors("valid").into_iter().filter(|(path, _)| path.is_file()) {
        let whole = fs::read(source).unwrap();
        let end = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for at in (90..end).step_by(29) {
            let mut changed = whole.clone();
            changed[at] = b"0-\"{}[],:$e.\\ \xff"[at % 15];
            changed[58..90].fill(b'0');
            let digest = blake2b(&changed[..end]);
            changed[58..90].copy_from_slice(digest.as_bytes());
            fs::write(&path, &changed).unwrap();
            match open(&path) {
                Ok(_) => read += 1,
                Err(Error::Refused(_)) => refused += 1,
                Err(error) => panic!("{}", error),
            }
        }
    }
    fs::remove_dir_all(folder).unwrap();
    assert!(refused > 300, "{} refused, {} read", refused, read);
}

#[test]
fn members_are_found_by_name() {
    let json = parse(r#"{"a":1,"b":{"c":[]}}"#).unwrap();
    assert_eq!(json.get("b").and_then(|b| b.get("c")), Some(&Json::Array(Vec::new())));
    assert_eq!(get(json.as_object().unwrap(), "d"), None);
}

const BLAKE2B: [(usize, &str); 5] = [
    (0, "cae66941d9efbd404e4d88758ea67670"),
    (127, "e00ab0ead4d729de8fbe7745d642e416"),
    (128, "8e0cf9bb1b36fa6c42aa6490f719b575"),
    (129, "6cefde50e4008690e61cf8225d101256"),
    (5000, "62b6835b24c31d9038dd5a4cb363f876"),
];

const XXH3: [(usize, &str); 28] = [
    (0, "99aa06d3014798d86001c324468d497f"),
    (1, "22bbb76b211a39ba13e608bc156defed"),
    (3, "ce31763cbf8245a5a9088dda485b481c"),
    (4, "47197970590746b1788a609154b0fe20"),
    (8, "e3bc8a5f461715553cd024e3d63a1588"),
    (9, "c72c88247a9a56d7eafab1c7f123109f"),
    (16, "ce0b9647ab24f88460d75c5e47d40a24"),
    (17, "bfd327edcc2fbd12eeed7654312a26d7"),
    (32, "4f130f27ab6baf45d761fd22e8ad5262"),
    (33, "d15b272993d9830f4193c535612ac940"),
    (64, "fed953fe6a8b2b63aa549d72c69cd267"),
    (65, "9f5580903f79bec343622ea01271a860"),
    (96, "2a350495986db37a0ab63bcfbc907abb"),
    (97, "3ffe2e0f781d623c8d17d1afec22619e"),
    (128, "1b1962a096bac78bc580008b6c92ac53"),
    (129, "293e4968c4619023bd91ce7ace4d385b"),
    (160, "d71519a37cb75ab60e298e02860a8fd0"),
    (239, "cb7a8da57ad8329249fb6a0a5210e031"),
    (240, "ad46c1021b076bc704e0b5f034bee80b"),
    (241, "ac6c3492c3d6b45d8beadd3a8874fe17"),
    (512, "806150a4e9a975780e5b5e129265c2c7"),
    (1024, "ed4745f2bc58bc68a6f1a01606138456"),
    (1025, "4d589146d3f9b41cecd2bad8e8ceb864"),
    (1088, "d95c1a437a654de8c7d84b42188f514f"),
    (1089, "b7696044ac4fe07c2390eecebe90a2bb"),
    (2048, "4164199d6919f239d9591a7a867bbf03"),
    (2049, "0695949818f3696545189093da197612"),
    (5000, "273318ec6f6cefe4242c1cf3b0a36594"),
];
