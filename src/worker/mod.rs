//! One device at work: takes its action list and does what each action says.

mod post;
mod later;
mod faults;
mod messages;
mod tied;
mod writer;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::comm::{Beside, Content, Ports, Reduction, Reporter};
use crate::config::OnNonfinite;
use crate::data::Batches;
use crate::delay::version;
use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::metrics::clock::{Clock, Share};
use crate::metrics::memory::{self, Gauge};
use crate::metrics::{Mode, Report};
use crate::model::{Dimensions, Memory, ModelConfig, Stack};
use crate::number::Number;
use crate::optim::{UpdateScalars, learning_rate, norm};
use crate::panel::{Panel, Word};
use crate::params::{Layout, Versions, bytes, here};
use crate::pulse::Doing;
use crate::schedule::{Action, Op, Pass, Tie};
use crate::setup::Setup;
use crate::stage::{At, Bucket, Input, Output, Slot};
use crate::table::Table;
use faults::flip;
use later::Later;
use messages::taken;
use post::Post;
use tied::table_of;
use writer::Writer;

/// A device with everything it needs.
pub struct Worker {
    setup: Arc<Setup>,
    rank: usize,
    /// One, or two on the first device of a ring.
    posts: Vec<Post>,
    /// The tied table, if a place here uses it, and its all-reduce under way.
    table: Option<Table>,
    table_reduction: Option<Reduction>,
    reports: Reporter,
    panel: Arc<Panel>,
    /// Where the run was told to stop.
    stop: Option<usize>,
    batches: Batches,
    mode: Mode,
    gauge: Option<Gauge>,
    clock: Clock,
    /// Losses and norms that are not known yet.
    later: Later,
    beside: Option<Arc<dyn Beside>>,
    /// Saves beside the training.
    writer: Option<Writer>,
}

impl Worker {
    /// Builds the stages of `rank` with their initial weights. `out` is the run's folder.
    ///
    /// # Errors
    /// What libtorch reports, or threads that cannot be started.
    pub fn new(setup: Arc<Setup>, rank: usize, ports: Ports, out: PathBuf, mode: Mode) -> Result<Worker> {
        let of = Arc::clone(&setup);
        Worker::built(setup, rank, ports, out, mode).map_err(|error| with_need(error, &of, rank))
    }

    fn built(setup: Arc<Setup>, rank: usize, ports: Ports, out: PathBuf, mode: Mode) -> Result<Worker> {
        // Per thread: the thread pool of libtorch's kernels belongs to the thread that calls them.
        tch::set_num_threads(setup.config.threads as i32);
        warm_up(setup.config.precision.kind(), setup.device)?;
        let mut gauge = Gauge::on(setup.device)?;
        let config = &setup.config;
        let held = setup.grid.held(rank);
        let mut posts: Vec<Post> = held
            .iter()
            .zip(ports.places)
            .map(|(place, ends)| Post::new(&setup, *place, ends))
            .collect::<Result<_>>()?;
        let shared = posts.iter().map(|post| post.shared as u64).sum();
        gauge.iter_mut().for_each(|gauge| gauge.shares(shared));
        if let Some(emulation) = &mode.emulation {
            posts.iter_mut().for_each(|post| post.stage.emulate(emulation.sleep(&setup.schedule, post.place.stage)));
        }
        let mut table = table_of(&setup, rank)?;
        if setup.late && mode.emulation.is_none() {
            rehearse(&setup, &mut posts, &mut table)?;
        }
        let batches = Batches::new(Arc::clone(&setup.corpus), config.reading());
        let (reports, panel) = (ports.reports, ports.panel);
        let stages: Vec<usize> = held.iter().map(|place| place.stage).collect();
        let clock = Clock::new(&setup.schedule, &stages);
        let writer = Some(Writer::start(out, reports.clone())?);
        let later = Later::new(setup.device, reports.clone(), ports.beside.clone())?;
        Ok(Worker {
            rank,
            posts,
            table,
            table_reduction: None,
            reports,
            panel,
            stop: None,
            batches,
            mode,
            gauge,
            clock,
            later,
            beside: ports.beside,
            writer,
            setup,
        })
    }

    /// Runs the whole action list, or up to where the run is told to stop, then says goodbye. Whether it was stopped.
    ///
    /// # Errors
    /// The first thing that goes wrong here, or the loss of a peer.
    pub fn run(mut self) -> Result<bool> {
        match self.work() {
            Ok(()) => self.finish(),
            Err(error) => Err(self.located(error)),
        }
    }

