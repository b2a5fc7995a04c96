//! The command line: what can be typed.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::grid::{Grid, Placement};
use crate::inject::Injection;
use crate::launch::{Job, Transport};
use crate::schedule::{Kind, Tie};

/// Trains Transformer language models on a grid of K decoupled pipeline stages times R data-parallel replicas.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 2 usage or config; 3 data; 4 a peer or a link was lost; 5 not a number; \
                          6 saved weights unusable; 70 a fault of the program.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trains a model; under mpirun one rank a place, else threads of one process.
    Train(TrainArgs),
    /// Loss of saved weights on held-out text.
    Eval(EvalArgs),
    /// Continues a text with saved weights.
    Generate(GenerateArgs),
    /// Draws a schedule, its delays and its ideal speed-up.
    Schedule(ScheduleArgs),
    /// Tells what is installed, and what to do about what is not.
    Doctor,
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    /// A config file, as in configs/.
    pub config: PathBuf,
    /// Stages x replicas, as in 4x2; over the config's grid.
    #[arg(long, value_name = "KxR")]
    pub grid: Option<Grid>,
    /// What carries tensors; mpi under mpirun, else local.
    #[arg(long)]
    pub transport: Option<Transport>,
    /// Compute the whole grid's arithmetic in one process, in order: the definition of correct.
    #[arg(long, conflicts_with_all = ["transport", "inject"])]
    pub emulate: bool,
    /// Folder of the run [default: runs/NAME].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Overrides a key of the config, as in model.d_model=256; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Fail on purpose, as a drill: panic|crash|corrupt-message|alter-table@STAGE,REPLICA:STEP.
    #[arg(long, value_name = "FAULT")]
    pub inject: Option<Injection>,
}

impl TrainArgs {
    /// The job that is asked for.
    pub fn job(self) -> Job {
        let TrainArgs { config, grid, transport, emulate, out, set, inject } = self;
        Job { config, sets: set, grid, out, transport, emulate, inject }
    }
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// A folder of weights, or a run's folder (its newest weights).
    pub checkpoint: PathBuf,
    /// Overrides a key of the saved config, as in data.held_out=FILE or eval.tokens=10000.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A folder of weights, or a run's folder (its newest weights).
    pub checkpoint: PathBuf,
    /// The text to continue.
    #[arg(long, default_value = "\n")]
    pub prompt: String,
    /// Tokens to add.
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
    /// The same seed makes the same text.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Threads of the computation.
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
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
    pub schedule: Kind,
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
}
