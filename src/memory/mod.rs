//! The memory of a rank: what is predicted of it, what is measured, and what it may have.

mod check;
mod gauge;
mod limits;
mod prediction;

pub use check::{check, check_gpu, check_gpu_size};
pub use gauge::{Gauge, resident};
pub use limits::control_group;
pub use prediction::Prediction;
