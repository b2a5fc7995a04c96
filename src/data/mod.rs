//! The text that is trained on and the text that is held out, as tokens.
//!
//! ```text
//! [data] --opening--> Tokens (mapped, or made of a text) --mixture, batches--> rows of a step
//!           |                                            --evaluation--------> rows of the held-out text
//!           +-- vocabulary: bytes, characters, words (counting), subwords (tokenizer.json), ids
//! ```

mod batches;
mod borders;
mod config;
mod corpus;
mod counting;
mod evaluation;
mod foreign;
mod measure;
mod mixture;
mod opening;
pub mod prepared;
mod subword;
mod synthetic;
mod text;
mod tokenizer;
mod tokens;
mod vocabulary;
mod words;

pub use batches::{Batch, Batches, Reading, Shape};
pub use config::{DataConfig, HeldOut, Order, SourceConfig};
pub use corpus::{Corpus, Fingerprint, Source};
pub use counting::Counts;
pub use evaluation::{Evaluation, UNCOUNTED};
pub use measure::Measure;
pub use mixture::Mixture;
pub use opening::{HeldOutText, document_end};
pub use subword::{Subword, SubwordFacts};
pub use text::{cut_text, made};
pub use tokenizer::{Tokenizer, Unit};
pub use tokens::{Tokens, Width, map};
pub use vocabulary::{Listed, Vocabulary};
pub use words::utf8;
