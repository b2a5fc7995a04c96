//! How long the progress engine sleeps between two looks at MPI. It often shares the core of the
//! thread that computes, so a look that finds nothing is time lost there; one that comes late holds
//! up whoever waits.

use std::time::Duration;

/// The first pause.
pub const SHORTEST_SLEEP: Duration = Duration::from_micros(20);
/// While the compute thread waits: rounds without progress before the progress engine begins to
/// sleep, and how long it sleeps at most.
const ROUNDS_AWAKE: u32 = 20;
const LONGEST_SLEEP: Duration = Duration::from_micros(200);
/// While it computes: every look takes it some 40 microseconds of the core (sleep, alarm and what
/// is pushed out of its cache).
const ROUNDS_AWAKE_UNASKED: u32 = 2;
/// With something under way: parts of an all-reduce, which may be many, cross at such a pace.
const LONGEST_SLEEP_UNDER_WAY: Duration = Duration::from_millis(1);
/// With nothing but messages, reports and controls to come, which are early, or somebody waits.
const LONGEST_SLEEP_UNASKED: Duration = Duration::from_millis(8);

/// How long to sleep after so many rounds without progress: `asked` if a thread waits for
/// something, `under_way` if something moves only while the progress engine looks.
pub fn pause(idle: u32, asked: bool, under_way: bool) -> Duration {
    if asked {
        return SHORTEST_SLEEP.saturating_mul(idle.saturating_sub(ROUNDS_AWAKE)).min(LONGEST_SLEEP);
    }
    let longest = if under_way { LONGEST_SLEEP_UNDER_WAY } else { LONGEST_SLEEP_UNASKED };
    match idle.checked_sub(ROUNDS_AWAKE_UNASKED + 1) {
        None => Duration::ZERO,
        Some(times) => SHORTEST_SLEEP.saturating_mul(2u32.saturating_pow(times)).min(longest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_looks_up_rarely_unless_somebody_waits() {
        // Looks within half a second in which nothing moves.
        let looks = |asked, under_way| {
            let (mut slept, mut looks) = (Duration::ZERO, 0);
            while slept < Duration::from_millis(500) {
                slept += pause(looks, asked, under_way);
                looks += 1;
            }
            looks
        };
        assert!((60..=80).contains(&looks(false, false)), "{}", looks(false, false));
        assert!((500..=520).contains(&looks(false, true)), "{}", looks(false, true));
        assert!((2500..=2600).contains(&looks(true, false)), "{}", looks(true, false));
        // It never sleeps longer than the time that it has slept already and a little: whatever
        // comes is seen soon.
        let mut slept = Duration::ZERO;
        for idle in 0..40 {
            let pause = pause(idle, false, false);
            assert!(pause <= slept + SHORTEST_SLEEP);
            slept += pause;
        }
        assert_eq!(pause(u32::MAX, false, false), LONGEST_SLEEP_UNASKED);
    }
}
