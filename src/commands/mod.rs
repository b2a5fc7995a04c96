//! The commands besides `train`: each prints its answer.

mod config;
mod doctor;
mod eval;
mod for_shells;
mod generate;
mod init;
mod schedule;

pub use config::config;
pub use doctor::doctor;
pub use eval::eval;
pub use for_shells::{completions, man};
pub use generate::generate;
pub use init::init;
pub use schedule::schedule;
