//! The command line: what can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::control::{Limits, Mode, limit};
use crate::data::Tokenizer;
use crate::emulated_compute::EmulatedCompute;
use crate::error::Result;
use crate::grid::{Grid, Placement};
use crate::hugging_face::{ExportRequest, ImportRequest, WeightType};
use crate::inject::Injection;
use crate::launch::{Job, Transport};
use crate::prepare::{Request, TrainRequest};
use crate::report;
use crate::schedule::{ScheduleKind, Tie};
use crate::study;
use crate::trace::Window;
use crate::watch;

/// Trains Transformer language models on a grid of K decoupled pipeline stages times R
/// data-parallel replicas.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What to say of a command line that cannot be understood, besides what clap says.
pub fn hint(args: impl Iterator<Item = std::ffi::OsString>) -> Option<String> {
    let args: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let after =
        args.windows(2).find(|pair| pair[0].as_os_str() == "--resume").map(|pair| &pair[1])?;
    let config = after.extension().is_some_and(|extension| extension == "toml");
    config.then(|| {
        let config = after.display();
        format!(
            "`--resume {config}` takes a state, or the folder of a run, and no config: write train {config} --resume"
        )
    })
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 a --check missed; 2 usage, config, out of memory; 3 data; 4 a peer, a link or a GPU was lost, or a timeout; 5 not finite; \
                          6 a checkpoint cannot be used; 7 a file of the run cannot be written; 75 stopped on request, and saved; 70 a fault of the program.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trains a model; under mpirun one rank a place, else threads of one process.
    Train(TrainArgs),
    /// Measures a training: tokens/s, and where the time of every place goes; saves no weights.
    Bench(BenchArgs),
    /// Writes the weights that a training would begin with, for other programs to begin with the
    /// same.
    Init(InitArgs),
    /// Makes a run of a model in a Hugging Face folder: GPT-2, Llama, Mistral, Qwen2, Qwen3.
    Import(ImportArgs),
    /// Makes a Hugging Face folder of saved weights.
    Export(ExportArgs),
    /// Loss of saved weights on held-out text.
    Eval(EvalArgs),
    /// Continues a text with saved weights.
    Generate(GenerateArgs),
    /// Trains variants of a config beside each other, with the oracle: what delay costs, at the
    /// best rate of each, over paired seeds.
    Study(StudyArgs),
    /// Makes a page of what runs have left in their folders: curves, the grid's time, the proof that
    /// nobody waited, memory, events.
    Report(ReportArgs),
    /// Shows a run as it goes, from the files in its folder: loss, speed, time left, what every place
    /// does; q quits. Without a terminal it prints a line a look, until the run has ended.
    Watch(WatchArgs),
    /// Draws a schedule, its delays and its ideal speed-up.
    Schedule(ScheduleArgs),
    /// Prepares and checks datasets, and trains tokenizers.
    #[command(subcommand)]
    Data(DataCommand),
    /// Checks the installation and advises.
    Doctor,
    /// Prints every key of a config, with its type, default and meaning.
    Config,
    /// Prints completions for a shell.
    Completions {
        /// bash, zsh, fish, elvish or powershell.
        shell: clap_complete::Shell,
    },
    /// Prints the man page.
    Man,
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// A config file, as in configs/.
    pub config: PathBuf,
    /// Stages x replicas, as in 4x2; over the config's grid.
    #[arg(long, value_name = "KxR")]
    pub grid: Option<Grid>,
    /// What carries tensors; under mpirun mpi, and between GPUs nccl; else local.
    #[arg(long)]
    pub transport: Option<Transport>,
    /// A description of the machine, as in topology/: how places lie on its nodes, which is
    /// checked, and what its links should do, which --self-test measures.
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Send over every link and reduce in every group before the model is built, and tell their
    /// times; with --topology always.
    #[arg(long)]
    pub self_test: bool,
    /// Compute the whole grid's arithmetic in one process, in order: the definition of correct.
    #[arg(long, alias = "emulate", conflicts_with_all = ["transport", "inject"])]
    pub oracle: bool,
    /// Be killed when the process that has started this one is: a study's runs.
    #[arg(long, hide = true)]
    pub dies_with_parent: bool,
    /// Folder of the run [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Overrides a key of the config, as in model.d_model=256; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Resume from the newest checkpoint of the run's folder that is good, with any grid; from the
    /// beginning if there is none. With PATH: from that checkpoint or folder.
    #[arg(long, value_name = "PATH")]
    pub resume: Option<Option<PathBuf>>,
    /// Begin at step 0 with the weights of a checkpoint or a folder: those of `import`, or of another
    /// training. A state that --resume finds goes before.
    #[arg(long, value_name = "PATH")]
    pub init: Option<PathBuf>,
    /// Stop and save, with exit code 75, before the run takes longer than this. So do SIGUSR1,
    /// SIGUSR2, SIGXCPU, SIGTERM, SIGINT, SIGHUP, a file STOP in the run's folder, and the end of a
    /// Slurm job.
    #[arg(long, value_name = "MINUTES", value_parser = limit)]
    pub max_minutes: Option<f64>,
    /// Seconds before the end of a Slurm job (SLURM_JOB_END_TIME) at which to stop.
    #[arg(long, value_name = "SECONDS", value_parser = limit, default_value_t = Limits::default().margin_s)]
    pub stop_margin: f64,
    /// Fail on purpose, as a drill:
    /// panic|crash|exit|hang|slow|nan|corrupt-message|drop-message|disk-full|alter-weights|
    /// alter-table@STAGE,REPLICA:STEP, and :ACTION if wanted; ? stands for a number to be drawn
    /// from the seed.
    #[arg(long, value_name = "FAULT")]
    pub inject: Option<Injection>,
    /// Writes what every place does in these steps, TO left out, into the run's folder as
    /// trace-FROM-TO.json.gz: open it at <https://ui.perfetto.dev>. A file TRACE in the run's folder that
    /// holds a number does so for as many steps from then on.
    #[arg(long, value_name = "FROM..TO")]
    pub trace: Option<Window>,
}

