//! Cures for delay (predicted weights, steps that lead, rules that take whole matrices): threads and mpirun against the oracle,
//! bit for bit, over drawn configurations; and runs that are stopped and resumed.

use std::collections::BTreeSet;

use crate::harness::{Draw, as_threads, by_oracle, tiny};
use crate::mpirun::compare;
use crate::stop::{ends, leg, setup, stopped_again_and_again};
use ouroboros::checkpoint::Checkpoint;
use tempfile::TempDir;

const DRAWN: usize = 160;
/// From here on rules that take whole matrices.
const OF_MATRICES: usize = 100;
const LAYERS: usize = 6;

/// The keys of configuration `number`, and the names of what it covers.
fn drawn(number: usize) -> (Vec<String>, BTreeSet<&'static str>) {
    let mut draw = Draw::new(number as u64 * 6151 + 29);
    let (mut sets, mut covers) = (Vec::new(), BTreeSet::new());
    let mut cover = |name: &'static str, set: String| {
        covers.insert(name);
        sets.push(set);
    };

    let stages = [2, 2, 3, 3, 4, 5, LAYERS][draw.below(7)];
    let microbatches = [1, 1, 2, 4][draw.below(4)];
    let slack = [1, 1, 2][draw.below(3)];
    cover("stages", format!("grid.stages={stages}"));
    cover("replicas", format!("grid.replicas={}", [1, 1, 2][draw.below(3)]));
    cover(if microbatches > 1 { "m > 1" } else { "m = 1" }, format!("microbatches={microbatches}"));
    cover("slack", format!("slack={slack}"));
    if draw.one_in(4) {
        let least = |k: usize| (slack * (stages - 1 - k)).div_ceil(microbatches);
        let delays: Vec<String> =
            (0..stages).map(|k| (least(k) + draw.below(3)).to_string()).collect();
        cover("delays by hand", format!("grid.delays=[{}]", delays.join(", ")));
    }

    if draw.one_in(5) {
        cover("no prediction", "optimizer.predict=off".into());
    } else {
        cover("predict", "optimizer.predict=update".into());
        if draw.one_in(3) {
            cover("half a horizon", "optimizer.predict_scale=0.5".into());
        }
    }
    let kind = if draw.one_in(6) { "sgd" } else { "adamw" };
    let kind = if number >= OF_MATRICES { ["muon", "soap", "soap"][draw.below(3)] } else { kind };
    cover(kind, format!("optimizer.kind={kind}"));
    let lead = ["off", "one", "where-delayed", "delay"][draw.below(4)];
    if kind != "sgd" {
        cover(
            match lead {
                "off" => "no lead",
                "one" => "lead of one",
                "delay" => "lead of the delay",
                _ => "lead where delayed",
            },
            format!("optimizer.lead={lead}"),
        );
    }
    if kind == "soap" {
        let sides = ["both", "smaller"][draw.below(2)];
        cover(
            if sides == "both" { "both sides" } else { "smaller side" },
            format!("optimizer.soap_sides={sides}"),
        );
        cover("refreshes", format!("optimizer.soap_every={}", [1, 2, 3, 7][draw.below(4)]));
        if draw.one_in(4) {
            cover("long sides", "optimizer.soap_limit=16".into());
        }
    }
    let rate = ["constant", "linear", "cosine"][draw.below(3)];
    cover(rate, format!("optimizer.schedule={rate}"));

    let tie = ["aligned", "head", "head", "fresh", "none"][draw.below(5)];
    cover(tie, format!("model.tie={tie}"));
    if stages > 2 && draw.one_in(2) {
        let name = if tie == "none" {
            "ring"
        } else if tie == "head" {
            "ring under head"
        } else {
            "tied ring"
        };
        cover(name, "grid.placement=ring".into());
    }
    match draw.below(3) {
        0 => cover("recompute", "recompute=true".into()),
        1 => cover("recompute by blocks", "recompute=blocks".into()),
        _ => {}
    }
    if draw.one_in(3) {
        cover("bf16", "precision=bf16".into());
    }
    if draw.one_in(3) {
        cover("dropout", "model.dropout=0.2".into());
    }
    if draw.one_in(3) {
        cover("sync points", format!("sync_at=[{}, {}]", 2 + draw.below(3), 6 + draw.below(3)));
    }
    if draw.one_in(4) {
        cover("evaluation", format!("eval.every={}", 3 + draw.below(4)));
        cover("evaluation", "eval.tokens=40".into());
    } else if draw.one_in(3) {
        cover("memory", "model.arch=transformer-xl".into());
        cover("memory", "model.mem_len=8".into());
        cover("memory", "data.held_out=0.3".into());
    }
    (sets, covers)
}

