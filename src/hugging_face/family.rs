//! `config.json` and `[model]`, each made of the other. What decides a model's function and cannot be
//! said here is refused by its name.

use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::model::{Arch, AttentionBias, ModelConfig, RopeScaling};
use crate::schedule::Tie;

/// The models that are known, as Hugging Face names their types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Gpt2,
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

const ALL: [Family; 5] =
    [Family::Gpt2, Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

impl Family {
    /// As `model_type` has it.
    pub fn word(self) -> &'static str {
        match self {
            Family::Gpt2 => "gpt2",
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// As `architectures` has it.
    fn class(self) -> &'static str {
        match self {
            Family::Gpt2 => "GPT2LMHeadModel",
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// What stands before the names of its tensors, but for the head's.
    pub fn prefix(self) -> &'static str {
        if self == Family::Gpt2 { "transformer." } else { "model." }
    }
}

/// What a config.json says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Described {
    pub family: Family,
    pub model: ModelConfig,
}

/// A config.json that is read.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn wrong(&self, key: &str, remedy: &str) -> Error {
        let found = self.0.get(key).map_or("nothing".to_owned(), ToString::to_string);
        Error::config(format!("config.json {key}"), found, remedy)
    }

    /// A value that is there and not null.
    fn given(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.count_if_given(key)?.ok_or_else(|| self.wrong(key, "a whole number is needed"))
    }

    fn count_if_given(&self, key: &str) -> Result<Option<usize>> {
        let number = |value: &Value| value.as_u64().filter(|n| *n > 0).map(|n| n as usize);
        self.given(key)
            .map(|value| number(value).ok_or_else(|| self.wrong(key, "a whole number above 0")))
            .transpose()
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.given(key).map_or(Ok(default), |value| {
            value.as_f64().ok_or_else(|| self.wrong(key, "a number is needed"))
        })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.given(key).map_or(Ok(default), |value| {
            value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
        })
    }

    fn word(&self, key: &str) -> Option<&str> {
        self.given(key).and_then(Value::as_str)
    }

    /// Refuses a key that has any value but those that change nothing.
    fn unless(&self, key: &str, harmless: impl Fn(&Value) -> bool) -> Result<()> {
        match self.given(key) {
            Some(value) if !harmless(value) => {
                Err(self.wrong(key, "no model of this program does that"))
            }
            _ => Ok(()),
        }
    }
}

/// What a config.json says of its model.
///
/// # Errors
/// [`Error::Config`] naming what is unknown or cannot be expressed.
pub(super) fn described(json: &Map<String, Value>) -> Result<Described> {
    let keys = Keys(json);
    let word = keys.word("model_type").unwrap_or_default();
    let Some(family) = ALL.into_iter().find(|family| family.word() == word) else {
        let known: Vec<&str> = ALL.iter().map(|family| family.word()).collect();
        return Err(keys.wrong("model_type", &format!("known are {}", known.join(", "))));
    };

    keys.unless("quantization_config", |_| false)?;
    keys.unless("is_encoder_decoder", |value| value == false)?;
    let model = match family {
        Family::Gpt2 => gpt2(&keys)?,
        _ => llama(&keys, family)?,
    };
    model.check()?;
    Ok(Described { family, model })
}

fn gpt2(keys: &Keys) -> Result<ModelConfig> {
    keys.unless("scale_attn_weights", |value| value == true)?;
    keys.unless("scale_attn_by_inverse_layer_idx", |value| value == false)?;
    keys.unless("add_cross_attention", |value| value == false)?;
    let tied = keys.flag("tie_word_embeddings", true)?;
    let arch = match (keys.word("activation_function").unwrap_or("gelu_new"), tied) {
        ("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast", _) => Arch::Gpt2,
        // With a tie its embedding would be scaled.
        ("gelu", false) => Arch::Transformer,
        _ => {
            let remedy = "gelu_new is known, and gelu with tie_word_embeddings = false";
            return Err(keys.wrong("activation_function", remedy));
        }
    };

    let d_model = keys.count("n_embd")?;
    Ok(ModelConfig {
        arch,
        layers: keys.count("n_layer")?,
        d_model,
        heads: keys.count("n_head")?,
        d_ff: keys.count_if_given("n_inner")?.unwrap_or(d_model.saturating_mul(4)),
        vocabulary: Some(keys.count("vocab_size")?),
        positions: Some(keys.count("n_positions")?),
        norm_eps: Some(keys.number("layer_norm_epsilon", 1e-5)?),
        tie: tie(tied),
        ..ModelConfig::default()
    })
}

