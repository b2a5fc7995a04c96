//! The oracle: the whole grid's arithmetic in one process, one autograd graph over the whole model
//! per microbatch, replicas one after the other. It is the definition of correct: it shares the
//! layers, the formulas of `delay` and the optimizers with the grid, but neither `stage`, `table`
//! nor `worker` nor any message.
//!
//! ```text
//! for t:   w_k = W_k[max(s, t - D_k)]  for every stage k;  v = V[max(s, t - D_0)], or V[t]: `schedule` says which by `tie`
//!          for r: for j:  gradients of loss(x^{t,r,j}; w_0, ..., w_{K-1}, v as input, v as output),  added up over j
//!                 layer l's memory for (t+1, r, j) is its own input here
//!                 the table's parts put together, then everything added up over r
//!          W_k[t+1] = W_k[t] + optimizer_k(mean gradient);  V[t+1] = V[t] + optimizer(mean gradient)
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tch::{Kind, Tensor};

use crate::checkpoint::Snapshot;
use crate::config::OnNonfinite;
use crate::control::{Gate, GateDecision, Report, Reporter};
use crate::data::{Batch, Batches};
use crate::delay::version;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::model::{self, Documents, Dropout, Loss, Memory, Owner, Stack};
use crate::optim::{Optimizer, UpdateScalars, learning_rate, norm};
use crate::params::{Layout, UpdateBuffers, zeros};
use crate::schedule::{TableEnd, Tie};
use crate::setup::Setup;
use crate::staleness::{AtUpdate, Meter, Staleness, cosine};

/// A set of weights with its versions: what one stage of the grid would hold, or the tied table.
struct Weights {
    layout: Layout,
    optimizer: Optimizer,
    /// Number of updates -> flat weights.
    versions: BTreeMap<usize, Tensor>,
    /// Where they are not the weights: the versions that steps use, moved on.
    predicted: BTreeMap<usize, Tensor>,
    /// Where staleness is measured, with the delay that it is measured by.
    meter: Option<Meter>,
    delay: usize,
}

/// The gradients of one replica's step, added up over its microbatches.
struct Gradients {
    stages: Vec<Tensor>,
    /// Of the tied table: as the embedding uses it, as the head does.
    input: Tensor,
    output: Tensor,
}

/// The oracle of one run.
pub struct Oracle {
    setup: Arc<Setup>,
    model: Vec<Stack>,
    stages: Vec<Weights>,
    /// Without parameters where nothing is tied.
    table: Weights,
    /// (step, replica) -> a part of the table's gradient that has not joined an update yet.
    inputs: BTreeMap<(usize, usize), Tensor>,
    /// (replica, microbatch) -> what the layers of every stage remember of its rows.
    memories: BTreeMap<(usize, usize), Vec<Memory>>,
    batches: Batches,
    reports: Reporter,
    gate: Arc<Gate>,
    /// The run ends before this step.
    stop: Option<usize>,
    out: PathBuf,
}

