//! Tokenizers in Hugging Face's form: a `tokenizer.json`, and what its special tokens mean.
//!
//! ```text
//! a document    what the tokenizer puts before a text, the text, what it puts after; then the end token, unless it is last
//! a prompt      what the tokenizer puts before a text, the text
//! ```
//!
//! The end token is the one that is asked for, or that `tokenizer_config.json` beside it calls
//! `eos_token`, or the first usual one that the tokenizer has.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::ModelWrapper;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::failure::guarded;
use crate::files;

/// Ends of documents that published tokenizers have.
const USUAL_ENDS: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"];

/// Keys of a `tokenizer.json` that say how it was used last, not what it is.
const STATE: [&str; 2] = ["truncation", "padding"];

/// Bytes on either side of a cut that are tokenised to see whether it changes their tokens.
const CONTEXT: usize = 256;
/// Bytes in which a place to cut is looked for.
const NEAR: usize = 1 << 18;
/// Places that are tried for a cut before a text stays whole.
const TRIES: usize = 32;

/// What is known of a tokenizer without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubwordFacts {
    /// Of its file.
    pub name: String,
    /// xxh3 of its JSON with sorted keys, without spaces, truncation and padding.
    pub digest: String,
    /// The highest number of a token, and one.
    pub size: usize,
    /// The number of the token that ends a document.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<u32>,
}

/// A `tokenizer.json`; read when a text is to become tokens, or tokens a text.
#[derive(Debug)]
pub struct Subword {
    pub facts: SubwordFacts,
    pub json: Arc<[u8]>,
    read: OnceLock<Read>,
}

#[derive(Debug)]
struct Read {
    tokenizer: tokenizers::Tokenizer,
    /// What it puts before and after a text.
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Subword {
    /// Reads a tokenizer; `end_token` is the end of a document that is asked for.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that is none, or has no such token.
    pub fn open(path: &Path, end_token: Option<&str>) -> Result<Subword> {
        let wrong = |problem: String, remedy: &str| Error::data(path.display(), problem, remedy);
        let json = files::read(path).map_err(|error| {
            wrong(format!("cannot be read ({error})"), "name the tokenizer.json of a model")
        })?;

        let read = Read::new(&json).map_err(|problem| {
            wrong(
                problem,
                "name the tokenizer.json of a model, as the library tokenizers writes it",
            )
        })?;

        let id = |token: &str| read.tokenizer.token_to_id(token);
        let end = match end_token {
            Some(token) => Some(id(token).ok_or_else(|| {
                let problem = format!("it has no token `{}`", token.escape_debug());
                wrong(problem, "name one of its tokens as the end token")
            })?),
            None => told_end(path)
                .and_then(|token| id(&token))
                .or_else(|| USUAL_ENDS.into_iter().find_map(id)),
        };

        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        let size =
            read.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let digest = digest(&json).map_err(|problem| wrong(problem, "write it again"))?;
        let facts = SubwordFacts { name, digest, size, end };
        Ok(Subword { facts, json: json.into(), read: OnceLock::from(read) })
    }

    /// One that was kept with what is known of it.
    pub fn kept(facts: SubwordFacts, json: Vec<u8>) -> Subword {
        Subword { facts, json: json.into(), read: OnceLock::new() }
    }

    /// The tokenizer, which is read when it is asked for first.
    fn read(&self) -> Result<&Read> {
        if let Some(read) = self.read.get() {
            return Ok(read);
        }

        let wrong = |problem: String| {
            Error::data(
                &self.facts.name,
                problem,
                "take the tokenizer that the model was trained with",
            )
        };
        let found = digest(&self.json).map_err(wrong)?;
        if found != self.facts.digest {
            let problem = format!("its digest is {found} instead of {}", self.facts.digest);
            return Err(wrong(problem));
        }

        let read = Read::new(&self.json).map_err(wrong)?;
        Ok(self.read.get_or_init(|| read))
    }

    /// The tokens of a part of a text, without any that stand around a text.
    ///
    /// # Errors
    /// [`Error::Data`] about `name` where the tokenizer has no token for it.
    pub fn encode_part(&self, text: &str, name: &str) -> Result<Vec<u32>> {
        self.read()?.encode(text).map_err(|problem| {
            Error::data(name, problem, format!("{} cannot read this text", self.facts.name))
        })
    }

    /// The same of a part behind `context`, the end of the part before: a tokenizer may begin every
    /// text in a way of its own.
    ///
    /// # Errors
    /// As [`Subword::encode_part`].
    pub fn encode_behind(&self, context: &str, text: &str, name: &str) -> Result<Vec<u32>> {
        if context.is_empty() {
            return self.encode_part(text, name);
        }

        let (before, whole) =
            (self.encode_part(context, name)?, self.encode_part(&[context, text].concat(), name)?);
        match whole.strip_prefix(&before[..]) {
            Some(rest) => Ok(rest.to_vec()),
            None => self.encode_part(text, name),
        }
    }

    /// What the tokenizer puts before a text, and after it.
    ///
    /// # Errors
    /// [`Error::Data`] if it is no tokenizer.
    pub fn around(&self) -> Result<(&[u32], &[u32])> {
        let Read { before, after, .. } = self.read()?;
        Ok((before, after))
    }

    /// The first place from `from` on where a text can be cut so that the tokens before it are those
    /// that they are in the whole: after a line, or else before a word. Tried out, as every
    /// tokenizer has rules of its own. Where none is found near, before a word all the same, or at
    /// `from`.
    ///
    /// # Errors
    /// As [`Subword::encode_part`].
    pub fn cut(&self, text: &str, from: usize, name: &str) -> Result<usize> {
        let bytes = text.as_bytes();
        let line = |at: &usize| {
            bytes[at - 1] == b'\n'
                && !bytes[at - 2].is_ascii_whitespace()
                && !bytes[*at].is_ascii_whitespace()
        };
        let word = |at: &usize| {
            bytes[*at] == b' '
                && bytes[at - 1].is_ascii_alphanumeric()
                && bytes[at + 1].is_ascii_alphanumeric()
        };

        let near = from.max(2)..text.len().saturating_sub(1).min(from.max(2) + NEAR);
        let lines = near.clone().filter(line).take(TRIES);
        for at in lines.chain(near.clone().filter(word).take(TRIES)) {
            if self.is_clean(text, at, name)? {
                return Ok(at);
            }
        }
        Ok(near.clone().find(word).unwrap_or_else(|| ceil(text, from)))
    }

    /// Whether the tokens before a place are the same with what follows and without.
    fn is_clean(&self, text: &str, at: usize, name: &str) -> Result<bool> {
        let end = ceil(text, text.len().min(at + CONTEXT));
        let context = context(&text[..at]);
        let whole = self.encode_part(&[context, &text[at..end]].concat(), name)?;
        Ok(whole.starts_with(&self.encode_part(context, name)?))
    }

    /// The text of tokens; special ones are left out, and numbers that stand for nothing.
    ///
    /// # Errors
    /// [`Error::Data`] if it is no tokenizer.
    pub fn decode(&self, tokens: &[i64]) -> Result<String> {
        let ids: Vec<u32> = tokens.iter().filter_map(|token| u32::try_from(*token).ok()).collect();
        let read = self.read()?;
        let text = guarded(|| read.tokenizer.decode(&ids, true).map_err(|error| error.to_string()));
        text.map_err(|problem| Error::data(&self.facts.name, problem, "take another tokenizer"))
    }

    /// What a token is called.
    pub fn token(&self, id: u32) -> Option<String> {
        self.read().ok()?.tokenizer.id_to_token(id)
    }
}

/// The end of a text that is enough to go on behind it.
pub fn context(text: &str) -> &str {
    &text[ceil(text, text.len().saturating_sub(CONTEXT))..]
}

/// Where a character begins, from a place on.
fn ceil(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

impl Read {
    fn new(json: &[u8]) -> std::result::Result<Read, String> {
        guarded(|| Read::made(json))
    }

    fn made(json: &[u8]) -> std::result::Result<Read, String> {
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| format!("no tokenizer ({error})"))?;
        // Merges that are left out at random are for a training of another kind.
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            tokenizer.with_model(bpe);
        }

        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);

