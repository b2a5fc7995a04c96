//! `ouroboros config`: every key of a config with its type, its default and what it means, from the
//! documentation of the source.

use std::fmt::Write;

use schemars::{JsonSchema, schema_for};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::config::{CheckpointConfig, Config, EvalConfig, GridConfig, StalenessConfig};
use crate::data::DataConfig;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::optim::{Common, OptimizerConfig, OptimizerKind};

/// Prints the page.
///
/// # Errors
/// If the documentation of a key is missing: a fault of the program.
pub fn config() -> Result<()> {
    put!("{}", page()?);
    Ok(())
}

const HEAD: &str = "\
# Configuration

A config is TOML and holds what differs from the defaults; `--set KEY=VALUE` overrides any key (`--set model.d_model=256`), `--set KEY=none`
takes one out. This page is what `ouroboros config` prints, from the documentation of the source. `-`: not there unless it is set.
";

fn page() -> Result<String> {
    let rule = |kind| of(&OptimizerConfig::of(Common { kind, ..Common::default() }));
    let (adamw, sgd) = (rule(OptimizerKind::Adamw)?, rule(OptimizerKind::Sgd)?);
    let (muon, soap) = (rule(OptimizerKind::Muon)?, rule(OptimizerKind::Soap)?);

    let mut page = HEAD.to_owned();
    section::<Config>(&mut page, "The run", &of(&Config::default())?)?;
    section::<GridConfig>(&mut page, "`[grid]`", &of(&GridConfig::default())?)?;
    section::<ModelConfig>(&mut page, "`[model]`", &of(&ModelConfig::default())?)?;
    section::<DataConfig>(&mut page, "`[data]`", &of(&DataConfig::default())?)?;
    section::<Common>(&mut page, "`[optimizer]`, of every kind", &adamw)?;
    section::<crate::optim::AdamwKeys>(
        &mut page,
        "`[optimizer]`, `kind = \"adamw\"`, `\"muon\"` or `\"soap\"`",
        &adamw,
    )?;

    section::<crate::optim::MuonKeys>(&mut page, "`[optimizer]`, `kind = \"muon\"`", &muon)?;
    section::<crate::optim::SoapKeys>(&mut page, "`[optimizer]`, `kind = \"soap\"`", &soap)?;
    section::<crate::optim::SgdKeys>(&mut page, "`[optimizer]`, `kind = \"sgd\"`", &sgd)?;
    section::<EvalConfig>(&mut page, "`[eval]`", &of(&EvalConfig::default())?)?;
    section::<CheckpointConfig>(&mut page, "`[checkpoint]`", &of(&CheckpointConfig::default())?)?;
    section::<StalenessConfig>(&mut page, "`[staleness]`", &of(&StalenessConfig::default())?)?;
    Ok(page)
}

/// A struct as it is written.
fn of(value: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(value).map_err(|error| Error::Internal(error.to_string()))? {
        Value::Object(keys) => Ok(keys),
        other => Err(Error::Internal(format!("a section that is {other}"))),
    }
}

