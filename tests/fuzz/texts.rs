//! Texts that people write: configs and `--set`, command lines, topologies, profiles, studies.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ouroboros::cli::{Cli, Command, DataCommand, ScheduleArgs, hint};
use ouroboros::config::Config;
use ouroboros::data::HeldOut;
use ouroboros::emulated_compute::EmulatedCompute;
use ouroboros::error::Error;
use ouroboros::setup::Setup;
use ouroboros::study::Plan;
use ouroboros::topology::Topology;

use super::{Parts, Target};

fn text(part: &[u8]) -> String {
    String::from_utf8_lossy(part).into_owned()
}

/// All files of a folder of the repository.
fn files_of(folder: &str) -> Vec<Parts> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(folder).expect("a folder of the repository").flatten();
    let mut paths: Vec<PathBuf> = files
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    paths.sort();
    paths.iter().map(|path| vec![fs::read(path).expect("a file")]).collect()
}

/// Whether an error says what it is about: a setting, or this file.
pub fn named(error: &Error, file: Option<&Path>) -> Result<(), String> {
    let told = error.to_string();
    let of_file = file.is_some_and(|file| told.contains(&file.display().to_string()));
    if matches!(error, Error::Config { .. }) || of_file {
        return Ok(());
    }
    Err(format!("neither setting nor file is named: {told}"))
}

struct Configs {
    /// A text that every config reads.
    corpus: PathBuf,
}

pub fn config(folder: &Path) -> Box<dyn Target> {
    let corpus = folder.join("text.txt");
    fs::write(&corpus, "the cat saw the dog and the dog saw a cat\n".repeat(2000)).expect("a file");
    Box::new(Configs { corpus })
}

/// Keys of `--set`, as they would be typed.
const SETS: &str = "model.d_model=256\noptimizer.lr=.001\nname=7\neval=none\noptimizer.kind=soap\ngrid.stages=2\noptimizer.clip=none\n\
                    data.tokenizer=words\nmodel.cutoffs=[20, 60]\neval.every=4\ngrid.delays=[2, 1]\nsync_at=[3, 5]\nmodel.arch=transformer-xl";

impl Target for Configs {
    fn seeds(&self) -> Vec<Parts> {
        let with = |parts: Parts| [parts, vec![SETS.into()]].concat();
        let mut seeds: Vec<Parts> = files_of("configs").into_iter().map(with).collect();
        let written = Config::parse("[eval]\nevery = 5", &[]).expect("a config").to_toml();
        seeds.push(vec![written.into_bytes(), Vec::new()]);
        seeds
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "\"none\"",
            "true",
            "[",
            "]",
            "[model]",
            "[grid]\n",
            "[optimizer]\n",
            "[data]\n",
            "[eval]\n",
            "schedule = \"1f1b\"\n",
            "kind = \"muon\"\n",
            "soap_every = 3\n",
            "tie = \"head\"\n",
            "microbatches = 4\n",
            "stages = 3\n",
            "replicas = 2\n",
            "mem_len = 16\n",
            "order = \"streams\"\n",
            "tokenizer = \"characters\"\n",
            "layers_per_stage = [1, 3]\n",
            "placement = \"ring\"\n",
            "slack = 3\n",
            "reduce_delay = 1\n",
            "d_head = 3\n",
            "div_val = 2\n",
            "cutoffs = [3, 9]\n",
            "held_out = 0.2\n",
            ".",
            "=",
            "a.b.c=",
            "'",
            "\"\"\"",
            "{",
            "}",
            "inf",
            "nan",
            "1979-05-27T07:32:00Z",
            "\u{feff}",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let sets: Vec<String> = text(&parts[1]).lines().map(str::to_owned).collect();
        let mut config = match Config::parse(&text(&parts[0]), &sets) {
            Ok(config) => config,
            Err(error) => return named(&error, None),
        };
        if let Err(error) = config.check() {
            return named(&error, None);
        }
        let read = Config::parse(&config.to_toml(), &[])
            .map_err(|error| format!("written and read again: {error}"))?;
        if read.to_toml() != config.to_toml() {
            return Err(format!(
                "written and read again it is another:\n{}\n{}",
                config.to_toml(),
                read.to_toml()
            ));
        }

        // What is made of it takes as much as it asks for.
        let small = config.grid.stages <= 16
            && config.microbatches <= 64
            && config.model.layers <= 64
            && config.slack <= 16;
        let delays = config.grid.delays.iter().flatten().all(|delay| *delay <= 64);
        if small && delays && config.batch <= 1 << 12 {
            config.data.path = Some(self.corpus.clone());
            (config.data.paths, config.data.synthetic, config.data.vocabulary) = (None, None, None);
            config.data.held_out = HeldOut::Fraction(0.2);
            let corpus = self.corpus.clone();
            return Setup::new(config).map(drop).or_else(|error| named(&error, Some(&corpus)));
        }
        Ok(())
    }

