//! How a run ended, in words and figures.

use std::path::PathBuf;

use super::{quality, thousands};
use crate::memory::Prediction;
use crate::setup::Setup;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Mean over the last tenth of the steps.
    pub loss: f64,
    pub eval_loss: Option<f64>,
    /// Tokens over the median time of a step.
    pub tokens_per_s: f64,
    /// None of a run that only measures.
    pub checkpoint: Option<PathBuf>,
    /// The run was stopped before its end, and has saved.
    pub stopped: bool,
}

impl Summary {
    /// Prints it.
    pub fn print(&self, setup: &Setup) {
        say!("");
        let measure = setup.corpus.measure();
        say!("loss (last tenth)   {:.4} nats per {}", self.loss, measure.unit.name());
        if let Some(eval) = self.eval_loss {
            say!("held-out loss       {eval:.4} nats, {}", quality(eval, measure));
        }

        if let Some(floor) = setup.corpus.held_out.floor {
            let best = self.eval_loss.unwrap_or(self.loss);
            say!(
                "entropy floor       {floor:.4} nats per byte; the loss is {:.1} % above it",
                (best / floor - 1.0) * 100.0
            );
        }

        let steps = setup.config.steps;
        for (source, given) in
            setup.corpus.sources.iter().zip(setup.given(steps).unwrap_or_default())
        {
            let epochs = given as f64 / setup.epoch(source).1 as f64;
            let (name, given) = (&source.name, thousands(given as u64));
            say!("source              {name}: {given} tokens, {epochs:.2} epochs");
        }

        say!("tokens/s            {}", thousands(self.tokens_per_s as u64));
        if let Some(checkpoint) = &self.checkpoint {
            say!("weights             {}", checkpoint.display());
        }
    }
}

/// Prints what was predicted of every rank's memory beside its measured peak, bytes; `shared` says
/// that the ranks are threads of one process, so that only their sum can be measured.
pub fn print_memory(setup: &Setup, peaks: &[(usize, Option<u64>)], shared: bool) {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    // A GPU does not hold what the host writes, but its libraries.
    let last = if setup.device.is_cuda() { "libraries" } else { "saving" };
    say!(
        "\npeak memory, MiB       weights  gradient  optimizer  activations  transient  holes  {last:>6}  predicted  measured"
    );

    let mut total = 0;
    for (rank, peak) in peaks {
        let p = Prediction::new(setup, *rank);
        let p = if setup.device.is_cuda() { Prediction { saving: 0, ..p } } else { p };
        total += p.total();
        let measured = peak.map_or("-".to_owned(), mib);
        say!(
            "{:<21} {:>8} {:>9} {:>10} {:>12} {:>10} {:>6} {:>width$} {:>10} {measured:>9}",
            setup.grid.name(*rank),
            mib(p.weights),
            mib(p.gradient),
            mib(p.optimizer),
            mib(p.activations),
            mib(p.transient),
            mib(p.holes),
            mib(p.saving + p.libraries),
            mib(p.total()),
            width = last.len().max(6) + 1,
        );
    }

    if shared {
        say!(
            "ranks are threads of one process, so each shows the peak of all: {} predicted",
            mib(total)
        );
    }
}