impl Oracle {
    /// All stages of the grid with their initial weights.
    pub fn new(
        setup: Arc<Setup>,
        reports: Reporter,
        gate: Arc<Gate>,
        out: PathBuf,
    ) -> Result<Oracle> {
        let config = &setup.config;
        tch::set_num_threads(config.threads as i32);
        let weights = |layout: Layout, optimizer: Optimizer, delay: usize| -> Result<Weights> {
            let (mut versions, mut predicted) = (BTreeMap::new(), BTreeMap::new());
            for (number, values) in setup.older_weights(&layout, delay)? {
                if number == setup.start() {
                    predicted.insert(number, values);
                } else {
                    versions.insert(number, values);
                }
            }

            let first = setup.first_weights(&layout)?;
            let mut meter = setup.meter(&layout, 0)?;
            if let Some(meter) = &mut meter {
                let used = setup.measured_version(meter, setup.start(), delay);
                meter.made(setup.start(), &first, used)?;
            }

            versions.insert(setup.start(), first);
            Ok(Weights { layout, optimizer, versions, predicted, meter, delay })
        };

        let delays = &setup.schedule.delays;
        let stage = |k: usize| {
            let layout = setup.layout(k);
            let optimizer = setup.optimizer(&layout, delays[k])?;
            weights(layout, optimizer, delays[k])
        };

        let stages = (0..setup.grid.stages).map(stage).collect::<Result<_>>()?;
        let layout = Layout::new(&model::table(&setup.dimensions));
        let optimizer = setup.optimizer(&layout, embedding_delay(&setup))?;
        let table = weights(layout, optimizer, embedding_delay(&setup))?;
        let model: Vec<Stack> = (0..setup.grid.stages).map(|k| setup.stack(k)).collect();
        let batches = Batches::new(Arc::clone(&setup.corpus), config.reading());
        let (mut inputs, mut memories) = (BTreeMap::new(), BTreeMap::new());
        for replica in 0..setup.grid.replicas {
            let parts = setup.waiting_parts(&table.layout, replica)?;
            inputs.extend(parts.into_iter().map(|(step, part)| ((step, replica), part)));
        }

        for (stage, replica) in
            (0..model.len()).flat_map(|k| (0..setup.grid.replicas).map(move |r| (k, r)))
        {
            for (microbatch, memory) in setup.memories(&model[stage], replica)? {
                memories.entry((replica, microbatch)).or_insert_with(Vec::new).push(memory);
            }
        }

        Ok(Oracle {
            model,
            stages,
            table,
            inputs,
            memories,
            batches,
            reports,
            gate,
            stop: None,
            out,
            setup,
        })
    }

    /// The whole run.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, or a file that cannot be written.
    pub fn run(mut self) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let mut sync = setup.schedule.sync.since;
        for t in setup.start()..setup.config.steps {
            if self.stop == Some(t) {
                return self.stopped(t);
            }

            // What a step does may depend on whether the run ends after it.
            let more = t + 1 < setup.config.steps;
            if more && t + 1 >= self.gate.limit() && self.gate.wait(t + 1)? == GateDecision::Stop {
                self.stop = Some(t + 1);
            }

            if t > setup.start() && setup.schedule.sync.contains(t) {
                sync = t;
            }

            if setup.schedule.evaluates_at(t) {
                self.evaluate(t)?;
            }

            self.step(t, sync)?;
            if setup.schedule.saves_at(t + 1) {
                self.save(t + 1)?;
            }
        }

        if setup.schedule.evaluates_at(setup.config.steps) {
            self.evaluate(setup.config.steps)?;
        }

        if setup.schedule.saves_again {
            self.save(setup.config.steps)?;
        }

