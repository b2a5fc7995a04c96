//! The embedded corpus: text-like bytes with long-range structure and a known entropy rate.
//!
//! A language of W words. A sentence is `topic: w1 w2 ... wn, topic.` and a newline: the topic and the first word are
//! uniform over the W words, every further word is uniform over the S successors of the word before it, and the topic
//! stands again at the end, so a model has to remember it over the whole sentence. Successor i of word w is
//! `(a w + c_i) mod W` with a odd and W a power of two: every map is a permutation, so all words are equally frequent
//! everywhere, and (sentences being independent, and readable without ambiguity)
//!
//! ```text
//! entropy rate = (2 ln W + (n - 1) ln S) / (expected bytes of a sentence)      nats per byte
//! expected bytes of a sentence = (n + 2) * mean word length + n - 1 + |": "| + |", "| + |".\n|
//! ```

use rand_chacha::rand_core::RngCore;

use crate::random;

/// W, a power of two.
const WORDS: usize = 64;
/// S.
const SUCCESSORS: usize = 16;
/// n.
const SENTENCE: usize = 10;
/// The multiplier of the successor maps, odd.
const STRIDE: usize = 37;
/// Letters of the words: consonants and vowels in turn.
const CONSONANTS: &[u8] = b"bdklmnprst";
const VOWELS: &[u8] = b"aeiou";

/// At least `bytes` bytes less one sentence, cut to `bytes`.
pub fn generate(seed: u64, bytes: usize) -> Vec<u8> {
    let words = words();
    let mut rng = random::corpus(seed);
    let mut out = Vec::with_capacity(bytes + 128);
    while out.len() < bytes {
        let topic = below(&mut rng, WORDS);
        out.extend_from_slice(&words[topic]);
        out.extend_from_slice(b": ");
        let mut word = below(&mut rng, WORDS);
        for position in 0..SENTENCE {
            if position > 0 {
                out.push(b' ');
                word = successor(word, below(&mut rng, SUCCESSORS));
            }
            out.extend_from_slice(&words[word]);
        }
        out.extend_from_slice(b", ");
        out.extend_from_slice(&words[topic]);
        out.extend_from_slice(b".\n");
    }
    out.truncate(bytes);
    out
}

/// Nats per byte that no model can pass.
pub fn entropy_rate() -> f64 {
    let mean = words().iter().map(Vec::len).sum::<usize>() as f64 / WORDS as f64;
    let bytes = (SENTENCE + 2) as f64 * mean + (SENTENCE - 1) as f64 + 6.0;
    (2.0 * (WORDS as f64).ln() + (SENTENCE - 1) as f64 * (SUCCESSORS as f64).ln()) / bytes
}

/// W and S divide 2^64, so the remainder is uniform.
fn below(rng: &mut impl RngCore, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}

/// Successor i of a word; the c_i are distinct, so the successors are.
fn successor(word: usize, i: usize) -> usize {
    (STRIDE * word + 4 * i + i * i % 4) % WORDS
}

/// The vocabulary, the same for every seed: distinct words of two to four letters.
fn words() -> Vec<Vec<u8>> {
    let mut rng = random::corpus(0);
    let mut words: Vec<Vec<u8>> = Vec::new();
    while words.len() < WORDS {
        let length = 2 + below(&mut rng, 4).min(2);
        let letter = |i: usize, n: u64| {
            let set = if i.is_multiple_of(2) { CONSONANTS } else { VOWELS };
            set[(n % set.len() as u64) as usize]
        };
        let word: Vec<u8> = (0..length).map(|i| letter(i, rng.next_u64())).collect();
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn every_word_has_distinct_successors_and_all_are_equally_frequent() {
        let mut incoming = [0; WORDS];
        for word in 0..WORDS {
            let successors: BTreeSet<usize> = (0..SUCCESSORS).map(|i| successor(word, i)).collect();
            assert_eq!(successors.len(), SUCCESSORS, "{word}");
            successors.iter().for_each(|s| incoming[*s] += 1);
        }
        assert!(incoming.iter().all(|n| *n == SUCCESSORS));
    }

    #[test]
    fn the_text_is_as_long_as_the_closed_form_says() {
        let text = generate(1, 2_000_000);
        let sentences = text.iter().filter(|b| **b == b'\n').count() as f64;
        let nats = sentences * (2.0 * (WORDS as f64).ln() + (SENTENCE - 1) as f64 * (SUCCESSORS as f64).ln());
        let found = nats / text.len() as f64;
        assert!((found / entropy_rate() - 1.0).abs() < 2e-3, "{found} against {}", entropy_rate());
    }

    /// The plug-in entropies of the choices, measured on the text itself, agree with the closed form.
    #[test]
    fn measured_entropies_of_the_choices_agree() {
        let text = String::from_utf8(generate(2, 4_000_000)).unwrap();
        let mut pairs: BTreeMap<(&str, &str), f64> = BTreeMap::new();
        let mut firsts: BTreeMap<&str, f64> = BTreeMap::new();
        let complete: Vec<&str> = text.lines().filter(|line| line.ends_with('.')).collect();
        for line in &complete {
            let (topic, rest) = line.split_once(": ").unwrap();
            let (body, again) = rest.strip_suffix('.').unwrap().split_once(", ").unwrap();
            assert_eq!(topic, again);
            *firsts.entry(topic).or_default() += 1.0;
            let body: Vec<&str> = body.split(' ').collect();
            assert_eq!(body.len(), SENTENCE);
            body.windows(2).for_each(|w| *pairs.entry((w[0], w[1])).or_default() += 1.0);
        }
        let entropy = |counts: Vec<f64>| {
            let total: f64 = counts.iter().sum();
            counts.iter().map(|c| -c / total * (c / total).ln()).sum::<f64>()
        };
        let topic = entropy(firsts.into_values().collect());
        let mut sources: BTreeMap<&str, f64> = BTreeMap::new();
        pairs.iter().for_each(|((a, _), c)| *sources.entry(a).or_default() += c);
        let next = entropy(pairs.into_values().collect()) - entropy(sources.into_values().collect());
        assert!((topic - (WORDS as f64).ln()).abs() < 0.01, "{topic}");
        assert!((next - (SUCCESSORS as f64).ln()).abs() < 0.01, "{next}");
    }
}
