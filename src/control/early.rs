//! A warning of a batch system that comes while the program is still being loaded, when nobody
//! watches yet: by default it would end the process, and a job that is to be queued again would
//! count as failed.
//!
//! Loading libtorch takes tenths of a second before `main`, so the handler is set before the
//! initializers of any library.

use std::sync::atomic::{AtomicI32, Ordering};

/// The signals by which batch systems warn of the end of a job.
pub(super) const WARNINGS: [i32; 3] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGXCPU];

/// The warning that came; 0 for none.
static CAME: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: i32) {
    CAME.store(signal, Ordering::Relaxed);
}

extern "C" fn expect() {
    WARNINGS
        .iter()
        .for_each(|signal| handle(*signal, note as extern "C" fn(i32) as libc::sighandler_t));
}

/// Runs before the initializers of the libraries that this program is linked to.
#[cfg(target_os = "linux")]
#[used]
// SAFETY: the section holds pointers to functions that the loader calls once; this one calls
// `signal` only.
#[unsafe(link_section = ".preinit_array")]
static FIRST: extern "C" fn() = expect;

/// Sets a handler, unless the signal is ignored: whoever has started this process wants that.
fn handle(signal: i32, handler: libc::sighandler_t) {
    // SAFETY: `handler` is a constant of the C library or `note`, which only stores a number.
    unsafe {
        if libc::signal(signal, handler) == libc::SIG_IGN {
            libc::signal(signal, libc::SIG_IGN);
        }
    }
}

/// The warning that came before anybody watched.
pub(super) fn taken() -> Option<i32> {
    Some(CAME.swap(0, Ordering::Relaxed)).filter(|signal| *signal != 0)
}

/// This command does not stop and save: a warning ends it, as it does any program.
pub fn not_expected() {
    WARNINGS.iter().for_each(|signal| handle(*signal, libc::SIG_DFL));
    if let Some(signal) = taken() {
        let _ = signal_hook::low_level::raise(signal);
    }
}
