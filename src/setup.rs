//! What is true: a config checked once, with everything that follows from it. Nobody checks again.

use std::ops::Range;
use std::sync::Arc;

use crate::config::{
    Arch, Config, EvalConfig, HeldOut, LayersPerStage, ModelConfig, Norm, OptimizerConfig, Order, TieGradient,
    Tokenizer,
};
use crate::data::{Corpus, Shape, Tokens};
use crate::delay::{SyncPoints, lag, least_delay};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place, Placement};
use crate::model::{self, Dimensions, Stack};
use crate::partition;
use crate::schedule::{Evals, Schedule, Tie, check};
use crate::table::End;

/// Steps of a run whose action lists are checked before it starts; the pattern repeats long before.
const CHECKED_STEPS: usize = 64;

/// A run, ready to be started.
#[derive(Debug)]
pub struct Setup {
    pub config: Config,
    pub grid: Grid,
    pub dimensions: Dimensions,
    /// The layers of every stage.
    pub partition: Vec<Range<usize>>,
    pub schedule: Schedule,
    pub corpus: Arc<Corpus>,
    /// Rows of a microbatch, b.
    pub rows: usize,
    /// Held-out windows, or streams, of one evaluation, a replica.
    pub eval_share: usize,
}

impl Setup {
    /// Checks a config and opens its corpus.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Data`], naming setting, value and remedy.
    pub fn new(config: Config) -> Result<Setup> {
        check_settings(&config)?;
        let grid = config.grid();
        let rows = rows(&config)?;
        let mut schedule = schedule(&config)?;
        let corpus = Arc::new(Corpus::open(&config.data, config.seed, None)?);
        let vocabulary = corpus.vocabulary.len();
        check_cutoffs(&config.model, vocabulary)?;
        let shares = corpus.train.shares(&config.model.cutoffs);
        let dimensions = Dimensions { shares, ..Dimensions::new(&config.model, vocabulary, config.data.sequence) };
        let partition = layers(&config, &dimensions)?;
        check_streams(&config, &corpus)?;
        let eval_share = match &config.eval {
            Some(eval) => {
                let (share, microbatches) = evaluation(&config, eval, &corpus.held_out, rows)?;
                schedule.evals = Some(Evals { every: eval.every, microbatches });
                share
            }
            None => 0,
        };
        check_schedule(&schedule, grid)?;
        Ok(Setup { config, grid, dimensions, partition, schedule, corpus, rows, eval_share })
    }

    /// The layers of one stage.
    pub fn stack(&self, stage: usize) -> Stack {
        Stack::new(&self.dimensions, self.partition[stage].clone())
    }

    /// Values of all parameters.
    pub fn parameters(&self) -> usize {
        model::count(&self.dimensions)
    }

    /// The ends of the tied table that a stage has; none without a tie.
    pub fn table_ends(&self, stage: usize) -> Vec<End> {
        let input = (stage == 0).then_some(End::Input);
        let output = (stage == self.grid.stages - 1).then_some(End::Output);
        input.into_iter().chain(output).filter(|_| self.dimensions.tied).collect()
    }

    /// What the sum of a tied table's parts is multiplied by.
    pub fn tie_factor(&self) -> f64 {
        match self.config.model.tie_gradient {
            TieGradient::Sum => 1.0,
            TieGradient::Mean => 0.5,
        }
    }

    /// Rows of the global batch that make up a microbatch of a replica.
    pub fn train_rows(&self, replica: usize, microbatch: usize) -> Range<usize> {
        let start = (replica * self.config.microbatches + microbatch) * self.rows;
        start..start + self.rows
    }

    /// Held-out windows that make up a microbatch of an evaluation, the replica's share evenly cut; or the replica's
    /// streams, of which every microbatch is a segment.
    pub fn eval_rows(&self, replica: usize, microbatch: usize) -> Range<usize> {
        let (share, start) = (self.eval_share, replica * self.eval_share);
        match self.config.order() {
            Order::Shuffled => {
                let microbatches = self.schedule.evals.map_or(1, |evals| evals.microbatches);
                let cut = |i: usize| start + i * share / microbatches;
                cut(microbatch)..cut(microbatch + 1)
            }
            Order::Streams => start..start + share,
        }
    }

