//! The section `[data]`, and its check.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The text to train on. With none of `path`, `paths`, `synthetic`: 4,000,000 synthetic bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A text, or a file of `ouroboros data prepare`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Files read one after the other as one text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<PathBuf>>,
    /// Bytes of the embedded text, whose entropy rate is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<usize>,
    /// How text becomes tokens.
    pub tokenizer: Tokenizer,
    /// Words that stand more rarely in the training text become `<unk>`.
    pub min_count: usize,
    /// A list of words, one a line, instead of those of the training text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<PathBuf>,
    /// Tokens a sequence, T.
    pub sequence: usize,
    /// By default streams where the model has a memory, else shuffled windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// What evaluation reads: a fraction of the text, its last part; the path of a file; or a split
    /// of a prepared file.
    pub held_out: HeldOut,
}

/// In which order the rows of a batch read the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Windows in an order that every epoch shuffles.
    Shuffled,
    /// Every row of the batch goes through a part of the text of its own, from one step to the
    /// next.
    Streams,
}

impl DataConfig {
    /// What errors call the text.
    pub fn name(&self) -> String {
        match (&self.path, &self.paths) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(paths)) => format!("{} files", paths.len()),
            (None, None) => "synthetic".to_owned(),
        }
    }

    /// Whether every key can be used, by itself and with the others of the section.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("data.sequence", self.sequence)?;
        Error::unless_at_least_one("data.min_count", self.min_count)?;
        if self.tokenizer != Tokenizer::Words {
            let remedy = "only data.tokenizer = \"words\" has it; leave it out";
            if self.min_count > 1 {
                return Err(Error::config("data.min_count", self.min_count, remedy));
            }

            if let Some(path) = &self.vocabulary {
                return Err(Error::config("data.vocabulary", path.display(), remedy));
            }
        }

        let named = [self.path.is_some(), self.paths.is_some(), self.synthetic.is_some()];
        if named.into_iter().filter(|given| *given).count() > 1 {
            return Err(Error::config(
                "data",
                "more than one of path, paths, synthetic",
                "keep one of them",
            ));
        }

        match self.held_out {
            HeldOut::Fraction(f) => Error::unless(
                f > 0.0 && f < 1.0,
                "data.held_out",
                f,
                "a fraction lies between 0 and 1",
            ),
            HeldOut::File(_) => Ok(()),
        }
    }
}

impl Default for DataConfig {
    fn default() -> DataConfig {
        DataConfig {
            path: None,
            paths: None,
            synthetic: None,
            tokenizer: Tokenizer::Bytes,
            min_count: 1,
            vocabulary: None,
            sequence: 128,
            order: None,
            held_out: HeldOut::Fraction(0.05),
        }
    }
}

/// How text becomes tokens.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Tokenizer {
    /// 256 tokens, one a byte.
    Bytes,
    /// The characters of the text.
    Characters,
    /// What stands between white space; every line ends in `<eos>`.
    Words,
}

impl Tokenizer {
    /// As in a config.
    pub fn word(self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
            Tokenizer::Characters => "characters",
            Tokenizer::Words => "words",
        }
    }

    /// What one token is called.
    pub fn unit(self) -> &'static str {
        match self {
            Tokenizer::Bytes => "byte",
            Tokenizer::Characters => "character",
            Tokenizer::Words => "word",
        }
    }
}

/// What evaluation reads: the last part of the corpus, a file of its own, or a split of a prepared
/// file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "a fraction between 0 and 1, or the path of a file")]
pub enum HeldOut {
    Fraction(f64),
    File(PathBuf),
}
