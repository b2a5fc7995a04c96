//! What a user types and gets: commands, exit codes, messages that come once.

use std::path::Path;

use ouroboros::config::Config;
use ouroboros::grid::Grid;
use ouroboros::setup::Setup;

use crate::harness::{Finished, Folder, TINY, mpirun, ouroboros, run, slices};

const LIMIT: u64 = 60;

fn program(args: &[&str]) -> Finished {
    run(ouroboros(args), LIMIT)
}

#[test]
fn schedules_show_delays_and_speed_up() {
    for (args, expected) in [
        (
            &["--grid", "4x1", "-m", "1"][..],
            ["delays            3 2 1 0", "ideal speed-up    4.00 of 4"],
        ),
        (
            &["--grid", "11x1", "-m", "8"][..],
            ["delays            2 2 1 1 1 1 1 1 1 1 0", "ideal speed-up    11.00 of 11"],
        ),
        (
            &["--schedule", "1f1b", "--grid", "4x1", "-m", "4"][..],
            ["delays            0 0 0 0", "ideal speed-up    2.29 of 4"],
        ),
        (
            &["--grid", "4x1", "-m", "1", "--tie", "fresh"][..],
            [
                "ideal speed-up    2.00 of 4 devices",
                "before a drain    2.11 over the 30 steps up to a sync point",
            ],
        ),
        (
            &["--grid", "4x1", "-m", "1", "--tie", "head"][..],
            [
                "table's delay     head 0, embedding 3; its part is applied 6 updates old",
                "ideal speed-up    4.00 of 4 devices",
            ],
        ),
        (
            &["--grid", "5x1", "--placement", "ring"][..],
            ["devices           0 1 2 3 0", "ideal speed-up    4.00 of 4 devices"],
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
    program(&["schedule", "--grid", "2x1", "--placement", "ring"]).expect_code(2);
}

#[test]
fn train_eval_and_generate() {
    let folder = Folder::new();
    let args = folder.train("out", &["eval.every=3", "steps=6"], &["--grid", "2x1"]);
    let finished = program(&slices(&args)).expect_code(0);
    assert!(finished.stdout.contains("entropy floor"), "{finished}");
    for file in
        ["config.toml", "metrics.jsonl", "log/rank-0.log", "checkpoints/step-6/manifest.json"]
    {
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
    assert!((shown_loss(&finished) / last_eval(&metrics) - 1.0).abs() < 2e-6, "{finished}");
    let generate = |seed: &str| {
        program(&["generate", &out, "--prompt", "ban", "--tokens", "40", "--seed", seed])
            .expect_code(0)
            .stdout
    };
    assert!(generate("1").starts_with("ban"));
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));
    program(&["eval", &out, "--set", "data.sequence=9"]).expect_code(2);
    for (set, expected) in [
        (
            "model.layers=3",
            "of a saved model only mem_len, clamp_len, same_length, loss_chunk_mib and z_loss can be changed",
        ),
        ("data.tokenizer=characters", "the model was trained on bytes"),
    ] {
        let finished = program(&["eval", &out, "--set", set]).expect_code(2);
        assert!(finished.stderr.contains(expected), "{finished}");
    }
    let manifest = folder.path("out/checkpoints/step-6/manifest.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"format\": 4", "\"format\": 1")).unwrap();
    let finished = program(&["eval", &out]).expect_code(6);
    assert!(
        finished.stderr.contains("format 1 is not known to this version, which reads 4"),
        "{finished}"
    );
    std::fs::write(&manifest, text).unwrap();
    program(&["eval", &folder.text("nothing")]).expect_code(6);
    std::fs::write(folder.path("out/checkpoints/step-6/stage-1.safetensors"), b"short").unwrap();
    let finished = program(&["eval", &out]).expect_code(6);
    assert!(finished.stderr.contains("stage-1.safetensors: 5 bytes instead of"), "{finished}");
}

