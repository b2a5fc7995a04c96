//! What can go wrong, in the user's words, and the exit code of each.

use crate::grid::Place;

/// Everything that ends a run. The text names the setting or file, the value found and the remedy.
#[derive(Debug, Clone, PartialEq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum Error {
    /// The command line cannot be understood.
    #[error("{0}")]
    Usage(String),
    /// A setting has a value that cannot be used.
    #[error("setting `{setting}`: found {found}; {remedy}")]
    Config { setting: String, found: String, remedy: String },
    /// The memory that this process may have is not enough.
    #[error(
        "out of memory: {0}; take more stages (--grid), more microbatches, recompute = \"blocks\", or a higher limit"
    )]
    Memory(String),
    /// A corpus or another input file cannot be used.
    #[error("data {path}: {problem}; {remedy}")]
    Data { path: String, problem: String, remedy: String },
    /// A neighbour or a member of the replica group is gone.
    #[error(
        "lost {peer} while {doing}; the first error of the run is the cause, see that place's log"
    )]
    Lost { peer: Place, doing: String },
    /// A process is gone, without a word: killed, or ended by something else than this program.
    #[error(
        "process died in {doing}; the launcher's next line names the signal (9: killed, often out of memory); \
         earlier checkpoints are intact"
    )]
    Died { doing: String },
    /// Nothing moves any more.
    #[error("timed out: no progress for {seconds:.0} s: {place} {what}")]
    Hang { seconds: f64, place: String, what: String },
    /// The transport itself failed.
    #[error("MPI: {0}")]
    Transport(String),
    /// What arrived over a link or out of a group, before the training, is not what was sent.
    #[error("self-test: {0}; look at the network, or at the library that carries tensors")]
    SelfTest(String),
    /// A GPU, or what drives it, failed.
    #[error("device: {0}")]
    Device(String),
    /// A message arrived that is not the one which the schedule calls for.
    #[error(
        "wrong message from {from} to {to}: expected {expected}, found {found}; do all ranks run the same program and config?"
    )]
    Message { from: Place, to: Place, expected: String, found: String },
    /// A loss, an activation or a gradient holds inf or NaN.
    #[error(
        "not finite: {tensor} at step {step} on {place}{data}; lower optimizer.lr, set optimizer.clip or lengthen \
         optimizer.warmup (earlier checkpoints are intact)"
    )]
    NotFinite { tensor: String, step: usize, place: Place, data: String },
    /// Copies of the same weights are not the same any more.
    #[error(
        "the copies of {what} differ after step {step}: {digests}; a fault of the program or of a machine's \
         memory (earlier checkpoints are intact)"
    )]
    CopiesDiffer { what: String, step: usize, digests: String },
    /// A folder of weights is not usable.
    #[error("checkpoint {path}: {problem}")]
    Checkpoint { path: String, problem: String },
    /// A file of the run cannot be written: the disk or a quota is full, a limit is met, a folder
    /// has gone.
    #[error(
        "{path}: cannot be written ({problem}); make room, or raise the limit, then --resume: earlier checkpoints \
         are intact"
    )]
    Unwritten { path: String, problem: String },
    /// A fault of the program itself, a panic among them.
    #[error("internal error: {0}")]
    Internal(String),
}

/// The result of everything that can end a run.
pub type Result<T> = std::result::Result<T, Error>;

/// The result of a whole run: an error, and where it was found if that was at one place.
pub type Placed<T> = std::result::Result<T, (Option<String>, Error)>;

/// The exit code of a run whose loss is no number any more: a study reads it.
pub const NOT_FINITE: u8 = 5;

impl Error {
    /// The exit code of the process that this error ends.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) | Error::Config { .. } | Error::Memory(_) => 2,
            Error::Data { .. } => 3,
            Error::Lost { .. }
            | Error::Died { .. }
            | Error::Hang { .. }
            | Error::Transport(_)
            | Error::SelfTest(_)
            | Error::Device(_)
            | Error::Message { .. } => 4,
            Error::NotFinite { .. } => NOT_FINITE,
            Error::Checkpoint { .. } => 6,
            Error::Unwritten { .. } => 7,
            Error::CopiesDiffer { .. } | Error::Internal(_) => 70,
        }
    }

    /// A setting, the value found in it, and what to do.
    pub fn config(
        setting: impl Into<String>,
        found: impl ToString,
        remedy: impl Into<String>,
    ) -> Error {
        Error::Config { setting: setting.into(), found: found.to_string(), remedy: remedy.into() }
    }

    /// Refuses a setting below 1.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn unless_at_least_one(setting: &str, value: usize) -> Result<()> {
        if value >= 1 { Ok(()) } else { Err(Error::config(setting, value, "must be at least 1")) }
    }

    /// Refuses a setting that is not `good`, or no number.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn unless(good: bool, setting: &str, value: f64, remedy: &str) -> Result<()> {
        match (good, value.is_finite()) {
            (true, true) => Ok(()),
            (_, false) => Err(Error::config(setting, value, "must be a finite number")),
            (false, true) => Err(Error::config(setting, value, remedy)),
        }
    }

    /// A file of input, what is wrong with it, and what to do.
    pub fn data(path: impl ToString, problem: impl ToString, remedy: impl Into<String>) -> Error {
        Error::Data { path: path.to_string(), problem: problem.to_string(), remedy: remedy.into() }
    }

    /// A file of a run that goes on no more, since it cannot be written.
    pub fn unwritten(path: &std::path::Path, problem: impl ToString) -> Error {
        Error::Unwritten { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// A folder of weights and what is wrong with it.
    pub fn checkpoint(path: &std::path::Path, problem: impl ToString) -> Error {
        Error::Checkpoint { path: path.display().to_string(), problem: problem.to_string() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Error {
        // libtorch appends a C++ stack; the first line is the message.
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        if first.contains("can't allocate memory") || first.contains("out of memory") {
            return Error::Memory(format!("not enough ({first})"));
        }

        if first.contains("CUDA error") || first.contains("CUDNN") || first.contains("CUBLAS") {
            return Error::Device(format!("libtorch: {first}"));
        }

        Error::Internal(format!("libtorch: {first}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_documentation() {
        let place = Place { stage: 1, replica: 0 };
        let table = [
            (Error::Usage("x".into()), 2),
            (Error::config("a", 1, "b"), 2),
            (Error::Memory("x".into()), 2),
            (Error::data("a", "b", "c"), 3),
            (Error::Lost { peer: place, doing: "x".into() }, 4),
            (Error::Died { doing: "x".into() }, 4),
            (Error::Device("x".into()), 4),
            (Error::Hang { seconds: 1.0, place: "x".into(), what: "y".into() }, 4),
            (Error::Transport("x".into()), 4),
            (Error::SelfTest("x".into()), 4),
            (Error::Message { from: place, to: place, expected: "a".into(), found: "b".into() }, 4),
            (Error::NotFinite { tensor: "x".into(), step: 0, place, data: String::new() }, 5),
            (Error::checkpoint(std::path::Path::new("x"), "y"), 6),
            (Error::unwritten(std::path::Path::new("x"), "y"), 7),
            (Error::Internal("x".into()), 70),
            (Error::CopiesDiffer { what: "x".into(), step: 1, digests: "x".into() }, 70),
        ];
        for (error, code) in table {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
