//! Threads against the oracle, bit for bit: every metric and every byte of the weights, over drawn configurations.

use std::collections::BTreeSet;
use std::sync::Arc;

use ouroboros::control::Mode;
use ouroboros::coordinator::Coordinator;
use ouroboros::error::Error;
use ouroboros::launch::run_local;
use ouroboros::number::Readback;
use ouroboros::setup::Setup;

use crate::harness::{Draw, as_threads, by_oracle, tiny};

/// Drawn configurations: of the Transformer, then of the Transformer-XL.
const DRAWN: usize = 80;
const DRAWN_XL: usize = 64;
const DRAWN_WORDS: usize = 48;
const ALL: usize = DRAWN + DRAWN_XL + DRAWN_WORDS;
const LAYERS: usize = 6;

/// The keys of configuration `number`, and the names of what it covers.
fn drawn(number: usize) -> (Vec<String>, BTreeSet<&'static str>) {
    let mut draw = Draw::new(number as u64 * 7919 + 13);
    let (mut sets, mut covers, mut covers_more) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    let mut cover = |name: &'static str, set: String| {
        covers.insert(name);
        sets.push(set);
    };
    let stages = [1, 2, 2, 3, 3, 4, 5, LAYERS, LAYERS][draw.below(9)];
    let replicas = [1, 1, 2, 2, 3][draw.below(5)];
    let microbatches = [1, 1, 2, 4][draw.below(4)];
    let steps = 6 + draw.below(5);
    cover(
        ["one replica", "replicas", "replicas"][replicas - 1],
        format!("grid.replicas={replicas}"),
    );
    cover(
        if stages == LAYERS { "K = layers" } else { "K < layers" },
        format!("grid.stages={stages}"),
    );
    cover(if microbatches > 1 { "m > 1" } else { "m = 1" }, format!("microbatches={microbatches}"));
    cover("steps", format!("steps={steps}"));
    let kind =
        ["decoupled", "decoupled", "decoupled", "1f1b", "gpipe", "sequential"][draw.below(6)];
    cover(kind, format!("schedule={kind}"));
    let slack = [1, 1, 2, 3][draw.below(4)];
    cover(if slack > 1 { "slack" } else { "no slack" }, format!("slack={slack}"));
    if kind == "decoupled" && draw.one_in(4) {
        let least = |k: usize| (slack * (stages - 1 - k)).div_ceil(microbatches);
        let delays: Vec<String> =
            (0..stages).map(|k| (least(k) + draw.below(3)).to_string()).collect();
        cover("hand-made delays", format!("grid.delays=[{}]", delays.join(", ")));
    }
    let tie = ["aligned", "head", "fresh", "none"][draw.below(4)];
    cover(tie, format!("model.tie={tie}"));
    if tie != "none" && draw.one_in(3) {
        cover("mean of the parts", "model.tie_gradient=mean".into());
    }
    if stages > 2 && draw.one_in(2) {
        cover("ring", "grid.placement=ring".into());
        if tie != "none" {
            covers_more.insert("tied ring");
        }
    }
    if draw.one_in(3) {
        cover("recompute", "recompute=true".into());
    }
    if draw.one_in(3) {
        cover("dropout", "model.dropout=0.2".into());
    }
    if draw.one_in(2) {
        cover("clipping", "optimizer.clip=0.05".into());
    }
    if draw.one_in(3) {
        cover("sgd", "optimizer.kind=sgd".into());
    }
    if draw.one_in(3) {
        cover("odd sync points", format!("sync_at=[{}, {}]", 1 + draw.below(2), 3 + draw.below(3)));
    }
    if draw.one_in(3) {
        cover("synchronous warm-up", format!("sync_steps={}", 1 + draw.below(4)));
    }
    if draw.one_in(3) {
        cover("evaluation", format!("eval.every={}", 1 + draw.below(4)));
        cover("evaluation", format!("eval.tokens={}", 24 + draw.below(80)));
    }
    if stages > 1 && stages < LAYERS && draw.one_in(2) {
        let mut counts = vec![1; stages];
        for _ in stages..LAYERS {
            counts[draw.below(stages)] += 1;
        }
        cover("uneven layers", format!("grid.layers_per_stage={counts:?}"));
    }
    // A draw of its own, so that the others stay what they were.
    let mut travel = Draw::new(number as u64 * 104_729 + 7);
    if travel.one_in(3) {
        cover(if stages > 1 { "bf16 between stages" } else { "bf16" }, "wire=bf16".into());
        if replicas > 1 {
            covers_more.insert("bf16 between replicas");
        }
    }
    if replicas > 1 && travel.one_in(2) {
        cover("several buckets", format!("bucket_kib={}", 1 + travel.below(12)));
    }
    if travel.one_in(4) {
        cover("bf16 weights and activations", "precision=bf16".into());
    }
    if travel.one_in(4) {
        cover("recompute by blocks", "recompute=blocks".into());
    }
    let mut measured = Draw::new(number as u64 * 32_452_843 + 5);
    if measured.one_in(3) {
        let by_hand = if covers.contains("hand-made delays") { 2 } else { 0 };
        let longest = (slack * (stages - 1)).div_ceil(microbatches) + by_hand;
        let least = if kind == "decoupled" { longest + 2 } else { 2 };
        let every = least + measured.below(2);
        covers_more.insert("staleness");
        if kind == "decoupled" && stages > 1 && every + 1 < steps {
            covers_more.insert("staleness of something old");
        }
        sets.push(format!("staleness.every={every}"));
    }
    covers.extend(covers_more);
    if number < DRAWN {
        draw_family(&mut Draw::new(number as u64 * 15_485_863 + 3), &mut sets, &mut covers);
    }
    if number >= DRAWN + DRAWN_XL {
        draw_words(&mut draw, &mut sets, &mut covers);
    }
    if number >= DRAWN && (number < DRAWN + DRAWN_XL || draw.one_in(2)) {
        draw_xl(&mut draw, &mut sets, &mut covers);
    }
    if number.is_multiple_of(2) && covers.contains("narrow clusters") {
        covers.insert("every cluster projected");
        sets.push("model.project_all=true".to_owned());
    }
    if number.is_multiple_of(2) && covers.contains("pre-LN") {
        covers.insert("no normalisation before the head");
        sets.push("model.final_norm=false".to_owned());
    }
    if number % 5 == 1 {
        covers.insert("heads of a width of their own");
        sets.push("model.d_head=6".to_owned());
    }
    if number % 3 != 2 && stages == 1 && covers.contains("transformer-xl") {
        covers.insert("shared biases");
        sets.push("model.shared_biases=true".to_owned());
    }
    (sets, covers)
}

