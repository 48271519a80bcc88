//! Section 5: typed values.

use crate::container::{Dtype, Tensor};
use crate::error::{check, malformed, Refused};
use crate::json::{get, Json, MAX_INT};
use std::collections::HashSet;
use std::rc::Rc;

/// A typed value.
#[derive(Clone, Debug)]
pub enum Value {
    Null,
    Bool(bool),
    /// An integer in ±(2^53 - 1).
    Int(i64),
    /// An integer beyond, in decimal digits.
    Big(String),
    Float(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Tuple(Vec<Value>),
    /// Keys and values in the order of the file.
    Mapping(Vec<(Value, Value)>),
    /// A tensor without axes.
    Scalar(Dtype, Vec<u8>),
    /// A tensor with axes.
    Slot(Slot),
}

/// A tensor in a slot tree, with its role.
#[derive(Clone, Debug)]
pub struct Slot {
    pub label: String,
    /// `param`, `row`, `col`, `block` or `opaque` (R18).
    pub role: &'static str,
    pub tensor: Rc<Tensor>,
}

impl Value {
    /// Return a value of a mapping by a key that is text.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Mapping(pairs) => {
                pairs.iter().find(|(each, _)| matches!(each, Value::Text(text) if text == key)).map(|(_, value)| value)
            }
            _ => None,
        }
    }

    /// Whether a mapping has no keys.
    pub fn is_empty(&self) -> bool {
        matches!(self, Value::Mapping(pairs) if pairs.is_empty())
    }
}

const ROLES: [&str; 5] = ["param", "row", "col", "block", "opaque"];

/// Makes the tensor of a label and a role.
pub(crate) type Bind<'a> = dyn FnMut(&str, &'static str) -> Result<Value, Refused> + 'a;

/// Decode a typed value (R22); without `bind`, tensors are refused.
pub(crate) fn decode(value: &Json, bind: &mut Option<&mut Bind<'_>>) -> Result<Value, Refused> {
    Ok(match value {
        Json::Null => Value::Null,
        Json::Bool(value) => Value::Bool(*value),
        Json::Int(value) => Value::Int(*value),
        Json::Huge => return Err(malformed("R22", "an integer outside ±(2^53 - 1) as a number")),
        Json::Float(value) => Value::Float(*value),
        Json::Text(text) => Value::Text(text.clone()),
        Json::Array(items) => Value::List(decode_all(items, bind)?),
        Json::Object(members) => match members.iter().find(|(name, _)| name.starts_with('$')) {
            Some((tag, body)) => return tagged(tag, body, members, bind),
            None => {
                let pair = |(name, item): &(String, Json)| Ok((Value::Text(name.clone()), decode(item, bind)?));
                Value::Mapping(members.iter().map(pair).collect::<Result<_, Refused>>()?)
            }
        },
    })
}

fn decode_all(items: &[Json], bind: &mut Option<&mut Bind<'_>>) -> Result<Vec<Value>, Refused> {
    items.iter().map(|item| decode(item, bind)).collect()
}

fn tagged(
    tag: &str,
    body: &Json,
    members: &[(String, Json)],
    bind: &mut Option<&mut Bind<'_>>,
) -> Result<Value, Refused> {
    if tag == "$tensor" {
        let role = get(members, "role").and_then(Json::as_text);
        let role = role.and_then(|role| ROLES.iter().find(|each| **each == role));
        return match (body.as_text(), role, bind) {
            (Some(label), Some(role), Some(bind)) if members.len() == 2 => bind(label, role),
            _ => Err(malformed("R22", "a $tensor in another form, or where it is not allowed")),
        };
    }
    check(members.len() == 1, "R22", || format!("other members next to {:?}", tag))?;
    let value = match tag {
        "$tuple" => body.as_array().map(|items| decode_all(items, bind)).transpose()?.map(Value::Tuple),
        "$float" => body.as_text().and_then(float),
        "$int" => body.as_text().filter(|digits| is_big(digits)).map(|digits| Value::Big(digits.to_owned())),
        "$bytes" => body.as_text().and_then(unhex).map(Value::Bytes),
        "$scalar" => body.as_array().and_then(scalar),
        "$dict" => body.as_array().map(|pairs| dict(pairs, bind)).transpose()?,
        _ => None,
    };
    value.ok_or_else(|| malformed("R22", format!("{:?} in another form", tag)))
}

fn float(text: &str) -> Option<Value> {
    match text {
        "inf" => Some(Value::Float(f64::INFINITY)),
        "-inf" => Some(Value::Float(f64::NEG_INFINITY)),
        "nan" => Some(Value::Float(f64::NAN)),
        _ => None,
    }
}

/// Whether digits are an integer outside ±(2^53 - 1), without leading zeros, of at most 1,000 digits.
fn is_big(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
    plain && (16..=1000).contains(&digits.len()) && digits.parse::<i64>().map_or(true, |value| value > MAX_INT)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    if text.len() % 2 == 1 {
        return None;
    }
    text.as_bytes().chunks(2).map(|pair| Some(digit(&pair[0])? << 4 | digit(&pair[1])?)).collect()
}

fn scalar(body: &[Json]) -> Option<Value> {
    match body {
        [Json::Text(dtype), Json::Text(digits)] => {
            let dtype = Dtype::named(dtype).filter(|dtype| dtype.bits >= 8)?;
            let bytes = unhex(digits).filter(|bytes| bytes.len() as u64 * 8 == dtype.bits)?;
            Some(Value::Scalar(dtype, bytes))
        }
        _ => None,
    }
}

fn dict(pairs: &[Json], bind: &mut Option<&mut Bind<'_>>) -> Result<Value, Refused> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for pair in pairs {
        match pair.as_array() {
            Some([key, item]) => found.push((decode(key, &mut None)?, decode(item, bind)?)),
            _ => return Err(malformed("R22", "a $dict with an item that is not a pair")),
        }
    }
    for (key, _) in &found {
        check(seen.insert(identified(key)?), "R22", || "a $dict with two equal keys".into())?;
    }
    Ok(Value::Mapping(found))
}

/// Return a text that is the same for equal keys of a `$dict`: numbers by value, false and true as 0 and 1.
fn identified(key: &Value) -> Result<String, Refused> {
    Ok(match key {
        Value::Null => "null".into(),
        Value::Text(text) => format!("{:?}", text),
        Value::Bool(value) => format!("#{}", u8::from(*value)),
        Value::Int(value) => format!("#{}", value),
        Value::Big(digits) => format!("#{}", digits),
        Value::Float(value) if *value == 0.0 => "#0".into(),
        Value::Float(value) => format!("#{}", value), // in full, without an exponent
        Value::Tuple(items) => {
            let items: Result<Vec<_>, _> = items.iter().map(identified).collect();
            format!("({})", items?.join(","))
        }
        _ => return Err(malformed("R22", "a key of a $dict that is a list, bytes, a mapping or a tensor")),
    })
}

/// Decode a value that has to be a mapping with string keys.
pub(crate) fn mapping(
    value: &Json,
    rule: &'static str,
    what: &str,
    bind: &mut Option<&mut Bind<'_>>,
) -> Result<Value, Refused> {
    match decode(value, bind)? {
        Value::Mapping(pairs) if pairs.iter().all(|(key, _)| matches!(key, Value::Text(_))) => {
            Ok(Value::Mapping(pairs))
        }
        _ => Err(malformed(rule, format!("{} is not a mapping with string keys", what))),
    }
}