impl TrainArgs {
    /// The job that is asked for.
    pub fn job(self) -> Job {
        let limits = Limits { max_minutes: self.max_minutes, margin_s: self.stop_margin };
        let (inject, trace) = (self.inject, self.trace);
        let mode = Mode { inject, trace, signals: true, limits, ..Mode::default() };

        Job {
            self_test: self.self_test || self.topology.is_some(),
            resume: self.resume.map(Option::unwrap_or_default),
            init: self.init,
            oracle: self.oracle,
            topology: self.topology,
            ..Job::new(self.config, self.set, self.grid, self.out, self.transport, mode)
        }
    }
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A config file, as in configs/; sync points and evaluations are left out.
    pub config: PathBuf,
    /// Stages x replicas, as in 4x2; over the config's grid.
    #[arg(long, value_name = "KxR")]
    pub grid: Option<Grid>,
    /// What carries tensors; under mpirun mpi, and between GPUs nccl; else local.
    #[arg(long)]
    pub transport: Option<Transport>,
    /// Folder of bench.json and metrics.jsonl [default: runs/NAME-bench].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Overrides a key of the config, as in microbatches=4; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Steps to run [default: 16, and those that fill and drain the pipeline].
    #[arg(long)]
    pub steps: Option<usize>,
    /// Sleep instead of computing: milliseconds of forward and backward of a microbatch on a
    /// device, as in 10,20, or the bench.json of another run.
    #[arg(long, value_name = "F,B|FILE")]
    pub emulated_compute: Option<String>,
    /// Writes what every place does in these steps, TO left out, as trace-FROM-TO.json.gz.
    #[arg(long, value_name = "FROM..TO")]
    pub trace: Option<Window>,
}

impl BenchArgs {
    /// The job that is asked for.
    ///
    /// # Errors
    /// Times or a profile that cannot be used.
    pub fn job(self) -> Result<Job> {
        let emulated = self.emulated_compute.as_deref().map(EmulatedCompute::read).transpose()?;
        let mode = Mode { bench: true, emulated, trace: self.trace, ..Mode::default() };
        let job = Job::new(self.config, self.set, self.grid, self.out, self.transport, mode);
        Ok(Job { steps: self.steps, ..job })
    }
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// A config file, as in configs/.
    pub config: PathBuf,
    /// Folder that gets checkpoints/step-0 [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Overrides a key of the config; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The folder: config.json, and model.safetensors or shards with their index.
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Folder of the run, which gets checkpoints/step-0 and config.toml.
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
}

impl ImportArgs {
    /// The request that is made.
    pub fn request(self) -> ImportRequest {
        let ImportArgs { folder, out } = self;
        ImportRequest { folder, out }
    }
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A folder of weights, or a run's folder (its newest weights).
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// The folder that is made.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// The type of all weights [default: those of the folder that was imported, or f32].
    #[arg(long, value_enum)]
    pub dtype: Option<WeightType>,
    /// Bytes of a file at most, as in 500MB or 5GB [default: one file].
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub shard_size: Option<u64>,
}