    fn room(&self, bytes: usize) -> usize {
        (128 << 20) + 64 * bytes
    }
}

fn quick(args: &ScheduleArgs) -> bool {
    let numbers = [args.grid.stages, args.microbatches, args.slack];
    numbers.iter().all(|n| *n <= 32) || numbers.iter().any(|n| *n > 1 << 12)
}

struct CommandLines {
    folder: PathBuf,
}

pub fn command_line(folder: &Path) -> Box<dyn Target> {
    Box::new(CommandLines { folder: folder.to_owned() })
}

impl Target for CommandLines {
    fn seeds(&self) -> Vec<Parts> {
        let lines = [
            "train\na.toml\n--grid\n2x2\n--transport\nmpi\n--inject\npanic@1,0:7\n--max-minutes\n3\n--stop-margin\n60\n--out\nruns/a",
            "train\na.toml\n--oracle\n--set\nsteps=3\n--set\nmodel.d_model=64\n--resume\nruns/a",
            "train\na.toml\n--inject\ncorrupt-message@?,?:?:SA\n--topology\ntopology/a.toml\n--self-test",
            "bench\na.toml\n--grid\n4x1\n--emulated-compute\n10,20\n--steps\n10",
            "init\na.toml\n--out\na",
            "eval\nruns/a\n--set\neval.tokens=100",
            "generate\nruns/a\n--prompt\nthe\n--tokens\n10\n--temperature\n0.8\n--top-k\n5\n--top-p\n0.9\n--seed\n3\n--threads\n2",
            "study\na.toml\n--jobs\n2\n--check",
            "schedule\n--grid\n4x2\n--microbatches\n4\n--schedule\ndecoupled\n--slack\n2\n--placement\nring\n--tie\nhead\n--times\n1:2:0.5\n--steps\n6\n--rows\n40",
            "data\nprepare\nenwik8\n--dir\ndata\n--archive\na.zip\n--sha256\nabc\n--tokenizer\nwords\n--min-count\n3\n--held-out\n0.1",
            "doctor",
        ];
        lines.iter().map(|line| vec![line.as_bytes().to_vec()]).collect()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "--",
            "x",
            "@",
            ":",
            ",",
            "?",
            "\n--set\n",
            "\n--grid\n",
            "\n--inject\n",
            "hang@",
            "1x",
            "SA",
            "1f1b",
            "gpipe",
            "ring",
            "fresh",
            "\n-h",
            "\n--version",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let line = text(&parts[0]);
        let args: Vec<&str> = std::iter::once("ouroboros").chain(line.lines()).collect();
        let _ = hint(args.iter().map(Into::into));
        match Cli::try_parse_from(args) {
            Err(error) => drop(error.to_string()),
            Ok(Cli { command: Command::Train(args) }) => drop(args.job()),
            Ok(Cli { command: Command::Bench(args) }) => {
                if let Err(error) = args.job() {
                    return named(&error, None);
                }
            }
            Ok(Cli { command: Command::Data(DataCommand::Prepare(args)) }) => drop(args.request()),
            // Nothing is read or written: it can be run, unless what is simulated takes long.
            Ok(Cli { command: Command::Schedule(args) }) if quick(&args) => {
                if let Err(error) = ouroboros::commands::schedule(&args) {
                    return named(&error, None);
                }
            }
            Ok(_) => {}
        }
        match fs::read_dir(&self.folder).map(Iterator::count) {
            Ok(0) => Ok(()),
            found => Err(format!("a file was written: {found:?}")),
        }
    }

