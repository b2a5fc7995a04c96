//! Saved weights: `DIR/checkpoints/step-N/`, one safetensors file a stage with the parameters' global names, a manifest,
//! and for characters and words the vocabulary. A tied table stands once, in the file of stage 0.
//!
//! The files are written into `step-N.tmp/` by the places of replica 0; when all are there, rank 0 writes the
//! manifest and renames the folder, so a folder without `.tmp` is complete. Weights of an earlier run are replaced
//! only by that rename.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::config::{Config, Tokenizer};
use crate::data::{Listed, Vocabulary};
use crate::error::{Error, Result};
use crate::params::Layout;
use crate::setup::Setup;

const MANIFEST: &str = "manifest.json";
/// Of characters or words; a model of bytes needs none.
const VOCABULARY: &str = "vocabulary.json";
const FORMAT: u32 = 2;

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    pub file: String,
    pub stage: usize,
    pub bytes: u64,
}

/// What stands beside the files of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// The program's version and libtorch's.
    pub program: String,
    pub libtorch: String,
    /// Updates made.
    pub step: usize,
    /// Values of all parameters.
    pub parameters: usize,
    pub shards: Vec<Shard>,
    pub config: Config,
}

fn folder(out: &Path, step: usize, suffix: &str) -> PathBuf {
    out.join("checkpoints").join(format!("step-{step}{suffix}"))
}

