//! A text of bytes: files mapped into memory, one after the other, or bytes that a generator made.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::PathBuf;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Made(Arc<[u8]>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Made(bytes) => bytes,
        }
    }
}

/// A range of a text; clones share the bytes.
#[derive(Debug, Clone)]
pub struct Text {
    parts: Arc<Vec<Bytes>>,
    range: Range<usize>,
}

impl Text {
    /// Maps files as one text, in the order given.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that cannot be opened or is empty.
    pub fn open(paths: &[PathBuf]) -> Result<Text> {
        if paths.is_empty() {
            return Err(Error::config("data.paths", "an empty list", "name at least one file"));
        }
        let parts = paths.iter().map(map).collect::<Result<Vec<_>>>()?;
        Ok(Text::from_parts(parts))
    }

    /// A text that is in memory already.
    pub fn from_bytes(bytes: Arc<[u8]>) -> Text {
        Text::from_parts(vec![Bytes::Made(bytes)])
    }

    fn from_parts(parts: Vec<Bytes>) -> Text {
        let len = parts.iter().map(|part| part.len()).sum();
        Text { parts: Arc::new(parts), range: 0..len }
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// A part of this text.
    pub fn slice(&self, range: Range<usize>) -> Text {
        let start = self.range.start;
        Text { parts: Arc::clone(&self.parts), range: start + range.start..start + range.end }
    }

    /// Fills `out` with the bytes from `offset` on.
    ///
    /// # Panics
    /// If they reach past the end: windows are counted so that none does.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= self.len(), "window {offset}+{} of {} bytes", out.len(), self.len());
        let (mut skip, mut filled) = (self.range.start + offset, 0);
        for part in self.parts.iter() {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            let take = (part.len() - skip).min(out.len() - filled);
            out[filled..filled + take].copy_from_slice(&part[skip..skip + take]);
            filled += take;
            skip = 0;
            if filled == out.len() {
                break;
            }
        }
    }
}

fn map(path: &PathBuf) -> Result<Bytes> {
    let wrong = |problem: String| Error::data(path.display(), problem, "check data.path");
    let file = File::open(path).map_err(|error| wrong(format!("cannot be opened ({error})")))?;
    let kind = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !kind.is_file() {
        return Err(wrong("not a file".into()));
    }
    if kind.len() == 0 {
        return Err(wrong("empty".into()));
    }
    // SAFETY: the map is read-only. Another process that cuts the file short while it is mapped would end this one
    // with SIGBUS; a corpus under training is not to be changed, as the README says.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| wrong(format!("cannot be mapped ({error})")))?;
    Ok(Bytes::Mapped(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_read_as_one_text() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = ["abc", "d", "efgh"]
            .iter()
            .map(|text| {
                let path = folder.path().join(text);
                std::fs::write(&path, text).unwrap();
                path
            })
            .collect();
        let text = Text::open(&paths).unwrap();
        assert_eq!(text.len(), 8);
        let mut window = [0; 5];
        text.read(2, &mut window);
        assert_eq!(&window, b"cdefg");
        let mut byte = [0];
        text.slice(3..8).slice(1..5).read(3, &mut byte);
        assert_eq!(&byte, b"h");
    }
}
