//! Lags, delays, versions and sync points: the formulas of the algorithm, nothing else.
//!
//! Let `W_k[n]` be the weights of stage k after its first n updates and `s` the last sync point at
//! or before step t. Stage k runs the forward and the backward of step t at the version
//!
//! ```text
//! w_k^t = W_k[ max(s, t - D_k) ],      D_k >= ceil(q_k / m),      q_k = h * (K - 1 - k)
//! ```
//!
//! with slack h per hop, lag `q_k` in microbatches, delay `D_k` in updates, m microbatches a step.
//! Every step makes exactly one update on every stage.

use std::collections::BTreeSet;

/// `q_k = h (K-1-k)`: how many microbatches stage k forwards before the first backward comes back.
pub fn lag(slack: usize, stages: usize, stage: usize) -> usize {
    slack * (stages - 1 - stage)
}

/// The least `D_k` that a lag allows: `ceil(q_k / m)`.
pub fn least_delay(lag: usize, microbatches: usize) -> usize {
    lag.div_ceil(microbatches)
}

/// The number n of the version `W_k[n]` that a stage with delay `delay` uses for step `t`; `sync`
/// is the last sync point at or before t.
pub fn version(sync: usize, t: usize, delay: usize) -> usize {
    sync.max(t.saturating_sub(delay))
}

/// The sync points of a run: step boundaries at which the pipeline is drained. The start and the
/// end always are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncPoints {
    /// The step that the run starts with: 0, or where a saved run goes on.
    pub start: usize,
    /// The sync point that the first steps' delays count from: the start, or an earlier one if the
    /// run was stopped between two and goes on as if it had not been.
    pub since: usize,
    /// Steps of the run; the end is a sync point.
    pub steps: usize,
    /// Every step a sync point: ordinary back-propagation.
    pub every_step: bool,
    /// Synchronous warm-up: the first steps are sync points.
    pub warm_up: usize,
    /// Every multiple of each of these is a sync point (evaluation, checkpoints).
    pub periods: Vec<usize>,
    /// Sync points given one by one.
    pub at: BTreeSet<usize>,
}

impl SyncPoints {
    /// Only the start and the end of a run of `steps` steps.
    pub fn ends(steps: usize) -> SyncPoints {
        SyncPoints {
            start: 0,
            since: 0,
            steps,
            every_step: false,
            warm_up: 0,
            periods: Vec::new(),
            at: BTreeSet::new(),
        }
    }

    /// Whether the pipeline is drained at the boundary before step `t`: at sync points, and where a
    /// run goes on.
    pub fn contains(&self, t: usize) -> bool {
        t == self.start
            || t == self.steps
            || self.every_step
            || t < self.warm_up
            || self.at.contains(&t)
            || self.periods.iter().any(|p| t.is_multiple_of(*p))
    }

    /// The first sync point after step boundary `t`, at most the end of the run.
    pub fn after(&self, t: usize) -> usize {
        let next = t + 1;
        let dense = (self.every_step || next < self.warm_up).then_some(next);
        let start = Some(self.start).filter(|start| *start > t);
        let listed = self.at.range(next..).next().copied();
        let periodic = self.periods.iter().map(|p| next.next_multiple_of(*p));

        dense.into_iter().chain(start).chain(listed).chain(periodic).fold(self.steps, usize::min)
    }

    /// The last sync point at or before `t`, that the delays of step `t` count from.
    pub fn before(&self, t: usize) -> usize {
        let dense = if self.every_step {
            Some(t)
        } else {
            self.warm_up.checked_sub(1).map(|last| last.min(t))
        };

        let end = Some(self.steps).filter(|end| *end <= t);
        let listed = self.at.range(..=t).next_back().copied();
        let periodic = self.periods.iter().map(|p| t / p * p);

        let last =
            dense.into_iter().chain(end).chain(listed).chain(periodic).fold(self.start, usize::max);
        if last > self.start { last } else { self.since }
    }