    /// Whether a microbatch is the last of an evaluation.
    pub fn ends_evaluation(&self, microbatch: usize) -> bool {
        self.schedule.evals.is_some_and(|evals| microbatch + 1 == evals.microbatches)
    }

    /// A picture of the grid: ranks, layers and delays of every stage.
    pub fn picture(&self) -> String {
        let mut out = String::new();
        for replica in 0..self.grid.replicas {
            let cells: Vec<String> = (0..self.grid.stages)
                .map(|stage| format!("[rank {}]", self.grid.rank(Place { stage, replica })))
                .collect();
            out.push_str(&format!("replica {replica}  {}\n", cells.join(" -- ")));
        }
        for (stage, layers) in self.partition.iter().enumerate() {
            let (delay, versions) = (self.schedule.delays[stage], self.schedule.versions_held(stage));
            let last = layers.end - 1;
            out.push_str(&format!(
                "stage {stage}: layers {}..{last}, delay {delay}, versions {versions}\n",
                layers.start
            ));
        }
        out
    }
}

/// Checks every setting by itself.
///
/// # Errors
/// [`Error::Config`] for the first that cannot be used.
pub fn check_settings(config: &Config) -> Result<()> {
    check_numbers(config)?;
    check_model(config)?;
    check_optimizer(&config.optimizer)?;
    check_data(config)
}

/// Whether K stages can be placed so; what to do if not.
///
/// # Errors
/// The remedy.
pub fn check_placement(placement: Placement, stages: usize) -> std::result::Result<(), String> {
    match placement {
        Placement::Ring if stages < 3 => {
            Err(format!("needs at least 3 stages, there are {stages}; take more or `line`"))
        }
        _ => Ok(()),
    }
}

fn at_least_one(setting: &str, value: usize) -> Result<()> {
    if value >= 1 { Ok(()) } else { Err(Error::config(setting, value, "must be at least 1")) }
}

fn within(setting: &str, value: f64, good: bool, remedy: &str) -> Result<()> {
    if good && value.is_finite() { Ok(()) } else { Err(Error::config(setting, value, remedy)) }
}

fn check_numbers(config: &Config) -> Result<()> {
    at_least_one("steps", config.steps)?;
    at_least_one("batch", config.batch)?;
    at_least_one("microbatches", config.microbatches)?;
    at_least_one("slack", config.slack)?;
    at_least_one("threads", config.threads)?;
    at_least_one("grid.stages", config.grid.stages)?;
    at_least_one("grid.replicas", config.grid.replicas)?;
    check_placement(config.grid.placement, config.grid.stages)
        .map_err(|remedy| Error::config("grid.placement", "`ring`", remedy))?;
    if let Some(at) = config.sync_at.iter().find(|at| **at >= config.steps) {
        return Err(Error::config("sync_at", at, format!("must be below steps = {}", config.steps)));
    }
    match &config.eval {
        Some(eval) => {
            at_least_one("eval.every", eval.every)?;
            at_least_one("eval.tokens", eval.tokens.unwrap_or(1))?;
            at_least_one("eval.sequence", eval.sequence.unwrap_or(1))?;
            at_least_one("eval.batch", eval.batch.unwrap_or(1))
        }
        None => Ok(()),
    }
}

