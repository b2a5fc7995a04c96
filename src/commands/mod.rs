//! The commands besides `train`: each prints its answer.

mod doctor;
mod eval;
mod generate;
mod init;
mod schedule;

pub use doctor::doctor;
pub use eval::eval;
pub use generate::generate;
pub use init::init;
pub use schedule::schedule;