    /// The run from `start` on, whose first delays count from `since`.
    pub fn from(&mut self, start: usize, since: usize) {
        (self.start, self.since) = (start, since);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delays(slack: usize, stages: usize, microbatches: usize) -> Vec<usize> {
        (0..stages).map(|k| least_delay(lag(slack, stages, k), microbatches)).collect()
    }

    #[test]
    fn delays_of_the_design() {
        assert_eq!(delays(1, 4, 1), [3, 2, 1, 0]); // the paper's algorithm
        assert_eq!(delays(1, 4, 4), [1, 1, 1, 0]); // m >= K-1: one everywhere, none on the last
        assert_eq!(delays(1, 11, 8), [2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        assert_eq!(delays(2, 4, 1), [6, 4, 2, 0]);
        assert_eq!(delays(2, 4, 4), [2, 1, 1, 0]);
        assert_eq!(delays(1, 1, 3), [0]);
    }

    #[test]
    fn versions_restart_at_a_sync_point() {
        let table = [
            (0, 0, 3, 0),
            (0, 2, 3, 0),
            (0, 3, 3, 0),
            (0, 4, 3, 1),
            (5, 5, 3, 5),
            (5, 7, 3, 5),
            (5, 9, 3, 6),
        ];
        for (sync, t, delay, expected) in table {
            assert_eq!(version(sync, t, delay), expected, "s={sync} t={t} D={delay}");
        }
        assert_eq!(version(0, 9, 0), 9);
    }

    #[test]
    fn sync_points_come_from_warm_up_periods_and_lists() {
        let mut sync = SyncPoints::ends(12);
        sync.warm_up = 3;
        sync.periods = vec![5];
        sync.at.insert(7);
        let points: Vec<_> = (0..=12).filter(|t| sync.contains(*t)).collect();
        assert_eq!(points, [0, 1, 2, 5, 7, 10, 12]);
        assert_eq!((sync.after(2), sync.after(5), sync.after(10)), (5, 7, 12));
        assert_eq!((sync.before(4), sync.before(7), sync.before(11)), (2, 7, 10));
        sync.from(6, 6);
        assert_eq!((sync.before(6), sync.before(8), sync.after(6)), (6, 7, 7));
        sync.from(9, 7);
        assert_eq!((sync.before(9), sync.before(10), sync.after(9)), (7, 10, 10));
    }

    /// What is computed at once is what a search from step to step finds.
    #[test]
    fn neighbours_are_those_that_a_search_finds() {
        let after = |sync: &SyncPoints, t: usize| {
            (t + 1..sync.steps).find(|u| sync.contains(*u)).unwrap_or(sync.steps)
        };
        let before = |sync: &SyncPoints, t: usize| match (sync.start..=t)
            .rev()
            .find(|u| sync.contains(*u))
        {
            Some(u) if u > sync.start => u,
            _ => sync.since,
        };
        for number in 0..2 * 3 * 4 * 4 * 3 {
            let mut sync = SyncPoints::ends(30);
            sync.every_step = number % 2 == 1 && number % 5 == 0;
            sync.warm_up = [0, 1, 7][number / 2 % 3];
            sync.periods = [vec![], vec![4], vec![5, 9], vec![40]][number / 6 % 4].clone();
            sync.at = [vec![], vec![3], vec![11, 12, 29], vec![28]][number / 24 % 4]
                .iter()
                .copied()
                .collect();
            sync.from([0, 6, 13][number / 96 % 3], [0, 5, 13][number / 96 % 3]);
            for t in sync.start..30 {
                assert_eq!(
                    (sync.after(t), sync.before(t)),
                    (after(&sync, t), before(&sync, t)),
                    "{t} of {sync:?}"
                );
            }
            assert_eq!(sync.before(30), 30);
        }
    }

    #[test]
    fn nothing_grows_with_the_number_of_steps() {
        let sync = SyncPoints::ends(1 << 50);
        assert_eq!((sync.after(1 << 40), sync.before(1 << 40)), (1 << 50, 0));
    }
}
