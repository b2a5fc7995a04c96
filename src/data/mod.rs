//! The text that is trained on and the text that is held out, as tokens.

mod batches;
mod config;
mod evaluation;
pub mod prepared;
mod synthetic;
mod tokens;
mod vocabulary;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use batches::{Batch, Batches, Reading, Shape};
pub use config::{DataConfig, HeldOut, Order, Tokenizer};
pub use evaluation::{Evaluation, UNCOUNTED};
pub use tokens::Tokens;
pub use vocabulary::{Listed, Vocabulary, utf8};

use crate::error::{Error, Result};
use prepared::{Prepared, is_prepared};
use serde::{Deserialize, Serialize};

/// What some editors write before a text; it is none of its characters.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Bytes of the synthetic corpus where the config names no data at all.
const DEFAULT_SYNTHETIC: usize = 4_000_000;

/// Training text and held-out text, opened and long enough.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub train: Tokens,
    pub held_out: Tokens,
    pub vocabulary: Vocabulary,
    /// Entropy rate in nats per byte, where it is known: no model of bytes can pass it.
    pub floor: Option<f64>,
    fingerprint: OnceLock<Fingerprint>,
}

/// What tells texts apart: numbers of tokens, and xxh3 of these and of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub train_tokens: usize,
    pub train: String,
    pub held_out_tokens: usize,
    pub held_out: String,
    pub vocabulary: String,
}

impl Corpus {
    /// Opens what `config` names. Bytes and prepared files are mapped; characters and words are
    /// tokenised, with a vocabulary that is made of the training text (characters: of both) unless
    /// there is one already.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that is missing, empty, of another tokenizer, no text, has
    /// unknown words, or leaves a part shorter than one window of T + 1 tokens (`held_sequence` + 1
    /// of the held-out part).
    pub fn open(
        config: &DataConfig,
        seed: u64,
        held_sequence: usize,
        known: Option<&Vocabulary>,
    ) -> Result<Corpus> {
        refuse_unread(config)?;
        let corpus = match prepared_path(config) {
            Some(path) => open_prepared(config, path, known)?,
            None if config.tokenizer == Tokenizer::Bytes => open_bytes(config, seed)?,
            None => open_text(config, seed, known)?,
        };

        long_enough(&corpus.train, &config.name(), config, config.sequence)?;
        let held_name = match &config.held_out {
            HeldOut::File(path) => path.display().to_string(),
            HeldOut::Fraction(_) => format!("held-out part of {}", config.name()),
        };

        long_enough(&corpus.held_out, &held_name, config, held_sequence)?;
        Ok(corpus)
    }

    fn new(train: Tokens, held_out: Tokens, vocabulary: Vocabulary, floor: Option<f64>) -> Corpus {
        Corpus { train, held_out, vocabulary, floor, fingerprint: OnceLock::new() }
    }

    /// What tells this corpus from others; reads all of it when it is asked for first.
    pub fn fingerprint(&self) -> &Fingerprint {
        let hex = |digest: u64| format!("{digest:016x}");
        self.fingerprint.get_or_init(|| Fingerprint {
            train_tokens: self.train.len(),
            train: hex(self.train.digest()),
            held_out_tokens: self.held_out.len(),
            held_out: hex(self.held_out.digest()),
            vocabulary: hex(self.vocabulary.digest()),
        })
    }

    /// The held-out text of `config` in the tokens of `vocabulary`, and its entropy rate where it
    /// is known.
    ///
    /// # Errors
    /// As [`Corpus::open`].
    pub fn open_held_out(
        config: &DataConfig,
        seed: u64,
        sequence: usize,
        vocabulary: &Vocabulary,
    ) -> Result<(Tokens, Option<f64>)> {
        refuse_unread(config)?;
        match &config.held_out {
            HeldOut::File(path) if prepared_path(config).is_none() => {
                let tokens = file_tokens(path, config.tokenizer, vocabulary)?;
                long_enough(&tokens, &path.display().to_string(), config, sequence)?;
                Ok((tokens, None))
            }
            _ => {
                let corpus = Corpus::open(config, seed, sequence, Some(vocabulary))?;
                Ok((corpus.held_out, corpus.floor))
            }
        }
    }
}

