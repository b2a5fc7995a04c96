//! What a step reads of the text: a pure function of (seed, step), whatever the grid.

use std::ops::Range;
use std::sync::Arc;

use tch::Tensor;

use super::{Corpus, Evaluation, Order, Tokens};
use crate::random;

/// Rows of a step or of an evaluation, on the host.
#[derive(Debug)]
pub struct Batch {
    /// [rows, T], int64.
    pub tokens: Tensor,
    /// [rows, T], int64: the token that follows each.
    pub targets: Tensor,
    /// Targets that count: all, but at the ends of a held-out text.
    pub counted: usize,
}

/// The batches of a run.
///
/// **Windows**: the training text is cut into windows of T + 1 tokens that overlap by one; an epoch
/// shuffles them, and shifts their starts by a phase of its own, so that the cuts do not always
/// fall at the same places.
///
/// **Streams**: the text is cut into as many equal parts as a batch has rows; row b goes through
/// part b, T tokens a step. All rows come to their ends at the same step, and begin anew; what is
/// left of the parts is not read.
#[derive(Debug, Clone)]
pub struct Batches {
    corpus: Arc<Corpus>,
    reading: Reading,
}

/// How a run reads its corpus.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    pub seed: u64,
    pub order: Order,
    /// Of a training step of all replicas.
    pub train: Shape,
    /// Of an evaluation of all replicas; only streams have their number of rows in it.
    pub eval: Shape,
    /// Tokens of the held-out text that are scored, about; none: all.
    pub eval_tokens: Option<usize>,
}

/// Rows of a batch, and tokens of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub rows: usize,
    pub sequence: usize,
}

impl Shape {
    /// Steps until the streams of `text` end.
    pub fn segments(self, text: &Tokens) -> usize {
        text.len().saturating_sub(1) / self.rows / self.sequence
    }

    /// Where segment `number` of a stream starts.
    fn start(self, text: &Tokens, stream: usize, number: usize) -> usize {
        stream * ((text.len() - 1) / self.rows) + number * self.sequence
    }

    /// The windows of an epoch: one is given up for the phase, if there is one to spare.
    pub fn epoch_windows(self, text: &Tokens) -> usize {
        self.windows(text).saturating_sub(1).max(1)
    }

    /// How many windows of T tokens a text has.
    pub fn windows(self, text: &Tokens) -> usize {
        text.len().saturating_sub(1) / self.sequence
    }
}

impl Reading {
    /// How a held-out text is evaluated.
    pub fn evaluation(&self, text: &Tokens) -> Evaluation {
        Evaluation::new(text, self.order, self.eval, self.eval_tokens)
    }
}

impl Batches {
    /// The batches of a run over its corpus.
    pub fn new(corpus: Arc<Corpus>, reading: Reading) -> Batches {
        Batches { corpus, reading }
    }

    /// The given rows of the global batch of `step`.
    pub fn train(&self, step: usize, rows: Range<usize>) -> Batch {
        read(&self.corpus.train, self.reading.train.sequence, self.starts(step, rows).into_iter())
    }

    /// Where the given rows of the global batch of `step` begin in the text, in tokens.
    pub fn starts(&self, step: usize, rows: Range<usize>) -> Vec<usize> {
        let text = &self.corpus.train;
        let start = |row| match self.reading.order {
            Order::Shuffled => self.window(step * self.reading.train.rows + row),
            Order::Streams => {
                self.reading.train.start(text, row, step % self.reading.train.segments(text))
            }
        };
        rows.map(start).collect()
    }

    /// Whether the rows of `step` have nothing to do with those of the step before.
    pub fn restarts(&self, step: usize) -> bool {
        match self.reading.order {
            Order::Shuffled => true,
            Order::Streams => step.is_multiple_of(self.reading.train.segments(&self.corpus.train)),
        }
    }

    /// Rows of the held-out text: the given windows, or the given streams at a segment.
    pub fn held_out(&self, rows: Range<usize>, segment: usize) -> Batch {
        self.reading.evaluation(&self.corpus.held_out).batch(&self.corpus.held_out, rows, segment)
    }

    /// Where the `number`-th window of the run starts.
    fn window(&self, number: usize) -> usize {
        let (sequence, fit) =
            (self.reading.train.sequence, self.reading.train.windows(&self.corpus.train));
        let count = self.reading.train.epoch_windows(&self.corpus.train);
        let phases = if fit > 1 { sequence } else { 1 };
        let (epoch, position) = (number / count, number % count);
        let (key, phase) = random::order(self.reading.seed, epoch as u64, phases);
        random::permute(count as u64, key, position as u64) as usize * sequence + phase
    }
}

fn read(text: &Tokens, sequence: usize, starts: impl ExactSizeIterator<Item = usize>) -> Batch {
    let rows = starts.len() as i64;
    let mut window: Vec<i64> = Vec::with_capacity(sequence + 1);
    let mut tokens: Vec<i64> = Vec::with_capacity(rows as usize * sequence);
    let mut targets = tokens.clone();
    for start in starts {
        window.clear();
        text.read(start, sequence + 1, &mut window);
        tokens.extend_from_slice(&window[..sequence]);
        targets.extend_from_slice(&window[1..]);
    }

    let shape = [rows, sequence as i64];
    let counted = targets.len();
    Batch {
        tokens: Tensor::from_slice(&tokens).view(shape),
        targets: Tensor::from_slice(&targets).view(shape),
        counted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn batches(len: usize, sequence: usize, batch: usize) -> Batches {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let train = Tokens::of_bytes(bytes);
        let vocabulary = super::super::Vocabulary::bytes();
        let corpus = Corpus::new(train.clone(), train, vocabulary, None);
        let shape = Shape { rows: batch, sequence };
        let reading = Reading {
            seed: 7,
            order: Order::Shuffled,
            train: shape,
            eval: shape,
            eval_tokens: None,
        };
        Batches::new(Arc::new(corpus), reading)
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
        let epoch =
            |n: usize| (20 * n..20 * (n + 1)).map(|i| batches.window(i)).collect::<Vec<_>>();
        for n in 0..3 {
            let starts: BTreeSet<usize> = epoch(n).into_iter().collect();
            assert_eq!(starts.len(), 20);
            assert!(
                starts
                    .iter()
                    .all(|s| s % 16 == starts.first().unwrap() % 16 && s + 17 <= 1 + 16 * 21)
            );
        }
        assert_ne!(epoch(0), epoch(1));
    }

    #[test]
    fn a_text_of_one_window_can_be_read() {
        let batches = batches(17, 16, 2);
        assert_eq!(batches.train(9, 0..2).tokens.size(), [2, 16]);
        assert_eq!(batches.reading.evaluation(&batches.corpus.held_out).rows(), 1);
    }

    #[test]
    fn streams_go_on_where_they_were() {
        let mut batches = batches(1 + 3 * 70, 16, 3);
        batches.reading.order = Order::Streams;
        // Parts of 70 tokens hold 4 segments of 16.
        for step in 0..9 {
            let (now, next) = (batches.train(step, 0..3), batches.train(step + 1, 0..3));
            let goes_on = now.targets.select(1, 15) == next.tokens.select(1, 0);
            assert_eq!(goes_on, !batches.restarts(step + 1), "{step}");
            assert_eq!(batches.restarts(step), step % 4 == 0);
        }
        let first: Vec<i64> = Vec::try_from(batches.train(4, 0..3).tokens.select(1, 0)).unwrap();
        assert_eq!(first, [0, 70, 140]);
        assert_eq!(batches.train(2, 1..2).tokens, batches.train(2, 0..3).tokens.narrow(0, 1, 1));
    }
}
