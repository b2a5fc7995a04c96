//! Saved runs: `DIR/checkpoints/step-N/`, the whole state at sync point N. Everything is stored
//! under global names, so a run can go on with another grid.
//!
//! ```text
//! stage-K.safetensors             the parameters of a stage by name, f32 (of an import as they came); a tied table stands
//!                                 once, with stage 0
//! stage-K.NAME.safetensors        each buffer of the optimizer's state by its name (first, second), under the names of
//!                                 the parameters
//! stage-K.older.safetensors        weights of earlier versions that delayed steps still use, `NAME@UPDATES`, of a run
//!                                  that was stopped between two sync points
//! stage-K.replica-R.parts.safetensors      input parts of a tied table's gradient that have joined no update, `NAME@STEP/R`, of a
//!                                  run under `tie = "head"` that was stopped between two sync points
//! stage-K.replica-R.memory.safetensors     what a Transformer-XL remembers: `LAYER/ROW`, the rows of the batch from ROW on
//! vocabulary.json                 of everything but bytes
//! tokenizer.json                  of subwords
//! manifest.json                   step, config, grid, versions; size, digest and tensors of every file
//! ```
//!
//! ```text
//! every place    copies its state at the sync point, goes on training; a thread of its own writes the copy into
//!                step-N.tmp/, waits for the disk, and reports the files
//! rank 0         when all places have reported: the manifest last, then one rename to step-N/; then old ones are removed
//! ```
//!
//! So a folder without `.tmp` is complete, whenever the run is killed; and it is believed only if
//! every file has the size and the digest that the manifest says. Replicas hold the same state and
//! share the files of a stage out.

pub mod values;
mod file;
mod snapshot;
mod tensors;
mod saved;
mod source;
mod weights;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

pub use file::TensorStream;
pub use saved::Checkpoint;
pub use snapshot::{SavedBuffer, Snapshot};
pub use tensors::Tensors;
pub use weights::WeightFiles;

use crate::config::{CheckpointConfig, Config};
use crate::data::{Fingerprint, Unit, Vocabulary};
use crate::error::{Error, Result};
use crate::files::{self, SEEN};

const MANIFEST: &str = "manifest.json";
/// What an imported run keeps of the folder that it came from, to be given back by an export.
pub const SOURCE: &str = "hugging-face";
/// Of everything but bytes.
const VOCABULARY: &str = "vocabulary.json";
/// Of subwords, as it was given.
const TOKENIZER: &str = "tokenizer.json";
const FORMAT: u32 = 4;

/// What a file holds. In a manifest a word: `weights`, `memory`, `older`, `parts`, else the name of
/// a buffer of state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ShardKind {
    Weights,
    /// A buffer of the optimizer's state, by its name.
    State(String),
    Memory,
    /// Weights of earlier versions.
    Older,
    /// Parts of the tied table's gradient that wait for their update.
    Parts,
}

impl From<String> for ShardKind {
    fn from(word: String) -> ShardKind {
        match word.as_str() {
            "weights" => ShardKind::Weights,
            "memory" => ShardKind::Memory,
            "older" => ShardKind::Older,
            "parts" => ShardKind::Parts,
            _ => ShardKind::State(word),
        }
    }
}

impl From<ShardKind> for String {
    fn from(kind: ShardKind) -> String {
        match kind {
            ShardKind::Weights => "weights".into(),
            ShardKind::Memory => "memory".into(),
            ShardKind::Older => "older".into(),
            ShardKind::Parts => "parts".into(),
            ShardKind::State(name) => name,
        }
    }
}

/// A file of a saved run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    pub file: String,
    pub kind: ShardKind,
    pub stage: usize,
    pub bytes: u64,
    /// xxh3 of the whole file.
    pub digest: String,
    /// The names of its tensors.
    pub tensors: Vec<String>,
}

/// What a place has written of a state, and how long that took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Written {
    pub shards: Vec<Shard>,
    /// Seconds that the training stood, and those of the work beside it.
    pub copy_s: f64,
    pub write_s: f64,
}

