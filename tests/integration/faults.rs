//! A failing place ends the whole run at once, and its message comes first.

use std::time::Duration;

use crate::harness::{Finished, Folder, child, mpirun, ouroboros, run, signalled, slices};

/// All ranks gone.
const LIMIT: Duration = Duration::from_secs(10);

/// A run that would take far longer than the limit, with a fault in it.
fn long_run(folder: &Folder, fault: &str, ranks: Option<usize>) -> Finished {
    let sets = ["grid.stages=2", "grid.replicas=2", "steps=1000000"];
    let args = folder.train("out", &sets, &["--inject", fault]);
    let command = match ranks {
        Some(ranks) => mpirun(ranks, &slices(&args)),
        None => ouroboros(&slices(&args)),
    };
    let finished = run(command, 60);
    assert!(!finished.timed_out && finished.time < LIMIT, "{finished}");
    assert!(!folder.path("out/checkpoints/step-1000000").exists(), "{finished}");
    finished
}

fn first_line(finished: &Finished) -> &str {
    finished.stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("")
}

#[test]
fn a_panic_ends_all_ranks_and_is_shown_first() {
    for ranks in [Some(4), None] {
        let finished = long_run(&Folder::new(), "panic@1,0:5", ranks).expect_code(70);
        let line = first_line(&finished);
        assert!(line.starts_with("error: stage 1, replica 0"), "{finished}");
        assert!(
            line.contains("internal error: panic at src/worker/faults.rs:")
                && line.ends_with(": injected panic at 1L5.0"),
            "{finished}"
        );
        assert_eq!(finished.errors().len(), 1, "{finished}");
    }
}

#[test]
fn a_panic_of_rank_0_ends_all_ranks() {
    let finished = long_run(&Folder::new(), "panic@0,0:5", Some(4)).expect_code(70);
    assert!(
        first_line(&finished).starts_with("error: stage 0, replica 0 (rank 0 on "),
        "{finished}"
    );
}

#[test]
fn a_wrong_message_names_both_ends() {
    for ranks in [Some(4), None] {
        let finished = long_run(&Folder::new(), "corrupt-message@0,1:5", ranks).expect_code(4);
        let line = first_line(&finished);
        assert!(line.starts_with("error: stage 1, replica 1"), "{finished}");
        let told = "wrong message from stage 0, replica 1 to stage 1, replica 1: expected activation 5.0 f32 [12, 8, 16], \
                    found activation 6.0 f32 [12, 8, 16]";
        assert!(line.contains(told), "{finished}");
        assert_eq!(finished.errors().len(), 1, "{finished}");
    }
}

/// One bit of one copy of the tied table: found at the next sync point, with both places and their digests.
#[test]
fn copies_of_the_table_that_differ_are_found() {
    for ranks in [Some(4), None] {
        let folder = Folder::new();
        let sets = ["grid.stages=2", "grid.replicas=2", "steps=1000000", "sync_at=[3, 6]"];
        let args = folder.train("out", &sets, &["--inject", "alter-table@1,1:4"]);
        let command = match ranks {
            Some(ranks) => mpirun(ranks, &slices(&args)),
            None => ouroboros(&slices(&args)),
        };
        let finished = run(command, 60).expect_code(70);
        let line = first_line(&finished);
        assert!(
            line.starts_with("error: the copies of the tied embedding differ after step 6: "),
            "{finished}"
        );
        let digests: Vec<&str> =
            line.split(&[' ', ',', ';'][..]).filter(|word| word.len() == 16).collect();
        assert!(
            digests.len() == 4 && digests[..3] == [digests[0]; 3] && digests[3] != digests[0],
            "{finished}"
        );
        assert_eq!(finished.errors().len(), 1, "{finished}");
        assert!(finished.time < LIMIT, "{finished}");
    }
}

