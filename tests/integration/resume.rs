//! A run that goes on from a saved state is the run that was not stopped; on another grid it is the oracle's.

use std::path::Path;

use ouroboros::checkpoint::Checkpoint;
use ouroboros::config::Config;
use ouroboros::setup::Setup;
use tempfile::TempDir;

use crate::harness::{Folder, Outcome, TINY, files, mpirun, ouroboros, run, slices, trained};

const LIMIT: u64 = 60;

/// Everything that is remembered from step to step: streams that end after five steps.
const XL: [&str; 6] = [
    "model.arch=transformer-xl",
    "model.mem_len=12",
    "data.synthetic=2200",
    "data.held_out=0.3",
    "model.dropout=0.1",
    "steps=9",
];

fn setup(sets: &[&str]) -> Setup {
    let sets: Vec<String> = ["checkpoint.every=2", "checkpoint.keep_last=9"]
        .iter()
        .chain(sets)
        .map(|set| set.to_string())
        .collect();
    Setup::new(Config::parse(TINY, &sets).unwrap())
        .unwrap_or_else(|error| panic!("{sets:?}: {error}"))
}

fn state(out: &Path, step: usize) -> Checkpoint {
    Checkpoint::open(&out.join(format!("checkpoints/step-{step}"))).unwrap()
}

/// From every saved state the run comes to the same end, and tells the same on its way.
fn goes_on(sets: &[&str]) {
    let whole = TempDir::new().unwrap();
    trained(setup(sets), whole.path(), false);
    let outcome = Outcome::read(whole.path());
    let steps = setup(sets).config.steps;
    for start in (2..steps).step_by(2) {
        let rest = TempDir::new().unwrap();
        std::fs::copy(whole.path().join("metrics.jsonl"), rest.path().join("metrics.jsonl"))
            .unwrap();
        trained(setup(sets).resume(state(whole.path(), start)).unwrap(), rest.path(), false);
        assert_eq!(Outcome::read(rest.path()).lines, outcome.lines, "{sets:?} from {start}");
        for step in (start + 1..=steps).filter(|step| step % 2 == 0 || *step == steps) {
            assert!(
                files(rest.path(), step) == files(whole.path(), step),
                "{sets:?} from {start}: step {step}"
            );
        }
    }
}

