//! The state of a place at a sync point, copied so that training can go on, and its way to the disk.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tch::Tensor;

use super::{Kind, Shard, Written, digest, folder, older, room};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::optim::Optimizer;
use crate::params::{Layout, bytes};

/// One file to be: named values, each with its shape.
struct Content {
    kind: Kind,
    /// Flat buffers with the layout of what is in them.
    flats: Vec<(Layout, Tensor)>,
    /// Tensors by themselves.
    single: Vec<(String, Tensor)>,
}

/// A copy of what a place has to save.
pub struct Snapshot {
    pub place: Place,
    pub step: usize,
    replicas: usize,
    contents: Vec<Content>,
    /// A fault on purpose.
    disk_is_full: bool,
}

impl Snapshot {
    /// Nothing yet, of a place of `replicas` that share the files out.
    pub fn new(place: Place, step: usize, replicas: usize) -> Snapshot {
        Snapshot { place, step, replicas, contents: Vec::new(), disk_is_full: false }
    }

    /// Whether a place of `replicas` writes the files of a kind.
    pub fn shared(kind: Kind, place: Place, replicas: usize) -> bool {
        kind == Kind::Memory || kind as usize % replicas == place.replica
    }

    fn writes(&self, kind: Kind) -> bool {
        Snapshot::shared(kind, self.place, self.replicas)
    }

    fn content(&mut self, kind: Kind) -> &mut Content {
        let i = self.contents.iter().position(|content| content.kind == kind).unwrap_or_else(|| {
            self.contents.push(Content { kind, flats: Vec::new(), single: Vec::new() });
            self.contents.len() - 1
        });
        &mut self.contents[i]
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
                self.content(kind).flats.push((layout.clone(), Tensor::f_from_slice(values)?));
            }
        }
        Ok(())
    }

    /// Copies weights alone.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn add_weights(&mut self, layout: &Layout, weights: &Tensor) -> Result<()> {
        let copy = weights.f_detach_copy()?;
        self.content(Kind::Weights).flats.push((layout.clone(), copy));
        Ok(())
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
                let copy = weights.f_detach_copy()?.f_to_kind(tch::Kind::Float)?;
                self.content(Kind::Older).flats.push((named, copy));
            }
        }
        Ok(())
    }

    /// What layers remember of the rows of the batch from `row` on. Memories are never written again, so handles do.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn remember(&mut self, row: usize, states: Vec<(String, &Tensor)>) -> Result<()> {
        for (layer, states) in states {
            let states = states.f_to_kind(tch::Kind::Float)?;
            self.content(Kind::Memory).single.push((format!("{layer}/{row}"), states));
        }
        Ok(())
    }

    /// Writing this one will find no room: a fault on purpose.
    pub fn fill_disk(&mut self) {
        self.disk_is_full = true;
    }

    /// Bytes of all values.
    fn bytes(&self) -> u64 {
        let flats = self.contents.iter().flat_map(|content| content.flats.iter().map(|(_, flat)| flat));
        let single = self.contents.iter().flat_map(|content| content.single.iter().map(|(_, tensor)| tensor));
        flats.chain(single).map(|tensor| tensor.numel() as u64 * 4).sum()
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
        let (needed, left) = (self.bytes(), room(&folder).unwrap_or(u64::MAX));
        if needed > left {
            let problem = format!("{needed} bytes are to be written and {left} are left on the disk");
            return Err(Error::checkpoint(&folder, problem));
        }
        let shards = self.contents.iter().map(|content| content.write(&folder, self.place)).collect::<Result<_>>()?;
        Ok(Written { shards, copy_s: copied.as_secs_f64(), write_s: begun.elapsed().as_secs_f64() })
    }
}

impl Content {
    fn write(&self, folder: &Path, place: Place) -> Result<Shard> {
        let Place { stage, replica } = place;
        let file = match self.kind {
            Kind::Weights => format!("stage-{stage}.safetensors"),
            Kind::First => format!("stage-{stage}.first.safetensors"),
            Kind::Second => format!("stage-{stage}.second.safetensors"),
            Kind::Older => format!("stage-{stage}.older.safetensors"),
            Kind::Memory => format!("stage-{stage}.replica-{replica}.memory.safetensors"),
        };
        let path = folder.join(&file);
        let wrong = |error: &dyn std::fmt::Display| Error::checkpoint(&path, format!("cannot be written ({error})"));
        let single: Vec<(String, Tensor)> = self
            .single
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.f_contiguous()?)))
            .collect::<Result<_>>()?;
        let rows: Vec<Tensor> = single.iter().map(|(_, tensor)| Ok(tensor.f_view([-1])?)).collect::<Result<_>>()?;
        let mut views: Vec<(String, TensorView)> = Vec::new();
        let mut push = |name: &str, shape: &[i64], data| -> Result<()> {
            let shape = shape.iter().map(|n| *n as usize).collect();
            views.push((name.to_owned(), TensorView::new(Dtype::F32, shape, data).map_err(|error| wrong(&error))?));
            Ok(())
        };
        for (layout, flat) in &self.flats {
            for entry in &layout.entries {
                let (start, count) = (entry.offset * 4, entry.parameter.count() * 4);
                push(&entry.parameter.name, &entry.parameter.shape, &bytes(flat)[start..start + count])?;
            }
        }
        for ((name, tensor), row) in single.iter().zip(&rows) {
            push(name, &tensor.size(), bytes(row))?;
        }
        let tensors = views.iter().map(|(name, _)| name.clone()).collect();
        serialize_to_file(views, &None, &path).map_err(|error| wrong(&error))?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(|error| wrong(&error))?;
        let (bytes, digest) = digest(&path).map_err(|error| wrong(&error))?;
        Ok(Shard { file, kind: self.kind, stage, bytes, digest, tensors })
    }
}
