//! Means of paired runs, and what a loss is worth in tokens.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// A mean with half of its 95 % interval (Student's t); none of one value.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Mean {
    pub mean: f64,
    pub half_interval: Option<f64>,
}

impl Mean {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Mean {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let student = StudentsT::new(0.0, 1.0, n - 1.0).ok();
        let half_interval =
            student.map(|student| student.inverse_cdf(0.975) * (variance / n).sqrt());
        Mean { mean, half_interval }
    }

    /// With its interval, if there is one.
    pub fn show(&self, digits: usize) -> String {
        match self.half_interval {
            Some(half) => format!("{:.digits$} ± {half:.digits$}", self.mean),
            None => format!("{:.digits$}", self.mean),
        }
    }
}

/// A share of a reference's steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    pub share: f64,
    /// Whether no runs of the reference stand on both sides of it.
    pub extrapolated: bool,
}

/// The share of the steps at which a reference has a loss: between its points (share, loss), and
/// beyond them along the nearest two, in the logarithm of the share. None of fewer than two points,
/// or if they do not fall.
pub fn share_at(points: &[(f64, f64)], loss: f64) -> Option<Share> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let falls = points.windows(2).all(|pair| pair[1].1 < pair[0].1);
    if points.len() < 2 || !falls {
        return None;
    }

    let last = points.len() - 2;
    let i = points.windows(2).position(|pair| loss >= pair[1].1).unwrap_or(last);
    let [(from, high), (to, low)] = [points[i], points[i + 1]];
    let part = (high - loss) / (high - low);
    let share = (from.ln() + part * (to.ln() - from.ln())).exp();

    Some(Share { share, extrapolated: !(0.0..=1.0).contains(&part) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_intervals() {
        let one = Mean::of(&[2.0]);
        assert_eq!((one.mean, one.half_interval), (2.0, None));
        // Five values: t = 2.776, standard error sqrt(2.5 / 5).
        let five = Mean::of(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(five.mean, 3.0);
        assert!((five.half_interval.unwrap() - 2.7764 * 0.5f64.sqrt()).abs() < 1e-3);
    }

    #[test]
    fn a_loss_is_worth_a_share_of_the_steps() {
        let points = [(1.0, 2.0), (0.5, 3.0), (2.0, 1.5)];
        let between = [(3.0, 0.5), (2.0, 1.0), (1.5, 2.0), (2.5, 0.5f64.sqrt())];
        let beyond = [(4.0, 0.25), (1.0, 4.0)];
        for (rows, extrapolated) in [(&between[..], false), (&beyond[..], true)] {
            for (loss, share) in rows {
                let found = share_at(&points, *loss).unwrap();
                assert!((found.share - share).abs() < 1e-12, "{loss}");
                assert_eq!(found.extrapolated, extrapolated, "{loss}");
            }
        }
        assert_eq!(share_at(&points[..1], 2.0), None);
        assert_eq!(
            share_at(&[(0.5, 2.0), (1.0, 2.5)], 2.0),
            None,
            "a reference that does not learn says nothing"
        );
    }
}