fn check_model(config: &Config) -> Result<()> {
    let model = &config.model;
    at_least_one("model.layers", model.layers)?;
    at_least_one("model.d_model", model.d_model)?;
    at_least_one("model.heads", model.heads)?;
    at_least_one("model.d_ff", model.d_ff)?;
    if !model.d_model.is_multiple_of(model.heads) {
        let remedy = format!("must be a multiple of model.heads = {}", model.heads);
        return Err(Error::config("model.d_model", model.d_model, remedy));
    }
    for (setting, rate) in [("model.dropout", model.dropout), ("model.attention_dropout", model.attention_dropout)] {
        within(setting, rate, (0.0..1.0).contains(&rate), "must be at least 0 and below 1")?;
    }
    check_widths(model)?;
    check_arch(config)?;
    if config.grid.stages > model.layers {
        let remedy = format!("at most model.layers = {} stages, one layer each", model.layers);
        return Err(Error::config("grid.stages", config.grid.stages, remedy));
    }
    Ok(())
}

/// Whether the clusters of the vocabulary fit it.
///
/// # Errors
/// [`Error::Config`] about `model.cutoffs`.
pub fn check_cutoffs(model: &ModelConfig, vocabulary: usize) -> Result<()> {
    let cutoffs = &model.cutoffs;
    let rising = cutoffs.windows(2).all(|pair| pair[0] < pair[1]);
    if rising && cutoffs.first() != Some(&0) && cutoffs.last().is_none_or(|last| *last < vocabulary) {
        return Ok(());
    }
    let remedy = format!("rising numbers above 0 and below the size of the vocabulary, {vocabulary}");
    Err(Error::config("model.cutoffs", format!("{cutoffs:?}"), remedy))
}

/// Widths of embedding and head, and what a tie needs of them.
fn check_widths(model: &ModelConfig) -> Result<()> {
    at_least_one("model.div_val", model.div_val)?;
    let widths = [("model.embedding_width", model.embedding_width), ("model.head_width", model.head_width)];
    for (setting, width) in widths {
        at_least_one(setting, width.unwrap_or(1))?;
    }
    if model.div_val > 1 && model.cutoffs.is_empty() {
        return Err(Error::config("model.div_val", model.div_val, "means something with model.cutoffs only"));
    }
    let (embedding, head) = (model.embedding_width.unwrap_or(model.d_model), model.head_width.unwrap_or(model.d_model));
    let (narrowest, clusters) = (embedding.min(head), model.cutoffs.len() as u32);
    if model.div_val.checked_pow(clusters).is_none_or(|scale| scale > narrowest) {
        let remedy = format!("{clusters} further clusters leave less than one value of a width of {narrowest}");
        return Err(Error::config("model.div_val", model.div_val, remedy));
    }
    if model.tie != Tie::Untied && embedding != head {
        let found = format!("{embedding}, and a head_width of {head}");
        let remedy = "a tied table has one width: make them equal, or set model.tie = \"none\"";
        return Err(Error::config("model.embedding_width", found, remedy));
    }
    Ok(())
}

/// Settings that only one architecture has, and those that a memory needs.
fn check_arch(config: &Config) -> Result<()> {
    let model = &config.model;
    if model.arch == Arch::Transformer {
        let found = [
            ("model.mem_len", (model.mem_len > 0).then(|| model.mem_len.to_string())),
            ("model.clamp_len", model.clamp_len.map(|clamp| clamp.to_string())),
            ("model.same_length", model.same_length.then(|| "true".to_owned())),
            ("model.norm", model.norm.filter(|norm| *norm == Norm::Post).map(|_| "post".to_owned())),
            ("model.attention_dropout", (model.attention_dropout > 0.0).then(|| model.attention_dropout.to_string())),
            ("eval.mem_len", (config.eval_mem_len() > 0).then(|| config.eval_mem_len().to_string())),
        ];
        for (setting, found) in found {
            if let Some(found) = found {
                return Err(Error::config(setting, found, "only model.arch = \"transformer-xl\" has it; leave it out"));
            }
        }
        if config.eval_sequence() > config.data.sequence {
            let remedy = format!("the model has positions for data.sequence = {} tokens only", config.data.sequence);
            return Err(Error::config("eval.sequence", config.eval_sequence(), remedy));
        }
    }
    let memory = model.mem_len.max(config.eval_mem_len());
    if memory > 0 && config.order() == Order::Shuffled {
        let remedy = "a memory of shuffled windows means nothing; take data.order = \"streams\" or mem_len = 0";
        return Err(Error::config("model.mem_len", format!("{memory} with data.order = \"shuffled\""), remedy));
    }
    if model.same_length && (model.mem_len == 0 || config.eval_mem_len() == 0) {
        return Err(Error::config("model.same_length", "true with mem_len = 0", "every query looks at mem_len keys"));
    }
    Ok(())
}

