//! Which layers stand on which stage: contiguous runs, balanced by cost or given by hand.

use std::ops::Range;

/// Cuts `costs` (one per layer, any unit) into `stages` contiguous, non-empty runs so that the
/// dearest run is as cheap as it can be; among those cuts the one with the least sum of squares,
/// then the one with the shorter first runs.
///
/// `first` and `last` are the costs that the first and the last run carry besides their layers
/// (embedding, head).
///
/// # Panics
/// If there are more stages than layers: the config has been checked by then.
pub fn balanced(costs: &[f64], first: f64, last: f64, stages: usize) -> Vec<Range<usize>> {
    let layers = costs.len();
    assert!(stages >= 1 && stages <= layers, "{stages} stages for {layers} layers");
    let sum = |a: usize, b: usize| costs[a..b].iter().sum::<f64>();
    let before = prefixes(costs, first, stages - 1);
    let first = if stages == 1 { first } else { 0.0 };
    let whole = |a: usize, cut: &Cut| cut.with(layers, sum(a, layers) + first + last);
    let cuts =
        before.iter().enumerate().take(layers).filter_map(|(a, cut)| Some(whole(a, cut.as_ref()?)));
    cheapest(cuts).expect("a cut exists when there are no more stages than layers").runs()
}

/// The same for a ring, whose first and last run share a device: the dearest device is as cheap as
/// it can be, and the two runs that share one differ as little as they can.
///
/// # Panics
/// As [`balanced`], or with fewer than 3 stages.
pub fn balanced_ring(costs: &[f64], first: f64, last: f64, stages: usize) -> Vec<Range<usize>> {
    let layers = costs.len();
    assert!(stages >= 3 && stages <= layers, "{stages} stages of a ring for {layers} layers");
    let sum = |a: usize, b: usize| costs[a..b].iter().sum::<f64>();
    let mut best: Option<(Cut, f64)> = None;
    for a in 1..=layers + 1 - stages {
        let middles = prefixes(&costs[a..], 0.0, stages - 2);
        for b in a + stages - 2..layers {
            let Some(middle) = &middles[b - a] else { continue };
            let (head, tail) = (first + sum(0, a), last + sum(b, layers));
            let mut cut = middle.with(layers - a, head + tail);
            cut.ends.iter_mut().for_each(|end| *end += a);
            cut.ends.insert(0, 0);
            let apart = (head - tail).abs();
            let key = |(cut, apart): &(Cut, f64)| (cut.dearest, cut.squares, *apart);
            if best.as_ref().is_none_or(|held| (cut.dearest, cut.squares, apart) < key(held)) {
                best = Some((cut, apart));
            }
        }
    }

    best.expect("a cut exists when there are no more stages than layers").0.runs()
}

/// The best cut of every prefix of the layers into exactly `stages` runs, by the prefix's length;
/// the first run also carries `first`.
fn prefixes(costs: &[f64], first: f64, stages: usize) -> Vec<Option<Cut>> {
    let mut sums = vec![0.0];
    for cost in costs {
        sums.push(sums[sums.len() - 1] + cost);
    }

    let mut best: Vec<Option<Cut>> = vec![None; costs.len() + 1];
    best[0] = Some(Cut { dearest: 0.0, squares: 0.0, ends: vec![0] });
    for stage in 0..stages {
        let more = if stage == 0 { first } else { 0.0 };
        let extended = |b: usize| {
            let shorter = best.iter().enumerate().take(b);
            cheapest(
                shorter
                    .filter_map(|(a, cut)| Some(cut.as_ref()?.with(b, sums[b] - sums[a] + more))),
            )
        };

        best = (0..=costs.len()).map(extended).collect();
    }
    best
}

/// The first of the cheapest cuts.
fn cheapest(cuts: impl Iterator<Item = Cut>) -> Option<Cut> {
    cuts.reduce(|least, cut| {
        if (cut.dearest, cut.squares) < (least.dearest, least.squares) { cut } else { least }
    })
}

/// A way to cut a prefix of the layers.
#[derive(Clone)]
struct Cut {
    dearest: f64,
    squares: f64,
    /// 0, then the end of every run.
    ends: Vec<usize>,
}

