//! What follows from a config: rows, layers of every stage, the schedule, the shares of an
//! evaluation. What does not fit together is refused here.

use std::ops::Range;

use crate::config::{Config, LayersPerStage};
use crate::data::{Corpus, Order, Tokens};
use crate::delay::{SyncPoints, lag, least_delay};
use crate::error::{Error, Result};
use crate::grid::{Grid, Placement};
use crate::model::{self, Dimensions};
use crate::partition;
use crate::schedule::{Evals, Schedule, check};
use crate::staleness;

/// Steps of a run whose action lists are checked before it starts; the pattern repeats long before.
const CHECKED_STEPS: usize = 64;

const ONLY_DECOUPLED: &str = "only schedule = \"decoupled\" has delays";

/// Tokens that the held-out text must have for one window; one if nothing is evaluated.
pub(super) fn held_sequence(config: &Config) -> usize {
    config.eval.as_ref().map_or(1, |_| config.eval_sequence())
}

/// What can be said of the layers and streams before the text is opened.
pub(super) fn check_counts(config: &Config) -> Result<()> {
    hand_made(config)?;
    let (streams, replicas) = (config.eval_batch(), config.grid.replicas);
    if config.eval.is_some()
        && config.order() == Order::Streams
        && !streams.is_multiple_of(replicas)
    {
        let remedy = format!("must be a multiple of grid.replicas = {replicas}");
        return Err(Error::config("eval.batch", streams, remedy));
    }

    Ok(())
}

/// The share of a replica in an evaluation (windows or streams), and its microbatches. The last
/// replica's windows may end before its share does.
pub(super) fn evaluation(
    config: &Config,
    held_out: &Tokens,
    rows: usize,
) -> Result<(usize, usize)> {
    let evaluation = config.reading().evaluation(held_out);
    let share = evaluation.rows().div_ceil(config.grid.replicas);
    let microbatches = match config.order() {
        Order::Shuffled => share.div_ceil(rows),
        Order::Streams => evaluation.segments(),
    };

    if evaluation.scored() > 0 {
        return Ok((share, microbatches));
    }

    let remedy = "two are needed at least; change data.held_out or use a longer text";
    Err(Error::config("data.held_out", format!("{} held-out tokens", held_out.len()), remedy))
}

/// Whether the steps whose staleness is measured are far enough apart.
pub(super) fn check_staleness(config: &Config, schedule: &Schedule) -> Result<()> {
    let Some(every) = config.staleness.every else { return Ok(()) };
    let least = staleness::least(schedule.delays.iter().max().copied().unwrap_or(0));
    if every >= least {
        return Ok(());
    }
    let remedy = format!("with the delays of this grid at least {least}");
    Err(Error::config("staleness.every", every, remedy))
}

/// Whether the training text is long enough for its streams.
pub(super) fn check_streams(config: &Config, corpus: &Corpus) -> Result<()> {
    let text = &corpus.sources[0].tokens;
    if config.order() == Order::Shuffled || config.reading().train.segments(text) > 0 {
        return Ok(());
    }
    let needed = config.batch * config.data.sequence + 1;
    let remedy =
        format!("{} streams of {} tokens need {needed}", config.batch, config.data.sequence);
    Err(Error::config("batch", format!("{} tokens of text", text.len()), remedy))
}

/// Whether it is known where documents begin, where attention ends at their borders.
pub(super) fn check_documents(config: &Config, corpus: &Corpus) -> Result<()> {
    if !config.data.document_mask {
        return Ok(());
    }

    match corpus.sources.iter().find(|source| !source.tokens.has_documents()) {
        Some(source) => {
            let remedy = "nobody knows where its documents begin: prepare it, or name a data.tokenizer that has an end token, or data.end_token of bytes or characters";
            let found = format!("true with {}", source.name);
            Err(Error::config("data.document_mask", found, remedy))
        }
        None => Ok(()),
    }
}

/// Whether sources that end have rows for all steps.
pub(super) fn check_mixture(config: &Config, corpus: &Corpus) -> Result<()> {
    let rows = config.steps.saturating_mul(config.batch);
    match corpus.mixture.end {
        Some(end) if end < rows => {
            let steps = end / config.batch;
            let remedy = format!(
                "in so many epochs the sources have rows for {steps} steps: raise data.source.epochs, or take fewer steps"
            );
            Err(Error::config("steps", config.steps, remedy))
        }
        _ => Ok(()),
    }
}

