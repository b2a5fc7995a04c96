//! `ouroboros data tokenizer train`: a byte-level BPE of texts, as GPT-2 has it (Radford et al.,
//! "Language Models are Unsupervised Multitask Learners", 2019), written as a `tokenizer.json`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Mutex;

use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer, BpeTrainerBuilder};
use tokenizers::{AddedToken, TokenizerBuilder, TokenizerImpl, Trainer};

use super::documents::{Documents, Place, Reading};
use super::download;
use super::inputs::{self, Splitting};
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::thousands;

/// Tokens that a byte-level tokenizer begins with.
const BYTES: usize = 256;
/// A larger vocabulary is a mistake.
const LARGEST: usize = 1 << 22;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct TrainRequest {
    pub what: Vec<PathBuf>,
    /// Tokens, with those of the bytes and the special ones.
    pub size: usize,
    pub out: PathBuf,
    /// The first ends documents.
    pub special: Vec<String>,
    pub field: String,
    pub skip_bad: bool,
}

type Tokenizer = TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel>;

/// Trains a tokenizer.
///
/// # Errors
/// [`Error::Data`] about the texts, [`Error::Config`] about the options.
pub fn train_tokenizer(request: &TrainRequest) -> Result<()> {
    let TrainRequest { size, out, special, .. } = request;
    let least = BYTES + special.len();
    if !(least..=LARGEST).contains(size) {
        let remedy = format!(
            "{BYTES} bytes and {} special tokens at least, {LARGEST} at most",
            special.len()
        );
        return Err(Error::config("--size", size, remedy));
    }

    if out.exists() {
        return Err(Error::config(
            "--out",
            out.display(),
            "it is there already: remove it, or give another",
        ));
    }

    let tokenizer = learned(request)?;
    let count = tokenizer.get_vocab_size(true);
    let json = tokenizer.to_string(true).map_err(|error| Error::Internal(error.to_string()))?;
    let temporary = files::temporary(out);
    let written =
        files::write(&temporary, json.as_bytes()).and_then(|()| files::place(&temporary, out));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        let problem = format!("cannot be written ({error})");
        Error::data(out.display(), problem, "choose another folder or make room")
    })?;

    say!("{}: {} tokens", out.display(), thousands(count as u64));
    if count < *size {
        let asked = thousands(*size as u64);
        say!("note: {asked} were asked for; the texts have no more pairs that stand twice");
    }
    Ok(())
}

/// A tokenizer that has learned of all documents.
fn learned(request: &TrainRequest) -> Result<Tokenizer> {
    let inputs = inputs::find(&request.what, &Splitting::Whole(0))?;
    let mut tokenizer = empty().map_err(|error| Error::Internal(error.to_string()))?;
    let special = request.special.iter().map(|token| AddedToken::from(token.clone(), true));
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(request.size)
        .min_frequency(2)
        // Its own bars, of what comes after counting.
        .show_progress(std::io::stderr().is_terminal())
        .special_tokens(special.collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();

    // A long text may be cut between any characters.
    let shape = crate::data::Counts::of(crate::data::Unit::Characters, &[], 1);
    let reading = Reading {
        field: request.field.clone(),
        skip_bad: request.skip_bad,
        seed: 1,
        held_out: 0.0,
        ends_lines: false,
    };
    let bar = download::bytes_bar(inputs.iter().map(|input| input.bytes).sum(), "counting");
    let problem = Mutex::new(None);
    let documents = Documents::new(&inputs, &shape, &reading, Place::default(), 0);
    let texts = Texts { documents, held: Held::default(), bar: &bar, problem: &problem };
    let trained = tokenizer.train(&mut Counting(trainer), texts).map(|_| ());
    bar.finish_and_clear();
    if let Some(error) = problem.into_inner().ok().flatten() {
        return Err(error);
    }

    trained.map_err(|error| Error::data("texts", error.to_string(), "give other texts"))?;
    Ok(tokenizer)
}

/// A byte-level tokenizer that has learned nothing.
fn empty() -> tokenizers::Result<Tokenizer> {
    let bytes = ByteLevel::new(false, true, true);
    TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(Some(ByteLevel::new(true, false, true)))
        .with_decoder(Some(bytes))
        .build()
}

/// The texts of all documents, until one cannot be read.
struct Texts<'a> {
    documents: Documents<'a>,
    held: Held,
    bar: &'a indicatif::ProgressBar,
    problem: &'a Mutex<Option<Error>>,
}

/// The pieces of a batch, and what of the inputs it is.
#[derive(Default)]
struct Held {
    pieces: std::vec::IntoIter<super::documents::Piece>,
    count: usize,
    from: u64,
    to: u64,
}

impl Held {
    /// Bytes of the inputs that are handed out, about.
    fn read(&self) -> u64 {
        let left = self.pieces.len() as f64 / self.count.max(1) as f64;
        self.to - ((self.to - self.from) as f64 * left) as u64
    }
}

/// A trainer that shows nothing while it is fed, which a bar in bytes tells of.
struct Counting(BpeTrainer);

impl Trainer for Counting {
    type Model = BPE;

    fn should_show_progress(&self) -> bool {
        false
    }

    fn train(&self, model: &mut BPE) -> tokenizers::Result<Vec<AddedToken>> {
        self.0.train(model)
    }

    fn feed<I, S, F>(&mut self, texts: I, process: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        self.0.feed(texts, process)
    }
}

impl Iterator for Texts<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if let Some(piece) = self.held.pieces.next() {
                self.bar.set_position(self.held.read());
                return Some(String::from_utf8_lossy(&piece.text).into_owned());
            }

            match self.documents.batch() {
                Ok(Some(batch)) => {
                    let (from, to, count) = (self.held.to, batch.read, batch.pieces.len());
                    self.held = Held { pieces: batch.pieces.into_iter(), count, from, to };
                }
                Ok(None) => return None,
                Err(error) => {
                    if let Ok(mut problem) = self.problem.lock() {
                        *problem = Some(error);
                    }
                    return None;
                }
            }
        }
    }
}
