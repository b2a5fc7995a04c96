//! What the layers remember of the segments before.

use tch::{Device, Tensor};

use super::cache::Cache;
use super::documents::Documents;
use super::rotary::Places;
use crate::error::Result;

/// What one layer remembers, without gradient: its own last inputs, or the keys and values of a
/// text that grows.
#[derive(Debug)]
pub struct Remembered {
    /// M: how many tokens at most.
    pub(super) limit: i64,
    /// [b, up to M, D]; none at the beginning of a stream.
    states: Option<Tensor>,
    cache: Option<Cache>,
    documents: Option<Documents>,
}

impl Remembered {
    /// Remembers this from now on.
    pub(super) fn recall(&mut self, states: Tensor) {
        self.states = Some(states);
    }

    /// What is kept of the text, where it grows.
    pub(super) fn cache(&mut self) -> Option<&mut Cache> {
        self.cache.as_mut()
    }

    /// Which documents the rows are made of, where attention ends at their borders.
    pub(super) fn documents(&self) -> Option<&Documents> {
        self.documents.as_ref()
    }

    /// Where the next `t` tokens stand.
    pub(super) fn places(&self, t: i64, device: Device) -> Result<Places> {
        if let Some(documents) = &self.documents {
            return Ok(documents.places());
        }
        self.cache.as_ref().map_or(Ok(Places::From(0)), |cache| cache.places(t, device))
    }

    /// What is remembered and `x` [b, T, D] in one tensor; from now on its end is what is
    /// remembered.
    pub(super) fn extend(&mut self, x: &Tensor) -> Result<Tensor> {
        let context = match &self.states {
            Some(states) => Tensor::f_cat(&[states, x], 1)?,
            None => x.shallow_clone(),
        };

        let (length, t) = (context.size()[1], x.size()[1]);
        let kept = length.min(self.limit);
        // A copy, unless it is the segment: a part would keep all of its tensor alive.
        self.states = match kept {
            0 => None,
            _ if kept == t => Some(x.f_detach()?),
            _ => Some(tch::no_grad(|| context.f_narrow(1, length - kept, kept)?.f_detach_copy())?),
        };

        Ok(context)
    }
}

/// What the layers of a stack remember of the segments before. It carries no gradient and never
/// travels.
#[derive(Debug)]
pub struct Memory {
    limit: usize,
    /// Of a text that grows: tokens at most, and the pads that its rows begin with.
    growing: Option<(i64, Option<Tensor>)>,
    documents: Option<Documents>,
    layers: Vec<Remembered>,
}

impl Memory {
    /// Nothing yet; up to `limit` tokens later.
    pub fn new(limit: usize) -> Memory {
        Memory { limit, growing: None, documents: None, layers: Vec::new() }
    }

    /// Keys and values of texts that grow up to `capacity` tokens. Of every row `pads` \[B\] tokens at
    /// its beginning are none.
    pub fn growing(capacity: usize, pads: Option<Tensor>) -> Memory {
        let growing = Some((capacity as i64, pads));
        Memory { limit: 0, growing, documents: None, layers: Vec::new() }
    }

    /// For rows of these documents; nothing is remembered of other rows.
    pub fn of_documents(documents: Documents) -> Memory {
        Memory { documents: Some(documents), ..Memory::new(0) }
    }

    /// The same without the documents of rows that have been read.
    pub fn without_documents(self) -> Memory {
        if self.documents.is_some() { Memory::new(self.limit) } else { self }
    }

    /// Another handle of the same memory; of a text that grows, a new one.
    pub fn shallow_clone(&self) -> Memory {
        let copy = |r: &Remembered| Remembered {
            limit: r.limit,
            states: r.states.as_ref().map(Tensor::shallow_clone),
            cache: None,
            documents: r.documents.as_ref().map(Documents::shallow_clone),
        };
        let layers = self.layers.iter().map(copy).collect();
        let documents = self.documents.as_ref().map(Documents::shallow_clone);
        Memory { limit: self.limit, growing: None, documents, layers }
    }

    /// What layer number `layer` of the stack remembers.
    pub(super) fn states(&self, layer: usize) -> Option<&Tensor> {
        self.layers.get(layer)?.states.as_ref()
    }

    /// The memories of `count` layers.
    pub(super) fn of(&mut self, count: usize) -> &mut [Remembered] {
        let limit = self.limit as i64;
        let cache = |(capacity, pads): &(i64, Option<Tensor>)| Cache::new(*capacity, pads.as_ref());
        let (growing, documents) = (self.growing.as_ref(), self.documents.as_ref());
        self.layers.resize_with(count, || Remembered {
            limit,
            states: None,
            cache: growing.map(cache),
            documents: documents.map(Documents::shallow_clone),
        });
        &mut self.layers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last M rows of everything so far, whatever the lengths of the segments.
    #[test]
    fn the_last_rows_are_remembered() {
        let all = Tensor::arange(11 * 2, (tch::Kind::Float, Device::Cpu)).view([1, 11, 2]);
        for limit in [0, 1, 3, 4, 6, 9, 20] {
            let mut memory = Memory::new(limit);
            let mut start = 0;
            for length in [4, 3, 4] {
                let remembered = memory.of(1)[0].extend(&all.narrow(1, start, length)).unwrap();
                let from = (start - limit as i64).max(0);
                assert_eq!(
                    remembered,
                    all.narrow(1, from, start + length - from),
                    "M = {limit} at {start}"
                );
                start += length;
            }
        }
    }
}
