//! Against training that knows nothing of grids: a loop of libtorch calls, and a gradient computed by hand.

use ouroboros::data::Batches;
use ouroboros::grid::Place;
use ouroboros::model::{Memory, Parameter, Stack, initial_tensor};
use ouroboros::number::Readback;
use ouroboros::params::{Layout, Versions, slice, slice_mut};
use ouroboros::stage::{Held, Input, MicrobatchId, Output, Settings, Stage, UsedVersions};
use std::sync::Arc;
use tch::{Kind, Tensor};

use crate::harness::{as_threads, tiny};

/// Mean cross-entropy of all logits at once, by autograd.
fn plain_loss(model: &Stack, weights: &[Tensor], hidden: &Tensor, targets: &Tensor) -> Tensor {
    let all = model.log_probabilities(weights, hidden).unwrap();
    -all.gather(-1, &targets.unsqueeze(-1), false).mean(Kind::Float)
}

/// Without clipping (whose norms belong to stages) a synchronous grid is plain training, bit for bit.
#[test]
fn synchronous_grids_equal_one_device() {
    let free = "optimizer.clip=1e9";
    for kind in ["1f1b", "gpipe", "sequential"] {
        let schedule = format!("schedule={kind}");
        let one = as_threads(&tiny(&[&schedule, free, "microbatches=2"])).losses();
        for stages in ["grid.stages=2", "grid.stages=3", "grid.stages=6"] {
            assert_eq!(
                as_threads(&tiny(&[&schedule, free, "microbatches=2", stages])).losses(),
                one,
                "{kind} {stages}"
            );
        }
        // Two replicas of one microbatch add up what one replica of two microbatches adds up; the two
        // parts of a tied table in another order.
        let untied = |sets: &[&str]| {
            let fixed = [&schedule[..], free, "model.tie=none"];
            as_threads(&tiny(&[&fixed, sets].concat())).losses()
        };
        assert_eq!(
            untied(&["grid.stages=3", "grid.replicas=2"]),
            untied(&["microbatches=2"]),
            "{kind}, replicas"
        );
    }
}

/// A decoupled run of one stage has no delay: it is plain training too.
#[test]
fn a_synchronous_grid_agrees_with_a_plain_loop() {
    let setup = tiny(&[
        "schedule=1f1b",
        "grid.stages=3",
        "grid.replicas=2",
        "microbatches=2",
        "optimizer.clip=1e9",
        "steps=12",
        "model.tie=none",
    ]);
    let grid = as_threads(&setup).losses();
    let plain = plain_loop(12);
    for (t, (a, b)) in grid.iter().zip(&plain).enumerate() {
        assert!(
            (a / b - 1.0).abs() < 2e-5,
            "step {t}: {a} on the grid, {b} in the loop\n{grid:?}\n{plain:?}"
        );
    }
}

