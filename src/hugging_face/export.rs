//! `ouroboros export`: the newest state of a run becomes a folder of Hugging Face's.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use super::family::{Family, described, family_of, written};
use super::folder::{INDEX, WEIGHTS};
use super::import::{check_room, read_json};
use super::names::{HEAD, Piece, full, pieces};
use super::{BESIDE, BLOCK, TOKENIZER, TYPES};
use crate::bar::Bar;
use crate::checkpoint::values::{from_f32, to_f32, transposed};
use crate::checkpoint::{Checkpoint, TensorStream, WeightFiles};
use crate::data::{Subword, Vocabulary};
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::thousands;
use crate::model::{Arch, Dimensions, ModelConfig};
use crate::schedule::Tie;

/// Types that weights can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightType {
    F32,
    F16,
    Bf16,
}

impl WeightType {
    fn dtype(self) -> Dtype {
        match self {
            WeightType::F32 => Dtype::F32,
            WeightType::F16 => Dtype::F16,
            WeightType::Bf16 => Dtype::BF16,
        }
    }
}

/// What rounds to a number of f16, and not to infinity.
const LARGEST_F16: f32 = 65_519.0;

/// What `export` is asked to do.
#[derive(Debug)]
pub struct ExportRequest {
    /// A folder of weights, or a run's folder.
    pub run: PathBuf,
    /// The folder that is made.
    pub to: PathBuf,
    /// The type of all weights; none: that of the source, or f32.
    pub dtype: Option<WeightType>,
    /// Bytes of a file at most; none: one file.
    pub shard: Option<u64>,
}

/// A tensor to be written.
struct Target {
    name: String,
    dtype: Dtype,
    piece: Piece,
}

impl Target {
    fn bytes(&self) -> u64 {
        (self.piece.rows * self.piece.width() * self.dtype.size()) as u64
    }
}

/// Makes a folder of a run.
///
/// # Errors
/// [`Error::Checkpoint`] for weights that cannot be used, [`Error::Config`] for a model that no
/// family has, or a folder that is there already.
pub fn export(request: &ExportRequest) -> Result<()> {
    check_absent(&request.to)?;
    let tmp = files::temporary(&request.to);
    let checkpoint = Checkpoint::open_unverified(&request.run)?;
    // What is read is looked at while it is written.
    let (made, good) = std::thread::scope(|scope| {
        let good = scope.spawn(|| checkpoint.verify_with(|_| ()));
        let made = write_folder(request, &checkpoint, &tmp);
        let lost = |_| Err(Error::Internal("a panic while the weights were verified".into()));
        (made, good.join().unwrap_or_else(lost))
    });

    let made = match good {
        Ok(()) => made,
        // An older state that is good is taken instead, if there is one, and told.
        Err(_) => {
            let _ = fs::remove_dir_all(&tmp);
            Checkpoint::open(&request.run).and_then(|older| write_folder(request, &older, &tmp))
        }
    };

    let finished = made.and_then(|told| finish(&tmp, &request.to).map(|()| told));
    match finished {
        Ok(told) => {
            say!("{}: {told}", request.to.display());
            Ok(())
        }
        Err(error) => {
            let _ = fs::remove_dir_all(&tmp);
            Err(error)
        }
    }
}

/// Writes the folder of a state; gives what it is.
fn write_folder(request: &ExportRequest, checkpoint: &Checkpoint, tmp: &Path) -> Result<String> {
    let config = &checkpoint.manifest.config;
    let family = family_of(&config.model)?;
    let source = checkpoint.source();
    let json = source.as_ref().map(|kept| read_json(&kept.join("config.json"))).transpose()?;
    // A folder that another model was imported into says nothing of this one.
    let told = json.as_ref().and_then(|json| described(json).ok());
    let told = told.filter(|told| of_one_shape(&told.model, &config.model));
    let (source, json) = if told.is_some() { (source, json) } else { (None, None) };
    let family = told.map_or(family, |told| told.family);
    let types = source.as_ref().map(|kept| read_json(&kept.join(TYPES))).transpose()?;

    let vocabulary = config.model.vocabulary.unwrap_or(checkpoint.vocabulary.len());
    let dimensions = Dimensions::new(&config.model, vocabulary, config.data.sequence);
    let mut pieces = pieces(family, &dimensions)?;
    untie(&mut pieces, &dimensions, config.model.arch);
    let targets = targets(family, pieces, request.dtype, types.as_ref());
    check_room(&request.to, targets.iter().map(Target::bytes).sum())?;

    let main = targets.first().map_or(Dtype::F32, |target| target.dtype);
    let sequence = config.data.sequence;
    let mut json = written(family, &config.model, vocabulary, sequence, main, json.as_ref());
    // Where the model has learned another tokenizer's tokens its files are none of the source's.
    let kept = source.as_deref().filter(|source| is_theirs(source, &checkpoint.vocabulary));
    if let (Some(end), None) = (checkpoint.vocabulary.end(), kept) {
        json.insert("eos_token_id".to_owned(), end.into());
    }

    make(checkpoint, tmp, &targets, request.shard, &json)?;
    beside(kept, &checkpoint.vocabulary, tmp)?;

    let values: usize = targets.iter().map(|t| t.piece.rows * t.piece.width()).sum();
    let (step, values) = (checkpoint.step(), thousands(values as u64));
    Ok(format!("{} of step {step}, {values} values", family.word()))
}