impl ExportArgs {
    /// The request that is made.
    pub fn request(self) -> ExportRequest {
        let ExportArgs { run, to, dtype, shard_size } = self;
        ExportRequest { run, to, dtype, shard: shard_size }
    }
}

/// A number of bytes, with a unit of 1000 if wanted.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        unit => return Err(format!("`{unit}` is no unit: KB, MB or GB")),
    };

    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(scale)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("write a whole number above 0 and a unit, as in 500MB".to_owned()),
    }
}

#[derive(Debug, Args)]
pub struct StudyArgs {
    /// A study, as in studies/.
    pub study: PathBuf,
    /// Folder of the study; one that was begun is completed [default: runs/NAME-study].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Runs at once [default: one a core].
    #[arg(long)]
    pub jobs: Option<usize>,
    /// Exit with code 1 if a goal of the study is missed, or a figure that a document quotes of it
    /// was not found again.
    #[arg(long)]
    pub check: bool,
}

impl StudyArgs {
    /// The request that is made.
    pub fn request(self) -> study::Request {
        let StudyArgs { study, out, jobs, check } = self;
        study::Request { study, out, jobs, check }
    }
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Folders of runs.
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// The page [default: report.html in the first run's folder].
    #[arg(short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print the figures as JSON instead.
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
}

impl ReportArgs {
    /// The request that is made.
    pub fn request(self) -> report::Request {
        let ReportArgs { runs, output, json } = self;
        report::Request { runs, out: output, json }
    }
}

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// The folder of a run.
    pub run: PathBuf,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "1")]
    pub every: Duration,
    /// Look once, and print a line.
    #[arg(long)]
    pub once: bool,
}

impl WatchArgs {
    /// The request that is made.
    pub fn request(self) -> watch::Request {
        let WatchArgs { run, every, once } = self;
        watch::Request { run, every, once }
    }
}

/// A time between two looks.
fn seconds(text: &str) -> std::result::Result<Duration, String> {
    match text.trim().parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("write a number from 0.1 to 3600".to_owned()),
    }
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A folder of weights, or a run's folder (its newest weights).
    pub checkpoint: PathBuf,
    /// Overrides a key of the saved config, as in data.held_out=FILE or eval.tokens=10000; of a
    /// mixture one text alone by data.source=[] and data.path=FILE.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A folder of weights, or a run's folder (its newest weights).
    pub checkpoint: PathBuf,
    /// The text to continue; may be repeated, for texts that are continued together [default: what a
    /// tokenizer begins a text with, or its end token; else the end of a line, or the first token].
    #[arg(long)]
    pub prompt: Vec<String>,
    /// Tokens to add at most: a text of a tokenizer ends at its end token.
    #[arg(long, default_value_t = 300)]
    pub tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Chooses among this many likeliest tokens only.
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Chooses among the fewest likeliest tokens that together have this probability.
    #[arg(long)]
    pub top_p: Option<f64>,
    /// Chooses among tokens that are at least this times as likely as the likeliest only.
    #[arg(long)]
    pub min_p: Option<f64>,
    /// Makes tokens that stand in the text less likely; 1 does not.
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Ends a text before this string; may be repeated.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// The same seed makes the same text.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads of the computation.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
}

#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Tokenises texts once, into a file that every run maps; fetches the corpora that everybody
    /// knows. What was interrupted is gone on with.
    Prepare(Box<PrepareArgs>),
    /// Tokenizers.
    #[command(subcommand)]
    Tokenizer(TokenizerCommand),
    /// Reads a prepared file whole, and tells what it holds.
    Check {
        /// The prepared file.
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Learns a byte-level BPE of texts, and writes a tokenizer.json.
    Train(TokenizerArgs),
}

#[derive(Debug, Args)]
pub struct TokenizerArgs {
    /// Texts, JSON lines, Parquet, directories or patterns of them.
    #[arg(value_name = "FILES", required = true)]
    pub what: Vec<PathBuf>,
    /// Tokens, with those of the 256 bytes and the special ones.
    #[arg(long, value_name = "N")]
    pub size: usize,
    /// The tokenizer.json that is made.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// A special token, instead of `<|endoftext|>`; may be repeated. Documents end in a usual one;
    /// name another by --end-token when you prepare.
    #[arg(long, value_name = "TOKEN", default_value = "<|endoftext|>")]
    pub special: Vec<String>,
    /// The key of JSON lines, or the column of Parquet, that has the text.
    #[arg(long, default_value = "text")]
    pub field: String,
    /// Leave out lines and rows that are no documents.
    #[arg(long)]
    pub skip_bad: bool,
}

