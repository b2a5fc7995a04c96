//! Prepared files: texts that have been tokenised once, to be mapped by every run.
//!
//! ```text
//! 64 bytes   "ouroboros tokens", then zeros
//!            the tokens of the splits, `width` bytes each, little-endian
//!            the documents of the splits: where each begins, in tokens and in bytes of its text, 8 bytes each
//!            of every split the xxh3 of each block of its tokens, 8 bytes each
//!            the tokenizer.json, of subwords
//!            the header as JSON: format, source, vocabulary, width, splits, where everything lies
//! 24 bytes   length of the header, xxh3 of it, "tokens." and the format
//! ```
//!
//! Everything begins at a multiple of 64 bytes. The header stands at the end, since what comes before is written
//! while texts are read. Opening a file reads the header alone, but of a small one everything.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::borders::{Borders, List, Stride};
use super::tokens::{BLOCK, Mapped, Tokens, Width, map};
use super::vocabulary::{Listed, Vocabulary};
use crate::error::{Error, Result};
use crate::files;

pub const MAGIC: &[u8; 16] = b"ouroboros tokens";
/// Bytes before the tokens.
pub const HEAD: usize = ALIGN;
const ALIGN: usize = 64;
const END: &[u8; 8] = b"tokens.3";
const TRAILER: usize = 24;
const FORMAT: u32 = 3;
/// Bytes of tokens up to which a file is read whole when it is opened.
const SMALL: u64 = 64 << 20;

/// Where the texts came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Source {
    pub name: String,
    /// How: what another preparation would have to do to be the same.
    pub how: String,
    /// The archive, or the files that were read.
    pub inputs: Vec<InputFacts>,
    /// Lines and rows that were no documents, and were left out.
    #[serde(default)]
    pub skipped: u64,
}

/// What tells a file that was read from others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InputFacts {
    pub name: String,
    pub bytes: u64,
    pub digest: String,
    /// The split that it was given for, if it was.
    #[serde(default)]
    pub split: String,
}

/// A split, and what it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub name: String,
    pub tokens: u64,
    pub documents: u64,
    /// Of the texts, before they became tokens.
    pub bytes: u64,
    /// Of the digests of its blocks of tokens.
    pub digest: String,
    /// Of where its documents begin.
    pub documents_digest: String,
    /// Where its tokens, documents and digests lie, in bytes.
    pub tokens_at: u64,
    pub documents_at: u64,
    pub digests_at: u64,
}

/// What stands behind the tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    pub source: Source,
    pub vocabulary: Listed,
    pub width: Width,
    /// `train` is one of them.
    pub splits: Vec<Split>,
    /// Where the tokenizer.json lies, and its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<(u64, u64)>,
}

/// A prepared file, mapped.
#[derive(Debug)]
pub struct Prepared {
    pub header: Header,
    map: Arc<Mmap>,
    path: PathBuf,
}

/// Whether a file begins as prepared files do.
pub fn is_prepared(path: &Path) -> bool {
    let mut start = [0u8; MAGIC.len()];
    files::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *MAGIC
}

