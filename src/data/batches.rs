//! Which windows of the text a step reads: a pure function of (seed, step), whatever the grid.

use std::ops::Range;
use std::sync::Arc;

use tch::Tensor;

use super::{Corpus, Text};
use crate::random;

/// Rows of a step or of an evaluation.
#[derive(Debug)]
pub struct Batch {
    /// [rows, T], int64.
    pub tokens: Tensor,
    /// [rows, T], int64: the token that follows each.
    pub targets: Tensor,
}

/// The batches of a run.
///
/// The training text is cut into windows of T + 1 bytes that overlap by one; an epoch shuffles them, and shifts their
/// starts by a phase of its own, so that the cuts do not always fall at the same places.
#[derive(Debug, Clone)]
pub struct Batches {
    corpus: Arc<Corpus>,
    seed: u64,
    sequence: usize,
    batch: usize,
}

impl Batches {
    /// `batch` rows of `sequence` tokens a step.
    pub fn new(corpus: Arc<Corpus>, seed: u64, sequence: usize, batch: usize) -> Batches {
        Batches { corpus, seed, sequence, batch }
    }

    /// The given rows of the global batch of `step`.
    pub fn train(&self, step: usize, rows: Range<usize>) -> Batch {
        let starts = rows.map(|row| self.start(step * self.batch + row));
        windows(&self.corpus.train, self.sequence, starts)
    }

    /// Whether the rows of `step` have nothing to do with those of the step before.
    pub fn restarts(&self, _step: usize) -> bool {
        true
    }

    /// The given windows of the held-out text, which are not shuffled.
    pub fn held_out(&self, range: Range<usize>) -> Batch {
        held_out(&self.corpus.held_out, self.sequence, range)
    }

    /// Where the `number`-th window of the run starts.
    fn start(&self, number: usize) -> usize {
        let fit = (self.corpus.train.len() - 1) / self.sequence;
        // One window is given up for the phase, if there is one to spare.
        let (count, phases) = if fit > 1 { (fit - 1, self.sequence) } else { (1, 1) };
        let (epoch, position) = (number / count, number % count);
        let (key, phase) = random::order(self.seed, epoch as u64, phases);
        random::permute(count as u64, key, position as u64) as usize * self.sequence + phase
    }
}

/// How many windows of T tokens a held-out text has.
pub fn held_out_windows(text: &Text, sequence: usize) -> usize {
    (text.len() - 1) / sequence
}

/// The given windows of `text`, in order.
pub fn held_out(text: &Text, sequence: usize, range: Range<usize>) -> Batch {
    windows(text, sequence, range.map(|i| i * sequence))
}

fn windows(text: &Text, sequence: usize, starts: impl ExactSizeIterator<Item = usize>) -> Batch {
    let rows = starts.len() as i64;
    let mut window = vec![0u8; sequence + 1];
    let mut tokens: Vec<i64> = Vec::with_capacity(rows as usize * sequence);
    let mut targets = tokens.clone();
    for start in starts {
        text.read(start, &mut window);
        tokens.extend(window[..sequence].iter().map(|b| i64::from(*b)));
        targets.extend(window[1..].iter().map(|b| i64::from(*b)));
    }
    let shape = [rows, sequence as i64];
    Batch { tokens: Tensor::from_slice(&tokens).view(shape), targets: Tensor::from_slice(&targets).view(shape) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn batches(len: usize, sequence: usize, batch: usize) -> Batches {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let train = Text::from_bytes(Arc::from(bytes));
        let corpus = Corpus { held_out: train.clone(), train, floor: None };
        Batches::new(Arc::new(corpus), 7, sequence, batch)
    }

    #[test]
    fn targets_are_the_next_tokens() {
        let batch = batches(1000, 16, 4).train(3, 0..4);
        assert_eq!(batch.tokens.size(), [4, 16]);
        assert_eq!(batch.tokens.narrow(1, 1, 15), batch.targets.narrow(1, 0, 15));
    }

    #[test]
    fn rows_do_not_depend_on_how_they_are_cut() {
        let batches = batches(1000, 16, 6);
        let whole = batches.train(5, 0..6).tokens;
        for (start, length) in [(0, 3), (3, 3), (2, 1), (4, 2)] {
            let part = batches.train(5, start..start + length).tokens;
            assert_eq!(part, whole.narrow(0, start as i64, length as i64));
        }
    }

    #[test]
    fn an_epoch_reads_every_window_once_and_the_next_in_another_order() {
        let batches = batches(1 + 16 * 21, 16, 4);
        let epoch = |n: usize| (20 * n..20 * (n + 1)).map(|i| batches.start(i)).collect::<Vec<_>>();
        for n in 0..3 {
            let starts: BTreeSet<usize> = epoch(n).into_iter().collect();
            assert_eq!(starts.len(), 20);
            assert!(starts.iter().all(|s| s % 16 == starts.first().unwrap() % 16 && s + 17 <= 1 + 16 * 21));
        }
        assert_ne!(epoch(0), epoch(1));
    }

    #[test]
    fn a_text_of_one_window_can_be_read() {
        let batches = batches(17, 16, 2);
        assert_eq!(batches.train(9, 0..2).tokens.size(), [2, 16]);
        assert_eq!(held_out_windows(&batches.corpus.held_out, 16), 1);
    }
}
