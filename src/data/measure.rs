//! What losses are called.

use super::Unit;

/// What a loss in nats per token is called in the field: perplexity, bits per character, and bits
/// per byte of the original text, which compare between tokenizers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measure {
    pub unit: Unit,
    pub bytes_per_token: Option<f64>,
}

impl Measure {
    /// Bits per byte of the original text.
    pub fn bits_per_byte(self, loss: f64) -> Option<f64> {
        Some(loss / std::f64::consts::LN_2 / self.bytes_per_token?)
    }

    /// Bits per byte or character, for tokens that are such.
    pub fn bits_per_unit(self, loss: f64) -> Option<f64> {
        matches!(self.unit, Unit::Bytes | Unit::Characters).then_some(loss / std::f64::consts::LN_2)
    }

    /// Perplexity, for tokens that are longer.
    pub fn perplexity(self, loss: f64) -> Option<f64> {
        self.bits_per_unit(loss).is_none().then(|| loss.exp())
    }
}
