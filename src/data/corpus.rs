//! Everything that a run reads: one text or several that are mixed, and what is held out.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::opening::{HeldOutText, Opened, bytes_per_token, held_out_file, open, open_file};
use super::prepared::is_prepared;
use super::{DataConfig, HeldOut, Measure, Mixture, SourceConfig, Tokens, Unit, Vocabulary};
use crate::error::{Error, Result};

/// Tokens of a vocabulary at most.
const MOST_TOKENS: usize = 1 << 24;

/// Training texts and held-out text, opened and long enough.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// One, or those that are mixed.
    pub sources: Vec<Source>,
    pub held_out: HeldOutText,
    pub vocabulary: Vocabulary,
    /// Which source gives which row.
    pub mixture: Mixture,
    fingerprint: OnceLock<Fingerprint>,
}

/// A text to train on.
#[derive(Debug, Clone)]
pub struct Source {
    pub name: String,
    pub tokens: Tokens,
    /// Its share of the rows, over the sum of all weights.
    pub weight: f64,
    /// How often it is read at most.
    pub epochs: Option<usize>,
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
    /// Opens what `config` names. Bytes, prepared files and token ids are mapped; other texts are
    /// tokenised, with a vocabulary that is made of the training text (characters: of both) or
    /// read, unless there is one already.
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
        let corpus = match &config.source[..] {
            [] => {
                let Opened { train, held_out, vocabulary } = open(config, seed, known)?;
                let source =
                    Source { name: config.name(), tokens: train, weight: 1.0, epochs: None };
                Corpus::new(vec![source], held_out, vocabulary, config.sequence)
            }
            sources => open_mixed(config, sources, seed, known)?,
        };

        let (name, size) = (corpus.vocabulary.name(), corpus.vocabulary.len());
        if size > MOST_TOKENS {
            let problem =
                format!("a vocabulary of {size} tokens, {MOST_TOKENS} at most are possible");
            return Err(Error::data(config.name(), problem, "give another file or tokenizer"));
        }

        for source in &corpus.sources {
            long_enough(&source.tokens, &source.name, name, config.sequence)?;
        }

        long_enough(&corpus.held_out.tokens, &held_out_name(config), name, held_sequence)?;
        Ok(corpus)
    }

    pub(super) fn new(
        sources: Vec<Source>,
        held_out: HeldOutText,
        vocabulary: Vocabulary,
        sequence: usize,
    ) -> Corpus {
        let mixture = Mixture::new(&sources, sequence);
        Corpus { sources, held_out, vocabulary, mixture, fingerprint: OnceLock::new() }
    }

    /// Tokens to train on, of all sources.
    pub fn train_tokens(&self) -> usize {
        self.sources.iter().map(|source| source.tokens.len()).sum()
    }

    /// The share of the tokens below each of `cutoffs`, from the one before on, and of the rest.
    pub fn shares(&self, cutoffs: &[usize]) -> Vec<f64> {
        let weights: f64 = self.sources.iter().map(|source| source.weight).sum();
        let mut all = vec![0.0; cutoffs.len() + 1];
        for source in &self.sources {
            let shares = source.tokens.shares(cutoffs);
            all.iter_mut()
                .zip(shares)
                .for_each(|(all, share)| *all += share * source.weight / weights);
        }
        all
    }

    /// What tells this corpus from others; reads all of a text that was not prepared when it is
    /// asked for first.
    pub fn fingerprint(&self) -> &Fingerprint {
        let hex = |digest: u64| format!("{digest:016x}");
        self.fingerprint.get_or_init(|| Fingerprint {
            train_tokens: self.train_tokens(),
            train: hex(self.train_digest()),
            held_out_tokens: self.held_out.tokens.len(),
            held_out: hex(self.held_out.tokens.digest()),
            vocabulary: hex(self.vocabulary.digest()),
        })
    }

    fn train_digest(&self) -> u64 {
        if let [only] = &self.sources[..] {
            return only.tokens.digest();
        }

        let mut numbers = Vec::new();
        for source in &self.sources {
            numbers.extend(source.tokens.digest().to_le_bytes());
            numbers.extend(source.weight.to_le_bytes());
            numbers.extend(source.epochs.unwrap_or(usize::MAX).to_le_bytes());
        }
        xxh3_64(&numbers)
    }

    /// How losses on the held-out text are told.
    pub fn measure(&self) -> Measure {
        self.held_out.measure(&self.vocabulary)
    }

    /// Bytes of text that a token to train on stands for, the mean over a mixture's rows, where that
    /// is known.
    pub fn train_bytes_per_token(&self) -> Option<f64> {
        let weights: f64 = self.sources.iter().map(|source| source.weight).sum();
        let of = |source: &Source| {
            let bytes = bytes_per_token(&source.tokens, &self.vocabulary)?;
            Some(bytes * source.weight / weights)
        };
        self.sources.iter().map(of).sum()
    }

    /// The held-out text of `config` in the tokens of `vocabulary`.
    ///
    /// # Errors
    /// As [`Corpus::open`].
    pub fn open_held_out(
        config: &DataConfig,
        seed: u64,
        sequence: usize,
        vocabulary: &Vocabulary,
    ) -> Result<HeldOutText> {
        // Of a mixture a name may be that of a split of its sources.
        let first = config.source.first().map(|source| alone(config, source));
        let Some(path) = held_out_file(first.as_ref().unwrap_or(config)) else {
            return Ok(Corpus::open(config, seed, sequence, Some(vocabulary))?.held_out);
        };

        if !path.exists() {
            // Says what is missing.
            return Ok(Corpus::open(config, seed, sequence, Some(vocabulary))?.held_out);
        }

        let text = open_file(path, config, vocabulary)?;
        long_enough(&text.tokens, &path.display().to_string(), vocabulary.name(), sequence)?;
        Ok(text)
    }
}