    /// An error with what this rank has read in its step.
    fn located(&self, error: Error) -> Error {
        let Error::NotFinite { tensor, step, place, .. } = error else {
            return with_need(error, &self.setup, self.rank);
        };
        let setup = &self.setup;
        let (first, last) = (
            setup.train_rows(place.replica, 0).start,
            setup.train_rows(place.replica, setup.config.microbatches - 1).end,
        );
        let starts = self.batches.starts(step, first..last);
        let data = format!(", rows {first} to {} of the batch, from the tokens {starts:?} of the text on", last - 1);
        Error::NotFinite { tensor, step, place, data }
    }

    fn work(&mut self) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let mut actions = setup.schedule.device_actions(setup.grid.device_of(self.rank));
        actions.set_limit(self.panel.limit());
        // The actions up to the next one that computes, whose messages are expected while the one before it computes.
        let mut upcoming = VecDeque::new();
        loop {
            let Some(action) = upcoming.pop_front().or_else(|| actions.next()) else {
                let Some(step) = actions.held() else { break };
                if self.panel.limit() > step {
                    actions.set_limit(self.panel.limit());
                    continue;
                }
                // Who tells how far to go has to know how far this is.
                self.later.flush()?;
                match self.panel.wait(step)? {
                    Word::Go(limit) => actions.set_limit(limit),
                    Word::Stop => {
                        actions.stop(step);
                        self.stop = Some(step);
                    }
                }
                continue;
            };
            if upcoming.is_empty() && action.op.computes() {
                self.look_ahead(&mut actions, &mut upcoming)?;
            }
            tracing::trace!(%action);
            self.panel.pulse.action(action);
            self.run_injection(&action)?;
            self.clock.lap(Share::Idle);
            match action.op {
                Op::Load => self.load(&action)?,
                Op::RecvActivation => self.receive(Content::Activation, &action)?,
                Op::Forward => self.forward(&action)?,
                Op::SendActivation => self.send(Content::Activation, &action)?,
                Op::RecvGradient => self.receive(Content::Gradient, &action)?,
                Op::Backward => self.backward(&action)?,
                Op::SendGradient => self.send(Content::Gradient, &action)?,
                Op::Reduce => self.reduce(&action)?,
                Op::Update => self.update(&action)?,
                Op::Part => self.close_part(&action)?,
                Op::RecvPart => self.receive_part(&action)?,
                Op::ReduceTable => self.reduce_table(&action)?,
                Op::SendTable => self.send_table(&action)?,
                Op::RecvTable => self.receive_table(&action)?,
                Op::UpdateTable => self.update_table(&action)?,
                Op::AwaitTable => self.await_table(&action)?,
                Op::Digest => self.digest(&action)?,
                Op::Save => self.save(&action)?,
            }
            self.clock.passed(&action);
        }
        Ok(())
    }

    /// The place that an action belongs to.
    fn post(&mut self, action: &Action) -> &mut Post {
        let devices = self.setup.grid.devices();
        &mut self.posts[action.stage / devices]
    }

    fn load(&mut self, action: &Action) -> Result<()> {
        let replica = self.posts[0].place.replica;
        let batch = match action.pass {
            Pass::Train => self.batches.train(action.step, self.setup.train_rows(replica, action.microbatch)),
            Pass::Eval => self.batches.held_out(self.setup.eval_rows(replica, action.microbatch), action.microbatch),
        };
        self.post(action).registers.batch = Some(batch.on(self.setup.device)?);
        Ok(())
    }

    fn forward(&mut self, action: &Action) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let restart = match action.pass {
            Pass::Train => self.batches.restarts(action.step),
            Pass::Eval => action.microbatch == 0,
        };
        let table = self.table.as_ref();
        let post = &mut self.posts[action.stage / setup.grid.devices()];
        let mut batch = post.registers.batch.take();
        let x = match &mut batch {
            Some(batch) if post.place.stage == 0 => batch.tokens.shallow_clone(),
            _ => taken(&mut post.registers.activation, action)?,
        };
        let last = post.place.stage == setup.grid.stages - 1;
        let input = Input { x, targets: batch.filter(|_| last).map(|batch| batch.targets), restart };
        let output = match action.pass {
            Pass::Train => {
                let schedule = &setup.schedule;
                if action.microbatch == 0 && action.step > setup.start() && schedule.sync.contains(action.step) {
                    post.sync = action.step;
                }
                let at = |delay| version(post.sync, action.step, delay);
                let at = At { own: at(schedule.delays[post.place.stage]), table: at(schedule.table_delay()) };
                let slot = Slot { step: action.step, microbatch: action.microbatch };
                post.stage.forward(slot, at, table, input)?
            }
            Pass::Eval => {
                let output = post.stage.evaluate(table, &input)?;
                if setup.ends_evaluation(action.microbatch) {
                    post.stage.end_evaluation();
                }
                output
            }
        };
        match output {
            Output::Hidden(y) => post.registers.activation = Some(y),
            Output::Loss(loss) if action.pass == Pass::Train => self.add_loss(action, loss)?,
            Output::Loss(sum) => self.add_evaluation(action, sum)?,
        }
        Ok(())
    }

    fn add_loss(&mut self, action: &Action, loss: Number) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let (step, microbatches, post) = (action.step, setup.config.microbatches, self.post(action));
        let place = post.place;
        let sum = std::mem::replace(&mut post.loss, Number::Known(0.0)).plus(loss)?;
        if action.microbatch + 1 < microbatches {
            post.loss = sum;
            return Ok(());
        }
        let skips = setup.config.on_nonfinite == OnNonfinite::Skip;
        self.later.tell(step, sum, move |sum| {
            let loss = sum / microbatches as f64;
            match loss.is_finite() || skips {
                true => Ok(Some(Report::Loss { replica: place.replica, step, loss })),
                false => Err(Error::NotFinite { tensor: "the loss".into(), step, place, data: String::new() }),
            }
        })
    }

    fn add_evaluation(&mut self, action: &Action, sum: Number) -> Result<()> {
        let (setup, step) = (Arc::clone(&self.setup), action.step);
        let post = self.post(action);
        let replica = post.place.replica;
        post.eval.0 = std::mem::replace(&mut post.eval.0, Number::Known(0.0)).plus(sum)?;
        post.eval.1 += setup.eval_rows(replica, action.microbatch).len() * setup.config.eval_sequence();
        if setup.ends_evaluation(action.microbatch) {
            let (sum, tokens) = std::mem::replace(&mut post.eval, (Number::Known(0.0), 0));
            self.later.tell(step, sum, move |loss_sum| Ok(Some(Report::Eval { replica, step, loss_sum, tokens })))?;
        }
        Ok(())
    }

    /// On the last microbatch of a step buckets of the gradient are reduced as soon as they are complete.
    fn backward(&mut self, action: &Action) -> Result<()> {
        let slot = Slot { step: action.step, microbatch: action.microbatch };
        let table = self.table.as_ref();
        let post = &mut self.posts[action.stage / self.setup.grid.devices()];
        let Post { stage, ends, reductions, unreduced, registers, .. } = post;
        let mut ready = |bucket: Bucket| -> Result<()> {
            if let Some(group) = &mut ends.group {
                reductions.push(group.all_reduce(action.step, bucket.values)?);
                *unreduced = bucket.offset;
            }
            Ok(())
        };
        registers.gradient = stage.backward(slot, table, registers.gradient.take(), &mut ready)?;
        Ok(())
    }

    /// Starts the all-reduce of what the backward has left.
    fn reduce(&mut self, action: &Action) -> Result<()> {
        let Post { stage, ends, reductions, unreduced, .. } = self.post(action);
        if let Some(group) = &mut ends.group {
            let rest = stage.versions.gradient(0).f_narrow(0, 0, *unreduced as i64)?;
            reductions.push(group.all_reduce(action.step, rest)?);
            *unreduced = stage.versions.layout().len;
        }
        Ok(())
    }

    /// What makes the mean of a sum over microbatches and replicas.
    fn mean(&self) -> f64 {
        1.0 / (self.setup.config.microbatches * self.setup.grid.replicas) as f64
    }

    /// `W[t+1] = W[t] + optimizer(mean over microbatches and replicas)`.
    fn update(&mut self, action: &Action) -> Result<()> {
        let (setup, mean) = (Arc::clone(&self.setup), self.mean());
        let config = &setup.config;
        self.post(action).reductions.drain(..).try_for_each(Reduction::wait)?;
        self.clock.lap(Share::Reduce);
        if self.mode.emulation.is_some() {
            self.post(action).stage.versions.advance(|_| Ok(()))?;
            return self.report_norm(action, Number::Known(0.0));
        }
        let post = self.post(action);
        let norm = norm(post.stage.versions.gradient(0), setup.late)?;
        if let Number::Known(norm) = norm
            && !norm.is_finite()
            && config.on_nonfinite == OnNonfinite::Stop
        {
            return Err(post.bad_gradient(action.step)?);
        }
        let lr = learning_rate(&config.optimizer, action.step, config.steps);
        let (optimizer, scalars) = (&mut post.optimizer, UpdateScalars { lr, mean, norm: &norm });
        post.stage.versions.advance(|buffers| optimizer.update(buffers, &scalars))?;
        if self.injected(Fault::AlterWeights, action) {
            self.post(action).stage.versions.alter(flip)?;
        }
        self.verify(action)?;
        let seconds = self.panel.pulse.busy();
        self.reports.send(Report::Busy { rank: self.rank, seconds })?;
        self.report_norm(action, norm.times(mean)?)?;
        self.gauge.as_mut().map_or(Ok(()), Gauge::look)?;
        self.later.look(action.step)
    }

    /// Tells the digest of the new weights, if it is time, for replicas to be compared.
    fn verify(&mut self, action: &Action) -> Result<()> {
        let step = action.step + 1;
        if self.setup.grid.replicas == 1 || !self.setup.verifies_at(step) {
            return Ok(());
        }
        let post = self.post(action);
        let (place, digest) = (post.place, xxh3_64(bytes(&here(post.stage.versions.flat())?)));
        self.reports.send(Report::Digest { place, step, digest })
    }

    fn report_norm(&mut self, action: &Action, norm: Number) -> Result<()> {
        let (place, step) = (self.post(action).place, action.step);
        let skips = self.setup.config.on_nonfinite == OnNonfinite::Skip;
        self.later.tell(step, norm, move |norm| match norm.is_finite() || skips {
            // The replicas have the same.
            true => Ok((place.replica == 0).then_some(Report::Norm { stage: place.stage, step, norm })),
            false => Err(Error::NotFinite { tensor: "a gradient".into(), step, place, data: String::new() }),
        })
    }

    fn finish(mut self) -> Result<bool> {
        self.panel.pulse.doing(Doing::Finishing);
        self.later.flush()?;
        self.beside.as_ref().map_or(Ok(()), |beside| beside.settle())?;
        if let Some(writer) = self.writer.take() {
            writer.finish()?;
        }
        let peak_bytes = self.gauge.as_ref().and_then(Gauge::peak);
        let times = self.clock.times();
        self.reports.send(Report::Done { rank: self.rank, peak_bytes, times })?;
        Ok(self.stop.is_some())
    }
}

