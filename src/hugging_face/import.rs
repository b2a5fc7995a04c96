//! `ouroboros import`: a folder of Hugging Face's becomes a run at step 0.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::family::{Described, Family, described};
use super::folder::Folder;
use super::names::{HEAD, Piece, full, is_computed, pieces};
use super::{BESIDE, BLOCK, TYPES};
use crate::checkpoint::values::{from_f32, is_known, to_f32, transposed};
use crate::checkpoint::{self, Manifest, Pipeline, SOURCE, Shard, ShardKind, TensorStream};
use crate::config::Config;
use crate::data::{DataConfig, Vocabulary};
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::metrics::thousands;
use crate::model::{Dimensions, ModelConfig};

/// The longest sequence that an imported config begins with, tokens.
const SEQUENCE: usize = 1024;

/// What `import` is asked to do.
#[derive(Debug)]
pub struct ImportRequest {
    /// The folder that is read.
    pub folder: PathBuf,
    /// The run that is made.
    pub out: PathBuf,
}

/// Makes a run of a folder.
///
/// # Errors
/// [`Error::Config`] about config.json or the run's folder, [`Error::Checkpoint`] about tensors.
pub fn import(request: &ImportRequest) -> Result<()> {
    let ImportRequest { folder, out } = request;
    let json = read_json(&folder.join("config.json"))?;
    let Described { family, model } = described(&json)?;
    let config = run_config(out, model);
    config.check()?;
    let rows = config.model.vocabulary.unwrap_or_default();
    let dimensions = Dimensions::new(&config.model, rows, config.data.sequence);
    let pieces = pieces(family, &dimensions)?;
    let mut source = Folder::open(folder)?;
    let prefix = check(&source, folder, family, &pieces)?;

    for taken in ["checkpoints", "config.toml", SOURCE] {
        if out.join(taken).exists() {
            let remedy = format!("{taken} is there already: take another folder, or remove it");
            return Err(Error::config("--out", out.display(), remedy));
        }
    }

    let parameters: usize = pieces.iter().map(|piece| piece.rows * piece.width()).sum();
    check_room(
        out,
        tensors(&source, prefix, &pieces)
            .iter()
            .map(|(_, dtype, shape)| (dtype.size() * shape.iter().product::<usize>()) as u64)
            .sum(),
    )?;
    let fresh = !out.exists();
    let unwritten =
        |error| Error::config("--out", out.display(), format!("cannot be made ({error})"));
    fs::create_dir_all(out).map_err(unwritten)?;
    let lock = FolderLock::take(out)?;
    let made = make(out, &config, &mut source, prefix, &pieces, parameters)
        .and_then(|path| keep(folder, out, &source, &config).map(|()| path));
    match made {
        Ok(path) => {
            say!("{}: {} values", path.display(), thousands(parameters as u64));
            say!(
                "next: a text for {}; its first lines say how to train",
                out.join("config.toml").display()
            );
            Ok(())
        }
        Err(error) => {
            for part in ["checkpoints", "config.toml", SOURCE] {
                let path = out.join(part);
                let _ =
                    if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
            drop(lock);
            if fresh {
                let _ = fs::remove_dir_all(out);
            }
            Err(error)
        }
    }
}

/// An object of JSON.
pub(super) fn read_json(path: &Path) -> Result<Map<String, Value>> {
    let wrong = |problem: String| Error::checkpoint(path, problem);
    let text = files::read_text(path).map_err(|error| wrong(error.to_string()))?;
    match serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))? {
        Value::Object(map) => Ok(map),
        _ => Err(wrong("it is no object of JSON".into())),
    }
}

/// The config of a run that goes on with a model: what a user is going to change.
fn run_config(out: &Path, model: ModelConfig) -> Config {
    let name = out.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = if files::is_plain_name(name) { name } else { "imported" };
    let sequence = model.positions.unwrap_or(SEQUENCE).min(SEQUENCE);
    Config {
        name: name.to_owned(),
        model,
        data: DataConfig { sequence, ..DataConfig::default() },
        ..Config::default()
    }
}

