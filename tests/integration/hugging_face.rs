//! Models of Hugging Face's folders, made and read by the real `transformers` (scripts/hugging-face.sh).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ouroboros::checkpoint::Checkpoint;
use ouroboros::config::Config;
use ouroboros::data::Batches;
use ouroboros::generation::{Reader, Sampling, load};
use ouroboros::model::Memory;
use ouroboros::setup::Setup;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tempfile::TempDir;

use crate::harness::{Finished, Outcome, as_threads, by_oracle, mpirun, ouroboros, run};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const CASES: [&str; 11] = [
    "gpt2",
    "gpt2-untied",
    "llama",
    "llama-bf16",
    "llama-f16",
    "llama-linear-biases",
    "llama-tied-llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-tied",
];

/// How the models are trained, here and there.
const TRAINING: &str = r#"
name = "trained"
steps = 4
batch = 12
microbatches = 2
schedule = "1f1b"
[data]
sequence = 24
held_out = 0.1
[optimizer]
kind = "adamw"
lr = 1e-3
betas = [0.9, 0.95]
eps = 1e-8
weight_decay = 0.1
clip = 1e9
schedule = "constant"
warmup = 0
predict = "off"
lead = "off"
"#;

/// The interpreter that has `transformers`; none where the set-up has no torch for it.
fn python() -> Option<Command> {
    let found = Path::new(ROOT).join(".venv-hf/bin/python");
    if found.exists() {
        let mut command = Command::new(found);
        command.arg(Path::new(ROOT).join("tests/reference/hugging_face.py"));
        command.env("HF_HUB_OFFLINE", "1");
        return Some(command);
    }

    let torch = Path::new(ROOT).join(".venv/bin/python").exists();
    assert!(!torch, "no .venv-hf: run scripts/hugging-face.sh");
    ouroboros::complain!("skipped: no torch in .venv, and so no transformers to compare with");
    None
}

fn program(args: &[&str]) -> Finished {
    run(ouroboros(args), 60)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The tests' text.
fn declaration() -> PathBuf {
    Path::new(ROOT).join("tests/data/declaration.txt")
}

/// The training of a model, with `sets` over it.
fn training(model: &Config, sets: &[&str]) -> Config {
    let mut sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    sets.push(format!("data.path={}", declaration().display()));
    Config { model: model.model.clone(), ..Config::parse(TRAINING, &sets).unwrap() }
}

/// Bytes of every tensor of a folder, with type and shape.
fn tensors(folder: &Path) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for file in std::fs::read_dir(folder).unwrap().flatten() {
        if file.path().extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(file.path()).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let dtype = format!("{:?}", view.dtype());
                all.insert(name, (dtype, view.shape().to_vec(), view.data().to_vec()));
            }
        }
    }
    all
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn tokens(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|number| number.as_i64().unwrap()).collect()
}

/// Logits, greedy texts, losses of training, and all bytes back.
#[test]
fn models_of_transformers_are_the_same_here() {
    let Some(mut python) = python() else { return };
    let folder = TempDir::new().unwrap();
    write_batches(&folder.path().join("batches.json"));
    run(python_of(&mut python, &["make", text(folder.path())]), 120).expect_code(0);
    for name in CASES {
        let case = folder.path().join(name);
        let (model, imported) = (case.join("model"), case.join("run"));
        program(&["import", text(&model), "--out", text(&imported)]).expect_code(0);
        let checkpoint = Checkpoint::open(&imported).unwrap();
        let expected: Value =
            serde_json::from_slice(&std::fs::read(case.join("expected.json")).unwrap()).unwrap();

        check_logits(name, &checkpoint, &expected);
        check_greedy(name, &checkpoint, &expected["greedy"]);
        check_training(name, &checkpoint, &numbers(&expected["losses"]));

        let exported = case.join("exported");
        program(&["export", text(&imported), "--to", text(&exported)]).expect_code(0);
        assert_eq!(tensors(&exported), tensors(&model), "{name}");
        let sharded = case.join("sharded");
        let args = ["export", text(&imported), "--to", text(&sharded), "--shard-size", "200KB"];
        program(&args).expect_code(0);
        assert!(sharded.join("model.safetensors.index.json").exists(), "{name}");
        assert_eq!(tensors(&sharded), tensors(&model), "{name}");
        let again = case.join("again");
        program(&["import", text(&sharded), "--out", text(&again)]).expect_code(0);
        let weights = "checkpoints/step-0/stage-0.safetensors";
        assert!(
            std::fs::read(imported.join(weights)).unwrap()
                == std::fs::read(again.join(weights)).unwrap(),
            "{name}"
        );
    }
}

