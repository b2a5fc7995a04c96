//! Signals that ask a run to stop.
//!
//! ```text
//! SIGUSR1 SIGUSR2 SIGXCPU     a batch system's warning: stop and save, however often it comes
//! SIGTERM SIGINT SIGHUP       the first: stop and save; one that comes 2 s later or more: end at once
//! ```
//!
//! One wish to stop often arrives twice: from the terminal and from the shell, from `timeout` to
//! the process and to its group. A signal that is ignored when the process starts (`nohup`, a
//! shell's background) stays ignored.

use std::os::raw::c_int;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::{emulate_default_handler, signal_name};

use super::early::{self, WARNINGS};
use super::{Report, Reporter};
use crate::error::{Error, Result};

/// Signals that end any program.
const ENDS: [c_int; 3] = [SIGTERM, SIGINT, SIGHUP];

/// Signals that come so soon after the first are the same wish.
const SAME_WISH: Duration = Duration::from_secs(2);

/// From here on a file that grows beyond a limit of this process (`ulimit -f`) is an error of the
/// write, not the end of the process without a word.
pub fn survive_file_limit() {
    let heard = std::sync::Arc::default();
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, heard) {
        tracing::warn!(%error, "a limit of the size of files would end this process");
    }
}

/// What a signal asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wish {
    Stop,
    EndNow,
    /// It has been heard already.
    Nothing,
}

/// The signals that came.
#[derive(Debug, Default)]
struct Wishes {
    /// When the first came that ends any program.
    first: Option<Instant>,
    warned: bool,
}

impl Wishes {
    fn hear(&mut self, signal: c_int, now: Instant) -> Wish {
        if WARNINGS.contains(&signal) {
            return if std::mem::replace(&mut self.warned, true) {
                Wish::Nothing
            } else {
                Wish::Stop
            };
        }

        match self.first {
            None => {
                self.first = Some(now);
                Wish::Stop
            }
            Some(first) if now.duration_since(first) < SAME_WISH => Wish::Nothing,
            Some(_) => Wish::EndNow,
        }
    }
}

/// Sends a report when this process gets a signal that asks for a stop.
pub struct SignalWatch {
    handle: Handle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl SignalWatch {
    /// Begins; `origin` names this process. `ended` is asked at a SIGTERM: whether that comes
    /// because another process of the run has ended, in which case there is nothing to save any
    /// more.
    ///
    /// # Errors
    /// If the system does not allow it.
    pub fn start(
        reports: Reporter,
        origin: String,
        ended: impl Fn() -> bool + Send + 'static,
    ) -> Result<SignalWatch> {
        let wrong =
            |error: std::io::Error| Error::Internal(format!("signals cannot be watched ({error})"));
        let mut signals = Signals::new(watched()).map_err(wrong)?;
        let handle = signals.handle();
        let mut wishes = Wishes::default();
        if let Some(signal) = early::taken() {
            wishes.hear(signal, Instant::now());
            reports.send(Report::Stop { reason: reason(signal, &origin) })?;
        }

        let body = move || {
            for signal in signals.forever() {
                let wish = wishes.hear(signal, Instant::now());
                if wish == Wish::EndNow {
                    complain!(
                        "error: {} again: ended at once; earlier checkpoints are intact",
                        name(signal)
                    );

                    let _ = emulate_default_handler(signal);
                }

                if wish == Wish::Nothing || (signal == SIGTERM && ended()) {
                    continue;
                }

                let _ = reports.send(Report::Stop { reason: reason(signal, &origin) }); // A run that is over needs no stop.
            }
        };

        let thread =
            std::thread::Builder::new().name("signals".into()).spawn(body).map_err(wrong)?;
        Ok(SignalWatch { handle, thread: Some(thread) })
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn name(signal: c_int) -> &'static str {
    signal_name(signal).unwrap_or("a signal")
}

/// The words of a stop.
fn reason(signal: c_int, origin: &str) -> String {
    let name = name(signal);
    match ENDS.contains(&signal) {
        true => format!(
            "{name} at {origin} (again in {} s or later: ends at once, unsaved)",
            SAME_WISH.as_secs()
        ),
        false => format!("{name} at {origin}"),
    }
}

/// Those that are not ignored.
fn watched() -> Vec<c_int> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    [&WARNINGS[..], &ENDS]
        .concat()
        .into_iter()
        .filter(|signal| ignored >> (signal - 1) & 1 == 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::{SIGUSR1, SIGUSR2};

    use super::*;

    #[test]
    fn one_wish_that_arrives_twice_is_one() {
        let start = Instant::now();
        let hear = |signals: &[(c_int, u64)]| -> Vec<Wish> {
            let mut wishes = Wishes::default();
            signals
                .iter()
                .map(|(signal, ms)| wishes.hear(*signal, start + Duration::from_millis(*ms)))
                .collect()
        };
        use Wish::{EndNow, Nothing, Stop};
        assert_eq!(hear(&[(SIGTERM, 0), (SIGTERM, 1), (SIGINT, 1999)]), [Stop, Nothing, Nothing]);
        assert_eq!(hear(&[(SIGINT, 0), (SIGINT, 2000)]), [Stop, EndNow]);
        assert_eq!(
            hear(&[(SIGUSR1, 0), (SIGUSR2, 5000), (SIGUSR1, 9000)]),
            [Stop, Nothing, Nothing]
        );
        assert_eq!(hear(&[(SIGUSR1, 0), (SIGTERM, 5000), (SIGHUP, 9000)]), [Stop, Stop, EndNow]);
    }
}