impl Cut {
    fn with(&self, end: usize, cost: f64) -> Cut {
        let mut ends = self.ends.clone();
        ends.push(end);
        Cut { dearest: self.dearest.max(cost), squares: self.squares + cost * cost, ends }
    }

    fn runs(&self) -> Vec<Range<usize>> {
        self.ends.windows(2).map(|w| w[0]..w[1]).collect()
    }
}

/// The runs of a hand-written list of layer counts, `None` unless every count is at least 1 and
/// they add up to `layers`.
pub fn by_hand(counts: &[usize], layers: usize) -> Option<Vec<Range<usize>>> {
    if counts.contains(&0) || counts.iter().sum::<usize>() != layers {
        return None;
    }

    let mut start = 0;
    Some(
        counts
            .iter()
            .map(|count| {
                start += count;
                start - count..start
            })
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(runs: &[Range<usize>]) -> Vec<usize> {
        runs.iter().map(|r| r.len()).collect()
    }

    #[test]
    fn equal_layers_are_spread_evenly() {
        let table: [(usize, usize, &[usize]); 5] = [
            (4, 1, &[4]),
            (4, 2, &[2, 2]),
            (4, 4, &[1, 1, 1, 1]),
            (8, 3, &[2, 3, 3]),
            (12, 11, &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]),
        ];
        for (layers, stages, expected) in table {
            let runs = balanced(&vec![1.0; layers], 0.0, 0.0, stages);
            assert_eq!(counts(&runs), expected, "{layers} layers on {stages} stages");
            assert_eq!(runs[0].start, 0);
            assert_eq!(runs[stages - 1].end, layers);
            assert!(runs.windows(2).all(|w| w[0].end == w[1].start));
        }
    }

    #[test]
    fn a_dear_head_takes_layers_off_the_last_stage() {
        assert_eq!(counts(&balanced(&[1.0; 8], 0.0, 2.0, 2)), [5, 3]);
        assert_eq!(counts(&balanced(&[1.0; 8], 2.0, 0.0, 2)), [3, 5]);
        assert_eq!(counts(&balanced(&[1.0, 1.0, 4.0, 1.0, 1.0], 0.0, 0.0, 3)), [2, 1, 2]);
    }

    #[test]
    fn a_ring_gives_its_doubled_device_a_fair_share() {
        let table: [(usize, usize, f64, &[usize]); 4] = [
            (12, 3, 0.0, &[3, 6, 3]),
            (12, 4, 0.0, &[2, 4, 4, 2]),
            (8, 4, 2.0, &[1, 3, 3, 1]), // the head is worth two layers: the first device has 1 + 1 + 2
            (4, 4, 0.0, &[1, 1, 1, 1]),
        ];
        for (layers, stages, head, expected) in table {
            let runs = balanced_ring(&vec![1.0; layers], 0.0, head, stages);
            assert_eq!(counts(&runs), expected, "{layers} layers on {stages} stages");
            assert_eq!((runs[0].start, runs[stages - 1].end), (0, layers));
            assert!(runs.windows(2).all(|w| w[0].end == w[1].start));
        }
    }

    #[test]
    fn the_dearest_stage_is_as_cheap_as_any_cut_allows() {
        let costs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
        let dearest = |cuts: &[usize]| {
            let sums = cuts.windows(2).map(|w| costs[w[0]..w[1]].iter().sum::<f64>());
            sums.fold(0.0, f64::max)
        };
        let mut least = f64::INFINITY;
        for a in 1..7 {
            for b in a + 1..8 {
                least = least.min(dearest(&[0, a, b, 8]));
            }
        }
        let runs = balanced(&costs, 0.0, 0.0, 3);
        assert_eq!(dearest(&[0, runs[0].end, runs[1].end, 8]), least);
    }

    #[test]
    fn a_hand_list_must_cover_the_layers() {
        assert_eq!(by_hand(&[1, 3, 2], 6), Some(vec![0..1, 1..4, 4..6]));
        assert_eq!(by_hand(&[1, 3, 2], 7), None);
        assert_eq!(by_hand(&[0, 6], 6), None);
    }
}