/// Whether two models have the same parameters.
fn of_one_shape(one: &ModelConfig, other: &ModelConfig) -> bool {
    let shape = |model: &ModelConfig| {
        let settled = model.settled();
        let sizes = [settled.layers, settled.d_model, settled.heads, settled.d_ff];
        let heads = (settled.d_head, settled.kv_heads, settled.attention_bias, settled.qk_norm);
        (settled.arch, sizes, heads, settled.vocabulary, settled.tie != Tie::Untied)
    };
    shape(one) == shape(other)
}

/// A tied Transformer of this program multiplies its table on its way in and out: as GPT-2 it has two.
fn untie(pieces: &mut Vec<Piece>, dimensions: &Dimensions, arch: Arch) {
    if arch != Arch::Transformer || !dimensions.tied {
        return;
    }

    let [_, out] = dimensions.table_scales();
    let into = dimensions.embedding_scale().unwrap_or(1.0);
    let table = pieces.iter_mut().find(|piece| piece.ours == "embedding.tokens");
    if let Some(table) = table {
        let head = Piece { theirs: HEAD.to_owned(), scale: out, ..table.clone() };
        table.scale = into;
        pieces.push(head);
    }
}

/// The tensors with their names and types.
fn targets(
    family: Family,
    pieces: Vec<Piece>,
    dtype: Option<WeightType>,
    types: Option<&Map<String, Value>>,
) -> Vec<Target> {
    let word = |name: &str| types.and_then(|types| types.get(name)?.as_str());
    let bare = pieces.first().is_some_and(|piece| word(&piece.theirs).is_some());
    let prefix = if bare { "" } else { family.prefix() };
    let target = |piece: Piece| {
        let name = full(prefix, &piece.theirs);
        let source = match word(&name) {
            Some("BF16") => Dtype::BF16,
            Some("F16") => Dtype::F16,
            _ => Dtype::F32,
        };
        Target { dtype: dtype.map_or(source, WeightType::dtype), name, piece }
    };
    pieces.into_iter().map(target).collect()
}

/// Whether there is nothing yet.
fn check_absent(to: &Path) -> Result<()> {
    match to.exists() {
        true => {
            Err(Error::config("--to", to.display(), "it is there already: take another folder"))
        }
        false => Ok(()),
    }
}

/// Writes config.json and the weights.
fn make(
    checkpoint: &Checkpoint,
    folder: &Path,
    targets: &[Target],
    shard: Option<u64>,
    json: &Map<String, Value>,
) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| {
        Error::config("--to", folder.display(), format!("cannot be made ({error})"))
    })?;
    let mut files = checkpoint.weights();
    let parts = parts(targets, shard);
    let mut map = Map::new();
    let bar = Bar::of_bytes(targets.iter().map(Target::bytes).sum(), "exporting");
    for (number, part) in parts.iter().enumerate() {
        let name = match parts.len() {
            1 => WEIGHTS.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        write(&mut files, &folder.join(&name), part, &bar)?;
        map.extend(part.iter().map(|target| (target.name.clone(), name.clone().into())));
    }

    if parts.len() > 1 {
        let bytes: u64 = targets.iter().map(Target::bytes).sum();
        let index = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
        put_json(&folder.join(INDEX), &index)?;
    }
    put_json(&folder.join("config.json"), &Value::Object(json.clone()))
}

