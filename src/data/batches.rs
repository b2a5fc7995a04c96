//! What a step reads of the text: a pure function of (seed, step), whatever the grid.

use std::ops::Range;
use std::sync::Arc;

use tch::Tensor;

use super::{Corpus, Evaluation, Order, Tokens};
use crate::error::Result;
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
/// fall at the same places. Of several texts every row takes the next window of one ([`Mixture`](super::Mixture)).
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
    ///
    /// # Errors
    /// [`Error::Data`](crate::error::Error) about a token that the vocabulary does not have.
    pub fn train(&self, step: usize, rows: Range<usize>) -> Result<Batch> {
        let sequence = self.reading.train.sequence;
        let count = rows.len();
        let mut tokens: Vec<i64> = Vec::with_capacity(count * sequence);
        let mut targets = tokens.clone();
        let mut window: Vec<i64> = Vec::with_capacity(sequence + 1);
        for (source, start) in self.starts(step, rows) {
            let text = &self.corpus.sources[source].tokens;
            window.clear();
            text.read(start, sequence + 1, &mut window);
            text.check(start, &window, self.corpus.vocabulary.len())?;
            tokens.extend_from_slice(&window[..sequence]);
            targets.extend_from_slice(&window[1..]);
        }

        let shape = [count as i64, sequence as i64];
        let counted = targets.len();
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape);
        Ok(Batch { tokens: tensor(&tokens), targets: tensor(&targets), counted })
    }

    /// Where the given rows of the global batch of `step` begin: the number of the source, and a
    /// place in it, in tokens.
    pub fn starts(&self, step: usize, rows: Range<usize>) -> Vec<(usize, usize)> {
        let train = self.reading.train;
        match self.reading.order {
            Order::Shuffled => {
                let first = step * train.rows;
                let rows = self.corpus.mixture.rows(first + rows.start..first + rows.end);
                rows.into_iter().map(|(source, n)| (source, self.window(source, n))).collect()
            }
            Order::Streams => {
                let text = &self.corpus.sources[0].tokens;
                let segment = step % train.segments(text);
                rows.map(|row| (0, train.start(text, row, segment))).collect()
            }
        }
    }

    /// Where in the given rows of the global batch of `step` each token's document begins: [rows,
    /// T], int64.
    pub fn documents(&self, step: usize, rows: Range<usize>) -> Tensor {
        let (count, sequence) = (rows.len() as i64, self.reading.train.sequence);
        let mut starts = Vec::with_capacity(count as usize * sequence);
        for (source, start) in self.starts(step, rows) {
            self.corpus.sources[source].tokens.document_starts(start, sequence, &mut starts);
        }
        Tensor::from_slice(&starts).view([count, sequence as i64])
    }

    /// The same of rows of the held-out text.
    pub fn held_out_documents(&self, rows: Range<usize>, segment: usize) -> Tensor {
        let text = &self.corpus.held_out.tokens;
        self.reading.evaluation(text).documents(text, rows, segment)
    }

    /// Whether the rows of `step` have nothing to do with those of the step before.
    pub fn restarts(&self, step: usize) -> bool {
        match self.reading.order {
            Order::Shuffled => true,
            Order::Streams => {
                let text = &self.corpus.sources[0].tokens;
                step.is_multiple_of(self.reading.train.segments(text))
            }
        }
    }

    /// Rows of the held-out text: the given windows, or the given streams at a segment.
    ///
    /// # Errors
    /// As [`Batches::train`].
    pub fn held_out(&self, rows: Range<usize>, segment: usize) -> Result<Batch> {
        let text = &self.corpus.held_out.tokens;
        let vocabulary = self.corpus.vocabulary.len();
        self.reading.evaluation(text).batch(text, vocabulary, rows, segment)
    }

    /// Where the `number`-th window that the run takes of a source starts.
    fn window(&self, source: usize, number: usize) -> usize {
        let text = &self.corpus.sources[source].tokens;
        let (sequence, fit) = (self.reading.train.sequence, self.reading.train.windows(text));
        let count = self.reading.train.epoch_windows(text);
        let phases = if fit > 1 { sequence } else { 1 };
        let (epoch, position) = (number / count, number % count);
        let (key, phase) = random::order(self.reading.seed, source, epoch as u64, phases);
        random::permute(count as u64, key, position as u64) as usize * sequence + phase
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
        let held_out = crate::data::HeldOutText::new(train.clone(), None);
        let source =
            crate::data::Source { name: "a".into(), tokens: train, weight: 1.0, epochs: None };
        let corpus = Corpus::new(vec![source], held_out, vocabulary, sequence);
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
        let batch = batches(1000, 16, 4).train(3, 0..4).unwrap();
        assert_eq!(batch.tokens.size(), [4, 16]);
        assert_eq!(batch.tokens.narrow(1, 1, 15), batch.targets.narrow(1, 0, 15));
    }

    #[test]
    fn rows_do_not_depend_on_how_they_are_cut() {
        let batches = batches(1000, 16, 6);
        let whole = batches.train(5, 0..6).unwrap().tokens;
        for (start, length) in [(0, 3), (3, 3), (2, 1), (4, 2)] {
            let part = batches.train(5, start..start + length).unwrap().tokens;
            assert_eq!(part, whole.narrow(0, start as i64, length as i64));
        }
    }

    #[test]
    fn an_epoch_reads_every_window_once_and_the_next_in_another_order() {
        let batches = batches(1 + 16 * 21, 16, 4);
        let epoch =
            |n: usize| (20 * n..20 * (n + 1)).map(|i| batches.window(0, i)).collect::<Vec<_>>();
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

    /// A sample at the start sees not every token: those that are read are looked at.
    #[test]
    fn a_token_that_the_vocabulary_does_not_have_is_told() {
        let mut batches = batches(1000, 16, 4);
        assert!(batches.train(0, 0..4).is_ok());
        let corpus = Arc::get_mut(&mut batches.corpus).unwrap();
        corpus.vocabulary = crate::data::Vocabulary::ids(240);
        let found = (0..20).find_map(|step| batches.train(step, 0..4).err()).unwrap();
        let found = found.to_string();
        assert!(found.contains(" is 240, and the vocabulary has 240"), "{found}");
        assert!(batches.held_out(0..60, 0).is_err());
    }

    #[test]
    fn a_text_of_one_window_can_be_read() {
        let batches = batches(17, 16, 2);
        assert_eq!(batches.train(9, 0..2).unwrap().tokens.size(), [2, 16]);
        assert_eq!(batches.reading.evaluation(&batches.corpus.held_out.tokens).rows(), 1);
    }

    #[test]
    fn streams_go_on_where_they_were() {
        let mut batches = batches(1 + 3 * 70, 16, 3);
        batches.reading.order = Order::Streams;
        // Parts of 70 tokens hold 4 segments of 16.
        for step in 0..9 {
            let of = |step| batches.train(step, 0..3).unwrap();
            let (now, next) = (of(step), of(step + 1));
            let goes_on = now.targets.select(1, 15) == next.tokens.select(1, 0);
            assert_eq!(goes_on, !batches.restarts(step + 1), "{step}");
            assert_eq!(batches.restarts(step), step % 4 == 0);
        }
        let first: Vec<i64> =
            Vec::try_from(batches.train(4, 0..3).unwrap().tokens.select(1, 0)).unwrap();
        assert_eq!(first, [0, 70, 140]);
        assert_eq!(
            batches.train(2, 1..2).unwrap().tokens,
            batches.train(2, 0..3).unwrap().tokens.narrow(0, 1, 1)
        );
    }
}
