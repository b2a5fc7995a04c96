//! Progress of what takes long: a bar with the time left, on a terminal, for what has taken two seconds
//! already.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What is over before is not worth a bar.
const LONG: Duration = Duration::from_secs(2);

/// A task under way; the bar goes with it.
pub struct Bar {
    bar: ProgressBar,
    begun: Instant,
    shown: AtomicBool,
}

impl Bar {
    /// Of so many steps, in a word or two.
    pub fn of_steps(total: u64, what: &str) -> Bar {
        Bar::new(total, what, "{msg:20} {bar:30} {pos}/{len}  {eta} left")
    }

    /// Of so many bytes.
    pub fn of_bytes(total: u64, what: &str) -> Bar {
        Bar::new(total, what, "{msg:20} {bar:30} {bytes}/{total_bytes}  {eta} left")
    }

    /// Of something that has no unit.
    pub fn of_parts(total: u64, what: &str) -> Bar {
        Bar::new(total, what, "{msg:20} {bar:30} {percent:>3} %  {eta} left")
    }

    fn new(total: u64, what: &str, template: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template(template);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what.to_owned());
        Bar { bar, begun: Instant::now(), shown: AtomicBool::new(false) }
    }

    /// So much more is done.
    pub fn advance(&self, by: u64) {
        self.bar.inc(by);
        if self.begun.elapsed() >= LONG && !self.shown.swap(true, Ordering::Relaxed) {
            // Nothing is drawn where that is no terminal.
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Bar {
    /// Does something that prints lines, beside the bar.
    pub fn beside<T>(&self, print: impl FnOnce() -> T) -> T {
        self.bar.suspend(print)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_task_shows_nothing() {
        let mut bar = Bar::of_steps(10, "counting");
        bar.advance(4);
        assert!(bar.bar.is_hidden() && !bar.shown.load(Ordering::Relaxed));
        bar.begun = Instant::now().checked_sub(LONG).unwrap();
        bar.advance(1);
        assert!(bar.shown.load(Ordering::Relaxed) && bar.bar.position() == 5);
    }
}
