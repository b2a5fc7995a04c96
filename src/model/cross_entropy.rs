//! Cross-entropy of a large vocabulary without its logits: tokens are taken in chunks, of which each
//! gives its losses and, where they are wanted, its gradients before the next one's logits are made.
//!
//! ```text
//! for a chunk of n of the N tokens:   logits [n, V] = x rows' + bias        the only values of V a token
//!                                     p = softmax(logits)
//!                                     loss    += -log p[target]
//!                                     dlogits  = p (1 + 2 z lse) - onehot(target)
//!                                     dx       = dlogits rows,   drows += dlogits' x,   dbias += sum(dlogits)
//! ```
//!
//! and all of it divided by the targets that count. `z` is the coefficient of the z-loss (Chowdhery
//! et al. 2022, section 5), `z lse^2` a token, which keeps logits from drifting away: it is in the
//! gradient, not in the loss that is told.
//!
//! So gradients are ready with the loss: a training's backward, whose turn comes later, only hands
//! them on ([`Loss`]). Rows wait in memory until then, once for every microbatch under way.

use tch::{Kind, Reduction, Tensor};

use super::linear::linear;
use crate::data::UNCOUNTED;
use crate::device::to_device;
use crate::error::Result;

/// Chunks are multiples of so many tokens, where they have as many.
const TILE: usize = 16;

/// A mean loss whose gradient is known in part.
#[derive(Debug)]
pub struct Loss {
    /// Cross-entropy in nats a token, without a graph.
    pub value: Tensor,
    /// A scalar whose gradient is the loss's, by everything but the parameters that follow.
    pub root: Tensor,
    /// Gradients that are ready: the number of the parameter, and its gradient.
    pub ready: Vec<(usize, Tensor)>,
}

/// What makes logits of hidden states [N, w].
pub(super) struct Logits<'a> {
    /// [V, w].
    pub rows: &'a Tensor,
    /// \[V\].
    pub bias: Option<&'a Tensor>,
}

/// How a loss is made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LossSettings {
    /// Bytes of the logits of a chunk.
    pub chunk: usize,
    pub z_loss: f64,
}

/// Gradients of the mean loss.
pub(super) struct Gradients {
    /// [N, w].
    pub x: Tensor,
    /// f32, [V, w].
    pub rows: Tensor,
    pub bias: Option<Tensor>,
}

/// Tokens of a chunk at most, over a vocabulary.
pub(super) fn chunk_tokens(bytes: usize, vocabulary: usize) -> usize {
    let tokens = bytes / (size_of::<f32>() * vocabulary.max(1));
    if tokens >= TILE { tokens / TILE * TILE } else { tokens.max(1) }
}

