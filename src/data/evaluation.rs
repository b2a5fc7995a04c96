//! What an evaluation reads: every token of the held-out text but the first is a target exactly
//! once, whatever the grid.
//!
//! ```text
//! windows    row i has the targets iT + 1 .. (i + 1) T; the last one as many as are left
//! streams    of N - 1 = B L + remainder targets row b has those from bL + 1 to (b + 1) L, T a segment, and the last row the
//!            remainder too
//! ```
//!
//! Rows are filled up to T tokens with targets that count nothing.

use std::ops::Range;

use tch::Tensor;

use super::{Batch, Order, Shape, Tokens};
use crate::error::Result;

/// A target that counts nothing: what libtorch leaves out of a cross-entropy.
pub const UNCOUNTED: i64 = -100;

/// How a held-out text is evaluated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    pub order: Order,
    /// Streams, all replicas together, and T.
    pub shape: Shape,
    /// Targets that there are.
    targets: usize,
    /// Of windows: targets that count; of streams: segments that are read.
    wanted: usize,
}

impl Evaluation {
    /// Of a text, or of its beginning with about `limit` targets: exactly so many of windows, whole
    /// segments of streams.
    pub fn new(text: &Tokens, order: Order, shape: Shape, limit: Option<usize>) -> Evaluation {
        let targets = text.len().saturating_sub(1);
        let wanted = match order {
            Order::Shuffled => targets.min(limit.unwrap_or(usize::MAX)),
            Order::Streams => {
                let longest = targets / shape.rows + targets % shape.rows;
                let limited =
                    limit.map_or(usize::MAX, |limit| limit.div_ceil(shape.rows * shape.sequence));
                longest.div_ceil(shape.sequence).min(limited)
            }
        };
        Evaluation { order, shape, targets, wanted }
    }

    /// Windows, or streams.
    pub fn rows(&self) -> usize {
        match self.order {
            Order::Shuffled => self.wanted.div_ceil(self.shape.sequence),
            Order::Streams => self.shape.rows,
        }
    }

    /// Segments of a stream; a window is alone.
    pub fn segments(&self) -> usize {
        match self.order {
            Order::Shuffled => 1,
            Order::Streams => self.wanted,
        }
    }

    /// Targets that count, of all rows and segments.
    pub fn scored(&self) -> usize {
        let of = |segment| (0..self.rows()).map(move |row| self.place(row, segment).len());
        match self.order {
            Order::Shuffled => self.wanted,
            Order::Streams => (0..self.segments()).flat_map(of).sum(),
        }
    }

    /// The tokens of a row's segment whose followers are its targets; none where the row has ended.
    fn place(&self, row: usize, segment: usize) -> Range<usize> {
        let Shape { rows, sequence } = self.shape;
        // The last replica may have more rows than are left.
        if row >= self.rows() {
            return 0..0;
        }

        let (start, end) = match self.order {
            Order::Shuffled => (row * sequence, self.wanted),
            Order::Streams => {
                let length = self.targets / rows;
                let end = if row + 1 == rows { self.targets } else { (row + 1) * length };
                (row * length + segment * sequence, end)
            }
        };

        start.min(end)..(start + sequence).min(end)
    }

    /// Windows, or streams at a segment.
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error) about a token that the vocabulary does not have.
    pub fn batch(
        &self,
        text: &Tokens,
        vocabulary: usize,
        rows: Range<usize>,
        segment: usize,
    ) -> Result<Batch> {
        let (count, sequence) = (rows.len(), self.shape.sequence);
        let mut tokens = vec![0; count * sequence];
        let mut targets = vec![UNCOUNTED; count * sequence];
        let (mut scored, mut read) = (0, Vec::with_capacity(sequence + 1));

        for (i, row) in rows.enumerate() {
            let place = self.place(row, segment);
            if place.is_empty() {
                continue;
            }

            read.clear();
            text.read(place.start, place.len() + 1, &mut read);
            text.check(place.start, &read, vocabulary)?;
            let start = i * sequence;
            tokens[start..start + place.len()].copy_from_slice(&read[..place.len()]);
            targets[start..start + place.len()].copy_from_slice(&read[1..]);
            scored += place.len();
        }

        let shape = [count as i64, sequence as i64];
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape);
        Ok(Batch { tokens: tensor(&tokens), targets: tensor(&targets), counted: scored })
    }
}

impl Evaluation {
    /// Where in each row each token's document begins: [rows, T], int64. What fills a row up is a
    /// document of its own.
    pub fn documents(&self, text: &Tokens, rows: Range<usize>, segment: usize) -> Tensor {
        let (count, sequence) = (rows.len(), self.shape.sequence);
        let mut starts = Vec::with_capacity(count * sequence);
        for row in rows {
            let place = self.place(row, segment);
            let end = starts.len() + sequence;
            text.document_starts(place.start, place.len(), &mut starts);
            starts.resize(end, place.len() as i64);
        }
        Tensor::from_slice(&starts).view([count as i64, sequence as i64])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every target of a text once, in every order and shape, cut into replicas or not.
    #[test]
    fn every_token_is_scored_once() {
        for (length, rows, sequence, order) in [
            (1003, 4, 16, Order::Shuffled),
            (1003, 4, 16, Order::Streams),
            (1003, 7, 16, Order::Streams),
            (20, 6, 8, Order::Streams),
            (17, 3, 16, Order::Shuffled),
            (5, 9, 16, Order::Streams),
            (2, 1, 16, Order::Shuffled),
            (64, 1, 7, Order::Streams),
        ] {
            let text = Tokens::of_ids(&(0..length as u32).collect::<Vec<_>>(), 1 << 16);
            let evaluation = Evaluation::new(&text, order, Shape { rows, sequence }, None);
            let mut seen = vec![0; length];
            let mut counted = 0;
            for segment in 0..evaluation.segments() {
                // More rows than there are, as the last replica may have.
                let batch = evaluation.batch(&text, 1 << 16, 0..evaluation.rows() + 2, segment);
                let batch = batch.unwrap();
                let values = |tensor: &Tensor| Vec::<i64>::try_from(tensor.reshape([-1])).unwrap();
                for (token, target) in values(&batch.tokens).into_iter().zip(values(&batch.targets))
                {
                    if target != UNCOUNTED {
                        assert_eq!(target, token + 1);
                        seen[target as usize] += 1;
                    }
                }
                counted += batch.counted;
            }
            assert!(
                seen[0] == 0 && seen[1..].iter().all(|times| *times == 1),
                "{length} {rows} {order:?}: {seen:?}"
            );
            assert_eq!((counted, evaluation.scored()), (length - 1, length - 1));
        }
    }

    #[test]
    fn a_limit_is_heeded() {
        let text = Tokens::of_ids(&[1; 1003], 300);
        let of = |order, limit| {
            Evaluation::new(&text, order, Shape { rows: 4, sequence: 16 }, Some(limit))
        };
        let windows = of(Order::Shuffled, 100);
        assert_eq!((windows.rows(), windows.scored()), (7, 100));
        let streams = of(Order::Streams, 100);
        assert_eq!((streams.segments(), streams.scored()), (2, 128));
        assert_eq!(of(Order::Streams, 5000).scored(), 1002);
    }
}