/// The config of one of the texts that are mixed.
fn alone(config: &DataConfig, source: &SourceConfig) -> DataConfig {
    // What is said of ids is for those of the sources that have some.
    let ids = config.reads_ids(&source.path);
    DataConfig {
        path: Some(source.path.clone()),
        source: Vec::new(),
        vocabulary_size: config.vocabulary_size.filter(|_| ids),
        token_bytes: config.token_bytes.filter(|_| ids),
        // As what is said of texts that have no tokens yet.
        end_token: config.end_token.clone().filter(|_| !ids && !is_prepared(&source.path)),
        ..config.clone()
    }
}

/// Opens texts that are mixed, which must have one vocabulary.
fn open_mixed(
    config: &DataConfig,
    sources: &[SourceConfig],
    seed: u64,
    known: Option<&Vocabulary>,
) -> Result<Corpus> {
    let (mut opened, mut held) = (Vec::new(), Vec::new());
    let mut vocabulary = known.cloned();
    // A file that is held out is opened once; a name may be that of a split.
    let first = sources.first().map(|source| alone(config, source));
    let file = first.as_ref().and_then(held_out_file);
    for source in sources {
        let held_out = match file {
            Some(_) => HeldOut::Fraction(0.0),
            None => config.held_out.clone(),
        };
        let part = DataConfig { held_out, ..alone(config, source) };

        let name = part.name();
        let found = open(&part, seed, vocabulary.as_ref())?;
        let unit = found.vocabulary.unit();
        if vocabulary.is_none()
            && matches!(unit, Unit::Characters | Unit::Words)
            && !is_prepared(&source.path)
        {
            let remedy = "prepare the texts of a mixture, with one --vocabulary";
            return Err(Error::data(name, format!("its {} are its own", unit.word()), remedy));
        }

        held.push(found.held_out);
        vocabulary = Some(found.vocabulary);
        let (weight, epochs) = (source.weight, source.epochs);
        opened.push(Source { name, tokens: found.train, weight, epochs });
    }

    let Some(vocabulary) = vocabulary else {
        return Err(Error::config("data.source", "an empty list", "name at least one"));
    };
    let held_out = match file {
        Some(path) => open_file(path, config, &vocabulary)?,
        None => HeldOutText::joined(&held),
    };
    Ok(Corpus::new(opened, held_out, vocabulary, config.sequence))
}

