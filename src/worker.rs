//! One place at work: takes its action list and does what each action says.

use std::path::PathBuf;
use std::sync::Arc;

use tch::Tensor;

use crate::checkpoint;
use crate::comm::{Content, Ends, Header, Link, Reduction};
use crate::data::{Batch, Batches};
use crate::delay::version;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::inject::{Fault, Injection, crash};
use crate::metrics::Report;
use crate::metrics::memory::Gauge;
use crate::model::{self, Dimensions, Stack};
use crate::optim::{Optimizer, Update, clip_factor, learning_rate, norm};
use crate::params::{Layout, Versions, slice};
use crate::schedule::{Action, Op, Pass};
use crate::setup::Setup;
use crate::stage::{Output, Slot, Stage, is_finite};

/// A place with everything it needs; the registers hold what one action leaves for the next.
pub struct Worker {
    setup: Arc<Setup>,
    place: Place,
    out: PathBuf,
    ends: Ends,
    stage: Stage,
    optimizer: Optimizer,
    batches: Batches,
    inject: Option<Injection>,
    gauge: Option<Gauge>,
    /// The last sync point at or before the step that is being forwarded.
    sync: usize,
    reduction: Option<Reduction>,
    registers: Registers,
    /// Losses of the step's microbatches so far, of the evaluation's so far.
    loss: f64,
    eval: (f64, usize),
}

#[derive(Default)]
struct Registers {
    batch: Option<Batch>,
    /// Hidden states that came down or go down.
    activation: Option<Tensor>,
    /// Gradients that came up or go up.
    gradient: Option<Tensor>,
}

impl Worker {
    /// Builds the stage of `place` with its initial weights. `out` is the run's folder.
    ///
    /// # Errors
    /// What libtorch reports, or threads that cannot be started.
    pub fn new(setup: Arc<Setup>, place: Place, ends: Ends, out: PathBuf, inject: Option<Injection>) -> Result<Worker> {
        // Per thread: the thread pool of libtorch's kernels belongs to the thread that calls them.
        tch::set_num_threads(setup.config.threads as i32);
        warm_up()?;
        let gauge = Gauge::start();
        let config = &setup.config;
        let stack = setup.stack(place.stage);
        let layout = Layout::new(stack.parameters());
        let optimizer = Optimizer::new(&config.optimizer, &layout, config.threads)?;
        let initial = layout.initial(config.seed)?;
        let versions = Versions::new(layout, initial, setup.schedule.versions_held(place.stage))?;
        let stage = Stage::new(place, stack, versions, config.recompute, config.model.dropout, config.seed);
        let batches = Batches::new(Arc::clone(&setup.corpus), config.seed, config.data.sequence, config.batch);
        Ok(Worker {
            place,
            out,
            ends,
            stage,
            optimizer,
            batches,
            inject,
            gauge,
            sync: 0,
            reduction: None,
            registers: Registers::default(),
            loss: 0.0,
            eval: (0.0, 0),
            setup,
        })
    }

