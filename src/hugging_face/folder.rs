//! The tensors of a Hugging Face folder, in one file or in shards with an index.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::checkpoint::Tensors;
use crate::error::{Error, Result};
use crate::files;

/// The file of an unsharded model, and the index of a sharded one.
pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// An open folder.
pub(super) struct Folder {
    path: PathBuf,
    files: Vec<Tensors>,
    /// Name -> number of its file.
    places: BTreeMap<String, usize>,
}

impl Folder {
    /// Opens all files of tensors and reads their headers.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a file that is missing or damaged, or an index that does not fit.
    pub fn open(path: &Path) -> Result<Folder> {
        let index = path.join(INDEX);
        let mut folder =
            Folder { path: path.to_owned(), files: Vec::new(), places: BTreeMap::new() };
        if index.exists() {
            folder.add_shards(&index)?;
            return Ok(folder);
        }

        let weights = path.join(WEIGHTS);
        if !weights.exists() {
            let old = path.join("pytorch_model.bin").exists();
            let more = if old {
                "; pytorch_model.bin can run any code when it is read: save it with safetensors"
            } else {
                ""
            };
            let problem = format!("neither {WEIGHTS} nor {INDEX} is here{more}");
            return Err(Error::checkpoint(path, problem));
        }

        folder.add(&weights)?;
        Ok(folder)
    }

    /// Opens a file; gives its number.
    fn add(&mut self, path: &Path) -> Result<usize> {
        let tensors = Tensors::open(path)?;
        let number = self.files.len();
        for name in tensors.names() {
            if self.places.insert(name.to_owned(), number).is_some() {
                return Err(Error::checkpoint(path, format!("{name} is in another shard too")));
            }
        }
        self.files.push(tensors);
        Ok(number)
    }

    fn add_shards(&mut self, index: &Path) -> Result<()> {
        let wrong = |problem: String| Error::checkpoint(index, problem);
        let text = files::read_text(index).map_err(|error| wrong(error.to_string()))?;
        let json: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        let map = json["weight_map"].as_object().ok_or_else(|| wrong("no weight_map".into()))?;

        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, file) in map {
            let file = file.as_str().filter(|file| files::is_plain_name(file));
            let file = file.ok_or_else(|| wrong(format!("{name} is in no file of this folder")))?;
            let number = match numbers.get(file) {
                Some(number) => *number,
                None => {
                    let number = self.add(&self.path.join(file))?;
                    numbers.insert(file, number);
                    number
                }
            };

            if self.places.get(name) != Some(&number) {
                return Err(wrong(format!("{name} is not in {file}")));
            }
        }

        match self.places.keys().find(|name| !map.contains_key(*name)) {
            Some(name) => Err(wrong(format!("{name} is in a shard, and not in the index"))),
            None => Ok(()),
        }
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.files[*self.places.get(name)?].info(name)
    }

    /// Fills `bytes` with those of a tensor, from its `from`-th on.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not there or cannot be read.
    pub fn fill(&mut self, name: &str, from: usize, bytes: &mut [u8]) -> Result<()> {
        let wrong = |problem: String| Error::checkpoint(&self.path, problem);
        let number = self.places.get(name).ok_or_else(|| wrong(format!("no tensor {name}")))?;
        let filled = self.files[*number].fill(name, from, bytes);
        filled.map_err(|problem| Error::checkpoint(&self.path, problem))
    }
}