fn check_optimizer(o: &OptimizerConfig) -> Result<()> {
    within("optimizer.lr", o.lr, o.lr > 0.0, "must be above 0")?;
    within("optimizer.min_lr", o.min_lr, o.min_lr >= 0.0 && o.min_lr <= o.lr, "must lie between 0 and optimizer.lr")?;
    for beta in o.betas {
        within("optimizer.betas", beta, (0.0..1.0).contains(&beta), "must be at least 0 and below 1")?;
    }
    within("optimizer.eps", o.eps, o.eps > 0.0, "must be above 0")?;
    let momentum = (0.0..1.0).contains(&o.momentum);
    within("optimizer.momentum", o.momentum, momentum, "must be at least 0 and below 1")?;
    within("optimizer.weight_decay", o.weight_decay, o.weight_decay >= 0.0, "must be 0 or more")?;
    let clip = o.clip.unwrap_or(1.0);
    within("optimizer.clip", clip, clip > 0.0, "must be above 0; leave it out for no clipping")
}

fn check_data(config: &Config) -> Result<()> {
    let data = &config.data;
    at_least_one("data.sequence", data.sequence)?;
    at_least_one("data.min_count", data.min_count)?;
    if data.tokenizer != Tokenizer::Words {
        let remedy = "only data.tokenizer = \"words\" has it; leave it out";
        if data.min_count > 1 {
            return Err(Error::config("data.min_count", data.min_count, remedy));
        }
        if let Some(path) = &data.vocabulary {
            return Err(Error::config("data.vocabulary", path.display(), remedy));
        }
    }
    let named =
        usize::from(data.path.is_some()) + usize::from(data.paths.is_some()) + usize::from(data.synthetic.is_some());
    if named > 1 {
        return Err(Error::config("data", "more than one of path, paths, synthetic", "keep one of them"));
    }
    match data.held_out {
        HeldOut::Fraction(f) => within("data.held_out", f, f > 0.0 && f < 1.0, "a fraction lies between 0 and 1"),
        HeldOut::File(_) => Ok(()),
    }
}

/// The share of a replica in an evaluation (windows or streams), and its microbatches.
fn evaluation(config: &Config, eval: &EvalConfig, held_out: &Tokens, rows: usize) -> Result<(usize, usize)> {
    let (shape, replicas) = (Shape::eval(config), config.grid.replicas);
    let (share, microbatches, wanted) = match config.order() {
        Order::Shuffled => {
            let windows = shape.windows(held_out);
            let wanted = eval.tokens.map_or(windows, |tokens| tokens.div_ceil(shape.sequence).min(windows));
            (wanted / replicas, (wanted / replicas).div_ceil(rows), wanted)
        }
        Order::Streams => {
            if !shape.rows.is_multiple_of(replicas) {
                let remedy = format!("must be a multiple of grid.replicas = {replicas}");
                return Err(Error::config("eval.batch", shape.rows, remedy));
            }
            let segments = shape.segments(held_out);
            let wanted = eval.tokens.map_or(segments, |n| n.div_ceil(shape.rows * shape.sequence).min(segments));
            (shape.rows / replicas, wanted, wanted)
        }
    };
    if share > 0 && microbatches > 0 {
        return Ok((share, microbatches));
    }
    let (found, needed) = match config.order() {
        Order::Shuffled => {
            (format!("{wanted} windows"), format!("{replicas} replicas need one of {} tokens each", shape.sequence))
        }
        Order::Streams => (
            format!("{} held-out tokens", held_out.len()),
            format!("{} streams need {} each and one more; lower eval.batch", shape.rows, shape.sequence),
        ),
    };
    Err(Error::config("eval.tokens and data.held_out", found, needed))
}

