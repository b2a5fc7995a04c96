//! Where the coordinator tells what happens: the files of the run's folder, the terminal.

use std::path::Path;

use crate::config::SinkKind;
use crate::error::{Error, Result};
use crate::metrics::{EventLog, JsonLines, PlacesFile, Progress, Prometheus, Sink, TensorBoard};
use crate::setup::Setup;

/// A sink, and whether a run that cannot write it has failed.
struct Told {
    needed: bool,
    sink: Box<dyn Sink + Send>,
}

/// All sinks of a run.
pub struct Sinks(Vec<Told>);

impl Sinks {
    /// Those of the config, and the files that every run has.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`, where the metrics cannot be written; another sink is left out.
    pub fn begin(setup: &Setup, out: &Path) -> Result<Sinks> {
        let (config, start) = (&setup.config, setup.start());
        let resumed = setup.resumed.as_ref().map(|_| start);
        let mut sinks = Vec::new();
        if config.sink.contains(&SinkKind::Jsonl) {
            sinks.push(Told { needed: true, sink: boxed(JsonLines::begin(out, resumed)?) });
        } else if resumed.is_none() {
            JsonLines::put_aside(out)?;
        }

        // Without a file that is looked at, the training is the same.
        let mut add = |begun: Result<Box<dyn Sink + Send>>| match begun {
            Ok(sink) => sinks.push(Told { needed: false, sink }),
            Err(error) => leave_out(error),
        };
        add(Ok(boxed(PlacesFile::begin(out, resumed.is_some()))));
        add(EventLog::begin(out, resumed.is_some()).map(boxed));
        for kind in &config.sink {
            match kind {
                SinkKind::Jsonl => {}
                SinkKind::Terminal => {
                    add(Ok(boxed(Progress::new(config.steps, start, setup.corpus.measure()))));
                }
                SinkKind::Tensorboard => {
                    add(TensorBoard::begin(out, resumed, &config.settings()).map(boxed));
                }
                SinkKind::Prometheus => add(Prometheus::begin(out, config.steps).map(boxed)),
            }
        }

        Ok(Sinks(sinks))
    }

    /// Tells all sinks. One that fails and is not needed is left out from then on.
    pub fn tell(&mut self, say: impl Fn(&mut dyn Sink) -> Result<()>) -> Result<()> {
        let (mut kept, mut failed) = (Vec::with_capacity(self.0.len()), None);
        for mut told in std::mem::take(&mut self.0) {
            match say(told.sink.as_mut()) {
                Ok(()) => kept.push(told),
                // The others hear how the run ends.
                Err(error) if told.needed => failed = failed.or(Some(error)),
                Err(error) => leave_out(error),
            }
        }

        self.0 = kept;
        failed.map_or(Ok(()), Err)
    }
}

/// Says that a run goes on without a file.
fn leave_out(error: Error) {
    match error {
        Error::Unwritten { path, problem } => {
            complain!("note: {path} cannot be written ({problem}); the run goes on without it");
        }
        error => complain!("note: {error}; the run goes on without it"),
    }
}

fn boxed(sink: impl Sink + Send + 'static) -> Box<dyn Sink + Send> {
    Box::new(sink)
}