#[test]
fn a_run_that_goes_on_is_the_run_that_was_not_stopped() {
    goes_on(&[]);
    goes_on(&["grid.stages=3", "grid.replicas=2", "microbatches=2", "eval.every=3", "steps=8"]);
    goes_on(&[
        "grid.stages=4",
        "schedule=1f1b",
        "microbatches=3",
        "optimizer.kind=sgd",
        "model.tie=none",
    ]);
    goes_on(&[
        "grid.stages=4",
        "grid.placement=ring",
        "model.tie=fresh",
        "model.dropout=0.2",
        "recompute=true",
    ]);
    goes_on(&[
        "model.arch=llama",
        "model.kv_heads=1",
        "grid.stages=3",
        "grid.replicas=2",
        "microbatches=2",
        "optimizer.kind=soap",
    ]);
    let xl = |more: &[&'static str]| goes_on(&[&XL[..], more].concat());
    xl(&["grid.stages=3", "microbatches=2", "eval.every=4"]);
    xl(&["grid.stages=2", "grid.replicas=2", "microbatches=3", "recompute=true", "wire=bf16"]);
    xl(&["grid.stages=3", "grid.replicas=2", "microbatches=2", "precision=bf16"]);
}

/// Any other grid computes from the same state what the oracle of that grid does.
#[test]
fn any_grid_goes_on_from_any_other() {
    let grids: [&[&str]; 6] = [
        &["grid.stages=3", "grid.replicas=2", "microbatches=2"],
        &["microbatches=4"],
        &["grid.stages=6", "microbatches=1"],
        &["grid.stages=4", "grid.placement=ring", "microbatches=3"],
        &["grid.stages=2", "grid.replicas=3", "microbatches=2", "schedule=gpipe"],
        &["grid.replicas=4", "microbatches=3"],
    ];
    let rules: [&[&str]; 2] = [&[], &["optimizer.kind=soap", "optimizer.soap_every=2"]];
    for (i, rule) in (0..grids.len()).flat_map(|i| rules.map(|rule| (i, rule))) {
        let with = |grid: usize| [&XL[..], rule, grids[grid % grids.len()]].concat();
        let (from, to) = (with(i), with(i + 1));
        let saved = TempDir::new().unwrap();
        trained(setup(&[&from[..], &["steps=6"]].concat()), saved.path(), false);
        let [threads, oracle] = [false, true].map(|oracle| {
            let out = TempDir::new().unwrap();
            trained(setup(&to).resume(state(saved.path(), 4)).unwrap(), out.path(), oracle);
            Outcome::read(out.path())
        });
        assert_eq!(threads, oracle, "{from:?} to {to:?}");
        assert_eq!(threads.losses().len(), 5);
    }
}

/// The same of a Llama, with large chunks of the loss and with small ones.
#[test]
fn a_llama_goes_on_with_another_grid() {
    let llama = [
        "model.arch=llama",
        "model.kv_heads=1",
        "model.qk_norm=true",
        "model.vocabulary=20000",
        "steps=6",
    ];
    let grids: [&[&str]; 2] =
        [&["grid.stages=4"], &["grid.stages=2", "grid.replicas=2", "model.loss_chunk_mib=1"]];
    for (from, to) in [(0, 1), (1, 0)] {
        let with = |grid: usize| [&llama[..], grids[grid]].concat();
        let saved = TempDir::new().unwrap();
        trained(setup(&with(from)), saved.path(), false);
        let [threads, oracle] = [false, true].map(|oracle| {
            let out = TempDir::new().unwrap();
            trained(setup(&with(to)).resume(state(saved.path(), 4)).unwrap(), out.path(), oracle);
            Outcome::read(out.path())
        });
        assert_eq!(threads, oracle, "{from} to {to}");
        assert_eq!(threads.losses().len(), 2);
    }
}

/// A run that has nothing left to do is saved for another grid, and for the first one again: the same bytes.
#[test]
fn a_state_goes_to_another_grid_and_back() {
    let rules = ["optimizer.kind=muon", "optimizer.kind=soap"];
    for more in [&[][..], &["model.tie=none", "optimizer.kind=sgd"], &rules[..1], &rules[1..]] {
        let first = ["grid.stages=3", "grid.replicas=2", "microbatches=2", "steps=4"];
        let others: [&[&str]; 3] = [
            &["grid.stages=5", "microbatches=4", "steps=4"],
            &["grid.replicas=3", "microbatches=1", "steps=4"],
            &["grid.stages=4", "grid.placement=ring", "microbatches=2", "steps=4"],
        ];
        let start = TempDir::new().unwrap();
        let with = |sets: &[&str]| setup(&[&XL[..], more, sets].concat());
        trained(with(&first), start.path(), false);
        for other in others {
            let (there, back) = (TempDir::new().unwrap(), TempDir::new().unwrap());
            trained(with(other).resume(state(start.path(), 4)).unwrap(), there.path(), false);
            assert!(files(there.path(), 4) != files(start.path(), 4), "{other:?}");
            trained(with(&first).resume(state(there.path(), 4)).unwrap(), back.path(), false);
            assert!(files(back.path(), 4) == files(start.path(), 4), "{other:?}");
        }
    }
}

/// A rank is killed in the middle; what was saved goes on by itself, and ends as if nothing had happened.
#[test]
fn a_killed_run_is_resumed() {
    let sets =
        ["checkpoint.every=10", "steps=40", "eval.every=20", "grid.stages=2", "grid.replicas=2"];
    let folder = Folder::new();
    run(ouroboros(&slices(&folder.train("whole", &sets, &[]))), LIMIT).expect_code(0);
    let killed = folder.train("out", &sets, &["--resume", "--inject", "crash@1,1:33"]);
    let finished = run(mpirun(4, &slices(&killed)), LIMIT);
    assert!(!finished.timed_out && finished.code != Some(0), "{finished}");
    assert!(finished.stdout.contains("no checkpoint in"), "{finished}");
    let finished =
        run(mpirun(4, &slices(&folder.train("out", &sets, &["--resume"]))), LIMIT).expect_code(0);
    assert!(
        finished.stdout.contains("resuming at step 30 from ")
            || finished.stdout.contains("resuming at step 20 from ")
    );
    let (whole, out) = (folder.path("whole"), folder.path("out"));
    assert_eq!(Outcome::read(&out).lines, Outcome::read(&whole).lines, "{finished}");
    assert!(files(&out, 40) == files(&whole, 40), "{finished}");
    let finished =
        run(mpirun(4, &slices(&folder.train("out", &sets, &["--resume"]))), LIMIT).expect_code(0);
    assert!(
        finished.stdout.contains("nothing is left to do: all 40 steps are made, and saved"),
        "{finished}"
    );
}

#[test]
fn old_states_are_removed_and_some_are_kept() {
    let out = TempDir::new().unwrap();
    trained(
        setup(&["steps=12", "checkpoint.keep_last=2", "checkpoint.keep_every=6"]),
        out.path(),
        false,
    );
    let mut left: Vec<_> = std::fs::read_dir(out.path().join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["step-10", "step-12", "step-6"]);
}

type Damage = fn(&Path);

/// What is broken is named, and code 6 says so; the newest good state is taken if the run's folder is asked for.
#[test]
fn broken_states_are_told_and_passed_over() {
    let sets = ["checkpoint.every=2", "grid.stages=2"];
    let breaks: [(&str, Damage, &str); 8] = [
        ("truncated", |f| truncate(&f.join("stage-1.safetensors"), 100), "100 bytes instead of"),
        ("empty", |f| truncate(&f.join("stage-0.first.safetensors"), 0), "0 bytes instead of"),
        ("a bit", |f| flip(&f.join("stage-1.second.safetensors")), "its digest is "),
        (
            "no shard",
            |f| std::fs::remove_file(f.join("stage-0.safetensors")).unwrap(),
            "No such file",
        ),
        (
            "no manifest",
            |f| std::fs::remove_file(f.join("manifest.json")).unwrap(),
            "No such file or directory",
        ),
        ("half a manifest", |f| truncate(&f.join("manifest.json"), 200), "EOF while parsing"),
        (
            "a newer format",
            |f| edit(&f.join("manifest.json"), "\"format\": 4", "\"format\": 99"),
            "format 99 is not known",
        ),
        ("an empty manifest", |f| truncate(&f.join("manifest.json"), 0), "EOF while parsing"),
    ];
    for (name, damage, expected) in breaks {
        let folder = Folder::new();
        run(ouroboros(&slices(&folder.train("out", &sets, &[]))), LIMIT).expect_code(0);
        let state = folder.path("out/checkpoints/step-6");
        damage(&state);
        let path = state.to_str().unwrap();
        let finished =
            run(ouroboros(&slices(&folder.train("new", &sets, &["--resume", path]))), LIMIT)
                .expect_code(6);
        let told = finished.errors();
        assert!(
            told.len() == 1 && (told[0].contains(expected) || told[0].contains("is missing")),
            "{name}: {finished}"
        );
        std::fs::create_dir_all(folder.path("out/checkpoints/step-8.tmp")).unwrap();
        let finished = run(ouroboros(&slices(&folder.train("out", &sets, &["--resume"]))), LIMIT)
            .expect_code(0);
        assert!(finished.stdout.contains("resuming at step 4 from"), "{name}: {finished}");
        assert!(finished.stderr.contains("looking for an older one"), "{name}: {finished}");
    }
}

fn truncate(path: &Path, bytes: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() - 40;
    bytes[middle] ^= 16;
    std::fs::write(path, bytes).unwrap();
}

fn edit(path: &Path, old: &str, new: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(old));
    std::fs::write(path, text.replace(old, new)).unwrap();
}

