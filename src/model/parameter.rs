//! A parameter: its name, shape and first values.

use super::config::InitKind;
use tch::Tensor;

use crate::random;

/// How a parameter begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Normal with mean 1 and this standard deviation.
    NormalAroundOne(f64),
}

/// What a parameter is in the model: optimizers and weight decay go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Rows that are looked up: of tokens, of positions, and what makes them as wide as the model.
    Table,
    /// What makes logits, where that is no tied table.
    Head,
    /// A matrix of the layers between them.
    Matrix,
    /// A bias, or the weights of a normalisation.
    Vector,
}

impl Role {
    /// Whether weight decay applies: to matrices of any kind.
    pub fn decays(self) -> bool {
        self != Role::Vector
    }
}

/// A parameter: its global name, shape, first values and role.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    pub role: Role,
    /// Whether it belongs to the table that embedding and head share.
    pub tied: bool,
    /// How many matrices of as many rows it is, one below the other: 1, or those of one product for
    /// queries, keys and values.
    pub fused: usize,
}

impl Parameter {
    pub(super) fn new(name: String, shape: &[i64], init: Init, role: Role) -> Parameter {
        Parameter { name, shape: shape.to_vec(), init, role, tied: false, fused: 1 }
    }

    /// A bias, or the weights of a normalisation.
    pub(super) fn vector(name: String, length: i64, init: Init) -> Parameter {
        Parameter::new(name, &[length], init, Role::Vector)
    }

    /// Elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// Parameters of a layer by their short names: matrices, and vectors where the shape has one
/// dimension.
pub(super) fn named(layer: &str, shapes: &[(&str, &[i64], Init)]) -> Vec<Parameter> {
    let parameter = |(short, shape, init): &(&str, &[i64], Init)| {
        let role = if shape.len() == 1 { Role::Vector } else { Role::Matrix };
        Parameter::new(format!("{layer}.{short}"), shape, *init, role)
    };
    shapes.iter().map(parameter).collect()
}

/// Says of one of these parameters, by its short name, that it is so many matrices.
pub(super) fn fused(
    mut parameters: Vec<Parameter>,
    short: &str,
    matrices: usize,
) -> Vec<Parameter> {
    let of_name = parameters.iter_mut().filter(|parameter| parameter.name.ends_with(short));
    of_name.for_each(|parameter| parameter.fused = matrices);
    parameters
}

/// Standard deviation of the first values of the head, and of tables unless it is said, as in GPT-2
/// (Radford et al. 2019).
pub(super) const TABLE_STD: f64 = 0.02;

/// Standard deviation of the first values of a layer's matrices: `sqrt(2 / (5 D))`, the "small
/// init" of Nguyen and Salazar 2019. It is GPT-2's 0.02 at D = 1000, and learns faster where D is
/// small.
fn matrix_std(d_model: i64) -> f64 {
    (2.0 / (5.0 * d_model as f64)).sqrt()
}

/// How the parameters of the layers, the head and narrow tables begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct FirstValues {
    pub matrix: Init,
    /// Of matrices that end a residual branch.
    pub residual: Init,
    /// Of a normalisation's weights.
    pub norm: Init,
    /// Of the biases in a Transformer-XL's attention.
    pub attention_bias: Init,
    /// Of the head's rows.
    pub head: Init,
    /// Of what makes narrow rows as wide as the model; none: by their width.
    pub projection: Option<Init>,
}

impl FirstValues {
    /// Of a config's `init`.
    pub fn new(init: InitKind, std: f64, d_model: i64, layers: usize) -> FirstValues {
        match init {
            // Matrices that end a residual branch begin smaller by sqrt(2 L), as in GPT-2.
            InitKind::Scaled => FirstValues {
                matrix: Init::Normal(matrix_std(d_model)),
                residual: Init::Normal(matrix_std(d_model) / (2.0 * layers as f64).sqrt()),
                norm: Init::Ones,
                attention_bias: Init::Zeros,
                head: Init::Normal(TABLE_STD),
                projection: None,
            },
            InitKind::Normal => FirstValues {
                matrix: Init::Normal(std),
                residual: Init::Normal(std),
                norm: Init::NormalAroundOne(std),
                attention_bias: Init::Normal(std),
                head: Init::Normal(std),
                projection: Some(Init::Normal(PROJECTION_STD)),
            },
        }
    }
}