/// A place that stands still, or a message that is lost: the table and the name come after `stall_seconds`.
#[test]
fn what_everybody_waits_for_is_named() {
    for (fault, place, what) in [
        (
            "hang@1,0:5",
            "stage 1, replica 0 ",
            "is stuck in 1F5.0, and all other ranks are waiting for it",
        ),
        (
            "hang@0,1:5:B",
            "stage 0, replica 1 ",
            "is stuck in 0B5.0, and all other ranks are waiting for it",
        ),
        (
            "hang@1,1:6:U",
            "stage 1, replica 1 ",
            "is stuck in 1U6, and all other ranks are waiting for it",
        ),
    ] {
        for ranks in [Some(4), None] {
            let folder = Folder::new();
            let sets = ["grid.stages=2", "grid.replicas=2", "steps=1000000", "stall_seconds=2"];
            let args = folder.train("out", &sets, &["--inject", fault]);
            let command = match ranks {
                Some(ranks) => mpirun(ranks, &slices(&args)),
                None => ouroboros(&slices(&args)),
            };
            let finished = run(command, 60);
            let Some(line) = finished.errors().first().copied() else {
                panic!("{fault}: {finished}")
            };
            assert!(line.contains(place) && line.contains(what), "{fault}: {finished}");
            assert!(finished.stderr.contains("last actions"), "{fault}: {finished}");
            assert!(
                finished.code == Some(4) && finished.errors().len() == 1,
                "{fault}: {finished}"
            );
            assert!(finished.time < LIMIT + Duration::from_secs(2), "{fault}: {finished}");
        }
    }
}

#[test]
fn faults_are_told_with_their_place() {
    let save = ["checkpoint.every=4"];
    let verify = ["verify_every=3", "model.tie=none"];
    let table: [(&str, &[&str], u8, &str); 7] = [
        (
            "nan@1,1:5",
            &[],
            5,
            "on stage 1, replica 1, rows 12 to 23 of the batch, from the tokens [",
        ),
        (
            "drop-message@0,1:5",
            &[],
            4,
            "wrong message from stage 0, replica 1 to stage 1, replica 1",
        ),
        (
            "drop-message@1,0:5:SG",
            &[],
            4,
            "wrong message from stage 1, replica 0 to stage 0, replica 0",
        ),
        ("disk-full@1,0:0", &save, 7, "earlier checkpoints are intact"),
        (
            "alter-weights@1,1:4",
            &verify,
            70,
            "the copies of the weights of stage 1 differ after step 6",
        ),
        (
            "alter-table@0,1:4",
            &["verify_every=3"],
            70,
            "the copies of the tied embedding differ after step 6",
        ),
        (
            "corrupt-message@1,0:5:SG",
            &[],
            4,
            "wrong message from stage 1, replica 0 to stage 0, replica 0",
        ),
    ];
    for (fault, sets, code, expected) in table {
        for ranks in [Some(4), None] {
            let folder = Folder::new();
            let all =
                [&["grid.stages=2", "grid.replicas=2", "steps=1000000", "stall_seconds=3"], sets]
                    .concat();
            let args = folder.train("out", &all, &["--inject", fault]);
            let command = match ranks {
                Some(ranks) => mpirun(ranks, &slices(&args)),
                None => ouroboros(&slices(&args)),
            };
            let finished = run(command, 60).expect_code(code.into());
            assert!(finished.errors().len() == 1, "{fault}: {finished}");
            let line = finished.errors()[0].to_owned();
            assert!(line.contains(expected), "{fault}: {finished}");
            assert!(finished.time < LIMIT, "{fault}: {finished}");
        }
    }
}