    fn room(&self, bytes: usize) -> usize {
        (256 << 20) + 64 * bytes
    }
}

/// A file of text, and who reads it.
struct OneFile {
    path: PathBuf,
    seeds: Vec<Parts>,
    words: Vec<&'static str>,
    read: fn(&Path) -> Result<(), Error>,
    /// Bytes that reading may allocate besides the input's.
    room: usize,
}

impl Target for OneFile {
    fn seeds(&self) -> Vec<Parts> {
        self.seeds.clone()
    }

    fn words(&self) -> Vec<&'static str> {
        self.words.clone()
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        fs::write(&self.path, &parts[0]).map_err(|error| error.to_string())?;
        (self.read)(&self.path).or_else(|error| named(&error, Some(&self.path)))
    }

    fn room(&self, bytes: usize) -> usize {
        self.room + 256 * bytes
    }
}

pub fn topology(folder: &Path) -> Box<dyn Target> {
    let read = |path: &Path| {
        let topology = Topology::load(path)?;
        let hosts: Vec<String> = ["a", "a", "b", "b"].map(str::to_owned).to_vec();
        topology.check_hosts(&hosts)?;
        topology.check_grid(ouroboros::grid::Grid::line(4, 2))
    };
    let words = vec![
        "nodes = ",
        "devices = ",
        "[inside]\n",
        "[between]\n",
        "nan",
        "inf",
        "-1",
        "order = \"stage-major\"\n",
    ];
    Box::new(OneFile {
        path: folder.join("a.toml"),
        seeds: files_of("topology"),
        words,
        read,
        room: 4 << 20,
    })
}

/// A bench.json with what a profile is made of.
const PROFILE: &str = r#"{"rows": 8, "tokens_per_s": 41000.5, "stages": [
  {"stage": 0, "forward_ms": 10.5, "backward_ms": 20.25, "update_ms": 3.0, "reduce_ms": 0.5, "copies_ms": 0.1, "table_ms": 0.2},
  {"stage": 1, "forward_ms": 11.5, "backward_ms": 21.25, "update_ms": 3.5}]}"#;

pub fn profile(folder: &Path) -> Box<dyn Target> {
    let read = |path: &Path| EmulatedCompute::read(&path.display().to_string())?.check(2);
    let words = vec![
        "null",
        "1e400",
        "-1",
        "[",
        "{",
        "}",
        "]",
        "\"stages\":",
        "\"rows\":",
        "\"forward_ms\":",
    ];
    Box::new(OneFile {
        path: folder.join("bench.json"),
        seeds: vec![vec![PROFILE.into()]],
        words,
        read,
        room: 4 << 20,
    })
}

pub fn study(folder: &Path) -> Box<dyn Target> {
    // The configs that the studies name in `base`, and what they quote.
    let (studies, repository) = (folder.join("studies"), Path::new(env!("CARGO_MANIFEST_DIR")));
    fs::create_dir(&studies).expect("a folder");
    for name in ["configs", "docs"] {
        std::os::unix::fs::symlink(repository.join(name), folder.join(name)).expect("a link");
    }
    let read = |path: &Path| {
        let plan = Plan::load(path)?;
        for variant in plan.variants() {
            plan.searched(variant, 1)?;
            plan.times_of(variant)?;
        }
        Ok(())
    };
    let words = vec![
        "[[variant]]\n",
        "name = \"a\"\n",
        "against = \"synchronous\"\n",
        "beside = \"delayed\"\n",
        "goal_tax = 1.1\n",
        "goal_speed_up = 2.0\n",
        "goal_not_worse = true\n",
        "rates = [1e-3]\n",
        "update = 3.0\n",
        "\"grid.stages=3\", ",
        "\"steps=7\", ",
        "\"eval=none\", ",
        "shares = [1.0]\n",
        "[time]\n",
        "message = 0.5\n",
        "nan",
        "inf",
        "-1",
    ];
    Box::new(OneFile {
        path: studies.join("a.toml"),
        seeds: files_of("studies"),
        words,
        read,
        room: 1 << 30,
    })
}