#[test]
fn another_run_is_refused_by_name() {
    let folder = Folder::new();
    run(ouroboros(&slices(&folder.train("out", &["checkpoint.every=2"], &[]))), LIMIT)
        .expect_code(0);
    for (set, expected) in [
        ("model.d_model=32", "setting `model.d_model`: found 32; "),
        ("model.layers=4", "setting `model.layers`: found 4; "),
        ("model.tie=none", "setting `model.tie`: found "),
        ("batch=12", "setting `batch`: found 12; "),
        ("seed=9", "setting `seed`: found 9; "),
        ("data.sequence=16", "setting `data.sequence`: found 16; "),
        ("optimizer.kind=sgd", "setting `optimizer.kind`: found sgd; "),
        ("data.tokenizer=characters", "setting `data.tokenizer`: found characters; "),
        ("steps=3", "setting `steps`: found 3; "),
    ] {
        let finished = run(ouroboros(&slices(&folder.train("out", &[set], &["--resume"]))), LIMIT)
            .expect_code(2);
        assert!(
            finished.errors().len() == 1 && finished.errors()[0].contains(expected),
            "{set}: {finished}"
        );
        assert!(finished.errors()[0].contains("/step-6 "), "{finished}");
    }
    // A longer run, another rate of dropout and another kind of tie are the same run.
    let sets = ["steps=8", "model.dropout=0.1", "model.tie=fresh"];
    run(ouroboros(&slices(&folder.train("out", &sets, &["--resume"]))), LIMIT).expect_code(0);
}