    /// Runs the whole action list, then writes the weights (replica 0) and says goodbye.
    ///
    /// # Errors
    /// The first thing that goes wrong here, or the loss of a peer.
    pub fn run(mut self) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        for action in setup.schedule.actions(self.place.stage) {
            tracing::trace!(%action);
            self.run_injection(&action);
            match action.op {
                Op::Load => self.load(&action),
                Op::RecvActivation => self.receive_activation(&action)?,
                Op::Forward => self.forward(&action)?,
                Op::SendActivation => self.send_activation(&action)?,
                Op::RecvGradient => self.receive_gradient(&action)?,
                Op::Backward => self.backward(&action)?,
                Op::SendGradient => self.send_gradient(&action)?,
                Op::Reduce => self.reduce(&action)?,
                Op::Update => self.update(&action)?,
            }
        }
        self.finish()
    }

    fn is_last(&self) -> bool {
        self.place.stage == self.setup.grid.stages - 1
    }

    fn load(&mut self, action: &Action) {
        self.registers.batch = Some(match action.pass {
            Pass::Train => {
                self.batches.train(action.step, self.setup.train_rows(self.place.replica, action.microbatch))
            }
            Pass::Eval => self.batches.held_out(self.setup.eval_rows(self.place.replica, action.microbatch)),
        });
    }

    /// What a message about this action must look like.
    fn header(&self, content: Content, action: &Action) -> Header {
        let rows = match action.pass {
            Pass::Train => self.setup.rows,
            Pass::Eval => self.setup.eval_rows(self.place.replica, action.microbatch).len(),
        };
        let shape = [rows as i64, self.setup.config.data.sequence as i64, self.setup.dimensions.d_model];
        Header { content, pass: action.pass, step: action.step, microbatch: action.microbatch, shape }
    }

    fn receive_activation(&mut self, action: &Action) -> Result<()> {
        let header = self.header(Content::Activation, action);
        self.registers.activation = Some(link(&mut self.ends.upstream, action)?.receive(header)?);
        Ok(())
    }

    fn send_activation(&mut self, action: &Action) -> Result<()> {
        let header = self.disguised(self.header(Content::Activation, action));
        let tensor = taken(&mut self.registers.activation, action)?;
        link(&mut self.ends.downstream, action)?.send(header, tensor)
    }

    fn receive_gradient(&mut self, action: &Action) -> Result<()> {
        let header = self.header(Content::Gradient, action);
        self.registers.gradient = Some(link(&mut self.ends.downstream, action)?.receive(header)?);
        Ok(())
    }

    fn send_gradient(&mut self, action: &Action) -> Result<()> {
        let header = self.disguised(self.header(Content::Gradient, action));
        let tensor = taken(&mut self.registers.gradient, action)?;
        link(&mut self.ends.upstream, action)?.send(header, tensor)
    }

    fn forward(&mut self, action: &Action) -> Result<()> {
        let mut batch = self.registers.batch.take();
        let x = match &mut batch {
            Some(batch) if self.place.stage == 0 => batch.tokens.shallow_clone(),
            _ => taken(&mut self.registers.activation, action)?,
        };
        let targets = if self.is_last() { batch.map(|batch| batch.targets) } else { None };
        let output = match action.pass {
            Pass::Train => {
                let schedule = &self.setup.schedule;
                if action.microbatch == 0 && schedule.sync.contains(action.step) {
                    self.sync = action.step;
                }
                let version = version(self.sync, action.step, schedule.delays[self.place.stage]);
                let slot = Slot { step: action.step, microbatch: action.microbatch };
                self.stage.forward(slot, version, x, targets)?
            }
            Pass::Eval => self.stage.evaluate(&x, targets.as_ref())?,
        };
        match output {
            Output::Hidden(y) => self.registers.activation = Some(y),
            Output::Loss(loss) if action.pass == Pass::Train => self.add_loss(action, loss)?,
            Output::Loss(sum) => self.add_evaluation(action, sum)?,
        }
        Ok(())
    }

    fn add_loss(&mut self, action: &Action, loss: f64) -> Result<()> {
        self.loss += loss;
        let microbatches = self.setup.config.microbatches;
        if action.microbatch + 1 < microbatches {
            return Ok(());
        }
        let loss = std::mem::take(&mut self.loss) / microbatches as f64;
        self.ends.reports.send(Report::Loss { replica: self.place.replica, step: action.step, loss })
    }

    fn add_evaluation(&mut self, action: &Action, sum: f64) -> Result<()> {
        let rows = self.setup.eval_rows(self.place.replica, action.microbatch).len();
        self.eval.0 += sum;
        self.eval.1 += rows * self.setup.config.data.sequence;
        if self.setup.schedule.evals.is_some_and(|evals| action.microbatch + 1 == evals.microbatches) {
            let (loss_sum, tokens) = std::mem::take(&mut self.eval);
            self.ends.reports.send(Report::Eval {
                replica: self.place.replica,
                step: action.step,
                loss_sum,
                tokens,
            })?;
        }
        Ok(())
    }

    fn backward(&mut self, action: &Action) -> Result<()> {
        let slot = Slot { step: action.step, microbatch: action.microbatch };
        self.registers.gradient = self.stage.backward(slot, self.registers.gradient.take())?;
        Ok(())
    }

    fn reduce(&mut self, action: &Action) -> Result<()> {
        if let Some(group) = &mut self.ends.group {
            self.reduction = Some(group.all_reduce(action.step, self.stage.versions.gradient().shallow_clone())?);
        }
        Ok(())
    }

    /// `W[t+1] = W[t] + optimizer(mean over microbatches and replicas)`.
    fn update(&mut self, action: &Action) -> Result<()> {
        if let Some(reduction) = self.reduction.take() {
            reduction.wait()?;
        }
        let config = &self.setup.config;
        let mean = 1.0 / (config.microbatches * self.setup.grid.replicas) as f64;
        let norm = norm(slice(self.stage.versions.gradient())) * mean;
        if !norm.is_finite() {
            return Err(self.bad_gradient(action.step)?);
        }
        let lr = learning_rate(&config.optimizer, action.step, config.steps);
        let scale = mean * clip_factor(norm, config.optimizer.clip);
        let (old, new, gradient) = self.stage.versions.advance();
        self.optimizer.update(Update { old, new, gradient, lr, scale });
        if self.place.replica > 0 {
            return Ok(());
        }
        self.ends.reports.send(Report::Norm { stage: self.place.stage, step: action.step, norm })
    }

    /// Names the first parameter whose gradient is not finite.
    fn bad_gradient(&mut self, step: usize) -> Result<Error> {
        let layout = self.stage.versions.layout().clone();
        let views = layout.views(self.stage.versions.gradient())?;
        for (entry, view) in layout.entries.iter().zip(&views) {
            if !is_finite(view)? {
                let tensor = format!("gradient of {}", entry.parameter.name);
                return Ok(Error::NotFinite { tensor, step, place: self.place });
            }
        }
        Ok(Error::NotFinite { tensor: "norm of the gradient".into(), step, place: self.place })
    }

    fn finish(mut self) -> Result<()> {
        let peak_bytes = self.gauge.as_ref().and_then(Gauge::peak);
        let versions = &self.stage.versions;
        let shard = match self.place.replica {
            0 => {
                let (steps, stage) = (self.setup.config.steps, self.place.stage);
                Some(checkpoint::write_shard(&self.out, steps, stage, versions.layout(), versions.flat())?)
            }
            _ => None,
        };
        self.ends.reports.send(Report::Done { place: self.place, shard, peak_bytes })
    }

    fn injected(&self, fault: Fault, step: usize) -> bool {
        self.inject == Some(Injection { fault, place: self.place, step })
    }

    fn run_injection(&self, action: &Action) {
        if self.injected(Fault::Panic, action.step) {
            panic!("injected panic at {action}");
        }
        if self.injected(Fault::Crash, action.step) {
            crash();
        }
    }

    fn disguised(&self, header: Header) -> Header {
        let step = if self.injected(Fault::CorruptMessage, header.step) { header.step + 1 } else { header.step };
        Header { step, ..header }
    }
}

