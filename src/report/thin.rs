//! Curves of many points drawn with few: every group of neighbours keeps its lowest and its highest
//! point, so that no peak is lost.

/// About as many points as `most`, of points in order; all of them if they are no more. What is no
/// number is left out.
pub fn thin(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let numbers: Vec<(f64, f64)> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    if numbers.len() <= most.max(4) {
        return numbers;
    }

    let group = numbers.len().div_ceil(most.max(4) / 2);
    let mut kept = Vec::with_capacity(most + 2);
    for points in numbers.chunks(group) {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) =
            (points.iter().min_by(by_height), points.iter().max_by(by_height))
        else {
            continue;
        };

        let (first, second) = if low.0 <= high.0 { (low, high) } else { (high, low) };
        kept.push(*first);
        if first != second {
            kept.push(*second);
        }
    }

    // A curve begins and ends where it does.
    if kept.first() != numbers.first() {
        kept.insert(0, numbers[0]);
    }
    if kept.last() != numbers.last() {
        kept.push(numbers[numbers.len() - 1]);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_kept() {
        let wave = |i: usize| (i as f64, (i as f64 / 7000.0).sin());
        let mut points: Vec<(f64, f64)> = (0..100_000).map(wave).collect();
        points[54_321].1 = 9.0;
        points[54_322].1 = -9.0;
        points[777].1 = f64::NAN;
        let found = thin(&points, 1000);
        assert!(found.len() <= 1002 && found.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(found.contains(&(54_321.0, 9.0)) && found.contains(&(54_322.0, -9.0)));
        assert_eq!((found[0], found[found.len() - 1]), (points[0], points[99_999]));
        assert_eq!(thin(&points[..3], 1000), points[..3]);
        assert!(thin(&[], 10).is_empty());
    }
}
