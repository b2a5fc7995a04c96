//! Hidden states to a loss: the last normalisation, where the layers need one, and an output
//! matrix, which with a tie is the embedding's table.
//!
//! With clusters it is an adaptive softmax (Grave et al. 2017): the first softmax is over the
//! tokens of the first cluster and one entry for each of the others; a token of cluster i > 0 costs
//! that entry and its place in a softmax over its own cluster, which is made only for the tokens of
//! the text that fall into it (targets are the host's, which finds out by itself which those are,
//! and sends what a device needs):
//!
//! ```text
//! log p(token) = first[token]                       cluster 0
//!              = first[n_0 + i - 1] + own_i[token]  cluster i > 0
//! ```

use tch::{Kind, Reduction, Tensor};

use super::clusters::{Cluster, clusters, numbered, tables};
use super::cross_entropy::{Logits, Loss, chunk_tokens, counted};
use super::linear::linear;
use super::{Dimensions, Dropout, Init, Parameter, Role, layer_norm, rms_norm, table};
use crate::data::UNCOUNTED;
use crate::device::to_device;
use crate::error::Result;

pub(super) struct Head {
    d: Dimensions,
    clusters: Vec<Cluster>,
}

/// The values of a cluster's parameters.
struct ClusterWeights<'a> {
    rows: &'a Tensor,
    projection: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
}

/// The values of the head's parameters, sorted out.
struct HeadWeights<'a> {
    /// The weights, and the bias of a layer normalisation.
    norm: Option<(&'a Tensor, Option<&'a Tensor>)>,
    clusters: Vec<ClusterWeights<'a>>,
    /// Rows and biases of the entries that stand for clusters.
    entries: Option<(&'a Tensor, &'a Tensor)>,
}

impl Head {
    pub(super) fn new(d: &Dimensions) -> Head {
        Head { d: d.clone(), clusters: clusters(d, d.head_width) }
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let d = &self.d;
        let mut parameters = Vec::new();
        if d.final_norm {
            parameters.push(Parameter::vector(
                "head.norm.weight".into(),
                d.d_model,
                d.first_values.norm,
            ));

            if !d.architecture.rms_norm {
                parameters.push(Parameter::vector("head.norm.bias".into(), d.d_model, Init::Zeros));
            }
        }

        match d.tied {
            true => parameters.extend(table(d)),
            false => parameters.extend(tables(
                d,
                &self.clusters,
                ["head.weight", "head.projection"],
                Role::Head,
            )),
        }

        let count = self.clusters.len();
        if self.d.architecture.head_bias {
            for (i, cluster) in self.clusters.iter().enumerate() {
                parameters.push(Parameter::vector(
                    numbered("head.bias", i, count),
                    cluster.tokens,
                    Init::Zeros,
                ));
            }
        }

        if count > 1 {
            let entries = count as i64 - 1;
            let shape = [entries, self.clusters[0].width];
            let rows = Parameter::new(
                "head.clusters.weight".into(),
                &shape,
                d.first_values.head,
                Role::Head,
            );

            parameters.push(rows);
            parameters.push(Parameter::vector("head.clusters.bias".into(), entries, Init::Zeros));
        }
        parameters
    }

