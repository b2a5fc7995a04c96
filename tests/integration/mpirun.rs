//! The built program under real mpirun against the oracle, and what it prints and leaves.

use crate::harness::{Folder, Outcome, by_oracle, mpirun, ouroboros, run, slices, tiny};

/// Any run here is over in a few seconds; starting MPI takes most of it.
const LIMIT: u64 = 60;

/// Runs a grid under mpirun and compares metrics and weights with the oracle's, bit for bit.
pub fn compare(grid: &str, more: &[&str]) {
    let (stages, replicas) = grid.split_once('x').unwrap();
    let keys = [
        format!("grid.stages={stages}"),
        format!("grid.replicas={replicas}"),
        "steps=8".to_owned(),
    ];
    let sets: Vec<&str> = keys.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let setup = tiny(&sets);
    let folder = Folder::new();
    let args = folder.train("out", &sets[2..], &["--grid", grid]);
    let finished = run(mpirun(setup.grid.size(), &slices(&args)), LIMIT).expect_code(0);
    let ranks = Outcome::read(&folder.path("out"));
    assert_eq!(ranks, by_oracle(&setup), "{grid} {more:?}{finished}");
    assert!(finished.stdout.contains("predicted"), "{grid}: no table of memory{finished}");
}

#[test]
fn ranks_equal_the_oracle() {
    compare("1x1", &[]);
    compare("2x1", &["microbatches=2", "eval.every=3"]);
    compare("1x2", &["microbatches=3"]);
    compare("2x2", &["microbatches=3", "model.dropout=0.1", "eval.every=4"]);
    compare("4x1", &["recompute=true", "sync_steps=2"]);
    compare("3x2", &["microbatches=2", "optimizer.clip=0.05", "schedule=1f1b"]);
}

/// The gradient of a stage in several buckets, some of which the last parts of are shorter; rounded values on the wire.
#[test]
fn ranks_that_reduce_in_buckets_or_round_equal_the_oracle() {
    compare("1x2", &["microbatches=2", "bucket_kib=1"]);
    compare("2x2", &["bucket_kib=8", "wire=bf16", "eval.every=4"]);
    compare("3x1", &["wire=bf16", "grid.placement=ring", "microbatches=2"]);
    compare("2x2", &["precision=bf16", "bucket_kib=8", "eval.every=4"]);
    compare("2x2", &["bucket_kib=4", "recompute=true", "microbatches=3", "model.tie=fresh"]);
}

/// Every replica adds up its slice in the order of the replicas, so more than two are exact too.
#[test]
fn more_replicas_equal_the_oracle() {
    compare("1x3", &["microbatches=2", "bucket_kib=2"]);
    compare("2x3", &["sync_at=[2, 4]"]);
    compare("1x4", &["wire=bf16", "bucket_kib=16"]);
}

/// Replicas of one host add their gradients up where all of them see them, also of several parts, behind a self-test, and if one
/// of them is late. Where the address space is limited they do not take each other's memory into theirs, and the gradients travel,
/// as between hosts.
#[test]
fn gradients_are_shared_on_one_host_or_travel_and_equal_the_oracle() {
    let keys = [
        "grid.replicas=3",
        "microbatches=2",
        "steps=5",
        "model.d_model=128",
        "model.d_ff=512",
        "model.tie=none",
    ];
    let setup = tiny(&keys);
    assert!(setup.layout(0).len > 2 * ouroboros::comm::mpi::CHUNK, "a gradient of several parts");
    let expected = by_oracle(&setup);
    for (limit, more, told) in [
        ("unlimited", &["--self-test"][..], "are added up in shared memory"),
        (
            "unlimited",
            &["--inject", "slow@0,1:2", "--set", "bucket_kib=300"],
            "are added up in shared memory",
        ),
        ("60000000", &["--self-test"], "travel"),
    ] {
        let folder = Folder::new();
        let plain = mpirun(3, &slices(&folder.train("out", &keys, more)));
        let mut limited = std::process::Command::new("sh");
        limited
            .args(["-c", &format!("ulimit -v {limit}; exec \"$0\" \"$@\"")])
            .arg(plain.get_program());
        limited
            .args(plain.get_args())
            .envs(plain.get_envs().filter_map(|(key, value)| Some((key, value?))));
        let finished = run(limited, LIMIT).expect_code(0);
        assert_eq!(Outcome::read(&folder.path("out")), expected, "{limit} {more:?}{finished}");
        let log = std::fs::read_to_string(folder.path("out/log/rank-2.log")).unwrap();
        assert!(
            log.lines().any(|line| line.contains("gradients") && line.contains(told)),
            "{limit}: {log}"
        );
    }
}