impl Logits<'_> {
    /// The chunks of N tokens, of nearly one size: where each begins, and its tokens.
    fn chunks(&self, settings: LossSettings, n: i64) -> Vec<(i64, i64)> {
        let most = chunk_tokens(settings.chunk, self.rows.size()[0] as usize) as i64;
        let count = (n as u64).div_ceil(most as u64).max(1) as i64;
        let even = (n as u64).div_ceil(count as u64) as i64;
        let size = ((even as u64).next_multiple_of(TILE as u64) as i64).min(most).max(1);
        (0..n).step_by(size as usize).map(|start| (start, size.min(n - start))).collect()
    }

    /// Logarithms of the probabilities of the next token, [n, V] in f32 (a softmax over many bf16
    /// values needs it), and of what the softmax divides by, [n, 1].
    fn log_softmax(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let logits = linear(x, self.rows, self.bias)?;
        let logits = match logits.kind() {
            Kind::BFloat16 => logits.f_to_kind(Kind::Float)?,
            _ => logits,
        };

        let logarithms = logits.f_log_softmax(-1, logits.kind())?;
        let normaliser = logits.f_narrow(1, 0, 1)?.f_sub(&logarithms.f_narrow(1, 0, 1)?)?;
        Ok([logarithms, normaliser])
    }

    /// The losses of the targets that count, added up: `x` [N, w], `targets` \[N\] on the host.
    pub fn losses(&self, x: &Tensor, targets: &Tensor, settings: LossSettings) -> Result<Tensor> {
        tch::no_grad(|| {
            let targets = to_device(targets, x.device())?;
            let mut sum = Tensor::f_zeros([], (kind_of_loss(x), x.device()))?;
            for (start, n) in self.chunks(settings, x.size()[0]) {
                let [logarithms, _] = self.log_softmax(&x.f_narrow(0, start, n)?)?;
                let _ = sum.f_add_(&nll(&logarithms, &targets.f_narrow(0, start, n)?)?)?;
            }

            Ok(sum)
        })
    }

    /// The same, with the gradients of their mean.
    pub fn gradients(
        &self,
        x: &Tensor,
        targets: &Tensor,
        settings: LossSettings,
    ) -> Result<(Tensor, Gradients)> {
        let uncounted = targets.f_eq(UNCOUNTED)?;
        let all_count = uncounted.f_any()?.f_int64_value(&[])? == 0;
        let count = counted(targets)?;
        let targets = to_device(targets, x.device())?;
        let uncounted = (!all_count).then(|| to_device(&uncounted, x.device())).transpose()?;

        tch::no_grad(|| {
            let kind = kind_of_loss(x);
            let mut sum = Tensor::f_zeros([], (kind, x.device()))?;
            let mut rows = Tensor::f_zeros(self.rows.size(), (kind, x.device()))?;
            let mut bias = self
                .bias
                .map(|bias| Tensor::f_zeros(bias.size(), (kind, x.device())))
                .transpose()?;
            let mut of_x = Vec::new();
            for (start, n) in self.chunks(settings, x.size()[0]) {
                let part = x.f_narrow(0, start, n)?;
                let wanted = targets.f_narrow(0, start, n)?;
                let [logarithms, normaliser] = self.log_softmax(&part)?;
                let _ = sum.f_add_(&nll(&logarithms, &wanted)?)?;

                let none = uncounted.as_ref().map(|none| none.f_narrow(0, start, n)).transpose()?;
                let gradient =
                    of_logits(logarithms, &normaliser, &wanted, none.as_ref(), settings.z_loss)?;
                if let Some(bias) = &mut bias {
                    let of_chunk = gradient.f_sum_dim_intlist(&[0i64][..], false, kind)?;
                    let _ = bias.f_add_(&of_chunk)?;
                }

                let gradient = gradient.f_to_kind(x.kind())?;
                of_x.push(gradient.f_mm(self.rows)?);
                add_product(&mut rows, &gradient.f_tr()?, &part)?;
            }

            let x = match &of_x[..] {
                [only] => only.shallow_clone(),
                parts => Tensor::f_cat(parts, 0)?,
            };
            let mean = 1.0 / count;
            let x = x.f_mul_scalar(mean)?;
            let _ = rows.f_mul_scalar_(mean)?;
            let bias = bias.map(|bias| bias.f_mul_scalar(mean)).transpose()?;
            Ok((sum, Gradients { x, rows, bias }))
        })
    }
}

/// How many of the targets count.
pub(super) fn counted(targets: &Tensor) -> Result<f64> {
    Ok(targets.f_ne(UNCOUNTED)?.f_sum(Kind::Int64)?.f_int64_value(&[])? as f64)
}

/// f32, or what the model computes with if that is wider.
fn kind_of_loss(x: &Tensor) -> Kind {
    if x.kind() == Kind::BFloat16 { Kind::Float } else { x.kind() }
}

fn nll(logarithms: &Tensor, targets: &Tensor) -> Result<Tensor> {
    Ok(logarithms.f_nll_loss::<Tensor>(targets, None, Reduction::Sum, UNCOUNTED)?)
}

/// The gradient of the losses' sum by the logits, in the memory of their logarithms.
fn of_logits(
    mut logarithms: Tensor,
    normaliser: &Tensor,
    targets: &Tensor,
    uncounted: Option<&Tensor>,
    z_loss: f64,
) -> Result<Tensor> {
    let mut gradient = logarithms.f_exp_()?;
    if z_loss > 0.0 {
        let _ = gradient.f_mul_(&normaliser.f_mul_scalar(2.0 * z_loss)?.f_add_scalar(1.0)?)?;
    }

    let targets = targets.f_clamp_min(0)?.f_unsqueeze(1)?;
    let minus_one = Tensor::f_full(targets.size(), -1.0, (gradient.kind(), gradient.device()))?;
    let _ = gradient.f_scatter_add_(1, &targets, &minus_one)?;
    if let Some(uncounted) = uncounted {
        let _ = gradient.f_masked_fill_(&uncounted.f_unsqueeze(1)?, 0.0)?;
    }

    Ok(gradient)
}