pub(super) fn rows(config: &Config) -> Result<usize> {
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

pub(super) fn layers(config: &Config, dimensions: &Dimensions) -> Result<Vec<Range<usize>>> {
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
        return Err(wrong(format!(
            "needs one number for each of grid.stages = {}",
            config.grid.stages
        )));
    }

    let remedy =
        || format!("every number at least 1, together model.layers = {}", config.model.layers);
    partition::by_hand(counts, config.model.layers).map(Some).ok_or_else(|| wrong(remedy()))
}

/// The schedule of a config.
///
/// # Errors
/// [`Error::Config`] about `grid.delays` or `grid.reduce_delay`.
pub fn schedule(config: &Config) -> Result<Schedule> {
    let mut sync = SyncPoints::ends(config.steps);
    sync.warm_up = config.sync_steps;
    sync.at.extend(&config.sync_at);
    sync.periods.extend(config.eval.as_ref().filter(|eval| eval.drain).map(|eval| eval.every));
    sync.periods.extend(config.checkpoint.every);

    let (stages, m) = (config.grid.stages, config.microbatches);
    let mut schedule = Schedule::new(config.schedule, stages, m, config.slack, sync);
    (schedule.placement, schedule.tie) = (config.grid.placement, config.model.tie);
    schedule.saves = Some(config.checkpoint.every.unwrap_or(config.steps));

    match (&config.grid.delays, config.grid.reduce_delay) {
        (None, 0) => {}
        (Some(delays), 0) => {
            let found = format!("{delays:?}");
            delays_by_hand(config, delays)
                .map_err(|remedy| Error::config("grid.delays", found, remedy))?;
            schedule.delays.clone_from(delays);
        }
        (None, later) if !config.schedule.synchronous() => {
            schedule.delays.iter_mut().for_each(|delay| *delay += later);
        }
        (None, later) => return Err(Error::config("grid.reduce_delay", later, ONLY_DECOUPLED)),
        (Some(_), later) => {
            let remedy = "grid.delays has every delay as it shall be; leave one of them out";
            return Err(Error::config("grid.reduce_delay", later, remedy));
        }
    }

    Ok(schedule)
}

/// Whether every stage has a delay that its lag allows; else what to do.
fn delays_by_hand(config: &Config, delays: &[usize]) -> std::result::Result<(), String> {
    let stages = config.grid.stages;
    if config.schedule.synchronous() {
        return Err(ONLY_DECOUPLED.into());
    }

    if delays.len() != stages {
        return Err(format!("needs one number for each of grid.stages = {stages}"));
    }

    let least = |stage: usize| least_delay(lag(config.slack, stages, stage), config.microbatches);
    match delays.iter().enumerate().find(|(stage, delay)| **delay < least(*stage)) {
        None => Ok(()),
        Some((stage, _)) => {
            let least = least(stage);
            Err(format!(
                "stage {stage} needs at least {least} (slack * (stages - 1 - {stage}) / microbatches)"
            ))
        }
    }
}

/// Runs `check` over the first steps of the run, with the synchronous warm-up cut short so that
/// delayed steps are among them: a fault here is one of the generator.
pub(super) fn check_schedule(schedule: &Schedule, grid: Grid) -> Result<()> {
    let mut short = schedule.clone();
    let longest = schedule.delays.iter().max().copied().unwrap_or(0);
    short.sync.steps = schedule.sync.steps.min(CHECKED_STEPS + 2 * longest);
    short.sync.warm_up = schedule.sync.warm_up.min(2);
    short.sync.at.retain(|at| *at < short.sync.steps);
    short.evals = schedule.evals.map(|evals| Evals { microbatches: 1, ..evals });
    let lists: Vec<_> = (0..grid.size())
        .map(|rank| short.device_actions(rank % grid.devices()).collect())
        .collect();
    check(&short, grid.replicas, &lists)
        .map_err(|fault| Error::Internal(format!("schedule: {fault}")))
}