/// Which ranks hold which places changes nothing.
#[test]
fn ranks_in_stage_major_order_equal_the_oracle() {
    compare("3x2", &["grid.order=stage-major", "microbatches=2", "eval.every=3"]);
    compare("3x2", &["grid.order=stage-major", "grid.placement=ring", "verify_every=2"]);
}

/// Links and groups are tested before the model is built, and ranks must be where the topology has them.
#[test]
fn the_grid_is_tested_and_its_topology_checked() {
    let folder = Folder::new();
    let plain = folder.train("out", &["grid.stages=2", "grid.replicas=2"], &["--self-test"]);
    let finished = run(mpirun(4, &slices(&plain)), LIMIT).expect_code(0);
    let lines =
        |word: &str| finished.stdout.lines().filter(|line| line.trim().starts_with(word)).count();
    assert_eq!((lines("link "), lines("group ")), (2, 2), "{finished}");
    let topology = |nodes: usize, devices: usize, order: &str| {
        let path = folder.path(&format!("{nodes}-{devices}.toml"));
        let speed = "gbit_s = 0.001\nlatency_us = 1e6";
        let text = format!(
            "nodes = {nodes}\ndevices = {devices}\norder = \"{order}\"\n[inside]\n{speed}\n[between]\n{speed}\n"
        );
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let with = |topology: &str| {
        let args =
            folder.train("out", &["grid.stages=2", "grid.replicas=2"], &["--topology", topology]);
        run(mpirun(4, &slices(&args)), LIMIT)
    };
    let finished = with(&topology(1, 4, "stage-major")).expect_code(0);
    assert!(finished.stdout.contains("replica 0  [rank 0] -- [rank 2]"), "{finished}");
    assert!(!finished.stdout.contains("is slow"), "{finished}");
    for (topology, expected) in [
        (topology(2, 2, "replica-major"), "rank 2 of node 1 on "),
        (
            topology(1, 3, "replica-major"),
            "`grid`: found 2x2 = 4 devices; the topology has 1 nodes of 3 = 3",
        ),
        (topology(1, 4, "middle-major"), "`--topology`: found "),
        (folder.text("none.toml"), "cannot be read"),
    ] {
        let finished = with(&topology).expect_code(2);
        let errors = finished.errors();
        assert!(errors.len() == 1 && errors[0].contains(expected), "{expected}: {finished}");
    }
    let finished = run(ouroboros(&slices(&plain)), LIMIT).expect_code(2);
    assert!(finished.errors()[0].contains("run it with mpirun"), "{finished}");
}

#[test]
fn ranks_with_a_tied_table_equal_the_oracle() {
    compare("4x1", &["grid.placement=ring", "eval.every=4"]);
    compare("3x2", &["grid.placement=ring", "model.tie=fresh", "microbatches=2"]);
    compare("2x2", &["model.tie=fresh", "model.tie_gradient=mean", "microbatches=2"]);
    compare("5x1", &["model.tie=none", "sync_at=[3]"]);
    compare("3x1", &["model.tie=fresh", "sync_at=[5]"]);
    compare("3x2", &["model.tie=head", "microbatches=2", "sync_at=[5]"]);
    compare("4x1", &["model.tie=head", "grid.placement=ring"]);
}

/// Streams that end after five steps, evaluated in six.
const XL: [&str; 4] =
    ["model.arch=transformer-xl", "model.mem_len=8", "data.synthetic=1500", "data.held_out=0.3"];

#[test]
fn ranks_of_transformer_xl_equal_the_oracle() {
    let xl = |grid: &str, more: &[&str]| compare(grid, &[&XL[..], more].concat());
    xl("2x2", &["microbatches=2", "eval.every=4", "eval.batch=6", "eval.mem_len=12"]);
    xl("4x1", &["grid.placement=ring", "recompute=true", "model.dropout=0.1"]);
    xl(
        "3x2",
        &["grid.placement=ring", "microbatches=3", "model.norm=pre", "model.attention_dropout=0.1"],
    );
    xl("2x1", &["model.tie=fresh", "model.same_length=true", "schedule=gpipe", "microbatches=2"]);
    xl("6x1", &["model.clamp_len=4", "microbatches=2", "model.tie=none"]);
}

#[test]
fn ranks_of_word_models_equal_the_oracle() {
    let words = [
        "data.tokenizer=words",
        "data.min_count=2",
        "data.synthetic=9000",
        "model.cutoffs=[20, 60]",
    ];
    let words = |grid: &str, more: &[&str]| compare(grid, &[&words[..], more].concat());
    words("2x2", &["microbatches=2", "eval.every=4"]);
    words(
        "3x1",
        &["model.div_val=2", "grid.placement=ring", "model.arch=transformer-xl", "model.mem_len=8"],
    );
    words(
        "2x1",
        &["model.embedding_width=8", "model.head_width=12", "model.tie=none", "recompute=true"],
    );
}

/// 12 layers on 11 stages and 64 layers on 4, from their configs.
#[test]
fn the_wide_and_the_deep_grid_equal_the_oracle() {
    for (config, ranks, steps) in
        [("configs/wide-11.toml", 11, "steps=14"), ("configs/deep-64l.toml", 4, "steps=3")]
    {
        let folder = Folder::new();
        let (grid, oracle) = (folder.text("grid"), folder.text("oracle"));
        let train = |out: &str| {
            ["train", config, "--set", steps, "--set", "data.synthetic=40000", "--out", out]
                .map(str::to_owned)
                .to_vec()
        };
        run(mpirun(ranks, &slices(&train(&grid))), 120).expect_code(0);
        let of_oracle = [train(&oracle), vec!["--oracle".to_owned()]].concat();
        run(ouroboros(&slices(&of_oracle)), 120).expect_code(0);
        let (grid, oracle) =
            (Outcome::read(&folder.path("grid")), Outcome::read(&folder.path("oracle")));
        assert_eq!(grid, oracle, "{config}");
        assert_eq!(grid.stages(), ranks, "{config}");
    }
}

/// Resident memory of a stage stays within the prediction. The heap gives every page back at once here, so that holes between
/// blocks, which are its affair, do not count.
#[test]
fn peak_memory_is_as_predicted() {
    let xl = ["model.arch=transformer-xl", "model.mem_len=128", "eval.every=2", "eval.batch=3"];
    let recompute = ["recompute=true", "model.dropout=0.1"];
    let blocks = ["recompute=blocks", "microbatches=2", "staleness.every=4"];
    let llama = ["model.arch=llama", "model.kv_heads=2", "model.qk_norm=true", "model.dropout=0.1"];
    let vocabulary = ["model.arch=llama", "model.vocabulary=20000", "model.loss_chunk_mib=4"];
    let (stages, replicas) = ("grid.stages=2", "grid.replicas=2");
    for (grid, more) in [
        (stages, &[][..]),
        (stages, &xl),
        (stages, &llama),
        (stages, &vocabulary),
        (stages, &[&xl[..], &recompute].concat()),
        (stages, &blocks),
        (stages, &[&xl[..], &blocks].concat()),
        // Most of it are weights, moments and gradient, of which the other's half must not count.
        (replicas, &["model.tie=none", "model.d_model=384", "model.d_ff=1536", "batch=6"]),
    ] {
        let sizes = [
            "model.d_model=192",
            "model.heads=4",
            "model.d_ff=768",
            "data.sequence=128",
            "data.synthetic=100000",
        ];
        let sets = [&sizes[..], &["microbatches=3", grid, "steps=4"], more].concat();
        let folder = Folder::new();
        let mut command = mpirun(2, &slices(&folder.train("out", &sets, &[])));
        command.env("MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0");
        let finished = run(command, 120).expect_code(0);
        let rows: Vec<Vec<f64>> = finished
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix("stage ")?.split_once("replica "))
            .filter_map(|(_, row)| row.split_whitespace().skip(1).map(|n| n.parse().ok()).collect())
            .collect();
        assert_eq!(rows.len(), 2, "{finished}");
        for row in rows {
            // Where every freed page is given back the heap has no holes.
            let (predicted, measured) = (row[7] - row[5], row[8]);
            // MPI's shared memory and buffers come on top, whatever the size of the model.
            assert!(
                measured < predicted * 1.05 + 8.0,
                "predicted {predicted} MiB, measured {measured} MiB{finished}"
            );
            assert!(
                measured > predicted * 0.8,
                "predicted {predicted} MiB, measured {measured} MiB{finished}"
            );
        }
    }
}

