//! Opens one text of a config: prepared, of token ids, of bytes, or to be tokenised here.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::config::ONE_BYTE;
use super::foreign::{self, is_foreign};
use super::prepared::{Prepared, is_prepared};
use super::text::{cut_text, file_text, made};
use super::{
    DataConfig, HeldOut, Measure, Subword, Tokenizer, Tokens, Unit, Vocabulary, synthetic,
};
use crate::error::{Error, Result};

/// Bytes of the synthetic corpus where the config names no data at all.
const DEFAULT_SYNTHETIC: usize = 4_000_000;

/// Tokens whose text tells how many bytes a token has, where nobody has counted.
const SAMPLE: usize = 1 << 18;

/// A text that is evaluated.
#[derive(Debug, Clone)]
pub struct HeldOutText {
    pub tokens: Tokens,
    /// Of the text as it was before it became tokens, where that is known.
    bytes: Option<u64>,
    /// Entropy rate in nats per byte, where it is known: no model of bytes can pass it.
    pub floor: Option<f64>,
    measure: OnceLock<Measure>,
}

impl HeldOutText {
    pub(super) fn new(tokens: Tokens, bytes: Option<u64>) -> HeldOutText {
        HeldOutText { tokens, bytes, floor: None, measure: OnceLock::new() }
    }

    /// How losses on it are told. Where nobody has counted the bytes of the text, its beginning is
    /// turned into text again.
    pub fn measure(&self, vocabulary: &Vocabulary) -> Measure {
        *self.measure.get_or_init(|| {
            let bytes_per_token = match self.bytes {
                Some(bytes) => Some(bytes as f64 / self.tokens.len() as f64),
                None if vocabulary.unit() == Unit::Subwords => sampled(&self.tokens, vocabulary),
                None => None,
            };
            Measure { unit: vocabulary.unit(), bytes_per_token }
        })
    }

    /// Texts one after the other.
    pub(super) fn joined(texts: &[HeldOutText]) -> HeldOutText {
        let tokens: Vec<Tokens> = texts.iter().map(|text| text.tokens.clone()).collect();
        let bytes = texts.iter().map(|text| text.bytes).sum();
        HeldOutText::new(Tokens::joined(&tokens), bytes)
    }
}

/// Bytes of text that a token stands for, by the beginning of a text.
fn sampled(tokens: &Tokens, vocabulary: &Vocabulary) -> Option<f64> {
    let mut beginning = Vec::new();
    tokens.read(0, tokens.len().min(SAMPLE), &mut beginning);
    let bytes = match vocabulary.unit() {
        Unit::Subwords => vocabulary.text_of(&beginning).ok()?.len(),
        Unit::Ids => return None,
        Unit::Bytes | Unit::Characters | Unit::Words => vocabulary.decode(&beginning).len(),
    };
    (!beginning.is_empty()).then(|| bytes as f64 / beginning.len() as f64)
}

/// Bytes of text that a token of a text to train on stands for, where that is known.
pub(super) fn bytes_per_token(tokens: &Tokens, vocabulary: &Vocabulary) -> Option<f64> {
    if vocabulary.unit() == Unit::Bytes {
        return Some(1.0);
    }
    let counted = tokens.text_bytes().map(|bytes| bytes as f64 / tokens.len().max(1) as f64);
    counted.or_else(|| sampled(tokens, vocabulary))
}

/// A text, the part of it that is held out, and what both are made of.
#[derive(Debug)]
pub struct Opened {
    pub train: Tokens,
    pub held_out: HeldOutText,
    pub vocabulary: Vocabulary,
}

