//! Faults on purpose, for tests and for drills: `--inject KIND@STAGE,REPLICA:STEP[:ACTION]`. Off
//! unless asked for.
//!
//! `?` stands for a stage, replica or step that is drawn from the run's seed.

use std::fmt;
use std::str::FromStr;

use crate::grid::{Grid, Place};
use crate::random::{injection, unit};
use crate::schedule::{Action, Op};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A panic in the program.
    Panic,
    /// The process is killed, as by SIGKILL.
    Crash,
    /// The process ends by itself, without a word.
    Exit,
    /// The place stands still.
    Hang,
    /// From then on every forward and backward takes longer by [`SLOW_MS`].
    Slow,
    /// A weight becomes not-a-number.
    Nan,
    /// The place sends a message that claims to be another.
    CorruptMessage,
    /// A message is not sent.
    DropMessage,
    /// The next save finds no room.
    DiskFull,
    /// A bit of the place's weights changes after the update of the step.
    AlterWeights,
    /// The same of its copy of the tied table.
    AlterTable,
}

/// Milliseconds.
pub const SLOW_MS: u64 = 200;

impl Fault {
    const WORDS: [(&'static str, Fault); 11] = [
        ("panic", Fault::Panic),
        ("crash", Fault::Crash),
        ("exit", Fault::Exit),
        ("hang", Fault::Hang),
        ("slow", Fault::Slow),
        ("nan", Fault::Nan),
        ("corrupt-message", Fault::CorruptMessage),
        ("drop-message", Fault::DropMessage),
        ("disk-full", Fault::DiskFull),
        ("alter-weights", Fault::AlterWeights),
        ("alter-table", Fault::AlterTable),
    ];

    fn word(self) -> &'static str {
        Fault::WORDS.iter().find(|(_, fault)| *fault == self).map_or("", |(word, _)| word)
    }
}

/// One fault at one place: at the first action of a step, or at the first of a kind; some faults
/// have a moment of their own, as a message that is to be sent. What is none is to be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    pub fault: Fault,
    pub stage: Option<usize>,
    pub replica: Option<usize>,
    pub step: Option<usize>,
    pub op: Option<Op>,
}

impl Injection {
    /// The same with everything drawn that is to be.
    pub fn drawn(self, grid: Grid, steps: usize, seed: u64) -> Injection {
        let mut draw = injection(seed);
        let mut of = |n: usize| (unit(&mut draw) * n as f64) as usize;
        let (stage, replica, step) = (of(grid.stages), of(grid.replicas), of(steps));
        Injection {
            stage: self.stage.or(Some(stage)),
            replica: self.replica.or(Some(replica)),
            step: self.step.or(Some(step)),
            ..self
        }
    }

    /// Whether this fault comes with an action of a place.
    pub fn hits(&self, fault: Fault, place: Place, action: &Action) -> bool {
        let at = match fault {
            Fault::Slow => self.step <= Some(action.step),
            Fault::DiskFull => true,
            _ => self.step == Some(action.step),
        };

        let op = match (self.op, fault) {
            (Some(op), _) => op == action.op,
            (None, Fault::Hang | Fault::Nan) => action.op == Op::Forward,
            (None, Fault::Slow) => matches!(action.op, Op::Forward | Op::Backward),
            (None, _) => true,
        };

        self.fault == fault
            && (self.stage, self.replica) == (Some(place.stage), Some(place.replica))
            && at
            && op
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |n: Option<usize>| n.map_or("?".to_owned(), |n| n.to_string());
        write!(
            f,
            "{}@{},{}:{}",
            self.fault.word(),
            number(self.stage),
            number(self.replica),
            number(self.step)
        )?;

        self.op.map_or(Ok(()), |op| write!(f, ":{}", op.code()))
    }
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Injection, String> {
        let wrong = || {
            let words: Vec<&str> = Fault::WORDS.iter().map(|(word, _)| *word).collect();
            format!(
                "`{text}` is not a fault; write KIND@STAGE,REPLICA:STEP[:ACTION] with KIND {}, ACTION as in the action \
                 lists (F, B, SA, S, ...), ? for a number to be drawn",
                words.join("|")
            )
        };

        let number = |n: &str| match n {
            "?" => Ok(None),
            _ => n.parse::<usize>().map(Some).map_err(|_| wrong()),
        };

        let (kind, rest) = text.split_once('@').ok_or_else(wrong)?;
        let fault = Fault::WORDS
            .iter()
            .find(|(word, _)| *word == kind)
            .map(|(_, fault)| *fault)
            .ok_or_else(wrong)?;
        let (place, moment) = rest.split_once(':').ok_or_else(wrong)?;
        let (stage, replica) = place.split_once(',').ok_or_else(wrong)?;
        let (step, op) = match moment.split_once(':') {
            Some((step, code)) => (step, Some(Op::of_code(code).ok_or_else(wrong)?)),
            None => (moment, None),
        };

        Ok(Injection {
            fault,
            stage: number(stage)?,
            replica: number(replica)?,
            step: number(step)?,
            op,
        })
    }
}

/// Ends this process as the out-of-memory killer or a failing node would.
pub fn crash() -> ! {
    let id = std::process::id().to_string();
    let _ = std::process::Command::new("kill").args(["-KILL", &id]).status();
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_read() {
        for text in ["panic@1,0:7", "hang@?,?:?", "slow@0,1:3:B", "drop-message@2,0:?:SA"] {
            assert_eq!(text.parse::<Injection>().unwrap().to_string(), text);
        }
        for wrong in
            ["panic", "panic@1:7", "fire@1,0:7", "panic@1,0", "panic@1,0:x", "panic@1,0:7:Q"]
        {
            assert!(wrong.parse::<Injection>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_drawn_is_on_the_grid_and_the_same_for_a_seed() {
        let drawn =
            |seed| "hang@?,1:?".parse::<Injection>().unwrap().drawn(Grid::line(3, 2), 9, seed);
        assert_eq!(drawn(1), drawn(1));
        let all: Vec<Injection> = (0..50).map(drawn).collect();
        assert!(all.iter().all(|i| i.stage < Some(3) && i.replica == Some(1) && i.step < Some(9)));
        assert!(
            all.iter().any(|i| i.stage != all[0].stage)
                && all.iter().any(|i| i.step != all[0].step)
        );
    }
}
