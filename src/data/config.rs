//! The section `[data]`, and its check.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::foreign::is_foreign;
use super::{Tokenizer, Unit};
use crate::error::{Error, Result};

/// The text to train on. With none of `path`, `paths`, `synthetic`, `source`: 4,000,000 synthetic bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A text, a file of `ouroboros data prepare`, or token ids of nanoGPT, llm.c or Megatron-LM (.bin).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Texts read one after the other as one; prepared files and ids go into `source`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<PathBuf>>,
    /// Bytes of the embedded text, whose entropy rate is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<usize>,
    /// Texts that are mixed instead of one: tables `[[data.source]]` with `path`, `weight` (its share
    /// of the rows, over the sum of all weights) and `epochs` (how often it is read at most); 256 at
    /// most, a millionth of the rows each at least.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source: Vec<SourceConfig>,
    /// How text becomes tokens. `bytes`: 256 tokens, one a byte. `characters`: those of the text.
    /// `words`: what stands between white space; every line ends in `<eos>`. Else the path of a
    /// `tokenizer.json`. By default as a prepared file has it, else bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<Tokenizer>,
    /// The token that ends a document. Of a `tokenizer.json` by default `eos_token` of the
    /// `tokenizer_config.json` beside it, or a usual one; of bytes or characters one that is named
    /// here, as `"\n"`; `""`: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// How many ids a file of token ids (.bin of nanoGPT, llm.c or Megatron-LM) may have where no
    /// tokenizer is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary_size: Option<usize>,
    /// Bytes of a token id in a .bin without a head, 2 or 4; by default 2 up to 65,536 ids, else 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_bytes: Option<usize>,
    /// Words that stand more rarely in the training text become `<unk>`.
    pub min_count: usize,
    /// A list of words, one a line, instead of those of the training text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<PathBuf>,
    /// Tokens a sequence, T.
    pub sequence: usize,
    /// Whether attention and positions end where documents do: a token sees its own document alone.
    /// Not in a Transformer-XL, whose memory goes over them.
    pub document_mask: bool,
    /// By default streams where the model has a memory, else shuffled windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    /// What evaluation reads: a fraction of the text, its last part; the path of a file; or a split
    /// of a prepared file; of a mixture that of every source.
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

/// One of the texts that are mixed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// As `data.path`.
    pub path: PathBuf,
    /// Its share of the rows, over the sum of all weights.
    pub weight: f64,
    /// How often it is read at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<usize>,
}

/// What to do about an end token of bytes that is none.
pub(super) const ONE_BYTE: &str =
    "of bytes it is one ASCII character; name one, or take data.tokenizer = \"characters\"";

impl DataConfig {
    /// The end of a document that is asked for.
    pub fn named_end(&self) -> Option<&str> {
        self.end_token.as_deref().filter(|token| !token.is_empty())
    }

    /// What the tokens of a text are that is not prepared.
    pub fn unit(&self) -> Unit {
        self.tokenizer.as_ref().map_or(Unit::Bytes, Tokenizer::unit)
    }

    /// Whether a file is one of token ids.
    pub fn reads_ids(&self, path: &Path) -> bool {
        is_foreign(path) && matches!(self.tokenizer, None | Some(Tokenizer::File(_)))
    }

    /// What errors call the text.
    pub fn name(&self) -> String {
        match (&self.path, &self.paths) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(paths)) => format!("{} files", paths.len()),
            (None, None) if !self.source.is_empty() => format!("{} sources", self.source.len()),
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
        if self.tokenizer != Some(Tokenizer::Words) {
            let remedy = "only data.tokenizer = \"words\" has it; leave it out";
            if self.min_count > 1 {
                return Err(Error::config("data.min_count", self.min_count, remedy));
            }

            if let Some(path) = &self.vocabulary {
                return Err(Error::config("data.vocabulary", path.display(), remedy));
            }
        }

        if let Some(token) = self.named_end() {
            let remedy = match &self.tokenizer {
                Some(Tokenizer::File(_)) => None,
                // Of a file that has tokens already it is said when that is opened.
                None if self.path.is_some() || !self.source.is_empty() => None,
                None | Some(Tokenizer::Bytes) => (token.len() != 1).then_some(ONE_BYTE),
                Some(Tokenizer::Characters) => {
                    (token.chars().count() != 1).then_some("name one character")
                }
                Some(Tokenizer::Words) => Some("words have none; leave it out"),
            };
            if let Some(remedy) = remedy {
                return Err(Error::config("data.end_token", format!("{token:?}"), remedy));
            }
        }

        let mixed = !self.source.is_empty();
        let named = [self.path.is_some(), self.paths.is_some(), self.synthetic.is_some(), mixed];
        if named.into_iter().filter(|given| *given).count() > 1 {
            return Err(Error::config(
                "data",
                "more than one of path, paths, synthetic, source",
                "keep one of them",
            ));
        }

        self.check_sources()?;
        if let Some(bytes) = self.token_bytes.filter(|bytes| ![2, 4].contains(bytes)) {
            return Err(Error::config("data.token_bytes", bytes, "2 or 4"));
        }

        Error::unless_at_least_one("data.vocabulary_size", self.vocabulary_size.unwrap_or(1))?;

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

impl DataConfig {
    fn check_sources(&self) -> Result<()> {
        for (i, source) in self.source.iter().enumerate() {
            let key = |name: &str| format!("data.source[{i}].{name}");
            let fits = source.weight > 0.0 && source.weight <= 1e9;
            let remedy = "a number above 0, at most 1e9; leave out a source that is not to be read";
            Error::unless(fits, &key("weight"), source.weight, remedy)?;
            let share = source.weight / self.source.iter().map(|other| other.weight).sum::<f64>();
            let remedy =
                "a share of a millionth at least; leave out a source that is not to be read";
            Error::unless(share >= 1e-6, &key("weight"), source.weight, remedy)?;
            Error::unless_at_least_one(&key("epochs"), source.epochs.unwrap_or(1))?;
        }

        if self.source.len() > MOST_SOURCES {
            let remedy = format!("{MOST_SOURCES} at most; prepare several into one file");
            return Err(Error::config("data.source", self.source.len(), remedy));
        }

        Ok(())
    }
}

/// Sources that are mixed at most.
const MOST_SOURCES: usize = 256;

impl Default for DataConfig {
    fn default() -> DataConfig {
        DataConfig {
            path: None,
            paths: None,
            synthetic: None,
            source: Vec::new(),
            tokenizer: None,
            end_token: None,
            vocabulary_size: None,
            token_bytes: None,
            min_count: 1,
            vocabulary: None,
            sequence: 128,
            document_mask: false,
            order: None,
            held_out: HeldOut::Fraction(0.05),
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
