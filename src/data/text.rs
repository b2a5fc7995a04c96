//! Texts: of files, cut into a part to train on and parts that are held out, and the vocabulary that they are made of.

use std::ops::Range;
use std::path::Path;

use super::words::utf8;
use super::{Counts, DataConfig, Subword, Tokenizer, Unit, Vocabulary, tokens};
use crate::error::Result;

/// What some editors write before a text; it is none of its characters.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The vocabulary that `config` asks for: of a list, or of the text.
///
/// # Errors
/// [`Error::Data`](crate::error::Error) about the list or the tokenizer.
pub fn made(config: &DataConfig, train: &str, others: &[&str]) -> Result<Vocabulary> {
    match (&config.tokenizer, &config.vocabulary) {
        (None | Some(Tokenizer::Bytes), _) => Ok(Vocabulary::bytes()),
        (Some(Tokenizer::Characters), _) => {
            Ok(Counts::of(Unit::Characters, &[&[train], others].concat(), 1))
        }
        (Some(Tokenizer::Words), None) => Ok(Counts::of(Unit::Words, &[train], config.min_count)),
        (Some(Tokenizer::Words), Some(path)) => {
            Vocabulary::of_list(&file_text(path, Unit::Words)?, &path.display().to_string())
        }
        (Some(Tokenizer::File(path)), _) => {
            Ok(Vocabulary::subwords(Subword::open(path, config.end_token.as_deref())?))
        }
    }
}

/// Cuts the given fractions off the end of a text: what is left first, then they. Words and
/// subwords are cut between lines, or between words where that would leave another share;
/// characters between characters.
pub fn cut_text(text: &[u8], fractions: &[f64], unit: Unit) -> Vec<Range<usize>> {
    let mut ends = Vec::new();
    let mut left = fractions.iter().sum::<f64>();
    for fraction in fractions {
        let wanted = text.len() as f64 * left;
        let cut = text.len() - wanted.round().min(text.len() as f64) as usize;
        let before = &text[..cut];
        let line = || {
            let end = before.iter().rposition(|b| *b == b'\n')?;
            ((cut - end) as f64 <= text.len() as f64 * fraction).then_some(end + 1)
        };
        let word = || before.iter().rposition(u8::is_ascii_whitespace).map(|end| end + 1);
        let character = || (0..=cut).rev().find(|i| is_boundary(text, *i));
        let end = match unit {
            _ if wanted == 0.0 => Some(cut),
            Unit::Words => line().or_else(word),
            Unit::Subwords => line().or_else(word).or_else(character),
            Unit::Characters | Unit::Ids => character(),
            Unit::Bytes => Some(cut),
        };

        ends.push(end.unwrap_or(0));
        left -= fraction;
    }

    ends.push(text.len());
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(ends.iter().copied()).map(|(start, end)| start..end).collect()
}

/// Whether a character begins at a place of a text, or the text ends there.
fn is_boundary(text: &[u8], at: usize) -> bool {
    text.get(at).is_none_or(|byte| byte & 0xc0 != 0x80)
}

/// A file as text; of words the last line is a whole one.
pub(super) fn file_text(path: &Path, unit: Unit) -> Result<String> {
    let mut text = utf8(&tokens::map(path)?, &path.display().to_string())?
        .trim_start_matches(BYTE_ORDER_MARK)
        .to_owned();
    if unit == Unit::Words && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}