/// What decides which versions the next steps use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipeline {
    /// The sync point that their delays count from: the step of the state, or an earlier one.
    pub since: usize,
    /// Of every stage: its delay, and how many layers it has.
    pub delays: Vec<usize>,
    pub layers: Vec<usize>,
}

/// What stands beside the files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// The program's version and libtorch's.
    pub program: String,
    pub libtorch: String,
    /// Updates made, and tokens read for them.
    pub step: usize,
    pub pipeline: Pipeline,
    pub tokens: u64,
    /// Values of all parameters.
    pub parameters: usize,
    /// The grid that has saved it; any other can go on.
    pub grid: String,
    /// When it was complete, milliseconds since 1970; for people only.
    pub time_ms: u64,
    /// Grows with every state of a folder: the newest state has the largest, whatever clocks say.
    #[serde(default)]
    pub serial: u64,
    /// What the run reads; none of a state that an earlier version has saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<Fingerprint>,
    /// What its tokens are; none of a state that an earlier version has saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerFacts>,
    pub shards: Vec<Shard>,
    pub config: Config,
}

impl Manifest {
    /// The manifest of a state at `step`, complete now.
    pub fn new(
        config: &Config,
        text: Option<Fingerprint>,
        parameters: usize,
        step: usize,
        pipeline: Pipeline,
        shards: Vec<Shard>,
    ) -> Manifest {
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Manifest {
            format: FORMAT,
            program: env!("CARGO_PKG_VERSION").into(),
            libtorch: env!("OUROBOROS_LIBTORCH_VERSION").into(),
            step,
            pipeline,
            tokens: (config.batch * config.data.sequence) as u64 * step as u64,
            parameters,
            grid: config.grid().to_string(),
            time_ms: now.as_millis() as u64,
            serial: 0,
            text,
            tokenizer: None,
            shards,
            config: config.settled(),
        }
    }

    /// What the model's tokens are. States of before there was a `tokenizer.json` tell it by their
    /// config alone.
    fn unit(&self) -> Unit {
        let told = self.tokenizer.as_ref().map(|tokenizer| tokenizer.unit);
        told.unwrap_or_else(|| self.config.data.unit())
    }

    /// Whether what it says can be, as far as that is known without the files.
    ///
    /// # Errors
    /// What cannot.
    fn check(&self) -> std::result::Result<(), String> {
        if let Some(shard) = self.shards.iter().find(|shard| !files::is_plain_name(&shard.file)) {
            return Err(format!("the file `{}` is none of its folder", shard.file.escape_debug()));
        }

        self.config.check().map_err(|error| format!("its config: {error}"))?;

        let Manifest { step, pipeline, config, .. } = self;
        if *step > config.steps || pipeline.since > *step {
            return Err(format!(
                "step {step} of {}, whose delays count from step {}",
                config.steps, pipeline.since
            ));
        }

        Ok(())
    }
}

/// What a state says of its tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerFacts {
    pub unit: Unit,
    /// Of a `tokenizer.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl TokenizerFacts {
    fn of(vocabulary: &Vocabulary) -> TokenizerFacts {
        let facts = vocabulary.listed().subword.as_ref();
        TokenizerFacts {
            unit: vocabulary.unit(),
            name: facts.map(|facts| facts.name.clone()),
            digest: facts.map(|facts| facts.digest.clone()),
        }
    }
}

/// The name of a parameter's earlier version.
fn older(name: &str, version: usize) -> String {
    format!("{name}@{version}")
}

/// The name of a replica's part of a step of a parameter's gradient.
fn part(name: &str, step: usize, replica: usize) -> String {
    format!("{name}@{step}/{replica}")
}

fn folder(out: &Path, step: usize, suffix: &str) -> PathBuf {
    out.join("checkpoints").join(format!("step-{step}{suffix}"))
}