/// The tensors of every file, in order.
fn parts(targets: &[Target], shard: Option<u64>) -> Vec<&[Target]> {
    let Some(most) = shard else { return vec![targets] };
    let (mut parts, mut start, mut held) = (Vec::new(), 0, 0);
    for (i, target) in targets.iter().enumerate() {
        if i > start && held + target.bytes() > most {
            parts.push(&targets[start..i]);
            (start, held) = (i, 0);
        }
        held += target.bytes();
    }

    parts.push(&targets[start..]);
    parts
}

/// Writes a file of tensors.
fn write(files: &mut WeightFiles, path: &Path, targets: &[Target], bar: &Bar) -> Result<()> {
    let unwritten = |error: std::io::Error| Error::unwritten(path, error);
    let tensors: Vec<(String, Dtype, Vec<usize>)> = targets
        .iter()
        .map(|target| (target.name.clone(), target.dtype, target.piece.shape.clone()))
        .collect();
    // Readers ask for it.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut stream = TensorStream::create(path, &tensors, Some(metadata)).map_err(unwritten)?;
    for target in targets {
        copy(files, target, |bytes| {
            bar.advance(bytes.len() as u64);
            stream.put(bytes).map_err(unwritten)
        })?;
    }

    stream.finish().map(drop).map_err(unwritten)
}

/// Hands a tensor's values on, in its type and as they lie there.
fn copy(
    files: &mut WeightFiles,
    target: &Target,
    mut put: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Target { piece, dtype, .. } = target;
    let count = piece.rows * piece.width();
    let of = files.dtype(&piece.ours)?;
    let block = if piece.transposed { count } else { count.min(BLOCK / of.size()) };
    let mut buffer = vec![0; block * of.size()];
    for start in (0..count).step_by(block.max(1)) {
        let values = block.min(count - start);
        let from = (piece.first_row * piece.width() + start) * of.size();
        let bytes = &mut buffer[..values * of.size()];
        files.fill(&piece.ours, from, bytes)?;
        if *dtype == of && !piece.transposed && piece.scale == 1.0 {
            put(bytes)?;
            continue;
        }

        let mut there = to_f32(of, bytes);
        if piece.scale != 1.0 {
            there.iter_mut().for_each(|value| *value = (f64::from(*value) * piece.scale) as f32);
        }

        if piece.transposed {
            there = transposed(&there, piece.shape[1], piece.shape[0]);
        }

        let too_large = |value: &f32| value.is_finite() && value.abs() > LARGEST_F16;
        if let Some(value) = there.iter().find(|value| *dtype == Dtype::F16 && too_large(value)) {
            let remedy = format!("{} has the value {value}, which f16 has not", target.name);
            return Err(Error::config("--dtype", "f16", remedy));
        }

        put(&from_f32(*dtype, &there))?;
    }

    Ok(())
}

/// Whether the model's tokens are those of the source's tokenizer.
fn is_theirs(source: &Path, vocabulary: &Vocabulary) -> bool {
    if vocabulary.json().is_none() {
        return true;
    }

    let theirs = Subword::open(&source.join(TOKENIZER), None).map(Vocabulary::subwords);
    theirs.is_ok_and(|theirs| theirs.difference(vocabulary).is_none())
}

/// The files of a tokenizer and of generation: those of the source, or the model's own.
fn beside(source: Option<&Path>, vocabulary: &Vocabulary, folder: &Path) -> Result<()> {
    if let Some(json) = vocabulary.json().filter(|_| source.is_none()) {
        let path = folder.join(TOKENIZER);
        files::write(&path, json).map_err(|error| Error::unwritten(&path, error))?;
        let end = vocabulary.end().and_then(|end| vocabulary.token(end));
        let told = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end });
        put_json(&folder.join("tokenizer_config.json"), &told)?;
    }

    for name in BESIDE {
        let Some(from) = source.map(|source| source.join(name)).filter(|from| from.is_file())
        else {
            continue;
        };

        let to = folder.join(name);
        let bytes = files::read(&from).map_err(|error| Error::checkpoint(&from, error))?;
        files::write(&to, &bytes).map_err(|error| Error::unwritten(&to, error))?;
    }

    let generation = folder.join("generation_config.json");
    match generation.exists() {
        true => Ok(()),
        false => put_json(&generation, &json!({ "_from_model_config": true })),
    }
}

fn put_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    files::write(path, text.as_bytes()).map_err(|error| Error::unwritten(path, error))
}

/// Gives the complete folder its name.
fn finish(tmp: &Path, to: &Path) -> Result<()> {
    files::place(tmp, to).map_err(|error| Error::unwritten(to, error))
}
