//! Everything that is read from outside, damaged at random: `scripts/fuzz.sh MINUTES`.
//!
//! ```text
//! a good input --mutations, drawn by proptest--> a bad one --> the code that reads it
//!
//! must hold    no panic, no abort, no signal, no hang; nothing allocated that the input does not allow; nothing written outside of
//!              the target's folder; an error names the file or the setting
//! ```
//!
//! Every target runs in a process of its own, which writes down the number of the input that it tries, so that an input which ends
//! the process is known too. An input is a pure function of seed, target and number:
//!
//! ```text
//! cargo test --test fuzz -- [TARGET] [--seconds S] [--seed N] [--number N]       --number: this input alone, and what it says
//! ```

mod mutate;
mod texts;
mod data;
mod records;
mod states;
mod folders;
mod messages;
mod runs;
mod run;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// The parts of an input, as they would stand in files or on a line.
type Parts = Vec<Vec<u8>>;

/// Something that reads.
trait Target {
    /// Good inputs, which mutations begin with.
    fn seeds(&self) -> Vec<Parts>;

    /// Words that mean something to it.
    fn words(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Reads an input.
    ///
    /// # Errors
    /// What must not be, besides panics and the like.
    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String>;

    /// Bytes that reading may allocate, for so many bytes of input.
    fn room(&self, bytes: usize) -> usize {
        (32 << 20) + 64 * bytes
    }
}

/// Makes a target, whose files lie in a folder.
type Make = fn(&Path) -> Box<dyn Target>;

/// Each with its share of the time.
const TARGETS: [(&str, Make, f64); 14] = [
    ("config", texts::config, 2.0),
    ("command-line", texts::command_line, 1.0),
    ("topology", texts::topology, 0.5),
    ("profile", texts::profile, 0.5),
    ("study", texts::study, 1.0),
    ("prepared", data::prepared, 1.0),
    ("words", data::words, 1.0),
    ("archive", data::archive, 1.0),
    ("records", records::records, 2.0),
    ("ids", records::ids, 0.5),
    ("state", states::state, 2.5),
    ("folder", folders::folder, 1.0),
    ("messages", messages::messages, 0.5),
    ("run", runs::runs, 1.0),
];

/// Of all targets together, when nothing else is asked for.
const SECONDS: f64 = 10.0;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        Some(args.get(at + 1).unwrap_or_else(|| panic!("{name} needs a value")).as_str())
    };
    let seed = value("--seed").map_or(1, |text| text.parse().expect("a whole number"));
    if let Some(folder) = value("--child") {
        return run::child(&args[0], Path::new(folder), seed, value("--number"), value("--after"));
    }

    let seconds = value("--seconds").map_or(SECONDS, |text| text.parse().expect("seconds"));
    let asked = args.first().filter(|first| !first.starts_with('-')).map(String::as_str);
    let chosen: Vec<&(&str, Make, f64)> =
        TARGETS.iter().filter(|(name, ..)| asked.is_none_or(|asked| asked == *name)).collect();
    // The test harness's own words, as in `cargo test NAME`, mean other tests.
    if chosen.is_empty() {
        return ExitCode::SUCCESS;
    }

    let whole: f64 = chosen.iter().map(|(.., share)| share).sum();
    let (mut executions, mut findings) = (0, 0);
    for (name, _, share) in chosen {
        let time = Duration::from_secs_f64(seconds * share / whole);
        let outcome = run::parent(name, time, seed, value("--number"));
        executions += outcome.executions;
        findings += outcome.findings.len();
        ouroboros::say!(
            "fuzz: {name:<14} {:>9} executions  {:>3} findings",
            outcome.executions,
            outcome.findings.len()
        );
        outcome.findings.iter().for_each(|finding| ouroboros::say!("{finding}"));
    }
    ouroboros::say!(
        "fuzz: {:<14} {executions:>9} executions  {findings:>3} findings (seed {seed})",
        "in all"
    );
    ExitCode::from(u8::from(findings > 0))
}
