//! How text becomes tokens and tokens become text: bytes, characters, words, subwords.
//!
//! Words are what stands between white space; every line ends in `<eos>`. The most frequent token
//! has the number 0, as the adaptive softmax wants it; equally frequent ones are in the order of
//! their bytes. Words that a vocabulary leaves out are `<unk>`, if it has one.

use std::collections::HashMap;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::Unit;
use super::subword::{Subword, SubwordFacts, context};
use super::words::{EOS, TASK, UNK, ids, joined, list, words};
use crate::bar::Bar;
use crate::error::{Error, Result};

/// Bytes of subwords that one task encodes, which take longer and more memory than others.
const SUBWORD_TASK: usize = 1 << 18;

/// What can be saved of a vocabulary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    #[serde(rename = "tokenizer")]
    pub unit: Unit,
    /// Of characters and words, in the order of their numbers.
    #[serde(default)]
    pub tokens: Vec<String>,
    /// How many there are, of ids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<usize>,
    /// Of subwords, whose `tokenizer.json` is kept beside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subword: Option<SubwordFacts>,
}

impl Listed {
    /// Tokens that stand for themselves.
    pub fn new(unit: Unit, tokens: Vec<String>) -> Listed {
        Listed { unit, tokens, size: None, subword: None }
    }

    /// How many tokens there are.
    pub fn count(&self) -> usize {
        match (&self.subword, self.size, self.unit) {
            (Some(facts), ..) => facts.size,
            (_, Some(size), _) => size,
            (.., Unit::Bytes) => 256,
            _ => self.tokens.len(),
        }
    }
}

/// The tokens of a model.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    listed: Arc<Listed>,
    numbers: Arc<HashMap<String, u32>>,
    subword: Option<Arc<Subword>>,
}

impl Vocabulary {
    /// 256 tokens, one a byte.
    pub fn bytes() -> Vocabulary {
        Vocabulary::listing(Unit::Bytes, Vec::new())
    }

    /// So many numbers, of which nobody says what they stand for.
    pub fn ids(size: usize) -> Vocabulary {
        let listed = Listed { size: Some(size), ..Listed::new(Unit::Ids, Vec::new()) };
        Vocabulary { listed: Arc::new(listed), numbers: Arc::default(), subword: None }
    }

    /// The tokens of a `tokenizer.json`.
    pub fn subwords(subword: Subword) -> Vocabulary {
        let facts = Some(subword.facts.clone());
        let listed = Listed { subword: facts, ..Listed::new(Unit::Subwords, Vec::new()) };
        let subword = Some(Arc::new(subword));
        Vocabulary { listed: Arc::new(listed), numbers: Arc::default(), subword }
    }

    /// A vocabulary read back, with the `tokenizer.json` of subwords.
    ///
    /// # Errors
    /// What it lacks.
    pub fn of(listed: Listed, json: Option<Vec<u8>>) -> std::result::Result<Vocabulary, String> {
        match (listed.unit, &listed.subword, json, listed.size) {
            (Unit::Subwords, Some(facts), Some(json), _) => {
                Ok(Vocabulary::subwords(Subword::kept(facts.clone(), json)))
            }
            (Unit::Subwords, ..) => Err("a vocabulary of subwords without its tokenizer".into()),
            (Unit::Ids, _, _, Some(size)) => Ok(Vocabulary::ids(size)),
            (Unit::Ids, ..) => Err("a vocabulary of ids without their number".into()),
            _ => Ok(Vocabulary::listing(listed.unit, listed.tokens)),
        }
    }

    /// Tokens that stand for themselves, in the order of their numbers.
    pub(super) fn listing(unit: Unit, tokens: Vec<String>) -> Vocabulary {
        let numbers = tokens.iter().enumerate().map(|(i, token)| (token.clone(), i as u32));
        let numbers = Arc::new(numbers.collect());
        Vocabulary { listed: Arc::new(Listed::new(unit, tokens)), numbers, subword: None }
    }

    /// The words of a list, in its order.
    ///
    /// # Errors
    /// [`Error::Data`] about the list.
    pub fn of_list(text: &str, path: &str) -> Result<Vocabulary> {
        Ok(Vocabulary::listing(Unit::Words, list(text, path)?))
    }

    /// What can be saved.
    pub fn listed(&self) -> &Listed {
        &self.listed
    }

    /// The `tokenizer.json` of subwords.
    pub fn json(&self) -> Option<&[u8]> {
        self.subword.as_ref().map(|subword| &subword.json[..])
    }

    /// What its tokens are.
    pub fn unit(&self) -> Unit {
        self.listed.unit
    }

    /// The token that ends a document, if there is one.
    pub fn end(&self) -> Option<u32> {
        match self.unit() {
            Unit::Words => self.numbers.get(EOS).copied(),
            _ => self.listed.subword.as_ref().and_then(|facts| facts.end),
        }
    }

