//! Which source gives which row: a pure function of the row's number and the weights.
//!
//! Row after row goes to the source that is furthest behind its share: to the one with the least
//! (a + 1/2) / w of the a rows that it has given, as seats go to parties by Webster and
//! Sainte-Laguë. So a source has given w n of the first n rows to within about one, always. What it has
//! given after any number of rows is found without those before: of a threshold t every source has
//! floor(w t + 1/2), and but for a few rows that is the answer.
//!
//! A source that may be read so many times only is left out once it was; the others go on, from
//! then, by their weights: a phase ends and another begins.

use std::ops::Range;

use super::{Shape, Source};

/// Rows that sources give.
#[derive(Debug, Clone)]
pub struct Mixture {
    phases: Vec<Phase>,
    /// Rows that there are, where every source has an end.
    pub end: Option<usize>,
}

/// Rows from `start` on, until a source is used up.
#[derive(Debug, Clone)]
struct Phase {
    start: usize,
    /// Of the sources that are left: number, weight over the sum of these, rows given before.
    sources: Vec<(usize, f64, usize)>,
}

impl Mixture {
    /// Of sources that are read in windows of T tokens.
    pub fn new(sources: &[Source], sequence: usize) -> Mixture {
        let shape = Shape { rows: 1, sequence };
        let limits = sources.iter().map(|source| {
            let windows = shape.epoch_windows(&source.tokens);
            source.epochs.map(|epochs| epochs.saturating_mul(windows))
        });
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        Mixture::of(&weights, &limits.collect::<Vec<_>>())
    }

    /// Of weights, and of rows at most.
    fn of(weights: &[f64], limits: &[Option<usize>]) -> Mixture {
        let mut given = vec![0; weights.len()];
        let mut left: Vec<usize> = (0..weights.len()).collect();
        let (mut phases, mut start) = (Vec::new(), 0);
        loop {
            let sum: f64 = left.iter().map(|i| weights[*i]).sum();
            let sources = left.iter().map(|i| (*i, weights[*i] / sum, given[*i])).collect();
            let phase = Phase { start, sources };
            // The source that is used up first is the one whose last row comes first.
            let lasts = left.iter().enumerate().filter_map(|(place, i)| {
                let rows = limits[*i]? - given[*i];
                Some((phase.threshold(place, rows - 1), place, rows))
            });
            let first = lasts.min_by(|a, b| a.0.total_cmp(&b.0));
            let end = first.and_then(|(_, place, rows)| Some((place, phase.until(place, rows)?)));
            phases.push(phase);
            let Some((place, counts)) = end else { return Mixture { phases, end: None } };

            start += counts.iter().sum::<usize>();
            left.iter().zip(counts).for_each(|(i, count)| given[*i] += count);
            left.remove(place);
            if left.is_empty() {
                return Mixture { phases, end: Some(start) };
            }
        }
    }

    /// The sources of rows, and how many each gave before.
    pub fn rows(&self, numbers: Range<usize>) -> Vec<(usize, usize)> {
        let mut rows = Vec::with_capacity(numbers.len());
        let mut number = numbers.start;
        while number < numbers.end {
            let place = self.phases.partition_point(|phase| phase.start <= number) - 1;
            let phase = &self.phases[place];
            let end = self.phases.get(place + 1).map_or(usize::MAX, |next| next.start);
            let mut counts = phase.counts(number - phase.start);
            for _ in number..end.min(numbers.end) {
                let next = phase.next(&counts);
                let (source, _, given) = phase.sources[next];
                rows.push((source, given + counts[next]));
                counts[next] += 1;
            }
            number = end.min(numbers.end);
        }
        rows
    }

    /// What each of so many sources has given of the first `rows` rows.
    pub fn given(&self, rows: usize, sources: usize) -> Vec<usize> {
        let mut all = vec![0; sources];
        let place = self.phases.partition_point(|phase| phase.start < rows).max(1) - 1;
        let earlier = self.phases[..=place].iter();
        // What a source gave stays when it is left out.
        for (i, phase) in earlier.enumerate() {
            let end = if i == place { rows } else { self.phases[i + 1].start };
            let counts = phase.counts(end - phase.start);
            phase.sources.iter().zip(counts).for_each(|((s, _, given), n)| all[*s] = given + n);
        }
        all
    }
}

