//! What is true: a config checked once, with everything that follows from it. Nobody checks again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Tensor};

use crate::checkpoint::{Checkpoint, Pipeline, ShardKind};
use crate::config::{Config, EvalConfig, LayersPerStage};
use crate::data::{Corpus, Order, Tokens};
use crate::delay::{SyncPoints, lag, least_delay, version};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place, Placement};
use crate::model::{self, Dimensions, Memory, Stack, TieGradient};
use crate::number::{READBACK_STEPS, Readback};
use crate::optim::Optimizer;
use crate::params::Layout;
use crate::partition;
use crate::precision::Precision;
use crate::schedule::{Evals, Schedule, check};
use crate::table::End;
use crate::wire::Wire;

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
    /// The saved state that the run goes on from; none: it begins with initial weights.
    pub resumed: Option<Arc<Checkpoint>>,
    /// What this process computes on.
    pub device: Device,
    /// When losses and norms are read: later on a GPU; elsewhere so for tests only.
    pub readback: Readback,
}

impl Setup {
    /// Checks a config and opens its corpus.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Data`], naming setting, value and remedy.
    pub fn new(config: Config) -> Result<Setup> {
        config.check()?;
        let grid = config.grid();
        let rows = rows(&config)?;
        let mut schedule = schedule(&config)?;
        check_counts(&config)?;
        let corpus = Arc::new(Corpus::open(&config.data, config.seed, held_sequence(&config), None)?);
        let vocabulary = corpus.vocabulary.len();
        config.model.check_cutoffs(vocabulary)?;
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
        Ok(Setup {
            config,
            grid,
            dimensions,
            partition,
            schedule,
            corpus,
            rows,
            eval_share,
            resumed: None,
            device: Device::Cpu,
            readback: Readback::Now,
        })
    }

    /// The same run on another device.
    pub fn on(self, device: Device) -> Setup {
        let readback = if device.is_cuda() { Readback::Deferred } else { Readback::Now };
        Setup { device, readback, ..self }
    }

    /// The same run from a saved state on.
    ///
    /// # Errors
    /// [`Error::Config`] about a setting that would make another run of it.
    pub fn resume(self, saved: Checkpoint) -> Result<Setup> {
        saved.fits(&self.config)?;
        // Other delays, or another cut of the layers: the state is a sync point.
        let since = match self.pipeline(saved.manifest.pipeline.since) == saved.manifest.pipeline
            && saved.manifest.config.model.tie == self.config.model.tie
        {
            true => saved.manifest.pipeline.since,
            false => saved.step(),
        };
        let mut schedule = self.schedule;
        schedule.sync.from(saved.step(), since);
        schedule.saves_again = saved.step() == self.config.steps && saved.manifest.grid != self.grid.to_string();
        Ok(Setup { schedule, resumed: Some(Arc::new(saved)), ..self })
    }

    /// What a state needs to know of the pipeline.
    pub fn pipeline(&self, since: usize) -> Pipeline {
        let layers = self.partition.iter().map(ExactSizeIterator::len).collect();
        Pipeline { since, delays: self.schedule.delays.clone(), layers }
    }

    /// How far a limit must be ahead of the complete steps for nobody to wait for it: what the schedule needs, and what is told
    /// late.
    pub fn lead(&self) -> usize {
        match self.readback {
            Readback::Now => self.schedule.lead(),
            Readback::Deferred => self.schedule.lead() + READBACK_STEPS,
        }
    }

    /// The step that the run begins with.
    pub fn start(&self) -> usize {
        self.schedule.sync.start
    }

