//! All randomness, as a pure function of what it is for: nothing depends on K, on the transport or
//! on timing.
//!
//! Every use has a ChaCha8 stream of its own, whose 256-bit key holds the run's seed, the use and
//! its coordinates.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

/// What a stream of random numbers is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Use {
    Weights = 1,
    Dropout = 2,
    Order = 3,
    Corpus = 4,
    Sampling = 5,
    Injection = 6,
}

fn stream(seed: u64, purpose: Use, a: u32, b: u64, c: u32, d: u32) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(key(seed, purpose, a, b, c, d))
}

fn key(seed: u64, purpose: Use, a: u32, b: u64, c: u32, d: u32) -> [u8; 32] {
    let mut key = [0u8; 32];
    key[0..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&(purpose as u32).to_le_bytes());
    key[12..16].copy_from_slice(&a.to_le_bytes());
    key[16..24].copy_from_slice(&b.to_le_bytes());
    key[24..28].copy_from_slice(&c.to_le_bytes());
    key[28..32].copy_from_slice(&d.to_le_bytes());
    key
}

/// Standard normal numbers for the parameter `name`, without end.
pub fn normal(seed: u64, name: &str) -> impl Iterator<Item = f32> {
    StandardNormal.sample_iter(stream(seed, Use::Weights, 0, fnv1a(name), 0, 0))
}

/// FNV-1a: a hash of names that is the same for ever.
fn fnv1a(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Where dropout stands in the model and in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutKey {
    pub seed: u64,
    pub step: usize,
    pub replica: usize,
    pub microbatch: usize,
    /// Layer of the whole model (0 is the embedding) and place in the layer.
    pub layer: usize,
    pub site: usize,
}

impl DropoutKey {
    fn key(self) -> [u8; 32] {
        let DropoutKey { seed, step, replica, microbatch, layer, site } = self;
        let layer_and_site = (layer * 16 + site) as u32;
        key(seed, Use::Dropout, layer_and_site, step as u64, replica as u32, microbatch as u32)
    }

    /// The key of its stream, for whoever makes the words of it elsewhere.
    pub fn words(self) -> [u32; 8] {
        let key = self.key();
        std::array::from_fn(|i| {
            u32::from_le_bytes([key[4 * i], key[4 * i + 1], key[4 * i + 2], key[4 * i + 3]])
        })
    }
}

/// What a mask is made by: the bound below which a word drops its value, and what others are
/// multiplied by.
pub fn dropout_bound(rate: f64) -> (u32, f32) {
    ((rate * f64::from(u32::MAX)) as u32, (1.0 / (1.0 - rate)) as f32)
}

/// Fills a mask: each number 0 with probability `rate`, else `1 / (1 - rate)`. A word of the stream
/// decides about a number.
pub fn dropout_mask(key: DropoutKey, rate: f64, mask: &mut [f32]) {
    let mut rng = ChaCha8Rng::from_seed(key.key());
    let (bound, kept) = dropout_bound(rate);

    // Many words at once: one by one they take several times as long.
    let mut bytes = [0u8; 4096];
    for numbers in mask.chunks_mut(bytes.len() / 4) {
        let bytes = &mut bytes[..4 * numbers.len()];
        rng.fill_bytes(bytes);
        for (number, word) in numbers.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *number = if u32::from_le_bytes(*word) < bound { 0.0 } else { kept };
        }
    }
}

/// The key of the order of an epoch's windows of a source, and a number below `bound` that shifts
/// them.
pub fn order(seed: u64, source: usize, epoch: u64, bound: usize) -> (u64, usize) {
    let mut rng = stream(seed, Use::Order, source as u32, epoch, 0, 0);
    (rng.next_u64(), (rng.next_u64() % bound.max(1) as u64) as usize)
}

/// The stream that the synthetic corpus is made of.
pub fn corpus(seed: u64) -> ChaCha8Rng {
    stream(seed, Use::Corpus, 0, 0, 0, 0)
}

/// Draws a fault on purpose.
pub fn injection(seed: u64) -> ChaCha8Rng {
    stream(seed, Use::Injection, 0, 0, 0, 0)
}

/// The stream that picks the tokens of generated text.
pub fn sampling(seed: u64) -> ChaCha8Rng {
    stream(seed, Use::Sampling, 0, 0, 0, 0)
}

/// A uniform number in [0, 1).
pub fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// A permutation of `0..n` as a function: the image of `i` under the permutation that `key` names.
/// A Feistel network over the next power of four, walked until it lands below n (Black and Rogaway,
/// "Ciphers with arbitrary finite domains", 2002); no table, so that corpora of any size cost
/// nothing.
pub fn permute(n: u64, key: u64, i: u64) -> u64 {
    debug_assert!(i < n);
    let half = (64 - n.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut x = i;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..4u64 {
            (left, right) = (
                right,
                left ^ (mix(right ^ key.rotate_left(16 * round as u32) ^ round << 60) & mask),
            );
        }

        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand_chacha::rand_core::RngCore;

    proptest! {
        #[test]
        fn permute_is_a_permutation(n in 1u64..2000, key: u64) {
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let image = permute(n, key, i) as usize;
                prop_assert!(!std::mem::replace(&mut seen[image], true));
            }
        }
    }

    #[test]
    fn permutations_of_two_keys_differ() {
        let image = |key| (0..100).map(|i| permute(100, key, i)).collect::<Vec<_>>();
        assert_ne!(image(1), image(2));
        assert_ne!(image(1), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn dropout_keeps_the_mean_and_depends_on_every_coordinate() {
        let key = DropoutKey { seed: 1, step: 2, replica: 0, microbatch: 1, layer: 3, site: 0 };
        let masked = |key, count| {
            let mut mask = vec![f32::NAN; count];
            dropout_mask(key, 0.25, &mut mask);
            mask
        };
        let mask = masked(key, 100_000);
        let mean = mask.iter().sum::<f32>() / mask.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let others = [
            DropoutKey { seed: 2, ..key },
            DropoutKey { step: 3, ..key },
            DropoutKey { replica: 1, ..key },
            DropoutKey { microbatch: 0, ..key },
            DropoutKey { layer: 2, ..key },
            DropoutKey { site: 1, ..key },
        ];
        for other in others {
            assert_ne!(masked(other, 64), mask[..64], "{other:?}");
        }

        // Word by word of the stream, whatever the length.
        let mut rng = ChaCha8Rng::from_seed(key.key());
        let (bound, kept) = dropout_bound(0.25);
        let words: Vec<f32> =
            (0..5001).map(|_| if rng.next_u32() < bound { 0.0 } else { kept }).collect();
        assert_eq!(masked(key, 5001), words);
    }

    #[test]
    fn weights_depend_on_seed_and_name_only() {
        let some = |seed, name| normal(seed, name).take(4).collect::<Vec<_>>();
        assert_eq!(some(1, "a"), some(1, "a"));
        assert_ne!(some(1, "a"), some(1, "b"));
        assert_ne!(some(1, "a"), some(2, "a"));
        // Golden: a change of these numbers changes every run that was ever made.
        insta::assert_snapshot!(format!("{:?}", &some(1, "a")[..3]), @r"
        [-1.2748067, 0.9438155, 2.1110156]
        ");
    }
}
