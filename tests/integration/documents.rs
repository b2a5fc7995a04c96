//! The documents say what is so: commands parse, paths and links are there, configs load, and what is marked runs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Parser;
use ouroboros::cli::Cli;
use ouroboros::config::Config;

use crate::harness::{ouroboros, run};

/// All of them, each with its text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths: Vec<PathBuf> =
        ["README.md", "CONTRIBUTING.md", "benches/README.md", "scripts/slurm/README.md"]
            .into_iter()
            .map(PathBuf::from)
            .collect();
    let docs = std::fs::read_dir("docs").unwrap().flatten().map(|entry| entry.path());
    paths.extend(docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// The fenced blocks of a kind.
fn blocks<'a>(text: &'a str, kind: &str) -> Vec<&'a str> {
    let fence = format!("```{kind}\n");
    text.split(fence.as_str()).skip(1).filter_map(|rest| rest.split("```").next()).collect()
}

/// The lines of shell blocks that call the program: whether they are marked to run, and what is said to it.
fn calls(text: &str) -> Vec<(bool, Vec<String>)> {
    let lines = blocks(text, "sh").into_iter().flat_map(|block| block.lines());
    let mut found = Vec::new();
    for line in lines.filter(|line| !line.trim_start().starts_with('#')) {
        let (code, comment) = line.split_once(" #").unwrap_or((line, ""));
        let words: Vec<String> =
            code.split_whitespace().map(|word| word.trim_matches('"').to_owned()).collect();
        let is_program = |word: &String| {
            word == "ouroboros" || (word.ends_with("release/ouroboros") && !word.contains('='))
        };
        let image = ["docker", "apptainer", "kubectl"].iter().any(|tool| code.starts_with(tool));
        let found_at = words.iter().position(is_program).filter(|_| !image);
        let Some(at) = found_at else { continue };
        found.push((comment.trim().ends_with("runs"), words[at + 1..].to_vec()));
    }
    found
}

#[test]
fn every_command_parses() {
    let mut seen = 0;
    for (path, text) in documents() {
        for (_, words) in calls(&text) {
            let all = std::iter::once("ouroboros".to_owned()).chain(words.clone());
            if let Err(error) = Cli::try_parse_from(all) {
                panic!("{}: {words:?}: {error}", path.display());
            }
            seen += 1;
        }
    }
    assert!(seen >= 20, "{seen} commands");
}

#[test]
fn what_is_marked_runs() {
    let mut seen = 0;
    for (path, text) in documents() {
        for (_, words) in calls(&text).into_iter().filter(|(runs, _)| *runs) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            println!("{}: {words:?}", path.display());
            run(ouroboros(&words), 120).expect_code(0);
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen} commands");
}

#[test]
fn every_config_loads() {
    let mut seen = 0;
    for (path, text) in documents() {
        for block in blocks(&text, "toml") {
            Config::parse(block, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            seen += 1;
        }
    }
    assert!(seen >= 1);
}

/// A path in back quotes that begins with a folder of the repository.
#[test]
fn every_path_is_there() {
    let roots =
        ["src/", "docs/", "scripts/", "configs/", "studies/", "tests/", "benches/", "topology/"];
    let mut seen = BTreeSet::new();
    for (path, text) in documents() {
        let outside: String = text.split("```").step_by(2).collect();
        for quoted in outside.split('`').skip(1).step_by(2) {
            let named = quoted
                .split([' ', ':', '\n'])
                .find(|word| roots.iter().any(|root| word.starts_with(root)));
            let Some(named) =
                named.filter(|named| !named.contains(['*', '{']) && !named.contains("NAME"))
            else {
                continue;
            };
            assert!(Path::new(named).exists(), "{}: `{named}` is not there", path.display());
            seen.insert(named.to_owned());
        }
    }
    assert!(seen.len() > 40, "{}", seen.len());
}

/// The anchor of a heading, as sites make it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_holds() {
    let mut seen = 0;
    for (path, text) in documents() {
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.starts_with("http") {
                continue;
            }
            seen += 1;
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let linked =
                if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(linked.exists(), "{}: {target} leads nowhere", path.display());
            if heading.is_empty() {
                continue;
            }
            let text = std::fs::read_to_string(&linked).unwrap();
            let headings = text
                .lines()
                .filter(|line| line.starts_with('#'))
                .map(|line| line.trim_start_matches('#').trim());
            assert!(
                headings.map(anchor).any(|found| found == heading),
                "{}: {target} has no such heading",
                path.display()
            );
        }
    }
    assert!(seen > 20, "{seen} links");
}

/// Whoever searches for a message finds it: the page of messages has every kind of error.
#[test]
fn every_kind_of_error_is_on_the_page() {
    let page = std::fs::read_to_string("docs/troubleshooting.md").unwrap();
    let source = std::fs::read_to_string("src/error.rs").unwrap();
    let mut seen = 0;
    for text in source.split("#[error(").skip(1) {
        let text = text.split('"').nth(1).unwrap();
        // What comes before the first value, or between the first two.
        let fixed = text
            .split(['{', '}'])
            .step_by(2)
            .map(|part| part.trim_matches([' ', ':', ';', '`', ',']));
        let Some(fixed) = fixed
            .map(|part| part.split(['(', ';']).next().unwrap().trim())
            .find(|part| part.len() > 3)
        else {
            continue;
        };
        assert!(page.contains(fixed), "`{fixed}` stands nowhere in docs/troubleshooting.md");
        seen += 1;
    }
    assert!(seen >= 12, "{seen} kinds of errors");
}

#[test]
fn the_readme_is_short() {
    let text = std::fs::read_to_string("README.md").unwrap();
    assert!(text.lines().count() <= 180, "{} lines", text.lines().count());
}

/// The picture of schedules is what the program draws (`scripts/pictures.sh`).
#[test]
fn the_picture_is_the_programs() {
    let args = ["--grid", "4x1", "-m", "2", "--times", "1:2:0", "--steps", "6"];
    let drawn = run(ouroboros(&[&["schedule"][..], &args, &["--svg", "/dev/stdout"]].concat()), 60);
    let drawn = drawn.expect_code(0).stdout;
    assert!(
        std::fs::read_to_string("docs/schedules.svg").unwrap() == drawn,
        "run scripts/pictures.sh"
    );
}
