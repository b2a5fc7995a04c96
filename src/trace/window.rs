//! The steps that are traced.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The steps from `from` on, before `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    pub from: usize,
    pub to: usize,
}

impl Window {
    /// The name of the trace in the run's folder.
    pub fn file(self) -> String {
        format!("trace-{}-{}.json.gz", self.from, self.to)
    }

    /// Whether a run from step `start` to `steps` has these steps. One that is resumed may have made
    /// them, or some: a batch job is given the same words every time.
    ///
    /// # Errors
    /// [`Error::Config`] about `--trace`.
    pub fn check(self, start: usize, steps: usize, resumed: bool) -> Result<()> {
        if (resumed || start <= self.from) && self.to <= steps {
            return Ok(());
        }

        let remedy = format!("the run makes the steps {start}..{steps}; take a part of them");
        Err(Error::config("--trace", self, remedy))
    }
}

impl Window {
    /// What of these steps is not made yet before step `start`.
    pub fn after(self, start: usize) -> Option<Window> {
        let rest = Window { from: self.from.max(start), ..self };
        (rest.from < rest.to).then_some(rest)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.from, self.to)
    }
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Window, String> {
        let wrong = || {
            "write two numbers of steps, as in 100..110: the first is traced, the second is not"
                .to_owned()
        };
        let (from, to) = text.split_once("..").ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse().map_err(|_| wrong());
        let window = Window { from: number(from)?, to: number(to)? };
        if window.from < window.to { Ok(window) } else { Err(wrong()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_typed_and_checked() {
        let window: Window = "3..5".parse().unwrap();
        assert_eq!(
            (window.to_string().as_str(), window.file().as_str()),
            ("3..5", "trace-3-5.json.gz")
        );
        for wrong in ["", "3", "3-5", "5..5", "5..3", "..5", "3..", "-1..3", "3..=5"] {
            assert!(wrong.parse::<Window>().unwrap_err().contains("100..110"), "{wrong}");
        }

        assert!(window.check(0, 5, false).is_ok() && window.check(3, 9, false).is_ok());
        assert!(window.check(4, 9, true).is_ok() && window.check(0, 4, true).is_err());
        assert_eq!(
            [3, 4, 5].map(|start| window.after(start)),
            [Some(window), Some(Window { from: 4, to: 5 }), None]
        );
        for (start, steps) in [(0, 4), (4, 9)] {
            let told = window.check(start, steps, false).unwrap_err().to_string();
            assert!(
                told.contains("--trace") && told.contains(&format!("{start}..{steps}")),
                "{told}"
            );
        }
    }
}
