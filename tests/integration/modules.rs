//! The order of the modules in `src/lib.rs`, which is that of dependence: a file uses only what stands above it.

use std::fs;
use std::path::{Path, PathBuf};

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path)
}

/// The modules of the library, in their order.
fn declared() -> Vec<String> {
    let text = fs::read_to_string(source("lib.rs")).unwrap();
    let name = |line: &str| {
        let rest = ["pub mod ", "pub(crate) mod ", "mod "]
            .iter()
            .find_map(|start| line.strip_prefix(start))?;
        Some(rest.strip_suffix(';')?.to_owned())
    };
    text.lines().filter_map(name).collect()
}

/// The files of a module.
fn files(module: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (vec![source(&format!("{module}.rs"))], vec![source(module)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.retain(|file| file.extension().is_some_and(|ending| ending == "rs") && file.exists());
    assert!(!found.is_empty(), "no files of {module}");
    found
}

/// The modules that a text names as `crate::a` or in `crate::{a, b::{c}}`.
fn used(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, start) in text.match_indices("crate::") {
        let rest = &text[at + start.len()..];
        let name = |text: &str| -> String {
            text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
        };
        let Some(group) = rest.strip_prefix('{') else {
            found.push(name(rest));
            continue;
        };
        let mut depth = 1;
        found.push(name(group));
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => found.push(name(&group[i + 1..])),
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// What uses a module that stands below it: of `modules` in their order, each with its texts.
fn violations(modules: &[(String, Vec<(String, String)>)]) -> Vec<String> {
    let mut found = Vec::new();
    for (i, (_, texts)) in modules.iter().enumerate() {
        let below: Vec<&String> = modules[i + 1..].iter().map(|(name, _)| name).collect();
        for (file, text) in texts {
            let wrong = used(text).into_iter().filter(|name| below.contains(&name));
            found
                .extend(wrong.map(|name| {
                    format!("{file} uses {name}, which stands below it in src/lib.rs")
                }));
        }
    }
    found
}

#[test]
fn a_module_uses_only_what_stands_above_it() {
    let texts = |module: &String| {
        let text = |file: PathBuf| (file.display().to_string(), fs::read_to_string(&file).unwrap());
        files(module).into_iter().map(text).collect()
    };
    let modules: Vec<_> =
        declared().into_iter().map(|module| (module.clone(), texts(&module))).collect();
    assert!(modules.len() > 30, "{modules:?}");
    let found = violations(&modules);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_violation_would_be_seen() {
    let file = |text: &str| vec![("file".to_owned(), text.to_owned())];
    let modules =
        |top: &str| [("top".to_owned(), file(top)), ("low".to_owned(), file("use crate::top;"))];
    for wrong in [
        "use crate::low::Thing;",
        "use crate::{top, low};",
        "use crate::{low::{A, B}};",
        "crate::low::f()",
    ] {
        assert_eq!(violations(&modules(wrong)).len(), 1, "{wrong}");
    }
    for right in ["use crate::lowly;", "use crate::{top::{low, B}};", "use super::low;"] {
        assert!(violations(&modules(right)).is_empty(), "{right}");
    }
}

#[test]
fn every_module_is_in_the_map() {
    let text = fs::read_to_string(source("lib.rs")).unwrap();
    let map: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("//! ")).collect();
    // A row has one name or two, each before a gap.
    let named = |module: &String| {
        let starts = |cell: &str| cell.trim_start().split("  ").next() == Some(module.as_str());
        map.iter()
            .any(|row| starts(row) || row.split("  ").map(str::trim).any(|cell| cell == module))
    };
    let missing: Vec<String> = declared().into_iter().filter(|module| !named(module)).collect();
    assert!(missing.is_empty(), "not in the map of src/lib.rs: {missing:?}");
}