/// Whether the folder has the model's tensors, and no others; gives what stands before their names.
fn check(source: &Folder, folder: &Path, family: Family, pieces: &[Piece]) -> Result<&'static str> {
    let wrong = |problem: String| Err(Error::checkpoint(folder, problem));
    let first = pieces.first().map_or("", |piece| &piece.theirs);
    let bare = source.info(first).is_some();
    let prefix = if bare { "" } else { family.prefix() };
    for piece in pieces {
        let name = full(prefix, &piece.theirs);
        let Some((dtype, shape)) = source.info(&name) else {
            return wrong(format!("no tensor {name}, which config.json asks for"));
        };

        if !is_known(dtype) {
            return wrong(format!("{name} holds {dtype:?}; F32, F16 and BF16 can be read"));
        }

        if shape != piece.shape {
            let asked = &piece.shape;
            return wrong(format!("{name} is {shape:?}, config.json asks for {asked:?}"));
        }
    }

    let wanted: BTreeSet<String> = pieces.iter().map(|piece| full(prefix, &piece.theirs)).collect();
    // A tied head that was written out all the same is the embedding again.
    let known = |name: &str| wanted.contains(name) || is_computed(name) || name == HEAD;
    match source.names().find(|name| !known(name)) {
        Some(name) => wrong(format!("{name} is none of the tensors that config.json asks for")),
        None => Ok(prefix),
    }
}

/// Whether the disk of a folder has room.
///
/// # Errors
/// [`Error::Config`] about `--out` or `--to`.
pub(super) fn check_room(out: &Path, needed: u64) -> Result<()> {
    let left = checkpoint::room(out).unwrap_or(u64::MAX);
    if needed <= left {
        return Ok(());
    }

    let remedy = format!("{needed} bytes are to be written and its disk has {left} left");
    Err(Error::config("the output folder", out.display(), remedy))
}

/// Writes step-0.
fn make(
    out: &Path,
    config: &Config,
    source: &mut Folder,
    prefix: &str,
    pieces: &[Piece],
    parameters: usize,
) -> Result<PathBuf> {
    let tmp = out.join("checkpoints").join("step-0.tmp");
    fs::create_dir_all(&tmp).map_err(|error| Error::unwritten(&tmp, error))?;
    let file = "stage-0.safetensors";
    let path = tmp.join(file);
    let unwritten = |error: std::io::Error| Error::unwritten(&path, error);

    let tensors = tensors(source, prefix, pieces);
    let types: BTreeMap<&str, Dtype> =
        tensors.iter().map(|(name, dtype, _)| (name.as_str(), *dtype)).collect();
    let mut stream = TensorStream::create(&path, &tensors, None).map_err(unwritten)?;
    for piece in pieces {
        let (name, to) = (full(prefix, &piece.theirs), types[piece.ours.as_str()]);
        copy(source, &name, piece, to, |bytes| stream.put(bytes).map_err(unwritten))?;
    }

    let (bytes, digest) = stream.finish().map_err(unwritten)?;
    let shard = Shard {
        file: file.to_owned(),
        kind: ShardKind::Weights,
        stage: 0,
        bytes,
        digest,
        tensors: tensors.into_iter().map(|(name, ..)| name).collect(),
    };
    let pipeline = Pipeline { since: 0, delays: vec![0], layers: vec![config.model.layers] };
    let manifest = Manifest::new(config, None, parameters, 0, pipeline, vec![shard]);
    checkpoint::complete(out, &manifest, &Vocabulary::bytes())
}