fn llama(keys: &Keys, family: Family) -> Result<ModelConfig> {
    for key in ["mlp_bias", "use_sliding_window"] {
        keys.unless(key, |value| value == false)?;
    }
    keys.unless("pretraining_tp", |value| value == 1)?;
    keys.unless("partial_rotary_factor", |value| value.as_f64() == Some(1.0))?;
    keys.unless("layer_types", |value| {
        value.as_array().is_some_and(|all| all.iter().all(|word| word == "full_attention"))
    })?;
    if !matches!(keys.word("hidden_act"), None | Some("silu" | "swish")) {
        return Err(keys.wrong("hidden_act", "silu is known"));
    }

    let longest = if family == Family::Mistral { 4096 * 32 } else { 2048 };
    let positions = keys.count_if_given("max_position_embeddings")?.unwrap_or(longest);
    if family == Family::Mistral {
        // A window that is never left is none; without the key there is one of 4096.
        let wide = |value: &Value| value.as_u64().is_some_and(|n| n >= positions as u64);
        keys.unless("sliding_window", wide)?;
        if !keys.0.contains_key("sliding_window") && positions > 4096 {
            let remedy = "without it a window of 4096 is meant; null is none";
            return Err(keys.wrong("sliding_window", remedy));
        }
    }

    let bias = keys.flag("attention_bias", false)?;
    let attention_bias = match (family, bias) {
        (Family::Qwen2, _) => AttentionBias::Qkv,
        (Family::Mistral, true) => return Err(keys.wrong("attention_bias", "mistral has none")),
        (_, true) => AttentionBias::All,
        (_, false) => AttentionBias::None,
    };

    let heads = keys.count("num_attention_heads")?;
    let (theta, scaling) = rope(keys)?;
    Ok(ModelConfig {
        arch: Arch::Llama,
        layers: keys.count("num_hidden_layers")?,
        d_model: keys.count("hidden_size")?,
        heads,
        kv_heads: Some(keys.count_if_given("num_key_value_heads")?.unwrap_or(heads)),
        // A Qwen3 without the key has heads of 128, whatever its width.
        d_head: keys.count_if_given("head_dim")?.or((family == Family::Qwen3).then_some(128)),
        d_ff: keys.count("intermediate_size")?,
        vocabulary: Some(keys.count("vocab_size")?),
        positions: Some(positions),
        norm_eps: Some(keys.number("rms_norm_eps", 1e-6)?),
        rope_theta: Some(theta),
        rope_scaling: scaling,
        attention_bias,
        qk_norm: family == Family::Qwen3,
        tie: tie(keys.flag("tie_word_embeddings", false)?),
        ..ModelConfig::default()
    })
}

fn tie(tied: bool) -> Tie {
    if tied { Tie::Aligned } else { Tie::Untied }
}

/// Base and scaling of rotary positions, of both forms: `rope_theta` and `rope_scaling`, or all of it
/// in `rope_parameters`.
fn rope(keys: &Keys) -> Result<(f64, Option<RopeScaling>)> {
    for key in ["rope_scaling", "rope_parameters"] {
        keys.unless(key, Value::is_object)?;
    }

    let section = |key: &str| keys.given(key).and_then(Value::as_object);
    let plain = section("rope_parameters")
        .map_or(Ok(10_000.0), |inner| Keys(inner).number("rope_theta", 10_000.0))?;
    let outer = keys.number("rope_theta", plain)?;
    // The older form goes before, as `transformers` has it.
    let of = if section("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let Some(found) = section(of) else { return Ok((outer, None)) };

    let inner = Keys(found);
    let theta = inner.number("rope_theta", outer)?;
    if inner.word("rope_type").or(inner.word("type")).is_none() && inner.given("factor").is_some() {
        return Err(keys.wrong(of, "it has a factor, and no rope_type"));
    }

    inner.unless("partial_rotary_factor", |value| value.as_f64() == Some(1.0))?;
    let factor = || inner.number("factor", 0.0);
    let scaling = match inner.word("rope_type").or(inner.word("type")).unwrap_or("default") {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: factor()? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: inner.number("low_freq_factor", 0.0)?,
            high_freq_factor: inner.number("high_freq_factor", 0.0)?,
            original_positions: inner.count("original_max_position_embeddings")?,
        }),
        other => {
            let remedy = "default, linear and llama3 are known";
            return Err(Error::config(format!("config.json {of}.rope_type"), other, remedy));
        }
    };

    Ok((theta, scaling))
}

