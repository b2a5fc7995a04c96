//! Errors on their way to the user: panics become errors, and of several the first that is a cause
//! wins.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use crate::error::{Error, Result};

/// Prints an error, and where it was found.
pub fn show(origin: Option<&str>, error: &Error) {
    match origin {
        Some(origin) => complain!("error: {origin}: {error}"),
        None => complain!("error: {error}"),
    }
}

thread_local! {
    /// Where this thread panicked last.
    static PANIC_PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Turns panics into errors: from here on they print nothing by themselves, and [`caught`] knows
/// where they were.
pub fn hush_panics() {
    std::panic::set_hook(Box::new(|info| {
        tracing::error!("{info}");
        PANIC_PLACE.set(info.location().map(ToString::to_string));
    }));
}

/// Runs `work`, turning a panic into an error.
///
/// # Errors
/// Those of `work`, and [`Error::Internal`] for a panic.
pub fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::Internal(panic_text(panic.as_ref()))))
}

/// Runs what a library does with a file: some give up by a panic on damaged ones.
///
/// # Errors
/// What `work` says, or that the library has given up.
pub fn guarded<T>(
    work: impl FnOnce() -> std::result::Result<T, String>,
) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic_text(panic.as_ref());
        Err(format!("it is damaged, or of a kind that is not known here ({text})"))
    })
}

/// A panic as text, with its place.
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    let place = PANIC_PLACE.take().unwrap_or_else(|| "an unknown place".to_owned());
    format!("panic at {place}: {}", text.unwrap_or("no message"))
}

/// The error to show: the first one that is not only the loss of a peer that had an error itself.
#[derive(Default)]
pub struct FirstError(Mutex<Option<(usize, Error)>>);

impl FirstError {
    /// An error of a rank.
    pub fn set(&self, rank: usize, error: Error) {
        let mut first = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let consequence = |error: &Error| matches!(error, Error::Lost { .. });
        let replace = match &*first {
            None => true,
            Some((_, held)) => consequence(held) && !consequence(&error),
        };

        if replace {
            *first = Some((rank, error));
        }
    }

    /// What is to be shown, and the rank that it is of.
    pub fn take(self) -> Option<(usize, Error)> {
        self.0.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
