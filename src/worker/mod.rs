//! One device at work: takes its action list and does what each action says.
//!
//! ```text
//! context      what all of it reads and nothing changes: the setup, the gate, where reports go
//! place        a place that the device holds: stage, weights, optimizer, links; registers between two actions
//! compute      the stage, or one that sleeps instead of computing
//! tied         the tied table at work
//! upcoming     the next action, as far as rank 0 lets the run go
//! probes       what is done around each action: log, heartbeat, faults on purpose, trace, clock
//! tracing      a place's actions in a trace
//! deferred     losses and norms that are read later
//! writer       the thread that writes checkpoints
//! start        what is made and tried before the first action
//! ```

mod compute;
mod context;
mod deferred;
mod faults;
mod messages;
mod place;
mod probes;
mod start;
mod tied;
mod tracing;
mod upcoming;
mod writer;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::clock::TimeKind;
use crate::comm::{Content, Ports, Reduction};
use crate::config::OnNonfinite;
use crate::control::{Activity, Mode, Report};
use crate::data::Batches;
use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::memory::{Gauge, Prediction};
use crate::number::Number;
use crate::optim::{UpdateScalars, learning_rate, norm};
use crate::params::{bytes, to_host};
use crate::schedule::{Action, Op, Pass};
use crate::setup::Setup;
use crate::stage::{Bucket, Input, MicrobatchId, Output};
use compute::Compute;
use context::Context;
use deferred::Deferred;
use faults::flip;
use messages::taken;
use place::PlaceState;
use probes::Probes;
use tied::TiedTable;
use upcoming::Upcoming;
use writer::Writer;

/// How often a rank tells where its time goes.
const TOLD: Duration = Duration::from_secs(2);

/// A device with everything it needs.
pub struct Worker {
    context: Context,
    /// One, or two on the first device of a ring.
    places: Vec<PlaceState>,
    /// If a place here uses it.
    table: Option<TiedTable>,
    batches: Batches,
    deferred: Deferred,
    probes: Probes,
    gauge: Option<Gauge>,
    /// Saves beside the training.
    writer: Option<Writer>,
    /// Where the run was told to stop.
    stop: Option<usize>,
}

impl Worker {
    /// Builds the stages of `rank` with their initial weights. `out` is the run's folder.
    pub fn new(
        setup: Arc<Setup>,
        rank: usize,
        ports: Ports,
        out: PathBuf,
        mode: Mode,
    ) -> Result<Worker> {
        let of = Arc::clone(&setup);
        start::worker(setup, rank, ports, out, mode).map_err(|error| with_need(error, &of, rank))
    }

    /// Runs the whole action list, or up to where the run is told to stop, then says goodbye.
    /// Whether it was stopped.
    ///
    /// # Errors
    /// The first thing that goes wrong here, or the loss of a peer.
    pub fn run(mut self) -> Result<bool> {
        match self.work() {
            Ok(()) => self.finish(),
            Err(error) => Err(self.located(error)),
        }
    }

    fn work(&mut self) -> Result<()> {
        let setup = Arc::clone(&self.context.setup);
        let mut upcoming = Upcoming::new(&setup, &self.context);

        while let Some(action) = self.next_action(&mut upcoming)? {
            self.probes.begin(&action, &mut self.places[self.context.slot(&action)])?;
            self.execute(&action)?;
            self.probes.end(&action, &self.places[self.context.slot(&action)])?;
            if action.op == Op::Update {
                self.tell_times(action.step + 1, TOLD)?;
            }
        }

        Ok(())
    }

