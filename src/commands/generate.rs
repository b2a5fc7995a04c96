//! `ouroboros generate`: continues texts, one token at a time.

use std::io::IsTerminal;

use crate::bar::Bar;
use crate::checkpoint::Checkpoint;
use crate::cli::GenerateArgs;
use crate::data::{Unit, Vocabulary};
use crate::error::{Error, Result};
use crate::generation::{Reader, Sampling};
use crate::random;

/// Prints the prompts and what follows them: a single one as it grows.
///
/// # Errors
/// Weights that cannot be used, or settings that make no distribution.
pub fn generate(args: &GenerateArgs) -> Result<()> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
    };

    sampling.check()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::config("--stop", "``", "write at least one character"));
    }

    tch::set_num_threads(args.threads.clamp(1, 1024) as i32);
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let mut texts: Vec<Growing> = match &args.prompt[..] {
        [] => vec![Growing::new(&checkpoint.vocabulary, None)?],
        prompts => prompts
            .iter()
            .map(|prompt| Growing::new(&checkpoint.vocabulary, Some(prompt)))
            .collect::<Result<_>>()?,
    };

    let mut tokens: Vec<Vec<i64>> = texts.iter().map(|text| text.tokens.clone()).collect();
    let mut reader = Reader::new(&checkpoint, &tokens, args.tokens)?;
    let mut streams: Vec<_> =
        (0..texts.len()).map(|row| random::sampling(args.seed.wrapping_add(row as u64))).collect();
    let alone = texts.len() == 1;
    if alone {
        texts[0].show(&checkpoint.vocabulary, &args.stop);
    }

    // A single text shows by itself how far it is, on a terminal.
    let shows = alone && std::io::stdout().is_terminal();
    let bar = (!shows).then(|| Bar::of_steps(args.tokens as u64, "generating"));
    for _ in 0..args.tokens {
        bar.iter().for_each(|bar| bar.advance(1));
        if texts.iter().all(|text| text.ended) {
            break;
        }

        let scores = reader.next(&tokens)?;
        for (row, text) in texts.iter_mut().enumerate() {
            // One that has ended is read on with the others, and not looked at.
            let u = random::unit(&mut streams[row]);
            let token = sampling.pick(&scores[row], &tokens[row], u) as i64;
            tokens[row].push(token);
            text.push(token, &checkpoint.vocabulary, &args.stop);
        }

        if alone {
            texts[0].show(&checkpoint.vocabulary, &args.stop);
        }
    }

    drop(bar);
    if alone {
        texts[0].show_rest(&checkpoint.vocabulary);
        return Ok(());
    }

    for (row, text) in texts.iter().enumerate() {
        let before = if row > 0 { "\n" } else { "" };
        say!("{before}[{}] {}", row + 1, text.whole(&checkpoint.vocabulary));
    }
    Ok(())
}

/// A text, from its prompt on.
struct Growing {
    tokens: Vec<i64>,
    /// Bytes of the prompt, and of what is on the screen.
    prompt: usize,
    shown: usize,
    /// Where a stop string begins.
    end: Option<usize>,
    ended: bool,
}

impl Growing {
    fn new(vocabulary: &Vocabulary, given: Option<&str>) -> Result<Growing> {
        let tokens = prompt(vocabulary, given)?;
        let prompt = vocabulary.decode(&tokens).len();
        Ok(Growing { tokens, prompt, shown: 0, end: None, ended: false })
    }

    /// Adds a token; a text that one of `stops` has ended stays as it is.
    fn push(&mut self, token: i64, vocabulary: &Vocabulary, stops: &[String]) {
        if self.ended {
            return;
        }

        // Words end a line by what others end a document by.
        let end = vocabulary.end().filter(|_| vocabulary.unit() == Unit::Subwords);
        if end.map(i64::from) == Some(token) {
            self.ended = true;
            return;
        }

        self.tokens.push(token);
        if stops.is_empty() {
            return;
        }

        let text = vocabulary.decode(&self.tokens);
        let new = text.get(self.prompt..).unwrap_or_default();
        let found = stops.iter().filter_map(|stop| new.find(stop.as_str())).min();
        self.end = found.map(|at| self.prompt + at);
        self.ended = self.end.is_some();
    }

    fn whole(&self, vocabulary: &Vocabulary) -> String {
        let mut text = vocabulary.decode(&self.tokens);
        text.truncate(self.end.unwrap_or(text.len()));
        text
    }

    /// Shows what is new, but for a character that is not complete and what may become a stop string.
    fn show(&mut self, vocabulary: &Vocabulary, stops: &[String]) {
        let text = self.whole(vocabulary);
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let end = if self.ended { text.len() } else { complete.len() - begun(complete, stops) };
        if end > self.shown {
            put!("{}", &text[self.shown..end]);
            self.shown = end;
        }
    }

    fn show_rest(&self, vocabulary: &Vocabulary) {
        say!("{}", self.whole(vocabulary).get(self.shown..).unwrap_or_default());
    }
}

/// Bytes at the end of a text by which one of the stop strings may have begun.
fn begun(text: &str, stops: &[String]) -> usize {
    let begins = |stop: &String| {
        let cuts = stop.char_indices().map(|(at, _)| at).rev();
        cuts.into_iter().find(|cut| text.ends_with(&stop[..*cut])).unwrap_or(0)
    };
    stops.iter().map(begins).max().unwrap_or(0)
}

/// The tokens of the prompt.
fn prompt(vocabulary: &Vocabulary, given: Option<&str>) -> Result<Vec<i64>> {
    let tokens = match given {
        Some(text) => vocabulary.encode_prompt(text)?,
        None => vocabulary.beginning()?,
    };

    if tokens.is_empty() {
        let found = format!("`{}`", given.unwrap_or_default());
        return Err(Error::config(
            "--prompt",
            found,
            "give at least one character, or one word to a model of words",
        ));
    }

    Ok(tokens.into_iter().map(i64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of bytes that is pushed token by token, as it would be shown.
    fn shown(prompt: &str, more: &str, stops: &[&str]) -> (String, bool) {
        let vocabulary = Vocabulary::bytes();
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut text = Growing::new(&vocabulary, Some(prompt)).unwrap();
        for byte in more.bytes() {
            text.push(i64::from(byte), &vocabulary, &stops);
            let whole = text.whole(&vocabulary);
            text.show(&vocabulary, &stops);
            assert!(whole.is_char_boundary(text.shown));
            assert!(stops.iter().all(|stop| !whole[..text.shown].ends_with(stop.as_str())));
        }
        (text.whole(&vocabulary), text.ended)
    }

    #[test]
    fn a_text_ends_before_a_stop_string() {
        assert_eq!(shown("a.b", "c\n\nd", &["\n\n"]), ("a.bc".to_owned(), true));
        assert_eq!(shown("a.b", "c.d", &["."]), ("a.bc".to_owned(), true), "not in the prompt");
        assert_eq!(shown("a", "stst", &["stop", "to"]), ("astst".to_owned(), false));
        assert_eq!(shown("a", "ststop", &["stop", "to"]), ("asts".to_owned(), true), "the first");
    }

    #[test]
    fn characters_are_shown_when_they_are_complete() {
        assert_eq!(shown("a", "é…ü", &[]), ("aé…ü".to_owned(), false));
        assert_eq!(begun("abst", &["stop".to_owned()]), 2);
        assert_eq!(begun("ab", &["stop".to_owned()]), 0);
    }
}