/// The table of a section's keys, those that are sections themselves left out.
fn section<T: JsonSchema>(
    page: &mut String,
    title: &str,
    defaults: &Map<String, Value>,
) -> Result<()> {
    let schema = schema_for!(T).to_value();
    let about = text(&schema).unwrap_or_default();
    let _ = write!(
        page,
        "\n## {title}\n\n{about}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    );

    let keys = schema["properties"].as_object().into_iter().flatten();
    for (key, property) in keys {
        let target = resolved(property, &schema);
        if target["properties"].is_object() {
            continue;
        }

        let meaning = text(property)
            .ok_or_else(|| Error::Internal(format!("the key {key} has no documentation")))?;
        let default =
            match (defaults.get(key).filter(|value| !value.is_null()), property["type"].as_str()) {
                (Some(value), _) => format!("`{value}`"),
                // Left out of what is written where it is off.
                (None, Some("boolean")) => "`false`".to_owned(),
                (None, Some("integer")) => "`0`".to_owned(),
                (None, _) => "-".to_owned(),
            };

        let values = values(target, &schema);
        let _ = writeln!(
            page,
            "| `{key}` | {} | {default} | {meaning}{values} |",
            kind(target, &schema)
        );
    }

    Ok(())
}

/// The documentation of a schema, on one line.
fn text(schema: &Value) -> Option<String> {
    let text = schema["description"].as_str()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|"))
}

/// What a key's schema refers to: of an optional key that of its value.
fn resolved<'a>(property: &'a Value, root: &'a Value) -> &'a Value {
    let null = |schema: &&Value| schema["type"] != "null";
    if let Some(schema) = property["anyOf"]
        .as_array()
        .filter(|all| all.len() == 2)
        .and_then(|all| all.iter().find(null))
        && property["anyOf"]
            .as_array()
            .is_some_and(|all| all.iter().any(|schema| schema["type"] == "null"))
    {
        return resolved(schema, root);
    }

    match property["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        Some(name) => resolved(&root["$defs"][name], root),
        None => property,
    }
}

/// The type of a key, as people say it.
fn kind(schema: &Value, root: &Value) -> String {
    let schema = resolved(schema, root);
    if let Some(alternatives) = schema["anyOf"].as_array() {
        let kinds: Vec<String> = alternatives.iter().map(|one| kind(one, root)).collect();
        return kinds.join(" or ");
    }

    let named = schema["oneOf"].as_array().into_iter().flatten();
    if named.clone().next().is_some() && named.clone().all(|one| one["properties"].is_object()) {
        return "table".to_owned();
    }

    if schema["enum"].is_array() || schema["oneOf"].is_array() || schema["const"].is_string() {
        let words: Vec<String> =
            variants(schema).into_iter().map(|(word, _)| format!("`\"{word}\"`")).collect();
        return words.join(", ");
    }

    let plain = match &schema["type"] {
        Value::Array(types) => {
            types.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or("")
        }
        other => other.as_str().unwrap_or(""),
    };

    match plain {
        "array" => format!("list of {}", kind(&schema["items"], root)),
        "boolean" => "true or false".to_owned(),
        other => other.to_owned(),
    }
}

/// The words that an enum has, each with its documentation.
fn variants(schema: &Value) -> Vec<(&str, Option<String>)> {
    let plain = schema["enum"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|word| Some((word.as_str()?, None)));
    let constant = schema["const"].as_str().map(|word| (word, None));
    let mut words: Vec<(&str, Option<String>)> = plain.chain(constant).collect();
    for one in schema["oneOf"].as_array().into_iter().flatten() {
        match one["const"].as_str() {
            Some(word) => words.push((word, text(one))),
            // A table, by its kind.
            None if one["properties"].is_object() => words
                .extend(one["properties"]["kind"]["const"].as_str().map(|word| (word, text(one)))),
            None => words.extend(variants(one)),
        }
    }
    words
}

/// What the words mean, where that is documented.
fn values(schema: &Value, root: &Value) -> String {
    let schema = resolved(schema, root);
    let told = variants(schema)
        .into_iter()
        .filter_map(|(word, meaning)| Some(format!(" `{word}`: {}", meaning?)));
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every key stands in the page, and the page in the repository is what the command prints.
    #[test]
    fn the_page_is_that_of_the_repository() {
        let page = page().unwrap();
        for key in [
            "`steps`",
            "`layers_per_stage`",
            "`soap_every`",
            "`held_out`",
            "`keep_last`",
            "`drain`",
            "`clip`",
        ] {
            assert!(page.contains(&format!("| {key} |")), "{key}");
        }
        let written = include_str!("../../docs/configuration.md");
        assert!(
            page == written,
            "docs/configuration.md is not what `ouroboros config` prints: ouroboros config > docs/configuration.md"
        );
    }
}