    /// What a subword is called.
    pub fn token(&self, id: u32) -> Option<String> {
        self.subword.as_ref()?.token(id)
    }

    /// xxh3 of the tokens in their order, or of the tokenizer.
    pub fn digest(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(self.unit().word().as_bytes());
        for token in &self.listed.tokens {
            hash.update(&(token.len() as u64).to_le_bytes());
            hash.update(token.as_bytes());
        }

        if let Some(facts) = &self.listed.subword {
            hash.update(facts.digest.as_bytes());
        }

        if let Some(size) = self.listed.size {
            hash.update(&(size as u64).to_le_bytes());
        }
        hash.digest()
    }

    /// What makes this vocabulary another than `other`, if they are not the same.
    pub fn difference(&self, other: &Vocabulary) -> Option<String> {
        let (here, there) = (&self.listed, &other.listed);
        if here.unit != there.unit {
            return Some(format!("{} instead of {}", here.unit.word(), there.unit.word()));
        }

        if let (Some(here), Some(there)) = (&here.subword, &there.subword) {
            let shown = |facts: &SubwordFacts| format!("{} (digest {})", facts.name, facts.digest);
            if here.digest != there.digest {
                return Some(format!("the tokenizer {} instead of {}", shown(here), shown(there)));
            }

            let shown = |end: Option<u32>| end.map_or("none".to_owned(), |end| end.to_string());
            return (here.end != there.end).then(|| {
                format!("the end token {} instead of {}", shown(here.end), shown(there.end))
            });
        }

        if here.size != there.size {
            let shown = |size: Option<usize>| size.unwrap_or_default();
            return Some(format!("{} ids instead of {}", shown(here.size), shown(there.size)));
        }

        let count = here.tokens.len().max(there.tokens.len());
        let number = (0..count).find(|i| here.tokens.get(*i) != there.tokens.get(*i))?;
        let shown = |tokens: &[String]| {
            tokens.get(number).map_or("nothing".to_owned(), |t| format!("`{}`", t.escape_debug()))
        };
        let (name, here, there) = (self.name(), shown(&here.tokens), shown(&there.tokens));
        Some(format!("{name} number {number} is {here} instead of {there}"))
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.listed.count()
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What one token is called.
    pub fn name(&self) -> &'static str {
        self.unit().name()
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::Data`] about `name` for a character that is not in the vocabulary, or a word where
    /// there is no `<unk>`.
    pub fn encode(&self, text: &str, name: &str) -> Result<Vec<u32>> {
        Ok(self.parts(text, name)?.concat())
    }

    fn parts(&self, text: &str, name: &str) -> Result<Vec<Vec<u32>>> {
        if self.unit() == Unit::Ids {
            return Ok(vec![ids(text, self.len(), name)?]);
        }

        let (mut pieces, mut start) = (Vec::new(), 0);
        while text.len() - start > self.task() {
            let Some(cut) = self.cut(&text[start..], self.task(), name)? else { break };
            pieces.push(start..start + cut);
            start += cut;
        }

        pieces.push(start..text.len());
        let bar = Bar::of_bytes(text.len() as u64, "tokenising");
        let encoded = pieces.into_par_iter().map(|piece| {
            let before = self.context(&text[..piece.start]);
            let tokens = self.encode_piece(before, &text[piece.clone()], name);
            bar.advance(piece.len() as u64);
            tokens
        });

        let encoded: Result<Vec<Vec<u32>>> = encoded.collect();
        drop(bar);
        let mut encoded = encoded?;
        encoded.insert(0, self.opening()?);
        encoded.push(self.closing(encoded.iter().rev().find_map(|part| part.last().copied()))?);
        Ok(encoded)
    }

    /// Bytes that one task encodes.
    fn task(&self) -> usize {
        if self.unit() == Unit::Subwords { SUBWORD_TASK } else { TASK }
    }

    /// The tokens of a part of a text that was cut where it can be ([`Vocabulary::cut`]), behind the
    /// end of what stands before ([`Vocabulary::context`]), without what stands around a document.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn encode_piece(&self, before: &str, piece: &str, name: &str) -> Result<Vec<u32>> {
        let mut buffer = [0u8; 4];
        match (&self.subword, self.unit()) {
            (Some(subword), _) => subword.encode_behind(before, piece, name),
            (_, Unit::Bytes) => Ok(piece.bytes().map(u32::from).collect()),
            (_, Unit::Words) => words(piece).map(|word| self.number(word, name)).collect(),
            _ => piece.chars().map(|c| self.number(c.encode_utf8(&mut buffer), name)).collect(),
        }
    }

    /// What stands before a document's tokens.
    ///
    /// # Errors
    /// [`Error::Data`] about a `tokenizer.json` that is none.
    pub fn opening(&self) -> Result<Vec<u32>> {
        let Some(subword) = &self.subword else { return Ok(Vec::new()) };
        Ok(subword.around()?.0.to_vec())
    }

    /// What stands after a document's tokens, of which one is the last.
    ///
    /// # Errors
    /// As [`Vocabulary::opening`].
    pub fn closing(&self, last: Option<u32>) -> Result<Vec<u32>> {
        let Some(subword) = &self.subword else { return Ok(Vec::new()) };
        let mut closing = subword.around()?.1.to_vec();
        let last = closing.last().copied().or(last);
        closing.extend(subword.facts.end.filter(|end| last != Some(*end)));
        Ok(closing)
    }

    /// The end of a text that whoever encodes the next piece must see.
    pub fn context<'a>(&self, text: &'a str) -> &'a str {
        if self.unit() == Unit::Subwords { context(text) } else { "" }
    }

    /// The first place from `from` on where a text can be cut so that the tokens of its parts are
    /// those of the whole, if there is one; of subwords there always is one.
    ///
    /// # Errors
    /// As [`Vocabulary::encode`].
    pub fn cut(&self, text: &str, from: usize, name: &str) -> Result<Option<usize>> {
        if from >= text.len() {
            return Ok(None);
        }

        let line =
            || text.as_bytes()[from..].iter().position(|b| *b == b'\n').map(|at| from + at + 1);
        match (&self.subword, self.unit()) {
            (Some(subword), _) => subword.cut(text, from, name).map(Some),
            (_, Unit::Words) => Ok(line()),
            _ => Ok((from..text.len()).find(|at| text.is_char_boundary(*at))),
        }
    }

    /// The tokens of the beginning of a text that is to go on: words without the end of the last
    /// line, subwords without the end of the document.
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

        if let Some(subword) = &self.subword {
            let tokens = subword.encode_part(text, "--prompt").map_err(wrong)?;
            return Ok([self.opening()?, tokens].concat());
        }

        let mut tokens = self.encode(text, "--prompt").map_err(wrong)?;
        if self.unit() == Unit::Words && !text.ends_with('\n') {
            tokens.pop();
        }

        Ok(tokens)
    }

    /// What a text of nothing yet begins with: what the tokenizer puts before one, else the end of
    /// a document, of a line, or the first token.
    pub fn beginning(&self) -> Result<Vec<u32>> {
        let opening = self.opening()?;
        match (self.unit(), self.end()) {
            _ if !opening.is_empty() => Ok(opening),
            (Unit::Subwords, Some(end)) => Ok(vec![end]),
            (Unit::Ids, _) => Ok(vec![0]),
            _ => Ok(self.encode_prompt("\n").unwrap_or_else(|_| vec![0])),
        }
    }

    fn number(&self, token: &str, name: &str) -> Result<u32> {
        if let Some(number) = self.numbers.get(token) {
            return Ok(*number);
        }

        let unknown = self.numbers.get(UNK).filter(|_| self.unit() == Unit::Words);
        unknown.copied().ok_or_else(|| {
            let shown: String = token.escape_debug().take(40).collect();
            let (problem, remedy) = match self.unit() {
                Unit::Words => (
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

    /// The text of subwords.
    ///
    /// # Errors
    /// [`Error::Data`] about a `tokenizer.json` that is none.
    pub fn text_of(&self, tokens: &[i64]) -> Result<String> {
        self.subword.as_ref().map_or(Ok(String::new()), |subword| subword.decode(tokens))
    }

    /// The text of tokens: characters and bytes as they are, words with a space between and lines
    /// at `<eos>`, subwords as their tokenizer has it without special ones, ids with a space
    /// between.
    pub fn decode(&self, tokens: &[i64]) -> String {
        let token =
            |number: &i64| self.listed.tokens.get(*number as usize).map_or("", String::as_str);
        match self.unit() {
            Unit::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|token| *token as u8).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Unit::Characters => tokens.iter().map(token).collect(),
            Unit::Words => joined(tokens.iter().map(token)),
            Unit::Subwords => self.text_of(tokens).unwrap_or_else(|error| error.to_string()),
            Unit::Ids => {
                let words: Vec<String> = tokens.iter().map(i64::to_string).collect();
                words.join(" ")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Counts;
    use crate::data::words::{tasks, utf8};

    const TEXT: &str = "the cat saw the dog\n\n a dog  ran\nthe end\n";

    #[test]
    fn words_are_numbered_by_frequency() {
        let vocabulary = Counts::of(Unit::Words, &[TEXT], 1);
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
        let vocabulary = Counts::of(Unit::Words, &[TEXT], 2);
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
        let vocabulary = Counts::of(Unit::Characters, &["bca é"], 1);
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
        let vocabulary = Counts::of(Unit::Words, &[&text], 1);
        assert_eq!(vocabulary.encode(&text, "x").unwrap().len(), TASK / 5 * 6);
    }

    #[test]
    fn bytes_that_are_no_text_are_found() {
        let error = utf8(b"good \xff bad", "x.txt").unwrap_err().to_string();
        assert!(error.starts_with("data x.txt: no UTF-8 at byte 5; "), "{error}");
    }
}
