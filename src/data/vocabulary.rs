//! How text becomes tokens and tokens become text: bytes, characters, words.
//!
//! Words are what stands between white space; every line ends in `<eos>`. The most frequent token
//! has the number 0, as the adaptive softmax wants it; equally frequent ones are in the order of
//! their bytes. Words that a vocabulary leaves out are `<unk>`, if it has one.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use indicatif::ProgressBar;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::Tokenizer;
use super::tokens::Width;
use crate::error::{Error, Result};

/// The end of a line.
pub const EOS: &str = "<eos>";
/// A word that the vocabulary leaves out.
pub const UNK: &str = "<unk>";

/// Bytes that one task counts or encodes.
const TASK: usize = 1 << 22;

/// What can be saved of a vocabulary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    pub tokenizer: Tokenizer,
    /// In the order of their numbers; empty for bytes.
    pub tokens: Vec<String>,
}

/// The tokens of a model.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    listed: Arc<Listed>,
    numbers: Arc<HashMap<String, u32>>,
}

impl Vocabulary {
    /// 256 tokens, one a byte.
    pub fn bytes() -> Vocabulary {
        Vocabulary::of(Listed { tokenizer: Tokenizer::Bytes, tokens: Vec::new() })
    }

    /// A vocabulary read back.
    pub fn of(listed: Listed) -> Vocabulary {
        let numbers =
            listed.tokens.iter().enumerate().map(|(i, token)| (token.clone(), i as u32)).collect();
        Vocabulary { listed: Arc::new(listed), numbers: Arc::new(numbers) }
    }

    /// The characters of a text, in the order of their code points.
    pub fn of_characters(text: &str) -> Vocabulary {
        let mut seen: Vec<char> = pieces(text)
            .into_par_iter()
            .map(|part| {
                let mut seen: Vec<char> = part.chars().collect();
                seen.sort_unstable();
                seen.dedup();
                seen
            })
            .flatten()
            .collect();
        seen.sort_unstable();
        seen.dedup();
        let tokens = seen.into_iter().map(String::from).collect();
        Vocabulary::of(Listed { tokenizer: Tokenizer::Characters, tokens })
    }

    /// The words of a text that stand in it at least `min_count` times, the most frequent first.
    /// `<unk>` is among them if it stands in the text or if rare words are to be left out
    /// (`min_count` > 1).
    pub fn of_words(text: &str, min_count: usize) -> Vocabulary {
        let counted = tasks(text).into_par_iter().map(|part| {
            let mut counts: HashMap<&str, usize> = HashMap::new();
            for word in words(part) {
                *counts.entry(word).or_default() += 1;
            }
            counts
        });

        let counts = counted.reduce(HashMap::new, |mut all, part| {
            part.into_iter().for_each(|(word, count)| *all.entry(word).or_default() += count);
            all
        });

        let (mut kept, dropped): (Vec<_>, Vec<_>) = counts
            .into_iter()
            .partition(|(word, count)| *count >= min_count || *word == UNK || *word == EOS);
        if min_count > 1 {
            let more: usize = dropped.iter().map(|(_, count)| count).sum();
            match kept.iter_mut().find(|(word, _)| *word == UNK) {
                Some((_, count)) => *count += more,
                None => kept.push((UNK, more)),
            }
        }

        kept.sort_unstable_by(|(a, n), (b, m)| m.cmp(n).then(a.cmp(b)));
        let tokens = kept.into_iter().map(|(word, _)| word.to_owned()).collect();
        Vocabulary::of(Listed { tokenizer: Tokenizer::Words, tokens })
    }

    /// The words of a list, one a line, in its order, each alone or before its count; `<eos>` is
    /// added at the front if it is not among them.
    ///
    /// # Errors
    /// [`Error::Data`] for a list that is empty, or has a word twice or a line that is no word.
    pub fn of_list(text: &str, path: &str) -> Result<Vocabulary> {
        let wrong = |problem: String| {
            Error::data(path, problem, "one word a line, each once, alone or with its count")
        };

        let mut tokens = Vec::new();
        for (i, line) in text.lines().enumerate() {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [] => {}
                [word] => tokens.push(word.to_owned()),
                [word, count] if count.parse::<f64>().is_ok() => tokens.push(word.to_owned()),
                _ => {
                    let shown: String = line.escape_debug().take(40).collect();
                    return Err(wrong(format!("line {} is no word: `{shown}`", i + 1)));
                }
            }
        }

        if tokens.is_empty() {
            return Err(wrong("no words".into()));
        }

        if !tokens.iter().any(|token| token == EOS) {
            tokens.insert(0, EOS.to_owned());
        }

        let count = tokens.len();
        let vocabulary = Vocabulary::of(Listed { tokenizer: Tokenizer::Words, tokens });
        if vocabulary.numbers.len() < count {
            let twice = vocabulary
                .listed
                .tokens
                .iter()
                .enumerate()
                .find(|(i, t)| vocabulary.numbers[*t] != *i as u32);
            return Err(wrong(format!(
                "`{}` stands in it twice",
                twice.map_or("", |(_, token)| token)
            )));
        }

