//! Which tensor of a Hugging Face folder is which part of a parameter here.

use super::family::Family;
use crate::error::{Error, Result};
use crate::model::{self, Dimensions, Parameter};

/// A tensor of a folder: rows of a parameter here.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    /// Its name there, without the prefix of the model.
    pub theirs: String,
    pub shape: Vec<usize>,
    /// The parameter, and where its rows begin in it.
    pub ours: String,
    pub first_row: usize,
    pub rows: usize,
    /// [out, in] here, [in, out] there.
    pub transposed: bool,
    /// What its values are multiplied by on their way out.
    pub scale: f64,
}

impl Piece {
    /// Values of a row here.
    pub fn width(&self) -> usize {
        self.shape.iter().product::<usize>() / self.rows.max(1)
    }
}

/// The tensors of a model, in the order of the parameters here.
///
/// # Errors
/// [`Error::Internal`] for a parameter that the family does not have.
pub(super) fn pieces(family: Family, dimensions: &Dimensions) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for parameter in model::parameters(dimensions) {
        let names = names(family, &parameter.name);
        if names.is_empty() {
            let problem = format!("{} has no name in {}", parameter.name, family.word());
            return Err(Error::Internal(problem));
        }

        let rows = parameter.shape[0] as usize / names.len();
        for (number, theirs) in names.into_iter().enumerate() {
            pieces.push(piece(family, &parameter, theirs, number * rows, rows));
        }
    }

    Ok(pieces)
}

fn piece(
    family: Family,
    parameter: &Parameter,
    theirs: String,
    first_row: usize,
    rows: usize,
) -> Piece {
    let matrix = parameter.shape.len() == 2;
    let transposed = matrix && family == Family::Gpt2 && theirs.starts_with("h.");
    let mut shape: Vec<usize> = parameter.shape.iter().map(|n| *n as usize).collect();
    shape[0] = rows;
    if transposed {
        shape.reverse();
    }

    Piece { theirs, shape, ours: parameter.name.clone(), first_row, rows, transposed, scale: 1.0 }
}

/// The tensors that a parameter is made of, one below the other.
fn names(family: Family, ours: &str) -> Vec<String> {
    let of_layer = ours.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    let (layer, short) = of_layer.map_or((None, ours), |(layer, short)| (Some(layer), short));
    let (stem, end) = short.rsplit_once('.').unwrap_or((short, ""));
    let stems: &[&str] = match family {
        Family::Gpt2 => gpt2(short, stem),
        Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => llama(short, stem),
    };

    let named = |stem: &&str| match (layer, short) {
        (Some(layer), _) if family == Family::Gpt2 => format!("h.{layer}.{stem}.{end}"),
        (Some(layer), _) => format!("layers.{layer}.{stem}.{end}"),
        (None, "head.norm.bias") => format!("{stem}.bias"),
        (None, _) => format!("{stem}.weight"),
    };
    stems.iter().map(named).collect()
}

fn gpt2(short: &str, stem: &str) -> &'static [&'static str] {
    match (stem, short) {
        (_, "embedding.tokens") => &["wte"],
        (_, "embedding.positions") => &["wpe"],
        (_, "head.weight") => &["lm_head"],
        ("head.norm", _) => &["ln_f"],
        ("norm1", _) => &["ln_1"],
        ("norm2", _) => &["ln_2"],
        ("attention.qkv", _) => &["attn.c_attn"],
        ("attention.out", _) => &["attn.c_proj"],
        ("mlp.up", _) => &["mlp.c_fc"],
        ("mlp.down", _) => &["mlp.c_proj"],
        _ => &[],
    }
}

fn llama(short: &str, stem: &str) -> &'static [&'static str] {
    match (stem, short) {
        (_, "embedding.tokens") => &["embed_tokens"],
        (_, "head.weight") => &["lm_head"],
        ("head.norm", _) => &["norm"],
        ("norm1", _) => &["input_layernorm"],
        ("norm2", _) => &["post_attention_layernorm"],
        ("attention.query", _) => &["self_attn.q_proj"],
        ("attention.key_value", _) => &["self_attn.k_proj", "self_attn.v_proj"],
        ("attention.query_norm", _) => &["self_attn.q_norm"],
        ("attention.key_norm", _) => &["self_attn.k_norm"],
        ("attention.out", _) => &["self_attn.o_proj"],
        ("mlp.gate", _) => &["mlp.gate_proj"],
        ("mlp.up", _) => &["mlp.up_proj"],
        ("mlp.down", _) => &["mlp.down_proj"],
        _ => &[],
    }
}

/// The name of the head's matrix, which never has the prefix.
pub(super) const HEAD: &str = "lm_head.weight";

/// A tensor's whole name: everything but the head stands under the prefix, if there is one.
pub(super) fn full(prefix: &str, theirs: &str) -> String {
    if theirs == HEAD { theirs.to_owned() } else { format!("{prefix}{theirs}") }
}

/// Whether a tensor is none of the model's weights, but what a program once computed from its
/// config: masks and frequencies.
pub(super) fn is_computed(name: &str) -> bool {
    name.ends_with(".attn.bias")
        || name.ends_with(".attn.masked_bias")
        || name.ends_with(".rotary_emb.inv_freq")
}
