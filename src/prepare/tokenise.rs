//! From inputs to a prepared file: the vocabulary, the tokens over all cores, the file.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::documents::{self, Batch, Documents, Place, Reading};
use super::inputs::{Format, Input};
use super::unfinished::{Encoded, Unfinished};
use super::{HELD_OUT, Request, SPLITS, download};
use crate::data::prepared::{Header, Source};
use crate::data::{Counts, DataConfig, Tokenizer, Unit, Vocabulary, Width, made};
use crate::error::{Error, Result};
use crate::metrics::thousands;

/// A prepared file that is to be made.
pub struct Task<'a> {
    pub request: &'a Request,
    pub out: &'a Path,
    pub source: Source,
    pub inputs: &'a [Input],
    pub tokenizer: &'a Tokenizer,
}

impl Task<'_> {
    /// Tokenises the inputs and writes the prepared file; its path.
    ///
    /// # Errors
    /// [`Error::Data`] about an input, or a file that cannot be written.
    pub fn make(&self) -> Result<PathBuf> {
        let unfinished = Unfinished::open(self.out, &self.source)?;
        let (folder, lock) = (unfinished.folder(), unfinished.lock());
        let made = self.make_in(unfinished);
        // What has come far is gone on with, once a disk has room or answers again.
        if made.is_err() && Unfinished::has_nothing(&folder) {
            let _ = fs::remove_dir_all(&folder);
        }
        drop(lock);
        made
    }

    fn make_in(&self, unfinished: Unfinished) -> Result<PathBuf> {
        let Task { request, out, source, inputs, .. } = self;
        let reading = Reading {
            field: request.field.clone(),
            skip_bad: request.skip_bad,
            seed: request.seed,
            held_out: request.held_out.unwrap_or(HELD_OUT),
            ends_lines: true,
        };

        let vocabulary = self.vocabulary(&reading, &unfinished)?;
        self.need_end(&vocabulary)?;
        let (place, skipped) = unfinished.place();
        let mut writer = unfinished.write(Width::of(vocabulary.len()))?;
        let mut documents = Documents::new(inputs, &vocabulary, &reading, place, skipped);
        each_batch(&mut documents, inputs, "tokenising", |batch| {
            let encoded = encode(&batch, inputs, &vocabulary)?;
            writer.add(&encoded, batch.end, batch.skipped)
        })?;
        // Records at the very end may have been left out.
        let (end, skipped) = documents.end();
        writer.add(&[], end, skipped)?;

        let empty = (1..SPLITS.len()).find(|split| writer.count(*split) == 0);
        if writer.count(0) == 0 {
            let remedy = "give documents that are not empty, or another --held-out";
            let name = inputs.first().map_or(&source.name, |input| &input.name);
            return Err(Error::data(name, "nothing is left for train", remedy));
        }

        let header = writer.finish(&vocabulary)?;
        say!("{}: {}", out.display(), describe(&header));
        let wanted = request.valid.is_empty() && request.test.is_empty() && reading.held_out > 0.0;
        if let Some(split) = empty.filter(|_| wanted) {
            say!("note: there are too few documents: none is held out for {}", SPLITS[split]);
        }

        if header.source.skipped > 0 {
            say!(
                "note: {} records were no documents, and are left out",
                thousands(header.source.skipped)
            );
        }
        Ok(out.to_path_buf())
    }

    /// The vocabulary that is asked for: read, or counted in the inputs.
    fn vocabulary(&self, reading: &Reading, unfinished: &Unfinished) -> Result<Vocabulary> {
        let Task { request, out, inputs, tokenizer, .. } = self;
        let unit = tokenizer.unit();
        let counts = Counts::new(unit).filter(|_| request.vocabulary.is_none());
        let Some(mut counts) = counts else {
            let config = DataConfig {
                tokenizer: Some((*tokenizer).clone()),
                end_token: request.end_token.clone(),
                vocabulary: request.vocabulary.clone(),
                ..DataConfig::default()
            };
            return made(&config, "", &[]);
        };

        if let Some(counted) = unfinished.counted() {
            return Ok(counted);
        }

        say!("{}: counting {}s", out.display(), unit.name());
        let shape = Counts::of(unit, &[], 1);
        let mut documents = Documents::new(inputs, &shape, reading, Place::default(), 0);
        each_batch(&mut documents, inputs, "counting", |batch| {
            // Words are those of the training split; characters must all have a number.
            let pieces =
                batch.pieces.iter().filter(|piece| piece.split == 0 || unit == Unit::Characters);
            let texts =
                pieces.map(|piece| crate::data::utf8(&piece.text, &inputs[piece.input].name));
            counts.add_all(texts.collect::<Result<Vec<&str>>>()?);
            Ok(())
        })?;

        let vocabulary = counts.vocabulary(request.min_count);
        unfinished.keep(&vocabulary)?;
        Ok(vocabulary)
    }

    /// Whether the end of a document can be told by the tokens, where there are several.
    fn need_end(&self, vocabulary: &Vocabulary) -> Result<()> {
        let Task { inputs, tokenizer, .. } = self;
        let several = inputs.len() > 1 || inputs.iter().any(|input| input.format != Format::Text);
        if vocabulary.unit() != Unit::Subwords || vocabulary.end().is_some() || !several {
            return Ok(());
        }

        let remedy = "name one of its tokens by --end-token";
        Err(Error::data(tokenizer, "it has no usual token that ends a document", remedy))
    }
}