/// The saved states in a run's folder, complete or not: step, suffix (empty, `.tmp`, `.old`), path.
fn entries(out: &Path) -> Vec<(usize, String, PathBuf)> {
    let parse = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let rest = name.strip_prefix("step-")?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        Some((rest[..digits].parse().ok()?, rest[digits..].to_owned(), entry.path()))
    };

    fs::read_dir(out.join("checkpoints"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(parse)
        .collect()
}

/// Removes what an interrupted save has left.
///
/// # Errors
/// If it cannot be removed.
pub fn clear(out: &Path) -> io::Result<()> {
    for (step, suffix, path) in entries(out) {
        let last = folder(out, step, "");
        match suffix.as_str() {
            // The run ended between the two renames of `complete`: the earlier state is the last
            // good one.
            ".old" if !last.exists() => fs::rename(&path, &last)?,
            ".old" | ".tmp" => remove(&path)?,
            _ => {}
        }
    }

    Ok(())
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes the manifest over the complete files of its step and gives the folder its final name,
/// which it returns.
///
/// # Errors
/// [`Error::Unwritten`].
pub fn complete(out: &Path, manifest: &Manifest, vocabulary: &Vocabulary) -> Result<PathBuf> {
    let step = manifest.step;
    let (tmp, last, old) =
        (folder(out, step, ".tmp"), folder(out, step, ""), folder(out, step, ".old"));
    manifest.shards.iter().try_for_each(|shard| seen(&tmp.join(&shard.file), shard.bytes))?;

    let told = Manifest { tokenizer: Some(TokenizerFacts::of(vocabulary)), ..manifest.clone() };
    let text =
        serde_json::to_string_pretty(&told).map_err(|error| Error::checkpoint(&tmp, error))?;
    let written = || -> io::Result<()> {
        let put = |name: &str, bytes: &[u8]| {
            fs::write(tmp.join(name), bytes)?;
            File::open(tmp.join(name))?.sync_all()
        };

        if vocabulary.unit() != Unit::Bytes {
            put(VOCABULARY, &serde_json::to_vec(vocabulary.listed())?)?;
        }

        if let Some(json) = vocabulary.json() {
            put(TOKENIZER, json)?;
        }

        put(MANIFEST, text.as_bytes())?;
        File::open(&tmp)?.sync_all()?;
        if last.exists() {
            remove(&old)?;
            fs::rename(&last, &old)?;
        }

        fs::rename(&tmp, &last)?;
        File::open(out.join("checkpoints"))?.sync_all()
    };

    written().map_err(|error| Error::unwritten(&last, error))?;
    if let Err(error) = remove(&old) {
        tracing::warn!(%error, "the state that was replaced cannot be removed");
    }

    Ok(last)
}

/// Whether this process sees a file that a place has written, which may be on another node.
///
/// # Errors
/// [`Error::Unwritten`].
fn seen(path: &Path, bytes: u64) -> Result<()> {
    let begun = std::time::Instant::now();
    loop {
        let found = fs::metadata(path).map(|data| data.len());
        match found {
            Ok(found) if found == bytes => return Ok(()),
            _ if begun.elapsed() < SEEN => std::thread::sleep(SEEN / 50),
            Ok(found) => {
                return Err(Error::unwritten(
                    path,
                    format!("rank 0 sees {found} bytes of {bytes}"),
                ));
            }
            Err(error) => {
                let problem = format!(
                    "rank 0 does not see what its rank has written: {error}; do all nodes share the folder?"
                );

                return Err(Error::unwritten(path, problem));
            }
        }
    }
}

/// The order of the states of a folder: by their serial numbers, of earlier versions by their
/// steps. One whose manifest is damaged counts as the newest: that it is passed over must be told.
fn age(folder: &Path) -> (u64, u64) {
    let text = files::read_text(&folder.join(MANIFEST)).unwrap_or_default();
    match serde_json::from_str::<serde_json::Value>(&text) {
        Ok(value) => {
            (value["serial"].as_u64().unwrap_or(0), value["step"].as_u64().unwrap_or(u64::MAX))
        }
        Err(_) => (u64::MAX, u64::MAX),
    }
}

/// The serial number of the next state of a run's folder.
pub fn next_serial(out: &Path) -> u64 {
    let complete = entries(out).into_iter().filter(|(_, suffix, _)| suffix.is_empty());
    let serials = complete.map(|(.., path)| age(&path).0).filter(|serial| *serial < u64::MAX);
    serials.max().map_or(1, |newest| newest + 1)
}

/// The steps of the complete states in a run's folder up to `step`.
pub fn steps(out: &Path, step: usize) -> Vec<usize> {
    let mut found: Vec<usize> = entries(out)
        .into_iter()
        .filter(|(of, suffix, _)| suffix.is_empty() && *of <= step)
        .map(|(of, ..)| of)
        .collect();
    found.sort_unstable();
    found
}

/// Removes of the states at `steps`, of one run and in order, those that are not to be kept.
pub fn prune(out: &Path, steps: &mut Vec<usize>, keep: &CheckpointConfig) {
    let newest = steps.len().saturating_sub(keep.keep_last);
    let for_ever =
        |step: usize| step == 0 || keep.keep_every.is_some_and(|every| step.is_multiple_of(every));
    let gone: Vec<usize> =
        steps[..newest].iter().copied().filter(|step| !for_ever(*step)).collect();
    for step in &gone {
        // Renamed first: half of a state must not look like one.
        let (last, tmp) = (folder(out, *step, ""), folder(out, *step, ".tmp"));
        if let Err(error) = fs::rename(&last, &tmp).and_then(|()| remove(&tmp)) {
            tracing::warn!(%error, step, "an old state cannot be removed");
        }
    }

    steps.retain(|step| !gone.contains(step));
}

/// Bytes that the disk of a folder, which need not be there yet, has left; none if that cannot be
/// known.
pub fn room(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    fs4::available_space(there).ok()
}

/// Size and digest of a file; `read` hears of every so many bytes.
fn digest(path: &Path, read: impl Fn(u64)) -> io::Result<(u64, String)> {
    let (mut file, mut hash, mut bytes) = (files::open(path)?, Xxh3::new(), 0);
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, hex(&hash))),
            n => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
                read(n as u64);
            }
        }
    }
}

