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

/// A parameter: its global name, shape and first values.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    /// Whether it belongs to the table that embedding and head share.
    pub tied: bool,
}

impl Parameter {
    pub(super) fn new(name: String, shape: &[i64], init: Init) -> Parameter {
        Parameter { name, shape: shape.to_vec(), init, tied: false }
    }

    /// Elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Whether weight decay applies: to matrices only.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// Standard deviation of the first values of tables and of the head, as in GPT-2 (Radford et al. 2019).
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