/// The parameters, each in the type of the tensors that it is made of; in f32 if those differ.
fn tensors(source: &Folder, prefix: &str, pieces: &[Piece]) -> Vec<(String, Dtype, Vec<usize>)> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>)> = Vec::new();
    for piece in pieces {
        let mut shape = piece.shape.clone();
        if piece.transposed {
            shape.reverse();
        }

        let dtype =
            source.info(&full(prefix, &piece.theirs)).map_or(Dtype::F32, |(dtype, _)| dtype);
        match tensors.last_mut().filter(|(name, ..)| *name == piece.ours) {
            Some((_, of, whole)) => {
                whole[0] += piece.rows;
                if *of != dtype {
                    *of = Dtype::F32;
                }
            }
            None => tensors.push((piece.ours.clone(), dtype, shape)),
        }
    }
    tensors
}

/// Hands a tensor's values on, as they lie here and in the type `to`.
fn copy(
    source: &mut Folder,
    name: &str,
    piece: &Piece,
    to: Dtype,
    mut put: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let dtype = source.info(name).map_or(Dtype::F32, |(dtype, _)| dtype);
    let count = piece.rows * piece.width();
    let block = if piece.transposed { count } else { count.min(BLOCK / dtype.size()) };
    let mut buffer = vec![0; block * dtype.size()];
    for start in (0..count).step_by(block.max(1)) {
        let values = block.min(count - start);
        let bytes = &mut buffer[..values * dtype.size()];
        source.fill(name, start * dtype.size(), bytes)?;
        if dtype == to && !piece.transposed {
            put(bytes)?;
            continue;
        }

        let mut here = to_f32(dtype, bytes);
        if piece.transposed {
            here = transposed(&here, piece.shape[0], piece.shape[1]);
        }
        put(&from_f32(to, &here))?;
    }

    Ok(())
}

/// Writes the config, and keeps what an export gives back.
fn keep(folder: &Path, out: &Path, source: &Folder, config: &Config) -> Result<()> {
    let kept = out.join(SOURCE);
    let unwritten = |path: &Path, error: std::io::Error| Error::unwritten(path, error);
    fs::create_dir_all(&kept).map_err(|error| unwritten(&kept, error))?;
    for name in BESIDE.into_iter().chain(["config.json"]) {
        let (from, to) = (folder.join(name), kept.join(name));
        if from.is_file() {
            let bytes = files::read(&from).map_err(|error| Error::checkpoint(&from, error))?;
            files::write(&to, &bytes).map_err(|error| unwritten(&to, error))?;
        }
    }

    let types: Map<String, Value> = source
        .names()
        .filter_map(|name| Some((name.to_owned(), format!("{:?}", source.info(name)?.0).into())))
        .collect();
    let path = kept.join(TYPES);
    let text = serde_json::to_string_pretty(&types).unwrap_or_default();
    files::write(&path, text.as_bytes()).map_err(|error| unwritten(&path, error))?;

    let path = out.join("config.toml");
    let head = format!(
        "# Of {}. Give it a text (data.path), steps and a learning rate, then:\n#   ouroboros train {} --init {}\n\n",
        folder.display(),
        path.display(),
        out.join("checkpoints/step-0").display()
    );
    let text = head + &config.to_short_toml();
    files::write(&path, text.as_bytes()).map_err(|error| unwritten(&path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_room_is_told_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b");
        assert!(check_room(&out, 1).is_ok());
        let error = check_room(&out, u64::MAX).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(&format!("{} bytes are to be written", u64::MAX)));
        assert!(!out.exists());
    }

    #[test]
    fn a_run_is_called_as_its_folder() {
        let config = |out: &str, positions| {
            run_config(Path::new(out), ModelConfig { positions, ..ModelConfig::default() })
        };
        assert_eq!(config("runs/smol", Some(300)).name, "smol");
        assert_eq!(config("runs/smol", Some(300)).data.sequence, 300);
        assert_eq!(config("..", Some(9000)).name, "imported");
        assert_eq!(config("..", Some(9000)).data.sequence, SEQUENCE);
    }
}
