//! Tokens to hidden states: rows of a table, or of the tables of several clusters, and in a
//! Transformer the learned positions.
//!
//! Tokens are the host's, which sends them; which of them fall into a cluster it finds out by
//! itself, so that it knows all sizes without waiting for a device.

use tch::Tensor;

use super::clusters::{Cluster, clusters, tables};
use super::rotary::Places;
use super::{Dimensions, Dropout, Init, Layer, Parameter, Positions, Remembered, Role};
use crate::device::to_device;
use crate::error::Result;

/// Layer 0 of the dropout keys.
const LAYER: usize = 0;

pub(super) struct Embedding {
    d: Dimensions,
    clusters: Vec<Cluster>,
}

impl Embedding {
    pub(super) fn new(d: &Dimensions) -> Embedding {
        Embedding { d: d.clone(), clusters: clusters(d, d.embedding_width) }
    }

    /// Rows of one cluster's table, projected to D: `tokens` count from the cluster's first.
    fn rows(
        &self,
        cluster: &Cluster,
        weights: &mut std::slice::Iter<Tensor>,
        tokens: &Tensor,
    ) -> Result<Tensor> {
        let table = weights.next().expect("a table for every cluster");
        let tokens = to_device(tokens, table.device())?;
        let rows = Tensor::f_embedding(table, &tokens, -1, false, false)?;
        if !cluster.projected {
            return Ok(rows);
        }

        Ok(rows.f_linear::<Tensor>(
            weights.next().expect("a projection for every table that has one"),
            None,
        )?)
    }

    /// [B, T] -> [B, T, D]; every cluster works on its own tokens only.
    fn lookup(&self, weights: &mut std::slice::Iter<Tensor>, x: &Tensor) -> Result<Tensor> {
        if let [only] = &self.clusters[..] {
            return self.rows(only, weights, x);
        }

        let tokens = x.f_reshape([-1])?;
        let mut hidden: Option<Tensor> = None;
        for cluster in &self.clusters {
            let inside = tokens
                .f_ge(cluster.start)?
                .f_logical_and(&tokens.f_lt(cluster.start + cluster.tokens)?)?;
            let places = inside.f_nonzero()?.f_view([-1])?;
            let rows = self.rows(
                cluster,
                weights,
                &tokens.f_index_select(0, &places)?.f_sub_scalar(cluster.start)?,
            )?;

            let places = to_device(&places, rows.device())?;
            let all = match hidden.take() {
                Some(all) => all,
                None => Tensor::f_zeros(
                    [tokens.size()[0], self.d.d_model],
                    (rows.kind(), rows.device()),
                )?,
            };

            hidden = Some(all.f_index_copy(0, &places, &rows)?);
        }

        let hidden = hidden.expect("at least one cluster");
        Ok(hidden.f_view([x.size()[0], x.size()[1], self.d.d_model])?)
    }
}

impl Layer for Embedding {
    fn name(&self) -> String {
        "embedding".to_owned()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = tables(
            &self.d,
            &self.clusters,
            ["embedding.tokens", "embedding.projection"],
            Role::Table,
        );

        parameters.iter_mut().for_each(|parameter| parameter.tied = self.d.tied);
        if self.d.architecture.positions == Positions::Learned {
            let shape = [self.d.positions, self.d.d_model];
            let init = Init::Normal(self.d.embedding_std);
            parameters.push(Parameter::new(
                "embedding.positions".into(),
                &shape,
                init,
                Role::Table,
            ));
        }
        parameters
    }

    /// `x`: [B, t] with no more tokens than there are positions, on the host -> [B, t, D].
    fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        remembered: &mut Remembered,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let mut weights = weights.iter();
        let mut hidden = self.lookup(&mut weights, x)?;
        if let Some(scale) = self.d.embedding_scale() {
            hidden = hidden.f_mul_scalar(scale)?;
        }

        let t = x.size()[1];
        if let Some(positions) = weights.next() {
            let rows = match remembered.places(t, positions.device())? {
                Places::From(first) => positions.f_narrow(0, first, t)?,
                Places::Each { numbers, .. } => {
                    Tensor::f_embedding(positions, &numbers, -1, false, false)?
                }
            };
            hidden = hidden.f_add(&rows)?;
        }

        if let Some(cache) = remembered.cache() {
            cache.advance(t);
        }

        match dropout {
            Some(dropout) => dropout.apply(hidden, LAYER, 0),
            None => Ok(hidden),
        }
    }

    /// The tokens, int64, and the mask; the sum that it multiplies is not kept. With narrow tables
    /// their rows.
    fn saved_per_token(&self) -> usize {
        let rows = if self.clusters.iter().any(|c| c.projected) {
            self.d.embedding_width as usize
        } else {
            0
        };
        2 + rows + if self.d.dropout > 0.0 { self.d.d_model as usize } else { 0 }
    }

    /// The gradient of the output, and the sum before the positions are added; of every further
    /// cluster, another one.
    fn transient_per_token(&self) -> usize {
        (1 + self.clusters.len()) * self.d.d_model as usize
    }

    /// The gradient of the largest table, before it is added to the others of the step.
    fn transient(&self) -> usize {
        self.clusters.iter().map(|c| (c.tokens * c.width) as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arch, Memory, ModelConfig};
    use super::*;
    use crate::schedule::Tie;

    /// Clusters as wide as the model are one table, cut in pieces; narrow ones are their rows,
    /// projected.
    #[test]
    fn clusters_look_up_what_one_table_would() {
        let config = ModelConfig {
            arch: Arch::TransformerXl,
            d_model: 8,
            tie: Tie::Untied,
            ..ModelConfig::default()
        };
        let tokens = Tensor::from_slice(&[0i64, 4, 5, 11, 8, 9, 5, 0, 3, 4, 10, 1]).view([2, 6]);
        let lookup = |config: &ModelConfig, weights: &[Tensor]| {
            let embedding = Embedding::new(&Dimensions::new(config, 12, 6));
            embedding.forward(weights, &tokens, &mut Memory::new(0).of(1)[0], None).unwrap()
        };
        let random = |shape: [i64; 2]| Tensor::randn(shape, (tch::Kind::Double, tch::Device::Cpu));
        let table = random([12, 8]);
        let parts = [table.narrow(0, 0, 5), table.narrow(0, 5, 4), table.narrow(0, 9, 3)];
        let cut = ModelConfig { cutoffs: vec![5, 9], ..config.clone() };
        assert_eq!(lookup(&cut, &parts), lookup(&config, &[table]));

        let narrow = ModelConfig { div_val: 2, ..cut };
        let (a, b, c, p, q) =
            (random([5, 8]), random([4, 4]), random([3, 2]), random([8, 4]), random([8, 2]));
        let table = Tensor::cat(&[&a, &b.matmul(&p.tr()), &c.matmul(&q.tr())], 0);
        let found = lookup(&narrow, &[a, b, p, c, q]);
        let far = (found - lookup(&config, &[table])).abs().max().double_value(&[]);
        assert!(far < 1e-12, "{far:e}");
    }
}
