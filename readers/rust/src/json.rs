//! JSON as rule R3 allows it: strict, with integers and floats apart, and no member twice.

use crate::error::{malformed, Refused};
use std::collections::HashSet;

pub const MAX_DEPTH: usize = 64;
pub const MAX_VALUES: usize = 2_097_152;
/// 2^53 - 1.
pub const MAX_INT: i64 = 9_007_199_254_740_991;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    /// An integer in ±(2^53 - 1).
    Int(i64),
    /// An integer beyond, which no rule takes.
    Huge,
    Float(f64),
    Text(String),
    Array(Vec<Json>),
    /// Members in the order of the text.
    Object(Vec<(String, Json)>),
}

impl Json {
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[Json]> {
        match self {
            Json::Array(items) => Some(items),
            _ => None,
        }
    }

    pub fn as_object(&self) -> Option<&[(String, Json)]> {
        match self {
            Json::Object(members) => Some(members),
            _ => None,
        }
    }

    /// Return a natural of at most 2^53 - 1.
    pub fn as_natural(&self) -> Option<u64> {
        match self {
            Json::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Return a member of an object.
    pub fn get(&self, name: &str) -> Option<&Json> {
        get(self.as_object()?, name)
    }
}

/// Return a member by its name.
pub fn get<'a>(members: &'a [(String, Json)], name: &str) -> Option<&'a Json> {
    members.iter().find(|(each, _)| each == name).map(|(_, value)| value)
}

/// Parse one JSON text.
pub fn parse(text: &str) -> Result<Json, Refused> {
    let mut parser = Parser { text, bytes: text.as_bytes(), at: 0, values: 0 };
    let value = parser.value(0)?;
    if parser.at < text.len() {
        return parser.fail("more than one value");
    }
    Ok(value)
}

struct Parser<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    values: usize,
}

impl<'a> Parser<'a> {
    fn fail<T>(&self, what: &str) -> Result<T, Refused> {
        Err(malformed("R3", format!("{}, at byte {} of the JSON text", what, self.at)))
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn skip(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    /// Take a bracket or a comma, which `MAX_VALUES` counts.
    fn count(&mut self) -> Result<(), Refused> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return self.fail(&format!("more than {} values", MAX_VALUES));
        }
        self.at += 1;
        Ok(())
    }

    fn value(&mut self, depth: usize) -> Result<Json, Refused> {
        self.skip();
        let value = match self.peek() {
            Some(b'"') => Json::Text(self.string()?),
            Some(b'{' | b'[') if depth == MAX_DEPTH => return self.fail("nesting of more than 64 levels"),
            Some(b'{') => self.members(depth + 1)?,
            Some(b'[') => self.items(depth + 1)?,
            Some(b't') => self.literal("true", Json::Bool(true))?,
            Some(b'f') => self.literal("false", Json::Bool(false))?,
            Some(b'n') => self.literal("null", Json::Null)?,
            _ => self.number()?,
        };
        self.skip();
        Ok(value)
    }

    fn literal(&mut self, word: &str, meaning: Json) -> Result<Json, Refused> {
        if !self.text[self.at..].starts_with(word) {
            return self.fail("not a value");
        }
        self.at += word.len();
        Ok(meaning)
    }

    fn items(&mut self, depth: usize) -> Result<Json, Refused> {
        let mut items = Vec::new();
        self.count()?;
        self.skip();
        if self.take(b']') {
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value(depth)?);
            if self.take(b']') {
                return Ok(Json::Array(items));
            }
            if self.peek() != Some(b',') {
                return self.fail("an array that goes on without a comma");
            }
            self.count()?;
        }
    }

    fn members(&mut self, depth: usize) -> Result<Json, Refused> {
        let mut members = Vec::new();
        self.count()?;
        self.skip();
        if self.take(b'}') {
            return Ok(Json::Object(members));
        }
        loop {
            self.skip();
            if self.peek() != Some(b'"') {
                return self.fail("a member without a name");
            }
            let name = self.string()?;
            self.skip();
            if !self.take(b':') {
                return self.fail("a name without a colon");
            }
            members.push((name, self.value(depth)?));
            if self.take(b'}') {
                break;
            }
            if self.peek() != Some(b',') {
                return self.fail("an object that goes on without a comma");
            }
            self.count()?;
        }
        let mut names = HashSet::with_capacity(members.len());
        if let Some((name, _)) = members.iter().find(|(name, _)| !names.insert(name.as_str())) {
            return self.fail(&format!("the member {:?} twice", name));
        }
        Ok(Json::Object(members))
    }

    fn string(&mut self) -> Result<String, Refused> {
        self.at += 1;
        let mut result = String::new();
        loop {
            let start = self.at;
            while matches!(self.peek(), Some(byte) if byte >= 0x20 && byte != b'"' && byte != b'\\') {
                self.at += 1;
            }
            result.push_str(&self.text[start..self.at]); // ends next to an ASCII character
            if self.take(b'"') {
                return Ok(result);
            }
            if !self.take(b'\\') {
                return self.fail("a control character in a string, or an unfinished string");
            }
            let escape = self.peek();
            self.at += 1;
            result.push(match escape {
                Some(b'b') => '\u{8}',
                Some(b'f') => '\u{c}',
                Some(b'n') => '\n',
                Some(b'r') => '\r',
                Some(b't') => '\t',
                Some(byte @ (b'"' | b'\\' | b'/')) => char::from(byte),
                Some(b'u') => self.unicode()?,
                _ => return self.fail("an escape that JSON does not have"),
            });
        }
    }

    fn unicode(&mut self) -> Result<char, Refused> {
        let first = self.unit()?;
        let code = if (0xd800..0xdc00).contains(&first) && self.bytes[self.at..].starts_with(b"\\u") {
            self.at += 2;
            let second = self.unit()?;
            if !(0xdc00..0xe000).contains(&second) {
                return self.fail("a lone surrogate");
            }
            0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00)
        } else {
            first
        };
        match char::from_u32(code) {
            Some(found) => Ok(found),
            None => self.fail("a lone surrogate"),
        }
    }

    fn unit(&mut self) -> Result<u32, Refused> {
        match self.bytes.get(self.at..self.at + 4) {
            Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => {
                self.at += 4;
                Ok(digits.iter().fold(0, |sum, digit| 16 * sum + char::from(*digit).to_digit(16).unwrap_or(0)))
            }
            _ => self.fail("an escape that JSON does not have"),
        }
    }

    fn digits(&mut self) -> Result<(), Refused> {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == start {
            return self.fail("not a value");
        }
        Ok(())
    }

    fn number(&mut self) -> Result<Json, Refused> {
        let start = self.at;
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        let integer = self.at;
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            if !self.take(b'-') {
                self.take(b'+');
            }
            self.digits()?;
        }
        let text = &self.text[start..self.at];
        if self.at == integer {
            return match text.parse::<i64>() {
                Ok(0) if text.starts_with('-') => self.fail("the integer -0"),
                Ok(value) if (-MAX_INT..=MAX_INT).contains(&value) => Ok(Json::Int(value)),
                _ => Ok(Json::Huge),
            };
        }
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Json::Float(value)),
            _ => self.fail("a float beyond the range of 64 bits"),
        }
    }
}
