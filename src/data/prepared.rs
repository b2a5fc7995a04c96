//! Prepared files: a text that has been tokenised once, to be mapped by every run.
//!
//! ```text
//! 16 bytes   "ouroboros tokens"
//!  8 bytes   length of the header, little-endian
//!            the header as JSON: format, vocabulary, width, tokens of each split, source
//!            zeros up to a multiple of 64 bytes
//!            the tokens of the splits, one after the other, `width` bytes each, little-endian
//!  8 bytes   xxh3 of everything before, little-endian
//! ```

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::tokens::{Tokens, Width, map};
use super::vocabulary::{Listed, Vocabulary};
use crate::error::{Error, Result};
use crate::files;

const MAGIC: &[u8; 16] = b"ouroboros tokens";
const FORMAT: u32 = 2;
/// Bytes of the digest at the end.
const DIGEST: usize = 8;
const ALIGN: usize = 64;

/// Where the text came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    /// Of the file that was tokenised, in hexadecimal digits.
    pub sha256: String,
    /// How: what another preparation would have to do to be the same.
    pub how: String,
}

/// A split and how many tokens it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub name: String,
    pub tokens: usize,
}

/// What stands before the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub source: Source,
    pub width: Width,
    /// In the order of their tokens; `train` is one of them.
    pub splits: Vec<Split>,
    pub vocabulary: Listed,
}

/// A prepared file, mapped.
#[derive(Debug)]
pub struct Prepared {
    pub header: Header,
    tokens: Tokens,
    path: PathBuf,
}

/// Whether a file begins as prepared files do.
pub fn is_prepared(path: &Path) -> bool {
    let mut start = [0u8; MAGIC.len()];
    files::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *MAGIC
}

impl Prepared {
    /// Maps a prepared file, which is read once.
    ///
    /// # Errors
    /// [`Error::Data`] if it is of another format, damaged, or has tokens that its vocabulary does
    /// not have.
    pub fn open(path: &Path) -> Result<Prepared> {
        let wrong = |problem: &str| {
            Error::data(path.display(), problem, "prepare it again: ouroboros data prepare")
        };

        let map = map(path)?;
        let (header, start) = read_header(&map).map_err(|problem| wrong(&problem))?;
        let sum = header.splits.iter().try_fold(0usize, |sum, split| sum.checked_add(split.tokens));
        let bytes = sum.and_then(|tokens| tokens.checked_mul(header.width as usize));
        let end = bytes
            .and_then(|bytes| bytes.checked_add(start))
            .filter(|end| end.checked_add(DIGEST) == Some(map.len()));
        let Some(end) = end else {
            return Err(wrong(&format!(
                "{} bytes, which is not what its header says: it is cut short or damaged",
                map.len()
            )));
        };

        if map[end..] != xxh3_64(&map[..end]).to_le_bytes() {
            return Err(wrong("its digest is not that of its bytes: it is damaged"));
        }

        let tokens = Tokens::of_map(map, start..end, header.width);
        let vocabulary = Vocabulary::of(header.vocabulary.clone()).len();
        match tokens.largest() {
            Some(largest) if largest >= vocabulary as u64 => {
                Err(wrong(&format!("it has the token {largest}, and a vocabulary of {vocabulary}")))
            }
            _ => Ok(Prepared { header, tokens, path: path.to_owned() }),
        }
    }

    /// The tokens of a split.
    ///
    /// # Errors
    /// [`Error::Data`] with the names of those that there are.
    pub fn split(&self, name: &str) -> Result<Tokens> {
        let mut start = 0;
        for split in &self.header.splits {
            if split.name == name {
                return Ok(self.tokens.slice(start..start + split.tokens));
            }
            start += split.tokens;
        }

        let names: Vec<&str> = self.header.splits.iter().map(|split| split.name.as_str()).collect();
        Err(Error::data(
            self.path.display(),
            format!("no split `{name}`"),
            format!("it has {}", names.join(", ")),
        ))
    }

    /// The vocabulary that it was tokenised with.
    pub fn vocabulary(&self) -> Vocabulary {
        Vocabulary::of(self.header.vocabulary.clone())
    }
}