/// Settings that would not be read, and prepared files where a text is read.
fn refuse_unread(config: &DataConfig) -> Result<()> {
    if let Some(path) = prepared_path(config) {
        let problem = "is prepared, so its words are fixed; leave it out";
        if config.min_count > 1 {
            return Err(Error::config(
                "data.min_count",
                config.min_count,
                format!("{} {problem}", path.display()),
            ));
        }

        if let Some(list) = &config.vocabulary {
            return Err(Error::config(
                "data.vocabulary",
                list.display(),
                format!("{} {problem}", path.display()),
            ));
        }

        return Ok(());
    }

    if let Some(list) = config.vocabulary.as_ref().filter(|_| config.min_count > 1) {
        let found = format!("{} with data.vocabulary = {}", config.min_count, list.display());
        return Err(Error::config(
            "data.min_count",
            found,
            "a list is taken whole; leave one of them out",
        ));
    }

    let held_out = match &config.held_out {
        HeldOut::File(path) => Some(path),
        HeldOut::Fraction(_) => None,
    };

    if let Some(path) = config.paths.iter().flatten().chain(held_out).find(|path| is_prepared(path))
    {
        let remedy = "name it as data.path, and one of its splits as data.held_out";
        return Err(Error::data(path.display(), "a prepared file where a text is read", remedy));
    }

    if let Some(path) = held_out.filter(|path| !path.exists()) {
        let remedy = format!(
            "name a text; a split needs a prepared file as data.path, and {} is none",
            config.name()
        );

        return Err(Error::data(path.display(), "data.held_out names no file", remedy));
    }

    Ok(())
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

/// The path of the config's text, if that is a prepared file.
fn prepared_path(config: &DataConfig) -> Option<&Path> {
    config.path.as_deref().filter(|path| is_prepared(path))
}

fn open_prepared(config: &DataConfig, path: &Path, known: Option<&Vocabulary>) -> Result<Corpus> {
    let prepared = Prepared::open(path)?;
    let found = prepared.header.vocabulary.tokenizer;
    if found != config.tokenizer {
        let problem = format!(
            "prepared with tokenizer `{}`, the config has `{}`",
            found.word(),
            config.tokenizer.word()
        );

        return Err(Error::data(
            path.display(),
            problem,
            "set data.tokenizer, or prepare the text again",
        ));
    }

    if known.is_some_and(|known| *known.listed() != prepared.header.vocabulary) {
        let problem = "its vocabulary is not that of the weights";
        return Err(Error::data(
            path.display(),
            problem,
            "take the file that the model was trained on",
        ));
    }

    let train = prepared.split("train")?;
    let (train, held_out) = match &config.held_out {
        HeldOut::Fraction(fraction) => cut(&train, *fraction),
        HeldOut::File(split) => (train, prepared.split(&split.to_string_lossy())?),
    };

    Ok(Corpus::new(train, held_out, prepared.vocabulary(), None))
}

fn cut(tokens: &Tokens, fraction: f64) -> (Tokens, Tokens) {
    let cut = tokens.len() - (tokens.len() as f64 * fraction).round() as usize;
    (tokens.slice(0..cut), tokens.slice(cut..tokens.len()))
}

fn open_bytes(config: &DataConfig, seed: u64) -> Result<Corpus> {
    let (whole, floor) = match files(config)? {
        Some(paths) => (Tokens::of_files(paths)?, None),
        None => (Tokens::of_bytes(synthetic_bytes(config, seed)), Some(synthetic::entropy_rate())),
    };

    let (train, held_out) = match &config.held_out {
        HeldOut::Fraction(fraction) => cut(&whole, *fraction),
        HeldOut::File(path) => (whole, Tokens::of_files(std::slice::from_ref(path))?),
    };

    Ok(Corpus::new(train, held_out, Vocabulary::bytes(), floor))
}

fn open_text(config: &DataConfig, seed: u64, known: Option<&Vocabulary>) -> Result<Corpus> {
    let text = match files(config)? {
        Some(paths) => paths
            .iter()
            .map(|path| file_text(path, config.tokenizer))
            .collect::<Result<Vec<_>>>()?
            .concat(),
        None => String::from_utf8_lossy(&synthetic_bytes(config, seed)).into_owned(),
    };

    let mut held_name = config.name();
    let (train, held) = match &config.held_out {
        HeldOut::Fraction(fraction) => {
            let ranges = cut_text(&text, &[*fraction], config.tokenizer);
            (&text[ranges[0].clone()], text[ranges[1].clone()].to_owned())
        }
        HeldOut::File(path) => {
            held_name = path.display().to_string();
            (&text[..], file_text(path, config.tokenizer)?)
        }
    };

    let vocabulary = match known {
        Some(known) => known.clone(),
        None => made(config, train, &[&held])?,
    };

    let unknown = |error| unknown_word(error, config, known);
    let train = vocabulary.encode(train, &config.name()).map_err(unknown)?;
    let held_out = vocabulary.encode(&held, &held_name).map_err(unknown)?;
    let tokens = |ids: &[u32]| Tokens::of_ids(ids, vocabulary.len());
    Ok(Corpus::new(tokens(&train), tokens(&held_out), vocabulary.clone(), None))
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

/// The vocabulary that `config` asks for: of a list, or of the text.
///
/// # Errors
/// [`Error::Data`] about the list.
pub fn made(config: &DataConfig, train: &str, others: &[&str]) -> Result<Vocabulary> {
    match (config.tokenizer, &config.vocabulary) {
        (Tokenizer::Bytes, _) => Ok(Vocabulary::bytes()),
        (Tokenizer::Characters, _) => {
            Ok(Vocabulary::of_characters(&[&[train], others].concat().concat()))
        }
        (Tokenizer::Words, None) => Ok(Vocabulary::of_words(train, config.min_count)),
        (Tokenizer::Words, Some(path)) => {
            Vocabulary::of_list(&file_text(path, Tokenizer::Words)?, &path.display().to_string())
        }
    }
}

/// Cuts the given fractions off the end of a text: what is left first, then they. Words are cut
/// between lines, characters between characters.
pub fn cut_text(text: &str, fractions: &[f64], tokenizer: Tokenizer) -> Vec<Range<usize>> {
    let mut ends = Vec::new();
    let mut left = fractions.iter().sum::<f64>();
    for fraction in fractions {
        let mut cut =
            text.len() - (text.len() as f64 * left).round().min(text.len() as f64) as usize;
        cut = match tokenizer {
            // Between lines where that leaves about the share that is asked for, else between
            // words.
            Tokenizer::Words => {
                let before = &text.as_bytes()[..cut];
                let most = text.len() as f64 * fraction;
                let line = before
                    .iter()
                    .rposition(|b| *b == b'\n')
                    .filter(|end| (cut - end) as f64 <= most);
                let end = line.or_else(|| before.iter().rposition(|b| b.is_ascii_whitespace()));
                end.map_or(0, |end| end + 1)
            }
            Tokenizer::Characters => {
                (0..=cut).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
            }
            Tokenizer::Bytes => cut,
        };

        ends.push(cut);
        left -= fraction;
    }

    ends.push(text.len());
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends.iter().copied()).map(|(start, end)| start..end).collect()
}

/// A file as text; of words the last line is a whole one.
fn file_text(path: &Path, tokenizer: Tokenizer) -> Result<String> {
    let mut text = utf8(&tokens::map(path)?, &path.display().to_string())?
        .trim_start_matches(BYTE_ORDER_MARK)
        .to_owned();
    if tokenizer == Tokenizer::Words && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn file_tokens(path: &Path, tokenizer: Tokenizer, vocabulary: &Vocabulary) -> Result<Tokens> {
    match tokenizer {
        Tokenizer::Bytes => Tokens::of_files(&[path.to_owned()]),
        _ => Ok(Tokens::of_ids(
            &vocabulary.encode(&file_text(path, tokenizer)?, &path.display().to_string())?,
            vocabulary.len(),
        )),
    }
}

fn long_enough(tokens: &Tokens, name: &str, config: &DataConfig, sequence: usize) -> Result<()> {
    if tokens.len() > sequence {
        return Ok(());
    }
    Err(Error::data(
        name,
        format!("{} {}s, one window needs {}", tokens.len(), config.tokenizer.unit(), sequence + 1),
        "lower data.sequence, change data.held_out or use a longer text",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(path: PathBuf) -> DataConfig {
        DataConfig {
            path: Some(path),
            sequence: 8,
            held_out: HeldOut::Fraction(0.25),
            ..DataConfig::default()
        }
    }

    fn read(tokens: &Tokens) -> Vec<i64> {
        let mut out = Vec::new();
        tokens.read(0, tokens.len(), &mut out);
        out
    }

    #[test]
    fn the_last_part_is_held_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        let corpus = Corpus::open(&config(path), 1, 8, None).unwrap();
        assert_eq!((corpus.train.len(), corpus.held_out.len()), (75, 25));
        assert_eq!(read(&corpus.held_out)[0], 75);
    }

    #[test]
    fn words_are_cut_between_lines_and_counted_in_the_training_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "a b c a b c a b\nc a b c a b\nc a a a a a a\nb b b b b b d d\n")
            .unwrap();
        let words = DataConfig {
            tokenizer: Tokenizer::Words,
            min_count: 2,
            sequence: 4,
            ..config(path.clone())
        };
        let corpus = Corpus::open(&words, 1, 8, None).unwrap();
        assert_eq!((corpus.train.len(), corpus.held_out.len()), (24, 9));
        assert_eq!(corpus.vocabulary.listed().tokens, ["a", "b", "c", "<eos>", "<unk>"]);
        assert_eq!(read(&corpus.held_out), [1, 1, 1, 1, 1, 1, 4, 4, 3]);
        // Nothing is left out of the training part now: `d`, which only stands behind it, has no
        // number.
        let error = Corpus::open(&DataConfig { min_count: 1, ..words }, 1, 8, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a.txt: the word `d` is not in the vocabulary, which has no `<unk>`"),
            "{error}"
        );
    }

    #[test]
    fn characters_are_those_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "abc abc ".repeat(10)).unwrap();
        let characters = DataConfig { tokenizer: Tokenizer::Characters, ..config(path.clone()) };
        let corpus = Corpus::open(&characters, 1, 8, None).unwrap();
        assert_eq!(
            (corpus.vocabulary.len(), corpus.train.len(), corpus.held_out.len()),
            (4, 60, 20)
        );
        // Words of a text without lines are cut between words.
        let words = DataConfig { tokenizer: Tokenizer::Words, sequence: 4, ..config(path) };
        let corpus = Corpus::open(&words, 1, 4, None).unwrap();
        assert_eq!((corpus.train.len(), corpus.held_out.len()), (16, 6));
    }

    /// Twenty words, then one line of many: about the share that is asked for is held out all the
    /// same.
    #[test]
    fn a_very_long_line_is_cut_between_words() {
        let text = ["a b c d\n".repeat(5), "x y ".repeat(10_000), "\n".into()].concat();
        let ranges = cut_text(&text, &[0.05], Tokenizer::Words);
        let share = ranges[1].len() as f64 / text.len() as f64;
        assert!((share - 0.05).abs() < 1e-3, "{share}");
        let ranges = cut_text(&text, &[0.05, 0.05], Tokenizer::Words);
        assert!(
            ranges
                .iter()
                .skip(1)
                .all(|range| (range.len() as f64 / text.len() as f64 - 0.05).abs() < 1e-3)
        );
    }

    #[test]
    fn missing_empty_and_short_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let message = |path: &PathBuf| {
            Corpus::open(&config(path.clone()), 1, 8, None).unwrap_err().to_string()
        };
        assert!(message(&path).contains("a.txt: cannot be opened"), "{}", message(&path));
        std::fs::write(&path, b"").unwrap();
        assert!(message(&path).contains("a.txt: empty"), "{}", message(&path));
        std::fs::write(&path, b"123456789012").unwrap();
        assert!(message(&path).contains("held-out part of"), "{}", message(&path));
        assert!(message(&path).contains("3 bytes, one window needs 9"), "{}", message(&path));
    }

    #[test]
    fn a_prepared_file_must_be_of_the_same_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tokens");
        let vocabulary = Vocabulary::of_words("a b\n", 1);
        let source = prepared::Source { name: "a".into(), sha256: "0".into(), how: "words".into() };
        let ids: Vec<u8> = (0..30).map(|i| i % 3).collect();
        let splits = vec![("train", ids.clone()), ("test", ids[..12].to_vec())];
        prepared::write(&path, source, &vocabulary, splits).unwrap();
        let error = Corpus::open(&config(path.clone()), 1, 8, None).unwrap_err().to_string();
        assert!(
            error.contains("prepared with tokenizer `words`, the config has `bytes`"),
            "{error}"
        );
        let held_out = HeldOut::File("test".into());
        let words = DataConfig { tokenizer: Tokenizer::Words, held_out, ..config(path) };
        let corpus = Corpus::open(&words, 1, 8, None).unwrap();
        assert_eq!(
            (corpus.train.len(), corpus.held_out.len(), corpus.vocabulary.len()),
            (30, 12, 3)
        );
        let error = Corpus::open(&words, 1, 8, Some(&Vocabulary::bytes())).unwrap_err().to_string();
        assert!(error.contains("its vocabulary is not that of the weights"), "{error}");
        let refused =
            |config: &DataConfig| Corpus::open(config, 1, 8, None).unwrap_err().to_string();
        let rare = refused(&DataConfig { min_count: 3, ..words.clone() });
        assert!(
            rare.contains("`data.min_count`: found 3;") && rare.contains("is prepared"),
            "{rare}"
        );
        let text = DataConfig {
            path: None,
            paths: words.path.clone().map(|path| vec![path]),
            ..words.clone()
        };
        assert!(
            refused(&text).contains("a prepared file where a text is read"),
            "{}",
            refused(&text)
        );
        let missing = DataConfig { held_out: HeldOut::File("valid".into()), ..words };
        assert!(
            Corpus::open(&missing, 1, 8, None)
                .unwrap_err()
                .to_string()
                .contains("no split `valid`")
        );
    }
}