/// Opens the text of a config, with a vocabulary that is made of it or read, unless there is one
/// already.
///
/// # Errors
/// [`Error::Data`] about the text, [`Error::Config`] about a setting that would not be read.
pub fn open(config: &DataConfig, seed: u64, known: Option<&Vocabulary>) -> Result<Opened> {
    refuse_unread(config)?;
    let unit = known.map_or_else(|| config.unit(), Vocabulary::unit);
    match (prepared_path(config), ids_path(config)) {
        (Some(path), _) => open_prepared(config, path, known),
        (None, Some(path)) => open_ids(config, path, known),
        _ if unit == Unit::Bytes => open_bytes(config, seed),
        _ => open_text(config, seed, unit, known),
    }
}

/// Opens a file of its own in the tokens of a vocabulary, all of it.
///
/// # Errors
/// As [`open`].
pub fn open_file(path: &Path, config: &DataConfig, vocabulary: &Vocabulary) -> Result<HeldOutText> {
    if is_prepared(path) {
        let prepared = Prepared::open(path)?;
        same_vocabulary(&prepared.vocabulary()?, vocabulary, path)?;
        let splits = prepared.header.splits.iter().map(|split| prepared.split(&split.name));
        let tokens = Tokens::joined(&splits.collect::<Result<Vec<_>>>()?);
        let bytes = tokens.text_bytes();
        return Ok(HeldOutText::new(tokens, bytes));
    }

    if is_foreign(path) && matches!(vocabulary.unit(), Unit::Subwords | Unit::Ids) {
        return Ok(HeldOutText::new(foreign::open(path, config, vocabulary)?, None));
    }

    refuse_packed(path)?;
    if vocabulary.unit() == Unit::Bytes {
        let tokens = Tokens::of_files(&[path.to_owned()])?;
        let tokens = tokens.ended_by(document_end(config, vocabulary));
        let bytes = Some(tokens.len() as u64);
        return Ok(HeldOutText::new(tokens, bytes));
    }

    let text = file_text(path, vocabulary.unit())?;
    let ids = vocabulary.encode(&text, &path.display().to_string())?;
    let end = document_end(config, vocabulary);
    let tokens = Tokens::of_ids(&ids, vocabulary.len()).ended_by(end);
    Ok(HeldOutText::new(tokens, Some(text.len() as u64)))
}

/// The token that ends a document of a text in these tokens, if there is one.
pub fn document_end(config: &DataConfig, vocabulary: &Vocabulary) -> Option<u32> {
    let named = config.named_end();
    match vocabulary.unit() {
        Unit::Subwords => vocabulary.end(),
        Unit::Bytes => named?.bytes().next().map(u32::from),
        Unit::Characters => vocabulary.encode(named?, "data.end_token").ok()?.first().copied(),
        // A line is no document.
        Unit::Words | Unit::Ids => None,
    }
}

/// The file that is held out, if that is no split of a prepared one.
pub fn held_out_file(config: &DataConfig) -> Option<&Path> {
    let HeldOut::File(path) = &config.held_out else { return None };
    let is_split = |file: &Path| {
        let prepared = Prepared::open(file);
        prepared.is_ok_and(|prepared| prepared.split(&path.to_string_lossy()).is_ok())
    };
    match prepared_path(config) {
        Some(file) if is_split(file) || !path.exists() => None,
        _ => Some(path),
    }
}

/// Settings that would not be read, and files of another kind than is read.
fn refuse_unread(config: &DataConfig) -> Result<()> {
    refuse_ids_settings(config)?;
    let named = config.named_end().filter(|_| config.unit() != Unit::Subwords);
    if let Some(token) = named {
        let wrong = |remedy: &str| Error::config("data.end_token", format!("{token:?}"), remedy);
        match prepared_path(config).or_else(|| ids_path(config)) {
            Some(path) => {
                let remedy = format!(
                    "{} has tokens already; leave it out, or set it to \"\"",
                    path.display()
                );
                return Err(wrong(&remedy));
            }
            None if config.unit() == Unit::Bytes && token.len() != 1 => {
                return Err(wrong(ONE_BYTE));
            }
            None => {}
        }
    }

    match prepared_path(config) {
        Some(path) => refuse_words_settings(config, path),
        None => refuse_other_kinds(config),
    }
}

