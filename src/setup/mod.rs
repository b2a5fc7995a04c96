//! What is true: a config checked once, with everything that follows from it. Nobody checks again.

mod picture;
pub mod plan;
mod restore;

use std::ops::Range;
use std::sync::Arc;

use tch::Device;

use crate::checkpoint::{Checkpoint, Pipeline};
use crate::config::Config;
use crate::data::{Corpus, Order, Source, Unit};
use crate::delay::version;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::model::{self, Dimensions, Stack, TieGradient};
use crate::number::{READBACK_STEPS, Readback};
use crate::optim::state_layouts;
use crate::params::Layout;
use crate::precision::Precision;
use crate::schedule::{Evals, Schedule};
use crate::staleness::Meter;
use crate::wire::Wire;

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
    pub eval_rows_per_replica: usize,
    /// The saved state that the run goes on from; none: it begins with initial weights.
    pub resumed: Option<Arc<Checkpoint>>,
    /// The saved weights that it begins with, at step 0.
    pub initial: Option<Arc<Checkpoint>>,
    /// What this process computes on.
    pub device: Device,
    /// When losses and norms are read: later on a GPU; elsewhere so for tests only.
    pub readback: Readback,
}

impl Setup {
    /// Checks a config and opens its corpus.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error) and [`Error::Data`](crate::error::Error), naming
    /// setting, value and remedy.
    pub fn new(config: Config) -> Result<Setup> {
        config.check()?;
        let grid = config.grid();
        let rows = plan::rows(&config)?;
        let mut schedule = plan::schedule(&config)?;
        plan::check_counts(&config)?;

        let corpus =
            Arc::new(Corpus::open(&config.data, config.seed, plan::held_sequence(&config), None)?);
        let vocabulary = config.model.table_rows(corpus.vocabulary.len())?;
        config.model.check_cutoffs(vocabulary)?;
        let shares = corpus.shares(&config.model.cutoffs);
        let mut dimensions = Dimensions::new(&config.model, vocabulary, config.data.sequence);
        dimensions.shares = shares;
        dimensions.on_processor = config.precision == Precision::F32;
        let partition = plan::layers(&config, &dimensions)?;
        plan::check_streams(&config, &corpus)?;
        plan::check_mixture(&config, &corpus)?;
        plan::check_documents(&config, &corpus)?;

        let eval_rows_per_replica = match &config.eval {
            Some(eval) => {
                let (share, microbatches) =
                    plan::evaluation(&config, &corpus.held_out.tokens, rows)?;
                schedule.evals = Some(Evals { every: eval.every, microbatches });
                share
            }
            None => 0,
        };

        plan::check_schedule(&schedule, grid)?;
        plan::check_staleness(&config, &schedule)?;
        Ok(Setup {
            config,
            grid,
            dimensions,
            partition,
            schedule,
            corpus,
            rows,
            eval_rows_per_replica,
            resumed: None,
            initial: None,
            device: Device::Cpu,
            readback: Readback::Now,
        })
    }

    /// What measures the staleness of weights on the ranks of a replica; none where nothing is
    /// measured, or another replica does.
    pub fn meter(&self, layout: &Layout, replica: usize) -> Result<Option<Meter>> {
        let every = self.config.staleness.every.filter(|_| replica == 0);
        every.map(|every| Meter::new(layout, every, self.device)).transpose()
    }

    /// The version that the first measured step from `step` on uses of weights with a delay.
    pub fn measured_version(&self, meter: &Meter, step: usize, delay: usize) -> usize {
        let measured = meter.next(step);
        version(self.schedule.sync.before(measured), measured, delay)
    }

    /// The same run on another device.
    pub fn with_device(mut self, device: Device) -> Setup {
        let readback = if device.is_cuda() { Readback::Deferred } else { Readback::Now };
        self.dimensions.on_processor &= !device.is_cuda();
        Setup { device, readback, ..self }
    }

