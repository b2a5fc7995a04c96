//! Against an independent implementation: golden updates of tests/reference/, made in float64 by
//! the definition.

use std::collections::BTreeMap;

use serde::Deserialize;
use tch::Device;

use super::{Common, Optimizer, OptimizerConfig, OptimizerKind, UpdateScalars};
use crate::model::{Init, Parameter, Role};
use crate::number::Number;
use crate::optim::adamw::Lead;
use crate::optim::soap::Sides;
use crate::params::{Layout, UpdateBuffers, slice, slice_mut, zeros};
use crate::precision::Precision;

const UPDATES: usize = 4;

#[derive(Deserialize)]
struct Case {
    name: String,
    kind: OptimizerKind,
    lead: Lead,
    delay: usize,
    sides: Option<Sides>,
    every: Option<usize>,
    limit: Option<usize>,
    parameters: Vec<Shape>,
    weights: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Shape {
    name: String,
    shape: Vec<i64>,
    fused: usize,
}

impl Case {
    fn config(&self) -> OptimizerConfig {
        let common = Common { kind: self.kind, weight_decay: 0.1, clip: None, ..Common::default() };
        let mut config = OptimizerConfig::of(common);
        config.adamw.eps = 0.05;
        config.adamw.lead = Some(self.lead);
        config.soap.soap_sides = self.sides.unwrap_or(Sides::Both);
        config.soap.soap_every = self.every.unwrap_or(1);
        config.soap.soap_limit = self.limit.unwrap_or(1);
        config
    }

    fn layout(&self) -> Layout {
        let parameter = |Shape { name, shape, fused }: &Shape| {
            let role = if shape.len() == 1 { Role::Vector } else { Role::Matrix };
            let (name, shape) = (name.clone(), shape.clone());
            Parameter { name, shape, init: Init::Zeros, role, tied: false, fused: *fused }
        };
        Layout::new(&self.parameters.iter().map(parameter).collect::<Vec<_>>())
    }
}

/// The formula that the script takes its weights and gradients from.
fn fill(layout: &Layout, values: &mut [f32], seed: impl Fn(f64) -> f64, scale: f64) {
    for (i, entry) in layout.entries.iter().enumerate() {
        for n in 0..entry.parameter.count() {
            let x = n as f64;
            values[entry.offset + n] =
                (scale * (seed(i as f64) + 12.9898 * x + 0.37 * x * x).sin()) as f32;
        }
    }
}

#[test]
fn updates_of_whole_matrices_by_the_definition() {
    let cases: Vec<Case> =
        serde_json::from_str(include_str!("../../tests/reference/optimizers.json")).unwrap();
    for case in cases {
        let (config, layout) = (case.config(), case.layout());
        let mut optimizer =
            Optimizer::new(&config, &layout, case.delay, Precision::F32, 1, Device::Cpu).unwrap();
        let mut weights = zeros(layout.len, Device::Cpu).unwrap();
        fill(&layout, slice_mut(&mut weights), |i| 0.5 * i, 1.0);

        for n in 1..=UPDATES {
            let mut gradient = zeros(layout.len, Device::Cpu).unwrap();
            let scale = if n == 2 { -0.5 } else { 1.0 };
            fill(&layout, slice_mut(&mut gradient), |i| 100.0 * n as f64 + i, 4.0 * scale);
            let scalars = UpdateScalars { lr: 0.02, mean: 0.25, norm: &Number::Known(1.0) };
            let buffers = UpdateBuffers {
                old: None,
                new: &mut weights,
                published: None,
                gradient: &mut gradient,
            };

            optimizer.update(buffers, &scalars).unwrap();
        }

        for entry in &layout.entries {
            let name = &entry.parameter.name;
            for (n, expected) in case.weights[name].iter().enumerate() {
                let found = f64::from(slice(&weights)[entry.offset + n]);
                assert!(
                    (found - expected).abs() < 3e-6,
                    "{}, {name}[{n}]: {found}, not {expected}",
                    case.name
                );
            }
        }
    }
}