/// What is said of words that are fixed already.
fn refuse_words_settings(config: &DataConfig, path: &Path) -> Result<()> {
    let remedy = format!("{} is prepared, so its words are fixed; leave it out", path.display());
    if config.min_count > 1 {
        return Err(Error::config("data.min_count", config.min_count, remedy));
    }

    match &config.vocabulary {
        Some(list) => Err(Error::config("data.vocabulary", list.display(), remedy)),
        None => Ok(()),
    }
}

/// What is no text where texts are read, and a held-out text that is not there.
fn refuse_other_kinds(config: &DataConfig) -> Result<()> {
    if let Some(list) = config.vocabulary.as_ref().filter(|_| config.min_count > 1) {
        let found = format!("{} with data.vocabulary = {}", config.min_count, list.display());
        let remedy = "a list is taken whole; leave one of them out";
        return Err(Error::config("data.min_count", found, remedy));
    }

    for path in config.paths.iter().flatten() {
        let remedy = "name it as data.path, or several in [[data.source]]";
        if config.reads_ids(path) {
            let remedy = format!("{remedy}; with data.tokenizer = \"bytes\" its bytes are read");
            return Err(Error::data(path.display(), "token ids where a text is read", remedy));
        }

        if is_prepared(path) {
            let problem = "a prepared file where a text is read";
            return Err(Error::data(path.display(), problem, remedy));
        }
    }

    if ids_path(config).is_none() {
        let texts = config.path.iter().chain(config.paths.iter().flatten());
        texts.map(PathBuf::as_path).try_for_each(refuse_packed)?;
    }

    match &config.held_out {
        HeldOut::File(path) if !path.exists() => {
            let name = config.name();
            let remedy = format!(
                "name a text; a split needs a prepared file as data.path, and {name} is none"
            );
            Err(Error::data(path.display(), "data.held_out names no file", remedy))
        }
        _ => Ok(()),
    }
}

/// What is said of token ids where there are none.
fn refuse_ids_settings(config: &DataConfig) -> Result<()> {
    let ids = ids_path(config).is_some();
    let size = config.vocabulary_size.map(|size| ("data.vocabulary_size", size));
    let bytes = config.token_bytes.map(|bytes| ("data.token_bytes", bytes));
    let remedy = format!("{} is no file of token ids (.bin); leave it out", config.name());
    match size.or(bytes).filter(|_| !ids) {
        Some((key, found)) => Err(Error::config(key, found, remedy)),
        None => Ok(()),
    }
}

/// Refuses what would be read as a text and is none.
fn refuse_packed(path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    match ending.to_lowercase().as_str() {
        "jsonl" | "ndjson" | "parquet" | "gz" | "zst" => {
            let remedy = "make a file of tokens of it: ouroboros data prepare";
            Err(Error::data(path.display(), format!("a .{ending} file is no text"), remedy))
        }
        _ => Ok(()),
    }
}

/// The files of a text; none for the synthetic one.
fn files(config: &DataConfig) -> Result<Option<&[PathBuf]>> {
    match (&config.path, &config.paths) {
        (Some(path), _) => Ok(Some(std::slice::from_ref(path))),
        (None, Some(paths)) if paths.is_empty() => {
            Err(Error::config("data.paths", "an empty list", "name at least one file"))
        }
        (None, paths) => Ok(paths.as_deref()),
    }
}

fn synthetic_bytes(config: &DataConfig, seed: u64) -> Vec<u8> {
    synthetic::generate(seed, config.synthetic.unwrap_or(DEFAULT_SYNTHETIC))
}

/// The path of the config's text, if that has token ids.
fn ids_path(config: &DataConfig) -> Option<&Path> {
    config.path.as_deref().filter(|path| config.reads_ids(path))
}

