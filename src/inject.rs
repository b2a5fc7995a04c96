//! Faults on purpose, for tests and for drills: `--inject KIND@STAGE,REPLICA:STEP`. Off unless asked for.

use std::str::FromStr;

use crate::grid::Place;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A panic in the program.
    Panic,
    /// The process is killed, as by SIGKILL.
    Crash,
    /// The place sends a message that claims to be another.
    CorruptMessage,
    /// A bit of the place's copy of the tied table changes after the update of the step.
    AlterTable,
}

/// One fault at one place, at the first action of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injection {
    pub fault: Fault,
    pub place: Place,
    pub step: usize,
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Injection, String> {
        let wrong =
            || format!("`{text}` is not a fault; write panic|crash|corrupt-message|alter-table@STAGE,REPLICA:STEP");
        let (kind, rest) = text.split_once('@').ok_or_else(wrong)?;
        let (place, step) = rest.split_once(':').ok_or_else(wrong)?;
        let (stage, replica) = place.split_once(',').ok_or_else(wrong)?;
        let number = |n: &str| n.parse::<usize>().map_err(|_| wrong());
        let fault = match kind {
            "panic" => Fault::Panic,
            "crash" => Fault::Crash,
            "corrupt-message" => Fault::CorruptMessage,
            "alter-table" => Fault::AlterTable,
            _ => return Err(wrong()),
        };
        let place = Place { stage: number(stage)?, replica: number(replica)? };
        Ok(Injection { fault, place, step: number(step)? })
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
        let place = Place { stage: 1, replica: 0 };
        assert_eq!("panic@1,0:7".parse(), Ok(Injection { fault: Fault::Panic, place, step: 7 }));
        for wrong in ["panic", "panic@1:7", "fire@1,0:7", "panic@1,0", "panic@1,0:x"] {
            assert!(wrong.parse::<Injection>().is_err(), "{wrong}");
        }
    }
}