impl Prepared {
    /// Maps a prepared file; a small one is verified.
    ///
    /// # Errors
    /// [`Error::Data`] if it is of another format, damaged, or has tokens that its vocabulary does
    /// not have.
    pub fn open(path: &Path) -> Result<Prepared> {
        let wrong = |problem: &str| {
            Error::data(path.display(), problem, "prepare it again: ouroboros data prepare")
        };

        let map = map(path)?;
        let header = read_header(&map).map_err(|problem| wrong(&problem))?;
        let prepared = Prepared { header, map: map.into(), path: path.to_owned() };
        let bytes: u64 = prepared.header.splits.iter().map(|split| split.tokens).sum();
        if bytes * prepared.header.width as u64 <= SMALL {
            prepared.verify()?;
        }
        Ok(prepared)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// [`Error::Data`] about a block that is damaged, or a token that the vocabulary does not have.
    pub fn verify(&self) -> Result<()> {
        let wrong = |problem: String| {
            Err(Error::data(
                self.path.display(),
                problem,
                "prepare it again: ouroboros data prepare",
            ))
        };

        let (width, vocabulary) = (self.header.width, self.header.vocabulary.count() as u64);
        for split in &self.header.splits {
            let name = &split.name;
            let bytes = split.tokens as usize * width as usize;
            let tokens = &self.map[split.tokens_at as usize..][..bytes];
            let digests = &self.map[split.digests_at as usize..][..8 * bytes.div_ceil(BLOCK)];
            if format!("{:016x}", xxh3_64(digests)) != split.digest {
                return wrong(format!("the digests of {name} are damaged"));
            }

            let damaged = tokens
                .par_chunks(BLOCK)
                .zip(digests.par_chunks(8))
                .position_first(|(block, digest)| xxh3_64(block).to_le_bytes() != *digest);
            if let Some(block) = damaged {
                return wrong(format!("block {block} of {name} is damaged: its digest is another"));
            }

            let largest = tokens.par_chunks(1 << 16).filter_map(|block| width.largest(block)).max();
            if let Some(largest) = largest.filter(|largest| *largest >= vocabulary) {
                let problem =
                    format!("it has the token {largest}, and a vocabulary of {vocabulary}");
                return wrong(problem);
            }

            if !self.are_documents(split) {
                return wrong(format!("the documents of {name} are damaged"));
            }
        }
        Ok(())
    }

    /// Whether the documents of a split begin one after the other.
    fn are_documents(&self, split: &Split) -> bool {
        let list = &self.map[split.documents_at as usize..][..16 * split.documents as usize];
        if format!("{:016x}", xxh3_64(list)) != split.documents_digest {
            return false;
        }

        let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
        let mut before = [0, 0];
        list.as_chunks::<16>().0.iter().enumerate().all(|(i, pair)| {
            let here = [number(&pair[..8]), number(&pair[8..])];
            let rises = (0..2).all(|which| here[which] >= before[which]);
            before = here;
            let begins = i > 0 || here == [0, 0];
            begins && rises && here[0] <= split.tokens && here[1] <= split.bytes
        })
    }

    /// The tokens of a split.
    ///
    /// # Errors
    /// [`Error::Data`] with the names of those that there are.
    pub fn split(&self, name: &str) -> Result<Tokens> {
        let Some(split) = self.header.splits.iter().find(|split| split.name == name) else {
            let names: Vec<&str> =
                self.header.splits.iter().map(|split| split.name.as_str()).collect();
            let remedy = format!("it has {}", names.join(", "));
            return Err(Error::data(self.path.display(), format!("no split `{name}`"), remedy));
        };

        let list = List {
            map: Arc::clone(&self.map),
            at: split.documents_at as usize,
            documents: split.documents as usize,
            stride: Stride::Pairs,
            base: 0,
            bytes: Some(0..split.bytes),
        };
        let (start, width) = (split.tokens_at as usize, self.header.width);
        Ok(Tokens::of_map(Mapped {
            map: Arc::clone(&self.map),
            range: start..start + split.tokens as usize * width as usize,
            width,
            borders: Borders::Listed(list),
            digest: u64::from_str_radix(&split.digest, 16).ok(),
            name: self.path.display().to_string(),
        }))
    }

    /// The vocabulary that it was tokenised with.
    ///
    /// # Errors
    /// [`Error::Data`] for one that lacks its tokenizer.
    pub fn vocabulary(&self) -> Result<Vocabulary> {
        let json = self
            .header
            .tokenizer
            .map(|(at, bytes)| self.map[at as usize..][..bytes as usize].to_vec());
        Vocabulary::of(self.header.vocabulary.clone(), json)
            .map_err(|problem| Error::data(self.path.display(), problem, "prepare it again"))
    }
}

/// The header, of which everything lies in the file.
fn read_header(bytes: &[u8]) -> std::result::Result<Header, String> {
    if !bytes.starts_with(MAGIC) {
        return Err("not a prepared file".into());
    }

    // Earlier formats had the length of their header here.
    let cut = || format!("{} bytes: it is cut short or damaged", bytes.len());
    if bytes.get(MAGIC.len()..HEAD).ok_or_else(cut)?.iter().any(|byte| *byte != 0) {
        return Err(format!("of an earlier format, this version reads format {FORMAT}"));
    }

    let start = bytes.len().checked_sub(TRAILER).filter(|start| *start >= HEAD).ok_or_else(cut)?;
    let trailer = &bytes[start..];
    let number = |at: usize| trailer[at..at + 8].try_into().map_or(u64::MAX, u64::from_le_bytes);
    if trailer[16..] != *END {
        return Err(cut());
    }

    let length =
        usize::try_from(number(0)).ok().filter(|length| *length <= start - HEAD).ok_or_else(cut)?;
    let json = &bytes[start - length..start];
    if xxh3_64(json) != number(8) {
        return Err("the digest of its header is another: it is damaged".into());
    }

    let header: Header =
        serde_json::from_slice(json).map_err(|error| format!("its header: {error}"))?;
    let room = (start - length) as u64;
    let lies = |at: u64, count: u64, each: u64| {
        let end = count.checked_mul(each).and_then(|bytes| bytes.checked_add(at));
        at >= HEAD as u64 && end.is_some_and(|end| end <= room)
    };
    let width = header.width as u64;
    let complete = header.splits.iter().all(|split| {
        let blocks = split.tokens.saturating_mul(width).div_ceil(BLOCK as u64);
        lies(split.tokens_at, split.tokens, width)
            && lies(split.documents_at, split.documents, 16)
            && lies(split.digests_at, blocks, 8)
    });
    match complete && header.tokenizer.is_none_or(|(at, bytes)| lies(at, bytes, 1)) {
        true => Ok(header),
        false => Err("its header names places that it does not have: it is damaged".into()),
    }
}

/// A split that is to be written: its tokens and its documents, which lie in files.
#[derive(Debug)]
pub struct Written<'a> {
    pub name: &'a str,
    pub tokens: u64,
    pub documents: u64,
    /// Of the texts.
    pub bytes: u64,
    /// None: the tokens lie in the file already, behind its head.
    pub tokens_file: Option<File>,
    pub documents_file: File,
}