    fn parts<'a>(&self, weights: &'a [Tensor]) -> HeadWeights<'a> {
        let mut weights = weights.iter();
        let mut next = || weights.next().expect("as many values as parameters");
        let with_bias = !self.d.architecture.rms_norm;
        let norm = self.d.final_norm.then(|| (next(), with_bias.then(&mut next)));
        let mut clusters: Vec<ClusterWeights> = Vec::new();
        for cluster in &self.clusters {
            let rows = next();
            let projection = cluster.projected.then(&mut next);
            clusters.push(ClusterWeights { rows, projection, bias: None });
        }

        if self.d.architecture.head_bias {
            clusters.iter_mut().for_each(|part| part.bias = Some(next()));
        }

        let entries = (clusters.len() > 1).then(|| (next(), next()));
        HeadWeights { norm, clusters, entries }
    }

    /// [B, T, D] -> [B T, D], normalised and dropped.
    fn prepared(
        &self,
        parts: &HeadWeights,
        x: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let x = match parts.norm {
            Some((weight, Some(bias))) => layer_norm(x, weight, bias, self.d.norm_eps)?,
            Some((weight, None)) => rms_norm(x, weight, self.d.norm_eps)?,
            None => x.shallow_clone(),
        };

        let x = match dropout {
            Some(dropout) if self.d.architecture.head_dropout => {
                dropout.apply(x, self.d.layers + 1, 0)?
            }
            _ => x,
        };

        let x = x.f_reshape([-1, self.d.d_model])?;
        let [_, scale] = self.d.table_scales();
        if scale == 1.0 { Ok(x) } else { Ok(x.f_mul_scalar(scale)?) }
    }

    /// [N, D] -> the logits of the first softmax, [N, n_0 + further clusters].
    fn first(&self, parts: &HeadWeights, x: &Tensor) -> Result<Tensor> {
        let part = &parts.clusters[0];
        let Some((entries, entry_biases)) = parts.entries else { return part.logits(x) };
        let rows = Tensor::f_cat(&[part.rows, entries], 0)?;
        let n = part.rows.size()[0];
        let zeros = Tensor::f_zeros([n], (x.kind(), x.device()))?;
        let biases = Tensor::f_cat(&[part.bias.unwrap_or(&zeros), entry_biases], 0)?;
        ClusterWeights { rows: &rows, bias: Some(&biases), ..*part }.logits(x)
    }

    /// Hidden states [B, T, D], `targets` [B, T] on the host -> the mean cross-entropy in nats per
    /// token; of one cluster with the gradients of rows and bias, by their numbers among the
    /// parameters.
    pub(super) fn loss(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        targets: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Loss> {
        let parts = self.parts(weights);
        let x = self.prepared(&parts, x, dropout)?;
        let targets = targets.f_reshape([-1])?;
        let count = counted(&targets)?;
        let [only] = &parts.clusters[..] else {
            let root = self.adaptive_losses(&parts, &x, &targets)?.f_div_scalar(count)?;
            return Ok(Loss { value: root.f_detach()?, root, ready: Vec::new() });
        };

        let (x, logits) = (only.projected(&x)?, only.maker());
        if !x.requires_grad() {
            let value = logits.losses(&x, &targets, self.d.loss)?.f_div_scalar(count)?;
            return Ok(Loss { root: value.shallow_clone(), value, ready: Vec::new() });
        }

        let (sum, gradients) = logits.gradients(&x, &targets, self.d.loss)?;
        // tch cannot seed a backward: the gradient of sum(x * dx) with respect to x is exactly dx.
        let root = x.f_mul(&gradients.x)?.f_sum(Kind::Float)?;
        let rows = weights.iter().position(|weight| std::ptr::eq(weight, only.rows));
        let mut ready: Vec<(usize, Tensor)> =
            rows.into_iter().map(|number| (number, gradients.rows.shallow_clone())).collect();
        ready.extend(gradients.bias.map(|bias| (weights.len() - 1, bias)));
        Ok(Loss { value: sum.f_div_scalar(count)?, root, ready })
    }

    /// The losses of the targets that count, added up.
    pub(super) fn losses(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        targets: &Tensor,
    ) -> Result<Tensor> {
        let parts = self.parts(weights);
        let x = self.prepared(&parts, x, None)?;
        let targets = targets.f_reshape([-1])?;
        match &parts.clusters[..] {
            [only] => only.maker().losses(&only.projected(&x)?, &targets, self.d.loss),
            _ => self.adaptive_losses(&parts, &x, &targets),
        }
    }

    /// The same of a softmax in clusters: `x` [N, D], prepared, `targets` \[N\].
    fn adaptive_losses(&self, parts: &HeadWeights, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let first = wide(self.first(parts, x)?)?;

        // The entry of the target in the first softmax: itself, or its cluster's.
        let mut entries = targets.shallow_clone();
        let mut tails = Vec::new();
        for (i, (cluster, part)) in self.clusters.iter().zip(&parts.clusters).enumerate().skip(1) {
            let inside = targets
                .f_ge(cluster.start)?
                .f_logical_and(&targets.f_lt(cluster.start + cluster.tokens)?)?;
            entries = entries.f_masked_fill(&inside, self.clusters[0].tokens + i as i64 - 1)?;
            let places = inside.f_nonzero()?.f_view([-1])?;
            // Also without any token of the cluster, so that its weights always have a gradient.
            let own = wide(part.logits(&x.f_index_select(0, &to_device(&places, x.device())?)?)?)?;
            let wanted = to_device(
                &targets.f_index_select(0, &places)?.f_sub_scalar(cluster.start)?,
                x.device(),
            )?;

            tails.push(own.f_cross_entropy_loss::<Tensor>(
                &wanted,
                None,
                Reduction::Sum,
                UNCOUNTED,
                0.0,
            )?);
        }

        let entries = to_device(&entries, x.device())?;
        let mut sum =
            first.f_cross_entropy_loss::<Tensor>(&entries, None, Reduction::Sum, UNCOUNTED, 0.0)?;
        for tail in tails {
            sum = sum.f_add(&tail)?;
        }

        Ok(sum)
    }

    /// [B, T, D] -> [B, T, V]: logits, or of several clusters logarithms of probabilities.
    pub(super) fn scores(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        if self.clusters.len() > 1 {
            return self.log_probabilities(weights, x);
        }

        let parts = self.parts(weights);
        let logits = self.first(&parts, &self.prepared(&parts, x, None)?)?;
        Ok(logits.f_view([x.size()[0], x.size()[1], self.d.vocabulary])?)
    }

    /// [B, T, D] -> [B, T, V].
    pub(super) fn log_probabilities(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let parts = self.parts(weights);
        let rows = self.prepared(&parts, x, None)?;
        let first = wide(self.first(&parts, &rows)?)?;
        let kind = first.kind();
        let first = first.f_log_softmax(-1, kind)?;
        let n = self.clusters[0].tokens;
        let mut all = vec![first.f_narrow(1, 0, n)?];
        for (i, part) in parts.clusters.iter().enumerate().skip(1) {
            let own = wide(part.logits(&rows)?)?.f_log_softmax(-1, kind)?;
            all.push(own.f_add(&first.f_narrow(1, n + i as i64 - 1, 1)?)?);
        }

        Ok(Tensor::f_cat(&all, 1)?.f_view([x.size()[0], x.size()[1], self.d.vocabulary])?)
    }

    /// Those that are kept of a token from its forward to its backward.
    pub(super) fn kept_entries(&self) -> usize {
        if self.clusters.len() > 1 { self.entries() as usize } else { 0 }
    }

    /// f32 values of the logits of `tokens` tokens that there are at a time: themselves, and the
    /// logarithms of the softmax, whose memory their gradient takes.
    pub(super) fn chunk(&self, tokens: usize) -> usize {
        if self.clusters.len() > 1 {
            return 0;
        }

        let vocabulary = self.d.vocabulary as usize;
        2 * tokens.min(chunk_tokens(self.d.loss.chunk, vocabulary)) * vocabulary
    }

    /// f32 values that a microbatch keeps whatever its tokens: the gradient of the rows.
    pub(super) fn saved(&self) -> usize {
        match &self.clusters[..] {
            [only] => (only.tokens * only.width) as usize,
            _ => 0,
        }
    }

    /// Entries of the softmaxes that a token is in, on average.
    fn entries(&self) -> f64 {
        let further = self
            .clusters
            .iter()
            .zip(&self.d.shares)
            .skip(1)
            .map(|(c, share)| c.tokens as f64 * share)
            .sum::<f64>();
        (self.clusters[0].tokens as usize + self.clusters.len() - 1) as f64 + further
    }

    /// Multiply-adds a token.
    pub(super) fn cost(&self) -> f64 {
        let of = |(i, (c, share)): (usize, (&Cluster, &f64))| {
            let projected = if c.projected { c.width * self.d.d_model } else { 0 };
            let share = if i == 0 { 1.0 } else { *share };
            share * (c.tokens * c.width + projected) as f64
        };
        self.clusters.iter().zip(&self.d.shares).enumerate().map(of).sum()
    }

    /// The input and its normalised form, of an RMSNorm also before its weights: 2 D or 3 D; of one
    /// cluster the gradient; of several the logarithms of the softmaxes; mean and deviation.
    pub(super) fn saved_per_token(&self) -> usize {
        let gradient = usize::from(self.clusters.len() == 1);
        let forms = 2 + usize::from(self.d.architecture.rms_norm) + gradient;
        forms * self.d.d_model as usize + self.kept_entries() + 4
    }

    /// Logits and their gradient, where they are not made in chunks.
    pub(super) fn transient_per_token(&self) -> usize {
        2 * self.kept_entries() + self.d.d_model as usize
    }

    /// The gradient of the largest matrix, before it is added to the others of the step.
    pub(super) fn transient(&self) -> usize {
        self.clusters.iter().map(|c| (c.tokens * c.width) as usize).max().unwrap_or(0)
    }
}