fn python_of(python: &mut Command, args: &[&str]) -> Command {
    let mut command = Command::new(python.get_program());
    command.args(python.get_args()).args(args).env("HF_HUB_OFFLINE", "1");
    command
}

/// What the training reads, for the other side.
fn write_batches(path: &Path) {
    let config = training(&Config::default(), &[]);
    let setup = Setup::new(config).unwrap();
    let batches = Batches::new(Arc::clone(&setup.corpus), setup.config.reading());
    let rows = |tensor: &Tensor| -> Vec<Vec<i64>> {
        (0..tensor.size()[0]).map(|row| tensor.get(row).try_into().unwrap()).collect()
    };
    let all: Vec<Value> = (0..setup.config.steps)
        .map(|step| batches.train(step, 0..setup.config.batch).unwrap())
        .map(|batch| json!({ "tokens": rows(&batch.tokens), "targets": rows(&batch.targets) }))
        .collect();
    std::fs::write(path, serde_json::to_vec(&all).unwrap()).unwrap();
}

fn check_logits(name: &str, checkpoint: &Checkpoint, expected: &Value) {
    let (model, weights) = load(checkpoint, &checkpoint.manifest.config).unwrap();
    let tokens = Tensor::from_slice(&tokens(&expected["tokens"])).view([4, 24]);
    let hidden = model.forward(&weights, &tokens, &mut Memory::new(0), None).unwrap();
    let found = model.scores(&weights, &hidden).unwrap().to_kind(Kind::Double);
    let wanted = Tensor::from_slice(&numbers(&expected["logits"])).view_as(&found);
    let size = wanted.abs().max().double_value(&[]);
    let far = (found - wanted).abs().max().double_value(&[]);
    assert!(size > 1.0 && far < 1e-5 * size, "{name}: {far:e} of {size}");
}

/// One by one, and all prompts at once, which are not of one length.
fn check_greedy(name: &str, checkpoint: &Checkpoint, expected: &Value) {
    let cases = expected.as_array().unwrap();
    let prompts: Vec<Vec<i64>> = cases.iter().map(|case| tokens(&case["prompt"])).collect();
    let wanted: Vec<Vec<i64>> = cases.iter().map(|case| tokens(&case["continuation"])).collect();
    let continued = |prompts: &[Vec<i64>]| -> Vec<Vec<i64>> {
        let mut texts = prompts.to_vec();
        let mut reader = Reader::new(checkpoint, prompts, 40).unwrap();
        for _ in 0..40 {
            let scores = reader.next(&texts).unwrap();
            for (text, scores) in texts.iter_mut().zip(&scores) {
                text.push(Sampling::GREEDY.pick(scores, &[], 0.0) as i64);
            }
        }
        texts.iter().zip(prompts).map(|(text, prompt)| text[prompt.len()..].to_vec()).collect()
    };
    assert_eq!(continued(&prompts), wanted, "{name}, together");
    for (prompt, wanted) in prompts.iter().zip(&wanted) {
        let alone = continued(std::slice::from_ref(prompt));
        assert_eq!(alone[0], *wanted, "{name}, alone");
    }
}