/// The softmax of a cluster is made for the tokens that fall into it: 2,048 tokens a microbatch over 60,000 words would
/// be 470 MiB of logits alone.
#[test]
fn clusters_cost_memory_by_their_tokens() {
    let folder = Folder::new();
    let mut text = "all of the time the same few words and no other\n".repeat(200_000);
    (0..60_000)
        .for_each(|i| text.push_str(&format!("word{i}{}", if i % 10 == 9 { "\n" } else { " " })));
    std::fs::write(folder.path("words.txt"), text).unwrap();
    std::fs::write(folder.path("held.txt"), "all of the time\n".repeat(20)).unwrap();
    let path = format!("data.path={}", folder.text("words.txt"));
    let held = format!("data.held_out={}", folder.text("held.txt"));
    let tiny = crate::harness::TINY.replace("synthetic = 4000\n", "");
    std::fs::write(folder.path("tiny.toml"), tiny).unwrap();
    let sets = [
        "data.tokenizer=words",
        "batch=64",
        "data.sequence=32",
        "model.cutoffs=[100]",
        &held,
        &path,
    ];
    let finished = run(mpirun(1, &slices(&folder.train("out", &sets, &[]))), 120).expect_code(0);
    let row = finished.stdout.lines().find(|line| line.starts_with("stage 0, replica 0 ")).unwrap();
    let numbers: Vec<f64> =
        row.split_whitespace().skip(4).map(|number| number.parse().unwrap()).collect();
    let (predicted, measured) = (numbers[5], numbers[6]);
    assert!(
        measured < 200.0 && predicted < 150.0,
        "{predicted} MiB predicted, {measured} MiB measured{finished}"
    );
}

/// One error, whoever finds it, and no rank is left. Where there is a GPU, scripts/gpu-check.sh looks at the rest.
#[test]
fn a_gpu_that_is_not_there_is_told_once() {
    if ouroboros::device::driver::find().is_ok() {
        return;
    }
    let folder = Folder::new();
    let missing = "setting `device`: found `cuda`, but ";
    for (set, expected) in [
        ("device=cuda", missing),
        ("precision=tf32", "setting `precision`: found `tf32` on a processor"),
    ] {
        let alone =
            run(ouroboros(&slices(&folder.train("out", &[set], &[]))), LIMIT).expect_code(2);
        let ranks =
            run(mpirun(2, &slices(&folder.train("out", &[set], &["--grid", "2x1"]))), LIMIT)
                .expect_code(2);
        for finished in [alone, ranks] {
            let errors = finished.errors();
            assert!(errors.len() == 1 && errors[0].contains(expected), "{set}: {finished}");
        }
    }
    compare("2x1", &["device=auto", "deterministic=true"]);
}
