//! A file of a state on its way to the disk, past the cache where the file system lets it
//! (O_DIRECT): the processor, which trains meanwhile, copies nothing again, and what is written is
//! not read again for its digest.
//!
//! ```text
//! file      | length, header, blanks | values of one buffer ............... | of the next ...
//!           0                        4096 n                                 any multiple of 4
//! memory                             the same distance from a multiple of 4096 as in the file
//!
//! so all of a buffer but its first and last bytes goes to the disk from where it lies; those go through a piece of
//! 4 KiB that the next buffer's first bytes complete. A second thread takes the digest of the same memory meanwhile.
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use safetensors::tensor::{Dtype, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use crate::error::{Error, Result};
use crate::params::as_bytes;

/// Of a direct write: what its place in the file, its memory and its length are multiples of,
/// bytes. No disk asks for more.
const ALIGN: usize = 4096;
/// Of one write, bytes.
const PIECE: usize = 64 << 20;

/// Tensors of f32 that become one file, in this order.
#[derive(Default)]
pub struct Content {
    tensors: Vec<(String, Vec<usize>)>,
    buffers: Vec<Buffer>,
    bytes: usize,
}

/// Values that lie as far from a multiple of [`ALIGN`] in memory as in the file.
struct Buffer {
    memory: Vec<f32>,
    lead: usize,
}

impl Content {
    /// Adds tensors, each with its name and its shape; `append` appends the values of one, by its
    /// number, to what memory has.
    ///
    /// # Errors
    /// [`Error::Memory`], and those of `append`.
    pub fn add(
        &mut self,
        tensors: &[(String, &[i64])],
        mut append: impl FnMut(usize, &mut Vec<f32>) -> Result<()>,
    ) -> Result<()> {
        let values = |shape: &[i64]| shape.iter().product::<i64>() as usize;
        let count: usize = tensors.iter().map(|(_, shape)| values(shape)).sum();
        let mut memory: Vec<f32> = Vec::new();
        let reserved = memory.try_reserve_exact(count + ALIGN / 4);
        reserved.map_err(|_| {
            Error::Memory(format!(
                "not enough for the {} bytes that are copied to be saved; give it more, or take more stages",
                4 * count
            ))
        })?;

        // The allocation does not move: it has room for everything.
        let lead = (self.bytes + memory.as_ptr().align_offset(ALIGN) * 4) % ALIGN / 4;
        memory.resize(lead, 0.0);
        for (number, (name, shape)) in tensors.iter().enumerate() {
            append(number, &mut memory)?;
            self.tensors.push((name.clone(), shape.iter().map(|n| *n as usize).collect()));
        }

        self.bytes += 4 * count;
        self.buffers.push(Buffer { memory, lead });
        Ok(())
    }

    /// Of all values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Writes a safetensors file and waits until it is on the disk. Gives its size and the digest
    /// of what was written.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn write(&self, path: &Path) -> io::Result<(u64, String)> {
        let head = self.head()?;
        let slices = || {
            let bodies =
                self.buffers.iter().map(|buffer| &as_bytes(&buffer.memory)[4 * buffer.lead..]);
            std::iter::once(&head[..]).chain(bodies)
        };

        let digest = || {
            let mut hash = Xxh3::new();
            slices().for_each(|bytes| hash.update(bytes));
            super::hex(&hash)
        };

        thread::scope(|scope| {
            let digest = scope.spawn(digest);
            let mut file = Pieces::create(path)?;
            slices().try_for_each(|bytes| file.put(bytes))?;
            let size = file.finish()?;
            Ok((
                size,
                digest
                    .join()
                    .map_err(|_| io::Error::other("a panic while its digest was taken"))?,
            ))
        })
    }

    fn head(&self) -> io::Result<Vec<u8>> {
        let tensors: Vec<(String, Dtype, Vec<usize>)> = self
            .tensors
            .iter()
            .map(|(name, shape)| (name.clone(), Dtype::F32, shape.clone()))
            .collect();
        head(&tensors, None)
    }
}

