//! Records of TensorFlow's TFRecord format.
//!
//! ```text
//! length u64 | masked CRC-32C of it | data | masked CRC-32C of it
//! ```

use std::io::Write;

/// The checksum of TFRecord.
fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

pub fn write_record(to: &mut impl Write, data: &[u8]) -> std::io::Result<()> {
    let length = (data.len() as u64).to_le_bytes();
    to.write_all(&length)?;
    to.write_all(&masked(&length).to_le_bytes())?;
    to.write_all(data)?;
    to.write_all(&masked(data).to_le_bytes())
}

/// Bytes of a record before its data.
const HEAD: usize = 12;

/// How many bytes of data a record has; none where that is not there, or damaged.
fn data_bytes(record: &[u8]) -> Option<usize> {
    let (length, rest) = record.split_at_checked(8)?;
    let sum = u32::from_le_bytes(rest.get(..4)?.try_into().ok()?);
    let count = u64::from_le_bytes(length.try_into().ok()?);
    (masked(length) == sum).then(|| usize::try_from(count).ok())?
}

/// Whether this is the beginning of a record whose end is missing.
pub fn is_cut(rest: &[u8]) -> bool {
    let longer = |count: usize| count.saturating_add(HEAD + 4) > rest.len();
    rest.len() < HEAD || data_bytes(rest).is_some_and(longer)
}

/// The data of the next record, none of a record whose data is damaged; nothing at the end, or where the file is cut,
/// or does not say where the next one begins.
pub fn read_record<'a>(from: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let count = data_bytes(from)?;
    let (data, rest) = from.get(HEAD..)?.split_at_checked(count)?;
    let (sum, rest) = rest.split_at_checked(4)?;
    *from = rest;
    let whole = masked(data).to_le_bytes() == sum;
    Some(whole.then_some(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of the document of TFRecord.
    #[test]
    fn checksums_are_masked() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(masked(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }
}