/// The path of the config's text, if that is a prepared file.
fn prepared_path(config: &DataConfig) -> Option<&Path> {
    config.path.as_deref().filter(|path| is_prepared(path))
}

fn open_prepared(config: &DataConfig, path: &Path, known: Option<&Vocabulary>) -> Result<Opened> {
    let prepared = Prepared::open(path)?;
    let vocabulary = prepared.vocabulary()?;
    match (known, &config.tokenizer) {
        (Some(known), _) => same_vocabulary(&vocabulary, known, path)?,
        (None, Some(tokenizer)) => check_tokenizer(tokenizer, config, &vocabulary, path)?,
        (None, None) => {}
    }

    let train = prepared.split("train")?;
    let (train, held_out) = match (&config.held_out, held_out_file(config)) {
        (HeldOut::Fraction(fraction), _) => cut(&train, *fraction),
        (_, Some(file)) => {
            let held_out = open_file(file, config, &vocabulary)?;
            return Ok(Opened { train, held_out, vocabulary });
        }
        (HeldOut::File(split), None) => (train, prepared.split(&split.to_string_lossy())?),
    };

    let bytes = held_out.text_bytes();
    Ok(Opened { train, held_out: HeldOutText::new(held_out, bytes), vocabulary })
}

fn same_vocabulary(found: &Vocabulary, known: &Vocabulary, path: &Path) -> Result<()> {
    let Some(difference) = found.difference(known) else { return Ok(()) };
    let problem =
        format!("its vocabulary is not that of the weights, or of other texts: {difference}");
    Err(Error::data(path.display(), problem, "take the file that the model was trained on"))
}

/// Whether a prepared file was tokenised as the config says.
fn check_tokenizer(
    tokenizer: &Tokenizer,
    config: &DataConfig,
    found: &Vocabulary,
    path: &Path,
) -> Result<()> {
    let remedy = "leave data.tokenizer out, or prepare the text again";
    let wrong = |problem: String| Err(Error::data(path.display(), problem, remedy));
    if found.unit() != tokenizer.unit() {
        let found = found.unit().word();
        return wrong(format!("prepared with tokenizer `{found}`, the config has `{tokenizer}`"));
    }

    let Tokenizer::File(file) = tokenizer else { return Ok(()) };
    let asked = Vocabulary::subwords(Subword::open(file, config.end_token.as_deref())?);
    match found.difference(&asked) {
        Some(difference) => wrong(format!("prepared with another tokenizer: {difference}")),
        None => Ok(()),
    }
}

/// Where a document of a list begins, if there is one that leaves half of the share at least.
fn cut(tokens: &Tokens, fraction: f64) -> (Tokens, Tokens) {
    let share = (tokens.len() as f64 * fraction).round() as usize;
    let cut = tokens.len() - share;
    let near = |next: &usize| share > 0 && *next <= cut + share / 2;
    let cut = tokens.next_document(cut).filter(near).unwrap_or(cut);
    (tokens.slice(0..cut), tokens.slice(cut..tokens.len()))
}

/// A file of token ids, and what they are ids of.
fn open_ids(config: &DataConfig, path: &Path, known: Option<&Vocabulary>) -> Result<Opened> {
    let vocabulary = match (known, &config.tokenizer, config.vocabulary_size) {
        (Some(known), ..) => known.clone(),
        (_, Some(Tokenizer::File(file)), _) => {
            Vocabulary::subwords(Subword::open(file, config.end_token.as_deref())?)
        }
        (.., Some(size)) => Vocabulary::ids(size),
        _ => {
            let remedy = format!(
                "{} has token ids: say how many there may be, or name their data.tokenizer; its bytes are read with data.tokenizer = \"bytes\"",
                path.display()
            );
            return Err(Error::config("data.vocabulary_size", "nothing", remedy));
        }
    };

    let whole = foreign::open(path, config, &vocabulary)?;
    let (train, held_out) = match &config.held_out {
        HeldOut::Fraction(fraction) => {
            let (train, held_out) = cut(&whole, *fraction);
            (train, HeldOutText::new(held_out, None))
        }
        HeldOut::File(file) => (whole, open_file(file, config, &vocabulary)?),
    };
    Ok(Opened { train, held_out, vocabulary })
}

