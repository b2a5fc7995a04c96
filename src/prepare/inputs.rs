//! What is to be read: files, the files of directories, and those that a pattern names; in an order
//! that does not depend on the file system.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use xxhash_rust::xxh3::Xxh3;

use super::SPLITS;
use crate::data::prepared::InputFacts;
use crate::error::{Error, Result};
use crate::files;

/// Bytes that digests are made of, of all files together, about.
const LOOKED_AT: u64 = 1 << 30;
/// Parts of a file that is larger than its share.
const PARTS: u64 = 16;

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The whole is one document.
    Text,
    /// Every line is an object with a document in it.
    JsonLines,
    /// Every row has a document in it.
    Parquet,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// Where the bytes of an input are.
#[derive(Debug, Clone)]
pub enum Content {
    File(PathBuf),
    /// Unpacked already.
    Memory(Arc<Vec<u8>>),
}

/// Which split the documents of an input belong to.
#[derive(Debug, Clone, PartialEq)]
pub enum Splitting {
    /// All to one, by its number.
    Whole(usize),
    /// By the document: [`super::documents::drawn`].
    Drawn,
    /// A text that is cut: where train, valid and test end, in bytes.
    Cut(Vec<u64>),
}

/// Something to read.
#[derive(Debug, Clone)]
pub struct Input {
    pub content: Content,
    pub name: String,
    pub format: Format,
    pub packing: Packing,
    /// As it lies there.
    pub bytes: u64,
    pub splitting: Splitting,
}

impl Input {
    /// A text in memory.
    pub fn memory(name: &str, text: Vec<u8>, splitting: Splitting) -> Input {
        Input {
            name: name.to_owned(),
            format: Format::Text,
            packing: Packing::Plain,
            bytes: text.len() as u64,
            content: Content::Memory(Arc::new(text)),
            splitting,
        }
    }

    fn file(path: &Path, splitting: &Splitting) -> Result<Input> {
        let wrong = |error: std::io::Error| unreadable(path, &error);
        let file = files::open(path).map_err(wrong)?;
        let (format, packing) = kind(path);
        Ok(Input {
            content: Content::File(path.to_owned()),
            name: path.display().to_string(),
            format,
            packing,
            bytes: file.metadata().map_err(wrong)?.len(),
            splitting: splitting.clone(),
        })
    }

    /// What tells it from others, of a digest of all or, of a larger file, of `share` bytes.
    ///
    /// # Errors
    /// [`Error::Data`] if it cannot be read.
    fn facts(&self, share: u64) -> Result<InputFacts> {
        let mut hash = Xxh3::new();
        match &self.content {
            Content::Memory(bytes) => hash.update(bytes),
            Content::File(path) => {
                let wrong = |error: std::io::Error| unreadable(path, &error);
                let file = files::open(path).map_err(wrong)?;
                let part = share / PARTS;
                let places: Vec<u64> = match self.bytes <= share {
                    true => (0..self.bytes).step_by(part as usize).collect(),
                    false => (0..PARTS).map(|i| (self.bytes - part) / (PARTS - 1) * i).collect(),
                };

                let mut buffer = vec![0; part as usize];
                for place in places {
                    let read = &mut buffer[..part.min(self.bytes - place) as usize];
                    file.read_exact_at(read, place).map_err(wrong)?;
                    hash.update(read);
                }
            }
        }

        let name = Path::new(&self.name).file_name().unwrap_or_default();
        let split = match self.splitting {
            Splitting::Whole(split) => SPLITS[split],
            Splitting::Drawn | Splitting::Cut(_) => "",
        };
        Ok(InputFacts {
            name: name.to_string_lossy().into_owned(),
            bytes: self.bytes,
            digest: format!("{:016x}", hash.digest()),
            split: split.to_owned(),
        })
    }
}

/// What tells inputs from others.
///
/// # Errors
/// [`Error::Data`] about one that cannot be read.
pub fn facts(inputs: &[Input]) -> Result<Vec<InputFacts>> {
    let share = (LOOKED_AT / inputs.len().max(1) as u64).clamp(1 << 16, 1 << 26);
    inputs.par_iter().map(|input| input.facts(share)).collect()
}

