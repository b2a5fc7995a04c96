//! What a user types and gets: commands, exit codes, messages that come once.

use ouroboros::config::Config;
use ouroboros::setup::Setup;

use crate::harness::{Finished, Folder, mpirun, ouroboros, run, slices};

const LIMIT: u64 = 60;

fn program(args: &[&str]) -> Finished {
    run(ouroboros(args), LIMIT)
}

#[test]
fn schedules_show_delays_and_speed_up() {
    for (args, expected) in [
        (&["--grid", "4x1", "-m", "1"][..], ["delays            3 2 1 0", "ideal speed-up    4.00 of 4"]),
        (
            &["--grid", "11x1", "-m", "8"][..],
            ["delays            2 2 1 1 1 1 1 1 1 1 0", "ideal speed-up    11.00 of 11"],
        ),
        (
            &["--schedule", "1f1b", "--grid", "4x1", "-m", "4"][..],
            ["delays            0 0 0 0", "ideal speed-up    2.29 of 4"],
        ),
        (
            &["--grid", "4x1", "--times", "1:2:0.3", "--slack", "2"][..],
            ["delays            6 4 2 0", "ideal speed-up    4.00 of 4"],
        ),
    ] {
        let finished = program(&[&["schedule"], args].concat()).expect_code(0);
        for line in expected {
            assert!(finished.stdout.contains(line), "{line}{finished}");
        }
    }
    program(&["schedule", "--grid", "4"]).expect_code(2);
    program(&["schedule", "--times", "1:2"]).expect_code(2);
    program(&["schedule", "-m", "0"]).expect_code(2);
}

#[test]
fn train_eval_and_generate() {
    let folder = Folder::new();
    let args = folder.train("out", &["eval.every=3", "steps=6"], &["--grid", "2x1"]);
    let finished = program(&slices(&args)).expect_code(0);
    assert!(finished.stdout.contains("entropy floor"), "{finished}");
    for file in ["config.toml", "metrics.jsonl", "log/rank-0.log", "checkpoints/step-6/manifest.json"] {
        assert!(folder.path("out").join(file).exists(), "{file}{finished}");
    }
    let last_eval = |text: &str| {
        let value: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        value["eval_loss"].as_f64().unwrap()
    };
    let metrics = std::fs::read_to_string(folder.path("out/metrics.jsonl")).unwrap();
    let out = folder.text("out");
    let finished = program(&["eval", &out]).expect_code(0);
    // The same held-out text in other batches: the same loss to the digits shown.
    assert!(finished.stdout.contains(&format!("loss            {:.4} nats", last_eval(&metrics))), "{finished}");
    let generate = |seed: &str| {
        program(&["generate", &out, "--prompt", "ban", "--tokens", "40", "--seed", seed]).expect_code(0).stdout
    };
    assert!(generate("1").starts_with("ban"));
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));
    program(&["eval", &out, "--set", "data.sequence=9"]).expect_code(2);
    program(&["eval", &folder.text("nothing")]).expect_code(6);
    std::fs::write(folder.path("out/checkpoints/step-6/stage-1.safetensors"), b"short").unwrap();
    let finished = program(&["eval", &out]).expect_code(6);
    assert!(finished.stderr.contains("stage-1.safetensors: 5 bytes instead of"), "{finished}");
}

#[test]
fn doctor_tells_what_is_here() {
    let finished = program(&["doctor"]).expect_code(0);
    for word in ["libtorch    2.11.0", "MPI library", "mpirun", "cores"] {
        assert!(finished.stdout.contains(word), "{word}{finished}");
    }
    let finished = run(mpirun(3, &["doctor"]), LIMIT).expect_code(0);
    assert!(finished.stdout.contains("ranks       3") && finished.stdout.contains("rank 2"), "{finished}");
    assert_eq!(finished.stdout.matches("MPI library").count(), 1, "{finished}");
}

/// Every bad input: exit code, one message that names the setting, whatever the number of ranks.
#[test]
fn bad_input_is_told_once_before_training() {
    let folder = Folder::new();
    std::fs::write(folder.path("empty.txt"), b"").unwrap();
    std::fs::write(folder.path("short.txt"), b"short").unwrap();
    let (missing, empty, short) = (folder.text("missing.txt"), folder.text("empty.txt"), folder.text("short.txt"));
    let held = |path: &str| format!("data.held_out={path}");
    let table: Vec<(Vec<String>, i32, &str)> = vec![
        (vec!["modle.layers=3".into()], 2, "`modle`: found an unknown key"),
        (vec!["steps=ten".into()], 2, "`steps`: found invalid type: string \"ten\"; expected a whole number"),
        (vec!["grid.stages=7".into()], 2, "`grid.stages`: found 7; at most model.layers = 6"),
        (vec!["batch=13".into(), "microbatches=2".into()], 2, "`batch`: found 13; must be a multiple"),
        (
            vec!["grid.stages=3".into(), "grid.delays=[1, 1, 0]".into()],
            2,
            "`grid.delays`: found [1, 1, 0]; stage 0 needs at least 2",
        ),
        (vec![held(&missing)], 3, "missing.txt: cannot be opened"),
        (vec![held(&empty)], 3, "empty.txt: empty"),
        (vec![held(&short)], 3, "short.txt: 5 bytes, one window needs 9"),
    ];
    for (sets, code, expected) in &table {
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let args = folder.train("out", &sets, &[]);
        let finished = program(&slices(&args)).expect_code(*code);
        assert!(finished.stderr.contains(expected), "{expected}{finished}");
        assert_eq!(finished.errors().len(), 1, "{finished}");
        assert!(!folder.path("out").exists(), "{sets:?} left a folder{finished}");
    }
    for (sets, code, expected) in [&table[0], &table[5]] {
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let args = folder.train("out", &sets, &["--grid", "2x1"]);
        let finished = run(mpirun(2, &slices(&args)), LIMIT).expect_code(*code);
        assert!(finished.stderr.contains(expected), "{expected}{finished}");
        assert_eq!(finished.errors().len(), 1, "{finished}");
    }
}