        let mut read = Read { tokenizer, before: Vec::new(), after: Vec::new() };
        let bare = read.encode("a")?;
        let whole = read.tokenizer.encode_fast("a", true).map_err(|error| error.to_string())?;
        let whole = whole.get_ids();
        let found = whole.windows(bare.len().max(1)).position(|part| part == bare);
        if let Some(start) = found {
            read.before = whole[..start].to_vec();
            read.after = whole[start + bare.len()..].to_vec();
        }
        Ok(read)
    }

    fn encode(&self, text: &str) -> std::result::Result<Vec<u32>, String> {
        guarded(|| {
            let encoded = self.tokenizer.encode_fast(text, false);
            Ok(encoded.map_err(|error| error.to_string())?.get_ids().to_vec())
        })
    }
}

/// `eos_token` of the `tokenizer_config.json` beside a tokenizer.
fn told_end(path: &Path) -> Option<String> {
    let text = files::read_text(&path.with_file_name("tokenizer_config.json")).ok()?;
    let json: Value = serde_json::from_str(&text).ok()?;
    let end = &json["eos_token"];
    end.as_str().or_else(|| end["content"].as_str()).map(str::to_owned)
}

/// xxh3 of what a tokenizer is, however it was written.
fn digest(json: &[u8]) -> std::result::Result<String, String> {
    let mut value: Value =
        serde_json::from_slice(json).map_err(|error| format!("no JSON ({error})"))?;
    if let Value::Object(keys) = &mut value {
        keys.retain(|key, _| !STATE.contains(&key.as_str()));
    }

    // Older files have a merge as one string, newer ones as two.
    for merge in value["model"]["merges"].as_array_mut().into_iter().flatten() {
        if let Some((left, right)) = merge.as_str().and_then(|pair| pair.split_once(' ')) {
            *merge = serde_json::json!([left, right]);
        }
    }
    value.sort_all_objects();

    let text = serde_json::to_vec(&value).map_err(|error| error.to_string())?;
    Ok(format!("{:016x}", xxh3_64(&text)))
}