/// The header, and where the tokens start.
fn read_header(bytes: &[u8]) -> std::result::Result<(Header, usize), String> {
    let fixed = MAGIC.len() + 8;
    if !bytes.starts_with(MAGIC) {
        return Err("not a prepared file".into());
    }

    let length = bytes.get(MAGIC.len()..fixed).ok_or("no header")?;
    let length = u64::from_le_bytes(length.try_into().map_err(|_| "no header")?);
    let end = usize::try_from(length)
        .ok()
        .and_then(|length| fixed.checked_add(length))
        .ok_or("no header")?;
    let json = bytes.get(fixed..end).ok_or("the header is cut short")?;
    // The number of the format first: the rest may be another in another format.
    let value: serde_json::Value =
        serde_json::from_slice(json).map_err(|error| format!("its header: {error}"))?;
    if value["format"] != FORMAT {
        return Err(format!(
            "format {} is not known to this version, which reads format {FORMAT}",
            value["format"]
        ));
    }

    let header = serde_json::from_value(value).map_err(|error| format!("its header: {error}"))?;
    Ok((header, end.next_multiple_of(ALIGN)))
}

/// Writes a prepared file under another name, then gives it its own. The splits are bytes of
/// tokens, as wide as the vocabulary needs them.
///
/// # Errors
/// [`Error::Data`] if it cannot be written; then nothing is left of it.
pub fn write(
    path: &Path,
    source: Source,
    vocabulary: &Vocabulary,
    splits: Vec<(&str, Vec<u8>)>,
) -> Result<Header> {
    let width = Width::of(vocabulary.len());
    let header = Header {
        format: FORMAT,
        source,
        width,
        splits: splits
            .iter()
            .map(|(name, bytes)| Split {
                name: (*name).to_owned(),
                tokens: bytes.len() / width as usize,
            })
            .collect(),
        vocabulary: vocabulary.listed().clone(),
    };

    let temporary = files::temporary(path);
    let written = || -> std::io::Result<()> {
        let json = serde_json::to_vec(&header)?;
        let mut file =
            Hashed { file: BufWriter::new(File::create(&temporary)?), hash: Xxh3::new() };
        file.write_all(MAGIC)?;
        file.write_all(&(json.len() as u64).to_le_bytes())?;
        file.write_all(&json)?;
        let start = MAGIC.len() + 8 + json.len();
        file.write_all(&vec![0; start.next_multiple_of(ALIGN) - start])?;
        for (_, bytes) in &splits {
            file.write_all(bytes)?;
        }

        let digest = file.hash.digest();
        file.file.write_all(&digest.to_le_bytes())?;
        file.file.into_inner()?.sync_all()?;
        files::place(&temporary, path)
    };

    written().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        match error.kind() {
            ErrorKind::AlreadyExists => {
                let problem = "another process has made it meanwhile";
                Error::data(path.display(), problem, "take that, or remove it and run again")
            }
            _ => Error::data(
                path.display(),
                format!("cannot be written ({error})"),
                "choose another folder or make room",
            ),
        }
    })?;

    Ok(header)
}

/// A file, and the digest of what is written.
struct Hashed {
    file: BufWriter<File>,
    hash: Xxh3,
}

impl Hashed {
    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(folder: &Path) -> PathBuf {
        let path = folder.join("a.tokens");
        let vocabulary = Vocabulary::of_words("a b a c\n", 1);
        let source = Source { name: "a".into(), sha256: "00".into(), how: "words".into() };
        write(
            &path,
            source,
            &vocabulary,
            vec![("train", vec![0, 1, 2, 3, 0]), ("valid", vec![3, 2])],
        )
        .unwrap();
        path
    }

    #[test]
    fn splits_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = prepared(folder.path());
        assert!(is_prepared(&path));
        let prepared = Prepared::open(&path).unwrap();
        let mut ids = Vec::new();
        prepared.split("valid").unwrap().read(0, 2, &mut ids);
        prepared.split("train").unwrap().read(1, 3, &mut ids);
        assert_eq!(ids, [3, 2, 1, 2, 3]);
        assert_eq!(prepared.vocabulary().listed().tokens, ["a", "<eos>", "b", "c"]);
        assert!(
            prepared
                .split("test")
                .unwrap_err()
                .to_string()
                .contains("no split `test`; it has train, valid")
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_format_and_a_cut_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = prepared(folder.path());
        let good = fs::read(&path).unwrap();
        let message = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Prepared::open(&path).unwrap_err().to_string()
        };
        let text = message(&good[..good.len() - 1]);
        assert!(text.contains("cut short or damaged"), "{text}");
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            let text = message(&bad);
            assert!(text.contains("a.tokens: "), "{place}: {text}");
        }
        assert!(message(&good[..30]).contains("the header is cut short"));
        let mut other = good.clone();
        let place = good.windows(10).position(|w| w == b"\"format\":2").unwrap();
        other[place + 9] = b'7';
        let text = message(&other);
        assert!(
            text.contains("format 7 is not known to this version, which reads format 2"),
            "{text}"
        );
    }
}
