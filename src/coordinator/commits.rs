//! The saved states of a run: completed once all places have written their parts, and kept or
//! removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::checkpoint::{self, Manifest, Shard, Written};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::setup::Setup;

/// The places that have written their parts of a state, and the files.
#[derive(Default)]
struct Saving {
    places: BTreeSet<Place>,
    files: Vec<Shard>,
    /// Of the slowest place: seconds.
    copy_s: f64,
    write_s: f64,
}

/// The states of a run.
pub struct Commits {
    setup: Arc<Setup>,
    out: PathBuf,
    /// By the step that is saved.
    saving: BTreeMap<usize, Saving>,
    longest: Duration,
    /// Of the next state.
    serial: u64,
    /// Those that are kept, by their steps.
    kept: Vec<usize>,
    newest: Option<PathBuf>,
}

impl Commits {
    /// Removes what an interrupted save has left in the run's folder.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out` if that cannot be done.
    pub fn begin(setup: Arc<Setup>, out: &Path) -> Result<Commits> {
        checkpoint::clear(out).map_err(|error| {
            Error::config("--out", out.display(), format!("cannot be cleared ({error})"))
        })?;

        let kept = if setup.resumed.is_some() {
            checkpoint::steps(out, setup.start())
        } else {
            Vec::new()
        };

        let (saving, longest) = (BTreeMap::new(), Duration::ZERO);
        let serial = checkpoint::next_serial(out);
        Ok(Commits { setup, out: out.to_owned(), saving, longest, serial, kept, newest: None })
    }

    /// How long the slowest save has taken.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// The newest complete state of this run.
    pub fn newest(&self) -> Option<PathBuf> {
        self.newest.clone()
    }

    /// A place has written its part; what to tell the user if that completes the state.
    ///
    /// # Errors
    /// [`Error::Unwritten`] if it cannot be completed.
    pub fn saved(&mut self, place: Place, step: usize, written: Written) -> Result<Option<String>> {
        let saving = self.saving.entry(step).or_default();
        saving.places.insert(place);
        saving.files.extend(written.shards);
        saving.copy_s = saving.copy_s.max(written.copy_s);
        saving.write_s = saving.write_s.max(written.write_s);
        if saving.places.len() < self.setup.grid.places().count() {
            return Ok(None);
        }

        let Some(Saving { mut files, copy_s, write_s, .. }) = self.saving.remove(&step) else {
            return Ok(None);
        };

        self.longest = self.longest.max(Duration::from_secs_f64(copy_s + write_s));
        files.sort_by(|a, b| (&a.kind, a.stage, &a.file).cmp(&(&b.kind, b.stage, &b.file)));
        let mib = files.iter().map(|file| file.bytes).sum::<u64>() as f64 / f64::from(1 << 20);
        let pipeline = self.setup.pipeline(self.setup.schedule.since(step));
        let Setup { config, corpus, .. } = &*self.setup;
        let mut manifest = Manifest::new(
            config,
            Some(corpus.fingerprint().clone()),
            self.setup.parameters(),
            step,
            pipeline,
            files,
        );
        manifest.serial = self.serial;
        self.serial = self.serial.saturating_add(1);
        self.newest =
            Some(checkpoint::complete(&self.out, &manifest, &self.setup.corpus.vocabulary)?);
        self.kept.push(step);
        checkpoint::prune(&self.out, &mut self.kept, &self.setup.config.checkpoint);
        Ok(Some(format!(
            "step {step:>6}  saved {mib:.1} MiB: {copy_s:.3} s to copy, {write_s:.3} s to write beside the training"
        )))
    }
}

/// Refuses a disk that has no room for the states of a run: one that is kept, and one that is
/// written.
///
/// # Errors
/// [`Error::Config`] about `--out`.
pub fn check_room(setup: &Setup, out: &Path) -> Result<()> {
    let needed = setup.two_states();
    match checkpoint::room(out) {
        Some(left) if left < needed => {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let found = format!("{} with {} MiB left on its disk", out.display(), mib(left));
            Err(Error::config(
                "--out",
                found,
                format!("two states of the run need {} MiB", mib(needed)),
            ))
        }
        _ => Ok(()),
    }
}
