//! Against an independent implementation: golden values of tests/reference/, made in float64 by the definition.

use ouroboros::model::{Arch, Dimensions, Memory, ModelConfig, Norm, Stack};
use ouroboros::schedule::Tie;
use serde::Deserialize;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

#[derive(Deserialize)]
struct Case {
    name: String,
    memory: usize,
    pre: bool,
    clamp: Option<usize>,
    same_length: usize,
    d_head: usize,
    output: Vec<f64>,
    input_gradient: Vec<f64>,
    gradients: BTreeMap<String, Vec<f64>>,
}

const B: i64 = 2;
const T: i64 = 4;
const D: i64 = 8;

/// The formula that the script takes its weights and inputs from.
fn values(seed: f64, shape: &[i64], kind: Kind) -> Tensor {
    let count = shape.iter().product::<i64>();
    let data: Vec<f64> = (0..count).map(|n| 0.4 * (seed + 12.9898 * n as f64).sin()).collect();
    Tensor::from_slice(&data).view(shape).to_kind(kind)
}

/// Largest difference, as a share of the largest value.
fn distance(found: &Tensor, expected: &[f64]) -> f64 {
    let found: Vec<f64> = Vec::try_from(found.to_kind(Kind::Double).view([-1])).unwrap();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |a, v| a.max(v.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn a_transformer_xl_layer_is_what_its_definition_says() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../reference/transformer_xl.json")).unwrap();
    assert_eq!(cases.len(), 6);
    for (kind, bound) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
        for (number, case) in cases.iter().enumerate() {
            let config = ModelConfig {
                arch: Arch::TransformerXl,
                layers: 3,
                d_model: D as usize,
                heads: 2,
                d_head: Some(case.d_head),
                d_ff: 12,
                tie: Tie::Untied,
                mem_len: if case.same_length > 0 { case.same_length } else { case.memory },
                clamp_len: case.clamp,
                same_length: case.same_length > 0,
                norm: Some(if case.pre { Norm::Pre } else { Norm::Post }),
                ..ModelConfig::default()
            };
            // The middle layer of three: no embedding, no head.
            let stack = Stack::new(&Dimensions::new(&config, 5, T as usize), 1..2);
            let number = number as f64;
            let leaf = |seed, shape: &[i64]| values(seed, shape, kind).set_requires_grad(true);
            let shapes = stack.parameters().iter().enumerate();
            let weights: Vec<Tensor> =
                shapes.map(|(n, p)| leaf(1.0 + n as f64 + 0.1 * number, &p.shape)).collect();
            let x = leaf(0.3 + number, &[B, T, D]);
            // What a layer remembers is its last input.
            let mut memory = Memory::new(config.mem_len);
            if case.memory > 0 {
                let before = values(0.7 + number, &[B, case.memory as i64, D], kind);
                let _ =
                    tch::no_grad(|| stack.forward(&weights, &before, &mut memory, None)).unwrap();
            }
            let y = stack.forward(&weights, &x, &mut memory, None).unwrap();
            (&y * values(0.9 + number, &[B, T, D], kind)).sum(kind).backward();
            let check = |what: &str, found: &Tensor, expected: &[f64]| {
                let far = distance(found, expected);
                assert!(far < bound, "{}, {what}: {far:e} in {kind:?}", case.name);
            };
            check("output", &y, &case.output);
            check("gradient of the input", &x.grad(), &case.input_gradient);
            for (parameter, weight) in stack.parameters().iter().zip(&weights) {
                let name = parameter.name.strip_prefix("layers.1.").unwrap();
                check(name, &weight.grad(), &case.gradients[name]);
            }
        }
    }
}
