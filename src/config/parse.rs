//! From text and `--set` pairs to a config, and from serde's messages to setting, value and remedy.

use super::Config;
use crate::error::{Error, Result};
use crate::optim;

/// Sections in sections; the config has one level.
const DEPTH: usize = 4;

/// The word for an option that is off.
const NONE: &str = "none";

/// A config's text with `key=value` pairs over it.
pub(super) fn parse(text: &str, sets: &[String]) -> Result<Config> {
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Error::config("CONFIG", format!("not TOML in line {line}"), error.message())
    })?;

    let kind = sets.iter().rev().find_map(|set| set.trim_start().strip_prefix("optimizer.kind="));
    if let (Some(kind), Some(section)) =
        (kind, table.get_mut("optimizer").and_then(toml::Value::as_table_mut))
    {
        optim::override_kind(section, kind.trim().trim_matches('"'));
    }

    for set in sets {
        apply(&mut table, set)?;
    }

    loop {
        let error = match serde_path_to_error::deserialize(toml::Value::Table(table.clone())) {
            Ok(config) => return left_out(config, sets),
            Err(error) => error,
        };

        let (path, message) = (error.path().to_string(), error.inner().message());
        if !sets.iter().any(|set| written_otherwise(&mut table, set, &path, message)) {
            return Err(describe(&path, message));
        }
    }
}

/// Refuses none for a key that has taken its default instead.
fn left_out(config: Config, sets: &[String]) -> Result<Config> {
    let written =
        toml::Value::try_from(&config).map_err(|error| Error::Internal(error.to_string()))?;
    let value =
        |key: &str| key.split('.').try_fold(&written, |value, part| value.get(part)).cloned();
    let off = |value: &toml::Value| value.as_str() == Some(NONE);

    for (key, _) in
        sets.iter().filter_map(|set| pair(set).ok()).filter(|(_, text)| text.trim() == NONE)
    {
        if value(key).is_some_and(|value| !off(&value)) {
            return Err(Error::config(key, NONE, "it cannot be turned off; write a value"));
        }
    }

    Ok(config)
}

/// Puts one `key=value` into the table. The value is TOML; what is not TOML is taken as a string.
fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let (key, value) = pair(set)?;
    let value = match format!("v = {value}").parse::<toml::Table>() {
        Ok(mut parsed) => parsed.remove("v").ok_or_else(|| wrong_set(set, "write key=value"))?,
        Err(_) => toml::Value::String(value.to_owned()),
    };
    *entry(table, set, key)? = value;
    Ok(())
}

/// Key and value of a `--set`.
fn pair(set: &str) -> Result<(&str, &str)> {
    let (key, value) = set
        .split_once('=')
        .ok_or_else(|| wrong_set(set, "write key=value, as in model.d_model=256"))?;
    Ok((key.trim(), value))
}

fn wrong_set(set: &str, remedy: &str) -> Error {
    Error::config("--set", format!("`{set}`"), remedy)
}

/// Where a key stands, or will stand.
fn entry<'a>(table: &'a mut toml::Table, set: &str, key: &str) -> Result<&'a mut toml::Value> {
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts
        .pop()
        .filter(|last| !last.is_empty())
        .ok_or_else(|| wrong_set(set, "the key is missing"))?;
    if parts.len() > DEPTH {
        return Err(wrong_set(set, "sections do not go so deep"));
    }

    let mut inner = table;
    for part in parts {
        let entry = inner.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        inner = entry
            .as_table_mut()
            .ok_or_else(|| wrong_set(set, &format!("`{part}` is not a section")))?;
    }

    Ok(inner.entry(last).or_insert(toml::Value::Boolean(false)))
}

/// Takes the value of a `--set` as what its key wants, where that can be told: a word in digits, as
/// in name=7; a number as TOML does not write it, as in optimizer.lr=.001; or none, where the key
/// can be left out, as in eval=none. Whether it is another value now.
fn written_otherwise(table: &mut toml::Table, set: &str, path: &str, message: &str) -> bool {
    let Ok((key, text)) = pair(set) else { return false };
    let (path, message) = of_key(path, message);
    let Some((_, expected)) = message.split_once(", expected ").filter(|_| key == path) else {
        return false;
    };

    if text.trim() == NONE {
        return remove(table, key);
    }

    let other = match expected {
        "a string" | "path string" => Some(toml::Value::String(text.to_owned())),
        "f64" => text.trim().parse().ok().map(toml::Value::Float),
        _ => None,
    };

    match (other, entry(table, set, key)) {
        (Some(other), Ok(value)) if *value != other => {
            *value = other;
            true
        }
        _ => false,
    }
}

/// Takes a key out; whether it stood there.
fn remove(table: &mut toml::Table, key: &str) -> bool {
    let (section, last) =
        key.rsplit_once('.').map_or((None, key), |(section, last)| (Some(section), last));
    let mut parts = section.into_iter().flat_map(|section| section.split('.'));
    let inner = parts.try_fold(table, |inner, part| inner.get_mut(part)?.as_table_mut());
    inner.is_some_and(|inner| inner.remove(last).is_some())
}

/// A section with several owners tells which of its keys a message is about.
fn of_key<'a>(path: &str, message: &'a str) -> (String, &'a str) {
    let message = message.trim();
    match message.strip_prefix("key `").and_then(|rest| rest.split_once("`: ")) {
        Some((key, message)) => (format!("{path}.{key}"), message.trim()),
        None => (path.to_owned(), message),
    }
}

/// Turns serde's message into setting, value and remedy.
fn describe(path: &str, message: &str) -> Error {
    let (path, message) = of_key(path, message);
    let path = path.as_str();
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (key, expected) = rest.split_once("`, expected ").unwrap_or((rest, "another key"));
        let section = path.strip_suffix(key).unwrap_or(path).trim_matches('.');
        let setting = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        return Error::config(setting, "an unknown key", format!("expected {expected}"));
    }

    match message.split_once(", expected ") {
        Some((found, "usize" | "u64")) => {
            // What TOML does not hold as a number has been taken for a word.
            let digits = found.split('"').nth(1).is_some_and(|text| text.parse::<u128>().is_ok());
            let most =
                if digits { format!(", at most {}", i64::MAX) } else { ", 0 or more".to_owned() };
            Error::config(path, found, format!("expected a whole number{most}"))
        }

        Some((found, expected)) if expected.starts_with("struct ") => {
            let more = if path == "grid" { "give --grid, as in --grid 2x2, or " } else { "" };
            Error::config(
                path,
                found,
                format!("a section: {more}set its keys, as in `{path}.KEY=VALUE`"),
            )
        }
        Some((found, "f64")) => Error::config(path, found, "expected a number"),
        Some((found, expected)) => Error::config(path, found, format!("expected {expected}")),
        None => Error::config(path, "a value that does not fit", message),
    }
}