/// Whether the training text is long enough for its streams.
fn check_streams(config: &Config, corpus: &Corpus) -> Result<()> {
    if config.order() == Order::Shuffled || Shape::train(config).segments(&corpus.train) > 0 {
        return Ok(());
    }
    let needed = config.batch * config.data.sequence + 1;
    let remedy = format!("{} streams of {} tokens need {needed}", config.batch, config.data.sequence);
    Err(Error::config("batch", format!("{} tokens of text", corpus.train.len()), remedy))
}

fn rows(config: &Config) -> Result<usize> {
    let parts = config.grid.replicas * config.microbatches;
    if config.batch.is_multiple_of(parts) {
        return Ok(config.batch / parts);
    }
    let remedy = format!(
        "must be a multiple of grid.replicas * microbatches = {} * {}; the next ones are {} and {}",
        config.grid.replicas,
        config.microbatches,
        (config.batch / parts).max(1) * parts,
        (config.batch / parts + 1).max(2) * parts
    );
    Err(Error::config("batch", config.batch, remedy))
}

fn layers(config: &Config, dimensions: &Dimensions) -> Result<Vec<Range<usize>>> {
    let LayersPerStage::Counts(counts) = &config.grid.layers_per_stage else {
        let costs = model::costs(dimensions);
        let blocks = vec![costs.block; config.model.layers];
        let cut = match config.grid.placement {
            Placement::Line => partition::balanced,
            Placement::Ring => partition::balanced_ring,
        };
        return Ok(cut(&blocks, costs.embedding, costs.head, config.grid.stages));
    };
    let wrong = |remedy| Error::config("grid.layers_per_stage", format!("{counts:?}"), remedy);
    if counts.len() != config.grid.stages {
        return Err(wrong(format!("needs one number for each of grid.stages = {}", config.grid.stages)));
    }
    let remedy = || format!("every number at least 1, together model.layers = {}", config.model.layers);
    partition::by_hand(counts, config.model.layers).ok_or_else(|| wrong(remedy()))
}

fn schedule(config: &Config) -> Result<Schedule> {
    let mut sync = SyncPoints::ends(config.steps);
    sync.warm_up = config.sync_steps;
    sync.at.extend(&config.sync_at);
    sync.periods.extend(config.eval.as_ref().map(|eval| eval.every));
    let stages = config.grid.stages;
    let mut schedule = Schedule::new(config.schedule, stages, config.microbatches, config.slack, sync);
    (schedule.placement, schedule.tie) = (config.grid.placement, config.model.tie);
    let Some(delays) = &config.grid.delays else { return Ok(schedule) };
    if config.schedule.synchronous() {
        return Err(Error::config("grid.delays", format!("{delays:?}"), "only schedule = \"decoupled\" has delays"));
    }
    if delays.len() != stages {
        let remedy = format!("needs one number for each of grid.stages = {stages}");
        return Err(Error::config("grid.delays", format!("{delays:?}"), remedy));
    }
    for (stage, delay) in delays.iter().enumerate() {
        let least = least_delay(lag(config.slack, stages, stage), config.microbatches);
        if *delay < least {
            let remedy =
                format!("stage {stage} needs at least {least} (slack * (stages - 1 - {stage}) / microbatches)");
            return Err(Error::config("grid.delays", format!("{delays:?}"), remedy));
        }
    }
    schedule.delays.clone_from(delays);
    Ok(schedule)
}

