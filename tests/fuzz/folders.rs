//! A Hugging Face folder: its config, its index, the headers of its shards.

use std::fs;
use std::path::{Path, PathBuf};

use ouroboros::checkpoint::TensorStream;
use ouroboros::hugging_face::{ImportRequest, import};
use safetensors::tensor::Dtype;

use super::{Parts, Target};

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6, "vocab_size": 5,
"rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 16, "tie_word_embeddings": false,
"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
"original_max_position_embeddings": 8}, "rope_theta": 500.0, "torch_dtype": "float32"}"#;

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// The tensors of `CONFIG`, by shard.
const TENSORS: [(usize, &str, &[usize]); 12] = [
    (0, "model.embed_tokens.weight", &[5, 4]),
    (0, "model.layers.0.input_layernorm.weight", &[4]),
    (0, "model.layers.0.self_attn.q_proj.weight", &[4, 4]),
    (0, "model.layers.0.self_attn.k_proj.weight", &[2, 4]),
    (0, "model.layers.0.self_attn.v_proj.weight", &[2, 4]),
    (1, "model.layers.0.self_attn.o_proj.weight", &[4, 4]),
    (1, "model.layers.0.post_attention_layernorm.weight", &[4]),
    (1, "model.layers.0.mlp.gate_proj.weight", &[6, 4]),
    (1, "model.layers.0.mlp.up_proj.weight", &[6, 4]),
    (1, "model.layers.0.mlp.down_proj.weight", &[4, 6]),
    (1, "model.norm.weight", &[4]),
    (1, "lm_head.weight", &[5, 4]),
];

struct Folders {
    folder: PathBuf,
    out: PathBuf,
    seeds: Vec<Parts>,
}

/// Parts: the config, the index, then the shards.
pub fn folder(folder: &Path) -> Box<dyn Target> {
    let place = folder.join("model");
    fs::create_dir(&place).expect("a folder");
    let map: serde_json::Map<String, serde_json::Value> = TENSORS
        .iter()
        .map(|(shard, name, _)| ((*name).to_owned(), SHARDS[*shard].into()))
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map }).to_string();
    let mut parts: Parts = vec![CONFIG.into(), index.into()];
    for (number, file) in SHARDS.iter().enumerate() {
        let tensors: Vec<(String, Dtype, Vec<usize>)> = TENSORS
            .iter()
            .filter(|(shard, ..)| *shard == number)
            .map(|(_, name, shape)| ((*name).to_owned(), Dtype::BF16, shape.to_vec()))
            .collect();
        let values: usize = tensors.iter().map(|(.., shape)| shape.iter().product::<usize>()).sum();
        let path = place.join(file);
        let mut stream = TensorStream::create(&path, &tensors, None).expect("a file");
        stream.put(&vec![1; 2 * values]).expect("room");
        stream.finish().expect("room");
        let bytes = fs::read(&path).expect("a file");
        // Without the blanks that fill the header up: damage would hit little else.
        let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let text = String::from_utf8_lossy(&bytes[8..8 + header]).trim_end().to_owned();
        let length = (text.len() as u64).to_le_bytes();
        parts.push([&length[..], text.as_bytes(), &bytes[8 + header..]].concat());
    }

    let out = folder.join("run");
    let mut it = Folders { folder: place, out, seeds: vec![parts.clone()] };
    assert_eq!(it.read(&parts), Ok(()), "the good one");
    assert!(it.out.join("checkpoints/step-0/manifest.json").exists(), "the good one is imported");
    Box::new(it)
}

impl Target for Folders {
    fn seeds(&self) -> Vec<Parts> {
        self.seeds.clone()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "../",
            "/etc/hostname",
            "null",
            "\"yarn\"",
            "\"gpt2\"",
            "\"qwen3\"",
            "true",
            "-1",
            "18446744073709551615",
            "1e400",
            "\"shape\":[0,9223372036854775807]",
            "\"data_offsets\":[0,0]",
            "\"dtype\":\"F16\"",
            "__metadata__",
            "{",
            "[",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let _ = fs::remove_dir_all(&self.out);
        let names = ["config.json", "model.safetensors.index.json"].into_iter().chain(SHARDS);
        for (name, bytes) in names.zip(parts) {
            fs::write(self.folder.join(name), bytes).map_err(|error| error.to_string())?;
        }

        let request = ImportRequest { folder: self.folder.clone(), out: self.out.clone() };
        let Err(error) = import(&request) else { return Ok(()) };
        if self.out.exists() {
            return Err(format!("something is left of an import that failed: {error}"));
        }

        let named = matches!(error, ouroboros::error::Error::Config { .. })
            || error.to_string().contains(&self.folder.display().to_string());
        if named { Ok(()) } else { Err(format!("{error} names no file and no setting")) }
    }
}
