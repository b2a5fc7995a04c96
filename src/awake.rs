//! Time in which this process ran: one that is suspended (Ctrl-Z, a frozen virtual machine, a
//! laptop that sleeps) and continued has not been silent, nor slow, meanwhile.
//!
//! A thread looks at the monotonic clock a few times a second. Where its last look was long ago,
//! the process did not run, and the time since then is lost; whoever asks first finds that out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Once};
use std::time::{Duration, Instant};

/// Between two looks.
const TICK: Duration = Duration::from_millis(200);

/// Since the last look the process did not run if that was so long ago: a busy machine may keep a
/// thread waiting for less.
const GAP: Duration = Duration::from_secs(1);

static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

static CLOCK: Clock = Clock { looked: AtomicU64::new(0), lost: AtomicU64::new(0) };

/// A moment of the time in which this process ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Awake(Duration);

impl Awake {
    pub fn now() -> Awake {
        start();
        Awake(CLOCK.ran(ORIGIN.elapsed()))
    }

    /// What has run since then.
    pub fn elapsed(self) -> Duration {
        Awake::now().since(self)
    }

    /// What has run from an earlier moment to this one.
    pub fn since(self, earlier: Awake) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Nanoseconds since the origin.
struct Clock {
    /// When the last look was.
    looked: AtomicU64,
    /// What is lost of the time since then.
    lost: AtomicU64,
}

impl Clock {
    /// Looks: how much of the time since the origin, which was `now` ago, the process ran.
    fn ran(&self, now: Duration) -> Duration {
        let now = now.as_nanos() as u64;
        let before = self.looked.fetch_max(now, Ordering::AcqRel);

        let unseen = now.saturating_sub(before);
        if unseen > GAP.as_nanos() as u64 {
            self.lost.fetch_add(unseen, Ordering::AcqRel);
        }
        Duration::from_nanos(now.max(before).saturating_sub(self.lost.load(Ordering::Acquire)))
    }
}

/// Starts the thread that looks.
fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        CLOCK.ran(ORIGIN.elapsed());
        let look = || {
            loop {
                std::thread::sleep(TICK);
                CLOCK.ran(ORIGIN.elapsed());
            }
        };

        if let Err(error) = std::thread::Builder::new().name("awake".into()).spawn(look) {
            tracing::warn!(%error, "no thread that tells a suspended process from a silent one");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_nobody_has_seen_is_lost() {
        let clock = Clock { looked: AtomicU64::new(0), lost: AtomicU64::new(0) };
        let ran = |ms: u64| clock.ran(Duration::from_millis(ms)).as_millis();
        assert_eq!([ran(200), ran(900), ran(1900)], [200, 900, 1900]);
        // Suspended for an hour.
        assert_eq!([ran(3_601_900), ran(3_602_000)], [1900, 2000]);
        // A look that comes late.
        assert_eq!(ran(3_601_950), 2000);
    }
}
