//! Moments of a host's monotonic clock, as processes of one host share it.

use std::sync::LazyLock;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::files;

/// Nanoseconds of the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Moment(pub u64);

impl Moment {
    pub fn now() -> Moment {
        let now = clock_gettime(ClockId::Monotonic);
        Moment(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    /// Nanoseconds from an earlier moment to this one.
    pub fn since(self, earlier: Moment) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Which clock a process reads: two of one name read the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockName(String);

impl ClockName {
    /// That of this process, as it is found once: by the boot of its kernel, and the namespace that may move its clock
    /// (time_namespaces(7)).
    pub fn own() -> ClockName {
        static OWN: LazyLock<ClockName> = LazyLock::new(ClockName::found);
        OWN.clone()
    }

    fn found() -> ClockName {
        let boot = files::read_text("/proc/sys/kernel/random/boot_id".as_ref()).unwrap_or_default();
        let space = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
        // Where that cannot be read every process has a clock of its own.
        let boot = match boot.trim() {
            "" => format!("of process {} at {:?}", std::process::id(), Moment::now()),
            boot => boot.to_owned(),
        };
        ClockName(format!("{boot} {}", space.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_follow_each_other() {
        let first = Moment::now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let second = Moment::now();
        assert!(second.since(first) >= 2_000_000 && first.since(second) == 0);
        assert_eq!(ClockName::own(), ClockName::own());
    }
}
