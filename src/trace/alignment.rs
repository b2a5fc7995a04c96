//! How far the clocks of the hosts are apart.
//!
//! ```text
//! rank 0   asked at a ---.                         .---> answered at b       (rank 0's clock)
//!                         \                       /
//! rank r                   '--- its clock says c '
//! ```
//!
//! c was some moment between a and b, so the clocks are c - (a + b) / 2 apart, within (b - a) / 2:
//! the shortest of many questions says most. What it says gets worse with time, since clocks drift.

use super::{ClockName, Moment};

/// What is to be taken from a rank's moments, nanoseconds, and by how much that may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offset {
    pub ahead: i64,
    pub error: u64,
}

/// How fast two clocks may drift apart: quartz is within 50 millionths, and may be slewed.
const DRIFT: f64 = 100e-6;

/// The answers of all ranks.
#[derive(Debug, Default)]
pub struct Alignment {
    asked: Vec<Moment>,
    /// Of each rank the best one, and when it was found.
    best: Vec<Option<(Offset, Moment)>>,
    answers: Vec<usize>,
}

impl Alignment {
    /// Of so many ranks.
    pub fn new(ranks: usize) -> Alignment {
        Alignment { asked: Vec::new(), best: vec![None; ranks], answers: vec![0; ranks] }
    }

    /// The number of the next question, which is asked now.
    pub fn ask(&mut self) -> u64 {
        self.asked.push(Moment::now());
        self.asked.len() as u64 - 1
    }

    /// A rank has answered question `number`, when its clock said `theirs`.
    pub fn answer(&mut self, rank: usize, number: u64, theirs: Moment, now: Moment) {
        let Some(asked) = self.asked.get(number as usize).copied() else { return };
        let half = now.since(asked).div_ceil(2);
        let offset = Offset { ahead: theirs.0 as i64 - (asked.0 + half) as i64, error: half };
        self.answers[rank] += 1;
        if self.best[rank].is_none_or(|best| offset.error < aged(best, now).error) {
            self.best[rank] = Some((offset, now));
        }
    }

    /// The fewest answers of any rank.
    pub fn answers(&self) -> usize {
        self.answers.iter().copied().min().unwrap_or(0)
    }

    /// How many questions were asked.
    pub fn questions(&self) -> usize {
        self.asked.len()
    }

    /// Of a rank whose clock has a name, as far as it is known now; none if it has never answered.
    pub fn offset(&self, rank: usize, clock: &ClockName, now: Moment) -> Option<Offset> {
        match *clock == ClockName::own() {
            true => Some(Offset::default()),
            false => self.best[rank].map(|best| aged(best, now)),
        }
    }
}

/// What an offset is worth later.
fn aged((offset, found): (Offset, Moment), now: Moment) -> Offset {
    let drift = (now.since(found) as f64 * DRIFT) as u64;
    Offset { error: offset.error + drift, ..offset }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_question_says_most() {
        let mut alignment = Alignment::new(2);
        let far: ClockName = serde_json::from_str("\"elsewhere\"").unwrap();
        let (first, second) = (alignment.ask(), alignment.ask());
        let at = alignment.asked.clone();
        assert_eq!(alignment.offset(1, &far, at[0]), None);

        // Their clock is 5 s ahead; the first answer took 3 ms, the second 1 ms, most of it back.
        let theirs = |asked: Moment, after: u64| Moment(asked.0 + 5_000_000_000 + after);
        alignment.answer(1, first, theirs(at[0], 500_000), Moment(at[0].0 + 3_000_000));
        alignment.answer(1, second, theirs(at[1], 100_000), Moment(at[1].0 + 1_000_000));
        alignment.answer(1, 7, Moment(0), Moment(0));
        let now = Moment(at[1].0 + 1_000_000);
        let found = alignment.offset(1, &far, now).unwrap();
        assert_eq!(found, Offset { ahead: 4_999_600_000, error: 500_000 });
        assert!(found.ahead.abs_diff(5_000_000_000) <= found.error);
        let own = alignment.offset(0, &ClockName::own(), now);
        assert_eq!((alignment.answers(), own), (0, Some(Offset::default())));

        // A minute later it may be off by 6 ms more, and a worse answer is the better one.
        let later = Moment(now.0 + 60_000_000_000);
        assert_eq!(alignment.offset(1, &far, later).unwrap().error, 6_500_000);
        alignment.asked[0] = later;
        let answered = Moment(later.0 + 4_000_000);
        alignment.answer(1, first, theirs(later, 0), answered);
        assert_eq!(alignment.offset(1, &far, answered).unwrap().error, 2_000_000);
    }
}
