//! The built program under real mpirun against the oracle, and what it prints and leaves.

use crate::harness::{Folder, Outcome, by_oracle, mpirun, run, slices, tiny};

/// Any run here is over in a few seconds; starting MPI takes most of it.
const LIMIT: u64 = 60;

#[test]
fn ranks_equal_the_oracle() {
    for (grid, more) in [
        ("1x1", &[][..]),
        ("2x1", &["microbatches=2", "eval.every=3"][..]),
        ("1x2", &["microbatches=3"][..]),
        ("2x2", &["microbatches=3", "model.dropout=0.1", "eval.every=4"][..]),
        ("4x1", &["recompute=true", "sync_steps=2"][..]),
        ("3x2", &["microbatches=2", "optimizer.clip=0.05", "schedule=1f1b"][..]),
        ("4x1", &["grid.placement=ring", "eval.every=4"][..]),
        ("3x2", &["grid.placement=ring", "model.tie=fresh", "microbatches=2"][..]),
        ("2x2", &["model.tie=fresh", "model.tie_gradient=mean", "microbatches=2"][..]),
        ("5x1", &["model.tie=none", "sync_at=[3]"][..]),
    ] {
        let (stages, replicas) = grid.split_once('x').unwrap();
        let keys = [format!("grid.stages={stages}"), format!("grid.replicas={replicas}"), "steps=8".to_owned()];
        let sets: Vec<&str> = keys.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let setup = tiny(&sets);
        let folder = Folder::new();
        let args = folder.train("out", &sets[2..], &["--grid", grid]);
        let finished = run(mpirun(setup.grid.size(), &slices(&args)), LIMIT).expect_code(0);
        let ranks = Outcome::read(&folder.path("out"));
        assert_eq!(ranks, by_oracle(&setup), "{grid} {more:?}{finished}");
        assert!(finished.stdout.contains("predicted"), "{grid}: no table of memory{finished}");
    }
}

/// More replicas than two: the order of MPI's sum is its own, so the last digits may differ.
#[test]
fn three_replicas_agree_with_the_oracle() {
    let sets = ["grid.replicas=3", "microbatches=2"];
    let folder = Folder::new();
    let args = folder.train("out", &sets, &[]);
    run(mpirun(3, &slices(&args)), LIMIT).expect_code(0);
    let (ranks, oracle) = (Outcome::read(&folder.path("out")).losses(), by_oracle(&tiny(&sets)).losses());
    assert_eq!((ranks.len(), oracle.len()), (6, 6));
    for (a, b) in ranks.iter().zip(&oracle) {
        assert!((a / b - 1.0).abs() < 1e-6, "{ranks:?}\n{oracle:?}");
    }
}

/// Resident memory of a stage stays within the prediction. Every block of the heap is mapped by itself here, so that
/// holes between blocks, which are the allocator's affair, do not count.
#[test]
fn peak_memory_is_as_predicted() {
    let folder = Folder::new();
    let sizes = ["model.d_model=192", "model.heads=4", "model.d_ff=768", "data.sequence=128", "data.synthetic=100000"];
    let sets = [&sizes[..], &["microbatches=3", "grid.stages=2", "steps=4"]].concat();
    let mut command = mpirun(2, &slices(&folder.train("out", &sets, &[])));
    command.env("MALLOC_MMAP_THRESHOLD_", "65536");
    let finished = run(command, 120).expect_code(0);
    let rows: Vec<Vec<f64>> = finished
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("stage ")?.split_once("replica 0 "))
        .map(|(_, numbers)| numbers.split_whitespace().map(|n| n.parse().unwrap()).collect())
        .collect();
    assert_eq!(rows.len(), 2, "{finished}");
    for row in rows {
        let (predicted, measured) = (row[5], row[6]);
        // MPI's shared memory and buffers come on top, whatever the size of the model.
        assert!(measured < predicted * 1.05 + 8.0, "predicted {predicted} MiB, measured {measured} MiB{finished}");
        assert!(measured > predicted * 0.85, "predicted {predicted} MiB, measured {measured} MiB{finished}");
    }
}