    fn execute(&mut self, action: &Action) -> Result<()> {
        match action.op {
            Op::Load => self.load(action),
            Op::RecvActivation => self.receive(Content::Activation, action),
            Op::Forward => self.forward(action),
            Op::SendActivation => self.send(Content::Activation, action),
            Op::RecvGradient => self.receive(Content::Gradient, action),
            Op::Backward => self.backward(action),
            Op::SendGradient => self.send(Content::Gradient, action),
            Op::Reduce => self.reduce(action),
            Op::Update => self.update(action),
            Op::Part => self.close_part(action),
            Op::RecvPart => self.receive_part(action),
            Op::ReduceTable => self.reduce_table(action),
            Op::SendTable => self.send_table(action),
            Op::RecvTable => self.receive_table(action),
            Op::UpdateTable => self.update_table(action),
            Op::AwaitTable => self.await_table(action),
            Op::Digest => self.digest(action),
            Op::Save => self.save(action),
        }
    }

    /// The place that an action belongs to.
    fn place(&mut self, action: &Action) -> &mut PlaceState {
        &mut self.places[self.context.slot(action)]
    }

    fn load(&mut self, action: &Action) -> Result<()> {
        let setup = &self.context.setup;
        let replica = self.context.replica;
        let batch = match action.pass {
            Pass::Train => {
                self.batches.train(action.step, setup.train_rows(replica, action.microbatch))?
            }
            Pass::Eval => self
                .batches
                .held_out(setup.eval_rows(replica, action.microbatch), action.microbatch)?,
        };

        let place = self.place(action);
        if action.pass == Pass::Eval {
            place.eval.1 += batch.counted;
        }

        place.registers.batch = Some(batch);
        Ok(())
    }

    fn forward(&mut self, action: &Action) -> Result<()> {
        let restart = match action.pass {
            Pass::Train => self.batches.restarts(action.step),
            Pass::Eval => action.microbatch == 0,
        };

        let documents = self.documents(action);
        let Worker { context, places, table, .. } = self;
        let place = &mut places[context.slot(action)];
        let mut batch = place.registers.batch.take();
        let x = match &mut batch {
            Some(batch) if place.place.stage == 0 => batch.tokens.shallow_clone(),
            _ => taken(&mut place.registers.activation, action)?,
        };

        let last = place.place.stage == context.setup.grid.stages - 1;
        let input = Input {
            x,
            targets: batch.filter(|_| last).map(|batch| batch.targets),
            restart,
            documents,
        };

        let table = table.as_ref().map(TiedTable::table);
        let output = match action.pass {
            Pass::Train => place.train(context, table, action, input)?,
            Pass::Eval => place.evaluate(context, table, action, &input)?,
        };

        match output {
            Output::Hidden(y) => place.registers.activation = Some(y),
            Output::Loss(loss) if action.pass == Pass::Train => self.add_loss(action, loss)?,
            Output::Loss(sum) => self.add_evaluation(action, sum)?,
        }

        Ok(())
    }

    /// Where the documents of a microbatch's rows begin, if its layers look at that.
    fn documents(&self, action: &Action) -> Option<tch::Tensor> {
        let (setup, replica) = (&self.context.setup, self.context.replica);
        if !setup.config.data.document_mask {
            return None;
        }

        let microbatch = action.microbatch;
        Some(match action.pass {
            Pass::Train => {
                self.batches.documents(action.step, setup.train_rows(replica, microbatch))
            }
            Pass::Eval => {
                self.batches.held_out_documents(setup.eval_rows(replica, microbatch), microbatch)
            }
        })
    }

    fn add_loss(&mut self, action: &Action, loss: Number) -> Result<()> {
        let microbatches = self.context.setup.config.microbatches;
        let skips = self.context.skips();
        let place = self.place(action);
        let sum = std::mem::replace(&mut place.loss, Number::Known(0.0)).plus(loss)?;
        if action.microbatch + 1 < microbatches {
            place.loss = sum;
            return Ok(());
        }

        let (place, step) = (place.place, action.step);
        self.deferred.defer(step, sum, move |sum| {
            let loss = sum / microbatches as f64;
            match loss.is_finite() || skips {
                true => Ok(Some(Report::Loss { replica: place.replica, step, loss })),
                false => Err(Error::NotFinite {
                    tensor: "the loss".into(),
                    step,
                    place,
                    data: String::new(),
                }),
            }
        })
    }

