//! Standard output and standard error: everything that is printed goes through here, and here alone
//! it is known what to do when nobody reads it any more, or a disk is full.
//!
//! ```text
//!                     a short command               a command that goes on (training, preparing, a study)
//! reader has gone     ends quietly, exit code 0     goes on; the log says so, once
//! cannot be written   ends, exit code 2             goes on; the log says so, once
//! standard error      what cannot be shown stands in the log, if there is one; the exit code is the same
//! ```

use std::fmt::Arguments;
use std::io::{self, ErrorKind, Write};
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};

/// The command does something besides printing.
static GOES_ON: AtomicBool = AtomicBool::new(false);

/// The loss of standard output has been told.
static TOLD: AtomicBool = AtomicBool::new(false);

/// The exit code of a command whose only result could not be written.
const NOT_WRITTEN: i32 = 2;

/// From here on this command goes on without its standard output.
pub fn go_on_without_reader() {
    GOES_ON.store(true, Ordering::Relaxed);
}

/// Prints a line on standard output.
#[macro_export]
macro_rules! say {
    ($($text:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// Prints on standard output what brings its own ends of lines.
#[macro_export]
macro_rules! put {
    ($($text:tt)*) => { $crate::console::print(format_args!($($text)*)) };
}

/// Prints a line on standard error.
#[macro_export]
macro_rules! complain {
    ($($text:tt)*) => { $crate::console::print_error(format_args!($($text)*)) };
}

/// Prints on standard output: behind `say!` and `put!`.
pub fn print(text: Arguments) {
    let mut out = io::stdout().lock();
    let written = out.write_fmt(text).and_then(|()| out.flush());

    drop(out);
    if let Err(error) = written {
        output_is_lost(&error);
    }
}

/// Prints a line on standard error: behind `complain!`.
pub fn print_error(text: Arguments) {
    if let Err(error) = writeln!(io::stderr().lock(), "{text}") {
        tracing::error!("{text} (standard error cannot be written: {error})");
    }
}

fn output_is_lost(error: &io::Error) {
    if GOES_ON.load(Ordering::Relaxed) {
        if !TOLD.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "standard output cannot be written ({error}); the run continues, its figures are in its files"
            );
        }
        return;
    }

    if error.kind() == ErrorKind::BrokenPipe {
        exit(0);
    }
    complain!("error: standard output cannot be written ({error}); send it to another file");
    exit(NOT_WRITTEN);
}
