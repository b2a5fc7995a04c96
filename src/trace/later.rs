//! Events of a GPU: their moments are known when its work has come past the marks around them. The host
//! asks now and then, and never waits.
//!
//! ```text
//! host     base: seen passed at moment M      asks: has the second mark passed?
//! device   |base| ........ |mark| action |mark| ..        moment of a mark = M + its time since base
//! ```
//!
//! The driver tells the time between two marks in f32, so the base moves on with the marks.

use std::collections::VecDeque;
use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::{Event, Moment, Span};
use crate::device::timing::lost;
use crate::error::Result;

/// A mark in the work of a device.
pub trait Mark {
    /// Whether all work before it is done.
    fn passed(&self) -> Result<bool>;

    /// Nanoseconds of the device from an earlier mark, which has passed, to this one, which has too.
    fn since(&self, earlier: &Self) -> Result<f64>;
}

impl Mark for CudaEvent {
    fn passed(&self) -> Result<bool> {
        self.try_is_complete().map_err(lost)
    }

    fn since(&self, earlier: &CudaEvent) -> Result<f64> {
        Ok(f64::from(earlier.elapsed_ms(self).map_err(lost)?) * 1e6)
    }
}

/// After so many nanoseconds another mark becomes the base.
const MOVES: f64 = 5e9;

/// Events whose marks have not passed yet.
pub struct Later<M> {
    base: Arc<M>,
    at: Moment,
    waiting: VecDeque<(Arc<M>, Arc<M>, Event)>,
}

impl<M: Mark> Later<M> {
    /// None yet; `base` was passed at a moment.
    pub fn new(base: Arc<M>, at: Moment) -> Later<M> {
        Later { base, at, waiting: VecDeque::new() }
    }

    /// What happens between two marks.
    pub fn add(&mut self, begin: Arc<M>, end: Arc<M>, event: Event) {
        self.waiting.push_back((begin, end, event));
    }

    /// Whether nothing is waited for.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The events whose marks have passed, with their moments.
    pub fn passed(&mut self) -> Result<Vec<Event>> {
        let (mut known, mut left) = (Vec::new(), VecDeque::new());
        for (begin, end, event) in std::mem::take(&mut self.waiting) {
            if !end.passed()? {
                left.push_back((begin, end, event));
                continue;
            }

            let (from, to) = (begin.since(&self.base)?, end.since(&self.base)?);
            let moment = |since: f64| Moment((self.at.0 as f64 + since).max(0.0) as u64);
            known.push(event.at(Span { begin: moment(from), end: moment(to.max(from)) }));
            if to > MOVES {
                (self.at, self.base) = (moment(to), end);
            }
        }

        self.waiting = left;
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::trace::Wait;

    /// A mark at a time of a device that has come so far.
    struct At(f64, Arc<AtomicU64>);

    impl Mark for At {
        fn passed(&self) -> Result<bool> {
            Ok(self.0 <= self.1.load(Ordering::Relaxed) as f64)
        }

        fn since(&self, earlier: &At) -> Result<f64> {
            assert!(self.passed()? && earlier.passed()?, "nothing is known of it yet");
            // As a driver tells it.
            Ok(f64::from(((self.0 - earlier.0) * 1e-6) as f32) * 1e6)
        }
    }

    #[test]
    fn moments_are_known_when_the_marks_have_passed() {
        let now = Arc::new(AtomicU64::new(0));
        let mark = |at: f64| Arc::new(At(at, Arc::clone(&now)));
        let mut later = Later::new(mark(0.0), Moment(1_000));
        let wait = Event::Wait {
            stage: 0,
            wait: Wait::Between,
            span: Span { begin: Moment(0), end: Moment(0) },
        };
        // A queue beside the first is ahead of it.
        later.add(mark(2e9), mark(3e9), wait.clone());
        later.add(mark(1e9), mark(2e9), wait.clone());
        now.store(2_500_000_000, Ordering::Relaxed);
        let spans = |events: Vec<Event>| -> Vec<(u64, u64)> {
            let span = |event: &Event| match event {
                Event::Wait { span, .. } => (span.begin.0, span.end.0),
                other => panic!("{other:?}"),
            };
            events.iter().map(span).collect()
        };
        assert_eq!(spans(later.passed().unwrap()), [(1_000_001_000, 2_000_001_000)]);
        assert!(!later.is_empty());

        // An hour of short actions: the base goes with them, and no digit is lost.
        now.store(4_000_000_000_000, Ordering::Relaxed);
        later.passed().unwrap();
        for second in 4..3600 {
            let at = f64::from(second) * 1e9;
            later.add(mark(at), mark(at + 2_000.0), wait.clone());
            let (begin, end) = spans(later.passed().unwrap())[0];
            assert!(begin.abs_diff(at as u64 + 1_000) < 2_000_000, "{begin} at {at}");
            assert!((1_000..3_500).contains(&(end - begin)), "{} ns", end - begin);
        }
        assert!(later.is_empty());
    }
}