impl ClusterWeights<'_> {
    /// [N, D] -> as wide as the rows.
    fn projected(&self, x: &Tensor) -> Result<Tensor> {
        match self.projection {
            Some(projection) => Ok(x.f_matmul(projection)?),
            None => Ok(x.shallow_clone()),
        }
    }

    /// [N, D] -> [N, n].
    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        linear(&self.projected(x)?, self.rows, self.bias)
    }

    fn maker(&self) -> Logits<'_> {
        Logits { rows: self.rows, bias: self.bias }
    }
}

/// Logits of a bf16 model in f32: a softmax over many of them needs it.
fn wide(logits: Tensor) -> Result<Tensor> {
    Ok(if logits.kind() == Kind::BFloat16 { logits.f_to_kind(Kind::Float)? } else { logits })
}

#[cfg(test)]
mod tests {
    use super::super::{Arch, ModelConfig, Norm};
    use super::*;
    use crate::schedule::Tie;

    #[test]
    fn the_head_normalises_where_it_is_asked_to() {
        for (norm, final_norm, expected) in [
            (Norm::Pre, None, true),
            (Norm::Pre, Some(false), false),
            (Norm::Post, None, false),
            (Norm::Post, Some(true), true),
        ] {
            let config = ModelConfig {
                arch: Arch::TransformerXl,
                norm: Some(norm),
                final_norm,
                ..ModelConfig::default()
            };
            let head = Head::new(&Dimensions::new(&config, 31, 4));
            let found =
                head.parameters().iter().any(|parameter| parameter.name == "head.norm.weight");
            assert_eq!(found, expected, "{norm:?} {final_norm:?}");
        }
    }