impl Phase {
    /// What the sources give of the first `rows` rows of the phase.
    fn counts(&self, rows: usize) -> Vec<usize> {
        if let [_] = self.sources[..] {
            return vec![rows];
        }

        // So many have been given for certain, rounding and all; the rest is added one by one.
        let threshold = rows as f64 - self.sources.len() as f64;
        let of =
            |(_, weight, _): &(usize, f64, usize)| (weight * threshold - 0.5).max(0.0) as usize;
        let mut counts: Vec<usize> = self.sources.iter().map(of).collect();
        let mut sum: usize = counts.iter().sum();
        while sum < rows {
            let next = self.next(&counts);
            counts[next] += 1;
            sum += 1;
        }
        counts
    }

    /// The source that is furthest behind.
    fn next(&self, counts: &[usize]) -> usize {
        let behind = |i: usize| self.threshold(i, counts[i]);
        (0..counts.len()).min_by(|a, b| behind(*a).total_cmp(&behind(*b))).unwrap_or(0)
    }

    /// Up to which threshold a source does not give its next row, of which it gave so many.
    fn threshold(&self, place: usize, given: usize) -> f64 {
        (given as f64 + 0.5) / self.sources[place].1
    }

    /// What the sources have given when one of them has given so many, the last row its; none
    /// where no run comes as far.
    fn until(&self, place: usize, given: usize) -> Option<Vec<usize>> {
        let about = self.threshold(place, given.saturating_sub(1));
        if about > (1u64 << 50) as f64 {
            return None;
        }

        let margin = 2.0 * self.sources.len() as f64 + 4.0;
        let mut counts = self.counts((about - margin).max(0.0) as usize);
        while counts[place] < given {
            let next = self.next(&counts);
            counts[next] += 1;
        }
        Some(counts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Row by row, as it is defined.
    fn simulated(weights: &[f64], limits: &[Option<usize>], rows: usize) -> Vec<(usize, usize)> {
        let mut given = vec![0; weights.len()];
        let (mut since, mut left) = (given.clone(), (0..weights.len()).collect::<Vec<_>>());
        let mut all = Vec::new();
        while all.len() < rows && !left.is_empty() {
            let sum: f64 = left.iter().map(|i| weights[*i]).sum();
            let behind = |i: &usize| (since[*i] as f64 + 0.5) / (weights[*i] / sum);
            let next = *left.iter().min_by(|a, b| behind(a).total_cmp(&behind(b))).unwrap();
            all.push((next, given[next]));
            given[next] += 1;
            since[next] += 1;
            if limits[next] == Some(given[next]) {
                left.retain(|i| *i != next);
                since = vec![0; weights.len()];
            }
        }
        all
    }

    #[test]
    fn rows_are_those_of_the_definition() {
        let cases: [(&[f64], &[Option<usize>]); 6] = [
            (&[1.0], &[None]),
            (&[0.7, 0.3], &[None, None]),
            (&[5.0, 1.0, 0.013], &[None, None, None]),
            (&[1.0, 1.0, 1.0, 1.0, 1.0], &[None; 5]),
            (&[3.0, 2.0, 1.0], &[Some(40), None, Some(90)]),
            (&[0.1, 0.2], &[Some(50), Some(33)]),
        ];
        for (weights, limits) in cases {
            let mixture = Mixture::of(weights, limits);
            let expected = simulated(weights, limits, 1000);
            assert_eq!(mixture.rows(0..expected.len()), expected, "{weights:?} {limits:?}");
            for (n, row) in expected.iter().enumerate() {
                assert_eq!(mixture.rows(n..n + 1), [*row], "{weights:?} {limits:?} {n}");
            }
            for rows in [0, 1, 7, 33, 500, expected.len()] {
                let rows = rows.min(expected.len());
                let count = |i| expected[..rows].iter().filter(|(source, _)| *source == i).count();
                let counts: Vec<usize> = (0..weights.len()).map(count).collect();
                assert_eq!(mixture.given(rows, weights.len()), counts, "{weights:?} {rows}");
            }
            let ended = expected.len() < 1000;
            assert_eq!(mixture.end, ended.then_some(expected.len()));
        }
    }

    #[test]
    fn any_row_is_found_at_once_and_shares_hold() {
        let weights = [0.5, 0.3, 0.15, 0.05];
        let mixture = Mixture::of(&weights, &[None; 4]);
        for rows in [1_000_000_000, 1 << 40] {
            let given = mixture.given(rows, 4);
            assert_eq!(given.iter().sum::<usize>(), rows);
            for (count, weight) in given.iter().zip(weights) {
                assert!((*count as f64 - weight * rows as f64).abs() < 2.0, "{given:?}");
            }
            let (source, before) = mixture.rows(rows..rows + 1)[0];
            assert_eq!(before, given[source]);
        }
    }
}
