//! Good inputs made bad: what a disk, a network, a hand or an enemy may do to bytes.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::BoxedStrategy;

use super::Parts;

/// Numbers at which something begins or ends.
const NUMBERS: [&str; 22] = [
    "0",
    "1",
    "2",
    "3",
    "7",
    "-1",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "4294967296",
    "1125899906842624",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e300",
    "-0.0",
    "nan",
    "inf",
    "0.5",
    "1e-300",
];

/// The same as they stand in binary files.
const WORDS: [u64; 12] = [
    0,
    1,
    7,
    8,
    255,
    4096,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    u64::MAX - 7,
    u64::MAX,
];

/// What is done to one part of an input; places are shares of its length.
#[derive(Debug, Clone)]
pub enum Mutation {
    Flip(Index, u8),
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    /// A piece is put somewhere else, so many times.
    Copy(Index, usize, Index, usize),
    Cut(Index),
    /// One of the target's words is put in.
    Word(Index, Index),
    /// One of the numbers in digits becomes another.
    Number(Index, Index),
    /// Eight bytes, or four, become a number.
    Binary(Index, Index),
    Short(Index, Index),
    /// A line takes the place of another.
    Lines(Index, Index),
    /// The rest is that of another good input.
    Splice(Index, Index),
}

/// A good input, and what is done to its parts.
#[derive(Debug, Clone)]
pub struct Mutated {
    seed: Index,
    mutations: Vec<(Index, Mutation)>,
}

/// Makes bad inputs of good ones.
pub struct Mutator {
    seeds: Vec<Parts>,
    words: Vec<&'static str>,
    strategy: BoxedStrategy<Mutated>,
}

impl Mutator {
    pub fn new(seeds: Vec<Parts>, words: Vec<&'static str>) -> Mutator {
        let index = any::<Index>;
        let mutation = prop_oneof![
            2 => (index(), any::<u8>()).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
            1 => (index(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
            1 => (index(), prop::collection::vec(any::<u8>(), 1..12)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
            2 => (index(), 1usize..64).prop_map(|(at, length)| Mutation::Delete(at, length)),
            2 => (index(), 1usize..80, index(), prop_oneof![9 => 1usize..4, 1 => 1usize..2000])
                .prop_map(|(from, length, to, times)| Mutation::Copy(from, length, to, times)),
            1 => index().prop_map(Mutation::Cut),
            3 => (index(), index()).prop_map(|(at, word)| Mutation::Word(at, word)),
            6 => (index(), index()).prop_map(|(which, number)| Mutation::Number(which, number)),
            2 => (index(), index()).prop_map(|(at, number)| Mutation::Binary(at, number)),
            1 => (index(), index()).prop_map(|(at, number)| Mutation::Short(at, number)),
            2 => (index(), index()).prop_map(|(from, to)| Mutation::Lines(from, to)),
            1 => (index(), index()).prop_map(|(other, at)| Mutation::Splice(other, at)),
        ];
        let mutations = prop::collection::vec((index(), mutation), 0..6);
        let strategy =
            (index(), mutations).prop_map(|(seed, mutations)| Mutated { seed, mutations }).boxed();
        Mutator { seeds, words, strategy }
    }

    pub fn strategy(&self) -> BoxedStrategy<Mutated> {
        self.strategy.clone()
    }

    /// The input itself.
    pub fn apply(&self, mutated: &Mutated) -> Parts {
        let mut parts = self.seeds[mutated.seed.index(self.seeds.len())].clone();
        for (part, mutation) in &mutated.mutations {
            let number = part.index(parts.len());
            self.change(&mut parts[number], number, mutation);
        }
        parts
    }

    fn change(&self, bytes: &mut Vec<u8>, part: usize, mutation: &Mutation) {
        // A place before a byte, or at the end.
        let length = bytes.len();
        let place = |at: &Index| at.index(length + 1);
        let within = |at: &Index| at.index(length.max(1));
        match mutation {
            Mutation::Flip(at, bit) if length > 0 => bytes[within(at)] ^= 1 << (bit % 8),
            Mutation::Set(at, byte) if length > 0 => bytes[within(at)] = *byte,
            Mutation::Insert(at, more) => {
                drop(bytes.splice(place(at)..place(at), more.iter().copied()))
            }
            Mutation::Delete(at, count) => {
                drop(bytes.drain(place(at)..(place(at) + count).min(length)))
            }
            Mutation::Copy(from, count, to, times) => {
                let piece = bytes[place(from)..(place(from) + count).min(length)].repeat(*times);
                drop(bytes.splice(place(to)..place(to), piece));
            }
            Mutation::Cut(at) => bytes.truncate(place(at)),
            Mutation::Word(at, word) if !self.words.is_empty() => {
                let word = self.words[word.index(self.words.len())].bytes();
                drop(bytes.splice(place(at)..place(at), word));
            }
            Mutation::Number(which, number) => {
                let found = digits(bytes);
                if !found.is_empty() {
                    let range = found[which.index(found.len())].clone();
                    drop(bytes.splice(range, NUMBERS[number.index(NUMBERS.len())].bytes()));
                }
            }
            Mutation::Binary(at, number) if length >= 8 => {
                // Headers stand at multiples of eight.
                let at = at.index(length / 8) * 8;
                bytes[at..at + 8].copy_from_slice(&WORDS[number.index(WORDS.len())].to_le_bytes());
            }
            Mutation::Short(at, number) if length >= 4 => {
                let at = at.index(length - 3);
                bytes[at..at + 4]
                    .copy_from_slice(&WORDS[number.index(WORDS.len())].to_le_bytes()[..4]);
            }
            Mutation::Lines(from, to) => {
                let mut lines: Vec<Vec<u8>> =
                    bytes.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
                let (from, to) = (from.index(lines.len()), to.index(lines.len()));
                lines[to] = lines[from].clone();
                *bytes = lines.join(&b'\n');
            }
            Mutation::Splice(other, at) => {
                let other = &self.seeds[other.index(self.seeds.len())];
                let rest =
                    other.get(part).map_or(&[][..], |other| &other[at.index(other.len() + 1)..]);
                bytes.truncate(place(at));
                bytes.extend_from_slice(rest);
            }
            _ => {}
        }
    }
}

/// Where numbers stand in digits.
fn digits(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut found, mut start) = (Vec::new(), None);
    for (i, byte) in bytes.iter().chain([&b' ']).enumerate() {
        match (start, byte.is_ascii_digit() || (start.is_some() && *byte == b'.')) {
            (None, true) => start = Some(i),
            (Some(from), false) => {
                found.push(from..i);
                start = None;
            }
            _ => {}
        }
    }
    found
}