/// Makes a prepared file of one that has its head and the tokens of the first split.
///
/// # Errors
/// What the system says.
pub fn finish(
    file: &File,
    source: Source,
    vocabulary: &Vocabulary,
    splits: Vec<Written>,
) -> std::io::Result<Header> {
    let width = Width::of(vocabulary.len());
    let mut end = HEAD as u64;
    let mut places = Vec::new();
    for split in &splits {
        let bytes = split.tokens * width as u64;
        if let Some(tokens) = &split.tokens_file {
            copy(tokens, bytes, file, end)?;
        }
        places.push(end);
        end = (end + bytes).next_multiple_of(ALIGN as u64);
    }

    let mut made = Vec::new();
    for (split, tokens_at) in splits.into_iter().zip(places) {
        let documents_at = end;
        let documents = copy(&split.documents_file, 16 * split.documents, file, end)?;
        let digests_at = (end + 16 * split.documents).next_multiple_of(ALIGN as u64);
        let digests = digests(file, tokens_at, split.tokens * width as u64)?;
        file.write_all_at(&digests, digests_at)?;
        end = (digests_at + digests.len() as u64).next_multiple_of(ALIGN as u64);
        made.push(Split {
            name: split.name.to_owned(),
            tokens: split.tokens,
            documents: split.documents,
            bytes: split.bytes,
            digest: format!("{:016x}", xxh3_64(&digests)),
            documents_digest: format!("{documents:016x}"),
            tokens_at,
            documents_at,
            digests_at,
        });
    }

    let tokenizer = vocabulary.json().map(|json| (end, json.len() as u64));
    if let Some(json) = vocabulary.json() {
        file.write_all_at(json, end)?;
        end = (end + json.len() as u64).next_multiple_of(ALIGN as u64);
    }

    let vocabulary = vocabulary.listed().clone();
    let header = Header { format: FORMAT, source, vocabulary, width, splits: made, tokenizer };
    let mut json = serde_json::to_vec(&header)?;
    let trailer = [(json.len() as u64).to_le_bytes(), xxh3_64(&json).to_le_bytes(), *END];
    json.extend(trailer.concat());
    file.write_all_at(&json, end)?;
    file.set_len(end + json.len() as u64)?;
    file.sync_all()?;
    Ok(header)
}

/// Copies the beginning of a file to a place of another; the xxh3 of it.
fn copy(from: &File, bytes: u64, to: &File, at: u64) -> std::io::Result<u64> {
    let mut hash = Xxh3::new();
    let mut buffer = vec![0; (1 << 20).min(bytes as usize)];
    let mut done = 0;
    while done < bytes {
        let part = &mut buffer[..(bytes - done).min(1 << 20) as usize];
        from.read_exact_at(part, done)?;
        to.write_all_at(part, at + done)?;
        hash.update(part);
        done += part.len() as u64;
    }
    Ok(hash.digest())
}

