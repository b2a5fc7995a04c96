//! The state of a place at a sync point, copied so that training can go on, and its way to the disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tch::Tensor;

use super::file::Content;
use super::{Kind, Shard, Written, folder, older, room};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::optim::Optimizer;
use crate::params::{Entry, Layout, here, slice};

/// A copy of what a place has to save.
pub struct Snapshot {
    pub place: Place,
    pub step: usize,
    replicas: usize,
    contents: BTreeMap<Kind, Content>,
    /// A fault on purpose.
    disk_is_full: bool,
}

impl Snapshot {
    /// Nothing yet, of a place of `replicas` that share the files out.
    pub fn new(place: Place, step: usize, replicas: usize) -> Snapshot {
        Snapshot { place, step, replicas, contents: BTreeMap::new(), disk_is_full: false }
    }

    /// Whether a place of `replicas` writes the files of a kind.
    pub fn shared(kind: Kind, place: Place, replicas: usize) -> bool {
        kind == Kind::Memory || kind as usize % replicas == place.replica
    }

    fn writes(&self, kind: Kind) -> bool {
        Snapshot::shared(kind, self.place, self.replicas)
    }

    /// Copies a flat buffer with its layout.
    fn copy(&mut self, kind: Kind, layout: &Layout, flat: &Tensor) -> Result<()> {
        let flat = here(flat)?;
        let flat = slice(&flat);
        self.contents.entry(kind).or_default().add(layout.entries.iter().map(|Entry { parameter, offset }| {
            let values = &flat[*offset..offset + parameter.count()];
            (parameter.name.clone(), &parameter.shape[..], values)
        }));
        Ok(())
    }

    /// Copies weights and their optimizer's state, as far as this replica writes them.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn add(&mut self, layout: &Layout, weights: &Tensor, optimizer: &Optimizer) -> Result<()> {
        if self.writes(Kind::Weights) {
            self.add_weights(layout, weights)?;
        }
        for (name, values) in optimizer.state() {
            let kind = Kind::of_moment(name);
            if self.writes(kind) {
                self.copy(kind, layout, values)?;
            }
        }
        Ok(())
    }

    /// Copies weights alone.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn add_weights(&mut self, layout: &Layout, weights: &Tensor) -> Result<()> {
        self.copy(Kind::Weights, layout, weights)
    }

    /// Copies weights of earlier versions, each with its number.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn add_older<'a>(
        &mut self,
        layout: &Layout,
        versions: impl Iterator<Item = (usize, &'a Tensor)>,
    ) -> Result<()> {
        if self.writes(Kind::Older) {
            for (number, weights) in versions {
                let mut named = layout.clone();
                named.entries.iter_mut().for_each(|entry| entry.parameter.name = older(&entry.parameter.name, number));
                self.copy(Kind::Older, &named, &weights.f_to_kind(tch::Kind::Float)?)?;
            }
        }
        Ok(())
    }

    /// Copies what layers remember of the rows of the batch from `row` on.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn remember(&mut self, row: usize, states: Vec<(String, &Tensor)>) -> Result<()> {
        for (layer, states) in states {
            let (shape, flat) =
                (states.size(), here(&states.f_to_kind(tch::Kind::Float)?)?.f_contiguous()?.f_view([-1])?);
            let tensor = (format!("{layer}/{row}"), &shape[..], slice(&flat));
            self.contents.entry(Kind::Memory).or_default().add(std::iter::once(tensor));
        }
        Ok(())
    }

    /// Writing this one will find no room: a fault on purpose.
    pub fn fill_disk(&mut self) {
        self.disk_is_full = true;
    }

    /// Writes everything, which was `copied` in so much time, into `step-N.tmp/` and waits for the disk.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a file cannot be written.
    pub fn write(&self, out: &Path, copied: Duration) -> Result<Written> {
        let begun = Instant::now();
        let folder = folder(out, self.step, ".tmp");
        fs::create_dir_all(&folder).map_err(|error| Error::checkpoint(&folder, format!("cannot be made ({error})")))?;
        if self.disk_is_full {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(Error::checkpoint(&folder, format!("cannot be written ({full})")));
        }
        let needed: usize = self.contents.values().map(Content::bytes).sum();
        let left = room(&folder).unwrap_or(u64::MAX);
        if needed as u64 > left {
            let problem = format!("{needed} bytes are to be written and {left} are left on the disk");
            return Err(Error::checkpoint(&folder, problem));
        }
        let shards =
            self.contents.iter().map(|(kind, content)| self.shard(&folder, *kind, content)).collect::<Result<_>>()?;
        Ok(Written { shards, copy_s: copied.as_secs_f64(), write_s: begun.elapsed().as_secs_f64() })
    }

    fn shard(&self, folder: &Path, kind: Kind, content: &Content) -> Result<Shard> {
        let Place { stage, replica } = self.place;
        let file = match kind {
            Kind::Weights => format!("stage-{stage}.safetensors"),
            Kind::First => format!("stage-{stage}.first.safetensors"),
            Kind::Second => format!("stage-{stage}.second.safetensors"),
            Kind::Older => format!("stage-{stage}.older.safetensors"),
            Kind::Memory => format!("stage-{stage}.replica-{replica}.memory.safetensors"),
        };
        let path = folder.join(&file);
        let written = content.write(&path);
        let (bytes, digest) =
            written.map_err(|error| Error::checkpoint(&path, format!("cannot be written ({error})")))?;
        Ok(Shard { file, kind, stage, bytes, digest, tensors: content.names().map(str::to_owned).collect() })
    }
}
