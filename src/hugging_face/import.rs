//! `ouroboros import`: a folder of Hugging Face's becomes a run at step 0.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value};

use super::family::{Described, Family, described};
use super::folder::Folder;
use super::names::{HEAD, Piece, full, is_computed, pieces};
use super::{BESIDE, BLOCK, TOKENIZER, TYPES};
use crate::bar::Bar;
use crate::checkpoint::values::{from_f32, is_known, to_f32, transposed};
use crate::checkpoint::{self, Manifest, Pipeline, SOURCE, Shard, ShardKind, TensorStream};
use crate::config::Config;
use crate::data::{DataConfig, Subword, Tokenizer, Unit, Vocabulary};
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
    let rows = model.vocabulary.unwrap_or_default();
    let vocabulary = vocabulary(folder, rows)?;
    let config = run_config(out, model, vocabulary.unit());
    config.check()?;
    let dimensions = Dimensions::new(&config.model, rows, config.data.sequence);
    let pieces = pieces(family, &dimensions)?;
    let mut source = Folder::open(folder)?;
    let prefix = check(&source, folder, family, &pieces)?;
    check_tied(&mut source, folder, prefix, &pieces)?;

    let bytes = tensors(&source, prefix, &pieces).iter().map(bytes_of).sum();
    check_room(out, bytes)?;
    let unwritten =
        |error| Error::config("--out", out.display(), format!("cannot be made ({error})"));
    let fresh = !out.exists();
    fs::create_dir_all(out).map_err(unwritten)?;
    let lock = FolderLock::take(out)?;
    check_absent(out)?;

    let parameters = values(&pieces);
    let made = keep(folder, out, &source)
        .and_then(|()| make(out, &config, &vocabulary, &mut source, prefix, &pieces))
        .and_then(|path| put_config(folder, out, &config).map(|()| path));
    match made {
        Ok(path) => {
            told(&path, out, parameters, &vocabulary, rows);
            Ok(())
        }
        Err(error) => {
            for part in MADE {
                let path = out.join(part);
                let _ =
                    if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }

            drop(lock);
            if fresh {
                let _ = fs::remove_file(out.join("lock"));
                let _ = fs::remove_dir(out);
            }
            Err(error)
        }
    }
}

/// Says what was made, and what can be done with it.
fn told(path: &Path, out: &Path, parameters: usize, vocabulary: &Vocabulary, rows: usize) {
    say!("{}: {} values", path.display(), thousands(parameters as u64));
    let config = out.join("config.toml");
    say!("next: a text for {}, whose first lines say how to train", config.display());
    if vocabulary.unit() == Unit::Bytes && rows != vocabulary.len() {
        say!(
            "note: there is no {TOKENIZER} in the folder: of its {rows} tokens texts use the first 256, as bytes"
        );
    }
}

/// What an import makes in a run's folder.
const MADE: [&str; 3] = ["checkpoints", "config.toml", SOURCE];

/// Whether nothing is there that an import would make, but what an interrupted one has left.
fn check_absent(out: &Path) -> Result<()> {
    checkpoint::clear(out).map_err(|error| Error::unwritten(out, error))?;
    // Only where it is empty.
    let _ = fs::remove_dir(out.join("checkpoints"));
    let is_there = |part: &&str| out.join(part).exists();
    let found: Vec<&str> = MADE.into_iter().filter(is_there).collect();
    match found[..] {
        [] => Ok(()),
        [SOURCE] => {
            let left = out.join(SOURCE);
            fs::remove_dir_all(&left).map_err(|error| Error::unwritten(&left, error))
        }
        [first, ..] => {
            let remedy = format!("{first} is there already: take another folder, or remove it");
            Err(Error::config("--out", out.display(), remedy))
        }
    }
}

/// Values of all tensors.
fn values(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.rows * piece.width()).sum()
}

