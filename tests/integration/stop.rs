//! A run that is asked to stop drains, saves, and goes on later as if it had not been stopped, wherever that was.

use std::path::Path;

use ouroboros::checkpoint::Checkpoint;
use ouroboros::config::Config;
use ouroboros::metrics::Summary;
use ouroboros::setup::Setup;
use tempfile::TempDir;

use crate::harness::{
    Folder, LIMIT, Outcome, TINY, child, files, mpirun, ouroboros, run, signalled, slices, trained,
};

pub fn setup(sets: &[&str]) -> Setup {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Setup::new(Config::parse(TINY, &sets).unwrap_or_else(|error| panic!("{sets:?}: {error}")))
        .unwrap()
}

pub fn leg(setup: Setup, out: &Path, oracle: bool, stop: bool) -> Summary {
    if stop {
        std::fs::write(out.join("STOP"), "").unwrap();
    }
    trained(setup, out, oracle)
}

/// The files of the last state, and the lines about the run.
pub fn ends(out: &Path, steps: usize) -> (Vec<(String, Vec<u8>)>, Vec<serde_json::Value>) {
    (files(out, steps), Outcome::read(out).lines)
}

/// Stopped again and again, by a file; every second leg is the oracle's.
pub fn stopped_again_and_again(sets: &[&str]) {
    let whole = TempDir::new().unwrap();
    let summary = leg(setup(sets), whole.path(), false, false);
    assert!(!summary.stopped);
    let (pieces, mut legs, mut between) = (TempDir::new().unwrap(), 0, 0);
    let steps = setup(sets).config.steps;
    loop {
        let mut setup = setup(sets);
        if let Some(saved) = Checkpoint::newest(pieces.path()).unwrap() {
            between += usize::from(saved.manifest.pipeline.since < saved.step());
            setup = setup.resume(saved).unwrap();
        }
        legs += 1;
        if !leg(setup, pieces.path(), legs % 2 == 0, true).stopped {
            break;
        }
        assert!(!pieces.path().join("STOP").exists());
        assert!(legs < 50, "{sets:?}");
    }
    let synchronous =
        sets.iter().any(|set| set.starts_with("schedule=")) || sets.contains(&"model.tie=fresh");
    assert!(
        legs > 2 && (between > 0) != synchronous,
        "{sets:?}: {legs} legs, {between} stops between sync points"
    );
    let (found, expected) = (ends(pieces.path(), steps), ends(whole.path(), steps));
    assert!(found == expected || sets.contains(&"model.tie=fresh"), "{sets:?}: {legs} legs");
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let xl: &[&str] = &[
        "model.arch=transformer-xl",
        "model.mem_len=12",
        "data.synthetic=2200",
        "data.held_out=0.3",
    ];
    stopped_again_and_again(&["grid.stages=3", "steps=31", "model.dropout=0.1"]);
    stopped_again_and_again(&[
        "grid.stages=4",
        "grid.replicas=2",
        "microbatches=2",
        "steps=24",
        "eval.every=7",
    ]);
    stopped_again_and_again(&[
        "grid.stages=4",
        "grid.placement=ring",
        "steps=31",
        "checkpoint.every=7",
    ]);
    stopped_again_and_again(&[
        "grid.stages=3",
        "schedule=1f1b",
        "microbatches=3",
        "steps=17",
        "model.tie=none",
    ]);
    stopped_again_and_again(&[
        "grid.stages=2",
        "grid.delays=[3, 1]",
        "steps=31",
        "model.tie=none",
        "recompute=true",
    ]);
    stopped_again_and_again(&["grid.stages=3", "grid.replicas=2", "steps=24", "precision=bf16"]);
    stopped_again_and_again(&[
        "grid.stages=4",
        "grid.replicas=2",
        "steps=31",
        "eval.every=7",
        "model.tie=head",
    ]);
    stopped_again_and_again(&[
        "grid.stages=4",
        "grid.placement=ring",
        "steps=31",
        "model.tie=head",
    ]);
    stopped_again_and_again(&["grid.stages=1", "grid.delays=[2]", "steps=24", "model.tie=head"]);
    stopped_again_and_again(
        &[xl, &["grid.stages=3", "grid.replicas=2", "microbatches=2", "steps=22"]].concat(),
    );
}

/// Under the paper's tie a stop is a sync point, for the grid and for the oracle alike.
#[test]
fn a_stop_is_a_sync_point_of_a_fresh_tie() {
    let sets = ["grid.stages=3", "model.tie=fresh", "steps=21"];
    stopped_again_and_again(&sets);
    let [threads, oracle] = [false, true].map(|oracle| {
        let out = TempDir::new().unwrap();
        let first = leg(setup(&sets), out.path(), oracle, true);
        assert!(first.stopped);
        let saved = Checkpoint::newest(out.path()).unwrap().unwrap();
        let step = saved.step();
        assert_eq!(saved.manifest.pipeline.since, step);
        leg(setup(&sets).resume(saved).unwrap(), out.path(), oracle, false);
        (step, ends(out.path(), 21), out)
    });
    // Where it stops depends on the moment; what it then is does not.
    for (step, found, _out) in [threads, oracle] {
        let at = format!("sync_at=[{step}]");
        let expected = TempDir::new().unwrap();
        leg(setup(&[&sets[..], &[&at]].concat()), expected.path(), true, false);
        assert!(found == ends(expected.path(), 21), "stopped at {step}");
    }
}

