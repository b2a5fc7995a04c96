//! `ouroboros study` on a model that trains in milliseconds.

use std::fs;
use std::path::Path;

use ouroboros::study::Plan;

use crate::harness::{Finished, Folder, LIMIT, ouroboros, run};

const STUDY: &str = r#"
name = "tiny"
base = "tiny.toml"
set = ["steps=8", "grid.stages=3", "microbatches=2", "eval.every=3", "eval.drain=false", "eval.tokens=80"]
rates = [1e-3, 1e-2]
seeds = [1, 2]
shares = [0.5, 1.0]
quoted = "said.md"
[time]
update = 1.5
[[variant]]
name = "synchronous"
set = ["schedule=1f1b"]
[[variant]]
name = "delayed"
update = 4.5
against = "synchronous"
[[variant]]
name = "predict and lead"
set = ["optimizer.predict=update", "optimizer.lead=one"]
against = "synchronous"
beside = "delayed"
goal_tax = 100.0
goal_speed_up = 0.01
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
    let finished = study(&folder, STUDY, &[]).expect_code(0);
    // Searched: three variants at two rates; then one more seed each, and half of the steps of the reference.
    let made =
        |finished: &Finished| finished.stdout.lines().filter(|line| line.contains("-seed")).count();
    assert_eq!(made(&finished), 3 * 2 + 3 + 2, "{finished}");
    assert!(
        finished.stdout.contains("tiny: 11 runs of ")
            || finished.stdout.contains("tiny: 10 runs of "),
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
        let losses: Vec<f64> =
            row["losses"].as_array().unwrap().iter().map(|loss| loss.as_f64().unwrap()).collect();
        assert!(
            losses.len() == 2 && losses.iter().all(|loss| (1.0..6.0).contains(loss)),
            "{losses:?}"
        );
        assert!(
            (row["loss"]["mean"].as_f64().unwrap() - (losses[0] + losses[1]) / 2.0).abs() < 1e-12
        );
    }
    let pair = |row: &serde_json::Value, i: usize| row["losses"][i].as_f64().unwrap();
    let difference = (pair(&variants[1], 0) - pair(&variants[0], 0) + pair(&variants[1], 1)
        - pair(&variants[0], 1))
        / 2.0;
    assert!((variants[1]["difference"]["mean"].as_f64().unwrap() - difference).abs() < 1e-12);
    assert!(variants[1]["tax"]["mean"].as_f64().unwrap() > 0.0);
    // Of two rates, each is at an edge; a tax below or above those of the reference's own runs is marked as a guess.
    let table = fs::read_to_string(folder.path("out/tiny.md")).unwrap();
    assert!(
        variants.iter().all(|row| row["rate_at_edge"] == true) && table.contains("\n*: the lowest"),
        "{table}"
    );
    let measured = 1.0..=2.0;
    let tax = variants[1]["tax_of_best"]["mean"].as_f64().unwrap();
    assert_eq!(variants[1]["tax_of_best"]["extrapolated"], !measured.contains(&tax), "{table}");
    assert!(
        fs::read_to_string(folder.path("out/tiny.md"))
            .unwrap()
            .contains("| predict and lead | 3x1 | 1,1,0 |")
    );

    // Curves: evaluations on the way, which are no sync points, and at the end.
    for row in variants {
        let curve = row["curve"].as_array().unwrap();
        let tokens: Vec<u64> = curve.iter().map(|point| point[0].as_u64().unwrap()).collect();
        assert_eq!(tokens, [3, 6, 8].map(|steps| steps * 24 * 8), "{row}");
        assert!(
            (curve[2][1].as_f64().unwrap() - row["loss"]["mean"].as_f64().unwrap()).abs() < 1e-12,
            "{row}"
        );
    }
    let picture = fs::read_to_string(folder.path("out/tiny.svg")).unwrap();
    assert!(
        picture.starts_with("<svg")
            && picture.matches("<polyline").count() >= 3
            && picture.contains("predict and lead")
    );

    // 24 rows on three stages: two microbatches of twelve, 3 a row; 1F1B is best with rows one by one.
    let time = |row: usize, key: &str| variants[row]["times"][key].clone();
    assert_eq!((time(2, "step"), time(2, "one_device")), (73.5.into(), 220.5.into()));
    assert_eq!(time(2, "one_f_one_b"), serde_json::json!([79.5, 24]));
    // With updates of its own; the reference has the study's.
    assert_eq!((time(1, "step"), time(1, "one_device")), (76.5.into(), 229.5.into()));
    let (tax, speed_up) = (&variants[1]["tax"]["mean"], &variants[1]["speed_up"]);
    let expected = 79.5 / 76.5 / tax.as_f64().unwrap();
    assert!((speed_up["over_1f1b"].as_f64().unwrap() - expected).abs() < 1e-9, "{speed_up}");
    let beside = &variants[2]["beside"];
    let difference = variants[2]["loss"]["mean"].as_f64().unwrap()
        - variants[1]["loss"]["mean"].as_f64().unwrap();
    assert_eq!(beside[0], "delayed");
    assert!((beside[1]["mean"].as_f64().unwrap() - difference).abs() < 1e-12, "{beside}");
    assert!(table.contains("\npredict and lead less delayed: "), "{table}");

    // What is made stays made; a run that is missing is made again, with the same result.
    let gone = fs::read_dir(folder.path("out/runs")).unwrap().flatten();
    let gone = gone
        .map(|entry| entry.path())
        .find(|path| path.to_str().unwrap().contains("delayed"))
        .unwrap();
    fs::remove_dir_all(gone).unwrap();
    let again = study(&folder, STUDY, &[]).expect_code(0);
    assert_eq!(made(&again), 1, "{again}");
    assert_eq!(findings(&folder), first);

    // A folder of another study; goals are no part of what its runs are.
    let refused = study(&folder, &STUDY.replace("optimizer.lead=one", "optimizer.lead=delay"), &[])
        .expect_code(2);
    assert!(refused.errors()[0].contains("holds runs of another `predict and lead`"), "{refused}");
    let config = fs::read_to_string(folder.path("tiny.toml")).unwrap();
    fs::write(folder.path("tiny.toml"), config.replace("heads = 2", "heads = 4")).unwrap();
    let refused = study(&folder, STUDY, &[]).expect_code(2);
    assert!(refused.errors()[0].contains("holds runs of another `synchronous`"), "{refused}");
    fs::write(folder.path("tiny.toml"), config).unwrap();

    // More rates are the same study: what is made stays made.
    let more =
        study(&folder, &STUDY.replace("[1e-3, 1e-2]", "[1e-3, 3e-3, 1e-2]"), &[]).expect_code(0);
    assert!((3..=8).contains(&made(&more)), "{more}");
}