/// Standard deviation of projections under `init = "normal"`: `proj_init_std` of the public
/// Transformer-XL.
const PROJECTION_STD: f64 = 0.01;

/// Fills `values` with the first ones of a parameter: a pure function of the seed and the name.
pub fn initial(parameter: &Parameter, seed: u64, values: &mut [f32]) {
    let drawn = values.iter_mut().zip(random::normal(seed, &parameter.name));
    match parameter.init {
        Init::Zeros => values.fill(0.0),
        Init::Ones => values.fill(1.0),
        Init::Normal(std) => drawn.for_each(|(value, x)| *value = x * std as f32),
        Init::NormalAroundOne(std) => drawn.for_each(|(value, x)| *value = 1.0 + x * std as f32),
    }
}

/// The first values of a parameter as a tensor of its shape, for models without flat buffers.
pub fn initial_tensor(parameter: &Parameter, seed: u64) -> Tensor {
    let mut values = vec![0.0; parameter.count()];
    initial(parameter, seed, &mut values);
    Tensor::from_slice(&values).view(&parameter.shape[..])
}

#[cfg(test)]
mod tests {
    use super::super::{Arch, Dimensions, ModelConfig, Stack};
    use super::*;
    use crate::schedule::Tie;

    /// Mean and standard deviation of a parameter's first values.
    fn moments(parameters: &[Parameter], name: &str) -> (f64, f64) {
        let parameter = parameters.iter().find(|parameter| parameter.name == name).unwrap();
        let mut values = vec![0.0; parameter.count()];
        initial(parameter, 3, &mut values);
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>()
            / values.len() as f64;
        (mean, variance.sqrt())
    }

    /// The public Transformer-XL: everything normal with `init_std`, normalisations around 1,
    /// projections by one of their own.
    #[test]
    fn first_values_are_those_that_are_asked_for() {
        let config = |init, init_std| ModelConfig {
            arch: Arch::TransformerXl,
            d_model: 256,
            tie: Tie::Untied,
            cutoffs: vec![100],
            div_val: 2,
            init,
            init_std,
            ..ModelConfig::default()
        };
        let parameters = |config: &ModelConfig| {
            let d = Dimensions::new(config, 300, 4);
            Stack::new(&d, 0..d.layers).parameters().to_vec()
        };
        let published = parameters(&config(InitKind::Normal, Some(0.03)));
        for (name, mean, std) in [
            ("layers.0.attention.out.weight", 0.0, 0.03),
            ("layers.1.mlp.up.weight", 0.0, 0.03),
            ("layers.0.attention.content_bias", 0.0, 0.03),
            ("layers.0.norm1.weight", 1.0, 0.03),
            ("layers.0.norm1.bias", 0.0, 0.0),
            ("embedding.projection.1", 0.0, 0.01),
            ("head.projection.1", 0.0, 0.01),
            ("head.weight.0", 0.0, 0.03),
        ] {
            let (found_mean, found_std) = moments(&published, name);
            assert!(
                (found_mean - mean).abs() < 0.01 && (found_std - std).abs() <= 0.1 * std,
                "{name}: {found_mean} {found_std}"
            );
        }
        let scaled = parameters(&config(InitKind::Scaled, None));
        assert_eq!(moments(&scaled, "layers.0.norm1.weight"), (1.0, 0.0));
        let (_, out) = moments(&scaled, "layers.0.attention.out.weight");
        assert!((out / (matrix_std(256) / 8f64.sqrt()) - 1.0).abs() < 0.05, "{out}");
    }
}
