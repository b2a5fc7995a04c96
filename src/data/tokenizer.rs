//! `data.tokenizer`: how text becomes tokens, as a config asks for it.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Tokenizer {
    /// 256 tokens, one a byte.
    Bytes,
    /// The characters of the text.
    Characters,
    /// What stands between white space; every line ends in `<eos>`.
    Words,
    /// A `tokenizer.json` of Hugging Face's form.
    File(PathBuf),
}

impl Tokenizer {
    /// What its tokens are.
    pub fn unit(&self) -> Unit {
        match self {
            Tokenizer::Bytes => Unit::Bytes,
            Tokenizer::Characters => Unit::Characters,
            Tokenizer::Words => Unit::Words,
            Tokenizer::File(_) => Unit::Subwords,
        }
    }
}

impl fmt::Display for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Tokenizer::File(path) => write!(f, "{}", path.display()),
            other => f.write_str(other.unit().word()),
        }
    }
}

impl FromStr for Tokenizer {
    type Err = String;

    fn from_str(text: &str) -> Result<Tokenizer, String> {
        match text {
            "bytes" => Ok(Tokenizer::Bytes),
            "characters" => Ok(Tokenizer::Characters),
            "words" => Ok(Tokenizer::Words),
            path if Path::new(path).extension().is_some_and(|ending| ending == "json") => {
                Ok(Tokenizer::File(path.into()))
            }
            other => Err(format!(
                "unknown tokenizer `{other}`; expected `bytes`, `characters`, `words`, or the path of a tokenizer.json"
            )),
        }
    }
}

impl TryFrom<String> for Tokenizer {
    type Error = String;

    fn try_from(text: String) -> Result<Tokenizer, String> {
        text.parse()
    }
}

impl From<Tokenizer> for String {
    fn from(tokenizer: Tokenizer) -> String {
        tokenizer.to_string()
    }
}

impl schemars::JsonSchema for Tokenizer {
    fn schema_name() -> Cow<'static, str> {
        "Tokenizer".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let words = ["bytes", "characters", "words"];
        schemars::json_schema!({ "anyOf": [{ "enum": words }, { "type": "string" }] })
    }
}

/// What tokens are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    Bytes,
    Characters,
    Words,
    /// Those of a `tokenizer.json`.
    Subwords,
    /// Numbers, of which nobody says what they stand for.
    Ids,
}

impl Unit {
    /// As in a file.
    pub fn word(self) -> &'static str {
        match self {
            Unit::Bytes => "bytes",
            Unit::Characters => "characters",
            Unit::Words => "words",
            Unit::Subwords => "subwords",
            Unit::Ids => "ids",
        }
    }

    /// What one token is called.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Bytes => "byte",
            Unit::Characters => "character",
            Unit::Words => "word",
            Unit::Subwords | Unit::Ids => "token",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_is_a_word_or_a_path() {
        for text in ["bytes", "characters", "words", "a/tokenizer.json", "gpt2.json"] {
            let tokenizer: Tokenizer = text.parse().unwrap();
            assert_eq!(tokenizer.to_string(), text);
            assert_eq!(text.ends_with("json"), tokenizer.unit() == Unit::Subwords);
        }
        let error = "byte".parse::<Tokenizer>().unwrap_err();
        assert!(error.contains("unknown tokenizer `byte`; expected `bytes`"), "{error}");
    }
}