#[test]
fn drawn_cures_equal_the_oracle_bit_for_bit() {
    for number in 0..DRAWN {
        let (sets, _) = drawn(number);
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(["steps=10"]).collect();
        let setup = tiny(&sets);
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "metrics of configuration {number}: {sets:?}");
        assert!(grid.weights == oracle.weights, "weights of configuration {number}: {sets:?}");
    }
}

/// Some of them as ranks of mpirun.
#[test]
fn drawn_cures_as_ranks_equal_the_oracle() {
    for number in (4..DRAWN).step_by(11) {
        let (sets, _) = drawn(number);
        let of = |key: &str| sets.iter().find_map(|set| set.strip_prefix(key)).unwrap();
        let grid = format!("{}x{}", of("grid.stages="), of("grid.replicas="));
        let more = sets
            .iter()
            .map(String::as_str)
            .filter(|set| !set.starts_with("grid.stages") && !set.starts_with("grid.replicas"));
        let more: Vec<&str> = more.chain(["steps=10"]).collect();
        compare(&grid, &more);
    }
}

/// Some of them, of more steps, stopped again and again: a step before a sync point or not. (Under `fresh` a stop is a sync point,
/// which is another run.)
#[test]
fn drawn_cures_that_are_stopped_end_as_if_they_had_not_been() {
    for number in (0..DRAWN).step_by(8) {
        let (sets, covers) = drawn(number);
        if !covers.contains("fresh") {
            let sets: Vec<&str> = sets.iter().map(String::as_str).chain(["steps=40"]).collect();
            stopped_again_and_again(&sets);
        }
    }
}

#[test]
fn the_drawn_cures_cover_everything() {
    let wanted = [
        "m = 1",
        "m > 1",
        "delays by hand",
        "predict",
        "no prediction",
        "half a horizon",
        "adamw",
        "sgd",
        "muon",
        "soap",
        "both sides",
        "smaller side",
        "refreshes",
        "long sides",
        "no lead",
        "lead of one",
        "lead of the delay",
        "lead where delayed",
        "constant",
        "linear",
        "cosine",
        "aligned",
        "head",
        "fresh",
        "none",
        "ring",
        "tied ring",
        "ring under head",
        "recompute",
        "recompute by blocks",
        "bf16",
        "dropout",
        "sync points",
        "evaluation",
        "memory",
    ];
    for name in wanted {
        let count = (0..DRAWN).filter(|number| drawn(*number).1.contains(name)).count();
        assert!(count >= 4, "{name}: {count} of {DRAWN}");
    }
}

/// A stop saves the predicted version of the newest weights, which cannot be made again.
#[test]
fn predicted_runs_that_are_stopped_end_as_if_they_had_not_been() {
    let predict = ["optimizer.predict=update", "optimizer.lead=delay"];
    for more in [
        &["grid.stages=3", "steps=31", "model.dropout=0.1"][..],
        &["grid.stages=4", "grid.replicas=2", "microbatches=2", "steps=24", "eval.every=7"],
        &["grid.stages=4", "grid.placement=ring", "steps=31", "checkpoint.every=7"],
        &["grid.stages=3", "grid.replicas=2", "steps=24", "precision=bf16"],
        &[
            "grid.stages=3",
            "steps=24",
            "model.tie=none",
            "optimizer.kind=muon",
            "optimizer.predict_scale=0.5",
        ],
        &["grid.stages=3", "steps=24", "model.tie=head"],
        &[
            "grid.stages=4",
            "grid.placement=ring",
            "steps=31",
            "precision=bf16",
            "model.tie=head",
            "recompute=true",
        ],
    ] {
        stopped_again_and_again(&[&predict, more].concat());
    }
}

