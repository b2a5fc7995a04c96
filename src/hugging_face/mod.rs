//! Models of Hugging Face folders, in and out.
//!
//! ```text
//! import   DIR/config.json            -> [model] of RUN/config.toml                  family
//!          DIR/*.safetensors          -> RUN/checkpoints/step-0/stage-0.safetensors  names, folder
//!          DIR/tokenizer* and others  -> RUN/hugging-face/                           kept as they are
//!          DIR/tokenizer.json         -> the vocabulary of the run
//! export   the newest state of RUN    -> DIR/model.safetensors or shards, config.json, tokenizer files
//! ```
//!
//! Tensors go through memory a piece at a time, those that are transposed whole, so that a folder of
//! any size can be taken. What is made stands under a name of its own until it is complete.

mod family;
mod names;
mod folder;
mod import;
mod export;

pub use export::{ExportRequest, WeightType, export};
pub use import::{ImportRequest, import};

/// The types of the source's tensors, by their names.
const TYPES: &str = "tensors.json";

/// A tokenizer, whole.
const TOKENIZER: &str = "tokenizer.json";

/// Files of a tokenizer and of generation, as far as a folder has them.
const BESIDE: [&str; 12] = [
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
    "vocab.txt",
];

/// Bytes that are read at a time.
const BLOCK: usize = 8 << 20;