/// Length and header of a file of tensors in this order, padded with blanks so that the values begin
/// at a multiple of [`ALIGN`]; with `metadata`, if any.
/// Source: the format, <https://huggingface.co/docs/safetensors>.
fn head(
    tensors: &[(String, Dtype, Vec<usize>)],
    metadata: Option<HashMap<String, String>>,
) -> io::Result<Vec<u8>> {
    let mut end = 0;
    let mut infos = BTreeMap::new();
    for (name, dtype, shape) in tensors {
        let begin = end;
        end += dtype.size() * shape.iter().product::<usize>();
        let data_offsets = (begin, end);
        let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets };
        infos.insert(name.clone(), serde_json::to_value(info)?);
    }

    if let Some(metadata) = metadata {
        infos.insert("__metadata__".to_owned(), serde_json::to_value(metadata)?);
    }

    let mut header = serde_json::to_vec(&infos)?;
    header.resize((8 + header.len()).next_multiple_of(ALIGN) - 8, b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header].concat())
}

/// A file of tensors whose values come one after the other, so that no more of them than a few pieces
/// need memory. A thread writes and takes the digest while the next ones are made.
///
/// ```text
/// put ---> [ piece that is filled ] ---> full ---> thread: digest, write past the cache
///                 ^                                            |
///                 '------------------- empty <-----------------'
/// ```
pub struct TensorStream {
    filling: Filling,
    full: SyncSender<Filling>,
    empty: Receiver<Filling>,
    /// None once it has stopped.
    writer: Option<JoinHandle<io::Result<(u64, String)>>>,
}

/// Bytes of a piece of a stream, and pieces that there are.
const STREAMED: usize = 8 << 20;
const PIECES: usize = 3;

/// A piece of a stream, whose memory lies as direct writes want it.
struct Filling {
    memory: Vec<u8>,
    start: usize,
    filled: usize,
}

impl Filling {
    fn new() -> Filling {
        let memory = vec![0; STREAMED + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN);
        Filling { memory, start, filled: 0 }
    }

    /// Takes as many of the bytes as there is room for; gives the others.
    fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (now, later) = bytes.split_at(bytes.len().min(STREAMED - self.filled));
        let at = self.start + self.filled;
        self.memory[at..at + now.len()].copy_from_slice(now);
        self.filled += now.len();
        later
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.filled]
    }
}

impl TensorStream {
    /// A file of tensors in this order, each with its name, type and shape.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn create(
        path: &Path,
        tensors: &[(String, Dtype, Vec<usize>)],
        metadata: Option<HashMap<String, String>>,
    ) -> io::Result<TensorStream> {
        let file = create(path)?;
        let (full, pieces) = sync_channel::<Filling>(PIECES);
        let (emptied, empty) = sync_channel(PIECES);
        for _ in 1..PIECES {
            let _ = emptied.send(Filling::new());
        }

        let write = move || {
            let (mut hash, mut written) = (Xxh3::new(), 0);
            for mut piece in pieces {
                hash.update(piece.bytes());
                written = write_piece(&file, &piece, written)?;
                piece.filled = 0;
                // Nobody needs it any more once everything is filled.
                let _ = emptied.send(piece);
            }

            file.set_len(written)?;
            file.sync_all()?;
            Ok((written, super::hex(&hash)))
        };

        let writer = thread::Builder::new().name("stream".into()).spawn(write)?;
        let mut stream =
            TensorStream { filling: Filling::new(), full, empty, writer: Some(writer) };
        stream.put(&head(tensors, metadata)?)?;
        Ok(stream)
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            bytes = self.filling.take(bytes);
            if bytes.is_empty() {
                return Ok(());
            }

            let Ok(next) = self.empty.recv() else { return Err(self.stopped()) };
            let full = std::mem::replace(&mut self.filling, next);
            if self.full.send(full).is_err() {
                return Err(self.stopped());
            }
        }
    }

    /// Waits until everything is on the disk. Gives the file's size and its digest.
    ///
    /// # Errors
    /// What the file system reports.
    pub fn finish(self) -> io::Result<(u64, String)> {
        let TensorStream { filling, full, writer, .. } = self;
        let _ = full.send(filling);
        drop(full);
        ended(writer)
    }

    /// Why the writer has stopped.
    fn stopped(&mut self) -> io::Error {
        match ended(self.writer.take()) {
            Err(error) => error,
            Ok(_) => io::Error::other("its writer has stopped"),
        }
    }
}

