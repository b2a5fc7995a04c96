//! `metrics.prom` in the run's folder, in Prometheus' text format: for the textfile collector of its
//! node exporter, or anything that scrapes files. It is replaced whole, every few seconds.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prometheus::{Encoder, Gauge, GaugeVec, Opts, Registry, TextEncoder};

use super::{EvalLine, EventKind, EventLine, PlaceLine, Sink, StalenessLine, StepLine, wall_time};
use crate::clock::{TimeKind, Times};
use crate::error::{Error, Result};
use crate::files;

/// Between two files.
const EVERY: Duration = Duration::from_secs(2);

/// What is told of a run.
pub struct Prometheus {
    path: PathBuf,
    registry: Registry,
    run: Gauges,
    norm: GaugeVec,
    /// By stage, replica and kind; by stage and replica.
    share: GaugeVec,
    memory: GaugeVec,
    /// By stage: of measured staleness.
    age: GaugeVec,
    distance: GaugeVec,
    /// When the file was last written.
    written: Option<Instant>,
}

/// Numbers of the whole run.
struct Gauges {
    step: Gauge,
    tokens: Gauge,
    loss: Gauge,
    rate: Gauge,
    tokens_per_s: Gauge,
    step_s: Gauge,
    eval_loss: Gauge,
    eval_bpb: Gauge,
    updated: Gauge,
}

impl Prometheus {
    /// Of a run of `steps` steps, in its folder, whose name tells it from other runs of one config.
    ///
    /// # Errors
    /// [`Error::Internal`] if a name is no name to Prometheus.
    pub fn begin(out: &Path, steps: usize) -> Result<Prometheus> {
        let name = files::name(out);
        Prometheus::new(out, &name, steps).map_err(|error| Error::Internal(error.to_string()))
    }

    fn new(out: &Path, name: &str, steps: usize) -> prometheus::Result<Prometheus> {
        let registry = Registry::new();
        let about = |metric: &str, help: &str| {
            Opts::new(format!("ouroboros_{metric}"), help).const_label("run", name)
        };
        let gauge = |metric: &str, help: &str| -> prometheus::Result<Gauge> {
            let gauge = Gauge::with_opts(about(metric, help))?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };

        gauge("steps", "Steps of the whole run.")?.set(steps as f64);
        let run = Gauges {
            step: gauge("step", "Updates that are made.")?,
            tokens: gauge("tokens", "Tokens that are read.")?,
            loss: gauge("loss", "Mean loss of the last step, nats per token.")?,
            rate: gauge("learning_rate", "Learning rate of the last step.")?,
            tokens_per_s: gauge("tokens_per_second", "Tokens a second in the last step.")?,
            step_s: gauge("step_seconds", "Seconds of the last step.")?,
            eval_loss: gauge("eval_loss", "Held-out loss, nats per token.")?,
            eval_bpb: gauge("eval_bits_per_byte", "Held-out loss, bits per byte of the text.")?,
            updated: gauge("updated_timestamp_seconds", "When this was written, since 1970.")?,
        };
        for unknown in [&run.loss, &run.eval_loss, &run.eval_bpb] {
            unknown.set(f64::NAN);
        }

        let norm = about("gradient_norm", "Norm of the gradient before clipping, by stage.");
        let norm = GaugeVec::new(norm, &["stage"])?;
        let share = about("time_share", "Share of a rank's time lately, by what it was spent on.");
        let share = GaugeVec::new(share, &["stage", "replica", "kind"])?;
        let memory = about("resident_bytes", "Resident memory of a rank.");
        let memory = GaugeVec::new(memory, &["stage", "replica"])?;
        let age =
            about("gradient_age_updates", "Updates that the applied gradient is old, by stage.");
        let age = GaugeVec::new(age, &["stage"])?;
        let distance = about(
            "weights_distance_relative",
            "Distance between the weights of the applied gradient and those it is applied to, over their norm.",
        );
        let distance = GaugeVec::new(distance, &["stage"])?;
        for family in [&norm, &share, &memory, &age, &distance] {
            registry.register(Box::new(family.clone()))?;
        }

        let path = out.join("metrics.prom");
        let written = None;
        Ok(Prometheus { path, registry, run, norm, share, memory, age, distance, written })
    }