#[test]
fn a_world_of_another_size_is_refused_once() {
    let folder = Folder::new();
    let args = folder.train("out", &[], &["--grid", "2x2"]);
    let finished = run(mpirun(3, &slices(&args)), LIMIT).expect_code(2);
    assert!(finished.stderr.contains("`grid`: found 2x2 = 4 devices and 3 ranks; run mpirun -n 4"), "{finished}");
    assert_eq!(finished.errors().len(), 1, "{finished}");
    let args = folder.train("out", &[], &["--emulate"]);
    let finished = run(mpirun(2, &slices(&args)), LIMIT).expect_code(2);
    assert!(finished.stderr.contains("--emulate is one process"), "{finished}");
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_training() {
    let folder = Folder::new();
    std::fs::write(folder.path("file"), b"").unwrap();
    for (command, ranks) in [(0, 1), (2, 2)] {
        let args = folder.train("file/out", &[], &["--grid", "2x1"]);
        let program = if command == 0 { ouroboros(&slices(&args)) } else { mpirun(ranks, &slices(&args)) };
        let finished = run(program, LIMIT).expect_code(2);
        assert!(
            finished.stderr.contains("setting `--out`") && finished.stderr.contains("choose another folder"),
            "{finished}"
        );
        assert_eq!(finished.errors().len(), 1, "{finished}");
    }
}

/// A run that blows up stops with code 5 and names the tensor; weights of an earlier run stay as they were.
#[test]
fn a_loss_that_is_not_finite_writes_nothing() {
    let folder = Folder::new();
    program(&slices(&folder.train("out", &[], &["--grid", "2x1"]))).expect_code(0);
    let shard = folder.path("out/checkpoints/step-6/stage-0.safetensors");
    let good = std::fs::read(&shard).unwrap();
    let sets = ["optimizer.lr=1e30", "optimizer.warmup=0", "optimizer.weight_decay=0"];
    for ranks in [1, 2] {
        let args = folder.train("out", &sets, &["--grid", "2x1"]);
        let finished =
            run(if ranks == 1 { ouroboros(&slices(&args)) } else { mpirun(2, &slices(&args)) }, LIMIT).expect_code(5);
        assert_eq!(finished.errors().len(), 1, "{finished}");
        let line = finished.errors()[0].to_owned();
        assert!(line.contains("not finite: ") && line.contains(" at step ") && line.contains("stage "), "{finished}");
        assert_eq!(std::fs::read(&shard).unwrap(), good, "{finished}");
    }
}

/// What an interrupted exchange of weights leaves behind does not stand in the way of the next run.
#[test]
fn weights_set_aside_by_an_interrupted_run_are_handled() {
    let folder = Folder::new();
    let args = folder.train("out", &[], &[]);
    program(&slices(&args)).expect_code(0);
    let (last, old) = (folder.path("out/checkpoints/step-6"), folder.path("out/checkpoints/step-6.old"));
    std::fs::rename(&last, &old).unwrap();
    std::fs::create_dir_all(folder.path("out/checkpoints/step-6.tmp")).unwrap();
    // A failing run brings the earlier weights back; one that succeeds replaces them.
    program(&slices(&folder.train("out", &["optimizer.lr=1e30", "optimizer.weight_decay=0"], &[]))).expect_code(5);
    assert!(last.join("manifest.json").exists() && !old.exists());
    std::fs::create_dir_all(&old).unwrap();
    std::fs::write(old.join("stale"), b"x").unwrap();
    program(&slices(&args)).expect_code(0);
    assert!(last.join("manifest.json").exists() && !old.exists());
}

#[test]
fn a_drill_that_cannot_happen_is_refused() {
    let folder = Folder::new();
    for more in
        [&["--inject", "panic@1,0:2"][..], &["--inject", "panic@0,0:6"], &["--emulate", "--inject", "panic@0,0:2"]]
    {
        let finished = program(&slices(&folder.train("out", &[], more))).expect_code(2);
        assert!(finished.stderr.contains("--inject"), "{finished}");
    }
}

#[test]
fn usage_errors_have_code_2() {
    for args in [&["fly"][..], &["train"][..], &["train", "x.toml", "--grid", "2"][..], &["train", "no-such.toml"][..]]
    {
        program(args).expect_code(2);
    }
    program(&["--help"]).expect_code(0);
    program(&["--version"]).expect_code(0);
}

/// The configs of the repository and the one in the README say what the program understands.
#[test]
fn documented_configs_are_valid() {
    let readme = include_str!("../../README.md");
    let block = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    Config::parse(block, &[]).unwrap_or_else(|error| panic!("README: {error}"));
    for entry in std::fs::read_dir("configs").unwrap().flatten() {
        let path = entry.path();
        let config = Config::load(&path, &[], None).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let here = config.data.path.as_ref().is_none_or(|path| path.exists());
        if !here {
            eprintln!("skipped: the text of {} is not here", path.display());
        } else if let Err(error) = Setup::new(config) {
            panic!("{}: {error}", path.display());
        }
    }
}