/// Makes it a GPT-2 or a Llama, or leaves it, and cuts the loss in chunks.
fn draw_family(draw: &mut Draw, sets: &mut Vec<String>, covers: &mut BTreeSet<&'static str>) {
    let mut cover = |name: &'static str, set: &str| {
        covers.insert(name);
        sets.push(set.to_owned());
    };
    if draw.one_in(5) {
        cover("several chunks of the loss", "model.vocabulary=20000");
        cover("several chunks of the loss", "model.loss_chunk_mib=1");
    }
    if draw.one_in(4) {
        cover("z-loss", "model.z_loss=0.01");
    }
    match draw.below(3) {
        0 => return,
        1 => return cover("gpt2", "model.arch=gpt2"),
        _ => cover("llama", "model.arch=llama"),
    }
    if draw.one_in(2) {
        cover("shared keys", "model.kv_heads=1");
    }
    if draw.one_in(2) {
        cover("normalised heads", "model.qk_norm=true");
    }
    match draw.below(4) {
        0 => cover("biases of queries", "model.attention_bias=qkv"),
        1 => cover("biases of the attention", "model.attention_bias=all"),
        _ => {}
    }
    if draw.one_in(3) {
        let scaling = "model.rope_scaling={ kind = \"linear\", factor = 2.0 }";
        cover("stretched positions", scaling);
    }
}