/// One stage with a tied table is plain training of a tied model with one leaf for both uses.
#[test]
fn a_tied_model_on_one_device_is_plain_training() {
    let sets =
        ["optimizer.kind=sgd", "optimizer.clip=1e9", "steps=8", "optimizer.weight_decay=0.0"];
    for tie in ["model.tie=aligned", "model.tie=fresh"] {
        let setup = tiny(&[&sets[..], &[tie]].concat());
        let config = &setup.config;
        let model = Stack::new(&setup.dimensions, 0..setup.dimensions.layers);
        let batches = Batches::new(Arc::clone(&setup.corpus), config.reading());
        let parameters = ouroboros::model::parameters(&setup.dimensions);
        let leaf = |p: &Parameter| initial_tensor(p, config.seed).set_requires_grad(true);
        let mut values: Vec<Tensor> = parameters.iter().map(leaf).collect();
        let mut momenta: Vec<Tensor> = values.iter().map(Tensor::zeros_like).collect();
        let mut losses = Vec::new();
        for t in 0..config.steps {
            let batch = batches.train(t, 0..config.batch).unwrap();
            let weights = model.weights(&values[1..], &values[..1], &values[..1]);
            let hidden = model.forward(&weights, &batch.tokens, &mut Memory::new(0), None).unwrap();
            let loss = plain_loss(&model, &weights, &hidden, &batch.targets);
            losses.push(loss.double_value(&[]));
            let gradients = Tensor::run_backward(&[loss], &values, false, false);
            let lr = ouroboros::optim::learning_rate(&config.optimizer, t, config.steps) as f32;
            values = (values.iter().zip(&mut momenta).zip(&gradients))
                .map(|((w, m), g)| {
                    *m = &*m * 0.9 + g;
                    (w.detach() - &*m * f64::from(lr)).set_requires_grad(true)
                })
                .collect();
        }
        let grid = as_threads(&setup).losses();
        for (t, (a, b)) in grid.iter().zip(&losses).enumerate() {
            assert!((a / b - 1.0).abs() < 1e-6, "step {t}: {a} on the grid, {b} in the loop");
        }
        // It is the tie that is tested: without one the second loss differs already.
        let untied = as_threads(&tiny(&[&sets[..], &["model.tie=none"]].concat())).losses();
        assert!((untied[1] / losses[1] - 1.0).abs() > 1e-5, "{} {}", untied[1], losses[1]);
    }
}

/// The rule of `tie = "head"` written out, with a delay of two at the embedding's stage: losses of the grid against those of
/// a loop that keeps every version and every part.
#[test]
fn a_fresh_head_follows_its_formula() {
    const E: usize = 2;
    let sets = [
        "grid.stages=2",
        "grid.delays=[2, 0]",
        "optimizer.kind=sgd",
        "optimizer.momentum=0.0",
        "optimizer.clip=1e9",
    ];
    let more = [
        "optimizer.weight_decay=0.0",
        "optimizer.schedule=constant",
        "steps=10",
        "sync_at=[6]",
        "model.tie=head",
    ];
    let setup = tiny(&[&sets[..], &more].concat());
    let config = &setup.config;
    let batches = Batches::new(Arc::clone(&setup.corpus), config.reading());
    let model = Stack::new(&setup.dimensions, 0..setup.dimensions.layers);
    let parameters = ouroboros::model::parameters(&setup.dimensions);
    // Behind the table those of the first stage, then those of the last.
    let first = 1 + setup.stack(0).own().len();
    let start = |p: &Parameter| initial_tensor(p, config.seed);
    let mut versions: Vec<Vec<Tensor>> = vec![parameters.iter().map(start).collect()];

    let (mut parts, mut losses): (Vec<Tensor>, Vec<f64>) = (Vec::new(), Vec::new());
    for t in 0..config.steps {
        let sync = if t < 6 { 0 } else { 6 };
        let late = sync.max(t.saturating_sub(E));
        let leaf = |n: usize, i: usize| versions[n][i].copy().set_requires_grad(true);
        let (input, head) = (leaf(late, 0), leaf(t, 0));
        let own: Vec<Tensor> =
            (1..parameters.len()).map(|i| leaf(if i < first { late } else { t }, i)).collect();

        let batch = batches.train(t, 0..config.batch).unwrap();
        let weights = model.weights(&own, &[input.shallow_clone()], &[head.shallow_clone()]);
        let hidden = model.forward(&weights, &batch.tokens, &mut Memory::new(0), None).unwrap();
        let loss = plain_loss(&model, &weights, &hidden, &batch.targets);
        losses.push(loss.double_value(&[]));
        let leaves: Vec<&Tensor> = [&input, &head].into_iter().chain(&own).collect();
        let gradients = Tensor::run_backward(&[&loss], &leaves, false, false);

        parts.push(gradients[0].copy());
        let mut table = gradients[1].copy();
        let last = t + 1 == 6 || t + 1 == config.steps;
        for u in (sync..=t).filter(|u| u + E == t || (last && u + E > t)) {
            table += &parts[u];
        }
        let lr = ouroboros::optim::learning_rate(&config.optimizer, t, config.steps);
        let step = |i: usize| if i == 0 { &table } else { &gradients[i + 1] };
        versions.push((0..parameters.len()).map(|i| &versions[t][i] - step(i) * lr).collect());
    }
    for (t, (a, b)) in as_threads(&setup).losses().iter().zip(&losses).enumerate() {
        assert!((a / b - 1.0).abs() < 1e-6, "step {t}: {a} on the grid, {b} in the loop");
    }
}