fn open_bytes(config: &DataConfig, seed: u64) -> Result<Opened> {
    let (whole, floor) = match files(config)? {
        Some(paths) => (Tokens::of_files(paths)?, None),
        None => (Tokens::of_bytes(synthetic_bytes(config, seed)), Some(synthetic::entropy_rate())),
    };

    let vocabulary = Vocabulary::bytes();
    let whole = whole.ended_by(document_end(config, &vocabulary));
    let (train, held_out) = match &config.held_out {
        HeldOut::Fraction(fraction) => {
            let (train, held_out) = cut(&whole, *fraction);
            let bytes = Some(held_out.len() as u64);
            (train, HeldOutText::new(held_out, bytes))
        }
        HeldOut::File(path) => (whole, open_file(path, config, &vocabulary)?),
    };

    let held_out = HeldOutText { floor, ..held_out };
    Ok(Opened { train, held_out, vocabulary })
}

fn open_text(
    config: &DataConfig,
    seed: u64,
    unit: Unit,
    known: Option<&Vocabulary>,
) -> Result<Opened> {
    let text = match files(config)? {
        Some(paths) => {
            paths.iter().map(|path| file_text(path, unit)).collect::<Result<Vec<_>>>()?.concat()
        }
        None => String::from_utf8_lossy(&synthetic_bytes(config, seed)).into_owned(),
    };

    // What is held out is a text as well, or tokens already.
    let (train, held) = match &config.held_out {
        HeldOut::Fraction(fraction) => {
            let ranges = cut_text(text.as_bytes(), &[*fraction], unit);
            (&text[ranges[0].clone()], Some((text[ranges[1].clone()].to_owned(), config.name())))
        }
        HeldOut::File(path) if is_prepared(path) => (&text[..], None),
        HeldOut::File(path) => {
            (&text[..], Some((file_text(path, unit)?, path.display().to_string())))
        }
    };

    let vocabulary = match known {
        Some(known) => known.clone(),
        None => made(config, train, &[held.as_ref().map_or("", |(text, _)| text)])?,
    };

    let unknown = |error| unknown_word(error, config, known);
    let end = document_end(config, &vocabulary);
    if let Some(token) = config.named_end().filter(|_| end.is_none()) {
        let remedy = "the vocabulary has no such character; name another";
        return Err(Error::config("data.end_token", format!("{token:?}"), remedy));
    }

    let tokens = |ids: &[u32]| Tokens::of_ids(ids, vocabulary.len()).ended_by(end);
    let train = tokens(&vocabulary.encode(train, &config.name()).map_err(unknown)?);
    let held_out = match (held, &config.held_out) {
        (None, HeldOut::File(path)) => open_file(path, config, &vocabulary)?,
        (held, _) => {
            let (text, name) = held.unwrap_or_default();
            let ids = vocabulary.encode(&text, &name).map_err(unknown)?;
            HeldOutText::new(tokens(&ids), Some(text.len() as u64))
        }
    };
    Ok(Opened { train, held_out, vocabulary })
}

/// An error about a word without a number, with the remedy that this config allows.
fn unknown_word(error: Error, config: &DataConfig, known: Option<&Vocabulary>) -> Error {
    let Error::Data { path, problem, remedy } = error else { return error };
    let remedy = match &config.vocabulary {
        _ if known.is_some() => "give a text in the words that the model knows".to_owned(),
        Some(list) => format!("add `<unk>`, or the word, to {}", list.display()),
        None => remedy,
    };
    Error::Data { path, problem, remedy }
}