/// As the manifest has it.
fn hex(hash: &Xxh3) -> String {
    format!("{:016x}", hash.digest())
}

/// Where every tensor of a kind is.
fn index<'a>(shards: &'a [Shard], kind: &ShardKind) -> BTreeMap<&'a str, &'a Shard> {
    let of_kind = shards.iter().filter(|shard| shard.kind == *kind);
    of_kind.flat_map(|shard| shard.tensors.iter().map(move |name| (name.as_str(), shard))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_buffers_of_state_have_their_own_words() {
        for (word, kind) in [
            ("weights", ShardKind::Weights),
            ("first", ShardKind::State("first".into())),
            ("second", ShardKind::State("second".into())),
            ("left_basis", ShardKind::State("left_basis".into())),
            ("memory", ShardKind::Memory),
            ("older", ShardKind::Older),
            ("parts", ShardKind::Parts),
        ] {
            assert_eq!(serde_json::to_value(&kind).unwrap(), word);
            assert_eq!(serde_json::from_value::<ShardKind>(word.into()).unwrap(), kind);
        }
    }

    #[test]
    fn no_rule_calls_its_state_as_other_files_are_called() {
        use crate::optim::{Common, OptimizerConfig, OptimizerKind, rule};
        use crate::params::Layout;

        for kind in OptimizerKind::ALL {
            let config = OptimizerConfig::of(Common { kind, ..Common::default() });
            for (name, _) in
                rule(&config, 1, crate::precision::Precision::F32).state(&Layout::new(&[]))
            {
                assert_eq!(
                    ShardKind::from(name.to_owned()),
                    ShardKind::State(name.into()),
                    "{kind:?}"
                );
            }
        }
    }
}
