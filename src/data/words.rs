//! Parts of texts that tokens are made of: words and lines, numbers, characters.

use std::collections::HashSet;

use crate::error::{Error, Result};

/// The end of a line.
pub const EOS: &str = "<eos>";
/// A word that the vocabulary leaves out.
pub const UNK: &str = "<unk>";

/// Bytes that one task counts or encodes.
pub const TASK: usize = 1 << 22;

/// The words of a list, one a line, in its order, each alone or before its count; `<eos>` is
/// added at the front if it is not among them.
///
/// # Errors
/// [`Error::Data`] for a list that is empty, or has a word twice or a line that is no word.
pub fn list(text: &str, path: &str) -> Result<Vec<String>> {
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

    let mut seen = HashSet::new();
    match tokens.iter().find(|token| !seen.insert(token.as_str())) {
        Some(twice) => Err(wrong(format!("`{twice}` stands in it twice"))),
        None => Ok(tokens),
    }
}

/// Numbers with spaces or commas between.
pub fn ids(text: &str, size: usize, name: &str) -> Result<Vec<u32>> {
    let words = text.split(|c: char| c.is_whitespace() || c == ',').filter(|word| !word.is_empty());
    let id = |word: &str| {
        word.parse::<u32>().ok().filter(|id| (*id as usize) < size).ok_or_else(|| {
            let shown: String = word.escape_debug().take(40).collect();
            let remedy = "nobody has said what its tokens stand for: name a data.tokenizer";
            Error::data(name, format!("`{shown}` is no number below {size}"), remedy)
        })
    };
    words.map(id).collect()
}

/// The words of a text: those of each line, then the line's end.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split_whitespace().chain(std::iter::once(EOS)))
}

/// Words with a space between, and lines at `<eos>`.
pub fn joined<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let (mut text, mut begun) = (String::new(), false);
    for word in words {
        let ends = word == EOS;
        if begun && !ends {
            text.push(' ');
        }

        text.push_str(if ends { "\n" } else { word });
        begun = !ends;
    }
    text
}

/// Parts of whole lines.
pub fn tasks(text: &str) -> Vec<&str> {
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