/// What errors call the held-out text.
fn held_out_name(config: &DataConfig) -> String {
    match &config.held_out {
        HeldOut::File(path) => path.display().to_string(),
        HeldOut::Fraction(_) => format!("held-out part of {}", config.name()),
    }
}

fn long_enough(tokens: &Tokens, name: &str, unit: &str, sequence: usize) -> Result<()> {
    if tokens.len() > sequence {
        return Ok(());
    }
    Err(Error::data(
        name,
        format!("{} {unit}s, one window needs {}", tokens.len(), sequence + 1),
        "lower data.sequence, change data.held_out or use a longer text",
    ))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::data::{Counts, Tokenizer, cut_text, prepared};

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
        assert_eq!((corpus.train_tokens(), corpus.held_out.tokens.len()), (75, 25));
        assert_eq!(read(&corpus.held_out.tokens)[0], 75);
    }

    #[test]
    fn words_are_cut_between_lines_and_counted_in_the_training_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "a b c a b c a b\nc a b c a b\nc a a a a a a\nb b b b b b d d\n")
            .unwrap();
        let words = DataConfig {
            tokenizer: Some(Tokenizer::Words),
            min_count: 2,
            sequence: 4,
            ..config(path.clone())
        };
        let corpus = Corpus::open(&words, 1, 8, None).unwrap();
        assert_eq!((corpus.train_tokens(), corpus.held_out.tokens.len()), (24, 9));
        assert_eq!(corpus.vocabulary.listed().tokens, ["a", "b", "c", "<eos>", "<unk>"]);
        assert_eq!(read(&corpus.held_out.tokens), [1, 1, 1, 1, 1, 1, 4, 4, 3]);
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
        let characters =
            DataConfig { tokenizer: Some(Tokenizer::Characters), ..config(path.clone()) };
        let corpus = Corpus::open(&characters, 1, 8, None).unwrap();
        assert_eq!(
            (corpus.vocabulary.len(), corpus.train_tokens(), corpus.held_out.tokens.len()),
            (4, 60, 20)
        );
        // Words of a text without lines are cut between words.
        let words = DataConfig { tokenizer: Some(Tokenizer::Words), sequence: 4, ..config(path) };
        let corpus = Corpus::open(&words, 1, 4, None).unwrap();
        assert_eq!((corpus.train_tokens(), corpus.held_out.tokens.len()), (16, 6));
    }

    /// Twenty words, then one line of many: about the share that is asked for is held out all the
    /// same.
    #[test]
    fn a_very_long_line_is_cut_between_words() {
        let text = ["a b c d\n".repeat(5), "x y ".repeat(10_000), "\n".into()].concat();
        let ranges = cut_text(text.as_bytes(), &[0.05], Unit::Words);
        let share = ranges[1].len() as f64 / text.len() as f64;
        assert!((share - 0.05).abs() < 1e-3, "{share}");
        let ranges = cut_text(text.as_bytes(), &[0.05, 0.05], Unit::Words);
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
        let vocabulary = Counts::of(Unit::Words, &["a b\n"], 1);
        let ids: Vec<u8> = (0..30).map(|i| i % 3).collect();
        let splits = [("train", &ids[..], &[[0, 0]][..], 60), ("test", &ids[..12], &[[0, 0]], 24)];
        prepared::tests::write(&path, &vocabulary, &splits);
        let bytes = DataConfig { tokenizer: Some(Tokenizer::Bytes), ..config(path.clone()) };
        let error = Corpus::open(&bytes, 1, 8, None).unwrap_err().to_string();
        assert!(
            error.contains("prepared with tokenizer `words`, the config has `bytes`"),
            "{error}"
        );
        let held_out = HeldOut::File("test".into());
        let words = DataConfig { tokenizer: Some(Tokenizer::Words), held_out, ..config(path) };
        let corpus = Corpus::open(&words, 1, 8, None).unwrap();
        assert_eq!(
            (corpus.train_tokens(), corpus.held_out.tokens.len(), corpus.vocabulary.len()),
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
