//! A prepared file that is being made, and how it is gone on with after an interruption.
//!
//! ```text
//! OUT.partial/lock            held while a process works here
//!             source.json     of what it is made, and how
//!             journal.json    where reading goes on, and how long the others were then
//!             train.tokens    the prepared file as far as it goes: its head, the tokens of train
//!             valid.tokens, test.tokens
//!             train.documents, ...   where they begin, in tokens and in bytes of text, 8 bytes each
//!             vocabulary.json of characters and words, once they are counted
//! ```
//!
//! What stands behind the lengths in the journal is cut off and made again, so a preparation that
//! was killed ends with the same bytes as one that was not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::SPLITS;
use super::documents::Place;
use super::download::{hold, with_suffix};
use crate::data::prepared::{self, HEAD, Header, MAGIC, Source, Written};
use crate::data::{Listed, Vocabulary, Width};
use crate::error::{Error, Result};
use crate::files;

/// Between two journals; so much work is lost by a kill at most.
const EVERY: Duration = Duration::from_millis(500);

const JOURNAL: &str = "journal.json";
const SOURCE: &str = "source.json";
const VOCABULARY: &str = "vocabulary.json";

/// What has been written of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Progress {
    tokens: u64,
    documents: u64,
    /// Of the texts.
    bytes: u64,
}

/// Where a preparation stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Journal {
    place: Place,
    skipped: u64,
    splits: [Progress; SPLITS.len()],
}

/// The folder of a preparation, which no other process works in.
#[derive(Debug)]
pub struct Unfinished {
    out: PathBuf,
    folder: PathBuf,
    source: Source,
    journal: Journal,
    lock: Arc<File>,
}

/// The tokens of a piece, as they lie in a file.
#[derive(Debug)]
pub struct Encoded {
    pub tokens: Vec<u8>,
    /// Of the text.
    pub bytes: u64,
    pub split: usize,
    pub begins: bool,
}

impl Unfinished {
    /// Begins a preparation, or goes on with one of the same inputs in the same way.
    ///
    /// # Errors
    /// [`Error::Data`] if another process makes it, or the disk says no.
    pub fn open(target: &Path, source: &Source) -> Result<Unfinished> {
        let folder = with_suffix(target, ".partial");
        let wrong = |error: io::Error| unwritable(target, &error);
        fs::create_dir_all(&folder).map_err(wrong)?;
        let lock = Arc::new(alone(target, &folder)?);
        let (out, source) = (target.to_owned(), source.clone());
        let before: Option<Source> = read_json(&folder.join(SOURCE));
        let journal: Option<Journal> = read_json(&folder.join(JOURNAL));
        let begun = before.is_some();
        if let (Some(before), Some(journal)) = (before, journal)
            && before == source
        {
            say!("{}: going on where it was interrupted", out.display());
            return Ok(Unfinished { out, folder, source, journal, lock });
        }

        if begun {
            let from = "from the beginning, as its files or options are others than before";
            say!("{}: {from}", out.display());
        }

        clear(&folder).map_err(wrong)?;
        let kept = serde_json::to_vec(&source).map_err(io::Error::from);
        kept.and_then(|json| replace(&folder.join(SOURCE), &json)).map_err(wrong)?;
        let journal = Journal::default();
        let unfinished = Unfinished { out, folder, source, journal, lock };
        unfinished.save().map_err(wrong)?;
        Ok(unfinished)
    }

    /// Whether a folder has nothing that could be gone on with.
    pub fn has_nothing(folder: &Path) -> bool {
        read_json(&folder.join(JOURNAL))
            .is_none_or(|journal: Journal| journal == Journal::default())
    }

    /// Held as long as nobody else may work here.
    pub fn lock(&self) -> Arc<File> {
        Arc::clone(&self.lock)
    }

    /// Where it is made.
    pub fn folder(&self) -> PathBuf {
        self.folder.clone()
    }

    /// The vocabulary that was counted before, if it was.
    pub fn counted(&self) -> Option<Vocabulary> {
        let listed: Listed = read_json(&self.folder.join(VOCABULARY))?;
        Vocabulary::of(listed, None).ok()
    }

    /// Keeps a vocabulary that has been counted.
    ///
    /// # Errors
    /// [`Error::Data`] if the disk says no.
    pub fn keep(&self, vocabulary: &Vocabulary) -> Result<()> {
        let kept = serde_json::to_vec(vocabulary.listed()).map_err(io::Error::from);
        let kept = kept.and_then(|json| replace(&self.folder.join(VOCABULARY), &json));
        kept.map_err(|error| unwritable(&self.out, &error))
    }

    /// Where reading goes on, and how many records were left out before.
    pub fn place(&self) -> (Place, u64) {
        (self.journal.place.clone(), self.journal.skipped)
    }

    /// Opens the files, as long as the journal says they are.
    ///
    /// # Errors
    /// [`Error::Data`] if the disk says no.
    pub fn write(self, width: Width) -> Result<Writer> {
        let opened = self.files(width);
        let (tokens, documents) = opened.map_err(|error| unwritable(&self.out, &error))?;
        Ok(Writer { unfinished: self, width, tokens, documents, saved: Instant::now() })
    }

    fn files(&self, width: Width) -> io::Result<(Vec<Growing>, Vec<Growing>)> {
        let (mut tokens, mut documents) = (Vec::new(), Vec::new());
        for (i, (split, progress)) in SPLITS.iter().zip(&self.journal.splits).enumerate() {
            let head: &[u8] = if i == 0 { &HEADS } else { &[] };
            let length = progress.tokens * width as u64 + head.len() as u64;
            tokens.push(Growing::open(&self.folder.join(format!("{split}.tokens")), head, length)?);
            let path = self.folder.join(format!("{split}.documents"));
            documents.push(Growing::open(&path, &[], 16 * progress.documents)?);
        }
        Ok((tokens, documents))
    }