/// A run goes on as it began, unless something else is asked for: the state of a program that knew no cures without them.
#[test]
fn a_state_without_the_keys_goes_on_as_it_began() {
    let off = ["optimizer.predict=off", "optimizer.lead=off"];
    let keys = ["grid.stages=3", "steps=20"];
    let out = TempDir::new().unwrap();
    assert!(leg(setup(&[&keys[..], &off].concat()), out.path(), false, true).stopped);

    let goes_on = |more: &[&str]| {
        let rest = TempDir::new().unwrap();
        let saved = Checkpoint::newest(out.path()).unwrap().unwrap();
        leg(setup(&[&keys, more].concat()).resume(saved).unwrap(), rest.path(), false, false);
        ends(rest.path(), 20)
    };
    assert!(goes_on(&[]) == goes_on(&off));

    let manifest = Checkpoint::newest(out.path()).unwrap().unwrap().path.join("manifest.json");
    let mut value: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&manifest).unwrap()).unwrap();
    let optimizer = value["config"]["optimizer"].as_object_mut().unwrap();
    for key in ["predict", "predict_scale", "lead"] {
        assert!(optimizer.remove(key).is_some(), "{key} is not saved");
    }
    std::fs::write(&manifest, value.to_string()).unwrap();

    assert!(goes_on(&[]) == goes_on(&off));
    assert!(goes_on(&[]) != goes_on(&["optimizer.predict=update"]));
}

#[test]
fn ranks_that_predict_equal_the_oracle() {
    let predict = ["optimizer.predict=update", "optimizer.lead=one"];
    for (grid, more) in [
        ("3x1", &["microbatches=2", "eval.every=3"][..]),
        ("2x2", &["bucket_kib=8", "recompute=true"]),
        ("4x1", &["grid.placement=ring", "optimizer.predict_scale=0.5"]),
        ("2x2", &["precision=bf16", "wire=bf16"]),
        ("3x1", &["model.tie=fresh", "sync_at=[4]"]),
        ("3x2", &["model.tie=head", "sync_at=[6]"]),
        ("4x1", &["model.tie=head", "grid.placement=ring", "recompute=true"]),
    ] {
        compare(grid, &[&predict, more].concat());
    }
}

/// The first step that uses a predicted version: with a delay of one step 2, since the version at a sync point is used as it
/// is by the first two.
#[test]
fn a_prediction_is_felt_where_it_is_first_used() {
    let keys = ["grid.stages=2", "microbatches=2", "model.tie=none", "steps=8"];
    let losses = |more: &[&str]| as_threads(&tiny(&[&keys, more].concat())).losses();
    let off = ["optimizer.predict=off", "optimizer.lead=off"];
    let (plain, predicted) =
        (losses(&off), losses(&["optimizer.predict=update", "optimizer.lead=off"]));
    assert_eq!(plain[..2], predicted[..2]);
    assert_ne!(plain[2], predicted[2]);
    // They are what is done where nothing is said; without delays there is nothing to cure.
    let cured = ["optimizer.predict=update", "optimizer.lead=where-delayed"];
    assert_eq!(losses(&[]), losses(&cured));
    assert_ne!(losses(&[]), losses(&off));
    let synchronous = |more: &[&str]| losses(&[&["schedule=1f1b"], more].concat());
    assert_eq!(synchronous(&[]), synchronous(&off));
    assert_eq!(synchronous(&[]), synchronous(&cured));
}

/// Matrices that are large enough for the faster library (`src/optim/products.rs`): several of one shape in a batch of the oracle, fewer on a stage.
#[test]
fn rules_of_large_matrices_equal_the_oracle() {
    for kind in ["muon", "soap"] {
        let kind = format!("optimizer.kind={kind}");
        let large = [
            "grid.stages=2",
            "grid.replicas=2",
            "model.layers=3",
            "model.d_model=256",
            "model.d_ff=512",
            "steps=4",
            &kind,
        ];
        let setup = tiny(&large);
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "{kind}");
        assert!(grid.weights == oracle.weights, "{kind}");
    }
}

/// With more threads libtorch may cut a product in another way, in one process or in several.
#[test]
fn rules_of_matrices_with_more_threads_agree_closely() {
    for kind in ["muon", "soap"] {
        let kind = format!("optimizer.kind={kind}");
        let setup = tiny(&["grid.stages=3", "microbatches=2", "threads=2", &kind]);
        let (grid, oracle) = (as_threads(&setup).losses(), by_oracle(&setup).losses());
        assert_eq!(grid.len(), oracle.len());
        for (one, other) in grid.iter().zip(&oracle) {
            assert!((one - other).abs() < 1e-6, "{kind}: {grid:?} {oracle:?}");
        }
    }
}
