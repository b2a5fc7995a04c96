//! `ouroboros bench` and `init`: what is measured, what is refused, what is left.

use std::process::Command;

use crate::harness::{Finished, Folder, mpirun, ouroboros, run, slices};

const LIMIT: u64 = 60;

/// `bench` over the tiny config into `out`.
fn bench(folder: &Folder, sets: &[&str], more: &[&str]) -> Vec<String> {
    let mut args = folder.train("out", sets, more);
    args[0] = "bench".into();
    args
}

fn result(folder: &Folder) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(folder.path("out/bench.json")).unwrap()).unwrap()
}

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn every_moment_of_a_measured_run_is_told() {
    let folder = Folder::new();
    let sets = ["microbatches=2", "sync_steps=500", "eval.every=2"];
    let finished =
        run(mpirun(4, &slices(&bench(&folder, &sets, &["--grid", "2x2"]))), LIMIT).expect_code(0);
    for word in [
        "compute",
        "upstream",
        "downstream",
        "reduce",
        "schedule predicts",
        "tokens/s",
        "stage 1, replica 1",
    ] {
        assert!(finished.stdout.contains(word), "{word}{finished}");
    }
    let result = result(&folder);
    let devices = result["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 4, "{finished}");
    for device in devices {
        let shares: f64 =
            device["shares"].as_array().unwrap().iter().map(|share| number(&share[1])).sum();
        assert!((shares - 1.0).abs() < 1e-6, "{device}");
    }
    assert!(number(&result["step_s"]) > 0.0 && number(&result["utilisation"]) < 1.0, "{result}");
    assert!(!folder.path("out/checkpoints").exists(), "{finished}");
}

/// Stages that sleep: the grid is as fast as its schedule allows, although one process computes nothing.
#[test]
fn emulated_compute_keeps_the_schedules_pace() {
    let folder = Folder::new();
    let sets = ["microbatches=4", "model.tie=none"];
    let args =
        bench(&folder, &sets, &["--grid", "4x1", "--emulated-compute", "20,40", "--steps", "10"]);
    let finished = run(mpirun(4, &slices(&args)), LIMIT).expect_code(0);
    let found = result(&folder);
    // A loaded test machine wakes sleepers late; stages that waited for each other would reach 1.
    assert!(number(&found["speed_up"]) > 2.0, "{found}{finished}");
    let profile = folder.path("profile.json");
    std::fs::rename(folder.path("out/bench.json"), &profile).unwrap();
    let profile = profile.to_str().unwrap();
    let args =
        bench(&folder, &sets, &["--grid", "4x1", "--emulated-compute", profile, "--steps", "10"]);
    run(ouroboros(&slices(&args)), LIMIT).expect_code(0);
    let again = result(&folder);
    let ratio =
        number(&again["stages"][1]["backward_ms"]) / number(&found["stages"][1]["backward_ms"]);
    assert!((0.8..2.0).contains(&ratio), "{again}");
    let args = bench(&folder, &sets, &["--grid", "2x1", "--emulated-compute", profile]);
    let finished = run(ouroboros(&slices(&args)), LIMIT).expect_code(2);
    assert!(finished.stderr.contains("found a profile of 4 stages; the grid has 2"), "{finished}");
}

#[test]
fn a_measurement_that_cannot_be_made_is_told() {
    let folder = Folder::new();
    for (more, expected) in [
        (&["--steps", "3"][..], "`steps`: found 3; too few to measure; take"),
        (
            &["--emulated-compute", "10"][..],
            "`--emulated-compute`: found 10; write forward,backward",
        ),
        (
            &["--emulated-compute", "none.json"][..],
            "`--emulated-compute`: found none.json; cannot be read",
        ),
        (&["--set", "bucket_kib=0"][..], "`bucket_kib`: found 0; from 1 to 1048576 KiB"),
        (
            &["--set", "wire=f16"][..],
            "`wire`: found unknown variant `f16`; expected `f32` or `bf16`",
        ),
    ] {
        let finished = run(ouroboros(&slices(&bench(&folder, &[], more))), LIMIT).expect_code(2);
        assert!(finished.stderr.contains(expected), "{expected}{finished}");
        assert_eq!(finished.errors().len(), 1, "{finished}");
    }
}

/// Other programs can begin with the weights that a training begins with.
#[test]
fn initial_weights_can_be_had() {
    let folder = Folder::new();
    let mut args = folder.train("out", &["grid.stages=3"], &[]);
    args[0] = "init".into();
    run(ouroboros(&slices(&args)), LIMIT).expect_code(0);
    let untrained = run(ouroboros(&["eval", &folder.text("out")]), LIMIT).expect_code(0);
    let sets = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "grid.stages=3"];
    run(ouroboros(&slices(&folder.train("still", &sets, &[]))), LIMIT).expect_code(0);
    let still = run(ouroboros(&["eval", &folder.text("still")]), LIMIT).expect_code(0);
    let loss = |finished: &Finished| {
        finished.stdout.lines().find(|line| line.starts_with("loss")).map(str::to_owned)
    };
    assert!(loss(&untrained).is_some(), "{untrained}");
    assert_eq!(loss(&untrained), loss(&still), "{untrained}{still}");
}

/// 50 M parameters under a limit of 704 MiB a rank: refused at 1x1 whatever the batch, trained at 4x1.
#[test]
fn a_model_that_does_not_fit_one_place_trains_on_four() {
    let folder = Folder::new();
    let limited = |ranks: usize, more: &str| {
        let out = folder.text("out");
        let program = env!("CARGO_BIN_EXE_ouroboros");
        let train = format!(
            "ulimit -d 720896; exec {program} train configs/large.toml --out {out} --set steps=3 {more}"
        );
        let mut command = Command::new("mpirun");
        command.args(["-n", &ranks.to_string(), "--oversubscribe", "sh", "-c", &train]);
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        run(command, 180)
    };
    let finished = limited(1, "--grid 1x1 --set batch=1 --set microbatches=1").expect_code(2);
    assert!(finished.stderr.contains("MiB predicted for stage 0, replica 0"), "{finished}");
    assert!(finished.stderr.contains("left of the limit of data (ulimit -d)"), "{finished}");
    limited(4, "").expect_code(0);
}
