//! A run's folder: saved states, their manifests and headers, what stands beside them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ouroboros::checkpoint::Checkpoint;
use ouroboros::cli::EvalArgs;
use ouroboros::config::Config;
use ouroboros::control::Mode;
use ouroboros::coordinator::Coordinator;
use ouroboros::launch::run_local;
use ouroboros::setup::Setup;
use xxhash_rust::xxh3::xxh3_64;

use super::{Parts, Target};

/// With a memory, a vocabulary, delays, and a head that keeps parts of the table's gradient.
const CONFIG: &str = r#"
steps = 9
batch = 4
microbatches = 1
[grid]
stages = 2
[model]
arch = "transformer-xl"
layers = 2
d_model = 8
heads = 2
d_ff = 8
mem_len = 4
tie = "head"
[data]
tokenizer = "characters"
synthetic = 2000
sequence = 4
held_out = 0.2
[optimizer]
warmup = 2
[eval]
every = 50
tokens = 60
"#;

struct States {
    /// Of the run that is altered.
    run: PathBuf,
    state: String,
    /// The names of the files that an input has in its parts, in their order.
    names: Vec<String>,
    seeds: Vec<Parts>,
    config: Config,
}

/// Parts: how (one byte), the manifest, then every file of the state, then metrics.jsonl and the lock's text.
pub fn state(folder: &Path) -> Box<dyn Target> {
    let config = Config::parse(CONFIG, &[]).expect("a config");
    let run = folder.join("run");
    fs::create_dir(&run).expect("a folder");
    // It is stopped at once, between two sync points: earlier versions and parts are saved too.
    fs::write(run.join("STOP"), "").expect("a file");
    let setup = Arc::new(Setup::new(config.clone()).expect("a setup"));
    let coordinator = Coordinator::new(Arc::clone(&setup), &run).expect("a coordinator");
    let stopped = run_local(&setup, &run, coordinator, Mode::default());
    assert!(stopped.is_ok_and(|summary| summary.stopped), "the run goes on");

    let states: Vec<PathBuf> = fs::read_dir(run.join("checkpoints"))
        .expect("states")
        .flatten()
        .map(|e| e.path())
        .collect();
    let state = states[0].file_name().expect("a name").to_string_lossy().into_owned();
    let mut names: Vec<String> = fs::read_dir(&states[0])
        .expect("a state")
        .flatten()
        .map(|entry| format!("checkpoints/{state}/{}", entry.file_name().display()))
        .collect();
    // The manifest first; then the files that it tells of.
    names.sort_by_key(|name| (!name.ends_with("manifest.json"), name.clone()));
    assert!(
        ["memory", "older", "parts"]
            .iter()
            .all(|kind| names.iter().any(|name| name.contains(kind))),
        "{names:?}"
    );
    names.push("metrics.jsonl".to_owned());
    names.push("lock".to_owned());
    let files: Parts = names.iter().map(|name| fs::read(run.join(name)).expect("a file")).collect();
    let seeds = (0..4u8).map(|how| [vec![vec![how]], files.clone()].concat()).collect();
    Box::new(States { run, state, names, seeds, config })
}

impl States {
    /// Writes the files. The digests and sizes that the manifest tells of the others are mended where that is asked for: most
    /// damage would be found by them alone.
    fn write(&self, parts: &[Vec<u8>], mended: bool) -> std::io::Result<()> {
        let _ = fs::remove_dir_all(&self.run);
        fs::create_dir_all(self.run.join("checkpoints").join(&self.state))?;
        let mut manifest = String::from_utf8_lossy(&parts[0]).into_owned();
        for ((name, bytes), good) in self.names.iter().zip(parts).zip(&self.seeds[0][1..]) {
            fs::write(self.run.join(name), bytes)?;
            if mended && name.ends_with(".safetensors") && bytes != good {
                let digest = |bytes: &[u8]| format!("{:016x}", xxh3_64(bytes));
                manifest = manifest.replace(&digest(good), &digest(bytes));
                // Sizes stand before digests.
                if let Some(at) = manifest.find(&digest(bytes)) {
                    let size = format!("\"bytes\": {}", good.len());
                    if let Some(from) = manifest[..at].rfind(&size) {
                        manifest.replace_range(
                            from..from + size.len(),
                            &format!("\"bytes\": {}", bytes.len()),
                        );
                    }
                }
            }
        }
        fs::write(
            self.run.join(&self.names[0]),
            if mended { manifest.as_bytes() } else { &parts[0] },
        )
    }

    /// Goes on with the run, as far as a rank does before its first step.
    fn resume(&self) -> Result<(), ouroboros::error::Error> {
        let setup = Setup::new(self.config.clone())?;
        let setup = match Checkpoint::newest(&self.run)? {
            Some(saved) => Arc::new(setup.resume(saved)?),
            None => Arc::new(setup),
        };
        drop(setup.other_texts());
        let stages = setup.grid.stages;
        for stage in 0..stages {
            let (stack, layout, delay) =
                (setup.stack(stage), setup.layout(stage), setup.schedule.delays[stage]);
            drop(setup.first_weights(&layout)?);
            setup.older_weights(&layout, delay)?;
            setup.optimizer(&layout, delay)?;
            setup.memories(&stack, 0)?;
        }
        let table = ouroboros::params::Layout::new(&ouroboros::model::table(&setup.dimensions));
        drop(setup.first_weights(&table)?);
        setup.waiting_parts(&table, 0)?;
        drop(Coordinator::new(setup, &self.run)?);
        Ok(())
    }

    fn eval(&self) -> Result<(), ouroboros::error::Error> {
        // What a config asks for beyond the state is not the state's fault.
        let sets = [
            "threads=1",
            "device=cpu",
            "data.synthetic=2000",
            "data.sequence=4",
            "data.held_out=0.2",
            "eval.sequence=4",
            "eval.batch=4",
        ];
        let set = sets.iter().map(|set| (*set).to_owned()).collect();
        ouroboros::commands::eval(&EvalArgs { checkpoint: self.run.clone(), set })
    }
}

impl Target for States {
    fn seeds(&self) -> Vec<Parts> {
        self.seeds.clone()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "../",
            "/",
            "\"file\": \"/etc/hostname\"",
            "\"file\": \"../../metrics.jsonl\"",
            "null",
            "\"shape\":[]",
            "\"shape\":[0,9223372036854775807]",
            "\"data_offsets\":[0,0]",
            "\"dtype\":\"BF16\"",
            "\"kind\": \"memory\"",
            "layers.0.",
            "@1",
            "/0",
            "\"step\": 0",
            "{",
            "[",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let how = parts[0].first().copied().unwrap_or_default();
        self.write(&parts[1..], how & 1 == 1).map_err(|error| error.to_string())?;
        let read = if how & 2 == 2 { self.eval() } else { self.resume() };
        let Err(error) = read else { return Ok(()) };

        let told = error.to_string();
        let is_named = matches!(error, ouroboros::error::Error::Config { .. })
            || told.contains(&self.run.display().to_string());
        if is_named || told.starts_with("data ") {
            return Ok(());
        }
        Err(format!("neither setting nor file is named: {told}"))
    }

    fn room(&self, bytes: usize) -> usize {
        (96 << 20) + 64 * bytes
    }
}
