//! Texts that grow, a token at a time.
//!
//! ```text
//! attention without memory   all texts at once, their keys and values kept: a token costs its own layers, and a
//!                            look at what was read
//! learned positions          so far as they reach; then every text's last tokens are read anew for each token
//! Transformer-XL             one text after the other, with its memory
//! attention that ends        one text after the other; behind an end token it begins anew
//! where documents do
//! ```

mod sampling;

use tch::{Kind, Tensor};

pub use sampling::Sampling;

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::data::{Unit, document_end};
use crate::error::{Error, Result};
use crate::model::{Dimensions, Memory, Stack};

/// Tokens that are read at once of a text that is new.
const SEGMENT: usize = 1024;

/// The whole model with its saved weights.
///
/// # Errors
/// [`Error::Config`] for sequences that are longer than the model's positions,
/// [`Error::Checkpoint`] if weights do not fit the config.
pub fn load(checkpoint: &Checkpoint, config: &Config) -> Result<(Stack, Vec<Tensor>)> {
    let saved = &checkpoint.manifest.config;
    let learned = config.model.learned_positions(saved.data.sequence);
    if let Some(positions) = learned.filter(|positions| config.data.sequence > *positions) {
        let remedy = format!("the model has positions for {positions} tokens only");
        return Err(Error::config("data.sequence", config.data.sequence, remedy));
    }

    let vocabulary = config.model.table_rows(checkpoint.vocabulary.len())?;
    config.model.check_cutoffs(vocabulary)?;
    let dimensions = Dimensions::new(&config.model, vocabulary, saved.data.sequence);
    let model = Stack::new(&dimensions, 0..dimensions.layers);
    let kind = config.precision.kind();
    let values = checkpoint.values(model.parameters())?;
    let weights =
        values.iter().map(|value| value.f_to_kind(kind)).collect::<std::result::Result<_, _>>()?;
    Ok((model, weights))
}

/// What is kept of texts between their tokens.
enum Reading {
    /// Keys and values of all texts, and how many tokens of each, pads included, have been read.
    Cached { memory: Memory, read: usize },
    /// Of every text a memory, and how many tokens it has taken in.
    Recurrent(Vec<(Memory, usize)>),
    /// Of every text its last document, which such a token ends.
    Documents(i64, Vec<Document>),
    /// Nothing: the last so many tokens are read anew.
    Windows(usize),
}

/// The last document of a text.
struct Document {
    /// Keys and values of its tokens.
    memory: Memory,
    /// Its first token.
    begun: usize,
    /// Tokens of the text that have been read.
    read: usize,
}

/// A model that reads texts as they grow.
pub struct Reader {
    model: Stack,
    weights: Vec<Tensor>,
    /// Tokens that may follow: the rows of the tables beyond them are none.
    vocabulary: usize,
    /// Tokens that are read at once.
    segment: usize,
    /// Positions that are learned.
    positions: Option<usize>,
    reading: Reading,
}

impl Reader {
    /// The model of a checkpoint, for texts that begin with `prompts` and grow by up to `more` tokens.
    ///
    /// # Errors
    /// Weights that cannot be used.
    pub fn new(checkpoint: &Checkpoint, prompts: &[Vec<i64>], more: usize) -> Result<Reader> {
        let config = &checkpoint.manifest.config;
        let (model, weights) = load(checkpoint, config)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let sequence = config.data.sequence;
        let positions = config.model.learned_positions(sequence);
        let has_memory = config.model.architecture().has_memory;
        let end = document_end(&config.data, &checkpoint.vocabulary).map(i64::from);
        // A text of subwords ends with its document, so that only prompts can have others before it.
        let goes_on = |end: &i64| {
            checkpoint.vocabulary.unit() != Unit::Subwords
                || prompts.iter().any(|prompt| prompt.contains(end))
        };
        let ends = end.filter(|end| config.data.document_mask && goes_on(end));
        let reading = match (ends, positions) {
            (Some(end), _) => {
                let room = positions.unwrap_or(longest.saturating_add(more).min(1 << 40));
                Reading::Documents(end, prompts.iter().map(|_| Document::new(room, 0)).collect())
            }
            (None, _) if has_memory => {
                Reading::Recurrent(prompts.iter().map(|_| (recurrent(config), 0)).collect())
            }
            (None, Some(positions)) if longest > positions => Reading::Windows(positions),
            (None, positions) => {
                let grown = longest.saturating_add(more).min(1 << 40);
                let capacity = positions.map_or(grown, |positions| grown.min(positions));
                Reading::Cached { memory: Memory::growing(capacity, pads(prompts)?), read: 0 }
            }
        };

        let vocabulary = checkpoint.vocabulary.len();
        let segment = if has_memory { sequence } else { SEGMENT };
        Ok(Reader { model, weights, vocabulary, segment, positions, reading })
    }

    /// The scores of what follows each of `texts`, which are those before and a token more.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn next(&mut self, texts: &[Vec<i64>]) -> Result<Vec<Vec<f64>>> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        if let (Reading::Cached { .. }, Some(positions)) = (&self.reading, self.positions)
            && longest > positions
        {
            self.reading = Reading::Windows(positions);
        }