    fn add_evaluation(&mut self, action: &Action, sum: Number) -> Result<()> {
        let Worker { context, places, deferred, .. } = self;
        let (setup, place) = (&context.setup, &mut places[context.slot(action)]);
        let (step, replica) = (action.step, place.place.replica);
        place.eval.0 = std::mem::replace(&mut place.eval.0, Number::Known(0.0)).plus(sum)?;

        if setup.ends_evaluation(action.microbatch) {
            let (sum, tokens) = std::mem::replace(&mut place.eval, (Number::Known(0.0), 0));
            deferred.defer(step, sum, move |loss_sum| {
                Ok(Some(Report::Eval { replica, step, loss_sum, tokens }))
            })?;
        }

        Ok(())
    }

    /// On the last microbatch of a step buckets of the gradient are reduced as soon as they are
    /// complete.
    fn backward(&mut self, action: &Action) -> Result<()> {
        let Worker { context, places, table, .. } = self;
        let PlaceState { compute, versions, ends, reductions, unreduced, registers, .. } =
            &mut places[context.slot(action)];

        let mut ready = |bucket: Bucket| -> Result<()> {
            if let Some(group) = &mut ends.group {
                reductions.push(group.all_reduce(action.step, bucket.values)?);
                *unreduced = bucket.offset;
            }

            Ok(())
        };

        let slot = MicrobatchId { step: action.step, microbatch: action.microbatch };
        let held = place::held(versions, table.as_ref().map(TiedTable::table));
        registers.gradient = compute.backward(slot, held, registers.gradient.take(), &mut ready)?;
        Ok(())
    }

    /// Starts the all-reduce of what the backward has left.
    fn reduce(&mut self, action: &Action) -> Result<()> {
        let PlaceState { versions, ends, reductions, unreduced, .. } = self.place(action);
        if let Some(group) = &mut ends.group {
            let rest = versions.gradient(0).f_narrow(0, 0, *unreduced as i64)?;
            reductions.push(group.all_reduce(action.step, rest)?);
            *unreduced = versions.layout().len;
        }
        Ok(())
    }

    /// `W[t+1] = W[t] + optimizer(mean over microbatches and replicas)`.
    fn update(&mut self, action: &Action) -> Result<()> {
        self.place(action).reductions.drain(..).try_for_each(Reduction::wait)?;
        self.probes.waited(TimeKind::Reduce)?;

        let Worker { context, places, .. } = self;
        let place = &mut places[context.slot(action)];
        if matches!(place.compute, Compute::Asleep(_)) {
            place.versions.advance(0.0, |_| Ok(()))?;
            return self.report_norm(action, Number::Known(0.0));
        }

        let config = &context.setup.config;
        let norm = norm(place.versions.gradient(0), context.setup.readback)?;
        let norm = place.optimizer.usable(norm, context.mean())?;
        if let Number::Known(norm) = norm
            && !norm.is_finite()
            && config.on_nonfinite == OnNonfinite::Stop
        {
            return Err(place.bad_gradient(action.step)?);
        }

        if let Some(measured) = place.measure(&context.setup.schedule, action.step)? {
            let (stage, step) = (Some(place.place.stage), action.step);
            context.reports.send(Report::Staleness { stage, step, measured })?;
        }

        let (lr, mean) =
            (learning_rate(&config.optimizer, action.step, config.steps), context.mean());
        let (optimizer, scalars) = (&mut place.optimizer, UpdateScalars { lr, mean, norm: &norm });
        let horizon =
            context.setup.horizon(context.setup.schedule.delays[place.place.stage], action.step);
        place.versions.advance(horizon, |buffers| optimizer.update(buffers, &scalars))?;
        if let Some(meter) = &mut place.meter {
            let (made, delay) = (action.step + 1, context.setup.schedule.delays[place.place.stage]);
            let used = context.setup.measured_version(meter, made, delay);
            meter.made(made, place.versions.flat(), used)?;
        }
        if context.faults.hit(Fault::AlterWeights, action) {
            place.versions.alter(flip)?;
        }

        self.verify(action)?;
        let (rank, seconds) = (self.context.rank, self.context.gate.heartbeat.busy());
        self.context.reports.send(Report::Busy { rank, seconds })?;
        self.report_norm(action, norm.times(mean)?)?;
        self.gauge.as_mut().map_or(Ok(()), Gauge::look)?;
        self.deferred.look(action.step)
    }