/// Makes it a Transformer-XL over streams that end after five steps.
fn draw_xl(draw: &mut Draw, sets: &mut Vec<String>, covers: &mut BTreeSet<&'static str>) {
    let mut cover = |name: &'static str, set: &str| {
        covers.insert(name);
        sets.push(set.to_owned());
    };
    cover("transformer-xl", "model.arch=transformer-xl");
    cover("transformer-xl", "data.held_out=0.3");
    let mem_len = [0, 4, 8, 8, 13][draw.below(5)];
    let names = [
        "no memory",
        "memory shorter than a segment",
        "memory of a segment",
        "",
        "memory longer than a segment",
    ];
    let name = names[match mem_len {
        0 => 0,
        4 => 1,
        8 => 2,
        _ => 4,
    }];
    cover(name, &format!("model.mem_len={mem_len}"));
    if mem_len > 0 && draw.one_in(3) {
        cover("same length", "model.same_length=true");
    }
    if draw.one_in(3) {
        cover("clamped", "model.clamp_len=5");
    }
    if draw.one_in(3) {
        cover("pre-LN", "model.norm=pre");
    }
    if draw.one_in(3) {
        cover("attention dropout", "model.attention_dropout=0.2");
    }
    if !sets.iter().any(|set| set.starts_with("data.synthetic")) {
        sets.push("data.synthetic=1500".to_owned());
    }
    if sets_evaluation(sets) {
        if mem_len == 0 {
            sets.push("data.order=streams".to_owned());
        }
        sets.push("eval.batch=6".to_owned());
        if draw.one_in(2) {
            covers.insert("evaluation with lengths of its own");
            sets.push("eval.sequence=5".to_owned());
            if mem_len > 0 {
                sets.push("eval.mem_len=11".to_owned());
            }
        }
    }
    let has = |text: &str| sets.iter().any(|set| set.starts_with(text));
    if mem_len > 0 && has("recompute") {
        covers.insert("recompute with memory");
    }
    if mem_len > 0 && has("grid.placement") {
        covers.insert("ring with memory");
    }
    if mem_len > 0 && has("grid.stages") && !has("grid.stages=1") && has("model.tie=aligned") {
        covers.insert("tied pipeline with memory");
    }
}

/// Characters or words, one cluster of the vocabulary or several.
fn draw_words(draw: &mut Draw, sets: &mut Vec<String>, covers: &mut BTreeSet<&'static str>) {
    let tied = !sets.iter().any(|set| set == "model.tie=none");
    let mut cover = |name: &'static str, set: &str| {
        covers.insert(name);
        sets.push(set.to_owned());
    };
    if draw.one_in(5) {
        cover("characters", "data.tokenizer=characters");
        cover("characters", "data.synthetic=4000");
    } else {
        cover("words", "data.tokenizer=words");
        cover("words", "data.min_count=2");
        cover("words", "data.synthetic=9000");
        match draw.below(3) {
            0 => cover("two cut-offs", "model.cutoffs=[20, 60]"),
            1 => cover("one cut-off", "model.cutoffs=[40]"),
            _ => {}
        }
        if draw.one_in(2) && covers_clusters(covers) {
            covers.insert("narrow clusters");
            sets.push("model.div_val=2".to_owned());
        }
    }
    if draw.one_in(3) {
        covers.insert("narrow embedding");
        sets.push("model.embedding_width=12".to_owned());
        if tied {
            sets.push("model.head_width=12".to_owned());
        }
    }
}

fn covers_clusters(covers: &BTreeSet<&str>) -> bool {
    covers.contains("two cut-offs") || covers.contains("one cut-off")
}

fn sets_evaluation(sets: &[String]) -> bool {
    sets.iter().any(|set| set.starts_with("eval."))
}

#[test]
fn drawn_grids_equal_the_oracle_bit_for_bit() {
    compare(0..DRAWN);
}

#[test]
fn drawn_grids_of_transformer_xl_equal_the_oracle_bit_for_bit() {
    compare(DRAWN..DRAWN + DRAWN_XL);
}

#[test]
fn drawn_grids_of_words_equal_the_oracle_bit_for_bit() {
    compare(DRAWN + DRAWN_XL..ALL);
}

/// Microbatches of a thousand tokens, whose products other kernels may make (`src/model/linear.rs`) than those of a few.
#[test]
fn large_microbatches_equal_the_oracle_bit_for_bit() {
    let large = [
        "data.sequence=64",
        "data.synthetic=100000",
        "batch=64",
        "microbatches=2",
        "grid.stages=2",
        "grid.replicas=2",
        "steps=4",
        "eval.every=2",
    ];
    let xl = ["model.arch=transformer-xl", "model.mem_len=64"];
    for more in [&[][..], &["recompute=true"], &["recompute=blocks", "model.dropout=0.1"], &xl] {
        let setup = tiny(&[&large[..], more].concat());
        assert!(setup.rows * 64 >= 1024);
        assert_eq!(as_threads(&setup), by_oracle(&setup), "{more:?}");
    }
}

/// Biases that all layers share, whose layers run one by one: their gradients are added up as one
/// graph does it, before they join those of the other microbatches.
#[test]
fn shared_biases_by_blocks_equal_the_oracle_bit_for_bit() {
    let sets = [
        "model.arch=transformer-xl",
        "model.mem_len=13",
        "model.shared_biases=true",
        "recompute=blocks",
        "microbatches=4",
        "data.held_out=0.3",
        "data.synthetic=1500",
        "steps=12",
    ];
    for tie in ["model.tie=none", "model.tie=aligned"] {
        let setup = tiny(&[&sets[..], &[tie]].concat());
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "{tie}");
        assert!(grid.weights == oracle.weights, "{tie}");
    }
}

