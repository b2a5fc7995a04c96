//! How far the places may go, and where they stop: rank 0's part of what `gate` draws.

use std::time::Duration;

use crate::control::{Control, Controls};

/// How long coordinator and places may take to hear of each other.
const NEWS: Duration = Duration::from_millis(500);
/// Steps that the time of the next one is guessed from.
const RECENT: usize = 9;

/// The limit of a run.
pub struct StopPlanner {
    /// Of the whole run.
    steps: usize,
    /// How far the limit must be ahead of the complete steps.
    lead: usize,
    /// Steps before this one may be begun; where the run was told to stop.
    limit: usize,
    stop: Option<usize>,
    /// Of every step so far.
    seconds: Vec<f64>,
}

/// What a request to stop comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Stopping {
    /// The run stops at this step.
    UsedVersions(usize),
    /// All steps up to the end are under way: the run ends there.
    AtEnd,
    /// It was asked before.
    Already,
}

impl StopPlanner {
    /// Of a run of `steps` steps from `start` on, whose schedule needs the limit `lead` steps
    /// ahead.
    pub fn new(steps: usize, start: usize, lead: usize) -> StopPlanner {
        StopPlanner { steps, lead, limit: start + lead, stop: None, seconds: Vec::new() }
    }

    /// A step took so long.
    pub fn step(&mut self, seconds: f64) {
        self.seconds.push(seconds);
    }

    /// The first step that nobody may begin yet.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Where the run was told to stop.
    pub fn stop(&self) -> Option<usize> {
        self.stop
    }

    /// The median time of all steps, seconds; none of no step.
    pub fn median(&self) -> Option<f64> {
        median(&self.seconds)
    }

    /// The time of a step now: where steps are short that of all while news travel, else the median
    /// of the last ones.
    fn recent(&self) -> Duration {
        let (in_news, last) =
            (self.steps_in_news(), &self.seconds[self.seconds.len().saturating_sub(RECENT)..]);
        match in_news > RECENT as f64 {
            true => NEWS.div_f64(in_news),
            false => Duration::from_secs_f64(median(last).unwrap_or(0.0)),
        }
    }

    /// How many steps are made while news travel. Steps may be told in bursts, each of no time but
    /// the first, so this is the number of the last ones, back to where so much time has passed; of
    /// a younger run all.
    fn steps_in_news(&self) -> f64 {
        let (mut steps, mut left) = (0.0, NEWS.as_secs_f64());
        for seconds in self.seconds.iter().rev() {
            if *seconds >= left {
                return steps + left / seconds;
            }
            left -= seconds;
            steps += 1.0;
        }
        steps
    }

    /// Steps that are made before a stop, after `written` complete ones.
    pub fn under_way(&self, written: usize) -> usize {
        self.limit.saturating_sub(written)
    }

    /// How long a stop takes, besides its save.
    pub fn time_to_stop(&self, written: usize) -> Duration {
        self.recent() * self.under_way(written) as u32
    }

    /// Keeps the limit far enough ahead of `written` complete steps that nobody comes near it.
    pub fn raise(&mut self, written: usize, controls: &Controls) {
        if self.stop.is_some() || self.limit >= self.steps {
            return;
        }

        // Where steps are short, the way of the news takes several.
        let spare = self.steps_in_news().round() as usize;
        if self.limit <= written + self.lead - 1 + spare / 2 {
            self.limit = (written + self.lead + spare).min(self.steps);
            controls.send(Control::Limit(self.limit));
        }
    }

    /// Lets everybody stop at the limit, which nobody has passed.
    pub fn end_at_limit(&mut self, controls: &Controls) -> Stopping {
        if self.stop.is_some() {
            return Stopping::Already;
        }

        if self.limit >= self.steps {
            return Stopping::AtEnd;
        }

        self.stop = Some(self.limit);
        controls.send(Control::Stop(self.limit));
        Stopping::UsedVersions(self.limit)
    }
}

fn median(seconds: &[f64]) -> Option<f64> {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn the_limit_stays_ahead_and_becomes_the_end() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let controls = Controls::new({
            let told = Arc::clone(&told);
            move |control| told.lock().unwrap().push(control)
        });
        let mut planner = StopPlanner::new(100, 0, 4);
        for written in 1..=10 {
            planner.step(10.0);
            planner.raise(written, &controls);
        }
        let limits: Vec<Control> = (5..=14).map(Control::Limit).collect();
        assert_eq!(*told.lock().unwrap(), limits);
        assert_eq!((planner.under_way(10), planner.time_to_stop(10)), (4, Duration::from_secs(40)));
        assert_eq!(planner.end_at_limit(&controls), Stopping::UsedVersions(14));
        assert_eq!(planner.end_at_limit(&controls), Stopping::Already);
        planner.raise(13, &controls);
        assert_eq!(told.lock().unwrap()[10..], [Control::Stop(14)]);
    }

    /// A coordinator that was kept from its work hears of many steps at once.
    #[test]
    fn a_burst_of_steps_does_not_carry_the_limit_away() {
        let controls = Controls::new(|_| {});
        let mut planner = StopPlanner::new(100_000, 0, 4);
        for burst in 1..=20 {
            for written in 20 * (burst - 1) + 1..=20 * burst {
                planner.step(if written % 20 == 1 { 0.2 } else { 1e-6 });
                planner.raise(written, &controls);
                // 100 steps a second.
                assert!(
                    planner.under_way(written) <= 4 + 70,
                    "{written}: {}",
                    planner.under_way(written)
                );
            }
        }
        assert!(planner.under_way(400) >= 25);
    }

    #[test]
    fn short_steps_get_a_limit_further_ahead() {
        let controls = Controls::new(|_| {});
        let mut planner = StopPlanner::new(1000, 0, 4);
        for written in 1..=200 {
            planner.step(0.01);
            planner.raise(written, &controls);
        }
        assert!((4 + 25..=4 + 50).contains(&planner.under_way(200)), "{}", planner.under_way(200));
        let mut planner = StopPlanner::new(20, 0, 4);
        for written in 1..=10 {
            planner.step(0.01);
            planner.raise(written, &controls);
        }
        assert_eq!(planner.end_at_limit(&controls), Stopping::AtEnd);
    }
}
