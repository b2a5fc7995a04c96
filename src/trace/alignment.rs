//! How far the clocks of the hosts are apart.
//!
//! ```text
//! rank 0   asked at a ---.                         .---> answered at b       (rank 0's clock)
//!                         \                       /
//! rank r                   '--- its clock says c '
//! ```
//!
//! c was some moment between a and b, so the clocks are c - (a + b) / 2 apart, within (b - a) / 2:
//! the shortest of many questions says most.

use super::{ClockName, Moment};

/// What is to be taken from a rank's moments, nanoseconds, and by how much that may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offset {
    pub ahead: i64,
    pub error: u64,
}

/// The answers of all ranks.
#[derive(Debug, Default)]
pub struct Alignment {
    asked: Vec<Moment>,
    best: Vec<Option<Offset>>,
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
        if self.best[rank].is_none_or(|best| offset.error < best.error) {
            self.best[rank] = Some(offset);
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

    /// Of a rank whose clock has a name; none if it has never answered.
    pub fn offset(&self, rank: usize, clock: &ClockName) -> Option<Offset> {
        if *clock == ClockName::own() { Some(Offset::default()) } else { self.best[rank] }
    }
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
        assert_eq!(alignment.offset(1, &far), None);

        // Their clock is 5 s ahead; the first answer took 3 ms, the second 1 ms, most of it back.
        let theirs = |asked: Moment, after: u64| Moment(asked.0 + 5_000_000_000 + after);
        alignment.answer(1, first, theirs(at[0], 500_000), Moment(at[0].0 + 3_000_000));
        alignment.answer(1, second, theirs(at[1], 100_000), Moment(at[1].0 + 1_000_000));
        alignment.answer(1, 7, Moment(0), Moment(0));
        let found = alignment.offset(1, &far).unwrap();
        assert_eq!(found, Offset { ahead: 4_999_600_000, error: 500_000 });
        assert!(found.ahead.abs_diff(5_000_000_000) <= found.error);
        assert_eq!(
            (alignment.answers(), alignment.offset(0, &ClockName::own())),
            (0, Some(Offset::default()))
        );
    }
}
