//! Real text, where the folder `../shared/data` has it: every grid reads the same windows and learns the same.

use std::path::Path;

use crate::harness::{TINY, as_threads, by_oracle, setup_of};

const SHAKESPEARE: &str = "../shared/data/tinyshakespeare.txt";

#[test]
fn shakespeare_on_a_grid_equals_the_oracle() {
    if !Path::new(SHAKESPEARE).exists() {
        eprintln!("skipped: {SHAKESPEARE} is not here");
        return;
    }
    let path = format!("data.path={SHAKESPEARE}");
    let keys = ["data.sequence=32", "steps=30", "microbatches=2", "eval.every=15", "eval.tokens=2000", "grid.stages=3"];
    let sets: Vec<&str> = keys.into_iter().chain([path.as_str(), "grid.replicas=2"]).collect();
    let setup = setup_of(&TINY.replace("synthetic = 4000\n", ""), &sets);
    let grid = as_threads(&setup);
    assert_eq!(grid, by_oracle(&setup));
    let losses = grid.losses();
    assert!(losses[29] < losses[0] - 1.0, "{losses:?}");
}