#[test]
fn goals_and_quotes_are_checked() {
    let folder = Folder::new();
    let begun = study(&folder, STUDY, &["--check"]).expect_code(2);
    assert!(begun.errors()[0].contains("`quoted`") && !folder.path("out").exists(), "{begun}");
    study(&folder, STUDY, &[]).expect_code(0);
    let table = fs::read_to_string(folder.path("out/tiny.md")).unwrap();

    let say = |text: &str| fs::write(folder.path("said.md"), text).unwrap();
    let quote = format!("some words\n<!-- study tiny -->\n{table}<!-- end -->\n");
    say(&quote);
    study(&folder, STUDY, &["--check"]).expect_code(0);
    for (from, to, expected) in [
        ("goal_tax = 100.0", "goal_tax = 0.001", "missed: predict and lead: a token tax of "),
        (
            "goal_speed_up = 0.01",
            "goal_speed_up = 99.0",
            "missed: predict and lead: a speed-up over 1F1B of ",
        ),
    ] {
        let strict = STUDY.replace(from, to);
        let missed = study(&folder, &strict, &["--check"]).expect_code(1);
        assert!(missed.stdout.contains(expected), "{missed}");
        study(&folder, &strict, &[]).expect_code(0);
    }

    // A document that says something else, or nothing.
    let loss = &findings(&folder)["variants"][1]["loss"];
    let (loss, half) = (loss["mean"].as_f64().unwrap(), loss["half_interval"].as_f64().unwrap());
    for said in [format!("{:.4}", loss + half + 0.02), "-".to_owned()] {
        say(&quote.replace(&format!("| {loss:.4} ± "), &format!("| {said} ± ")));
        let wrong = study(&folder, STUDY, &["--check"]).expect_code(1);
        assert!(wrong.stdout.contains("missed: delayed: a loss of "), "{wrong}");
        assert!(wrong.stdout.contains(&format!("`{said} ± ")), "{wrong}");
    }
    say("");
    let absent = study(&folder, STUDY, &["--check"]).expect_code(2);
    assert!(
        absent.errors()[0].contains("`quoted`") && absent.errors()[0].contains("no table between"),
        "{absent}"
    );
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
        (
            "\"schedule=1f1b\"",
            "\"schedule=1f1b\", \"steps=9\"",
            "found another steps than variant synchronous",
        ),
        ("\"schedule=1f1b\"", "\"schedule=1f2b\"", "unknown variant `1f2b`"),
        ("name = \"delayed\"", "name = \"synchronous\"", "found twice"),
        (", \"eval.every=3\", \"eval.drain=false\", \"eval.tokens=80\"", "", "`eval`: found none"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "`seeds`: found 1 twice"),
        ("rates = [1e-3, 1e-2]", "rates = [1e-3, 1e-3]", "`rates`: found 0.001 twice"),
        ("shares = [0.5, 1.0]", "shares = [0.5, 0.5]", "`shares`: found 0.5 twice"),
        (
            "beside = \"delayed\"",
            "rates = []",
            "`variant.predict and lead.rates`: found an empty list",
        ),
        (
            "update = 4.5\nagainst = \"synchronous\"",
            "update = 4.5",
            "`variant.delayed.against`: found none, and delays [1, 1, 0]",
        ),
        ("update = 1.5", "update = -1.5", "`time.update`: found -1.5"),
        ("beside = \"delayed\"", "update = -1.0", "`variant.predict and lead.update`: found -1"),
        ("update = 1.5", "profile = \"none.json\"", "none.json; cannot be read"),
        (
            "update = 1.5",
            "rows = 7",
            "`time.rows`: found 7; must be a multiple of microbatches = 2",
        ),
        (
            "beside = \"delayed\"",
            "beside = \"nobody\"",
            "`variant.predict and lead.beside`: found nobody",
        ),
        (
            "beside = \"delayed\"",
            "goal_not_worse = true",
            "than what? name another variant in `beside`",
        ),
        (
            "\"schedule=1f1b\"]",
            "\"schedule=1f1b\"]\ngoal_tax = 2.0",
            "`variant.synchronous.against`: found none, and a goal",
        ),
    ];
    for (from, to, expected) in table {
        let folder = Folder::new();
        assert!(STUDY.contains(from), "{from}");
        let finished = study(&folder, &STUDY.replace(from, to), &[]).expect_code(2);
        assert!(
            finished.errors().len() == 1 && finished.errors()[0].contains(expected),
            "{expected}{finished}"
        );
        assert!(!folder.path("out").exists(), "runs before {expected}");
    }

    let folder = Folder::new();
    let finished =
        study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e-3, -1.0]"), &[])
            .expect_code(2);
    assert!(
        finished.stderr.contains("lr-1") && finished.stderr.contains("`optimizer.lr`: found -1"),
        "{finished}"
    );
}