/// From the state of a stop another grid goes on as its oracle does: there it is a sync point. Parts of the table's gradient
/// that wait are not lost.
#[test]
fn another_grid_goes_on_from_a_stop() {
    for (before, other) in [
        (&["grid.stages=3"][..], &["grid.stages=4", "grid.replicas=2", "microbatches=2"][..]),
        (
            &["grid.stages=4", "model.tie=head"],
            &["grid.stages=3", "grid.placement=ring", "model.tie=head"],
        ),
        (
            &["grid.stages=4", "grid.replicas=2", "model.tie=head"],
            &["grid.stages=2", "model.tie=aligned"],
        ),
        (
            &["grid.stages=3", "grid.replicas=2", "model.tie=head"],
            &["grid.stages=3", "model.tie=head"],
        ),
        (
            &["grid.stages=3", "model.tie=head"],
            &["grid.stages=3", "grid.replicas=2", "model.tie=head"],
        ),
    ] {
        let steps = ["steps=20"];
        let out = TempDir::new().unwrap();
        assert!(leg(setup(&[before, &steps].concat()), out.path(), false, true).stopped);
        let [threads, oracle] = [false, true].map(|oracle| {
            let saved = Checkpoint::newest(out.path()).unwrap().unwrap();
            let rest = TempDir::new().unwrap();
            leg(
                setup(&[other, &steps].concat()).resume(saved).unwrap(),
                rest.path(),
                oracle,
                false,
            );
            ends(rest.path(), 20)
        });
        assert!(threads == oracle, "{before:?} to {other:?}");
    }
}

/// Another number of replicas goes on with the parts' sum, as the mean over all rows that it is.
#[test]
fn waiting_parts_are_shared_out_anew() {
    use ouroboros::params::Layout;
    let sets = ["grid.stages=3", "model.tie=head", "steps=20"];
    let out = TempDir::new().unwrap();
    assert!(
        leg(setup(&[&sets[..], &["grid.replicas=2"]].concat()), out.path(), false, true).stopped
    );
    let saved = || Checkpoint::newest(out.path()).unwrap().unwrap();
    let resumed =
        |replicas: &str| setup(&[&sets[..], &[replicas]].concat()).resume(saved()).unwrap();
    let layout = Layout::new(&ouroboros::model::table(&resumed("grid.replicas=1").dimensions));

    let parts =
        |replicas: &str, replica| resumed(replicas).waiting_parts(&layout, replica).unwrap();
    let (first, second) = (parts("grid.replicas=2", 0), parts("grid.replicas=2", 1));
    let (alone, other) = (parts("grid.replicas=1", 0), parts("grid.replicas=3", 1));
    assert_eq!(alone.len(), 2, "as many as the delay");
    for (i, (step, sum)) in alone.iter().enumerate() {
        assert_eq!((*step, first[i].0, second[i].0), (saved().step() - 2 + i, *step, *step));
        // Two replicas' means count half as much as one's.
        assert_eq!(*sum, (&first[i].1 + &second[i].1) * 0.5);
        assert!(sum.abs().max().double_value(&[]) > 0.0);
        assert_eq!(other[i].1.abs().max().double_value(&[]), 0.0, "the first replica has all");
    }
}

#[test]
fn a_signal_stops_all_ranks_with_code_75() {
    let sets = ["steps=1500", "grid.stages=2", "grid.replicas=2", "checkpoint.keep_last=1"];
    let folder = Folder::new();
    run(ouroboros(&slices(&folder.train("whole", &sets, &[]))), LIMIT).expect_code(0);
    let args = folder.train("out", &sets, &["--resume"]);
    let metrics = folder.path("out/metrics.jsonl");
    // To the launcher, which passes it on; to one rank; and to threads of one process.
    let launched = || mpirun(4, &slices(&args));
    let first = signalled(launched(), &metrics, "-USR1", |id| id.to_string()).expect_code(75);
    assert!(
        first.stdout.contains("SIGUSR1 at stage ") && first.stdout.contains("stopped at step "),
        "{first}"
    );
    assert!(first.errors().is_empty(), "{first}");
    let second = signalled(launched(), &metrics, "-TERM", |id| child(id, 2)).expect_code(75);
    assert!(second.stdout.contains("SIGTERM at stage "), "{second}");
    let third =
        signalled(ouroboros(&slices(&args)), &metrics, "-INT", |id| id.to_string()).expect_code(75);
    assert!(
        third.stdout.contains(
            "SIGINT at this process (again in 2 s or later: ends at once, unsaved): the run stops and saves at step "
        ),
        "{third}"
    );
    run(mpirun(4, &slices(&args)), LIMIT).expect_code(0);
    let (found, expected) = (ends(&folder.path("out"), 1500), ends(&folder.path("whole"), 1500));
    assert!(found == expected, "{first}{second}{third}");
}

#[test]
fn deadlines_stop_a_run() {
    let folder = Folder::new();
    let long = ["steps=1000000", "grid.stages=2"];
    let args = folder.train("a", &long, &["--max-minutes", "0.02"]);
    let finished = run(ouroboros(&slices(&args)), LIMIT).expect_code(75);
    assert!(finished.stdout.contains("--max-minutes 0.02: the run stops"), "{finished}");
    let end =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 62;
    let args = folder.train("b", &long, &["--stop-margin", "60"]);
    let mut command = mpirun(2, &slices(&args));
    command.env("SLURM_JOB_END_TIME", end.to_string());
    let finished = run(command, LIMIT).expect_code(75);
    assert!(
        finished.stdout.contains("the end of the batch job is 60 s away: the run stops"),
        "{finished}"
    );
}
