//! Where the documents of a text begin, and how many bytes they had before they became tokens.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

/// What is known of documents.
#[derive(Debug, Clone, Default)]
pub enum Borders {
    /// The whole is one.
    #[default]
    None,
    /// After every such token.
    After(u32),
    /// As a list says.
    Listed(List),
}

/// How a list lies in its file, in numbers of 8 bytes, little-endian.
#[derive(Debug, Clone, Copy)]
pub enum Stride {
    /// Of every document its first token and the first byte of its text.
    Pairs,
    /// Of every document its first sequence; of every sequence, from `at` on, its first byte in a
    /// file of tokens of `width` bytes.
    Pointers { at: usize, count: usize, width: u64 },
}

/// Where documents begin, as a mapped file says.
#[derive(Debug, Clone)]
pub struct List {
    pub map: Arc<Mmap>,
    /// Where it begins in the file, bytes.
    pub at: usize,
    pub documents: usize,
    pub stride: Stride,
    /// What its tokens are counted from.
    pub base: u64,
    /// Where the text of the first token and of the last one's successor is in bytes, where that
    /// is known.
    pub bytes: Option<Range<u64>>,
}

impl List {
    fn number(&self, at: usize) -> u64 {
        let bytes = self.map.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(u64::MAX, u64::from_le_bytes)
    }

    /// Numbers of a document.
    fn numbers(&self) -> usize {
        match self.stride {
            Stride::Pairs => 2,
            Stride::Pointers { .. } => 1,
        }
    }

    /// The first token of a document, counted from the beginning of the file.
    fn token(&self, document: usize) -> u64 {
        let first = self.number(self.at + 8 * document * self.numbers());
        match self.stride {
            Stride::Pairs => first,
            Stride::Pointers { at, count, width } => match usize::try_from(first) {
                Ok(sequence) if sequence < count => self.number(at + 8 * sequence) / width,
                _ => u64::MAX,
            },
        }
    }

    fn byte(&self, document: usize) -> u64 {
        self.number(self.at + 8 * (document * self.numbers() + 1))
    }

    fn start(&self, document: usize) -> usize {
        self.token(document).wrapping_sub(self.base) as usize
    }

    /// The first document that begins at `token` or later.
    fn first_from(&self, token: usize) -> usize {
        let (mut low, mut high) = (0, self.documents);
        while low < high {
            let middle = low.midpoint(high);
            match self.token(middle) < self.base + token as u64 {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        low
    }

    /// The first byte of the text at a token where a document begins, or near it: documents are
    /// taken to have as many bytes a token from their beginning to their end.
    fn byte_at(&self, token: usize, tokens: usize) -> Option<u64> {
        let all = self.bytes.clone()?;
        let next = self.first_from(token);
        let place = |document: usize| match document < self.documents {
            true => (self.start(document), self.byte(document)),
            false => (tokens, all.end),
        };

        let (end, end_byte) = place(next);
        if end == token {
            return Some(end_byte);
        }

        let (start, start_byte) = if next == 0 { (0, all.start) } else { place(next - 1) };
        let share = (token - start) as f64 / (end - start).max(1) as f64;
        Some(start_byte + (share * end_byte.saturating_sub(start_byte) as f64).round() as u64)
    }
}

impl Borders {
    /// The tokens of a range at which a document begins.
    pub fn within<'a>(
        &'a self,
        range: Range<usize>,
        token: impl Fn(usize) -> i64 + 'a,
    ) -> Box<dyn Iterator<Item = usize> + 'a> {
        match self {
            Borders::None => Box::new(std::iter::empty()),
            Borders::After(end) => {
                let end = i64::from(*end);
                Box::new(range.filter(move |at| *at > 0 && token(at - 1) == end))
            }
            Borders::Listed(list) => {
                let starts = (list.first_from(range.start)..list.documents).map(|i| list.start(i));
                // An empty document begins where the next one does.
                let mut last = None;
                let fresh = move |at: &usize| last.replace(*at) != Some(*at);
                Box::new(starts.take_while(move |at| *at < range.end).filter(fresh))
            }
        }
    }

    /// The first token from `token` on at which a document begins, where there is a list.
    pub fn next(&self, token: usize) -> Option<usize> {
        let Borders::Listed(list) = self else { return None };
        let next = list.first_from(token);
        (next < list.documents).then(|| list.start(next))
    }

    /// Bytes of the text of a range out of so many tokens, where that is known.
    pub fn text_bytes(&self, range: Range<usize>, tokens: usize) -> Option<u64> {
        match self {
            Borders::Listed(list) => {
                let end = list.byte_at(range.end, tokens)?;
                Some(end.saturating_sub(list.byte_at(range.start, tokens)?))
            }
            Borders::None | Borders::After(_) => None,
        }
    }

    /// Those of a range of so many tokens.
    pub fn slice(&self, range: Range<usize>, tokens: usize) -> Borders {
        match self {
            Borders::Listed(list) => {
                let (first, end) = (list.first_from(range.start), list.first_from(range.end));
                let bytes = list.byte_at(range.start, tokens).zip(list.byte_at(range.end, tokens));
                Borders::Listed(List {
                    at: list.at + 8 * first * list.numbers(),
                    documents: end - first,
                    base: list.base + range.start as u64,
                    bytes: bytes.map(|(start, end)| start..end),
                    ..list.clone()
                })
            }
            other => other.clone(),
        }
    }
}