/// An error of memory with what was predicted that the rank needs.
fn with_need(error: Error, setup: &Setup, rank: usize) -> Error {
    let Error::Memory(text) = error else { return error };
    let needed = memory::Prediction::new(setup, rank).total().div_ceil(1 << 20);
    Error::Memory(format!("{text}; {needed} MiB were predicted for {}", setup.grid.name(rank)))
}

/// One microbatch of nothing forward and backward through every stage, of which nothing stays but what is loaded and taken on
/// the way: a GPU loads a kernel when it is first used, and may wait for all its work then. By the time that receives are
/// under way, which wait for others, it must have happened.
fn rehearse(setup: &Setup, posts: &mut [Post], table: &mut Option<Table>) -> Result<()> {
    let (rows, sequence, device) = (setup.rows as i64, setup.config.data.sequence as i64, setup.device);
    for post in posts {
        let tokens = || Tensor::f_zeros([rows, sequence], (Kind::Int64, device));
        let hidden = [rows, sequence, setup.dimensions.d_model];
        let x = match post.place.stage {
            0 => tokens()?,
            _ => Tensor::f_zeros(hidden, (setup.config.precision.kind(), device))?,
        };
        let last = post.place.stage == setup.grid.stages - 1;
        let input = Input { x, targets: last.then(tokens).transpose()?, restart: true };
        post.stage.rehearse(table.as_ref(), &input, setup.hidden_wire())?;
    }
    table.as_mut().map_or(Ok(()), Table::forget)
}

/// One forward and backward of a tiny model: loads the parts of libtorch that training needs, so that the peak memory
/// measured after it is the stage's, and the first step is as fast as the others.
fn warm_up(kind: Kind, device: Device) -> Result<()> {
    let model = ModelConfig { layers: 1, d_model: 64, heads: 2, d_ff: 256, tie: Tie::Untied, ..ModelConfig::default() };
    let d = Dimensions::new(&model, 256, 64);
    let stack = Stack::new(&d, 0..1);
    let layout = Layout::new(stack.parameters());
    let versions = Versions::new(layout.clone(), layout.initial(0)?.f_to_device(device)?, 1, 1, kind)?;
    let tokens = Tensor::f_zeros([4, d.sequence], (Kind::Int64, device))?;
    let weights = versions.parameters(0, 0);
    let hidden = stack.forward(weights, &tokens, &mut Memory::new(0), None)?;
    Ok(stack.loss(weights, &hidden, &tokens, None)?.f_backward()?)
}