/// The family that a model is exported as.
///
/// # Errors
/// [`Error::Config`] naming the key that none of them has.
pub(super) fn family_of(model: &ModelConfig) -> Result<Family> {
    let refuse = |key: &str, found: String| {
        let remedy = "no model of Hugging Face's that is known here has it";
        Err(Error::config(format!("model.{key}"), found, remedy))
    };

    if model.arch == Arch::TransformerXl {
        return refuse("arch", "transformer-xl".into());
    }

    if !model.cutoffs.is_empty() {
        return refuse("cutoffs", format!("{:?}", model.cutoffs));
    }

    let narrow = [("embedding_width", model.embedding_width), ("head_width", model.head_width)];
    for (key, width) in narrow {
        if let Some(width) = width.filter(|width| *width != model.d_model) {
            return refuse(key, width.to_string());
        }
    }

    if !model.final_norm() {
        return refuse("final_norm", "false".into());
    }

    if model.arch != Arch::Llama {
        let width = model.d_head.map_or(model.d_model, |width| width * model.heads);
        return match width == model.d_model {
            true => Ok(Family::Gpt2),
            false => refuse("d_head", format!("{width} in {} heads", model.heads)),
        };
    }

    match (model.qk_norm, model.attention_bias) {
        (true, AttentionBias::Qkv) => {
            refuse("qk_norm", "true with attention_bias = \"qkv\"".into())
        }
        (true, _) => Ok(Family::Qwen3),
        (false, AttentionBias::Qkv) => Ok(Family::Qwen2),
        (false, _) => Ok(Family::Llama),
    }
}

/// The config.json of a model: what it says, over what `source` says besides.
pub(super) fn written(
    family: Family,
    model: &ModelConfig,
    vocabulary: usize,
    sequence: usize,
    dtype: Dtype,
    source: Option<&Map<String, Value>>,
) -> Map<String, Value> {
    let mut json = source.cloned().unwrap_or_else(|| bare(family));
    let mut set = |key: &str, value: Value| drop(json.insert(key.to_owned(), value));
    let positions = model.positions.unwrap_or(sequence);
    // An exact GELU's tie is taken apart: its embedding is scaled.
    let tied = model.tie != Tie::Untied && model.arch != Arch::Transformer;
    set("vocab_size", vocabulary.into());
    set("tie_word_embeddings", tied.into());
    if family == Family::Gpt2 {
        let exact = model.arch == Arch::Transformer;
        set("n_embd", model.d_model.into());
        set("n_layer", model.layers.into());
        set("n_head", model.heads.into());
        set("n_inner", model.d_ff.into());
        set("n_positions", positions.into());
        set("layer_norm_epsilon", model.norm_eps().into());
        set("activation_function", if exact { "gelu" } else { "gelu_new" }.into());
    } else {
        let width = model.d_head.unwrap_or(model.d_model / model.heads);
        set("hidden_size", model.d_model.into());
        set("num_hidden_layers", model.layers.into());
        set("num_attention_heads", model.heads.into());
        set("num_key_value_heads", model.kv_heads.unwrap_or(model.heads).into());
        set("head_dim", width.into());
        set("intermediate_size", model.d_ff.into());
        set("max_position_embeddings", positions.into());
        set("rms_norm_eps", model.norm_eps().into());
        set("hidden_act", "silu".into());
        if matches!(family, Family::Llama | Family::Qwen3) {
            set("attention_bias", (model.attention_bias == AttentionBias::All).into());
        }
    }

    let word = type_word(dtype);
    let old = source.is_none_or(|source| source.contains_key("torch_dtype"));
    if old {
        set("torch_dtype", word.into());
    }
    if source.is_none_or(|source| !source.contains_key("torch_dtype")) {
        set("dtype", word.into());
    }

    if family != Family::Gpt2 {
        let told = source.and_then(|source| rope(&Keys(source)).ok());
        if told != Some((model.rope_theta(), model.rope_scaling.clone())) {
            rope_keys(&mut json, model);
        }
    }
    json
}

/// Base and scaling of rotary positions, in both forms: programs of several years read one of them.
fn rope_keys(json: &mut Map<String, Value>, model: &ModelConfig) {
    let theta = model.rope_theta();
    let scaling = match &model.rope_scaling {
        None => None,
        Some(RopeScaling::Linear { factor }) => {
            Some(json!({ "rope_type": "linear", "factor": factor }))
        }
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        }) => Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_positions,
        })),
    };

    let mut parameters = scaling.clone().unwrap_or_else(|| json!({ "rope_type": "default" }));
    parameters["rope_theta"] = theta.into();
    json.insert("rope_theta".into(), theta.into());
    json.insert("rope_scaling".into(), scaling.unwrap_or(Value::Null));
    json.insert("rope_parameters".into(), parameters);
}

