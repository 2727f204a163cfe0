//! Canonical JSON (RFC 8785) written straight into a buffer: what digests are taken of.
//!
//! A key is made for every stage of every plan, so nothing is copied or sorted here that need not be. It knows no meaning of
//! what it writes, and its only mistake to find is an integer that the canonical form would merge with its neighbours.

use serde_json::{Number, Value};

/// Integers beyond this have no exact number in canonical JSON, which knows doubles only.
const EXACT: u64 = 1 << 53;

/// An integer that a double cannot hold apart from its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inexact;

/// Writes `value` to the end of `out`.
pub(crate) fn write(value: &Value, out: &mut Vec<u8>) -> Result<(), Inexact> {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => write_number(number, out)?,
        Value::String(text) => write_string(text, out),
        Value::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write(item, out)?;
            }
            out.push(b']');
        }
        Value::Object(fields) => write_fields(fields, out, write)?,
    }
    Ok(())
}

/// Writes an object whose values `each` writes, its names in the canonical order.
pub(crate) fn write_fields<E>(
    fields: &serde_json::Map<String, Value>,
    out: &mut Vec<u8>,
    mut each: impl FnMut(&Value, &mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut one = |index: usize, name: &str, value: &Value, out: &mut Vec<u8>| {
        if index > 0 {
            out.push(b',');
        }
        write_string(name, out);
        out.push(b':');
        each(value, out)
    };
    out.push(b'{');
    // The canonical order is that of UTF-16, which for ASCII is the order in which the map has its names already.
    if fields.keys().all(|name| name.is_ascii()) {
        for (index, (name, value)) in fields.iter().enumerate() {
            one(index, name, value, out)?;
        }
    } else {
        let mut sorted: Vec<(&String, &Value)> = fields.iter().collect();
        sorted.sort_by(|(one, _), (two, _)| one.encode_utf16().cmp(two.encode_utf16()));
        for (index, (name, value)) in sorted.into_iter().enumerate() {
            one(index, name, value, out)?;
        }
    }
    out.push(b'}');
    Ok(())
}

/// Writes a string with the escapes of canonical JSON.
pub(crate) fn write_string(text: &str, out: &mut Vec<u8>) {
    if text.bytes().all(|byte| byte >= b' ' && byte != b'"' && byte != b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
        return;
    }
    serde_json::to_writer(out, text).expect("a buffer takes every byte");
}

fn write_number(number: &Number, out: &mut Vec<u8>) -> Result<(), Inexact> {
    let size = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
    match size {
        Some(size) if size > EXACT => Err(Inexact),
        // Integers of that size read the same in every form.
        Some(_) => {
            serde_json::to_writer(out, number).expect("a buffer takes every byte");
            Ok(())
        }
        None => {
            serde_json_canonicalizer::to_writer(number, out).expect("a buffer takes every byte");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(value: &Value) -> String {
        let mut out = Vec::new();
        write(value, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn values() -> impl Strategy<Value = Value> {
        let number = prop_oneof![
            (-(EXACT as i64)..=EXACT as i64).prop_map(Value::from),
            any::<f64>().prop_filter("finite", |number| number.is_finite()).prop_map(Value::from),
            (-1e3..1e3_f64).prop_map(Value::from),
        ];
        let name = prop_oneof!["[a-c$]{0,3}", "\\PC{0,4}", any::<String>()];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            number,
            name.clone().prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(name.clone(), inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Keys were made of this text before there was this writer: it must never differ in a byte.
        #[test]
        fn it_writes_what_the_reference_writes(value in values()) {
            prop_assert_eq!(text(&value), serde_json_canonicalizer::to_string(&value).unwrap());
        }
    }

    #[test]
    fn names_are_in_the_order_of_utf_16() {
        let fields =
            json!({"\u{fb33}": 1, "\u{1f600}": 2, "é": 3, "a": 1.0, "b": -0.0, "c": 1e21, "d": "\u{1}\"\\/\n"});
        assert_eq!(text(&fields), serde_json_canonicalizer::to_string(&fields).unwrap());
    }

    #[test]
    fn integers_beyond_the_exact_are_refused() {
        for number in [json!(EXACT + 1), json!(-(EXACT as i64) - 1), json!(u64::MAX), json!(i64::MIN)] {
            assert_eq!(write(&json!([{"a": number}]), &mut Vec::new()), Err(Inexact));
        }
        assert_eq!(text(&json!([EXACT, -(EXACT as i64)])), "[9007199254740992,-9007199254740992]");
    }
}
