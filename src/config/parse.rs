//! From text and `--set` pairs to a config, and from serde's messages to setting, value and remedy.

use super::Config;
use crate::error::{Error, Result};
use crate::optim;

/// A config's text with `key=value` pairs over it.
pub(super) fn parse(text: &str, sets: &[String]) -> Result<Config> {
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Error::config("CONFIG", format!("not TOML in line {line}"), error.message())
    })?;
    let kind = sets.iter().rev().find_map(|set| set.trim_start().strip_prefix("optimizer.kind="));
    if let (Some(kind), Some(section)) = (kind, table.get_mut("optimizer").and_then(toml::Value::as_table_mut)) {
        optim::override_kind(section, kind.trim().trim_matches('"'));
    }
    for set in sets {
        apply(&mut table, set)?;
    }
    serde_path_to_error::deserialize(toml::Value::Table(table))
        .map_err(|error| describe(&error.path().to_string(), error.inner().message()))
}

/// Puts one `key=value` into the table. The value is TOML; what is not TOML is taken as a string.
fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let wrong = |remedy: &str| Error::config("--set", format!("`{set}`"), remedy);
    let (key, value) = set.split_once('=').ok_or_else(|| wrong("write key=value, as in model.d_model=256"))?;
    let value = match format!("v = {value}").parse::<toml::Table>() {
        Ok(mut parsed) => parsed.remove("v").ok_or_else(|| wrong("write key=value"))?,
        Err(_) => toml::Value::String(value.to_owned()),
    };
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty()).ok_or_else(|| wrong("the key is missing"))?;
    let mut inner = table;
    for part in parts {
        let entry = inner.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        inner = entry.as_table_mut().ok_or_else(|| wrong(&format!("`{part}` is not a section")))?;
    }
    inner.insert(last.to_owned(), value);
    Ok(())
}

/// Turns serde's message into setting, value and remedy.
fn describe(path: &str, message: &str) -> Error {
    let message = message.trim();
    // A section with several owners tells which of its keys it is about.
    if let Some((key, message)) = message.strip_prefix("key `").and_then(|rest| rest.split_once("`: ")) {
        return describe(&format!("{path}.{key}"), message);
    }
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (key, expected) = rest.split_once("`, expected ").unwrap_or((rest, "another key"));
        let section = path.strip_suffix(key).unwrap_or(path).trim_matches('.');
        let setting = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        return Error::config(setting, "an unknown key", format!("expected {expected}"));
    }
    match message.split_once(", expected ") {
        Some((found, "usize" | "u64")) => Error::config(path, found, "expected a whole number, 0 or more"),
        Some((found, "f64")) => Error::config(path, found, "expected a number"),
        Some((found, expected)) => Error::config(path, found, format!("expected {expected}")),
        None => Error::config(path, "a value that does not fit", message),
    }
}