fn ended(writer: Option<JoinHandle<io::Result<(u64, String)>>>) -> io::Result<(u64, String)> {
    let Some(writer) = writer else { return Err(io::Error::other("its writer has stopped")) };
    writer.join().unwrap_or_else(|_| Err(io::Error::other("a panic while it was written")))
}

/// Writes a piece, the last one with whatever stands behind what it is filled with; gives the bytes
/// written so far.
fn write_piece(file: &File, piece: &Filling, written: u64) -> io::Result<u64> {
    let whole = piece.filled.next_multiple_of(ALIGN);
    write_all(file, &piece.memory[piece.start..piece.start + whole], written)?;
    Ok(written + piece.filled as u64)
}

/// An empty file that is written past the cache, where the file system lets it.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    let direct = options.clone().custom_flags(OFlags::DIRECT.bits() as i32).open(path);
    direct.or_else(|_| options.open(path))
}

/// A file that is written from its beginning to its end.
struct Pieces {
    file: File,
    /// Room for an aligned piece of [`ALIGN`] bytes, which begins at `start` and is `filled` so
    /// far.
    edge: Vec<u8>,
    start: usize,
    filled: usize,
    written: u64,
}

impl Pieces {
    fn create(path: &Path) -> io::Result<Pieces> {
        let file = create(path)?;
        let edge = vec![0; 2 * ALIGN];
        let start = edge.as_ptr().align_offset(ALIGN);
        Ok(Pieces { file, edge, start, filled: 0, written: 0 })
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.filled == 0 && bytes.len() >= ALIGN && bytes.as_ptr().align_offset(ALIGN) == 0 {
                let (whole, rest) = bytes.split_at(bytes.len() / ALIGN * ALIGN);
                for piece in whole.chunks(PIECE) {
                    write_all(&self.file, piece, self.written)?;
                    self.written += piece.len() as u64;
                }

                bytes = rest;
                continue;
            }

            let (now, later) = bytes.split_at(bytes.len().min(ALIGN - self.filled));
            let at = self.start + self.filled;
            self.edge[at..at + now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == ALIGN {
                self.flush()?;
            }
        }

        Ok(())
    }

