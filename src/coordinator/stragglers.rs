//! Places that have become slow: their work takes much longer than it did, and the others' does
//! not.

use std::collections::BTreeMap;

/// Steps that are compared: the first ones, after the very first, and the last ones.
const FIRST: usize = 8;
const LAST: usize = 3;
/// How many times longer the work takes, beside its own past and beside the others; and by how much
/// at least, in seconds.
const SLOW: f64 = 3.0;
const LEAST: f64 = 0.05;

/// Seconds of work that each rank needed for its first steps and its last ones.
#[derive(Debug, Default)]
pub struct Stragglers {
    ranks: BTreeMap<usize, Work>,
}

#[derive(Debug, Default)]
struct Work {
    first: Vec<f64>,
    last: Vec<f64>,
    told: bool,
}

impl Work {
    /// Then, and now: none of the last steps took less.
    fn times(&self) -> Option<(f64, f64)> {
        let now = self.last.iter().copied().reduce(f64::min).filter(|_| self.last.len() == LAST)?;
        Some((median(&self.first[1..]), now))
    }

    /// How many times longer the very last step took: a slow machine shows at once.
    fn factor(&self) -> Option<f64> {
        Some(self.last.last()? / median(&self.first[1..]))
    }
}

impl Stragglers {
    /// A rank needed so many seconds of work for a step; then and now, if it has become slow and
    /// that is new.
    pub fn take(&mut self, rank: usize, seconds: f64) -> Option<(f64, f64)> {
        let work = self.ranks.entry(rank).or_default();
        if work.first.len() <= FIRST {
            work.first.push(seconds);
        } else {
            work.last.push(seconds);
            if work.last.len() > LAST {
                work.last.remove(0);
            }
        }

        let (then, now) = work.times()?;
        let factor = now / then;
        if work.told || factor < SLOW || now - then < LEAST {
            return None;
        }

        let others: Vec<f64> = self
            .ranks
            .iter()
            .filter(|(other, _)| **other != rank)
            .filter_map(|(_, work)| work.factor())
            .collect();
        if !others.is_empty() && factor < SLOW * median(&others) {
            return None;
        }

        if let Some(work) = self.ranks.get_mut(&rank) {
            work.told = true;
        }

        Some((then, now))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slow_one_is_told_once_and_a_slow_machine_is_nobodys_fault() {
        let mut stragglers = Stragglers::default();
        let mut told = Vec::new();
        for step in 0..40 {
            let seconds = |rank| if rank == 1 && step >= 20 { 1.0 } else { 0.1 };
            told.extend(
                (0..3)
                    .filter_map(|rank| stragglers.take(rank, seconds(rank)).map(|_| (step, rank))),
            );
        }
        assert_eq!(told, [(22, 1)]);
        let mut stragglers = Stragglers::default();
        let all = (0..40)
            .flat_map(|step| (0..3).map(move |rank| (rank, if step < 20 { 0.1 } else { 1.0 })));
        let told = all.filter_map(|(rank, seconds)| stragglers.take(rank, seconds)).count();
        assert_eq!(told, 0);
    }
}