/// `sum += a b`; of bf16 factors the sum stays f32.
fn add_product(sum: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let _ = if a.kind() == sum.kind() { sum.f_addmm_(a, b)? } else { sum.f_add_(&a.f_mm(b)?)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const V: i64 = 37;
    const W: i64 = 12;

    /// Hidden states, rows, bias and targets, of which some count nothing.
    fn case(n: i64, kind: Kind) -> [Tensor; 4] {
        let wave = |shape: &[i64], pace: f64| {
            let count = shape.iter().product::<i64>();
            let values = (Tensor::arange(count, (Kind::Double, Device::Cpu)) * pace).sin() * 2.0;
            values.view(shape).to_kind(kind)
        };
        let targets = Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 5;
        let targets = targets.remainder(V);
        let some = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(4).eq(3);
        let targets = targets.masked_fill(&some, UNCOUNTED);
        [wave(&[n, W], 0.7), wave(&[V, W], 0.31), wave(&[V], 0.53), targets]
    }

    fn settings(tokens: usize, z_loss: f64) -> LossSettings {
        LossSettings { chunk: 4 * V as usize * tokens, z_loss }
    }

    fn far(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// Autograd over all logits at once, in float64, with and without what is optional.
    #[test]
    fn gradients_are_those_of_autograd() {
        for (tokens, with_bias, z_loss) in
            [(50, true, 0.0), (16, true, 0.0), (1, false, 0.01), (3, true, 0.01), (32, false, 0.0)]
        {
            let [x, rows, bias, targets] = case(50, Kind::Double);
            let leaf = |x: &Tensor| x.detach_copy().set_requires_grad(true);
            let [x, rows, bias] = [leaf(&x), leaf(&rows), leaf(&bias)];
            let bias = with_bias.then_some(&bias);
            let logits = Logits { rows: &rows, bias };
            let (sum, found) = logits.gradients(&x, &targets, settings(tokens, z_loss)).unwrap();

            let all = x.linear(&rows, bias);
            let counts = targets.ne(UNCOUNTED);
            let losses =
                all.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, UNCOUNTED, 0.0);
            let z = (all.logsumexp(&[-1i64][..], false).square() * &counts).sum(Kind::Double);
            let mut leaves = vec![&x, &rows];
            leaves.extend(bias);
            let mean = (&losses + z * z_loss) / counts.sum(Kind::Double);
            let expected = Tensor::run_backward(&[mean], &leaves, false, false);
            assert!(far(&sum, &losses) < 1e-10, "{tokens}");
            assert!(far(&found.x, &expected[0]) < 1e-12, "{tokens}");
            assert!(far(&found.rows, &expected[1]) < 1e-12, "{tokens}");
            if let Some(bias) = &found.bias {
                assert!(far(bias, &expected[2]) < 1e-12, "{tokens}");
            }
            let alone = logits.losses(&x, &targets, settings(tokens, z_loss)).unwrap();
            assert_eq!(alone, sum, "the value is the same with and without gradients");
        }
    }

    #[test]
    fn two_sizes_of_chunks_agree() {
        let [x, rows, bias, targets] = case(200, Kind::Float);
        let logits = Logits { rows: &rows, bias: Some(&bias) };
        let of = |tokens| logits.gradients(&x, &targets, settings(tokens, 1e-4)).unwrap();
        let (sum, whole) = of(200);
        for tokens in [1, 16, 17, 100] {
            let (other, parts) = of(tokens);
            assert!((&other / &sum - 1.0).abs().double_value(&[]) < 1e-6, "{tokens}");
            let scale = whole.rows.abs().max().double_value(&[]);
            assert!(far(&whole.rows, &parts.rows) < 1e-6 * scale, "{tokens}");
            assert!(far(&whole.x, &parts.x) < 1e-6, "{tokens}");
        }
    }

    /// Sums of bf16 products are f32: more chunks lose nothing.
    #[test]
    fn chunks_of_bf16_are_added_up_in_f32() {
        let [x, rows, _, targets] = case(512, Kind::BFloat16);
        let logits = Logits { rows: &rows, bias: None };
        let (_, whole) = logits.gradients(&x, &targets, settings(512, 0.0)).unwrap();
        let (_, parts) = logits.gradients(&x, &targets, settings(16, 0.0)).unwrap();
        assert_eq!(parts.rows.kind(), Kind::Float);
        let scale = whole.rows.abs().max().double_value(&[]);
        assert!(far(&whole.rows, &parts.rows) < 4e-3 * scale);
    }

    #[test]
    fn chunks_are_even_and_whole_tiles() {
        let [x, rows, ..] = case(50, Kind::Float);
        let logits = Logits { rows: &rows, bias: None };
        let cut = |tokens, n| logits.chunks(settings(tokens, 0.0), n);
        assert_eq!(cut(64, 50), [(0, 50)]);
        assert_eq!(cut(48, 50), [(0, 32), (32, 18)]);
        assert_eq!(cut(20, 50), [(0, 16), (16, 16), (32, 16), (48, 2)]);
        assert_eq!(cut(3, 7), [(0, 3), (3, 3), (6, 1)]);
        assert_eq!(chunk_tokens(16 << 20, 50_257), 80);
        assert_eq!(chunk_tokens(1, 50_257), 1);
        drop(x);
    }
}