impl TokenizerArgs {
    /// The request that is made.
    pub fn request(self) -> TrainRequest {
        let TokenizerArgs { what, size, out, special, field, skip_bad } = self;
        TrainRequest { what, size, out, special, field, skip_bad }
    }
}

#[derive(Debug, Args)]
pub struct PrepareArgs {
    /// enwik8, text8 or wikitext-103 (a file of that name: ./text8); or texts, JSON lines (.jsonl,
    /// .ndjson, .json: a document a line), Parquet, packed (.gz, .zst) or not, directories, or
    /// patterns of them.
    #[arg(value_name = "NAME|FILES", required = true)]
    pub what: Vec<PathBuf>,
    /// Texts, JSON lines, Parquet of the split valid; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub valid: Vec<PathBuf>,
    /// Texts, JSON lines, Parquet of the split test; may be repeated.
    #[arg(long, value_name = "FILE")]
    pub test: Vec<PathBuf>,
    /// Where archives and prepared files go.
    #[arg(long, default_value = "data")]
    pub dir: PathBuf,
    /// The prepared file [default: DIR/NAME.tokens of one file or directory; needed for several].
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// An address that has the archive under its usual name, as in `https://example.org/corpora`.
    #[arg(long, value_name = "ADDRESS")]
    pub mirror: Option<String>,
    /// An archive that is here already.
    #[arg(long, value_name = "FILE", conflicts_with = "mirror")]
    pub archive: Option<PathBuf>,
    /// SHA-256 of the archive, if it is not the well-known one.
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// How text becomes tokens: bytes, characters, words, or a tokenizer.json [default: as usual for
    /// the corpus; bytes for files].
    #[arg(long, value_name = "bytes|characters|words|FILE")]
    pub tokenizer: Option<Tokenizer>,
    /// The token of a tokenizer.json that ends a document [default: as the tokenizer_config.json
    /// beside it says, or a usual one].
    #[arg(long, value_name = "TOKEN")]
    pub end_token: Option<String>,
    /// Words that stand more rarely in the training split become `<unk>`.
    #[arg(long, default_value_t = 1)]
    pub min_count: usize,
    /// A list of words, one a line, instead of those of the training split.
    #[arg(long, value_name = "FILE")]
    pub vocabulary: Option<PathBuf>,
    /// Share that each of the splits valid and test gets: of one text its end, else documents,
    /// drawn by their text and the seed [default: 0.05].
    #[arg(long)]
    pub held_out: Option<f64>,
    /// Draws the documents that are held out.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The key of JSON lines, or the column of Parquet, that has the text.
    #[arg(long, default_value = "text")]
    pub field: String,
    /// Leave out lines and rows that are no documents, and count them.
    #[arg(long)]
    pub skip_bad: bool,
    /// Threads [default: one a core].
    #[arg(long)]
    pub threads: Option<usize>,
}

impl PrepareArgs {
    /// The request that is made.
    pub fn request(self) -> Request {
        Request {
            what: self.what,
            valid: self.valid,
            test: self.test,
            dir: self.dir,
            out: self.out,
            mirror: self.mirror,
            archive: self.archive,
            sha256: self.sha256,
            tokenizer: self.tokenizer,
            end_token: self.end_token,
            min_count: self.min_count,
            vocabulary: self.vocabulary,
            held_out: self.held_out,
            seed: self.seed,
            field: self.field,
            skip_bad: self.skip_bad,
            threads: self.threads,
        }
    }
}

#[derive(Debug, Args)]
pub struct ScheduleArgs {
    /// Stages x replicas, as in 4x2.
    #[arg(long, value_name = "KxR", default_value = "4x1")]
    pub grid: Grid,
    /// Microbatches a replica and step.
    #[arg(short, long, default_value_t = 1)]
    pub microbatches: usize,
    /// The schedule.
    #[arg(long, value_enum, default_value = "decoupled")]
    pub schedule: ScheduleKind,
    /// Slack per hop.
    #[arg(long, default_value_t = 1)]
    pub slack: usize,
    /// One stage a device, or the last stage on the first one's device.
    #[arg(long, value_enum, default_value = "line")]
    pub placement: Placement,
    /// The rule of the tied embedding.
    #[arg(long, value_enum, default_value = "aligned")]
    pub tie: Tie,
    /// Times of forward, backward and message of one microbatch on one stage.
    #[arg(long, value_name = "F:B:C", default_value = "1:2:0")]
    pub times: String,
    /// Steps to draw; 0 draws none.
    #[arg(long, default_value_t = 6)]
    pub steps: usize,
    /// Rows of the drawing at most.
    #[arg(long, default_value_t = 60)]
    pub rows: usize,
    /// Also draw it as a picture, the other schedules below it.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}