    /// Tells where the time went, if that is long enough ago.
    fn tell_times(&mut self, step: usize, least: Duration) -> Result<()> {
        let Some(times) = self.probes.recent(least) else { return Ok(()) };
        let (rank, gauge) = (self.context.rank, self.gauge.as_ref());
        let (memory, peak) = (gauge.and_then(Gauge::present), gauge.and_then(Gauge::peak_so_far));
        self.context.reports.send(Report::Times { rank, step, times, memory, peak })
    }

    /// Tells the digest of the new weights, if it is time, for replicas to be compared.
    fn verify(&mut self, action: &Action) -> Result<()> {
        let (setup, step) = (&self.context.setup, action.step + 1);
        if setup.grid.replicas == 1 || !setup.verifies_at(step) {
            return Ok(());
        }

        let place = self.place(action);
        let (place, digest) = (place.place, xxh3_64(bytes(&to_host(place.versions.flat())?)));
        self.context.reports.send(Report::Digest { place, step, digest })
    }

    fn report_norm(&mut self, action: &Action, norm: Number) -> Result<()> {
        let (place, step) = (self.place(action).place, action.step);
        let skips = self.context.skips();
        self.deferred.defer(step, norm, move |norm| match norm.is_finite() || skips {
            // The replicas have the same.
            true => {
                Ok((place.replica == 0).then_some(Report::Norm { stage: place.stage, step, norm }))
            }
            false => Err(Error::NotFinite {
                tensor: "a gradient".into(),
                step,
                place,
                data: String::new(),
            }),
        })
    }

    fn finish(mut self) -> Result<bool> {
        self.context.gate.heartbeat.doing(Activity::Finishing);
        self.deferred.flush()?;
        let context = &self.context;
        context.transfers.as_ref().map_or(Ok(()), |transfers| transfers.settle())?;
        if let Some(writer) = self.writer.take() {
            writer.finish()?;
        }
        self.probes.finish()?;
        let step = self.stop.unwrap_or(self.context.setup.config.steps);
        self.tell_times(step, Duration::from_millis(1))?;

        let peak_bytes = self.gauge.as_ref().and_then(Gauge::peak);
        let (context, times) = (&self.context, self.probes.times());
        context.reports.send(Report::Done { rank: context.rank, peak_bytes, times })?;
        Ok(self.stop.is_some())
    }

    /// An error with what this rank has read in its step.
    fn located(&self, error: Error) -> Error {
        let setup = &self.context.setup;
        let Error::NotFinite { tensor, step, place, .. } = error else {
            return with_need(error, setup, self.context.rank);
        };

        let first = setup.train_rows(place.replica, 0).start;
        let last = setup.train_rows(place.replica, setup.config.microbatches - 1).end;
        let starts = self.batches.starts(step, first..last);
        let places: Vec<usize> = starts.iter().map(|(_, place)| *place).collect();
        let texts: Vec<usize> = starts.iter().map(|(source, _)| *source).collect();
        let texts = match setup.corpus.sources.len() {
            1 => "the text".to_owned(),
            _ => format!("the sources {texts:?}"),
        };
        let data = format!(
            ", rows {first} to {} of the batch, from the tokens {places:?} of {texts} on",
            last - 1
        );

        Error::NotFinite { tensor, step, place, data }
    }
}

/// An error of memory with what was predicted that the rank needs.
fn with_need(error: Error, setup: &Setup, rank: usize) -> Error {
    let Error::Memory(text) = error else { return error };
    let needed = Prediction::new(setup, rank).total().div_ceil(1 << 20);
    Error::Memory(format!("{text}; {needed} MiB were predicted for {}", setup.grid.name(rank)))
}
