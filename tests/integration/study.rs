//! `ouroboros study` on a model that trains in milliseconds.

use std::fs;
use std::path::Path;

use ouroboros::study::Plan;

use crate::harness::{Finished, Folder, LIMIT, ouroboros, run};

const STUDY: &str = r#"
name = "tiny"
base = "tiny.toml"
set = ["steps=8", "grid.stages=3", "microbatches=2", "eval.every=100", "eval.tokens=80"]
rates = [1e-3, 1e-2]
seeds = [1, 2]
shares = [0.5, 1.0]
[[variant]]
name = "synchronous"
set = ["schedule=1f1b"]
[[variant]]
name = "delayed"
against = "synchronous"
[[variant]]
name = "predict and lead"
set = ["optimizer.predict=update", "optimizer.lead=one"]
against = "synchronous"
goal_tax = 100.0
"#;

fn study(folder: &Folder, text: &str, more: &[&str]) -> Finished {
    fs::write(folder.path("study.toml"), text).unwrap();
    let (file, out) = (folder.text("study.toml"), folder.text("out"));
    run(ouroboros(&[&["study", &file, "--out", &out], more].concat()), LIMIT)
}

fn findings(folder: &Folder) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(folder.path("out/tiny.json")).unwrap()).unwrap()
}

#[test]
fn variants_are_compared_at_their_best_rates_over_paired_seeds() {
    let folder = Folder::new();
    let finished = study(&folder, STUDY, &["--check"]).expect_code(0);
    // Searched: three variants at two rates; then one more seed each, and half of the steps of the reference.
    let made = |finished: &Finished| finished.stdout.lines().filter(|line| line.contains("-seed")).count();
    assert_eq!(made(&finished), 3 * 2 + 3 + 2, "{finished}");
    assert!(
        finished.stdout.contains("tiny: 11 runs of ") || finished.stdout.contains("tiny: 10 runs of "),
        "{finished}"
    );

    let first = findings(&folder);
    let variants = first["variants"].as_array().unwrap();
    let names: Vec<&str> = variants.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["synchronous", "delayed", "predict and lead"]);
    assert_eq!(variants[0]["delays"], serde_json::json!([0, 0, 0]));
    assert_eq!(variants[1]["delays"], serde_json::json!([1, 1, 0]));
    assert_eq!((&variants[2]["predict"], &variants[2]["lead"]), (&"update".into(), &"one".into()));
    for row in variants {
        let losses: Vec<f64> = row["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
        assert!(losses.len() == 2 && losses.iter().all(|loss| (1.0..6.0).contains(loss)), "{losses:?}");
        assert!((row["loss"]["mean"].as_f64().unwrap() - (losses[0] + losses[1]) / 2.0).abs() < 1e-12);
    }
    let pair = |row: &serde_json::Value, i: usize| row["losses"][i].as_f64().unwrap();
    let difference =
        (pair(&variants[1], 0) - pair(&variants[0], 0) + pair(&variants[1], 1) - pair(&variants[0], 1)) / 2.0;
    assert!((variants[1]["difference"]["mean"].as_f64().unwrap() - difference).abs() < 1e-12);
    assert!(variants[1]["tax"]["mean"].as_f64().unwrap() > 0.0);
    // Of two rates, each is at an edge; a tax below or above those of the reference's own runs is marked as a guess.
    let table = fs::read_to_string(folder.path("out/tiny.md")).unwrap();
    assert!(variants.iter().all(|row| row["rate_at_edge"] == true) && table.contains("\n*: the lowest"), "{table}");
    let measured = 1.0..=2.0;
    let tax = variants[1]["tax_of_best"]["mean"].as_f64().unwrap();
    assert_eq!(variants[1]["tax_of_best"]["extrapolated"], !measured.contains(&tax), "{table}");
    assert!(fs::read_to_string(folder.path("out/tiny.md")).unwrap().contains("| predict and lead | 3x1 | 1,1,0 |"));

    // What is made stays made; a run that is missing is made again, with the same result.
    let gone = fs::read_dir(folder.path("out/runs")).unwrap().flatten();
    let gone = gone.map(|entry| entry.path()).find(|path| path.to_str().unwrap().contains("delayed")).unwrap();
    fs::remove_dir_all(gone).unwrap();
    let again = study(&folder, STUDY, &[]).expect_code(0);
    assert_eq!(made(&again), 1, "{again}");
    assert_eq!(findings(&folder), first);

    // A goal that is missed; and a folder of another study.
    let strict = STUDY.replace("goal_tax = 100.0", "goal_tax = 0.001");
    let refused = study(&folder, &strict, &["--check"]).expect_code(2);
    assert!(refused.errors()[0].contains("holds the runs of another study"), "{refused}");
    fs::remove_file(folder.path("out/study.toml")).unwrap();
    let missed = study(&folder, &strict, &["--check"]).expect_code(1);
    assert!(missed.stdout.contains("missed: predict and lead: a token tax of "), "{missed}");
    study(&folder, &strict, &[]).expect_code(0);
}

#[test]
fn a_study_that_compares_nothing_is_refused() {
    let table = [
        ("seeds = [1, 2]", "seeds = []", "`seeds`: found an empty list"),
        ("rates = ", "rate = ", "`STUDY`"),
        ("base = \"tiny.toml\"", "base = \"none.toml\"", "none.toml; cannot be read"),
        (
            "against = \"synchronous\"\n[[",
            "against = \"synchron\"\n[[",
            "`variant.delayed.against`: found no reference",
        ),
        ("\"schedule=1f1b\"", "\"schedule=1f1b\", \"steps=9\"", "found another steps than variant synchronous"),
        ("\"schedule=1f1b\"", "\"schedule=1f2b\"", "unknown variant `1f2b`"),
        ("name = \"delayed\"", "name = \"synchronous\"", "found twice"),
        (", \"eval.every=100\", \"eval.tokens=80\"", "", "`eval`: found none"),
    ];
    for (from, to, expected) in table {
        let folder = Folder::new();
        assert!(STUDY.contains(from), "{from}");
        let finished = study(&folder, &STUDY.replace(from, to), &[]).expect_code(2);
        assert!(finished.errors().len() == 1 && finished.errors()[0].contains(expected), "{expected}{finished}");
    }

    let folder = Folder::new();
    let finished = study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e-3, -1.0]"), &[]).expect_code(2);
    assert!(finished.stderr.contains("lr-1") && finished.stderr.contains("`optimizer.lr`: found -1"), "{finished}");
}

#[test]
fn a_rate_that_diverges_is_no_candidate() {
    let folder = Folder::new();
    let finished = study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e30, 1e-3]"), &[]).expect_code(0);
    assert!(finished.stdout.lines().filter(|line| line.contains(" diverged ")).count() == 3, "{finished}");
    for row in findings(&folder)["variants"].as_array().unwrap() {
        assert_eq!(row["rate"].as_f64(), Some(1e-3), "{row}");
    }

    let folder = Folder::new();
    let finished = study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e30]"), &[]).expect_code(2);
    assert!(finished.errors()[0].contains("`variant.synchronous`: found a loss that diverges"), "{finished}");
}

#[test]
fn shipped_studies_are_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("studies");
    let paths: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!paths.is_empty());

    for path in paths {
        let plan = Plan::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(plan.variants().any(|variant| variant.goal_tax.is_some()), "{}", path.display());
    }
}
