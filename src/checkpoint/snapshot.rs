//! The state of a place at a sync point, copied so that training can go on, and its way to the
//! disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::file::Content;
use super::{Shard, ShardKind, Written, folder, older, part, room};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::optim::Optimizer;
use crate::params::{Entry, Layout, append};

/// A flat buffer that all replicas of a stage hold alike, so that one of them saves it: they share
/// the buffers out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SavedBuffer {
    Weights,
    /// The n-th buffer of the optimizer's state.
    State(usize),
    /// Weights of earlier versions.
    Older,
}

impl SavedBuffer {
    /// The replica of so many that saves it.
    pub fn writer(self, replicas: usize) -> usize {
        match self {
            SavedBuffer::Weights => 0,
            SavedBuffer::State(number) => (1 + number) % replicas,
            SavedBuffer::Older => replicas - 1,
        }
    }
}

/// A copy of what a place has to save.
pub struct Snapshot {
    pub place: Place,
    pub step: usize,
    replicas: usize,
    contents: BTreeMap<ShardKind, Content>,
    /// A fault on purpose.
    disk_is_full: bool,
}

impl Snapshot {
    /// Nothing yet, of a place of `replicas` that share the files out.
    pub fn new(place: Place, step: usize, replicas: usize) -> Snapshot {
        Snapshot { place, step, replicas, contents: BTreeMap::new(), disk_is_full: false }
    }

    fn writes(&self, buffer: SavedBuffer) -> bool {
        buffer.writer(self.replicas) == self.place.replica
    }

    /// Copies a flat buffer with its layout.
    fn copy<'a>(&mut self, kind: ShardKind, layout: &'a Layout, flat: &Tensor) -> Result<()> {
        let named = |entry: &'a Entry| (entry.parameter.name.clone(), &entry.parameter.shape[..]);
        let tensors: Vec<_> = layout.entries.iter().map(named).collect();
        let mut pinned = None;
        self.contents.entry(kind).or_default().add(&tensors, |number, memory| {
            let Entry { parameter, offset } = &layout.entries[number];
            append(flat, *offset..offset + parameter.count(), memory, &mut pinned)
        })
    }

    /// Copies weights and their optimizer's state, as far as this replica writes them.
    pub fn add(&mut self, layout: &Layout, weights: &Tensor, optimizer: &Optimizer) -> Result<()> {
        if self.writes(SavedBuffer::Weights) {
            self.add_weights(layout, weights)?;
        }

        for (number, buffer) in optimizer.state().iter().enumerate() {
            if self.writes(SavedBuffer::State(number)) {
                self.copy(ShardKind::State(buffer.name.into()), &buffer.layout, &buffer.values)?;
            }
        }

        Ok(())
    }

    /// Copies weights alone.
    pub fn add_weights(&mut self, layout: &Layout, weights: &Tensor) -> Result<()> {
        self.copy(ShardKind::Weights, layout, weights)
    }

    /// Copies weights of earlier versions, each with its number.
    pub fn add_older<'a>(
        &mut self,
        layout: &Layout,
        versions: impl Iterator<Item = (usize, &'a Tensor)>,
    ) -> Result<()> {
        if self.writes(SavedBuffer::Older) {
            for (number, weights) in versions {
                let mut named = layout.clone();
                named
                    .entries
                    .iter_mut()
                    .for_each(|entry| entry.parameter.name = older(&entry.parameter.name, number));
                self.copy(ShardKind::Older, &named, &weights.f_to_kind(tch::Kind::Float)?)?;
            }
        }

        Ok(())
    }

    /// Copies parts of the tied table's gradient that this replica's joiner keeps, each with its
    /// step.
    pub fn add_parts<'a>(
        &mut self,
        layout: &Layout,
        parts: impl Iterator<Item = (usize, &'a Tensor)>,
    ) -> Result<()> {
        for (step, values) in parts {
            let mut named = layout.clone();
            let rename = |entry: &mut Entry| {
                entry.parameter.name = part(&entry.parameter.name, step, self.place.replica)
            };

            named.entries.iter_mut().for_each(rename);
            self.copy(ShardKind::Parts, &named, values)?;
        }

        Ok(())
    }

    /// Copies what layers remember of the rows of the batch from `row` on.
    pub fn remember(&mut self, row: usize, states: Vec<(String, &Tensor)>) -> Result<()> {
        for (layer, states) in states {
            let (shape, name) = (states.size(), format!("{layer}/{row}"));
            let flat = states.f_to_kind(tch::Kind::Float)?.f_contiguous()?.f_view([-1])?;
            let content = self.contents.entry(ShardKind::Memory).or_default();
            content.add(&[(name, &shape[..])], |_, memory| {
                append(&flat, 0..flat.numel(), memory, &mut None)
            })?;
        }

        Ok(())
    }

    /// Writing this one will find no room: a fault on purpose.
    pub fn fill_disk(&mut self) {
        self.disk_is_full = true;
    }

    /// Writes everything, which was `copied` in so much time, into `step-N.tmp/` and waits for the
    /// disk.
    ///
    /// # Errors
    /// [`Error::Unwritten`].
    pub fn write(&self, out: &Path, copied: Duration) -> Result<Written> {
        let begun = Instant::now();
        let folder = folder(out, self.step, ".tmp");
        fs::create_dir_all(&folder).map_err(|error| Error::unwritten(&folder, error))?;
        if self.disk_is_full {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(Error::unwritten(&folder, full));
        }

        let needed: usize = self.contents.values().map(Content::bytes).sum();
        let left = room(&folder).unwrap_or(u64::MAX);
        if needed as u64 > left {
            let problem =
                format!("{needed} bytes are to be written and {left} are left on the disk");
            return Err(Error::unwritten(&folder, problem));
        }

        let shards = self
            .contents
            .iter()
            .map(|(kind, content)| self.shard(&folder, kind, content))
            .collect::<Result<_>>()?;
        Ok(Written { shards, copy_s: copied.as_secs_f64(), write_s: begun.elapsed().as_secs_f64() })
    }

    fn shard(&self, folder: &Path, kind: &ShardKind, content: &Content) -> Result<Shard> {
        let Place { stage, replica } = self.place;
        let file = match kind {
            ShardKind::Weights => format!("stage-{stage}.safetensors"),
            ShardKind::State(name) => format!("stage-{stage}.{name}.safetensors"),
            ShardKind::Older => format!("stage-{stage}.older.safetensors"),
            ShardKind::Parts => format!("stage-{stage}.replica-{replica}.parts.safetensors"),
            ShardKind::Memory => format!("stage-{stage}.replica-{replica}.memory.safetensors"),
        };

        let path = folder.join(&file);
        let written = content.write(&path);
        let (bytes, digest) = written.map_err(|error| Error::unwritten(&path, error))?;
        Ok(Shard {
            file,
            kind: kind.clone(),
            stage,
            bytes,
            digest,
            tensors: content.names().map(str::to_owned).collect(),
        })
    }
}