fn bytes_of((_, dtype, shape): &(String, Dtype, Vec<usize>)) -> u64 {
    (dtype.size() * shape.iter().product::<usize>()) as u64
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

/// The tokens of the folder's `tokenizer.json`, if it has one; else bytes.
fn vocabulary(folder: &Path, rows: usize) -> Result<Vocabulary> {
    let path = folder.join(TOKENIZER);
    if !path.is_file() {
        return Ok(Vocabulary::bytes());
    }

    let subword = Subword::open(&path, None)?;
    let size = subword.facts.size;
    if size > rows {
        let problem = format!("it has {size} tokens, config.json has a vocab_size of {rows}");
        let remedy = "take the tokenizer.json of this model, or remove it to read bytes";
        return Err(Error::data(path.display(), problem, remedy));
    }
    Ok(Vocabulary::subwords(subword))
}

/// The config of a run that goes on with a model: what a user is going to change.
fn run_config(out: &Path, model: ModelConfig, unit: Unit) -> Config {
    let name = out.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = if files::is_plain_name(name) { name } else { "imported" };
    // A training does not write into the import's folder.
    let name = format!("{name}-tuned");
    let sequence = model.positions.unwrap_or(SEQUENCE).min(SEQUENCE);
    let tokenizer =
        (unit == Unit::Subwords).then(|| Tokenizer::File(out.join(SOURCE).join(TOKENIZER)));
    Config {
        name,
        model,
        data: DataConfig { tokenizer, sequence, ..DataConfig::default() },
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

/// Whether a head that is written out beside a tied table is that table again.
fn check_tied(source: &mut Folder, folder: &Path, prefix: &str, pieces: &[Piece]) -> Result<()> {
    let tied = pieces.iter().all(|piece| piece.theirs != HEAD);
    let Some(table) = pieces.first().filter(|_| tied && source.info(HEAD).is_some()) else {
        return Ok(());
    };

    let name = full(prefix, &table.theirs);
    let differs = || {
        let problem = format!("{HEAD} is not {name}, to which config.json ties it");
        Err(Error::checkpoint(folder, problem))
    };
    if source.info(HEAD) != source.info(&name) {
        return differs();
    }

    let size = source.info(&name).map_or(0, |(dtype, _)| dtype.size());
    let bytes = size * table.shape.iter().product::<usize>();
    let (mut one, mut other) = (vec![0; BLOCK.min(bytes)], vec![0; BLOCK.min(bytes)]);
    for start in (0..bytes).step_by(BLOCK) {
        let count = BLOCK.min(bytes - start);
        source.fill(&name, start, &mut one[..count])?;
        source.fill(HEAD, start, &mut other[..count])?;
        if one[..count] != other[..count] {
            return differs();
        }
    }

    Ok(())
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
    vocabulary: &Vocabulary,
    source: &mut Folder,
    prefix: &str,
    pieces: &[Piece],
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
    let bar = Bar::of_steps(values(pieces) as u64, "importing values");
    for piece in pieces {
        let (name, to) = (full(prefix, &piece.theirs), types[piece.ours.as_str()]);
        copy(source, &name, piece, to, |bytes| {
            bar.advance((bytes.len() / to.size()) as u64);
            stream.put(bytes).map_err(unwritten)
        })?;
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
    let parameters = values(pieces);
    let manifest = Manifest::new(config, None, parameters, 0, pipeline, vec![shard]);
    checkpoint::complete(out, &manifest, vocabulary)
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

/// Keeps what an export gives back.
fn keep(folder: &Path, out: &Path, source: &Folder) -> Result<()> {
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
    Ok(())
}

/// Writes the config that a user goes on with.
fn put_config(folder: &Path, out: &Path, config: &Config) -> Result<()> {
    let path = out.join("config.toml");
    let head = format!(
        "# Of {}. Give it a text (data.path), steps and a learning rate, then:\n#   ouroboros train {} --init {}\n\n",
        folder.display(),
        path.display(),
        out.join("checkpoints/step-0").display()
    );
    let text = head + &config.to_short_toml();
    files::write(&path, text.as_bytes()).map_err(|error| Error::unwritten(&path, error))
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
            let model = ModelConfig { positions, ..ModelConfig::default() };
            run_config(Path::new(out), model, Unit::Bytes)
        };
        assert_eq!(config("runs/smol", Some(300)).name, "smol-tuned");
        assert_eq!(config("runs/smol", Some(300)).data.sequence, 300);
        assert_eq!(config("..", Some(9000)).name, "imported-tuned");
        assert_eq!(config("..", Some(9000)).data.sequence, SEQUENCE);
    }
}