#[test]
fn a_rate_that_diverges_is_no_candidate() {
    let folder = Folder::new();
    let finished =
        study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e30, 1e-3]"), &[])
            .expect_code(0);
    assert!(
        finished.stdout.lines().filter(|line| line.contains(" diverged ")).count() == 3,
        "{finished}"
    );
    for row in findings(&folder)["variants"].as_array().unwrap() {
        assert_eq!(row["rate"].as_f64(), Some(1e-3), "{row}");
    }

    let folder = Folder::new();
    let finished = study(&folder, &STUDY.replace("rates = [1e-3, 1e-2]", "rates = [1e30]"), &[])
        .expect_code(2);
    assert!(
        finished.errors()[0].contains("`variant.synchronous`: found a loss that diverges"),
        "{finished}"
    );
}

/// Whoever kills a study kills its runs, and the study goes on with the same result.
#[test]
fn a_killed_study_leaves_nothing_behind_and_goes_on() {
    let whole = Folder::new();
    study(&whole, STUDY, &[]).expect_code(0);

    let folder = Folder::new();
    fs::write(folder.path("study.toml"), STUDY).unwrap();
    let (file, out) = (folder.text("study.toml"), folder.text("out"));
    let mut begun = ouroboros(&["study", &file, "--out", &out])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let children = || {
        let of = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("cmdline")).ok();
        let lines = fs::read_dir("/proc").unwrap().flatten().filter_map(of);
        lines.filter(|line| line.contains("--dies-with-parent") && line.contains(&out)).count()
    };
    let until = |what: &str, good: &dyn Fn() -> bool| {
        let begun = std::time::Instant::now();
        while !good() {
            assert!(begun.elapsed().as_secs() < LIMIT, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    };
    let complete =
        || fs::read_dir(folder.path("out/runs")).map_or(0, |runs| runs.flatten().count());
    until("no run begins", &|| children() > 0 && complete() > 3);
    begun.kill().unwrap();
    begun.wait().unwrap();
    until("runs outlive their study", &|| children() == 0);

    study(&folder, STUDY, &[]).expect_code(0);
    assert_eq!(findings(&folder), findings(&whole));
}

/// The studies that are shipped, each in a few steps of a model that trains in milliseconds, on a text that is here.
#[test]
fn shipped_studies_run_in_a_short_form() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths: Vec<_> =
        fs::read_dir(root.join("studies")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert_eq!(paths.len(), 9);

    for path in paths {
        let plan = Plan::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if let Some(document) = &plan.quoted {
            let text = fs::read_to_string(plan.folder.join(document)).unwrap();
            let quoted = text.split_once(&format!("<!-- study {} -->", plan.name)).unwrap().1;
            let rows = quoted
                .split_once("<!-- end -->")
                .unwrap()
                .0
                .lines()
                .filter(|line| line.starts_with("| "))
                .count();
            assert_eq!(rows, 1 + plan.variants().count(), "{}", plan.name);
        }

        let mut short: toml::Table = toml::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let base = path.parent().unwrap().join(short["base"].as_str().unwrap());
        short.insert("base".into(), base.to_str().unwrap().into());
        short.insert("seeds".into(), toml::Value::try_from([1, 2]).unwrap());
        short.insert("shares".into(), toml::Value::try_from([0.5, 1.0]).unwrap());
        short.remove("quoted");
        let text = format!("data.path={}", root.join("tests/data/declaration.txt").display());
        let sets = short["set"].as_array_mut().unwrap();
        for set in [
            "steps=6",
            "optimizer.warmup=2",
            "model.d_model=16",
            "model.heads=2",
            "model.d_ff=32",
            "data.sequence=16",
            &text,
            "data.held_out=0.3",
            "eval.every=4",
            "eval.tokens=200",
        ] {
            sets.push(set.into());
        }

        let folder = Folder::new();
        let finished = study(&folder, &toml::to_string(&short).unwrap(), &[]).expect_code(0);
        let name = plan.name.as_str();
        let found = fs::read_to_string(folder.path("out").join(format!("{name}.json"))).unwrap();
        let found: serde_json::Value = serde_json::from_str(&found).unwrap();
        let rows = found["variants"].as_array().unwrap();
        assert_eq!(rows.len(), plan.variants().count(), "{finished}");
        for (row, variant) in rows.iter().zip(plan.variants()) {
            assert_eq!(row["name"], variant.name.as_str());
            let late =
                row["delays"].as_array().unwrap().iter().any(|delay| delay.as_u64() != Some(0));
            assert!(
                !late || !variant.is_reference(),
                "{} is a reference with delays",
                variant.name
            );
            assert!(row["loss"]["mean"].as_f64().unwrap() > 0.0, "{row}");
        }
        let goals =
            plan.variants().any(|variant| variant.goal_tax.is_some() || variant.goal_not_worse);
        assert!(goals || name == "k11", "{name}");
    }
}