    /// The weights that a set of parameters begins with.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn first_weights(&self, layout: &Layout) -> Result<Tensor> {
        let flat = match &self.resumed {
            Some(saved) => saved.flat(&ShardKind::Weights, layout)?,
            None => layout.initial(self.config.seed)?,
        };
        Ok(flat.f_to_device(self.device)?)
    }

    /// The versions before the first weights that steps with this delay still use, by their numbers.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn older_weights(&self, layout: &Layout, delay: usize) -> Result<Vec<(usize, Tensor)>> {
        let sync = &self.schedule.sync;
        match &self.resumed {
            Some(saved) => (version(sync.since, sync.start, delay)..sync.start)
                .map(|number| Ok((number, saved.older(layout, number)?.f_to_device(self.device)?)))
                .collect(),
            None => Ok(Vec::new()),
        }
    }

    /// The optimizer of a set of parameters, as far as it has come.
    ///
    /// # Errors
    /// Threads that cannot be started, or a saved state that cannot be read.
    pub fn optimizer(&self, layout: &Layout) -> Result<Optimizer> {
        let mut optimizer = Optimizer::new(&self.config.optimizer, layout, self.config.threads, self.device)?;
        if let Some(saved) = self.resumed.as_ref().filter(|saved| saved.step() > 0) {
            let of = |name: &str, layout: &Layout| saved.flat(&ShardKind::State(name.into()), layout);
            optimizer.restore(saved.step(), of)?;
        }
        Ok(optimizer)
    }

    /// What the layers of a stage remember of the rows of every microbatch.
    ///
    /// # Errors
    /// A saved state that cannot be read.
    pub fn memories(&self, stack: &Stack, replica: usize) -> Result<BTreeMap<usize, Memory>> {
        let Some(saved) = &self.resumed else { return Ok(BTreeMap::new()) };
        let kind = self.config.precision.kind();
        let states = |layer: &str, j| -> Result<Option<Tensor>> {
            let states = saved.memory(layer, self.train_rows(replica, j))?;
            Ok(states.map(|states| states.f_to_device(self.device)?.f_to_kind(kind)).transpose()?)
        };
        let of = |j| stack.recalled(self.config.model.mem_len, |layer| states(layer, j));
        (0..self.config.microbatches).map(|j| Ok((j, of(j)?))).collect()
    }

    /// How activations and their gradients travel: bf16 ones need no more.
    pub fn hidden_wire(&self) -> Wire {
        match self.config.precision {
            Precision::F32 | Precision::Tf32 => self.config.wire,
            Precision::Bf16 => Wire::Bf16,
        }
    }

    /// The layers of one stage.
    pub fn stack(&self, stage: usize) -> Stack {
        Stack::new(&self.dimensions, self.partition[stage].clone())
    }

    /// Where one stage's own parameters stand in its flat buffers.
    pub fn layout(&self, stage: usize) -> Layout {
        Layout::new(&self.stack(stage).own())
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

    /// Whether replicas compare their weights after so many updates.
    pub fn verifies_at(&self, step: usize) -> bool {
        self.config.verify_every.is_some_and(|every| step.is_multiple_of(every))
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

/// Tokens that the held-out text must have for one window; one if nothing is evaluated.
fn held_sequence(config: &Config) -> usize {
    config.eval.as_ref().map_or(1, |_| config.eval_sequence())
}

/// What can be said of the layers and streams before the text is opened.
fn check_counts(config: &Config) -> Result<()> {
    hand_made(config)?;
    let (streams, replicas) = (config.eval_batch(), config.grid.replicas);
    if config.eval.is_some() && config.order() == Order::Streams && !streams.is_multiple_of(replicas) {
        let remedy = format!("must be a multiple of grid.replicas = {replicas}");
        return Err(Error::config("eval.batch", streams, remedy));
    }
    Ok(())
}

/// The share of a replica in an evaluation (windows or streams), and its microbatches.
fn evaluation(config: &Config, eval: &EvalConfig, held_out: &Tokens, rows: usize) -> Result<(usize, usize)> {
    let (shape, replicas) = (config.reading().eval, config.grid.replicas);
    let (share, microbatches, wanted) = match config.order() {
        Order::Shuffled => {
            let wanted = shape.wanted_windows(held_out, eval.tokens);
            (wanted / replicas, (wanted / replicas).div_ceil(rows), wanted)
        }
        Order::Streams => {
            let wanted = shape.wanted_segments(held_out, eval.tokens);
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
    if config.order() == Order::Shuffled || config.reading().train.segments(&corpus.train) > 0 {
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
    if let Some(runs) = hand_made(config)? {
        return Ok(runs);
    }
    let costs = model::costs(dimensions);
    let blocks = vec![costs.block; config.model.layers];
    let cut = match config.grid.placement {
        Placement::Line => partition::balanced,
        Placement::Ring => partition::balanced_ring,
    };
    Ok(cut(&blocks, costs.embedding, costs.head, config.grid.stages))
}

/// The runs of layers that the config lists, if it does.
fn hand_made(config: &Config) -> Result<Option<Vec<Range<usize>>>> {
    let LayersPerStage::Counts(counts) = &config.grid.layers_per_stage else { return Ok(None) };
    let wrong = |remedy| Error::config("grid.layers_per_stage", format!("{counts:?}"), remedy);
    if counts.len() != config.grid.stages {
        return Err(wrong(format!("needs one number for each of grid.stages = {}", config.grid.stages)));
    }
    let remedy = || format!("every number at least 1, together model.layers = {}", config.model.layers);
    partition::by_hand(counts, config.model.layers).map(Some).ok_or_else(|| wrong(remedy()))
}

fn schedule(config: &Config) -> Result<Schedule> {
    let mut sync = SyncPoints::ends(config.steps);
    sync.warm_up = config.sync_steps;
    sync.at.extend(&config.sync_at);
    sync.periods.extend(config.eval.as_ref().map(|eval| eval.every));
    sync.periods.extend(config.checkpoint.every);
    let stages = config.grid.stages;
    let mut schedule = Schedule::new(config.schedule, stages, config.microbatches, config.slack, sync);
    (schedule.placement, schedule.tie) = (config.grid.placement, config.model.tie);
    schedule.saves = Some(config.checkpoint.every.unwrap_or(config.steps));
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
    let lists: Vec<_> = (0..grid.size()).map(|rank| short.device_actions(rank % grid.devices()).collect()).collect();
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