#[test]
fn other_bases_of_soap_are_refused_by_name() {
    let folder = Folder::new();
    let soap = ["optimizer.kind=soap", "checkpoint.every=2", "steps=2"];
    run(ouroboros(&slices(&folder.train("out", &soap, &[]))), LIMIT).expect_code(0);
    for (set, expected) in [
        ("optimizer.soap_sides=smaller", "setting `optimizer.soap_sides`: found smaller; "),
        ("optimizer.soap_limit=16", "setting `optimizer.soap_limit`: found 16; "),
    ] {
        let sets = [&soap[..], &[set]].concat();
        let finished = run(ouroboros(&slices(&folder.train("out", &sets, &["--resume"]))), LIMIT)
            .expect_code(2);
        assert!(
            finished.errors().len() == 1 && finished.errors()[0].contains(expected),
            "{set}: {finished}"
        );
    }

    // A limit that no side reaches shapes the same state.
    let sets = [&soap[..2], &["steps=4", "optimizer.soap_limit=8192"]].concat();
    run(ouroboros(&slices(&folder.train("out", &sets, &["--resume"]))), LIMIT).expect_code(0);
}

/// A run at a stable rate, and one that decays from a state of it.
#[test]
fn a_decay_begins_at_a_stable_state() {
    let folder = Folder::new();
    let wsd = ["optimizer.schedule=wsd", "steps=8"];
    let train = |out: &str, sets: &[&str], more: &[&str]| {
        let args = folder.train(out, &[&wsd[..], sets].concat(), more);
        run(ouroboros(&slices(&args)), LIMIT)
    };
    train("stable", &["optimizer.decay_steps=0", "checkpoint.every=4"], &[]).expect_code(0);
    let state = folder.text("stable/checkpoints/step-4");
    train("decay", &["optimizer.decay_steps=4"], &["--resume", &state]).expect_code(0);
    let rates = |run: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(folder.path(run).join("metrics.jsonl")).unwrap();
        let lines =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter_map(|line| line["lr"].as_f64()).collect()
    };
    assert_eq!(rates("stable"), [0.005, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]);
    for (i, rate) in rates("decay").into_iter().rev().take(4).enumerate() {
        let expected = 0.01 * (1.0 - (f64::from(3 - i as u32) / 4.0).sqrt());
        assert!((rate - expected).abs() < 1e-12, "{i}: {rate}");
    }

    for (sets, expected) in [
        (&["optimizer.decay_steps=7"][..], "`optimizer.decay_steps`: found 7; 6 steps are left"),
        (
            &["optimizer.schedule=cosine", "optimizer.decay_steps=2"],
            "`optimizer.decay_steps`: found 2; only optimizer.schedule = \"wsd\" has it",
        ),
    ] {
        let refused = train("bad", sets, &[]).expect_code(2);
        assert!(refused.stderr.contains(expected), "{refused}");
    }
}