        self.done()
    }

    fn done(&self) -> Result<()> {
        self.reports.send(Report::Done { rank: 0, peak_bytes: None, times: None })
    }

    /// Ends the run before step t.
    fn stopped(&self, t: usize) -> Result<()> {
        if t > self.setup.start() && !self.setup.schedule.saves_at(t) {
            self.save(t)?;
        }
        self.done()
    }

    /// Saves what every place of the grid would.
    fn save(&self, step: usize) -> Result<()> {
        for place in self.setup.grid.places() {
            let begun = Instant::now();
            let mut snapshot = Snapshot::new(place, step, self.setup.grid.replicas);
            let table =
                Some(&self.table).filter(|_| place.stage == 0 && self.setup.dimensions.tied);
            let (schedule, delay) = (&self.setup.schedule, self.setup.schedule.delays[place.stage]);
            let table = table.map(|table| (table, embedding_delay(&self.setup)));
            for (weights, delay) in table.into_iter().chain([(&self.stages[place.stage], delay)]) {
                snapshot.add(&weights.layout, weights.newest()?, &weights.optimizer)?;
                // The grid does not hold them any wider.
                let kind = self.setup.config.precision.kind();
                let older: Vec<(usize, Tensor)> = self
                    .setup
                    .versions_saved(schedule.since(step), step, delay)
                    .map(|number| Ok((number, weights.used(number)?.f_to_kind(kind)?)))
                    .collect::<Result<_>>()?;
                snapshot.add_older(
                    &weights.layout,
                    older.iter().map(|(number, values)| (*number, values)),
                )?;
            }

            // The head keeps the parts.
            let last = place.stage == self.setup.grid.stages - 1;
            let waiting =
                self.inputs.iter().filter(|((_, replica), _)| last && *replica == place.replica);
            snapshot
                .add_parts(&self.table.layout, waiting.map(|((step, _), part)| (*step, part)))?;
            for ((replica, microbatch), memories) in &self.memories {
                if *replica == place.replica {
                    let rows = self.setup.train_rows(*replica, *microbatch);
                    snapshot.remember(
                        rows.start,
                        self.model[place.stage].remembered(&memories[place.stage]),
                    )?;
                }
            }

            let written = snapshot.write(&self.out, begun.elapsed())?;
            self.reports.send(Report::Saved { place, step, written })?;
        }

        Ok(())
    }

    fn step(&mut self, t: usize, sync: usize) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let at = |delay: usize| version(sync, t, delay);
        let numbers: Vec<usize> = setup.schedule.delays.iter().map(|delay| at(*delay)).collect();
        let head_delay = match setup.config.model.tie {
            Tie::Aligned => setup.schedule.delays[0],
            _ => 0,
        };

        let table = [at(embedding_delay(&setup)), at(head_delay)];
        // While the layers still remember what they did before the step.
        let fresh = self.fresh(t)?;
        let (mut sums, mut table_sum): (Vec<Tensor>, Option<Tensor>) = (Vec::new(), None);
        // One replica has nothing to reduce.
        let reduced = (setup.grid.replicas > 1).then_some(setup.config.wire);
        for replica in 0..setup.grid.replicas {
            let leaves = self.leaves(&numbers, table)?;
            let (mut gradients, loss) = self.gradients(t, replica, &leaves)?;
            let loss = self.finite(t, replica, loss)?;
            self.reports.send(Report::Loss { replica, step: t, loss })?;
            let mut table = self.joined(t, sync, replica, gradients.input, gradients.output)?;
            if let Some(wire) = reduced {
                gradients
                    .stages
                    .iter_mut()
                    .chain([&mut table])
                    .try_for_each(|flat| wire.round(flat))?;
            }

            match &mut table_sum {
                None => (sums, table_sum) = (gradients.stages, Some(table)),
                Some(table_sum) => {
                    let _ = table_sum.f_add_(&table)?;
                    for (sum, gradient) in sums.iter_mut().zip(gradients.stages) {
                        let _ = sum.f_add_(&gradient)?;
                    }
                }
            }
        }

        if let Some(wire) = reduced {
            sums.iter_mut().chain(&mut table_sum).try_for_each(|sum| wire.round(sum))?;
        }

        for (stage, sum) in sums.iter_mut().enumerate() {
            let measured = self.stages[stage].measure(&setup, t, Some(numbers[stage]), sum)?;
            let fresh = fresh.as_ref().map(|fresh| &fresh.stages[stage]);
            self.tell_staleness(t, Some(stage), measured, sum, fresh)?;
            let norm = self.update(t, Some(stage), sum)?;
            self.reports.send(Report::Norm { stage, step: t, norm })?;
        }

        if let Some(mut sum) = table_sum.filter(|_| setup.dimensions.tied) {
            // Under `head` and `fresh` its parts are of several steps.
            let aligned = setup.config.model.tie == Tie::Aligned;
            let number = Some(table[0]).filter(|_| aligned);
            let measured = self.table.measure(&setup, t, number, &sum)?;
            let fresh = fresh.as_ref().filter(|_| aligned).map(|fresh| &fresh.input);
            self.tell_staleness(t, None, measured, &sum, fresh)?;
            let norm = self.update(t, None, &mut sum)?;
            self.reports.send(Report::TableNorm { step: t, norm })?;
        }

        Ok(())
    }

    /// The gradient of the tied table that one replica brings to the update of step t.
    fn joined(
        &mut self,
        t: usize,
        sync: usize,
        replica: usize,
        input: Tensor,
        output: Tensor,
    ) -> Result<Tensor> {
        let schedule = &self.setup.schedule;
        self.inputs.insert((t, replica), input);
        let mut sum = output;
        let synchronised = schedule.sync.contains(t + 1);
        let stopped = self.stop == Some(t + 1);
        let newest = match self.setup.config.model.tie {
            // At a sync point whatever is still under way; under `fresh` a stop is one.
            Tie::Fresh if synchronised || stopped => Some(t),
            Tie::Head if synchronised => Some(t),
            Tie::Fresh | Tie::Head => t.checked_sub(schedule.delays[0]).filter(|u| *u >= sync),
            _ => Some(t),
        };

        // Those of a run that was stopped and goes on with other delays join the first update.
        let left = sync == self.setup.start();
        let due =
            |step: usize| newest.is_some_and(|newest| step <= newest) || (left && step < sync);
        let steps: Vec<usize> = self
            .inputs
            .keys()
            .filter(|(step, of)| *of == replica && due(*step))
            .map(|(step, _)| *step)
            .collect();
        for step in steps {
            let part = self.inputs.remove(&(step, replica));
            let part = part
                .ok_or_else(|| Error::Internal(format!("the oracle has no part of step {step}")))?;
            let _ = sum.f_add_(&part)?;
        }

        Ok(sum)
    }

    /// The newest weights, as nothing is predicted of them, as leaves.
    fn newest(&self) -> Result<[Vec<Tensor>; 3]> {
        let (mut own, kind) = (Vec::new(), self.setup.config.precision.kind());
        for stage in &self.stages {
            own.extend(leaves(&stage.layout, stage.newest()?, kind)?);
        }
        let table = || leaves(&self.table.layout, self.table.newest()?, kind);
        Ok([own, table()?, table()?])
    }

    /// The parameters of the whole model at the given versions, as leaves: those of the stages,
    /// those of the table as the embedding uses it and as the head does.
    fn leaves(&self, numbers: &[usize], [input, head]: [usize; 2]) -> Result<[Vec<Tensor>; 3]> {
        let (mut own, kind) = (Vec::new(), self.setup.config.precision.kind());
        for (stage, number) in self.stages.iter().zip(numbers) {
            own.extend(leaves(&stage.layout, stage.used(*number)?, kind)?);
        }

        // Without a tie the table is empty and never updated.
        let number = |of: usize| if self.setup.dimensions.tied { of } else { self.setup.start() };
        let input = self.table.used(number(input))?;
        // A head that nothing delays has nothing to predict.
        let head = match self.setup.config.model.tie {
            Tie::Head => self.table.newest()?,
            _ => self.table.used(number(head))?,
        };

        Ok([own, leaves(&self.table.layout, input, kind)?, leaves(&self.table.layout, head, kind)?])
    }

    /// The values of the parameters of every stage's layers.
    fn weights(&self, leaves: &[Vec<Tensor>; 3]) -> Vec<Vec<Tensor>> {
        let [own, input, output] = leaves;
        let mut start = 0;
        let of_stage = |(stack, weights): (&Stack, &Weights)| {
            let own = &own[start..start + weights.layout.entries.len()];
            start += own.len();
            stack.weights(own, input, output)
        };
        self.model.iter().zip(&self.stages).map(of_stage).collect()
    }

    /// Nothing is remembered by any layer.
    fn forgetful(&self, limit: usize) -> Vec<Memory> {
        self.model.iter().map(|_| Memory::new(limit)).collect()
    }

    /// Memories of rows that have documents.
    fn of_documents(&self, starts: &Tensor) -> Result<Vec<Memory>> {
        let of = |_| Ok(Memory::of_documents(Documents::new(starts, self.setup.device)?));
        self.model.iter().map(of).collect()
    }

    /// The whole model: tokens [b, T], `targets` [b, T] -> the mean loss. Between two stages the
    /// wire rounds.
    fn loss(
        &self,
        weights: &[Vec<Tensor>],
        batch: &Batch,
        memories: &mut [Memory],
        dropout: Option<Dropout>,
    ) -> Result<Loss> {
        let hidden = self.hidden(weights, batch, memories, dropout)?;
        let last = self.model.len() - 1;
        self.model[last].loss(&weights[last], &hidden, &batch.targets, dropout)
    }

    /// The losses of an evaluation's batch, added up.
    fn losses(
        &self,
        weights: &[Vec<Tensor>],
        batch: &Batch,
        memories: &mut [Memory],
    ) -> Result<Tensor> {
        let hidden = self.hidden(weights, batch, memories, None)?;
        let last = self.model.len() - 1;
        self.model[last].losses(&weights[last], &hidden, &batch.targets)
    }

    /// What the last stage's layers make of a batch.
    fn hidden(
        &self,
        weights: &[Vec<Tensor>],
        batch: &Batch,
        memories: &mut [Memory],
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let mut x = batch.tokens.shallow_clone();
        for (k, (stack, memory)) in self.model.iter().zip(memories).enumerate() {
            if k > 0 {
                x = self.setup.hidden_wire().cross(&x)?;
            }

            x = stack.forward(&weights[k], &x, memory, dropout)?;
        }

        Ok(x)
    }

    /// Gradients of one replica, added up over its microbatches, and their mean loss.
    fn gradients(
        &mut self,
        t: usize,
        replica: usize,
        leaves: &[Vec<Tensor>; 3],
    ) -> Result<(Gradients, f64)> {
        let setup = Arc::clone(&self.setup);
        let config = &setup.config;
        let weights = self.weights(leaves);
        let stages = self
            .stages
            .iter()
            .map(|stage| zeros(stage.layout.len, setup.device))
            .collect::<Result<Vec<_>>>()?;
        let (input, output) = (
            zeros(self.table.layout.len, setup.device)?,
            zeros(self.table.layout.len, setup.device)?,
        );

        let mut sums = Vec::new();
        for (stage, flat) in self.stages.iter().zip(&stages) {
            sums.extend(stage.layout.views(flat)?);
        }

        sums.extend(self.table.layout.views(&input)?);
        sums.extend(self.table.layout.views(&output)?);
        let mut total = 0.0;
        for microbatch in 0..config.microbatches {
            let batch = self.batches.train(t, setup.train_rows(replica, microbatch))?;
            let (rate, attention_rate) = (config.model.dropout, config.model.attention_dropout);
            let dropout =
                Dropout { rate, attention_rate, seed: config.seed, step: t, replica, microbatch };
            let dropout = Some(dropout).filter(|_| rate > 0.0 || attention_rate > 0.0);
            let remembered = self.memories.remove(&(replica, microbatch));
            let remembered = remembered.filter(|_| !self.batches.restarts(t));
            let mut memories = match config.data.document_mask {
                true => self.of_documents(
                    &self.batches.documents(t, setup.train_rows(replica, microbatch)),
                )?,
                false => remembered.unwrap_or_else(|| self.forgetful(config.model.mem_len)),
            };
            let loss = self.loss(&weights, &batch, &mut memories, dropout)?;
            let memories = memories.into_iter().map(Memory::without_documents).collect();
            self.memories.insert((replica, microbatch), memories);
            total += loss.value.f_double_value(&[])?;
            for (sum, gradient) in sums.iter_mut().zip(self.backward(leaves, loss)?) {
                let _ = sum.f_add_(&gradient)?;
            }
        }

        let loss = total / config.microbatches as f64;
        Ok((Gradients { stages, input, output }, loss))
    }

    /// The gradients of step t's batch at the newest weights, which nothing else is touched for, if the
    /// staleness of the step is measured: those of the table in `input`, both parts.
    fn fresh(&mut self, t: usize) -> Result<Option<Gradients>> {
        if !self.stages[0].meter.as_ref().is_some_and(|meter| meter.measures(t)) {
            return Ok(None);
        }

        let leaves = self.newest()?;
        let remembered = std::mem::take(&mut self.memories);
        let mut sum: Option<Gradients> = None;
        for replica in 0..self.setup.grid.replicas {
            self.memories = remembered
                .iter()
                .map(|(of, all)| (*of, all.iter().map(Memory::shallow_clone).collect()))
                .collect();
            let (mut of_replica, _) = self.gradients(t, replica, &leaves)?;
            let _ = of_replica.input.f_add_(&of_replica.output)?;
            sum = Some(match sum {
                None => of_replica,
                Some(mut sum) => {
                    for (sum, part) in sum.stages.iter_mut().zip(&of_replica.stages) {
                        let _ = sum.f_add_(part)?;
                    }
                    let _ = sum.input.f_add_(&of_replica.input)?;
                    sum
                }
            });
        }

        self.memories = remembered;
        Ok(sum)
    }

    /// Reports what was measured of an update, with the cosine to the fresh gradient.
    fn tell_staleness(
        &self,
        step: usize,
        stage: Option<usize>,
        measured: Option<Staleness>,
        stale: &Tensor,
        fresh: Option<&Tensor>,
    ) -> Result<()> {
        let Some(measured) = measured else { return Ok(()) };
        let fresh_cosine = fresh.map_or(Ok(None), |fresh| cosine(stale, fresh))?;
        let measured = Staleness { fresh_cosine, ..measured };
        self.reports.send(Report::Staleness { stage, step, measured })
    }

    /// The gradients of a loss by all leaves: those that are ready with it, and autograd's.
    fn backward(&self, leaves: &[Vec<Tensor>; 3], loss: Loss) -> Result<Vec<Tensor>> {
        let [own, input, _] = leaves;
        let last = self.stages.len() - 1;
        let of_last = own.len() - self.stages[last].layout.entries.len();
        let owners = self.model[last].owners();
        let mut gradients = BTreeMap::new();
        for (number, gradient) in loss.ready {
            let leaf = match owners[number] {
                Owner::Own(own) => of_last + own,
                Owner::Table(TableEnd::Input, number) => own.len() + number,
                Owner::Table(TableEnd::Output, number) => own.len() + input.len() + number,
            };
            gradients.insert(leaf, gradient);
        }

        let others = leaves.iter().flatten().enumerate();
        let (numbers, others): (Vec<usize>, Vec<&Tensor>) =
            others.filter(|(leaf, _)| !gradients.contains_key(leaf)).unzip();
        let found = Tensor::f_run_backward(&[&loss.root], &others, false, false)?;
        gradients.extend(numbers.into_iter().zip(found));
        Ok(gradients.into_values().collect())
    }

    fn finite(&self, step: usize, replica: usize, loss: f64) -> Result<f64> {
        if loss.is_finite() || self.setup.config.on_nonfinite == OnNonfinite::Skip {
            return Ok(loss);
        }
        let place = Place { stage: self.setup.grid.stages - 1, replica };
        Err(Error::NotFinite { tensor: "the loss".into(), step, place, data: String::new() })
    }

    /// Updates a stage, or the table, by the sum of its gradients; the norm of the mean.
    fn update(&mut self, t: usize, stage: Option<usize>, sum: &mut Tensor) -> Result<f64> {
        let config = &self.setup.config;
        let (weights, delay, factor) = match stage {
            Some(stage) => (&mut self.stages[stage], self.setup.schedule.delays[stage], 1.0),
            None => (&mut self.table, self.setup.schedule.delays[0], self.setup.tie_factor()),
        };

        let mean = 1.0 / (config.microbatches * self.setup.grid.replicas) as f64 * factor;
        let number = weights.optimizer.usable(norm(sum, self.setup.readback)?, mean)?;
        let norm = number.now()? * mean;
        if !norm.is_finite() && config.on_nonfinite == OnNonfinite::Stop {
            let place = Place { stage: stage.unwrap_or(0), replica: 0 };
            return Err(Error::NotFinite {
                tensor: "the gradient".into(),
                step: t,
                place,
                data: String::new(),
            });
        }

        let lr = learning_rate(&config.optimizer, t, config.steps);
        let old = weights.newest()?.shallow_clone();
        let mut new = old.f_detach_copy()?;
        let buffers = UpdateBuffers { old: None, new: &mut new, published: None, gradient: sum };
        weights.optimizer.update(buffers, &UpdateScalars { lr, mean, norm: &number })?;
        // V[t+1] = W[t+1] + H (W[t+1] - W[t]), but for an update that is left out.
        let delay_of_rule = if stage.is_none() { embedding_delay(&self.setup) } else { delay };
        let horizon = self.setup.horizon(delay_of_rule, t);
        if horizon != 0.0 && norm.is_finite() {
            let moved = new.f_sub(&old)?.f_mul_scalar(horizon)?;
            weights.predicted.insert(t + 1, new.f_add(&moved)?);
        }

        if let Some(meter) = &mut weights.meter {
            let used = self.setup.measured_version(meter, t + 1, weights.delay);
            meter.made(t + 1, &new, used)?;
        }

        weights.versions.insert(t + 1, new);
        weights.versions.retain(|number, _| number + delay > t);
        weights.predicted.retain(|number, _| number + delay > t);
        Ok(norm)
    }

    fn evaluate(&mut self, t: usize) -> Result<()> {
        let leaves = self.newest()?;
        let weights = self.weights(&leaves);
        for replica in 0..self.setup.grid.replicas {
            let (mut loss_sum, mut tokens) = (0.0, 0);
            let mut memories = self.forgetful(self.setup.config.eval_mem_len());
            for microbatch in 0..self.setup.schedule.evals.map_or(0, |evals| evals.microbatches) {
                let rows = self.setup.eval_rows(replica, microbatch);
                if self.setup.config.data.document_mask {
                    let starts = self.batches.held_out_documents(rows.clone(), microbatch);
                    memories = self.of_documents(&starts)?;
                }

                let batch = self.batches.held_out(rows, microbatch)?;
                let loss = tch::no_grad(|| self.losses(&weights, &batch, &mut memories))?;
                loss_sum += loss.f_double_value(&[])?;
                tokens += batch.counted;
            }

            self.reports.send(Report::Eval { replica, step: t, loss_sum, tokens })?;
        }

        Ok(())
    }
}