    fn write(&mut self) -> Result<()> {
        self.written = Some(Instant::now());
        self.run.updated.set(wall_time());

        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .map_err(|error| Error::Internal(error.to_string()))?;
        files::replace(&self.path, &text).map_err(|error| Error::unwritten(&self.path, error))
    }

    /// Before the first step of this process there is nothing to tell but what the file says.
    fn write_if_due(&mut self) -> Result<()> {
        match self.written {
            _ if self.run.step.get() == 0.0 => Ok(()),
            Some(written) if written.elapsed() < EVERY => Ok(()),
            _ => self.write(),
        }
    }
}

impl Sink for Prometheus {
    fn step(&mut self, line: &StepLine) -> Result<()> {
        let run = &self.run;
        run.step.set(line.step as f64);
        run.tokens.set(line.tokens as f64);
        run.loss.set(line.loss);
        run.rate.set(line.lr);
        run.tokens_per_s.set(line.tokens_per_s);
        run.step_s.set(line.step_s);
        for (stage, norm) in line.grad_norm.iter().enumerate() {
            self.norm.with_label_values(&[&stage.to_string()]).set(*norm);
        }
        if let Some(norm) = line.table_norm {
            self.norm.with_label_values(&["table"]).set(norm);
        }
        self.write_if_due()
    }

    fn eval(&mut self, line: &EvalLine) -> Result<()> {
        self.run.eval_loss.set(line.eval_loss);
        line.eval_bpb.into_iter().for_each(|bits| self.run.eval_bpb.set(bits));
        self.write_if_due()
    }

    fn staleness(&mut self, line: &StalenessLine) -> Result<()> {
        for of in &line.staleness {
            let stage = of.stage.as_str().map_or_else(|| of.stage.to_string(), str::to_owned);
            let set = |family: &GaugeVec, value: Option<f64>| {
                value.into_iter().for_each(|value| family.with_label_values(&[&stage]).set(value));
            };
            set(&self.age, of.measured.age.map(|age| age as f64));
            set(&self.distance, of.measured.relative);
        }
        self.write_if_due()
    }

    fn place(&mut self, line: &PlaceLine) -> Result<()> {
        let (stage, replica) = (stages(line.times), line.replica.to_string());
        for (kind, word) in TimeKind::ALL {
            let share = line.times.shares[kind as usize] / line.times.seconds;
            self.share.with_label_values(&[&stage[..], &replica, word]).set(share);
        }
        if let Some(bytes) = line.memory {
            self.memory.with_label_values(&[&stage, &replica]).set(bytes as f64);
        }
        self.write_if_due()
    }

    /// A run that fails leaves its last values.
    fn event(&mut self, line: &EventLine) -> Result<()> {
        if line.kind == EventKind::Fault { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<()> {
        if self.run.step.get() == 0.0 { Ok(()) } else { self.write() }
    }
}

/// The stages of a rank: one, or on the first device of a ring two.
fn stages(times: &Times) -> String {
    let stages: Vec<String> = times.stages.iter().map(|of| of.stage.to_string()).collect();
    stages.join("+")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_says_what_the_run_is_at() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a \"run\"");
        std::fs::create_dir(&out).unwrap();
        let mut sink = Prometheus::begin(&out, 9).unwrap();
        let line = StepLine {
            step: 3,
            loss: 2.5,
            lr: 0.1,
            tokens: 24,
            step_s: 0.5,
            tokens_per_s: 16.0,
            grad_norm: &[1.0, 2.0],
            table_norm: Some(4.0),
            source_tokens: None,
            time: 1.0,
        };
        sink.step(&line).unwrap();
        sink.step(&StepLine { step: 4, ..line }).unwrap();
        let text = || std::fs::read_to_string(out.join("metrics.prom")).unwrap();
        // The second comes too soon after the first.
        assert!(text().contains("ouroboros_step{run=\"a \\\"run\\\"\"} 3\n"), "{}", text());
        assert!(text().contains("ouroboros_gradient_norm{run=\"a \\\"run\\\"\",stage=\"1\"} 2\n"));
        assert!(text().contains("stage=\"table\"} 4\n") && text().contains("} NaN\n"));
        sink.finish().unwrap();
        assert!(text().contains("ouroboros_step{run=\"a \\\"run\\\"\"} 4\n"), "{}", text());
    }
}