/// One forward and backward of a tiny model: loads the parts of libtorch that training needs, so that the peak memory
/// measured after it is the stage's, and the first step is as fast as the others.
fn warm_up() -> Result<()> {
    let d = Dimensions { layers: 1, d_model: 64, heads: 2, d_ff: 256, vocabulary: 256, sequence: 64, dropout: 0.0 };
    let stack = Stack::new(&d, 0..1);
    let layout = Layout::new(stack.parameters());
    let versions = Versions::new(layout.clone(), layout.initial(0)?, 1)?;
    let tokens = Tensor::f_zeros([4, d.sequence], (tch::Kind::Int64, tch::Device::Cpu))?;
    let logits = stack.forward(versions.parameters(0), &tokens, None)?;
    Ok(model::loss(&logits, &tokens)?.f_backward()?)
}

fn taken(register: &mut Option<Tensor>, action: &Action) -> Result<Tensor> {
    register.take().ok_or_else(|| Error::Internal(format!("{action} finds its register empty")))
}

fn link<'a>(end: &'a mut Option<Box<dyn Link>>, action: &Action) -> Result<&'a mut dyn Link> {
    match end {
        Some(link) => Ok(link.as_mut()),
        None => Err(Error::Internal(format!("{action} has no link"))),
    }
}