/// Losses and norms that are read steps later, as on a GPU, are the same numbers.
#[test]
fn numbers_that_are_read_later_are_the_same() {
    for number in (0..ALL).step_by(9) {
        let (sets, _) = drawn(number);
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let setup = tiny(&sets);
        let setup =
            Arc::new(Setup { readback: Readback::Deferred, ..Arc::into_inner(setup).unwrap() });
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "metrics of configuration {number}: {sets:?}");
        assert!(grid.weights == oracle.weights, "weights of configuration {number}: {sets:?}");
    }
}

/// Whoever looks later still names the step that a loss or a gradient belongs to.
#[test]
fn a_loss_that_is_not_finite_is_found_later() {
    let step = |readback: Readback| {
        let setup = tiny(&["optimizer.lr=1e30", "optimizer.warmup=0"]);
        let setup = Arc::new(Setup { readback, ..Arc::into_inner(setup).unwrap() });
        let out = tempfile::tempdir().unwrap();
        let coordinator = Coordinator::new(Arc::clone(&setup), out.path()).unwrap();
        let error = run_local(&setup, out.path(), coordinator, Mode::default()).unwrap_err().1;
        let Error::NotFinite { step, .. } = error else { panic!("{error}") };
        step
    };
    assert_eq!(step(Readback::Deferred), step(Readback::Now));
}

fn compare(numbers: std::ops::Range<usize>) {
    for number in numbers {
        let (sets, _) = drawn(number);
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let setup = tiny(&sets);
        let (grid, oracle) = (as_threads(&setup), by_oracle(&setup));
        assert_eq!(grid.lines, oracle.lines, "metrics of configuration {number}: {sets:?}");
        assert!(grid.weights == oracle.weights, "weights of configuration {number}: {sets:?}");
        assert_eq!(grid.losses().len(), setup.config.steps, "{sets:?}");
        assert_eq!(grid.stages(), setup.grid.stages, "{sets:?}");
    }
}

/// The draws cover what they are meant to cover, each at least four times.
#[test]
fn the_draws_cover_everything() {
    let wanted = [
        "staleness",
        "staleness of something old",
        "gpt2",
        "llama",
        "shared keys",
        "normalised heads",
        "biases of queries",
        "biases of the attention",
        "stretched positions",
        "several chunks of the loss",
        "z-loss",
        "one replica",
        "replicas",
        "K = layers",
        "K < layers",
        "m = 1",
        "m > 1",
        "heads of a width of their own",
        "shared biases",
        "decoupled",
        "1f1b",
        "gpipe",
        "sequential",
        "slack",
        "hand-made delays",
        "recompute",
        "recompute by blocks",
        "dropout",
        "clipping",
        "sgd",
        "odd sync points",
        "synchronous warm-up",
        "evaluation",
        "uneven layers",
        "bf16 between stages",
        "bf16 between replicas",
        "bf16 weights and activations",
        "several buckets",
        "aligned",
        "head",
        "fresh",
        "none",
        "mean of the parts",
        "ring",
        "tied ring",
        "transformer-xl",
        "no memory",
        "memory shorter than a segment",
        "memory of a segment",
        "memory longer than a segment",
        "same length",
        "clamped",
        "pre-LN",
        "no normalisation before the head",
        "attention dropout",
        "evaluation with lengths of its own",
        "recompute with memory",
        "ring with memory",
        "tied pipeline with memory",
        "characters",
        "words",
        "one cut-off",
        "two cut-offs",
        "narrow clusters",
        "every cluster projected",
        "narrow embedding",
    ];
    for name in wanted {
        let count = (0..ALL).filter(|number| drawn(*number).1.contains(name)).count();
        assert!(count >= 4, "{name}: {count} of {ALL}");
    }
}

/// The comparison can fail: a delay of one more on one stage changes the losses from the first step that feels it.
#[test]
fn a_wrong_delay_would_be_seen() {
    let right = as_threads(&tiny(&["grid.stages=3", "steps=8"])).losses();
    let wrong = by_oracle(&tiny(&["grid.stages=3", "steps=8", "grid.delays=[3, 1, 0]"])).losses();
    // Step 3 is the first whose version differs: max(0, 3 - 2) against max(0, 3 - 3).
    assert_eq!(right[..3], wrong[..3]);
    assert_ne!(right[3], wrong[3]);
}