/// The losses of a loop over the `transformers` model with the same batches; and of every grid those
/// of its oracle.
fn check_training(name: &str, checkpoint: &Checkpoint, expected: &[f64]) {
    let saved = &checkpoint.manifest.config;
    let setup = |sets: &[&str]| {
        let setup = Setup::new(training(saved, sets)).unwrap();
        let again = Checkpoint::open(&checkpoint.path).unwrap();
        Arc::new(setup.begin_with(again).unwrap())
    };
    let found = as_threads(&setup(&[])).losses();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found / expected - 1.0).abs() < 1e-5, "{name}: {found} and {expected}");
    }

    // Decoupled, with the cures of delay.
    if !["gpt2", "llama-linear-biases", "llama-tied-llama3", "qwen3"].contains(&name) {
        return;
    }
    for grid in ["1x1", "2x1", "1x2", "2x2", "4x1"] {
        let (stages, replicas) = grid.split_once('x').unwrap();
        let grid = [format!("grid.stages={stages}"), format!("grid.replicas={replicas}")];
        for kind in ["adamw", "soap"] {
            let kind = format!("optimizer.kind={kind}");
            let more = ["schedule=decoupled", "optimizer.predict=update", "optimizer.lead=delay"];
            let sets = [&[&grid[0], &grid[1], &kind[..]][..], &more].concat();
            let (grid, oracle) = (as_threads(&setup(&sets)), by_oracle(&setup(&sets)));
            assert_eq!(grid.lines, oracle.lines, "{name} {sets:?}");
            assert!(grid.weights == oracle.weights, "{name} {sets:?}");
        }
    }
}

/// A tiny config in a folder, with a text of its own.
fn tiny_config(folder: &Path, name: &str, held: &Path, sets: &[&str]) -> PathBuf {
    let config = format!(
        "name = \"{name}\"\nsteps = 6\nbatch = 12\nmicrobatches = 1\n[model]\nlayers = 4\nd_model = 24\nheads = 3\n\
         d_ff = 40\n[data]\npath = \"{}\"\nsequence = 16\nheld_out = \"{}\"\n[optimizer]\nlr = 1e-2\nwarmup = 2\n",
        declaration().display(),
        held.display()
    );
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let config = Config::parse(&config, &sets).unwrap();
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, config.to_short_toml()).unwrap();
    path
}

/// A text for evaluation, of another length than a window's multiple.
fn hold_out(folder: &Path) -> PathBuf {
    let bytes = std::fs::read(declaration()).unwrap();
    let path = folder.join("held-out.txt");
    std::fs::write(&path, &bytes[bytes.len() - 1003..]).unwrap();
    path
}