    /// The same run with saved weights, at step 0.
    ///
    /// # Errors
    /// [`Error::Config`] about a key by which the model has other parameters.
    pub fn begin_with(self, saved: Checkpoint) -> Result<Setup> {
        saved.fits_model(
            &self.config,
            "initial weights are for the model that they were saved of",
        )?;
        // An import knows no text, and not always a tokenizer.
        if saved.manifest.text.is_some() || saved.vocabulary.unit() == Unit::Subwords {
            self.check_vocabulary(&saved)?;
        }

        Ok(Setup { initial: Some(Arc::new(saved)), ..self })
    }

    /// The same run from a saved state on.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error) about a setting that would make another run of it.
    pub fn resume(self, saved: Checkpoint) -> Result<Setup> {
        saved.fits(&self.config)?;
        self.check_vocabulary(&saved)?;
        let before = &saved.manifest.config;
        let optimizer = self.config.optimizer.going_on(&before.optimizer);
        let earlier = before.optimizer.going_on(&before.optimizer);
        // Other delays, another cut of the layers, another prediction: the state is a sync point.
        let same = self.pipeline(saved.manifest.pipeline.since) == saved.manifest.pipeline
            && before.model.tie == self.config.model.tie
            && earlier.predict() == optimizer.predict()
            && earlier.common.predict_scale == optimizer.common.predict_scale;
        let since = if same { saved.manifest.pipeline.since } else { saved.step() };
        let mut schedule = self.schedule;
        schedule.sync.from(saved.step(), since);
        schedule.saves_again =
            saved.step() == self.config.steps && saved.manifest.grid != self.grid.to_string();
        let config = Config { optimizer, ..self.config };
        Ok(Setup { config, schedule, resumed: Some(Arc::new(saved)), ..self })
    }

    /// Refuses a text whose tokens are not those that the weights know.
    fn check_vocabulary(&self, saved: &Checkpoint) -> Result<()> {
        let Some(difference) = self.corpus.vocabulary.difference(&saved.vocabulary) else {
            return Ok(());
        };

        let (here, there) = (self.corpus.vocabulary.unit(), saved.vocabulary.unit());
        if here != there {
            let remedy = format!("the weights of {} know {}", saved.path.display(), there.word());
            return Err(Error::config("data.tokenizer", here.word(), remedy));
        }

        let problem =
            format!("its vocabulary is not that of {}: {difference}", saved.path.display());
        let remedy =
            "give the text and the tokenizer that the run began with, or begin another run";
        Err(Error::data(self.config.data.name(), problem, remedy))
    }

    /// Bytes of two states of the run on the disk: the last one is there while the next is written.
    pub fn two_states(&self) -> u64 {
        let layout = Layout::new(&model::parameters(&self.dimensions));
        let state: usize =
            state_layouts(&self.config.optimizer, &layout).iter().map(Layout::count).sum();
        2 * ((self.parameters() + state) * size_of::<f32>()) as u64
    }

    /// What the run reads that is another than before, as far as that is no error: for the user to
    /// know.
    pub fn other_texts(&self) -> Vec<String> {
        let Some(saved) = &self.resumed else { return Vec::new() };
        let (before, now) = (&saved.manifest.config, &self.config);
        let mut notes = Vec::new();
        if before.order() != now.order() {
            notes.push(
                "note: data.order is another than before: every step from here on reads other rows"
                    .to_owned(),
            );
        }

        if before.data.document_mask != now.data.document_mask {
            let note = "note: data.document_mask is another than before: attention sees other tokens from here on";
            notes.push(note.to_owned());
        }

        if before.data.end_token != now.data.end_token && now.data.document_mask {
            let note =
                "note: data.end_token is another than before: documents end elsewhere from here on";
            notes.push(note.to_owned());
        }

        let Some(text) = &saved.manifest.text else { return notes };

        let found = self.corpus.fingerprint();
        if text.train != found.train {
            notes.push(format!(
                "note: the training text is another than before ({} {}s, then {}): every step from here on reads other rows",
                found.train_tokens,
                self.corpus.vocabulary.name(),
                text.train_tokens
            ));
        }

        if text.held_out != found.held_out {
            let text = "note: the held-out text is another than before: evaluations from here on are not to be compared with earlier ones";
            notes.push(text.to_owned());
        }
        notes
    }