/// With one stage, and with every step a sync point, a fresh head is an aligned one.
#[test]
fn a_fresh_head_without_delay_is_an_aligned_one() {
    for keys in [
        &["grid.stages=1", "microbatches=2"][..],
        &["grid.stages=4", "schedule=1f1b", "microbatches=3"],
        &["grid.stages=3", "sync_steps=8", "grid.placement=ring", "optimizer.predict=update"],
    ] {
        let run = |tie| as_threads(&tiny(&[keys, &["steps=8", tie]].concat()));
        assert_eq!(run("model.tie=head"), run("model.tie=aligned"), "{keys:?}");
    }
    // With delays it is not.
    let losses = |tie| as_threads(&tiny(&["grid.stages=3", "steps=8", tie])).losses();
    assert_ne!(losses("model.tie=head"), losses("model.tie=aligned"));
}

/// The oracle can evaluate the weights as they stand, which changes nothing of the training.
#[test]
fn the_oracle_evaluates_without_a_sync_point() {
    let keys = ["grid.stages=3", "steps=12", "optimizer.predict=update", "eval.tokens=80"];
    let lines = |more: &[&str]| by_oracle(&tiny(&[&keys, more].concat())).lines;
    let of = |lines: &[serde_json::Value], key: &str| -> Vec<(u64, f64)> {
        lines
            .iter()
            .filter_map(|line| Some((line["step"].as_u64()?, line.get(key)?.as_f64()?)))
            .collect()
    };
    let (rare, often, drained) = (
        lines(&["eval.every=100"]),
        lines(&["eval.every=3", "eval.drain=false"]),
        lines(&["eval.every=3"]),
    );
    assert_eq!(of(&rare, "loss"), of(&often, "loss"));
    assert_ne!(of(&rare, "loss"), of(&drained, "loss"));

    let steps = of(&often, "eval_loss").into_iter().map(|(step, _)| step).collect::<Vec<_>>();
    assert_eq!(steps, [3, 6, 9, 12]);
    // The first is of the same weights; so is the last, of which nothing is under way.
    assert_eq!(of(&often, "eval_loss")[0], of(&drained, "eval_loss")[0]);
    assert_eq!(of(&often, "eval_loss").last(), of(&rare, "eval_loss").last());
}

/// Delays far above what the lag needs keep many parts of the tied table under way between the two ends.
#[test]
fn long_delays_do_not_fill_the_links() {
    for tie in ["model.tie=fresh", "model.tie=aligned", "model.tie=head"] {
        let setup =
            tiny(&["grid.stages=2", "microbatches=4", "grid.delays=[9, 0]", "steps=16", tie]);
        assert_eq!(as_threads(&setup), by_oracle(&setup), "{tie}");
    }
}

/// Losses depend on delays, not on how the run is cut into messages: recompute changes no bit, nor does slack that
/// leaves the delays as they are.
#[test]
fn machinery_does_not_change_numbers() {
    let keys = ["grid.stages=3", "microbatches=4", "model.dropout=0.1"];
    let plain = as_threads(&tiny(&keys));
    for recompute in ["recompute=true", "recompute=blocks"] {
        assert_eq!(as_threads(&tiny(&[&keys[..], &[recompute]].concat())), plain);
    }
    assert_eq!(
        as_threads(&tiny(&[&keys[..], &["slack=2"]].concat())),
        plain,
        "ceil(2 q / 4) = ceil(q / 4) here"
    );
    // Rounding on the wire does.
    assert_ne!(as_threads(&tiny(&[&keys[..], &["wire=bf16"]].concat())), plain);
    let replicas = as_threads(&tiny(&["grid.replicas=2"]));
    assert_eq!(as_threads(&tiny(&["grid.replicas=2", "bucket_kib=2"])), replicas);
    assert_ne!(as_threads(&tiny(&["grid.replicas=2", "wire=bf16"])), replicas);
    assert_eq!(as_threads(&tiny(&["wire=bf16"])), as_threads(&tiny(&[])), "nothing travels");
    // What is bf16 already travels as it is.
    let narrow = [&keys[..], &["precision=bf16"]].concat();
    let plain = as_threads(&tiny(&narrow));
    assert_eq!(as_threads(&tiny(&[&narrow[..], &["recompute=true"]].concat())), plain);
    assert_eq!(as_threads(&tiny(&[&narrow[..], &["wire=bf16"]].concat())), plain);
}