impl Weights {
    fn newest(&self) -> Result<&Tensor> {
        let newest = self.versions.last_key_value().map(|(_, flat)| flat);
        newest.ok_or_else(|| Error::Internal("the oracle holds no version".into()))
    }

    /// What there is to tell of the staleness of a step's gradient, which was taken at a version, before
    /// its update.
    fn measure(
        &mut self,
        setup: &Setup,
        step: usize,
        number: Option<usize>,
        gradient: &Tensor,
    ) -> Result<Option<Staleness>> {
        let Some(mut meter) = self.meter.take() else { return Ok(None) };
        let kind = setup.config.precision.kind();
        let used = number.map(|number| Ok::<Tensor, Error>(self.used(number)?.f_to_kind(kind)?));
        let used = used.transpose()?;
        let newest = self.newest()?;
        let at =
            AtUpdate { version: number.unwrap_or(step), used: used.as_ref(), newest, gradient };
        let measured = meter.before(step, &at)?;
        self.meter = Some(meter);
        Ok(measured)
    }

    /// A version as steps use it.
    fn used(&self, number: usize) -> Result<&Tensor> {
        let flat = self.predicted.get(&number).or_else(|| self.versions.get(&number));
        flat.ok_or_else(|| Error::Internal(format!("the oracle does not hold version {number}")))
    }
}

/// The parameters of a version, rounded to what the model computes with.
fn leaves(layout: &Layout, flat: &Tensor, kind: Kind) -> Result<Vec<Tensor>> {
    let leaf = |view: Tensor| Ok(view.f_to_kind(kind)?.f_detach()?.f_set_requires_grad(true)?);
    layout.views(flat)?.into_iter().map(leaf).collect()
}

/// How many updates old the version of the tied table is that the embedding uses.
fn embedding_delay(setup: &Setup) -> usize {
    match setup.config.model.tie {
        Tie::Aligned | Tie::Head => setup.schedule.delays[0],
        Tie::Fresh | Tie::Untied => 0,
    }
}