    /// What a state needs to know of the pipeline.
    pub fn pipeline(&self, since: usize) -> Pipeline {
        let layers = self.partition.iter().map(ExactSizeIterator::len).collect();
        Pipeline { since, delays: self.schedule.delays.clone(), layers }
    }

    /// How far a limit must be ahead of the complete steps for nobody to wait for it: what the
    /// schedule needs, and what is told late.
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

    /// How activations and their gradients travel: bf16 ones need no more.
    pub fn hidden_wire(&self) -> Wire {
        match self.config.precision {
            Precision::F32 | Precision::Tf32 => self.config.wire,
            Precision::Bf16 => Wire::Bf16,
        }
    }

    /// Values of the largest message between two places: hidden states of a microbatch, or a part
    /// of the tied table's gradient.
    pub fn largest_message(&self) -> usize {
        let trained = self.rows * self.config.data.sequence;
        let evaluated = self.eval_rows_per_replica * self.config.eval_sequence();
        let hidden = trained.max(evaluated) * self.dimensions.d_model as usize;
        hidden.max(Layout::new(&model::table(&self.dimensions)).len)
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

    /// Held-out windows that make up a microbatch of an evaluation, the replica's share evenly cut;
    /// or the replica's streams, of which every microbatch is a segment.
    pub fn eval_rows(&self, replica: usize, microbatch: usize) -> Range<usize> {
        let (share, start) = (self.eval_rows_per_replica, replica * self.eval_rows_per_replica);
        match self.config.order() {
            Order::Shuffled => {
                let microbatches = self.schedule.evals.map_or(1, |evals| evals.microbatches);
                let cut = |i: usize| start + i * share / microbatches;
                cut(microbatch)..cut(microbatch + 1)
            }
            Order::Streams => start..start + share,
        }
    }

    /// Steps of an epoch of a source, if it were read alone, and the tokens that they read; what is
    /// left of the text is read in another epoch, or never (streams).
    pub fn epoch(&self, source: &Source) -> (usize, usize) {
        let text = &source.tokens;
        let train = self.config.reading().train;
        match self.config.order() {
            Order::Shuffled => {
                let windows = train.epoch_windows(text);
                (windows.div_ceil(train.rows), windows * train.sequence)
            }
            Order::Streams => {
                let segments = train.segments(text);
                (segments, segments * train.rows * train.sequence)
            }
        }
    }

    /// Tokens that each source of a mixture has given after so many steps.
    pub fn given(&self, steps: usize) -> Option<Vec<usize>> {
        let (config, sources) = (&self.config, self.corpus.sources.len());
        if sources == 1 {
            return None;
        }

        let rows = self.corpus.mixture.given(steps * config.batch, sources);
        Some(rows.into_iter().map(|rows| rows * config.data.sequence).collect())
    }

    /// Whether replicas compare their weights after so many updates.
    pub fn verifies_at(&self, step: usize) -> bool {
        self.config.verify_every.is_some_and(|every| step.is_multiple_of(every))
    }

    /// Whether a microbatch is the last of an evaluation.
    pub fn ends_evaluation(&self, microbatch: usize) -> bool {
        self.schedule.evals.is_some_and(|evals| microbatch + 1 == evals.microbatches)
    }
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
    fn a_later_all_reduce_is_one_more_update_of_delay_on_every_stage() {
        let delays =
            |text: &str| Setup::new(Config::parse(text, &[]).unwrap()).unwrap().schedule.delays;
        assert_eq!(delays("microbatches = 1\n[grid]\nstages = 4\nreduce_delay = 1"), [4, 3, 2, 1]);
        assert_eq!(delays("microbatches = 4\n[grid]\nstages = 4\nreduce_delay = 1"), [2, 2, 2, 1]);
        assert_eq!(delays("[grid]\nreplicas = 2\nreduce_delay = 1"), [1]);
    }

    #[test]
    fn every_row_is_read_once() {
        let text =
            "batch = 24\nmicrobatches = 3\n[grid]\nreplicas = 2\n[eval]\nevery = 5\ntokens = 2900";
        let setup = Setup::new(Config::parse(text, &[]).unwrap()).unwrap();
        let rows = |f: &dyn Fn(usize, usize) -> Range<usize>, m: usize| -> Vec<usize> {
            (0..2).flat_map(|r| (0..m).map(move |j| (r, j))).flat_map(|(r, j)| f(r, j)).collect()
        };
        assert_eq!(rows(&|r, j| setup.train_rows(r, j), 3), (0..24).collect::<Vec<_>>());
        let microbatches = setup.schedule.evals.unwrap().microbatches;
        // 23 windows, and one of nothing.
        assert_eq!((setup.eval_rows_per_replica, microbatches), (12, 3));
        assert_eq!(rows(&|r, j| setup.eval_rows(r, j), microbatches), (0..24).collect::<Vec<_>>());
    }

    #[test]
    fn bad_settings_are_named_with_value_and_remedy() {
        let table = [
            ("[grid]\nstages = 5", "`grid.stages`: found 5; at most model.layers = 4"),
            (
                "batch = 30",
                "`batch`: found 30; must be a multiple of grid.replicas * microbatches = 1 * 4; the next ones are 28 and 32",
            ),
            (
                "[model]\nd_model = 130",
                "`model.d_model`: found 130; must be a multiple of model.heads = 4, or set model.d_head",
            ),
            ("[model]\nd_head = 0", "`model.d_head`: found 0; must be at least 1"),
            (
                "[model]\nd_head = 500000",
                "`model.heads times model.d_head`: found 2000000; more than 1048576",
            ),
            (
                "[model]\nshared_biases = true",
                "`model.shared_biases`: found true; only model.arch = \"transformer-xl\" has it",
            ),
            (
                "[model]\narch = \"transformer-xl\"\nshared_biases = true\n[grid]\nstages = 2",
                "`model.shared_biases`: found true with 2 stages; one stage's layers can share them",
            ),
            (
                "microbatches = 1\n[grid]\nstages = 4\ndelays = [2, 2, 1, 0]",
                "`grid.delays`: found [2, 2, 1, 0]; stage 0 needs at least 3",
            ),
            (
                "schedule = \"gpipe\"\n[grid]\ndelays = [1]",
                "`grid.delays`: found [1]; only schedule",
            ),
            (
                "schedule = \"1f1b\"\n[grid]\nreduce_delay = 1",
                "`grid.reduce_delay`: found 1; only schedule",
            ),
            (
                "[grid]\ndelays = [1]\nreduce_delay = 1",
                "`grid.reduce_delay`: found 1; grid.delays has",
            ),
            ("[grid]\nreduce_delay = 2", "`grid.reduce_delay`: found 2; must be 0 or 1"),
            (
                "[grid]\nstages = 2\nlayers_per_stage = [1, 2]",
                "`grid.layers_per_stage`: found [1, 2]; every number at least 1, together model.layers = 4",
            ),
            (
                "[grid]\nstages = 2\nlayers_per_stage = [4]",
                "needs one number for each of grid.stages = 2",
            ),
            ("steps = 0", "`steps`: found 0; must be at least 1"),
            ("[model]\ndropout = 1.0", "`model.dropout`: found 1;"),
            ("[optimizer]\nlr = 0.0", "`optimizer.lr`: found 0; must be above 0"),
            ("[optimizer]\nclip = -1.0", "`optimizer.clip`: found -1;"),
            ("[data]\nheld_out = 1.5", "`data.held_out`: found 1.5;"),
            (
                "[data]\npath = \"a\"\nsynthetic = 5",
                "`data`: found more than one of path, paths, synthetic",
            ),
            ("[data]\nsynthetic = 100", "data synthetic: 95 bytes, one window needs 129"),
            ("[data]\npaths = []", "`data.paths`: found an empty list"),
            ("[data]\npath = \"no/such.txt\"", "data no/such.txt: cannot be opened"),
            ("sync_at = [500]", "`sync_at`: found 500; must be below steps = 500"),
        ];
        for (text, expected) in table {
            let found = error(text);
            assert!(
                found.contains(expected),
                "{text}\n  gives     {found}\n  expected  {expected}"
            );
        }
    }
}