        let Reader { model, weights, segment, vocabulary, .. } = self;
        let (segment, vocabulary) = (*segment, *vocabulary);
        let forward = |rows: &[&[i64]], memory: &mut Memory| {
            tch::no_grad(|| scores(model, weights, rows, memory, vocabulary))
        };

        match &mut self.reading {
            Reading::Cached { memory, read } => {
                // Shorter texts are filled up at their beginnings.
                let padded: Vec<Vec<i64>> = texts
                    .iter()
                    .map(|text| [vec![0; longest - text.len()], text.clone()].concat())
                    .collect();
                let mut last = Vec::new();
                while *read < longest {
                    let end = longest.min(*read + segment);
                    let rows: Vec<&[i64]> = padded.iter().map(|text| &text[*read..end]).collect();
                    last = forward(&rows, memory)?;
                    *read = end;
                }
                Ok(last)
            }
            Reading::Recurrent(memories) => {
                let mut all = Vec::with_capacity(texts.len());
                for (text, (memory, read)) in texts.iter().zip(memories) {
                    let mut last = Vec::new();
                    while *read < text.len() {
                        let end = text.len().min(*read + segment);
                        last = forward(&[&text[*read..end]], memory)?;
                        *read = end;
                    }
                    all.append(&mut last);
                }
                Ok(all)
            }
            Reading::Documents(end, documents) => {
                let room = self.positions.unwrap_or(usize::MAX);
                let of = |(text, document): (&Vec<i64>, &mut Document)| {
                    document.next(text, *end, segment.min(room), room, &forward)
                };
                let all = texts.iter().zip(documents).map(of).collect::<Result<Vec<_>>>()?;
                Ok(all.concat())
            }
            Reading::Windows(positions) => {
                let mut all = Vec::with_capacity(texts.len());
                for text in texts {
                    let window = &text[text.len().saturating_sub(*positions)..];
                    all.append(&mut forward(&[window], &mut Memory::new(0))?);
                }
                Ok(all)
            }
        }
    }
}

impl Document {
    /// One that begins at a token of its text, and has room for so many.
    fn new(room: usize, begun: usize) -> Document {
        Document { memory: Memory::growing(room, None), begun, read: begun }
    }

    /// Reads a text on, `segment` tokens at once; the scores of what follows.
    fn next(
        &mut self,
        text: &[i64],
        end: i64,
        segment: usize,
        room: usize,
        forward: &impl Fn(&[&[i64]], &mut Memory) -> Result<Vec<Vec<f64>>>,
    ) -> Result<Vec<Vec<f64>>> {
        if self.read == 0 {
            // Documents that are over before the last token say nothing of what follows.
            let over = &text[..text.len().saturating_sub(1)];
            let begun = over.iter().rposition(|token| *token == end).map_or(0, |at| at + 1);
            *self = Document::new(room, begun);
        }

        let mut last = Vec::new();
        while self.read < text.len() {
            if self.read > 0 && text[self.read - 1] == end {
                *self = Document::new(room, self.read);
            }

            let rest = &text[self.read..text.len().min(self.read + segment)];
            let ended = rest.iter().position(|token| *token == end);
            let to = self.read + ended.map_or(rest.len(), |at| at + 1);
            // Beyond the positions that are learned its last tokens are read anew.
            last = match to - self.begun > room {
                true => forward(&[&text[to - room..to]], &mut Memory::new(0))?,
                false => forward(&[&text[self.read..to]], &mut self.memory)?,
            };
            self.read = to;
        }
        Ok(last)
    }
}

/// The memory of a Transformer-XL. A token is read by itself: with so much memory it sees what the
/// last token of a segment has seen in training.
fn recurrent(config: &Config) -> Memory {
    let mem_len = config.model.mem_len;
    let more = if config.model.same_length || mem_len == 0 { 0 } else { config.data.sequence - 1 };
    Memory::new(mem_len + more)
}

/// How many pads every text begins with; none if all are as long.
fn pads(prompts: &[Vec<i64>]) -> Result<Option<Tensor>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let pads: Vec<i64> = prompts.iter().map(|prompt| (longest - prompt.len()) as i64).collect();
    let any = pads.iter().any(|pads| *pads > 0);
    Ok(any.then(|| Tensor::f_from_slice(&pads)).transpose()?)
}

/// The scores of what follows the last tokens of `rows`, all as long.
fn scores(
    model: &Stack,
    weights: &[Tensor],
    rows: &[&[i64]],
    memory: &mut Memory,
    vocabulary: usize,
) -> Result<Vec<Vec<f64>>> {
    let t = rows.first().map_or(0, |row| row.len()) as i64;
    let tokens = Tensor::f_from_slice(&rows.concat())?.f_view([rows.len() as i64, t])?;
    let hidden = model.forward(weights, &tokens, memory, None)?;
    let scores = model.scores(weights, &hidden.f_narrow(1, t - 1, 1)?)?;
    let scores = scores.f_narrow(2, 0, vocabulary as i64)?.f_to_kind(Kind::Double)?;
    (0..rows.len() as i64)
        .map(|row| scores.f_select(0, row)?.f_view([-1])?.try_into().map_err(Error::from))
        .collect()
}
