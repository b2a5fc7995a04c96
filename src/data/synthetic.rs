//! The embedded corpus: text-like bytes with long-range structure and a known entropy rate.
//!
//! A language of W words. A sentence is `topic: word word ... word, topic.` and a newline. Topic
//! and words are uniform over the W words; after every word the sentence ends with probability q;
//! the topic stands again at the end, so a model has to remember it over the whole sentence,
//! however long that is. Sentences are independent and can be read in one way only, so, with `h(q)
//! = -q ln q - (1-q) ln(1-q)` and 1/q words a sentence on average,
//!
//! ```text
//! entropy rate = (ln W + (ln W + h(q)) / q) / (expected bytes of a sentence)      nats per byte
//! expected bytes of a sentence = (2 + 1/q) * mean word length + (1/q - 1) + |": "| + |", "| + |".\n"|
//! ```
//!
//! A window that starts in the middle of a sentence does not show its topic, so the loss over
//! windows of T bytes stays a few nats a window above the rate.

use rand_chacha::rand_core::RngCore;

use crate::random;

/// A word is a consonant and a vowel; the vowel decides how it ends.
const CONSONANTS: [&str; 8] = ["b", "d", "k", "l", "m", "p", "t", "v"];
const ENDINGS: [&str; 4] = ["an", "er", "is", "o"];
/// W.
const WORDS: usize = CONSONANTS.len() * ENDINGS.len();
/// 1 / q.
const SENTENCE: usize = 16;

/// `bytes` bytes of the language.
pub fn generate(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = random::corpus(seed);
    let mut out = String::with_capacity(bytes + 256);
    while out.len() < bytes {
        let topic = word(&mut rng);
        out.push_str(&topic);
        out.push_str(": ");
        out.push_str(&word(&mut rng));
        while below(&mut rng, SENTENCE) > 0 {
            out.push(' ');
            out.push_str(&word(&mut rng));
        }

        out.push_str(", ");
        out.push_str(&topic);
        out.push_str(".\n");
    }

    let mut out = out.into_bytes();
    out.truncate(bytes);
    out
}

/// Nats per byte that no model can pass.
pub fn entropy_rate() -> f64 {
    let (words, mean) = (
        1.0 / END,
        1.0 + ENDINGS.iter().map(|e| e.len()).sum::<usize>() as f64 / ENDINGS.len() as f64,
    );
    let bytes = (2.0 + words) * mean + (words - 1.0) + 6.0;
    let choice = (WORDS as f64).ln();
    (choice + (choice + end_entropy()) * words) / bytes
}

/// q.
const END: f64 = 1.0 / SENTENCE as f64;

/// h(q).
fn end_entropy() -> f64 {
    -END * END.ln() - (1.0 - END) * (1.0 - END).ln()
}

fn word(rng: &mut impl RngCore) -> String {
    [CONSONANTS[below(rng, CONSONANTS.len())], ENDINGS[below(rng, ENDINGS.len())]].concat()
}

/// Every bound here divides 2^64, so the remainder is uniform.
fn below(rng: &mut impl RngCore, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn sentences_are_as_long_as_the_closed_form_says() {
        let text = generate(1, 4_000_000);
        let sentences = text.iter().filter(|b| **b == b'\n').count() as f64;
        let choice = (WORDS as f64).ln();
        let nats = choice + (choice + end_entropy()) * SENTENCE as f64;
        let found = nats * sentences / text.len() as f64;
        assert!((found / entropy_rate() - 1.0).abs() < 5e-3, "{found} against {}", entropy_rate());
    }

    /// The entropies of the choices, measured on the text itself by their frequencies, agree with
    /// the closed form.
    #[test]
    fn measured_entropies_of_the_choices_agree() {
        let text = String::from_utf8(generate(2, 4_000_000)).unwrap();
        let (mut topics, mut words, mut count, mut sentences) =
            (BTreeMap::new(), BTreeMap::new(), 0.0, 0.0);
        for line in text.lines().filter(|line| line.ends_with('.')) {
            let (topic, rest) = line.split_once(": ").unwrap();
            let (body, again) = rest.strip_suffix('.').unwrap().split_once(", ").unwrap();
            assert_eq!(topic, again);
            *topics.entry(topic).or_insert(0.0) += 1.0;
            sentences += 1.0;
            for word in body.split(' ') {
                *words.entry(word).or_insert(0.0) += 1.0;
                count += 1.0;
            }
        }
        let entropy = |counts: BTreeMap<&str, f64>| {
            let total: f64 = counts.values().sum();
            counts.values().map(|c| -c / total * (c / total).ln()).sum::<f64>()
        };
        let choice = (WORDS as f64).ln();
        let (topic, word) = (entropy(topics), entropy(words));
        assert!((topic - choice).abs() < 0.01, "{topic} against {choice}");
        assert!((word - choice).abs() < 0.01, "{word} against {choice}");
        let end: f64 = sentences / count;
        assert!((end - END).abs() < 0.002, "{end} against {END}");
    }

    #[test]
    fn another_seed_makes_another_text() {
        assert_ne!(generate(1, 1000), generate(2, 1000));
        assert_eq!(generate(1, 1000), generate(1, 2000)[..1000]);
    }
}