/// Removes what an interrupted write has left.
///
/// # Errors
/// If it cannot be removed.
pub fn clear(out: &Path, step: usize) -> io::Result<()> {
    let (last, old) = (folder(out, step, ""), folder(out, step, ".old"));
    if old.exists() && !last.exists() {
        // The run ended between the two renames of `complete`: the earlier weights are the last good ones.
        fs::rename(&old, &last)?;
    }
    remove(&old)?;
    remove(&folder(out, step, ".tmp"))
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes the weights of one stage: every layout with its flat buffer.
///
/// # Errors
/// [`Error::Checkpoint`] if the file cannot be written.
pub fn write_shard(out: &Path, step: usize, stage: usize, weights: &[(&Layout, &Tensor)]) -> Result<Shard> {
    let folder = folder(out, step, ".tmp");
    let file = format!("stage-{stage}.safetensors");
    let path = folder.join(&file);
    let wrong = |error: &dyn std::fmt::Display| Error::checkpoint(&path, format!("cannot be written ({error})"));
    fs::create_dir_all(&folder).map_err(|error| wrong(&error))?;
    let mut named: Vec<(&str, Tensor)> = Vec::new();
    for (layout, flat) in weights {
        let names = layout.entries.iter().map(|entry| entry.parameter.name.as_str());
        named.extend(names.zip(layout.views(flat)?));
    }
    Tensor::write_safetensors(&named, &path).map_err(|error| wrong(&error))?;
    let bytes = fs::File::open(&path)
        .and_then(|file| file.sync_all().and_then(|()| file.metadata()))
        .map_err(|error| wrong(&error))?
        .len();
    Ok(Shard { file, stage, bytes })
}

/// Writes the manifest over the complete shards of `step` and gives the folder its final name, which it returns.
///
/// # Errors
/// [`Error::Checkpoint`] if that cannot be done.
pub fn complete(setup: &Setup, out: &Path, step: usize, mut shards: Vec<Shard>) -> Result<PathBuf> {
    let (tmp, last, old) = (folder(out, step, ".tmp"), folder(out, step, ""), folder(out, step, ".old"));
    shards.sort_by_key(|shard| shard.stage);
    let manifest = Manifest {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").into(),
        libtorch: env!("OUROBOROS_LIBTORCH_VERSION").into(),
        step,
        parameters: setup.parameters(),
        shards,
        config: setup.config.clone(),
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| Error::checkpoint(&tmp, error))?;
    let vocabulary = &setup.corpus.vocabulary;
    let written = || -> io::Result<()> {
        if setup.config.data.tokenizer != Tokenizer::Bytes {
            fs::write(tmp.join(VOCABULARY), serde_json::to_vec(vocabulary.listed())?)?;
            fs::File::open(tmp.join(VOCABULARY))?.sync_all()?;
        }
        fs::write(tmp.join(MANIFEST), text)?;
        fs::File::open(tmp.join(MANIFEST))?.sync_all()?;
        if last.exists() {
            remove(&old)?;
            fs::rename(&last, &old)?;
        }
        fs::rename(&tmp, &last)?;
        fs::File::open(out.join("checkpoints"))?.sync_all()
    };
    written().map_err(|error| Error::checkpoint(&last, format!("cannot be written ({error})")))?;
    if let Err(error) = remove(&old) {
        tracing::warn!(%error, "the weights that were replaced cannot be removed");
    }
    Ok(last)
}

/// Weights read back: the manifest and all parameters by name.
pub struct Checkpoint {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub vocabulary: Vocabulary,
    pub weights: Vec<(String, Tensor)>,
}

impl Checkpoint {
    /// Reads a folder of weights, or the newest one of a run's folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none, or a file is missing or not as the manifest says.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let path = find(path)?;
        let wrong = |error: &dyn std::fmt::Display| Error::checkpoint(&path.join(MANIFEST), error);
        let text = fs::read_to_string(path.join(MANIFEST)).map_err(|error| wrong(&error))?;
        // The number of the format first: the rest may be another in another format.
        let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
        if value["format"] != FORMAT {
            let problem = format!("format {} is not known to this version, which reads {FORMAT}", value["format"]);
            return Err(wrong(&problem));
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(|error| wrong(&error))?;
        let mut weights = Vec::new();
        for shard in &manifest.shards {
            let file = path.join(&shard.file);
            let found = fs::metadata(&file).map_err(|error| Error::checkpoint(&file, error))?.len();
            if found != shard.bytes {
                return Err(Error::checkpoint(&file, format!("{found} bytes instead of {}", shard.bytes)));
            }
            weights.extend(Tensor::read_safetensors(&file).map_err(|error| Error::checkpoint(&file, error))?);
        }
        let vocabulary = vocabulary(&path, manifest.config.data.tokenizer)?;
        Ok(Checkpoint { path, manifest, vocabulary, weights })
    }

    /// The values of the given parameters, in their order.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one is missing, has another shape, or if there are others.
    pub fn values(&self, parameters: &[crate::model::Parameter]) -> Result<Vec<Tensor>> {
        let unused = self.weights.iter().find(|(name, _)| parameters.iter().all(|p| p.name != *name));
        if let Some((name, _)) = unused {
            return Err(Error::checkpoint(&self.path, format!("the config's model has no parameter {name}")));
        }
        let value = |p: &crate::model::Parameter| {
            let found = self.weights.iter().find(|(name, _)| *name == p.name);
            let (_, tensor) = found.ok_or_else(|| Error::checkpoint(&self.path, format!("no parameter {}", p.name)))?;
            if tensor.size() != p.shape {
                let problem = format!("{} is {:?}, the config asks for {:?}", p.name, tensor.size(), p.shape);
                return Err(Error::checkpoint(&self.path, problem));
            }
            Ok(tensor.shallow_clone())
        };
        parameters.iter().map(value).collect()
    }
}

/// The vocabulary that stands beside the weights.
fn vocabulary(path: &Path, tokenizer: Tokenizer) -> Result<Vocabulary> {
    if tokenizer == Tokenizer::Bytes {
        return Ok(Vocabulary::bytes());
    }
    let file = path.join(VOCABULARY);
    let text = fs::read(&file).map_err(|error| Error::checkpoint(&file, error))?;
    let listed: Listed = serde_json::from_slice(&text).map_err(|error| Error::checkpoint(&file, error))?;
    if listed.tokenizer != tokenizer {
        let problem = format!("of tokenizer `{}`, the manifest says `{}`", listed.tokenizer.word(), tokenizer.word());
        return Err(Error::checkpoint(&file, problem));
    }
    Ok(Vocabulary::of(listed))
}

/// `path` itself if it holds a manifest, else the one under its `checkpoints/` that was completed last.
fn find(path: &Path) -> Result<PathBuf> {
    if path.join(MANIFEST).is_file() {
        return Ok(path.to_owned());
    }
    let folders = [path.join("checkpoints"), path.to_owned()];
    let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let complete = entries.filter(|entry| entry.path().extension().is_none()).filter_map(|entry| {
        let time = fs::metadata(entry.path().join(MANIFEST)).and_then(|data| data.modified()).ok()?;
        Some((time, entry.path()))
    });
    let newest = complete.max().map(|(_, path)| path);
    newest.ok_or_else(|| Error::checkpoint(path, "no saved weights here (a folder with manifest.json)"))
}
