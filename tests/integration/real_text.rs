//! Real text: every grid reads the same windows and learns the same.

use crate::harness::{TINY, as_threads, by_oracle, setup_of};

const TEXT: &str = concat!("data.path=", env!("CARGO_MANIFEST_DIR"), "/tests/data/declaration.txt");

#[test]
fn real_text_on_a_grid_equals_the_oracle() {
    let keys = [
        "data.sequence=32",
        "steps=30",
        "microbatches=2",
        "eval.every=15",
        "eval.tokens=200",
        "grid.stages=3",
    ];
    let sets: Vec<&str> = keys.into_iter().chain([TEXT, "grid.replicas=2"]).collect();
    let setup = setup_of(&TINY.replace("synthetic = 4000\n", ""), &sets);
    let grid = as_threads(&setup);
    assert_eq!(grid, by_oracle(&setup));
    let losses = grid.losses();
    assert!(losses[29] < losses[0] - 1.0, "{losses:?}");
}
