//! The vocabulary in clusters of ever rarer tokens, for adaptive input (Baevski and Auli 2019) and
//! adaptive softmax (Grave et al. 2017). Without cut-offs there is one cluster, and everything is
//! what it is without clusters.
//!
//! Cluster i holds the tokens `start .. start + n` (the most frequent have the lowest numbers) in
//! rows that are `width / div_val^i` wide, with a projection to D where that differs from D, or of
//! every cluster (`project_all`).

use super::{Dimensions, Init, Parameter, Role};

/// A part of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cluster {
    pub start: i64,
    pub tokens: i64,
    pub width: i64,
    /// Its rows are made D wide by a matrix.
    pub projected: bool,
}

/// The clusters of rows that are `width` wide in the first.
pub(super) fn clusters(d: &Dimensions, width: i64) -> Vec<Cluster> {
    let starts = std::iter::once(0).chain(d.cutoffs.iter().copied());
    let ends = d.cutoffs.iter().copied().chain([d.vocabulary]);
    let scales = std::iter::successors(Some(1), |scale| Some(scale * d.div_val));
    starts
        .zip(ends)
        .zip(scales)
        .map(|((start, end), scale)| {
            let width = (width / scale).max(1);
            Cluster {
                start,
                tokens: end - start,
                width,
                projected: d.project_all || width != d.d_model,
            }
        })
        .collect()
}

/// The name of a cluster's parameter: without a number where there is one cluster.
pub(super) fn numbered(name: &str, i: usize, count: usize) -> String {
    if count == 1 { name.to_owned() } else { format!("{name}.{i}") }
}

/// The tables of all clusters with their projections, cluster by cluster: `rows` [n_i, w_i], and
/// `projection` [D, w_i].
pub(super) fn tables(
    d: &Dimensions,
    clusters: &[Cluster],
    [rows, projection]: [&str; 2],
    role: Role,
) -> Vec<Parameter> {
    let count = clusters.len();
    let init =
        if role == Role::Table { Init::Normal(d.embedding_std) } else { d.first_values.head };
    let mut parameters = Vec::new();
    for (i, cluster) in clusters.iter().enumerate() {
        let shape = [cluster.tokens, cluster.width];
        parameters.push(Parameter::new(numbered(rows, i, count), &shape, init, role));
        if cluster.projected {
            // Rows come out as large as those of a table that is D wide.
            let by_width = Init::Normal(1.0 / (cluster.width as f64).sqrt());
            let init = d.first_values.projection.unwrap_or(by_width);
            let shape = [d.d_model, cluster.width];
            parameters.push(Parameter::new(numbered(projection, i, count), &shape, init, role));
        }
    }
    parameters
}

/// The share of a text's tokens that falls in each cluster, if frequencies follow Zipf's law, `1 /
/// (rank + 2.7)`.
pub(super) fn zipf(cutoffs: &[i64], vocabulary: i64) -> Vec<f64> {
    let mass = |rank: i64| (rank as f64 + 2.7).ln();
    let all = mass(vocabulary) - mass(0);
    let starts = std::iter::once(0).chain(cutoffs.iter().copied());
    let ends = cutoffs.iter().copied().chain([vocabulary]);
    starts.zip(ends).map(|(start, end)| (mass(end) - mass(start)) / all).collect()
}
