//! Moments of a host's monotonic clock, as processes of one host share it.

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
    /// That of this process: by the boot of its kernel, and the namespace that may move its clock
    /// (time_namespaces(7)).
    pub fn own() -> ClockName {
        let boot = files::read_text("/proc/sys/kernel/random/boot_id".as_ref()).unwrap_or_default();
        let space = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
        ClockName(format!("{} {}", boot.trim(), space.display()))
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