/// The whole batch at once, AdamW written with tensor operations in f64.
fn plain_loop(steps: usize) -> Vec<f64> {
    let setup = tiny(&["schedule=1f1b", "optimizer.clip=1e9", "steps=12", "model.tie=none"]);
    let config = &setup.config;
    let batches = Batches::new(Arc::clone(&setup.corpus), config.reading());
    let model = Stack::new(&setup.dimensions, 0..setup.dimensions.layers);
    let mut weights: Vec<Tensor> = model
        .parameters()
        .iter()
        .map(|p| initial_tensor(p, config.seed).set_requires_grad(true))
        .collect();
    let zeros = || weights.iter().map(|w| w.zeros_like().to_kind(Kind::Double)).collect::<Vec<_>>();
    let (mut first, mut second) = (zeros(), zeros());
    let [b1, b2] = config.optimizer.adamw.betas;
    let mut losses = Vec::new();
    for t in 0..steps {
        let batch = batches.train(t, 0..config.batch).unwrap();
        let hidden = model.forward(&weights, &batch.tokens, &mut Memory::new(0), None).unwrap();
        let loss = plain_loss(&model, &weights, &hidden, &batch.targets);
        losses.push(loss.double_value(&[]));
        let gradients = Tensor::run_backward(&[loss], &weights, false, false);
        // The rule of the config by hand: two steps of warm-up, then half a cosine to 0.
        let lr = match t {
            0 | 1 => config.optimizer.common.lr * (t + 1) as f64 / 2.0,
            _ => {
                config.optimizer.common.lr
                    * 0.5
                    * (1.0 + (std::f64::consts::PI * (t - 2) as f64 / 10.0).cos())
            }
        };
        let n = (t + 1) as i32;
        weights = weights
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let (w, g) = (w.detach().to_kind(Kind::Double), gradients[i].to_kind(Kind::Double));
                let decay = if w.dim() >= 2 { config.optimizer.common.weight_decay } else { 0.0 };
                first[i] = &first[i] * b1 + &g * (1.0 - b1);
                second[i] = &second[i] * b2 + &g * &g * (1.0 - b2);
                let mean = &first[i] / (1.0 - b1.powi(n));
                let root = (&second[i] / (1.0 - b2.powi(n))).sqrt() + config.optimizer.adamw.eps;
                let w = &w * (1.0 - lr * decay) - mean / root * lr;
                w.to_kind(Kind::Float).set_requires_grad(true)
            })
            .collect();
    }
    losses
}

