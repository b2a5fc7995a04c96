//! A parameter: its name, shape and first values.

use crate::random;

/// How a parameter begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
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
    /// How many matrices of as many rows it is, one below the other: 1, or those of one product for queries, keys and values.
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

/// Parameters of a layer by their short names: matrices, and vectors where the shape has one dimension.
pub(super) fn named(layer: &str, shapes: &[(&str, &[i64], Init)]) -> Vec<Parameter> {
    let parameter = |(short, shape, init): &(&str, &[i64], Init)| {
        let role = if shape.len() == 1 { Role::Vector } else { Role::Matrix };
        Parameter::new(format!("{layer}.{short}"), shape, *init, role)
    };
    shapes.iter().map(parameter).collect()
}

/// Says of one of these parameters, by its short name, that it is so many matrices.
pub(super) fn fused(mut parameters: Vec<Parameter>, short: &str, matrices: usize) -> Vec<Parameter> {
    let of_name = parameters.iter_mut().filter(|parameter| parameter.name.ends_with(short));
    of_name.for_each(|parameter| parameter.fused = matrices);
    parameters
}

/// Standard deviation of the first values of the head, and of tables unless it is said, as in GPT-2 (Radford et al. 2019).
pub(super) const TABLE_STD: f64 = 0.02;

/// Standard deviation of the first values of a layer's matrices: `sqrt(2 / (5 D))`, the "small init" of Nguyen and
/// Salazar 2019. It is GPT-2's 0.02 at D = 1000, and learns faster where D is small.
pub(super) fn matrix_std(d_model: i64) -> f64 {
    (2.0 / (5.0 * d_model as f64)).sqrt()
}

/// The first values of a parameter: a pure function of the seed and the name.
pub fn initial(parameter: &Parameter, seed: u64) -> Vec<f32> {
    match parameter.init {
        Init::Zeros => vec![0.0; parameter.count()],
        Init::Ones => vec![1.0; parameter.count()],
        Init::Normal(std) => {
            let mut values = random::normal(seed, &parameter.name, parameter.count());
            values.iter_mut().for_each(|v| *v *= std as f32);
            values
        }
    }
}
