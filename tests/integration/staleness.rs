//! Measured staleness: what a grid measures is what the oracle does, bit for bit, and what the delays say.

use serde_json::Value;

use crate::harness::{Folder, LIMIT, Outcome, mpirun, ouroboros, run, slices};

/// The lines of measured staleness of a run.
fn lines(folder: &Folder, out: &str) -> Vec<(u64, Vec<Value>)> {
    let text = std::fs::read_to_string(folder.path(out).join("metrics.jsonl")).unwrap();
    let of = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        Some((line["step"].as_u64()?, line["staleness"].as_array()?.clone()))
    };
    text.lines().filter_map(of).collect()
}

const SETS: &[&str] = &["steps=24", "staleness.every=6", "model.tie=aligned", "eval.every=12"];

#[test]
fn a_grid_measures_what_the_oracle_does() {
    let folder = Folder::new();
    let grid = ["--grid", "3x2"];
    run(mpirun(6, &slices(&folder.train("ranks", SETS, &grid))), LIMIT).expect_code(0);
    run(ouroboros(&slices(&folder.train("threads", SETS, &grid))), LIMIT).expect_code(0);
    let oracle = [&grid[..], &["--oracle"]].concat();
    run(ouroboros(&slices(&folder.train("oracle", SETS, &oracle))), LIMIT).expect_code(0);
    let [ranks, threads, oracle] =
        ["ranks", "threads", "oracle"].map(|out| Outcome::read(&folder.path(out)));
    assert_eq!(ranks, oracle);
    assert_eq!(threads, oracle);

    // A distance at the steps that are measured, a cosine at the next ones.
    let found = lines(&folder, "ranks");
    let steps: Vec<u64> = found.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [5, 6, 11, 12, 17, 18, 23, 24]);
    // The delays, also before the evaluations, where the pipeline is drained.
    for (_, measured) in found.iter().step_by(2) {
        let ages: Vec<u64> = measured.iter().map(|of| of["age"].as_u64().unwrap()).collect();
        assert_eq!(ages, [2, 1, 0, 2]);
    }
    let (_, at_22) = &found[6];
    let stages: Vec<String> = at_22.iter().map(|of| of["stage"].to_string()).collect();
    assert_eq!(stages, ["0", "1", "2", "\"table\""]);
    for of in at_22 {
        let number = |key: &str| of[key].as_f64().unwrap_or_else(|| panic!("{key} of {of}"));
        let moved = number("distance");
        assert_eq!(number("age") > 0.0, moved > 0.0, "{of}");
        assert!(number("travelled") > 0.0 || moved == 0.0, "{of}");
        assert!(number("relative") < 1.0 && of["cosine"].is_null(), "{of}");
        let roles = of["roles"].as_object().unwrap();
        assert!(!roles.is_empty() && roles.values().all(|of| of.as_f64().unwrap() < 1.0), "{of}");
        // A table has no forward of its own.
        assert_eq!(of["seconds"].is_number(), of["stage"].is_number(), "{of}");
        assert!(of["fresh_cosine"].is_null(), "{of}");
    }
    let (_, at_23) = &found[7];
    assert!(
        at_23.iter().all(|of| of["cosine"].as_f64().unwrap().abs() <= 1.0 && of["age"].is_null())
    );

    // Under delays no gradient is the fresh one; they are much alike.
    let (_, of_oracle) = &lines(&folder, "oracle")[6];
    let fresh: Vec<f64> = of_oracle.iter().map(|of| of["fresh_cosine"].as_f64().unwrap()).collect();
    assert!(fresh.iter().all(|cosine| (0.2..=1.000_001).contains(cosine)), "{fresh:?}");
    assert!(fresh[0] < 0.999_999, "{fresh:?}");
}

#[test]
fn without_delays_every_gradient_is_fresh() {
    let folder = Folder::new();
    let sets = [SETS, &["schedule=1f1b", "staleness.every=2"]].concat();
    run(ouroboros(&slices(&folder.train("out", &sets, &["--grid", "2x1", "--oracle"]))), LIMIT)
        .expect_code(0);
    let measured: Vec<Value> = lines(&folder, "out")
        .into_iter()
        .flat_map(|(_, of)| of)
        .filter(|of| of["age"].is_number())
        .collect();
    assert!(measured.len() >= 3 * 12);
    for of in measured {
        assert_eq!((of["age"].as_u64(), of["distance"].as_f64()), (Some(0), Some(0.0)), "{of}");
        assert!((of["fresh_cosine"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{of}");
    }
}

#[test]
fn measured_steps_are_further_apart_than_delays() {
    let folder = Folder::new();
    for (sets, told) in [
        (["staleness.every=3"], "at least 4"),
        (["staleness.every=0"], "at least 1"),
        (["staleness.every=99999999999999999"], "beyond any machine"),
    ] {
        let args = folder.train("out", &sets, &["--grid", "3x1"]);
        let refused = run(ouroboros(&slices(&args)), LIMIT).expect_code(2);
        assert!(
            refused.stderr.contains("staleness.every") && refused.stderr.contains(told),
            "{refused}"
        );
    }
}

/// A run that goes on measures what one that was not stopped does, but for what it has forgotten.
#[test]
fn a_resumed_run_goes_on_to_measure() {
    let folder = Folder::new();
    let sets = [SETS, &["checkpoint.every=12", "optimizer.schedule=constant"]].concat();
    run(ouroboros(&slices(&folder.train("whole", &sets, &["--grid", "2x2"]))), LIMIT)
        .expect_code(0);
    let half = [&sets[..], &["steps=12"]].concat();
    run(ouroboros(&slices(&folder.train("out", &half, &["--grid", "2x2"]))), LIMIT).expect_code(0);
    run(ouroboros(&slices(&folder.train("out", &sets, &["--grid", "2x2", "--resume"]))), LIMIT)
        .expect_code(0);
    let timeless = |out: &str| {
        let mut found = lines(&folder, out);
        for of in found.iter_mut().flat_map(|(_, of)| of) {
            of.as_object_mut().unwrap().remove("seconds");
        }
        found
    };
    assert_eq!(timeless("out"), timeless("whole"));
}

/// Gradients that are no numbers, which a run passes over: the grid measures at the same steps and the same as the oracle.
#[test]
fn steps_that_are_passed_over_are_measured_alike() {
    let folder = Folder::new();
    let sets = [
        "optimizer.lr=3e38",
        "optimizer.clip=1e30",
        "on_nonfinite=skip",
        "steps=9",
        "staleness.every=4",
    ];
    for (out, more) in [("grid", &[][..]), ("oracle", &["--oracle"])] {
        let args = folder.train(out, &sets, &[&["--grid", "3x1"][..], more].concat());
        run(ouroboros(&slices(&args)), LIMIT).expect_code(0);
    }
    // Weights that are no numbers any more, in messages between ranks, too.
    let args = folder.train("ranks", &sets, &["--grid", "3x1"]);
    run(mpirun(3, &slices(&args)), LIMIT).expect_code(0);
    let [grid, ranks, oracle] =
        ["grid", "ranks", "oracle"].map(|out| Outcome::read(&folder.path(out)));
    assert!(grid.lines.iter().any(|line| line["loss"].is_null() && line["grad_norm"].is_array()));
    assert_eq!(grid, oracle);
    assert_eq!(ranks, oracle);
    assert!(lines(&folder, "grid").len() >= 2);
}
