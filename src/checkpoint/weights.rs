//! Saved weights read piece by piece: for models that are larger than the memory.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::Dtype;

use super::tensors::Tensors;
use super::{Checkpoint, Shard, ShardKind, index};
use crate::error::{Error, Result};

impl Checkpoint {
    /// The weights, to be read piece by piece.
    pub fn weights(&self) -> WeightFiles<'_> {
        WeightFiles {
            folder: &self.path,
            places: index(&self.manifest.shards, &ShardKind::Weights),
            open: None,
        }
    }
}

/// The files of a state's weights, of which one is open at a time.
pub struct WeightFiles<'a> {
    folder: &'a Path,
    places: BTreeMap<&'a str, &'a Shard>,
    open: Option<(&'a str, Tensors)>,
}

impl WeightFiles<'_> {
    /// The type of a parameter's values.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing.
    pub fn dtype(&mut self, name: &str) -> Result<Dtype> {
        self.look(name, |file| {
            file.shape(name)?;
            Ok(file.info(name).map_or(Dtype::F32, |(dtype, _)| dtype))
        })
    }

    /// Fills `bytes` with those of a parameter, from its `from`-th on.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is missing or has fewer.
    pub fn fill(&mut self, name: &str, from: usize, bytes: &mut [u8]) -> Result<()> {
        self.look(name, |file| file.fill(name, from, bytes))
    }

    fn look<T>(
        &mut self,
        name: &str,
        look: impl FnOnce(&mut Tensors) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let shard = self.places.get(name);
        let shard =
            shard.ok_or_else(|| Error::checkpoint(self.folder, format!("no parameter {name}")))?;
        let path = self.folder.join(&shard.file);
        let file = match &mut self.open {
            Some((of, file)) if *of == shard.file => file,
            other => &mut other.insert((&shard.file, Tensors::open(&path)?)).1,
        };

        look(file).map_err(|problem| Error::checkpoint(&path, problem))
    }
}
