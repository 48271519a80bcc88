//! The command under test of `spec/conformance`: a line of JSON for each path.

use named_optimizer_state::{hex, open, verify, Error, Kind, Parameter, State, Value};
use std::io::{self, Write};
use std::process::ExitCode;

/// Return text as JSON.
fn text(text: &str) -> String {
    let mut result = String::from("\"");
    for char in text.chars() {
        match char {
            '"' | '\\' => result.extend(['\\', char]),
            '\0'..='\u{1f}' => result += &format!("\\u{:04x}", u32::from(char)),
            _ => result.push(char),
        }
    }
    result + "\""
}

fn array(items: impl IntoIterator<Item = String>) -> String {
    format!("[{}]", items.into_iter().collect::<Vec<_>>().join(","))
}

/// Return members as a JSON object, without those that are `None`.
fn object<'a>(members: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let member = |(name, value): (&str, Option<String>)| Some(format!("{}:{}", text(name), value?));
    format!("{{{}}}", members.into_iter().filter_map(member).collect::<Vec<_>>().join(","))
}

/// Return a typed value as JSON (section 5), tensors with their bytes.
fn typed(value: &Value) -> io::Result<String> {
    let all = |items: &[Value]| Ok::<_, io::Error>(array(items.iter().map(typed).collect::<Result<Vec<_>, _>>()?));
    Ok(match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Big(digits) => format!(r#"{{"$int":"{}"}}"#, digits),
        Value::Float(value) if value.is_nan() => r#"{"$float":"nan"}"#.into(),
        Value::Float(value) if value.is_infinite() => {
            format!(r#"{{"$float":"{}"}}"#, if *value > 0.0 { "inf" } else { "-inf" })
        }
        Value::Float(value) => format!("{:?}", value),
        Value::Text(value) => text(value),
        Value::Bytes(bytes) => format!(r#"{{"$bytes":"{}"}}"#, hex(bytes)),
        Value::List(items) => all(items)?,
        Value::Tuple(items) => format!(r#"{{"$tuple":{}}}"#, all(items)?),
        Value::Scalar(dtype, bytes) => format!(r#"{{"$scalar":["{}","{}"]}}"#, dtype.name, hex(bytes)),
        Value::Slot(slot) => {
            let tensor = &slot.tensor;
            object([
                ("$tensor", Some(text(&tensor.key))),
                ("role", Some(text(slot.role))),
                ("dtype", Some(text(tensor.dtype.name))),
                ("shape", Some(array(tensor.shape.iter().map(u64::to_string)))),
                ("data", Some(text(&hex(&tensor.bytes()?)))),
            ])
        }
        Value::Mapping(pairs) => {
            let name = |key: &Value| matches!(key, Value::Text(text) if !text.starts_with('$'));
            let plain = pairs.iter().all(|(key, _)| name(key));
            let mut members = Vec::new();
            for (key, item) in pairs {
                let (key, item) = (typed(key)?, typed(item)?);
                members.push(if plain { format!("{}:{}", key, item) } else { array([key, item]) });
            }
            let members = members.join(",");
            if plain {
                format!("{{{}}}", members)
            } else {
                format!(r#"{{"$dict":[{}]}}"#, members)
            }
        }
    })
}

/// Return a mapping as JSON, or `None` where it is empty.
fn some(value: &Value) -> io::Result<Option<String>> {
    (!value.is_empty()).then(|| typed(value)).transpose()
}

fn optional(value: &Option<String>) -> Option<String> {
    value.as_deref().filter(|value| !value.is_empty()).map(text)
}

fn parameter(parameter: &Parameter) -> io::Result<String> {
    let weights = parameter
        .weights
        .as_ref()
        .map(|weights| array([&weights.digest.algorithm, weights.dtype.name, &weights.digest.value].map(text)));
    let keys = object(parameter.keys.iter().map(|(by, key)| (by.as_str(), Some(text(key)))));
    Ok(object([
        ("name", Some(text(&parameter.name))),
        ("shape", Some(array(parameter.shape.iter().map(u64::to_string)))),
        ("dtype", parameter.dtype.map(|dtype| text(dtype.name))),
        ("adapter", optional(&parameter.adapter)),
        ("tied", (!parameter.tied.is_empty()).then(|| array(parameter.tied.iter().map(|name| text(name))))),
        ("keys", (!parameter.keys.is_empty()).then_some(keys)),
        ("id", parameter.id.as_ref().map(typed).transpose()?),
        ("slots", Some(parameter.slots.as_ref().map_or(Ok("null".into()), typed)?)),
        ("weights", weights),
    ]))
}

fn described(state: &State) -> io::Result<String> {
    let optimizers = state.optimizers.iter().map(|each| {
        let class = each.class.as_deref().map_or("null".into(), text);
        object([("class", Some(class)), ("id", optional(&each.id))])
    });
    let mut groups = Vec::new();
    for group in &state.groups {
        let option = |(name, value): &(String, Value)| Ok(array([text(name), typed(value)?]));
        let options = group.options.iter().map(option).collect::<io::Result<Vec<_>>>()?;
        groups.push(object([
            ("optimizer", Some(group.optimizer.to_string())),
            ("count", Some(group.count.to_string())),
            ("name", optional(&group.name)),
            ("options", Some(array(options))),
        ]));
    }
    let parameters = state.parameters.iter().map(parameter).collect::<io::Result<Vec<_>>>()?;
    let naming = object([
        ("source", Some(text(&state.naming.source))),
        ("rule", optional(&state.naming.rule)),
        ("details", some(&state.naming.details)?),
    ]);
    Ok(object([
        ("optimizers", Some(array(optimizers))),
        ("groups", Some(array(groups))),
        ("parameters", Some(array(parameters))),
        ("naming", Some(naming)),
        ("globals", some(&state.globals)?),
        ("origin", some(&state.origin)?),
        ("extra", some(&state.extra)?),
        ("extensions", some(&state.extensions)?),
        ("global_step", state.global_step.map(|step| step.to_string())),
    ]))
}

/// Return the line of a path, and whether it was refused.
fn line(path: &str) -> Result<(String, bool), Box<dyn std::error::Error>> {
    let result = open(path).and_then(|state| Ok((verify(&state)?, state)));
    Ok(match result {
        Ok((verified, state)) => {
            (object([("verified", Some(verified.to_string())), ("state", Some(described(&state)?))]), false)
        }
        Err(Error::Refused(refused)) => {
            let kind = match refused.kind {
                Kind::Malformed => "malformed",
                Kind::Digest => "digest",
                Kind::Unsupported => "unsupported",
            };
            let message = text(&refused.to_string());
            let members = [("rule", Some(text(refused.rule))), ("kind", Some(text(kind))), ("message", Some(message))];
            (object(members), true)
        }
        Err(error) => return Err(error.into()),
    })
}

fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut any = false;
    for path in std::env::args().skip(1) {
        let (line, refused) = line(&path)?;
        any |= refused;
        writeln!(io::stdout(), "{}", line)?;
    }
    Ok(ExitCode::from(u8::from(any)))
}
