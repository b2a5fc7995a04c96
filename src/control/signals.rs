//! Signals that ask a run to stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::{Handle, Signals};

use super::{Report, Reporter};
use crate::error::{Error, Result};

static EARLY: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Keeps a SIGUSR1 that comes before anybody watches from ending this process, for whoever watches then.
pub fn expect_early() {
    if let Err(error) = signal_hook::flag::register(SIGUSR1, Arc::clone(&EARLY)) {
        tracing::warn!(%error, "an early SIGUSR1 would end this process");
    }
}

/// Sends a report when this process gets a signal; a second signal of the kind does what it does to any program.
pub struct SignalWatch {
    handle: Handle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl SignalWatch {
    /// Begins; `origin` names this process. `ended` is asked at a SIGTERM: whether that comes because another process
    /// of the run has ended, in which case there is nothing to save any more.
    ///
    /// # Errors
    /// If the system does not allow it.
    pub fn start(reports: Reporter, origin: String, ended: impl Fn() -> bool + Send + 'static) -> Result<SignalWatch> {
        let wrong = |error: std::io::Error| Error::Internal(format!("signals cannot be watched ({error})"));
        let mut signals = Signals::new([SIGUSR1, SIGTERM, SIGINT]).map_err(wrong)?;
        let handle = signals.handle();
        if EARLY.swap(false, Ordering::Relaxed) {
            reports.send(Report::Stop { reason: format!("SIGUSR1 at {origin}") })?;
        }
        let body = move || {
            let mut seen = Vec::new();
            for signal in signals.forever() {
                // A batch system may repeat its warning.
                if signal != SIGUSR1 && seen.contains(&signal) {
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
                seen.push(signal);
                if signal == SIGTERM && ended() {
                    continue;
                }
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
                let reason = format!("{name} at {origin}");
                let _ = reports.send(Report::Stop { reason }); // A run that is over needs no stop.
            }
        };
        let thread = std::thread::Builder::new().name("signals".into()).spawn(body).map_err(wrong)?;
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
