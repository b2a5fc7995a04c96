//! Values in the types that weights may have, and f32: bytes in, bytes out.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::tensor::Dtype;

/// Whether weights may have a type.
pub fn is_known(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// The values of little-endian bytes of a known type, in f32.
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let pairs = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    match dtype {
        Dtype::BF16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => {
            let narrow: Vec<f16> = pairs.map(f16::from_bits).collect();
            let mut values = vec![0.0; narrow.len()];
            narrow.convert_to_f32_slice(&mut values);
            values
        }
        _ => {
            let word = |word: &[u8]| f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            bytes.chunks_exact(4).map(word).collect()
        }
    }
}

/// f32 values as little-endian bytes of a known type, each rounded to the nearest (of two the even
/// one).
pub fn from_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    let pairs = bytes.chunks_exact_mut(dtype.size());
    match dtype {
        Dtype::BF16 => pairs.zip(values).for_each(|(pair, value)| {
            pair.copy_from_slice(&bf16::from_f32(*value).to_bits().to_le_bytes());
        }),
        Dtype::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            pairs.zip(narrow).for_each(|(pair, value)| {
                pair.copy_from_slice(&value.to_bits().to_le_bytes());
            });
        }
        _ => pairs.zip(values).for_each(|(word, value)| word.copy_from_slice(&value.to_le_bytes())),
    }
    bytes
}

/// A matrix [rows, columns], row by row, the other way round.
pub fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    // By tiles, so that neither side leaves the cache.
    const TILE: usize = 32;
    for row in (0..rows).step_by(TILE) {
        for column in (0..columns).step_by(TILE) {
            for i in row..rows.min(row + TILE) {
                for j in column..columns.min(column + TILE) {
                    out[j * rows + i] = values[i * columns + j];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value of 16 bits goes to f32 and back unchanged; those that are none stay none.
    #[test]
    fn narrow_values_come_back() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::BF16, Dtype::F16] {
            let wide = to_f32(dtype, &all);
            let back = from_f32(dtype, &wide);
            for ((before, after), value) in all.chunks_exact(2).zip(back.chunks_exact(2)).zip(&wide)
            {
                assert!(before == after || value.is_nan(), "{before:?} {after:?} {value}");
            }
        }
        let values = [0.0, -0.0, 1.5, f32::MIN_POSITIVE / 2.0, f32::INFINITY];
        assert_eq!(to_f32(Dtype::F32, &from_f32(Dtype::F32, &values)), values);
    }

    #[test]
    fn wide_values_are_rounded_to_the_nearest() {
        let bits = |dtype, value: f32| {
            let bytes = from_f32(dtype, &[value]);
            u16::from_le_bytes([bytes[0], bytes[1]])
        };
        // Between 1 and the next bf16, 1 + 2^-7: nearer to one, to the other, and half way, to the even.
        let of = |fraction: f32| bits(Dtype::BF16, 1.0 + fraction / 128.0);
        assert_eq!([of(0.4), of(0.6), of(0.5), of(1.5)], [0x3f80, 0x3f81, 0x3f80, 0x3f82]);
        assert_eq!(bits(Dtype::F16, 1.0e6), 0x7c00, "too large for f16");
    }

    #[test]
    fn matrices_are_turned() {
        let values: Vec<f32> = (0..70 * 45).map(|n| n as f32).collect();
        let turned = transposed(&values, 70, 45);
        assert_eq!(turned[44 * 70 + 69], values[69 * 45 + 44]);
        assert_eq!(transposed(&turned, 45, 70), values);
    }
}