/// The loss that `eval` prints.
fn shown_loss(finished: &Finished) -> f64 {
    let line = finished.stdout.lines().find_map(|line| line.strip_prefix("loss ")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Every kind of model and vocabulary can be evaluated and continued from what training saved.
#[test]
fn every_model_is_evaluated_and_continued() {
    let xl = ["model.arch=transformer-xl", "model.mem_len=8", "eval.batch=6", "data.held_out=0.3"];
    let words = ["data.tokenizer=words", "data.min_count=2", "data.synthetic=20000"];
    let table: [(Vec<&str>, &str, &str); 4] = [
        ([&xl[..], &["data.synthetic=2000"]].concat(), "bits per byte", "ban"),
        (
            ["data.tokenizer=characters", "data.synthetic=20000"].to_vec(),
            "bits per character",
            "ban",
        ),
        ([&xl[..], &words[..], &["model.cutoffs=[20, 60]"]].concat(), "perplexity", "ban: lo"),
        (
            [&words[..], &["model.cutoffs=[30]", "model.div_val=4"]].concat(),
            "perplexity",
            "ban: lo\nker: nonsense",
        ),
    ];
    for (i, (sets, measure, prompt)) in table.iter().enumerate() {
        let folder = Folder::new();
        let sets = [&sets[..], &["eval.every=3"]].concat();
        let grid = ["--grid", ["1x1", "2x1", "3x1", "2x2"][i]];
        program(&slices(&folder.train("out", &sets, &grid))).expect_code(0);
        let metrics = std::fs::read_to_string(folder.path("out/metrics.jsonl")).unwrap();
        let last: serde_json::Value =
            serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        assert_eq!(last.get("eval_ppl").is_some(), *measure == "perplexity", "{last}");
        assert_eq!(last.get("eval_bpc").is_some(), *measure != "perplexity", "{last}");
        let out = folder.text("out");
        let finished = program(&["eval", &out]).expect_code(0);
        assert!(finished.stdout.contains(measure), "{measure}{finished}");
        assert!(
            (shown_loss(&finished) / last["eval_loss"].as_f64().unwrap() - 1.0).abs() < 2e-6,
            "{last}{finished}"
        );
        let generate = |more: &[&str]| {
            let args = [&["generate", &out, "--prompt", prompt, "--tokens", "30"], more].concat();
            program(&args).expect_code(0).stdout
        };
        let text = generate(&["--top-p", "0.9", "--seed", "5"]);
        assert!(text.starts_with(&prompt.replace("nonsense", "<unk>")), "{text}");
        assert_eq!(generate(&["--top-p", "0.9", "--seed", "5"]), text);
        assert_eq!(generate(&["--temperature", "0"]), generate(&["--top-k", "1"]));
        program(&["generate", &out, "--top-p", "0"]).expect_code(2);
    }
}

#[test]
fn a_prompt_must_be_of_the_vocabulary() {
    let folder = Folder::new();
    std::fs::write(folder.path("tiny.toml"), TINY.replace("synthetic = 4000\n", "")).unwrap();
    std::fs::write(folder.path("words.txt"), "ban: a few words and no other, ban.\n".repeat(100))
        .unwrap();
    let path = format!("data.path={}", folder.text("words.txt"));
    program(&slices(&folder.train("out", &["data.tokenizer=words", &path], &[]))).expect_code(0);
    let out = folder.text("out");
    let finished = program(&["generate", &out, "--prompt", "ban: qwerty"]).expect_code(2);
    assert!(
        finished.stderr.contains("`--prompt`: found the word `qwerty` is not in the vocabulary"),
        "{finished}"
    );
    std::fs::remove_file(folder.path("out/checkpoints/step-6/vocabulary.json")).unwrap();
    program(&["eval", &out]).expect_code(6);
}

#[test]
fn doctor_tells_what_is_here() {
    let finished = program(&["doctor"]).expect_code(0);
    for word in ["libtorch    2.11.0", "MPI library", "mpirun", "cores"] {
        assert!(finished.stdout.contains(word), "{word}{finished}");
    }
    let finished = run(mpirun(3, &["doctor"]), LIMIT).expect_code(0);
    assert!(
        finished.stdout.contains("ranks       3") && finished.stdout.contains("rank 2"),
        "{finished}"
    );
    assert_eq!(finished.stdout.matches("MPI library").count(), 1, "{finished}");
}

/// Every bad input: exit code, one message that names the setting, whatever the number of ranks.
#[test]
fn bad_input_is_told_once_before_training() {
    let folder = Folder::new();
    std::fs::write(folder.path("empty.txt"), b"").unwrap();
    std::fs::write(folder.path("short.txt"), b"short").unwrap();
    std::fs::write(folder.path("binary.txt"), b"words \xff\n").unwrap();
    let binary = folder.text("binary.txt");
    let (missing, empty, short) =
        (folder.text("missing.txt"), folder.text("empty.txt"), folder.text("short.txt"));
    let held = |path: &str| format!("data.held_out={path}");
    let table: Vec<(Vec<String>, i32, &str)> = vec![
        (vec!["modle.layers=3".into()], 2, "`modle`: found an unknown key"),
        (
            vec!["steps=ten".into()],
            2,
            "`steps`: found invalid type: string \"ten\"; expected a whole number",
        ),
        (vec!["grid.stages=7".into()], 2, "`grid.stages`: found 7; at most model.layers = 6"),
        (
            vec!["batch=13".into(), "microbatches=2".into()],
            2,
            "`batch`: found 13; must be a multiple",
        ),
        (
            vec!["grid.stages=3".into(), "grid.delays=[1, 1, 0]".into()],
            2,
            "`grid.delays`: found [1, 1, 0]; stage 0 needs at least 2",
        ),
        (
            vec![
                "model.arch=transformer-xl".into(),
                "model.mem_len=8".into(),
                "data.order=shuffled".into(),
            ],
            2,
            "`model.mem_len`: found 8 with data.order = \"shuffled\"; a memory of shuffled windows means nothing",
        ),
        (
            vec!["model.mem_len=8".into()],
            2,
            "`model.mem_len`: found 8; only model.arch = \"transformer-xl\" has it",
        ),
        (
            vec!["grid.stages=2".into(), "grid.placement=ring".into()],
            2,
            "`grid.placement`: found `ring`; needs at least 3 stages, there are 2",
        ),
        (
            vec!["eval.every=3".into(), "eval.drain=false".into()],
            2,
            "`eval.drain`: found false; only the oracle reads the weights while steps are under way",
        ),
        (
            vec!["model.embedding_width=8".into()],
            2,
            "`model.embedding_width`: found 8, and a head_width of 16; a tied table has one width",
        ),
        (
            vec!["model.cutoffs=[100, 300]".into()],
            2,
            "`model.cutoffs`: found [100, 300]; rising numbers above 0",
        ),
        (
            vec!["model.div_val=2".into()],
            2,
            "`model.div_val`: found 2; means something with model.cutoffs only",
        ),
        (
            vec!["data.min_count=2".into()],
            2,
            "`data.min_count`: found 2; only data.tokenizer = \"words\" has it",
        ),
        (
            vec!["data.tokenizer=words".into(), "data.synthetic=20000".into(), held(&short)],
            3,
            "short.txt: the word `short` is not in the vocabulary, which has no `<unk>`",
        ),
        (vec!["data.tokenizer=words".into(), held(&binary)], 3, "binary.txt: no UTF-8 at byte 6"),
        (vec![held(&missing)], 3, "missing.txt: data.held_out names no file; name a text"),
        (vec![held(&empty)], 3, "empty.txt: empty"),
        (vec![held(&short), "eval.every=3".into()], 3, "short.txt: 5 bytes, one window needs 9"),
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
    assert!(
        finished.stderr.contains("`grid`: found 2x2 = 4 devices and 3 ranks; run mpirun -n 4"),
        "{finished}"
    );
    assert_eq!(finished.errors().len(), 1, "{finished}");
    let args = folder.train("out", &[], &["--oracle"]);
    let finished = run(mpirun(2, &slices(&args)), LIMIT).expect_code(2);
    assert!(finished.stderr.contains("--oracle is one process"), "{finished}");
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_training() {
    let folder = Folder::new();
    std::fs::write(folder.path("file"), b"").unwrap();
    for (command, ranks) in [(0, 1), (2, 2)] {
        let args = folder.train("file/out", &[], &["--grid", "2x1"]);
        let program =
            if command == 0 { ouroboros(&slices(&args)) } else { mpirun(ranks, &slices(&args)) };
        let finished = run(program, LIMIT).expect_code(2);
        assert!(
            finished.stderr.contains("setting `--out`")
                && finished.stderr.contains("choose another folder"),
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
        let finished = run(
            if ranks == 1 { ouroboros(&slices(&args)) } else { mpirun(2, &slices(&args)) },
            LIMIT,
        )
        .expect_code(5);
        assert_eq!(finished.errors().len(), 1, "{finished}");
        let line = finished.errors()[0].to_owned();
        assert!(
            line.contains("not finite: ") && line.contains(" at step ") && line.contains("stage "),
            "{finished}"
        );
        assert_eq!(std::fs::read(&shard).unwrap(), good, "{finished}");
    }
}

/// What an interrupted exchange of weights leaves behind does not stand in the way of the next run.
#[test]
fn weights_set_aside_by_an_interrupted_run_are_handled() {
    let folder = Folder::new();
    let args = folder.train("out", &[], &[]);
    program(&slices(&args)).expect_code(0);
    let (last, old) =
        (folder.path("out/checkpoints/step-6"), folder.path("out/checkpoints/step-6.old"));
    std::fs::rename(&last, &old).unwrap();
    std::fs::create_dir_all(folder.path("out/checkpoints/step-6.tmp")).unwrap();
    // A failing run brings the earlier weights back; one that succeeds replaces them.
    program(&slices(&folder.train("out", &["optimizer.lr=1e30", "optimizer.weight_decay=0"], &[])))
        .expect_code(5);
    assert!(last.join("manifest.json").exists() && !old.exists());
    std::fs::create_dir_all(&old).unwrap();
    std::fs::write(old.join("stale"), b"x").unwrap();
    program(&slices(&args)).expect_code(0);
    assert!(last.join("manifest.json").exists() && !old.exists());
}

#[test]
fn a_drill_that_cannot_happen_is_refused() {
    let folder = Folder::new();
    for more in [
        &["--inject", "panic@1,0:2"][..],
        &["--inject", "panic@0,0:6"],
        &["--inject", "alter-table@0,0:2"],
        &["--grid", "3x1", "--inject", "alter-table@1,0:2"],
        &["--oracle", "--inject", "panic@0,0:2"],
    ] {
        let finished = program(&slices(&folder.train("out", &[], more))).expect_code(2);
        assert!(finished.stderr.contains("--inject"), "{finished}");
    }
}

#[test]
fn usage_errors_have_code_2() {
    for args in [
        &["fly"][..],
        &["train"][..],
        &["train", "x.toml", "--grid", "2"][..],
        &["train", "no-such.toml"][..],
    ] {
        program(args).expect_code(2);
    }
    program(&["--help"]).expect_code(0);
    program(&["--version"]).expect_code(0);
}

#[test]
fn the_oracles_old_name_is_understood() {
    let folder = Folder::new();
    let args = folder.train("out", &["steps=2"], &["--emulate"]);
    let found = program(&slices(&args)).expect_code(0);
    assert!(found.stdout.contains("note: --emulate is called --oracle"), "{found}");
}

/// The configs of the repository say what the program understands.
#[test]
fn configs_are_valid() {
    for entry in std::fs::read_dir("configs").unwrap().flatten() {
        let path = entry.path();
        let config = Config::load(&path, &[], None)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let sources = config.data.source.iter().map(|source| &source.path);
        let here = config.data.path.iter().chain(sources).all(|path| path.exists());
        if !here {
            eprintln!("skipped: the text of {} is not here", path.display());
        } else if let Err(error) = Setup::new(config) {
            panic!("{}: {error}", path.display());
        }
    }
}

/// The recipes of the paper's family can be set up for K = 3, 4, 5, on a line and on a ring, with stand-ins for their
/// texts that have the real vocabularies.
#[test]
fn recipes_fit_three_four_and_five_stages() {
    use ouroboros::data::Tokenizer;
    use ouroboros::optim::OptimizerKind;
    use ouroboros::prepare::{Request, prepare};

    let folder = Folder::new();
    let table = [
        ("enwik8-transformer-12l", Tokenizer::Bytes, 256, 38_000_000),
        ("enwik8-xl-12l", Tokenizer::Bytes, 256, 41_000_000),
        ("text8-xl-12l", Tokenizer::Characters, 27, 41_000_000),
        ("wikitext103-xl-16l", Tokenizer::Words, 267_735, 151_000_000),
    ];
    for (name, tokenizer, count, parameters) in table {
        let path = folder.path("text.tokens");
        // By Zipf's law, so that the clusters have the shares that they have in a text.
        let rank =
            |i: u32| (f64::from(i % 1000) / 1000.0 * f64::from(count as u32).ln()).exp() as u32 - 1;
        let token = |i: u32| -> Vec<u8> {
            match tokenizer {
                Tokenizer::Bytes => vec![i as u8],
                Tokenizer::Characters => vec![b'a' + i as u8],
                _ if i == 0 => b"\n".to_vec(),
                _ => format!("token{i} ").into_bytes(),
            }
        };
        // Each once, so that all are known.
        let text: Vec<u8> = (0..100_000).map(rank).chain(0..27).flat_map(token).collect();
        let (file, list) = (folder.path("text"), folder.path("list"));
        std::fs::write(&file, text).unwrap();
        let words = (1..count).map(|i| format!("\ntoken{i}")).collect::<String>();
        std::fs::write(&list, format!("<eos>{words}")).unwrap();
        let _ = std::fs::remove_file(&path);
        let of_words = tokenizer == Tokenizer::Words;
        let request = Request {
            tokenizer: Some(tokenizer),
            vocabulary: of_words.then(|| list.clone()),
            out: Some(path.clone()),
            ..Request::new(file, folder.path("data"))
        };
        prepare(&request).unwrap();
        for (stages, placement) in
            [(3, "line"), (4, "line"), (5, "line"), (3, "ring"), (4, "ring"), (5, "ring")]
        {
            let sets =
                [format!("data.path={}", path.display()), format!("grid.placement={placement}")];
            let load = |name: &str| {
                let file = Path::new("configs").join(name).with_extension("toml");
                let config = Config::load(&file, &sets, Some(Grid::line(stages, 1))).unwrap();
                assert_eq!(config.name, name);
                config
            };
            let config = load(name);
            // The same with Muon.
            let muon = load(&format!("{name}-muon"));
            assert_eq!(muon.optimizer.common.kind, OptimizerKind::Muon);
            assert_eq!(
                Config { name: name.into(), optimizer: config.optimizer.clone(), ..muon },
                config
            );
            let setup = Setup::new(config)
                .unwrap_or_else(|error| panic!("{name} {stages} {placement}: {error}"));
            let found = setup.parameters();
            assert!(found.abs_diff(parameters) < parameters / 20, "{name}: {found} parameters");
            // Enough microbatches that no gradient is older than one update.
            assert!(
                setup.schedule.delays.iter().all(|delay| *delay <= 1),
                "{name}: {:?}",
                setup.schedule.delays
            );
            // The dearest device has at most one layer more than its share, or than the head and a layer of each of
            // its stages, which cannot be cut.
            let (costs, last) = (ouroboros::model::costs(&setup.dimensions), stages - 1);
            let stage = |k: usize| {
                let ends = if k == 0 { costs.embedding } else { 0.0 }
                    + if k == last { costs.head } else { 0.0 };
                setup.partition[k].len() as f64 * costs.block + ends
            };
            let device =
                |d: usize| (d..stages).step_by(setup.grid.devices()).map(stage).sum::<f64>();
            let devices: Vec<f64> = (0..setup.grid.devices()).map(device).collect();
            let most = devices.iter().copied().fold(0.0, f64::max);
            let share = devices.iter().sum::<f64>() / devices.len() as f64;
            let doubled = stages - setup.grid.devices();
            let least = share.max(costs.head + costs.block * (1 + doubled) as f64);
            assert!(
                most < least + costs.block,
                "{name} {stages} {placement}: {:?}",
                setup.partition
            );
        }
    }
}