/// The loss that a line of output begins with.
fn shown_loss(finished: &Finished) -> f64 {
    let line = finished.stdout.lines().find(|line| line.starts_with("loss ")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The way through: imported, trained on a grid under mpirun, evaluated, exported, and evaluated by
/// `transformers`; and models that began here.
#[test]
fn trained_models_are_the_same_there() {
    let Some(mut python) = python() else { return };
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let held_out = hold_out(folder.path());
    let mut runs = vec![];

    write_batches(&at("batches.json"));
    run(python_of(&mut python, &["make", text(folder.path()), "qwen3"]), 60).expect_code(0);
    program(&["import", text(&at("qwen3/model")), "--out", text(&at("imported"))]).expect_code(0);
    let config = at("imported/config.toml");
    let data = format!("data.path={}", declaration().display());
    let held = format!("data.held_out={}", held_out.display());
    let weights = at("imported/checkpoints/step-0");
    let args = ["train", text(&config), "--init", text(&weights), "--grid", "2x2", "--out"];
    let sets = ["--set", &data, "--set", &held, "--set", "steps=4", "--set", "data.sequence=32"];
    let tuned = at("tuned");
    let args = [&args[..], &[text(&tuned)], &sets].concat();
    run(mpirun(4, &args), 60).expect_code(0);
    assert!(at("tuned/hugging-face/config.json").exists(), "the source goes with the weights");
    runs.push("tuned");

    for (name, sets) in [
        ("gpt2", &["model.arch=gpt2", "grid.stages=2"][..]),
        ("llama", &["model.arch=llama", "model.kv_heads=1", "model.tie=none", "grid.stages=4"]),
        ("tied-llama", &["model.arch=llama", "model.tie=head", "grid.stages=2"]),
        ("transformer", &["model.tie=none"]),
        ("tied-transformer", &["model.tie=aligned", "model.embedding_std=0.2"]),
    ] {
        let config = tiny_config(folder.path(), name, &held_out, sets);
        program(&["train", text(&config), "--out", text(&at(name))]).expect_code(0);
        runs.push(name);
    }

    let mut folders = Vec::new();
    for name in &runs {
        let to = at(&format!("{name}-exported"));
        program(&["export", text(&at(name)), "--to", text(&to)]).expect_code(0);
        folders.push(to);
    }

    // All windows are as long there: two lengths, two calls.
    for (sequence, range) in [("32", 0..1), ("16", 1..runs.len())] {
        let args = [&["losses", text(&held_out), sequence][..]];
        let models: Vec<&str> = folders[range.clone()].iter().map(|path| text(path)).collect();
        let args = [args[0], &models].concat();
        let found = run(python_of(&mut python, &args), 60).expect_code(0);
        let theirs: Vec<f64> = found
            .stdout
            .lines()
            .map(|line| line.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(theirs.len(), range.len(), "{found}");
        for (name, theirs) in runs[range].iter().zip(theirs) {
            let held = format!("data.held_out={}", held_out.display());
            let ours =
                shown_loss(&program(&["eval", text(&at(name)), "--set", &held]).expect_code(0));
            assert!((ours / theirs - 1.0).abs() < 1e-5, "{name}: {ours} here, {theirs} there");
        }
    }
}

/// Weights of one run begin another, at step 0; a state of its own goes before them.
#[test]
fn a_run_begins_with_the_weights_of_another() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let held = hold_out(folder.path());
    let model = ["model.arch=llama", "model.kv_heads=1", "model.qk_norm=true"];
    let config = tiny_config(folder.path(), "first", &held, &model);
    program(&["train", text(&config), "--out", text(&at("first"))]).expect_code(0);

    let (first, second) = (at("first"), at("second"));
    let args = ["train", text(&config), "--init", text(&first), "--resume", "--out", text(&second)];
    let train = |more: &[&str]| program(&[&args[..], more].concat());
    let soap = ["--set", "optimizer.kind=soap"];
    let finished = train(&[&soap[..], &["--grid", "2x1", "--set", "steps=3"]].concat());
    let finished = finished.expect_code(0);
    assert!(finished.stdout.contains("starting with the weights of"), "{finished}");
    // What it begins with is what the first has ended with, not what a seed makes.
    let losses = |out: &Path| Outcome::read(out).losses();
    assert!(losses(&second)[0] < losses(&first)[0] - 0.2, "{finished}");

    let finished = train(&[&soap[..], &["--grid", "4x1", "--set", "steps=6"]].concat());
    let finished = finished.expect_code(0);
    assert!(finished.stdout.contains("resuming at step 3"), "{finished}");
    assert_eq!(losses(&second).len(), 6);

    let finished = train(&["--set", "model.qk_norm=false", "--set", "name=other"]).expect_code(2);
    assert!(finished.stderr.contains("setting `model.qk_norm`"), "{finished}");
    let (none, third) = (at("none"), at("third"));
    program(&["train", text(&config), "--init", text(&none), "--out", text(&third)]).expect_code(6);
}

/// What is wrong with a folder is told in a line, and nothing is left of the run.
#[test]
fn folders_that_cannot_be_used_are_told() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    let held = hold_out(folder.path());
    let sets = ["model.arch=llama", "model.kv_heads=1", "model.tie=none", "steps=1"];
    let config = tiny_config(folder.path(), "run", &held, &sets);
    program(&["train", text(&config), "--out", text(&at("run"))]).expect_code(0);
    let (begun, good) = (at("run"), at("good"));
    let sharded = ["export", text(&begun), "--to", text(&good), "--shard-size", "20KB"];
    program(&sharded).expect_code(0);
    let index = "model.safetensors.index.json";
    let shard = |number: usize| {
        let count = std::fs::read_dir(&good).unwrap().flatten().count() - 3;
        format!("model-{number:05}-of-{count:05}.safetensors")
    };

    type Damage<'a> = Box<dyn Fn(&Path) + 'a>;
    let with = |key: &'static str, value: Value| -> Damage {
        Box::new(move |at| set_key(at, key, value.clone()))
    };
    let cases: Vec<(&str, Damage, i32, &str)> = vec![
        ("no config", Box::new(|at| remove(&at.join("config.json"))), 6, "config.json"),
        ("no index", Box::new(|at| remove(&at.join(index))), 6, "neither model.safetensors nor"),
        ("no shard", Box::new(|at| remove(&at.join(shard(2)))), 6, "No such file"),
        ("half a shard", Box::new(|at| cut(&at.join(shard(2)))), 6, "bytes of values"),
        ("a header that asks for more", Box::new(|at| spoil(&at.join(shard(1)))), 6, "its header"),
        ("half a config", Box::new(|at| cut(&at.join("config.json"))), 6, "EOF while parsing"),
        ("another layer", with("num_hidden_layers", 5.into()), 6, "no tensor model.layers.4."),
        ("a layer less", with("num_hidden_layers", 3.into()), 6, "is none of the tensors"),
        ("another shape", with("intermediate_size", 41.into()), 6, "config.json asks for [41, 24]"),
        (
            "biases",
            with("attention_bias", true.into()),
            6,
            "no tensor model.layers.0.self_attn.q_proj.bias",
        ),
        (
            "a tie that is none",
            with("tie_word_embeddings", true.into()),
            6,
            "is not model.embed_tokens.weight",
        ),
        (
            "a family",
            with("model_type", "mamba2".into()),
            2,
            "`config.json model_type`: found \"mamba2\"",
        ),
        ("an activation", with("hidden_act", "relu2".into()), 2, "`config.json hidden_act`"),
        (
            "a scaling",
            with("rope_parameters", json!({"rope_type": "yarn"})),
            2,
            "rope_type`: found yarn",
        ),
        ("heads", with("num_key_value_heads", 2.into()), 2, "must divide model.heads = 3"),
        (
            "a name too many",
            Box::new(|at| rename_in_index(&at.join(index))),
            6,
            "is not in model-00001",
        ),
    ];
    for (name, damage, code, expected) in cases {
        let bad = at("bad");
        let _ = std::fs::remove_dir_all(&bad);
        copy_folder(&good, &bad);
        damage(&bad);
        let finished =
            program(&["import", text(&bad), "--out", text(&at("new"))]).expect_code(code);
        assert!(finished.stderr.contains(expected), "{name}: expected {expected}{finished}");
        assert_eq!(finished.errors().len(), 1, "{name}{finished}");
        assert!(!at("new").exists(), "{name}: something is left");
    }

    // The folder of the run, and of the export.
    program(&["import", text(&good), "--out", text(&at("new"))]).expect_code(0);
    program(&["import", text(&good), "--out", text(&at("new"))]).expect_code(2);
    program(&["export", text(&at("new")), "--to", text(&good)]).expect_code(2);
    program(&["export", text(&at("none")), "--to", text(&at("other"))]).expect_code(6);
    let xl = tiny_config(folder.path(), "xl", &held, &["model.arch=transformer-xl", "steps=1"]);
    program(&["train", text(&xl), "--out", text(&at("xl"))]).expect_code(0);
    let refused = program(&["export", text(&at("xl")), "--to", text(&at("other"))]).expect_code(2);
    assert!(refused.stderr.contains("`model.arch`: found transformer-xl"), "{refused}");
    assert!(!at("other").exists());
}

fn remove(path: &Path) {
    std::fs::remove_file(path).unwrap();
}

fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 16]).unwrap();
}

/// A header longer than the file.
fn spoil(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

fn set_key(folder: &Path, key: &str, value: Value) {
    let path = folder.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json[key] = value;
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

/// A tensor that the first shard does not have.
fn rename_in_index(path: &Path) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let map = json["weight_map"].as_object_mut().unwrap();
    let first = map.values().find(|file| file.as_str().unwrap().contains("-00001-")).unwrap();
    let first = first.clone();
    map.insert("model.no_such.weight".to_owned(), first);
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}