    /// The probabilities of a softmax in clusters add up to 1, and its loss is made of them.
    #[test]
    fn clusters_make_a_distribution() {
        for (cutoffs, div_val, project_all) in [
            (vec![], 1, false),
            (vec![5], 1, false),
            (vec![4, 9], 2, false),
            (vec![4, 9], 2, true),
            (vec![3, 6, 20], 2, false),
        ] {
            let config = ModelConfig {
                arch: Arch::TransformerXl,
                d_model: 16,
                tie: Tie::Untied,
                cutoffs: cutoffs.clone(),
                div_val,
                project_all,
                ..ModelConfig::default()
            };
            let head = Head::new(&Dimensions::new(&config, 31, 4));
            let projections =
                head.parameters().iter().filter(|p| p.name.contains("projection")).count();
            assert_eq!(
                projections,
                if div_val == 1 { 0 } else { cutoffs.len() + usize::from(project_all) }
            );
            let weights: Vec<Tensor> = head
                .parameters()
                .iter()
                .map(|p| Tensor::randn(&p.shape[..], (Kind::Double, tch::Device::Cpu)))
                .collect();
            let x = Tensor::randn([2, 4, 16], (Kind::Double, tch::Device::Cpu));
            let all = head.log_probabilities(&weights, &x).unwrap();
            assert_eq!(all.size(), [2, 4, 31]);
            let sums = all.exp().sum_dim_intlist(-1, false, Kind::Double);
            assert!((sums - 1.0).abs().max().double_value(&[]) < 1e-12, "{cutoffs:?}");
            for targets in [[0i64, 3, 4, 5, 8, 9, 20, 30], [0, 1, 2, 0, 1, 2, 0, 1]] {
                let targets = Tensor::from_slice(&targets).view([2, 4]);
                let wanted = all.gather(-1, &targets.unsqueeze(-1), false).mean(Kind::Double);
                let loss = head.loss(&weights, &x, &targets, None).unwrap();
                assert!((loss.value + wanted).abs().double_value(&[]) < 1e-12, "{cutoffs:?}");
            }

            // Targets that count nothing are left out of the sum.
            let some = Tensor::from_slice(&[0i64, UNCOUNTED, 4, UNCOUNTED, 8, 9, UNCOUNTED, 30])
                .view([2, 4]);
            let counted = some.ge(0);
            let wanted = all.gather(-1, &some.clamp_min(0).unsqueeze(-1), false).squeeze_dim(-1);
            let wanted = wanted.masked_select(&counted).sum(Kind::Double);
            let sum = head.losses(&weights, &x, &some).unwrap();
            assert!((sum + wanted).abs().double_value(&[]) < 1e-12, "{cutoffs:?}");
            let nothing = Tensor::full([2, 4], UNCOUNTED, (Kind::Int64, tch::Device::Cpu));
            assert_eq!(head.losses(&weights, &x, &nothing).unwrap().double_value(&[]), 0.0);
        }
    }
}