/// What no model here says, and a config.json needs.
fn bare(family: Family) -> Map<String, Value> {
    let mut json = Map::new();
    let mut set = |key: &str, value: Value| drop(json.insert(key.to_owned(), value));
    set("architectures", json!([family.class()]));
    set("model_type", family.word().into());
    // Bytes have no such tokens.
    set("bos_token_id", Value::Null);
    set("eos_token_id", Value::Null);
    if family == Family::Gpt2 {
        for key in ["embd_pdrop", "attn_pdrop", "resid_pdrop"] {
            set(key, 0.0.into());
        }
    } else {
        set("attention_dropout", 0.0.into());
    }
    json
}

/// As `dtype` has it.
pub(super) fn type_word(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: Value) -> Result<ModelConfig> {
        Ok(described(json.as_object().unwrap())?.model)
    }

    fn small(model_type: &str) -> Value {
        json!({
            "model_type": model_type, "hidden_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 64,
            "vocab_size": 99, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "max_position_embeddings": 512, "rope_theta": 5000.0,
        })
    }

    fn with(mut json: Value, key: &str, value: Value) -> Value {
        json[key] = value;
        json
    }

    #[test]
    fn both_forms_of_rope_are_one() {
        let scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
        });
        let old = read(with(small("llama"), "rope_scaling", scaling.clone())).unwrap();
        let mut new =
            with(small("llama"), "rope_parameters", with(scaling, "rope_theta", 5000.0.into()));
        new.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(old, read(new).unwrap());
        assert_eq!(old.rope_theta, Some(5000.0));
        assert!(matches!(
            old.rope_scaling,
            Some(RopeScaling::Llama3 { original_positions: 128, .. })
        ));

        let plain =
            read(with(small("llama"), "rope_parameters", json!({ "rope_type": "default" })));
        assert_eq!(plain.unwrap().rope_scaling, None);
        let older = json!({ "type": "linear", "factor": 2.0 });
        let linear = read(with(small("llama"), "rope_scaling", older)).unwrap();
        assert_eq!(linear.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
    }

    #[test]
    fn families_differ_in_biases_and_norms() {
        let of = |json| {
            let model = read(json).unwrap();
            (model.attention_bias, model.qk_norm, model.d_head)
        };
        assert_eq!(of(small("llama")), (AttentionBias::None, false, None));
        assert_eq!(of(small("mistral")), (AttentionBias::None, false, None));
        assert_eq!(of(small("qwen2")), (AttentionBias::Qkv, false, None));
        assert_eq!(of(small("qwen3")), (AttentionBias::None, true, Some(128)));
        let biased = with(small("llama"), "attention_bias", true.into());
        assert_eq!(of(biased), (AttentionBias::All, false, None));
        for word in ["llama", "qwen2", "qwen3"] {
            let found = described(small(word).as_object().unwrap()).unwrap();
            assert_eq!(family_of(&found.model).unwrap(), found.family);
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_named() {
        let table = [
            (with(small("llama"), "model_type", "mamba".into()), "config.json model_type"),
            (with(small("llama"), "hidden_act", "gelu".into()), "config.json hidden_act"),
            (with(small("llama"), "mlp_bias", true.into()), "config.json mlp_bias"),
            (with(small("llama"), "num_key_value_heads", 4.into()), "model.kv_heads"),
            (with(small("llama"), "hidden_size", "48".into()), "config.json hidden_size"),
            (with(small("mistral"), "sliding_window", 128.into()), "config.json sliding_window"),
            (
                with(small("qwen2"), "layer_types", json!(["sliding_attention"])),
                "config.json layer_types",
            ),
            (
                with(small("llama"), "rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0 })),
                "config.json rope_scaling.rope_type`: found yarn",
            ),
            (
                with(small("llama"), "quantization_config", json!({ "bits": 4 })),
                "config.json quantization_config",
            ),
        ];
        for (json, expected) in table {
            let error = read(json).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}\n  expected {expected}");
            assert_eq!(error.exit_code(), 2);
        }
        assert!(read(with(small("mistral"), "sliding_window", 512.into())).is_ok());
    }

    #[test]
    fn what_is_written_is_read_again() {
        for word in ["llama", "qwen2", "qwen3"] {
            let found = described(small(word).as_object().unwrap()).unwrap();
            let Described { family, model } = &found;
            let json = written(*family, model, 99, 512, Dtype::BF16, None);
            let again = described(&json).unwrap();
            let width = again.model.d_head;
            assert_eq!(ModelConfig { d_head: model.d_head, ..again.model }, *model, "{word}");
            assert_eq!(width, Some(model.d_head.unwrap_or(8)));
        }
    }
}