    /// Writes the piece, with whatever stands behind what it is filled with.
    fn flush(&mut self) -> io::Result<()> {
        write_all(&self.file, &self.edge[self.start..self.start + ALIGN], self.written)?;
        self.written += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    fn finish(mut self) -> io::Result<u64> {
        if self.filled > 0 {
            self.flush()?;
            self.file.set_len(self.written)?;
        }
        self.file.sync_all()?;
        Ok(self.written)
    }
}

/// Writes past the cache; through it if the file system, which has opened the file for direct
/// writes, has none, or has written a part that ends where it cannot go on.
fn write_all(file: &File, piece: &[u8], at: u64) -> io::Result<()> {
    match file.write_all_at(piece, at) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            fcntl_setfl(file, fcntl_getfl(file)? - OFlags::DIRECT)?;
            file.write_all_at(piece, at)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    fn check(folder: &Path) {
        // Small ones, one that begins anywhere, nothing, some pages: in one buffer and in several.
        let tensors: Vec<(String, [i64; 1], Vec<f32>)> = [1usize, 100_001, 0, 16 * 1024, 7, 50_000]
            .iter()
            .map(|count| {
                (format!("of {count}"), [*count as i64], (0..*count).map(|i| i as f32).collect())
            })
            .collect();
        let mut content = Content::default();
        for part in [&tensors[..2], &tensors[2..3], &tensors[3..]] {
            let named: Vec<_> =
                part.iter().map(|(name, shape, _)| (name.clone(), &shape[..])).collect();
            let append = |number: usize, memory: &mut Vec<f32>| {
                memory.extend_from_slice(&part[number].2);
                Ok(())
            };
            content.add(&named, append).unwrap();
        }
        let path = folder.join("values");
        let (size, digest) = content.write(&path).unwrap();
        let there = std::fs::read(&path).unwrap();
        assert_eq!(size, there.len() as u64);
        assert_eq!((size, digest), super::super::digest(&path, |_| ()).unwrap());
        let read = SafeTensors::deserialize(&there).unwrap();
        assert_eq!(read.len(), tensors.len());
        for (name, shape, values) in &tensors {
            let tensor = read.tensor(name).unwrap();
            assert_eq!(
                (tensor.shape(), tensor.data()),
                (&[shape[0] as usize][..], as_bytes(values)),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_written_is_read() {
        check(tempfile::tempdir().unwrap().path());
    }

    #[test]
    fn a_file_system_without_direct_writes_does() {
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            check(tempfile::tempdir_in(memory).unwrap().path());
        }
    }

    #[test]
    fn buffers_lie_as_in_the_file() {
        let mut content = Content::default();
        for count in [3usize, 5000, 12_345, 1024] {
            let position = content.bytes();
            let append = |_, memory: &mut Vec<f32>| {
                memory.extend(std::iter::repeat_n(1.0, count));
                Ok(())
            };
            content.add(&[("any".to_owned(), &[count as i64][..])], append).unwrap();
            let Buffer { memory, lead } = content.buffers.last().unwrap();
            assert_eq!(memory[*lead..].as_ptr().addr() % ALIGN, position % ALIGN);
        }
    }

    /// Parts of any size come out as one file, whose digest is that of its bytes.
    #[test]
    fn a_stream_is_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("values");
        for (count, part) in
            [(0usize, 1usize), (10, 3), (STREAMED / 4, 1000), (STREAMED + 77, 1 << 20)]
        {
            let values: Vec<u8> = (0..4 * count).map(|i| (i * 31) as u8).collect();
            let tensors = [("all".to_owned(), Dtype::F32, vec![count])];
            let mut stream = TensorStream::create(&path, &tensors, None).unwrap();
            values.chunks(part).for_each(|part| stream.put(part).unwrap());
            let (size, digest) = stream.finish().unwrap();
            assert_eq!((size, digest), super::super::digest(&path, |_| ()).unwrap());
            let there = std::fs::read(&path).unwrap();
            let read = SafeTensors::deserialize(&there).unwrap();
            assert!(read.tensor("all").unwrap().data() == values, "{count}");
        }
    }

    #[test]
    fn a_full_disk_is_told() {
        if Path::new("/dev/full").exists() {
            let tensors = [("all".to_owned(), Dtype::F32, vec![8 * STREAMED])];
            let mut stream = TensorStream::create(Path::new("/dev/full"), &tensors, None).unwrap();
            let values = vec![0; STREAMED];
            let put = (0..32).try_for_each(|_| stream.put(&values));
            assert_eq!(
                put.unwrap_err().kind(),
                io::ErrorKind::StorageFull,
                "who fills is told why"
            );
            assert!(stream.finish().is_err());
        }
    }

    #[test]
    fn a_full_disk_is_told_at_once() {
        if Path::new("/dev/full").exists() {
            let mut file = Pieces::create(Path::new("/dev/full")).unwrap();
            assert_eq!(file.put(&[0; 2 * ALIGN]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }
}