/// Hands every batch on, while the next one is read.
fn each_batch(
    documents: &mut Documents,
    inputs: &[Input],
    what: &str,
    mut take: impl FnMut(Batch) -> Result<()> + Send,
) -> Result<()> {
    let bar = download::bytes_bar(inputs.iter().map(|input| input.bytes).sum(), what);
    let mut next = documents.batch()?;
    while let Some(batch) = next {
        bar.set_position(batch.read);
        let (taken, read) = rayon::join(|| take(batch), || documents.batch());
        taken?;
        next = read?;
    }

    bar.finish_and_clear();
    Ok(())
}

/// The tokens of a batch, over all cores.
fn encode(batch: &Batch, inputs: &[Input], vocabulary: &Vocabulary) -> Result<Vec<Encoded>> {
    let width = Width::of(vocabulary.len());
    let opening = vocabulary.opening()?;
    let encode = |piece: &documents::Piece| {
        let name = &inputs[piece.input].name;
        let (split, begins, bytes) = (piece.split, piece.begins, piece.text.len() as u64);
        if vocabulary.unit() == Unit::Bytes {
            return Ok(Encoded { tokens: piece.text.clone(), bytes, split, begins });
        }

        // Whoever cut it has looked at it.
        let text = crate::data::utf8(&piece.text, name)?;
        let mut tokens = vocabulary.encode_piece(&piece.before, text, name).map_err(in_options)?;
        // A line of words that goes on has not ended.
        if vocabulary.unit() == Unit::Words && !piece.ends && !text.ends_with('\n') {
            tokens.pop();
        }

        if piece.ends {
            tokens.extend(vocabulary.closing(tokens.last().copied())?);
        }

        let mut encoded = if begins { width.encode(&opening) } else { Vec::new() };
        encoded.extend(width.encode(&tokens));
        Ok(Encoded { tokens: encoded, bytes, split, begins })
    };
    batch.pieces.par_iter().map(encode).collect()
}

/// The remedies of unknown words name settings of a config; here they are options.
fn in_options(error: Error) -> Error {
    match error {
        Error::Data { path, problem, remedy } => {
            let remedy = remedy.replace("set data.min_count = 2", "give --min-count 2");
            Error::Data {
                path,
                problem,
                remedy: remedy.replace("a data.vocabulary", "a --vocabulary"),
            }
        }
        other => other,
    }
}

/// Tokens, documents and bytes of a prepared file.
pub fn describe(header: &Header) -> String {
    let splits =
        header.splits.iter().map(|split| format!("{} {}", split.name, thousands(split.tokens)));
    let splits: Vec<String> = splits.collect();
    let vocabulary = thousands(header.vocabulary.count() as u64);
    let documents: u64 = header.splits.iter().map(|split| split.documents).sum();
    let bytes: u64 = header.splits.iter().map(|split| split.bytes).sum();
    format!(
        "{} tokens of a vocabulary of {vocabulary}; {} documents, {} bytes of text",
        splits.join(", "),
        thousands(documents),
        thousands(bytes)
    )
}