/// The xxh3 of every block of a part of a file.
fn digests(file: &File, at: u64, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![0; BLOCK.min(bytes as usize)];
    let (mut digests, mut done) = (Vec::new(), 0);
    while done < bytes {
        let block = &mut buffer[..(bytes - done).min(BLOCK as u64) as usize];
        file.read_exact_at(block, at + done)?;
        digests.extend(xxh3_64(block).to_le_bytes());
        done += block.len() as u64;
    }
    Ok(digests)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::{Counts, Unit};
    use std::fs;

    /// A split: its name, tokens of a byte each, documents, and bytes of text.
    type Part<'a> = (&'static str, &'a [u8], &'a [[u64; 2]], u64);

    /// Writes splits.
    pub fn write(path: &Path, vocabulary: &Vocabulary, splits: &[Part]) {
        let source =
            Source { name: "a".into(), how: "words".into(), inputs: Vec::new(), skipped: 0 };
        let file_of = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            file
        };
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(true).open(path).unwrap();
        file.write_all_at(MAGIC, 0).unwrap();
        file.write_all_at(splits[0].1, HEAD as u64).unwrap();
        let written = splits.iter().enumerate().map(|(i, (name, tokens, documents, bytes))| {
            let list: Vec<u8> =
                documents.as_flattened().iter().flat_map(|number| number.to_le_bytes()).collect();
            Written {
                name,
                tokens: tokens.len() as u64,
                documents: documents.len() as u64,
                bytes: *bytes,
                tokens_file: (i > 0).then(|| file_of(tokens)),
                documents_file: file_of(&list),
            }
        });
        finish(&file, source, vocabulary, written.collect()).unwrap();
    }

    fn prepared(folder: &Path) -> PathBuf {
        let path = folder.join("a.tokens");
        let vocabulary = Counts::of(Unit::Words, &["a b a c\n"], 1);
        let train = ("train", &[0, 1, 2, 3, 0][..], &[[0, 0], [3, 6]][..], 12);
        write(&path, &vocabulary, &[train, ("valid", &[3, 2], &[[0, 0]], 4)]);
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
        let train = prepared.split("train").unwrap();
        train.read(1, 3, &mut ids);
        assert_eq!(ids, [3, 2, 1, 2, 3]);
        let mut starts = Vec::new();
        train.document_starts(1, 4, &mut starts);
        assert_eq!(starts, [0, 0, 2, 2]);
        assert_eq!((train.next_document(1), train.next_document(4)), (Some(3), None));
        assert_eq!((train.text_bytes(), train.slice(3..5).text_bytes()), (Some(12), Some(6)));
        assert_eq!(train.slice(0..3).text_bytes(), Some(6));
        // What was kept is what reading would give.
        let read = Tokens::of_ids(&[0, 1, 2, 3, 0], 4);
        assert_eq!(train.digest(), read.digest());
        assert_ne!(train.slice(0..3).digest(), train.slice(1..4).digest());
        // Texts of several files keep what is known of each.
        let both = Tokens::joined(&[train.slice(1..5), prepared.split("valid").unwrap()]);
        let mut starts = Vec::new();
        both.document_starts(0, 6, &mut starts);
        assert_eq!((starts, both.text_bytes()), (vec![0, 0, 2, 2, 4, 4], Some(14)));
        assert_eq!(prepared.vocabulary().unwrap().listed().tokens, ["a", "<eos>", "b", "c"]);
        let error = prepared.split("test").unwrap_err().to_string();
        assert!(error.contains("no split `test`; it has train, valid"), "{error}");
    }

    #[test]
    fn another_format_and_a_damaged_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = prepared(folder.path());
        let good = fs::read(&path).unwrap();
        let message = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Prepared::open(&path).map(|prepared| prepared.header).unwrap_err().to_string()
        };
        for cut in [30, 63, 70, good.len() - 1] {
            let text = message(&good[..cut]);
            assert!(text.contains("cut short or damaged"), "{text}");
        }
        // Zeros between the parts say nothing.
        let prepared = read_header(&good).unwrap();
        let of = |split: &Split| {
            let (tokens, documents) = (split.tokens_at, split.documents_at);
            [
                tokens..tokens + split.tokens,
                documents..documents + 16 * split.documents,
                split.digests_at..split.digests_at + 8,
            ]
        };
        let mut says: Vec<u64> = prepared.splits.iter().flat_map(of).flatten().collect();
        says.extend(0..HEAD as u64);
        let last = prepared.splits[1].digests_at as usize + ALIGN;
        says.extend(last as u64..good.len() as u64);
        for place in says {
            let mut bad = good.clone();
            bad[place as usize] ^= 1;
            let text = message(&bad);
            assert!(text.contains("a.tokens: "), "{place}: {text}");
        }
        let mut other = good.clone();
        other[16] = 99;
        let text = message(&other);
        assert!(text.contains("of an earlier format, this version reads format 3"), "{text}");
    }
}