/// Runs `check` over the first steps of the run, with the synchronous warm-up cut short so that delayed steps are among
/// them: a fault here is one of the generator.
fn check_schedule(schedule: &Schedule, grid: Grid) -> Result<()> {
    let mut short = schedule.clone();
    let longest = schedule.delays.iter().max().copied().unwrap_or(0);
    short.sync.steps = schedule.sync.steps.min(CHECKED_STEPS + 2 * longest);
    short.sync.warm_up = schedule.sync.warm_up.min(2);
    short.sync.at.retain(|at| *at < short.sync.steps);
    short.evals = schedule.evals.map(|evals| Evals { microbatches: 1, ..evals });
    let devices = grid.devices();
    let lists: Vec<_> = (0..grid.size()).map(|rank| short.device_actions(rank % devices).collect()).collect();
    check(&short, grid.replicas, &lists).map_err(|fault| Error::Internal(format!("schedule: {fault}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Setup::new(Config::parse(text, &[]).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn the_default_config_can_be_run() {
        let setup = Setup::new(Config::default()).unwrap();
        assert_eq!((setup.partition.len(), setup.partition[0].clone()), (1, 0..4));
        assert_eq!(setup.rows, 8);
    }

    #[test]
    fn every_row_is_read_once() {
        let text = "batch = 24\nmicrobatches = 3\n[grid]\nreplicas = 2\n[eval]\nevery = 5\ntokens = 2900";
        let setup = Setup::new(Config::parse(text, &[]).unwrap()).unwrap();
        let rows = |f: &dyn Fn(usize, usize) -> Range<usize>, m: usize| -> Vec<usize> {
            (0..2).flat_map(|r| (0..m).map(move |j| (r, j))).flat_map(|(r, j)| f(r, j)).collect()
        };
        assert_eq!(rows(&|r, j| setup.train_rows(r, j), 3), (0..24).collect::<Vec<_>>());
        let microbatches = setup.schedule.evals.unwrap().microbatches;
        assert_eq!((setup.eval_share, microbatches), (11, 3));
        assert_eq!(rows(&|r, j| setup.eval_rows(r, j), microbatches), (0..22).collect::<Vec<_>>());
    }

    #[test]
    fn bad_settings_are_named_with_value_and_remedy() {
        let table = [
            ("[grid]\nstages = 5", "`grid.stages`: found 5; at most model.layers = 4"),
            (
                "batch = 30",
                "`batch`: found 30; must be a multiple of grid.replicas * microbatches = 1 * 4; the next ones are 28 and 32",
            ),
            ("[model]\nd_model = 130", "`model.d_model`: found 130; must be a multiple of model.heads = 4"),
            (
                "microbatches = 1\n[grid]\nstages = 4\ndelays = [2, 2, 1, 0]",
                "`grid.delays`: found [2, 2, 1, 0]; stage 0 needs at least 3",
            ),
            ("schedule = \"gpipe\"\n[grid]\ndelays = [1]", "`grid.delays`: found [1]; only schedule"),
            (
                "[grid]\nstages = 2\nlayers_per_stage = [1, 2]",
                "`grid.layers_per_stage`: found [1, 2]; every number at least 1, together model.layers = 4",
            ),
            ("[grid]\nstages = 2\nlayers_per_stage = [4]", "needs one number for each of grid.stages = 2"),
            ("steps = 0", "`steps`: found 0; must be at least 1"),
            ("[model]\ndropout = 1.0", "`model.dropout`: found 1;"),
            ("[optimizer]\nlr = 0.0", "`optimizer.lr`: found 0; must be above 0"),
            ("[optimizer]\nclip = -1.0", "`optimizer.clip`: found -1;"),
            ("[data]\nheld_out = 1.5", "`data.held_out`: found 1.5;"),
            ("[data]\npath = \"a\"\nsynthetic = 5", "`data`: found more than one of path, paths, synthetic"),
            ("[data]\nsynthetic = 100", "data synthetic: 95 bytes, one window needs 129"),
            ("[data]\npaths = []", "`data.paths`: found an empty list"),
            ("[data]\npath = \"no/such.txt\"", "data no/such.txt: cannot be opened"),
            ("sync_at = [500]", "`sync_at`: found 500; must be below steps = 500"),
        ];
        for (text, expected) in table {
            let found = error(text);
            assert!(found.contains(expected), "{text}\n  gives     {found}\n  expected  {expected}");
        }
    }
}
