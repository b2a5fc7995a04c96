//! The text that is trained on and the text that is held out.

mod batches;
mod synthetic;
mod text;

use std::path::Path;
use std::sync::Arc;

pub use batches::{Batch, Batches, Shape, held_out};
pub use text::Text;

use crate::config::{DataConfig, HeldOut};
use crate::error::{Error, Result};

/// Bytes of the synthetic corpus where the config names no data at all.
const DEFAULT_SYNTHETIC: usize = 4_000_000;

/// Tokens of the byte tokenizer.
pub const VOCABULARY: usize = 256;

/// Training text and held-out text, opened and long enough.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub train: Text,
    pub held_out: Text,
    /// Entropy rate in nats per byte, where it is known: no model can pass it.
    pub floor: Option<f64>,
}

impl Corpus {
    /// Opens what `config` names; files are mapped, not read.
    ///
    /// # Errors
    /// [`Error::Data`] for a file that is missing, empty, or leaves a part shorter than one window of T + 1 bytes.
    pub fn open(config: &DataConfig, seed: u64) -> Result<Corpus> {
        let (whole, name, floor) = match (&config.path, &config.paths) {
            (Some(path), _) => (Text::open(std::slice::from_ref(path))?, path.display().to_string(), None),
            (None, Some(paths)) => (Text::open(paths)?, format!("{} files", paths.len()), None),
            (None, None) => {
                let bytes = synthetic::generate(seed, config.synthetic.unwrap_or(DEFAULT_SYNTHETIC));
                (Text::from_bytes(Arc::from(bytes)), "synthetic".to_owned(), Some(synthetic::entropy_rate()))
            }
        };
        let (train, held_out, held_name) = match &config.held_out {
            HeldOut::Fraction(fraction) => {
                let cut = whole.len() - (whole.len() as f64 * fraction).round() as usize;
                (whole.slice(0..cut), whole.slice(cut..whole.len()), format!("held-out part of {name}"))
            }
            HeldOut::File(path) => (whole, Text::open(std::slice::from_ref(path))?, path.display().to_string()),
        };
        long_enough(&train, &name, config.sequence)?;
        long_enough(&held_out, &held_name, config.sequence)?;
        Ok(Corpus { train, held_out, floor })
    }

    /// Opens one file to be evaluated on.
    ///
    /// # Errors
    /// As [`Corpus::open`].
    pub fn open_text(path: &Path, sequence: usize) -> Result<Text> {
        let text = Text::open(&[path.to_owned()])?;
        long_enough(&text, &path.display().to_string(), sequence)?;
        Ok(text)
    }
}

fn long_enough(text: &Text, name: &str, sequence: usize) -> Result<()> {
    if text.len() > sequence {
        return Ok(());
    }
    Err(Error::data(
        name,
        format!("{} bytes, one window needs {}", text.len(), sequence + 1),
        "lower data.sequence, change data.held_out or use a longer text",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn config(path: PathBuf) -> DataConfig {
        DataConfig { path: Some(path), sequence: 8, held_out: HeldOut::Fraction(0.25), ..DataConfig::default() }
    }

    #[test]
    fn the_last_part_is_held_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, (0..100).collect::<Vec<u8>>()).unwrap();
        let corpus = Corpus::open(&config(path), 1).unwrap();
        assert_eq!((corpus.train.len(), corpus.held_out.len()), (75, 25));
        let mut byte = [0];
        corpus.held_out.read(0, &mut byte);
        assert_eq!(byte, [75]);
    }

    #[test]
    fn missing_empty_and_short_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let message = |path: &PathBuf| Corpus::open(&config(path.clone()), 1).unwrap_err().to_string();
        assert!(message(&path).contains("a.txt: cannot be opened"), "{}", message(&path));
        std::fs::write(&path, b"").unwrap();
        assert!(message(&path).contains("a.txt: empty"), "{}", message(&path));
        std::fs::write(&path, b"123456789012").unwrap();
        assert!(message(&path).contains("held-out part of"), "{}", message(&path));
        assert!(message(&path).contains("3 bytes, one window needs 9"), "{}", message(&path));
    }
}
