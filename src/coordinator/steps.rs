//! What the places report of each step and evaluation, put together in the order of the run,
//! whoever comes first.

use std::collections::BTreeMap;

/// What has been reported of a step so far.
#[derive(Debug, Default)]
pub struct Step {
    /// A loss a replica, a norm a stage: in their order, so that no digit depends on who reported
    /// first.
    losses: BTreeMap<usize, f64>,
    norms: BTreeMap<usize, f64>,
    table: Option<f64>,
}

impl Step {
    /// The mean over the replicas.
    pub fn loss(&self) -> f64 {
        self.losses.values().sum::<f64>() / self.losses.len() as f64
    }

    /// One a stage.
    pub fn norms(&self) -> Vec<f64> {
        self.norms.values().copied().collect()
    }

    pub fn table_norm(&self) -> Option<f64> {
        self.table
    }

    /// Whose update was left out because its gradient was not finite.
    pub fn skipped(&self) -> Vec<String> {
        let not_finite = self.norms.iter().filter(|(_, norm)| !norm.is_finite());
        let mut whose: Vec<String> =
            not_finite.map(|(stage, _)| format!("stage {stage}")).collect();
        whose.extend(
            self.table.filter(|norm| !norm.is_finite()).map(|_| "the tied embedding".to_owned()),
        );
        whose
    }
}

/// What has been reported of an evaluation so far: of every replica the sum of losses, and tokens.
pub type Evaluation = BTreeMap<usize, (f64, usize)>;

/// What is complete, in the order of the run.
#[derive(Debug)]
pub enum Complete {
    /// Before the step of that number: the loss, and the targets that it is the mean of.
    Evaluation(usize, f64, usize),
    Step(usize, Step),
}

/// The reports of a run.
#[derive(Debug)]
pub struct Steps {
    stages: usize,
    replicas: usize,
    tied: bool,
    steps: BTreeMap<usize, Step>,
    evaluations: BTreeMap<usize, Evaluation>,
    /// Steps that were complete: an evaluation after n updates stands behind n steps.
    done: usize,
}

impl Steps {
    /// None yet, of a run that starts at `start`.
    pub fn new(stages: usize, replicas: usize, tied: bool, start: usize) -> Steps {
        Steps {
            stages,
            replicas,
            tied,
            steps: BTreeMap::new(),
            evaluations: BTreeMap::new(),
            done: start,
        }
    }

    /// Steps that are complete, counted from the beginning of the run.
    pub fn done(&self) -> usize {
        self.done
    }

    pub fn loss(&mut self, step: usize, replica: usize, loss: f64) {
        self.steps.entry(step).or_default().losses.insert(replica, loss);
    }

    pub fn norm(&mut self, step: usize, stage: usize, norm: f64) {
        self.steps.entry(step).or_default().norms.insert(stage, norm);
    }

    pub fn table_norm(&mut self, step: usize, norm: f64) {
        self.steps.entry(step).or_default().table = Some(norm);
    }

    pub fn evaluation(&mut self, step: usize, replica: usize, loss_sum: f64, tokens: usize) {
        self.evaluations.entry(step).or_default().insert(replica, (loss_sum, tokens));
    }

    /// The next step or evaluation, once all places have reported it.
    pub fn next(&mut self) -> Option<Complete> {
        let next = self.done;
        if self.evaluations.get(&next).is_some_and(|replicas| replicas.len() == self.replicas) {
            let replicas = self.evaluations.remove(&next)?;
            let (sum, tokens) =
                replicas.values().fold((0.0, 0), |(s, n), (sum, tokens)| (s + sum, n + tokens));
            return Some(Complete::Evaluation(next, sum / tokens as f64, tokens));
        }

        let complete = |step: &Step| {
            let (losses, norms) = (step.losses.len(), step.norms.len());
            losses == self.replicas && norms == self.stages && step.table.is_some() == self.tied
        };

        if !self.steps.get(&next).is_some_and(complete) {
            return None;
        }

        self.done += 1;
        Some(Complete::Step(next, self.steps.remove(&next)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(steps: &mut Steps) -> Vec<String> {
        std::iter::from_fn(|| steps.next())
            .map(|complete| match complete {
                Complete::Evaluation(step, loss, tokens) => {
                    format!("eval {step} {loss} of {tokens}")
                }
                Complete::Step(step, of) => format!("step {step} {} {:?}", of.loss(), of.norms()),
            })
            .collect()
    }

    #[test]
    fn steps_come_in_order_whoever_reports_first() {
        let mut steps = Steps::new(2, 2, false, 3);
        for step in [4, 3] {
            steps.loss(step, 1, 2.0);
            steps.norm(step, 1, 0.5);
            steps.norm(step, 0, 0.25);
        }
        steps.loss(4, 0, 4.0);
        assert!(drain(&mut steps).is_empty(), "replica 0 has not told the loss of step 3");
        steps.loss(3, 0, 1.0);
        assert_eq!(drain(&mut steps), ["step 3 1.5 [0.25, 0.5]", "step 4 3 [0.25, 0.5]"]);
        assert_eq!(steps.done(), 5);
    }

    #[test]
    fn an_evaluation_stands_behind_its_steps() {
        let mut steps = Steps::new(1, 2, true, 0);
        steps.evaluation(1, 0, 6.0, 3);
        steps.evaluation(1, 1, 2.0, 1);
        for replica in 0..2 {
            steps.loss(0, replica, 1.0);
        }
        steps.norm(0, 0, 1.0);
        assert!(drain(&mut steps).is_empty(), "the norm of the tied table is missing");
        steps.table_norm(0, 1.0);
        assert_eq!(drain(&mut steps), ["step 0 1 [1.0]", "eval 1 2 of 4"]);
    }

    #[test]
    fn updates_that_are_left_out_are_told() {
        let mut steps = Steps::new(2, 1, true, 0);
        steps.loss(0, 0, f64::NAN);
        steps.norm(0, 0, f64::NAN);
        steps.norm(0, 1, 1.0);
        steps.table_norm(0, f64::INFINITY);
        let Some(Complete::Step(0, step)) = steps.next() else { panic!("not complete") };
        assert_eq!(step.skipped(), ["stage 0", "the tied embedding"]);
    }
}