    fn save(&self) -> io::Result<()> {
        replace(&self.folder.join(JOURNAL), &serde_json::to_vec(&self.journal)?)
    }
}

/// The files of a preparation, as tokens come.
#[derive(Debug)]
pub struct Writer {
    unfinished: Unfinished,
    width: Width,
    tokens: Vec<Growing>,
    documents: Vec<Growing>,
    saved: Instant,
}

impl Writer {
    /// Adds the tokens of a batch, behind which reading goes on at `place`.
    ///
    /// # Errors
    /// [`Error::Data`] if the disk says no.
    pub fn add(&mut self, batch: &[Encoded], place: Place, skipped: u64) -> Result<()> {
        let added = self.put(batch).and_then(|()| {
            (self.unfinished.journal.place, self.unfinished.journal.skipped) = (place, skipped);
            match self.saved.elapsed() > EVERY {
                true => self.save(),
                false => Ok(()),
            }
        });
        added.map_err(|error| unwritable(&self.unfinished.out, &error))
    }

    fn put(&mut self, batch: &[Encoded]) -> io::Result<()> {
        for piece in batch {
            let progress = &mut self.unfinished.journal.splits[piece.split];
            if piece.begins {
                let place = [progress.tokens.to_le_bytes(), progress.bytes.to_le_bytes()];
                self.documents[piece.split].file.write_all(&place.concat())?;
                progress.documents += 1;
            }

            self.tokens[piece.split].file.write_all(&piece.tokens)?;
            progress.tokens += (piece.tokens.len() / self.width as usize) as u64;
            progress.bytes += piece.bytes;
        }
        Ok(())
    }

    /// The files first, then the journal that says how long they are.
    fn save(&mut self) -> io::Result<()> {
        for growing in self.tokens.iter_mut().chain(&mut self.documents) {
            growing.file.flush()?;
            growing.file.get_ref().sync_data()?;
        }

        self.saved = Instant::now();
        self.unfinished.save()
    }

    /// How many tokens a split has.
    pub fn count(&self, split: usize) -> u64 {
        self.unfinished.journal.splits[split].tokens
    }

    /// Puts everything into one file and gives it its name.
    ///
    /// # Errors
    /// [`Error::Data`] if something has the name already, or the disk says no.
    pub fn finish(mut self, vocabulary: &Vocabulary) -> Result<Header> {
        let finished = self.save().and_then(|()| self.assemble(vocabulary));
        let Unfinished { out, folder, .. } = &self.unfinished;
        let header = finished.map_err(|error| unwritable(out, &error))?;
        files::place(&folder.join("train.tokens"), out).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let problem = "another process has made it meanwhile";
                Error::data(out.display(), problem, "take that, or remove it and run again")
            }
            _ => unwritable(out, &error),
        })?;

        let _ = fs::remove_dir_all(folder);
        Ok(header)
    }

    fn assemble(&mut self, vocabulary: &Vocabulary) -> io::Result<Header> {
        let Unfinished { source, journal: Journal { splits, skipped, .. }, .. } = &self.unfinished;
        let mut written = Vec::new();
        for (i, progress) in splits.iter().enumerate() {
            let tokens = &self.tokens[i].file;
            written.push(Written {
                name: SPLITS[i],
                tokens: progress.tokens,
                documents: progress.documents,
                bytes: progress.bytes,
                tokens_file: if i == 0 { None } else { Some(tokens.get_ref().try_clone()?) },
                documents_file: self.documents[i].file.get_ref().try_clone()?,
            });
        }

        let source = Source { skipped: *skipped, ..source.clone() };
        prepared::finish(self.tokens[0].file.get_ref(), source, vocabulary, written)
    }
}

/// What a prepared file begins with.
const HEADS: [u8; HEAD] = {
    let mut head = [0; HEAD];
    let mut i = 0;
    while i < MAGIC.len() {
        head[i] = MAGIC[i];
        i += 1;
    }
    head
};

/// A file that grows.
#[derive(Debug)]
struct Growing {
    file: BufWriter<File>,
}

impl Growing {
    /// As long as it is to be: what stands behind that is cut off.
    fn open(path: &Path, head: &[u8], length: u64) -> io::Result<Growing> {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        if length == head.len() as u64 {
            file.set_len(0)?;
            file.write_all(head)?;
        } else if file.metadata()?.len() < length {
            let problem =
                format!("{} is shorter than its journal says; remove the folder", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }

        file.set_len(length)?;
        file.seek(SeekFrom::Start(length))?;
        Ok(Growing { file: BufWriter::with_capacity(1 << 20, file) })
    }
}

/// Takes the folder, in which two processes would write into the same files.
fn alone(out: &Path, folder: &Path) -> Result<File> {
    let lock =
        OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("lock"));
    let lock = lock.map_err(|error| unwritable(out, &error))?;
    hold(&lock, out, "another process is preparing it")?;
    Ok(lock)
}

/// Removes what a preparation of something else has left.
fn clear(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name() != "lock" {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Gives a file another content, whole at any moment.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = with_suffix(path, ".new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_data()?;
    fs::rename(&temporary, path)
}

/// What a file of JSON holds, if it can be read.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&files::read(path).ok()?).ok()
}

fn unwritable(out: &Path, error: &io::Error) -> Error {
    let problem = format!("cannot be written ({error})");
    let remedy = "choose another folder or make room; then run again to go on";
    Error::data(out.display(), problem, remedy)
}