/// What stands in the way of reading a file.
pub fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    let remedy = "give texts, JSON lines, Parquet, directories or patterns of them, or enwik8, text8, wikitext-103";
    Error::data(path.display(), format!("cannot be read ({error})"), remedy)
}

/// How a file is written and packed, by the end of its name.
fn kind(path: &Path) -> (Format, Packing) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (name, packing) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
        (Some(name), _) => (name, Packing::Gzip),
        (_, Some(name)) => (name, Packing::Zstd),
        _ => (&name[..], Packing::Plain),
    };

    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let format = match () {
        () if ends(&[".jsonl", ".ndjson", ".json"]) => Format::JsonLines,
        () if ends(&[".parquet"]) && packing == Packing::Plain => Format::Parquet,
        () => Format::Text,
    };
    (format, packing)
}

/// Whether a name in a directory is that of a text.
fn is_text(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
    kind(path).0 != Format::Text || plain.ends_with(".txt") || plain.ends_with(".text")
}

/// The files that are meant by what was given.
///
/// # Errors
/// [`Error::Data`] for what is not there, or has no texts in it.
pub fn find(what: &[PathBuf], splitting: &Splitting) -> Result<Vec<Input>> {
    let mut inputs = Vec::new();
    for path in what {
        let wrong = |problem: &str| {
            let remedy =
                "texts end in .txt, .jsonl, .ndjson, .json or .parquet, and .gz or .zst after it";
            Error::data(path.display(), problem, remedy)
        };

        let found = if path.is_dir() {
            let mut found = Vec::new();
            walk(path, &mut found).map_err(|error| unreadable(path, &error))?;
            found
        } else if is_pattern(path) {
            let pattern = path.to_str().ok_or_else(|| wrong("no pattern: it is not UTF-8"))?;
            let paths = glob::glob(pattern).map_err(|error| wrong(&error.to_string()))?;
            let mut found: Vec<PathBuf> =
                paths.filter_map(std::result::Result::ok).filter(|path| path.is_file()).collect();
            found.sort();
            found
        } else {
            vec![path.clone()]
        };

        if found.is_empty() {
            return Err(wrong("no texts in it"));
        }

        for file in found {
            inputs.push(Input::file(&file, splitting)?);
        }
    }

    Ok(inputs)
}

fn is_pattern(path: &Path) -> bool {
    !path.exists() && path.to_string_lossy().contains(['*', '?', '['])
}

/// The texts of a directory and of those in it, by their names; hidden ones are passed over.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }

        if entry.file_type()?.is_dir() {
            walk(&path, found)?;
        } else if path.is_file() && is_text(&path) {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_formats() {
        let kind = |name: &str| kind(Path::new(name));
        assert_eq!(kind("a/b.jsonl"), (Format::JsonLines, Packing::Plain));
        assert_eq!(kind("b.JSON.gz"), (Format::JsonLines, Packing::Gzip));
        assert_eq!(kind("b.txt.zst"), (Format::Text, Packing::Zstd));
        assert_eq!(kind("b.parquet"), (Format::Parquet, Packing::Plain));
        assert_eq!(kind("wiki.train.tokens"), (Format::Text, Packing::Plain));
    }

    #[test]
    fn directories_and_patterns_are_read_in_one_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.jsonl", "a.txt", "x/c.parquet", "x/.hidden.txt", ".git/d.txt", "notes.md"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let names = |what: &[&str]| -> Vec<String> {
            let what: Vec<PathBuf> = what.iter().map(|name| folder.path().join(name)).collect();
            let found = find(&what, &Splitting::Drawn).unwrap();
            facts(&found).unwrap().into_iter().map(|facts| facts.name).collect()
        };
        assert_eq!(names(&[""]), ["a.txt", "b.jsonl", "c.parquet"]);
        assert_eq!(names(&["*.jsonl", "*.txt"]), ["b.jsonl", "a.txt"]);
        assert_eq!(names(&["notes.md"]), ["notes.md"]);
        let error = find(&[folder.path().join("*.gz")], &Splitting::Drawn).unwrap_err().to_string();
        assert!(error.contains("*.gz: no texts in it; texts end in .txt"), "{error}");
    }
}
