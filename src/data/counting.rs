//! Vocabularies of characters and words, counted part by part of a text.

use std::collections::{BTreeSet, HashMap};

use rayon::prelude::*;

use super::Unit;
use super::vocabulary::Vocabulary;
use super::words::{EOS, UNK, tasks, words};

/// What has been counted so far.
#[derive(Debug)]
pub enum Counts {
    Characters(BTreeSet<char>),
    Words(HashMap<String, usize>),
}

impl Counts {
    /// Nothing yet; none where tokens are no matter of counting.
    pub fn new(unit: Unit) -> Option<Counts> {
        match unit {
            Unit::Characters => Some(Counts::Characters(BTreeSet::new())),
            Unit::Words => Some(Counts::Words(HashMap::new())),
            _ => None,
        }
    }

    /// Counts a text, or a part of one that was cut where its tokens can be.
    pub fn add(&mut self, text: &str) {
        match self {
            Counts::Characters(seen) => {
                // Most characters have been seen before, and near each other.
                let mut ascii = [false; 128];
                for c in text.chars() {
                    match ascii.get_mut(c as usize) {
                        Some(known) if *known => {}
                        Some(known) => {
                            *known = true;
                            seen.insert(c);
                        }
                        None => {
                            seen.insert(c);
                        }
                    }
                }
            }
            Counts::Words(counts) => {
                for word in words(text) {
                    match counts.get_mut(word) {
                        Some(count) => *count += 1,
                        None => {
                            counts.insert(word.to_owned(), 1);
                        }
                    }
                }
            }
        }
    }

    /// Counts texts over all cores.
    pub fn add_all<'a>(&mut self, texts: impl IntoParallelIterator<Item = &'a str>) {
        let unit = self.unit();
        let fresh = || Counts::new(unit);
        let counted = texts.into_par_iter().fold(fresh, |mut counts, text| {
            counts.iter_mut().for_each(|counts| counts.add(text));
            counts
        });

        let all = counted.reduce(fresh, |mut all, part| {
            all.iter_mut().zip(part).for_each(|(all, part)| all.merge(part));
            all
        });
        all.into_iter().for_each(|part| self.merge(part));
    }

    fn merge(&mut self, part: Counts) {
        match (self, part) {
            (Counts::Characters(all), Counts::Characters(part)) => all.extend(part),
            (Counts::Words(all), Counts::Words(part)) => {
                part.into_iter().for_each(|(word, count)| *all.entry(word).or_default() += count);
            }
            _ => {}
        }
    }

    fn unit(&self) -> Unit {
        match self {
            Counts::Characters(_) => Unit::Characters,
            Counts::Words(_) => Unit::Words,
        }
    }

    /// The characters in the order of their code points; the words that were counted at least
    /// `min_count` times, the most frequent first, `<unk>` among them if it was counted or rare
    /// words are left out (`min_count` > 1).
    pub fn vocabulary(self, min_count: usize) -> Vocabulary {
        let counts = match self {
            Counts::Characters(seen) => {
                let tokens = seen.into_iter().map(String::from).collect();
                return Vocabulary::listing(Unit::Characters, tokens);
            }
            Counts::Words(counts) => counts,
        };

        let (mut kept, dropped): (Vec<_>, Vec<_>) = counts
            .into_iter()
            .partition(|(word, count)| *count >= min_count || word == UNK || word == EOS);
        if min_count > 1 {
            let more: usize = dropped.iter().map(|(_, count)| count).sum();
            match kept.iter_mut().find(|(word, _)| word == UNK) {
                Some((_, count)) => *count += more,
                None => kept.push((UNK.to_owned(), more)),
            }
        }

        kept.sort_unstable_by(|(a, n), (b, m)| m.cmp(n).then(a.cmp(b)));
        Vocabulary::listing(Unit::Words, kept.into_iter().map(|(word, _)| word).collect())
    }

    /// The vocabulary of one text.
    pub fn of(unit: Unit, texts: &[&str], min_count: usize) -> Vocabulary {
        let Some(mut counts) = Counts::new(unit) else { return Vocabulary::bytes() };
        let parts: Vec<&str> = texts.iter().flat_map(|text| tasks(text)).collect();
        counts.add_all(parts);
        counts.vocabulary(min_count)
    }
}