/// Whoever goes on leaves the same updates out as the oracle, and keeps finite weights.
#[test]
fn updates_that_are_not_finite_are_left_out() {
    let grid = &["grid.stages=3", "grid.replicas=2"];
    let table = [
        &grid[..],
        &["grid.stages=4", "grid.placement=ring", "model.tie=none"],
        &[grid[0], grid[1], "optimizer.kind=muon"],
        &[grid[0], grid[1], "optimizer.kind=soap"],
    ];
    for more in table {
        let sets =
            [&["optimizer.lr=1e30", "optimizer.clip=1e30", "on_nonfinite=skip", "steps=9"], more]
                .concat();
        let setup = crate::harness::tiny(&sets);
        let (threads, oracle) =
            (crate::harness::as_threads(&setup), crate::harness::by_oracle(&setup));
        assert_eq!(threads, oracle, "{sets:?}");
        assert!(threads.losses().len() < 9, "some losses are not finite: {:?}", threads.losses());
        let weights = threads.weights.iter().filter(|(name, _)| name.matches('.').count() == 1);
        for (name, bytes) in weights {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let values = bytes[8 + header..]
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            assert!(values.into_iter().all(f32::is_finite), "{name}");
        }
    }
    let folder = Folder::new();
    let sets = ["grid.stages=2", "optimizer.lr=1e30", "on_nonfinite=skip"];
    let finished = run(mpirun(2, &slices(&folder.train("out", &sets, &[]))), 60).expect_code(0);
    assert!(
        finished
            .stdout
            .contains("not finite: the update of stage 0, stage 1, the tied embedding is left out"),
        "{finished}"
    );
}

#[test]
fn a_place_that_becomes_slow_is_told() {
    let folder = Folder::new();
    let args = folder.train("out", &["grid.stages=2", "steps=24"], &["--inject", "slow@1,0:16"]);
    let finished = run(mpirun(2, &slices(&args)), 60).expect_code(0);
    assert!(
        finished.stdout.contains("note: stage 1, replica 0 (rank 1) has become slow: "),
        "{finished}"
    );
    assert!(!finished.stdout.contains("stage 0, replica 0 (rank 0) has become slow"), "{finished}");
}

/// A stopped process cannot answer; when it is rank 0, the others find out.
#[test]
fn a_silent_process_is_named() {
    for (nth, expected) in [(1, "stage 1, replica 0 (rank 1 on "), (0, "rank 0, seen from rank ")] {
        let folder = Folder::new();
        let sets = ["grid.stages=2", "steps=1000000", "stall_seconds=2"];
        let args = folder.train("out", &sets, &[]);
        let metrics = folder.path("out/metrics.jsonl");
        let finished = signalled(mpirun(2, &slices(&args)), &metrics, "-STOP", |id| child(id, nth));
        let line = finished.errors().first().map(|line| line.to_string()).unwrap_or_default();
        assert!(line.contains(expected), "{finished}");
        assert!(finished.errors().len() == 1 && finished.code == Some(4), "{finished}");
        assert!(finished.time < Duration::from_secs(20), "{finished}");
    }
}

#[test]
fn a_rank_that_leaves_ends_the_others() {
    let finished = long_run(&Folder::new(), "exit@1,1:5", Some(4));
    assert_ne!(finished.code, Some(0), "{finished}");
    let [line] = finished.errors()[..] else { panic!("{finished}") };
    assert!(
        line.contains("stage 1, replica 1 (rank 3 on ") && line.contains("process died in 1L5.0;"),
        "{finished}"
    );
}

#[test]
fn a_killed_rank_ends_the_others() {
    for (fault, place, action) in [
        ("crash@1,1:5:B", "stage 1, replica 1 (rank 3 on ", "1B5.0"),
        ("crash@0,0:7:U", "stage 0, replica 0 (rank 0 on ", "0U7"),
    ] {
        let finished = long_run(&Folder::new(), fault, Some(4));
        assert_ne!(finished.code, Some(0), "{finished}");
        // The neighbours speak for the one that cannot, before mpirun tells the signal.
        let [line] = finished.errors()[..] else { panic!("{finished}") };
        assert!(
            line.contains(place) && line.contains(&format!("process died in {action};")),
            "{finished}"
        );
        assert!(finished.stderr.contains("signal 9"), "{finished}");
    }
}