        Ok(vocabulary)
    }

    /// What can be saved.
    pub fn listed(&self) -> &Listed {
        &self.listed
    }

    /// xxh3 of the tokens in their order.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(self.listed.tokenizer.word().as_bytes());
        for token in &self.listed.tokens {
            hash.update(&(token.len() as u64).to_le_bytes());
            hash.update(token.as_bytes());
        }
        hash.digest()
    }

    /// The first number that means another token in another vocabulary: the token here and there.
    pub fn first_difference<'a>(
        &'a self,
        other: &'a Vocabulary,
    ) -> Option<(usize, Option<&'a str>, Option<&'a str>)> {
        let (mine, theirs) = (&self.listed.tokens, &other.listed.tokens);
        let at = |tokens: &'a [String], i: usize| tokens.get(i).map(String::as_str);
        let differs = |i: &usize| at(mine, *i) != at(theirs, *i);
        (0..mine.len().max(theirs.len())).find(differs).map(|i| (i, at(mine, i), at(theirs, i)))
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        match self.listed.tokenizer {
            Tokenizer::Bytes => 256,
            _ => self.listed.tokens.len(),
        }
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What one token is called.
    pub fn unit(&self) -> &'static str {
        self.listed.tokenizer.unit()
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::Data`] about `name` for a character that is not in the vocabulary, or a word where
    /// there is no `<unk>`.
    pub fn encode(&self, text: &str, name: &str) -> Result<Vec<u32>> {
        Ok(self.parts(text, name)?.concat())
    }

    /// The same as bytes, as wide as the vocabulary needs them.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn encode_bytes(&self, text: &str, name: &str) -> Result<Vec<u8>> {
        let width = Width::of(self.len());
        let parts: Vec<Vec<u8>> =
            self.parts(text, name)?.into_par_iter().map(|part| width.encode(&part)).collect();
        Ok(parts.concat())
    }

    fn parts(&self, text: &str, name: &str) -> Result<Vec<Vec<u32>>> {
        let pieces = match self.listed.tokenizer {
            Tokenizer::Bytes => return Ok(vec![text.bytes().map(u32::from).collect()]),
            Tokenizer::Characters => pieces(text),
            Tokenizer::Words => tasks(text),
        };

        let bar = ProgressBar::new(text.len() as u64);
        let encoded = pieces.into_par_iter().map(|piece| {
            let mut buffer = [0u8; 4];
            let tokens = match self.listed.tokenizer {
                Tokenizer::Words => words(piece).map(|word| self.number(word, name)).collect(),
                _ => piece.chars().map(|c| self.number(c.encode_utf8(&mut buffer), name)).collect(),
            };

            bar.inc(piece.len() as u64);
            tokens
        });

        let encoded = encoded.collect();
        bar.finish_and_clear();
        encoded
    }

    /// The tokens of the beginning of a text that is to go on: words without the end of the last
    /// line.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let wrong = |error| match error {
            Error::Data { problem, .. } => {
                Error::config("--prompt", problem, "use what the training text has")
            }
            other => other,
        };

        let mut tokens = self.encode(text, "--prompt").map_err(wrong)?;
        if self.listed.tokenizer == Tokenizer::Words && !text.ends_with('\n') {
            tokens.pop();
        }

        Ok(tokens)
    }

    fn number(&self, token: &str, name: &str) -> Result<u32> {
        if let Some(number) = self.numbers.get(token) {
            return Ok(*number);
        }

        let unknown = self.numbers.get(UNK).filter(|_| self.listed.tokenizer == Tokenizer::Words);
        unknown.copied().ok_or_else(|| {
            let shown: String = token.escape_debug().take(40).collect();
            let (problem, remedy) = match self.listed.tokenizer {
                Tokenizer::Words => (
                    format!("the word `{shown}` is not in the vocabulary, which has no `<unk>`"),
                    "set data.min_count = 2 or more, or give a data.vocabulary with `<unk>`",
                ),
                _ => (
                    format!("the character `{shown}` is not in the vocabulary"),
                    "take data.tokenizer = \"bytes\", or a text without it",
                ),
            };

            Error::data(name, problem, remedy)
        })
    }

    /// The text of tokens: characters and bytes as they are, words with a space between and lines
    /// at `<eos>`.
    pub fn decode(&self, tokens: &[i64]) -> String {
        let token =
            |number: &i64| self.listed.tokens.get(*number as usize).map_or("", String::as_str);
        match self.listed.tokenizer {
            Tokenizer::Bytes => String::from_utf8_lossy(
                &tokens.iter().map(|token| *token as u8).collect::<Vec<_>>(),
            )
            .into_owned(),
            Tokenizer::Characters => tokens.iter().map(token).collect(),
            Tokenizer::Words => {
                let mut text = String::new();
                let mut begun = false;
                for word in tokens.iter().map(token) {
                    let (before, word) =
                        if word == EOS { ("", "\n") } else { (if begun { " " } else { "" }, word) };
                    let _ = write!(text, "{before}{word}");
                    begun = word != "\n";
                }
                text
            }
        }
    }
}

/// The words of a text: those of each line, then the line's end.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split_whitespace().chain(std::iter::once(EOS)))
}

/// Parts of whole lines.
fn tasks(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > TASK {
        let Some(end) = rest.as_bytes()[TASK..].iter().position(|b| *b == b'\n') else { break };
        let (part, more) = rest.split_at(TASK + end + 1);
        parts.push(part);
        rest = more;
    }

    parts.push(rest);
    parts
}

/// Parts of whole characters.
fn pieces(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > TASK {
        let cut = (TASK..rest.len()).find(|i| rest.is_char_boundary(*i)).unwrap_or(rest.len());
        let (part, more) = rest.split_at(cut);
        parts.push(part);
        rest = more;
    }

    parts.push(rest);
    parts
}

/// Text out of bytes.
///
/// # Errors
/// [`Error::Data`] with the place of the first byte that is none.
pub fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let problem = format!("no UTF-8 at byte {}", error.valid_up_to());
        Error::data(name, problem, "mend the text, or take data.tokenizer = \"bytes\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "the cat saw the dog\n\n a dog  ran\nthe end\n";

    #[test]
    fn words_are_numbered_by_frequency() {
        let vocabulary = Vocabulary::of_words(TEXT, 1);
        assert_eq!(
            vocabulary.listed().tokens,
            ["<eos>", "the", "dog", "a", "cat", "end", "ran", "saw"]
        );
        let tokens = vocabulary.encode(TEXT, "x").unwrap();
        assert_eq!(tokens, [1, 4, 7, 1, 2, 0, 0, 3, 2, 6, 0, 1, 5, 0]);
        let tokens: Vec<i64> = tokens.into_iter().map(i64::from).collect();
        assert_eq!(vocabulary.decode(&tokens), "the cat saw the dog\n\na dog ran\nthe end\n");
        let error = vocabulary.encode("the fox", "x.txt").unwrap_err().to_string();
        assert!(
            error.starts_with(
                "data x.txt: the word `fox` is not in the vocabulary, which has no `<unk>`; "
            ),
            "{error}"
        );
    }

    #[test]
    fn rare_words_are_unknown() {
        let vocabulary = Vocabulary::of_words(TEXT, 2);
        assert_eq!(vocabulary.listed().tokens, ["<unk>", "<eos>", "the", "dog"]);
        assert_eq!(vocabulary.encode("the fox", "x").unwrap(), [2, 0, 1]);
        assert_eq!(vocabulary.encode_prompt("the fox").unwrap(), [2, 0]);
        assert_eq!(vocabulary.encode_prompt("the\n").unwrap(), [2, 1]);
    }

    #[test]
    fn a_list_of_words_keeps_its_order() {
        let vocabulary = Vocabulary::of_list("dog\nthe\n<unk>\n", "list").unwrap();
        assert_eq!(vocabulary.listed().tokens, ["<eos>", "dog", "the", "<unk>"]);
        let message = |text| Vocabulary::of_list(text, "list").unwrap_err().to_string();
        assert!(
            message("a\nb\na\n").contains("`a` stands in it twice"),
            "{}",
            message("a\nb\na\n")
        );
        assert!(message(" \n").contains("no words"));
    }

    #[test]
    fn characters_are_numbered_by_code_point() {
        let vocabulary = Vocabulary::of_characters("bca é");
        assert_eq!(vocabulary.listed().tokens, [" ", "a", "b", "c", "é"]);
        assert_eq!(vocabulary.encode("é b", "x").unwrap(), [4, 0, 2]);
        assert_eq!(vocabulary.decode(&[4, 0, 2]), "é b");
        assert!(vocabulary.encode("z", "x").unwrap_err().to_string().contains("the character `z`"));
        assert_eq!(Vocabulary::bytes().encode("é", "x").unwrap(), [0xc3, 0xa9]);
    }

    #[test]
    fn long_texts_are_cut_between_lines() {
        let text = "some words in a line\n".repeat(TASK / 5);
        let parts = tasks(&text);
        assert!(parts.len() > 1 && parts.iter().all(|part| part.ends_with('\n')));
        assert_eq!(parts.concat(), text);
        let vocabulary = Vocabulary::of_words(&text, 1);
        assert_eq!(vocabulary.encode(&text, "x").unwrap().len(), TASK / 5 * 6);
    }

    #[test]
    fn bytes_that_are_no_text_are_found() {
        let error = utf8(b"good \xff bad", "x.txt").unwrap_err().to_string();
        assert!(error.starts_with("data x.txt: no UTF-8 at byte 5; "), "{error}");
    }
}
