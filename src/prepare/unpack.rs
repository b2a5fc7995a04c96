//! The bytes of an input, unpacked, as far as they can be those of a text.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, ErrorKind, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::inputs::{Content, Input, Packing};
use crate::files;

/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;

/// So many bytes may come of one; no text is packed as well as that.
const RATIO: u64 = 1000;
/// From so many bytes on that is looked at.
const LOOKED_AT: u64 = 256 << 20;

/// What is read of an input, from `offset` unpacked bytes on; `read` counts the bytes of the file.
///
/// # Errors
/// What the system says.
pub fn open(
    input: &Input,
    offset: u64,
    read: &Arc<AtomicU64>,
) -> io::Result<Box<dyn BufRead + Send>> {
    let path = match &input.content {
        Content::Memory(bytes) => {
            read.store(offset, Ordering::Relaxed);
            let mut cursor = Cursor::new(Shared(Arc::clone(bytes)));
            cursor.set_position(offset);
            return Ok(Box::new(cursor));
        }
        Content::File(path) => path,
    };

    let mut file = files::open(path)?;
    if input.packing == Packing::Plain {
        file.seek(SeekFrom::Start(offset))?;
        read.store(offset, Ordering::Relaxed);
        // As long as it was when it was found: it may grow.
        let bytes = Counted { file, read: Arc::clone(read) };
        let bytes = bytes.take(input.bytes.saturating_sub(offset));
        return Ok(Box::new(BufReader::with_capacity(BUFFER, bytes)));
    }

    read.store(0, Ordering::Relaxed);
    let counted = BufReader::with_capacity(BUFFER, Counted { file, read: Arc::clone(read) });
    let unpacked: Box<dyn Read + Send> = match input.packing {
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(counted)),
        _ => Box::new(zstd::stream::read::Decoder::with_buffer(counted)?),
    };
    let bounded = Bounded { unpacked, made: 0, read: Arc::clone(read) };
    let mut reader = BufReader::with_capacity(BUFFER, bounded);
    let skipped = io::copy(&mut (&mut reader).take(offset), &mut io::sink())?;
    match skipped == offset {
        true => Ok(Box::new(reader)),
        false => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Bytes that others hold too.
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Unpacked bytes, as long as they are not too many.
struct Bounded {
    unpacked: Box<dyn Read + Send>,
    made: u64,
    read: Arc<AtomicU64>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.unpacked.read(buffer)?;
        self.made += count as u64;
        let packed = self.read.load(Ordering::Relaxed).max(1);
        if self.made > LOOKED_AT && self.made / packed > RATIO {
            let problem = format!("it inflates without bound: {} bytes of {packed}", self.made);
            return Err(io::Error::new(ErrorKind::InvalidData, problem));
        }
        Ok(count)
    }
}