/// A 1x1 model whose residual branches are closed (their last matrices are 0), so that its gradient can be written
/// down: hidden states are `e = tokens[x] + positions`, logits `W n(e)` with `n` the normalisation,
/// `dL/dlogits = (softmax - onehot) / N`, `dL/dW = sum dlogits n'`, and `dL/de` is the normalisation's backward.
#[test]
fn a_gradient_computed_by_hand() {
    let setup = tiny(&["model.layers=1", "data.sequence=4", "batch=2", "model.tie=none"]);
    let (d, vocabulary, sequence) = (16, 256, 4);
    let stack = setup.stack(0);
    let layout = Layout::new(stack.parameters());
    let mut flat = layout.initial(5).unwrap();
    for entry in &layout.entries {
        if entry.parameter.name.ends_with("out.weight")
            || entry.parameter.name.ends_with("down.weight")
        {
            slice_mut(&mut flat)[entry.offset..entry.offset + entry.parameter.count()].fill(0.0);
        }
    }
    let value = |name: &str| {
        let entry = layout.entries.iter().find(|entry| entry.parameter.name == name).unwrap();
        slice(&flat)[entry.offset..entry.offset + entry.parameter.count()]
            .iter()
            .map(|v| f64::from(*v))
            .collect::<Vec<f64>>()
    };
    let (tokens, positions, matrix) =
        (value("embedding.tokens"), value("embedding.positions"), value("head.weight"));
    let inputs: [i64; 8] = [3, 7, 3, 250, 7, 7, 0, 12];
    let targets: [i64; 8] = [7, 3, 250, 1, 7, 0, 12, 3];

    let n = inputs.len() as f64;
    let (mut expected_loss, mut d_matrix, mut d_tokens) =
        (0.0, vec![0.0; vocabulary * d], vec![0.0; vocabulary * d]);
    for (i, (x, y)) in inputs.iter().zip(targets).enumerate() {
        let e: Vec<f64> =
            (0..d).map(|c| tokens[*x as usize * d + c] + positions[i % sequence * d + c]).collect();
        let mean = e.iter().sum::<f64>() / d as f64;
        let deviation =
            (e.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64 + 1e-5).sqrt();
        let normal: Vec<f64> = e.iter().map(|v| (v - mean) / deviation).collect();
        let logits: Vec<f64> =
            (0..vocabulary).map(|v| (0..d).map(|c| matrix[v * d + c] * normal[c]).sum()).collect();
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        expected_loss -= (logits[y as usize].exp() / total).ln() / n;
        let mut d_normal = vec![0.0; d];
        for v in 0..vocabulary {
            let d_logit = (logits[v].exp() / total - f64::from(v == y as usize)) / n;
            for c in 0..d {
                d_matrix[v * d + c] += d_logit * normal[c];
                d_normal[c] += d_logit * matrix[v * d + c];
            }
        }
        let (a, b) = (
            d_normal.iter().sum::<f64>(),
            d_normal.iter().zip(&normal).map(|(g, z)| g * z).sum::<f64>(),
        );
        for c in 0..d {
            d_tokens[*x as usize * d + c] +=
                (d_normal[c] - a / d as f64 - normal[c] * b / d as f64) / deviation;
        }
    }

    let place = Place { stage: 0, replica: 0 };
    let versions = Versions::new(layout.clone(), flat.copy(), 1, 1, Kind::Float).unwrap();
    let mut stage = Stage::new(place, stack, Settings::new(&setup.config, Readback::Now));
    let held = Held { own: &versions, table: None };
    let slot = MicrobatchId { step: 0, microbatch: 0 };
    let shaped = |values: &[i64]| Tensor::from_slice(values).view([2, 4]);
    let input = Input {
        x: shaped(&inputs),
        targets: Some(shaped(&targets)),
        restart: true,
        documents: None,
    };
    let output = stage
        .forward(slot, UsedVersions { own: 0, input: None, output: None }, held, input)
        .unwrap();
    let Output::Loss(found) = output else { panic!("the last stage gives a loss") };
    let found = found.now().unwrap();
    assert!((found - expected_loss).abs() < 1e-5, "{found} {expected_loss}");
    assert!(stage.backward(slot, held, None, &mut |_| Ok(())).unwrap().is_none());
    let gradient = slice(versions.gradient(0)).to_vec();
    for (name, expected) in [("head.weight", d_matrix), ("embedding.tokens", d_tokens)] {
        let offset =
            layout.entries.iter().find(|entry| entry.parameter.name == name).unwrap().offset;
        let largest = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for (i, e) in expected.iter().enumerate() {
            let found = f64::from(gradient[offset + i]);
            assert!((found - e).abs() < 2e-5 * largest, "{name}[{i}]: {found}, by hand {e}");
        }
    }
}
