//! Saved states read back: found, verified, and read tensor by tensor, whatever grid has written
//! them.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

use super::tensors::Tensors;
use super::{
    MANIFEST, Manifest, Shard, ShardKind, TOKENIZER, VOCABULARY, age, digest, entries, index,
    older, part,
};
use crate::bar::Bar;
use crate::config::Config;
use crate::data::{Listed, Unit, Vocabulary};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Parameter;
use crate::params::{Entry, Layout, slice_mut, zeros};
use crate::schedule::Tie;

/// A saved state whose files are there, in the sizes that the manifest says.
#[derive(Debug)]
pub struct Checkpoint {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub vocabulary: Vocabulary,
}

/// Keys of the model that may change when a run goes on: they shape no parameter.
const FREE: [&str; 8] = [
    "dropout",
    "attention_dropout",
    "tie",
    "tie_gradient",
    "init",
    "init_std",
    "loss_chunk_mib",
    "z_loss",
];

/// Why settings of a resumed run are as they were.
const KEPT: &str = "a resumed run keeps it";

impl Checkpoint {
    /// A saved state, or the newest one of a run's folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none, or it is not as its manifest says.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Checkpoint::found(path, Checkpoint::read)?.ok_or_else(|| nothing(path))
    }

    /// The same, whose files nobody has looked into yet: whoever uses it calls
    /// [`Checkpoint::verify`] meanwhile.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none, or none whose manifest can be read.
    pub fn open_unverified(path: &Path) -> Result<Checkpoint> {
        Checkpoint::found(path, Checkpoint::read_manifest)?.ok_or_else(|| nothing(path))
    }

    /// The state in `path` itself, or the newest of those under its `checkpoints/` (or right in it)
    /// that is good; none if there is none at all. Those that are passed over are told on standard
    /// error.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are some, and none of them is good.
    pub fn newest(path: &Path) -> Result<Option<Checkpoint>> {
        Checkpoint::found(path, Checkpoint::read)
    }

    fn found(
        path: &Path,
        read: impl Fn(&Path) -> Result<Checkpoint>,
    ) -> Result<Option<Checkpoint>> {
        if path.join(MANIFEST).exists() {
            return read(path).map(Some);
        }

        // A path that names one state, whose manifest is gone, is no run's folder.
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("step-") && path.is_dir() {
            return Err(Error::checkpoint(&path.join(MANIFEST), "is missing"));
        }

        let run = if path.ends_with("checkpoints") { path.parent().unwrap_or(path) } else { path };
        let mut folders: Vec<PathBuf> = entries(run)
            .into_iter()
            .filter(|(_, suffix, _)| suffix.is_empty())
            .map(|(.., path)| path)
            .collect();
        folders.sort_by_key(|folder| std::cmp::Reverse(age(folder)));
        let mut first = None;
        for folder in folders {
            match read(&folder) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => {
                    complain!("note: {error}; looking for an older one");
                    first.get_or_insert(error);
                }
            }
        }

        first.map_or(Ok(None), Err)
    }

    fn read(path: &Path) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::read_manifest(path)?;
        checkpoint.verify()?;
        Ok(checkpoint)
    }

    /// Whether the files are there as the manifest says.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for the first that is not.
    pub fn verify(&self) -> Result<()> {
        let bytes =
            self.manifest.shards.iter().fold(0u64, |sum, shard| sum.saturating_add(shard.bytes));
        let bar = Bar::of_bytes(bytes, "verifying checkpoint");
        self.verify_with(|bytes| bar.advance(bytes))
    }

    /// The same, telling how many bytes more have been looked at.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn verify_with(&self, told: impl Fn(u64)) -> Result<()> {
        self.manifest.shards.iter().try_for_each(|shard| self.verify_shard(shard, &told))
    }

    /// What the manifest of a state says, whose files are not looked at.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be read.
    pub fn read_manifest(path: &Path) -> Result<Checkpoint> {
        let wrong = |error: &dyn Display| Error::checkpoint(&path.join(MANIFEST), error);
        let text = files::read_text(&path.join(MANIFEST)).map_err(|error| wrong(&error))?;
        // The number of the format first: the rest may be another in another format.
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| wrong(&error))?;
        if value["format"] != super::FORMAT {
            let problem = format!(
                "format {} is not known to this version, which reads {}",
                value["format"],
                super::FORMAT
            );

            return Err(wrong(&problem));
        }

        let mut manifest: Manifest =
            serde_json::from_value(value).map_err(|error| wrong(&error))?;
        manifest.check().map_err(|problem| wrong(&problem))?;
        manifest.config.optimizer = manifest.config.optimizer.known();
        let vocabulary = vocabulary(path, &manifest)?;
        Ok(Checkpoint { path: path.to_owned(), manifest, vocabulary })
    }

    fn verify_shard(&self, shard: &Shard, told: &impl Fn(u64)) -> Result<()> {
        let file = self.path.join(&shard.file);
        let found = fs::metadata(&file).map_err(|error| Error::checkpoint(&file, error))?.len();
        if found != shard.bytes {
            return Err(Error::checkpoint(
                &file,
                format!("{found} bytes instead of {}", shard.bytes),
            ));
        }

        let (_, found) = digest(&file, told).map_err(|error| Error::checkpoint(&file, error))?;
        if found != shard.digest {
            return Err(Error::checkpoint(
                &file,
                format!("its digest is {found} instead of {}", shard.digest),
            ));
        }

        Ok(())
    }

    pub fn step(&self) -> usize {
        self.manifest.step
    }

    /// Whether a run with this config is the same one: what may not change is named.
    ///
    /// # Errors
    /// [`Error::Config`] with the setting.
    pub fn fits(&self, config: &Config) -> Result<()> {
        let (old, new) = (&self.manifest.config, config);
        self.fits_model(config, KEPT)?;

        let kinds = (old.optimizer.common.kind, new.optimizer.common.kind);
        if kinds.0 != kinds.1 {
            return self.differs("optimizer.kind", &kinds.0, &kinds.1);
        }

        // They shape the state.
        let (before, now) = (&old.optimizer.soap, &new.optimizer.soap);
        if before.soap_sides != now.soap_sides {
            return self.differs("optimizer.soap_sides", &before.soap_sides, &now.soap_sides);
        }

        let longest = new.model.d_model.max(new.model.d_ff);
        if before.soap_limit.min(longest) != now.soap_limit.min(longest) {
            return self.differs("optimizer.soap_limit", &before.soap_limit, &now.soap_limit);
        }

        let numbers = [
            ("batch", old.batch as u64, new.batch as u64),
            ("data.sequence", old.data.sequence as u64, new.data.sequence as u64),
            ("seed", old.seed, new.seed),
        ];

        if let Some((setting, old, new)) = numbers.into_iter().find(|(_, old, new)| old != new) {
            return self.differs(setting, &old, &new);
        }

        if self.step() > new.steps {
            let remedy = format!("{} has made {} already", self.path.display(), self.step());
            return Err(Error::config("steps", new.steps, remedy));
        }

        Ok(())
    }

    /// Whether a config's model has the parameters that are saved; `why` not, if it does not.
    ///
    /// # Errors
    /// [`Error::Config`] with the key.
    pub fn fits_model(&self, config: &Config, why: &str) -> Result<()> {
        let (old, new) = (&self.manifest.config, config);
        let json =
            |config: &Config| serde_json::to_value(config.model.settled()).unwrap_or_default();
        let (before, now) = (json(old), json(new));

        let objects = before.as_object().into_iter().chain(now.as_object());
        let keys = objects.flat_map(|object| object.keys());
        for key in keys.filter(|key| !FREE.contains(&key.as_str())) {
            let show = |value: &serde_json::Value| {
                value.get(key).map_or("none".to_owned(), ToString::to_string)
            };

            if before.get(key) != now.get(key) {
                let setting = format!("model.{key}");
                return self.refuse(&setting, &show(&before), &show(&now), why);
            }
        }

        let (old, new) = (old.model.tie, new.model.tie);
        if (old == Tie::Untied) != (new == Tie::Untied) {
            return self.refuse("model.tie", &format!("{old:?}"), &format!("{new:?}"), why);
        }

        Ok(())
    }

    fn differs(&self, setting: &str, old: &dyn Display, new: &dyn Display) -> Result<()> {
        self.refuse(setting, old, new, KEPT)
    }

    fn refuse(&self, setting: &str, old: &dyn Display, new: &dyn Display, why: &str) -> Result<()> {
        let path = self.path.display();
        let remedy = format!("{path} was trained with {old}, and {why}");
        Err(Error::config(setting, new, remedy))
    }

    /// The values of the given parameters, in their order.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one is missing, has another shape, or if there are others.
    pub fn values(&self, parameters: &[Parameter]) -> Result<Vec<Tensor>> {
        let names = self
            .manifest
            .shards
            .iter()
            .filter(|shard| shard.kind == ShardKind::Weights)
            .flat_map(|s| &s.tensors);
        if let Some(name) =
            names.into_iter().find(|name| parameters.iter().all(|p| p.name != **name))
        {
            return Err(Error::checkpoint(
                &self.path,
                format!("the config's model has no parameter {name}"),
            ));
        }

        let layout = Layout::new(parameters);
        layout.views(&self.flat(&ShardKind::Weights, &layout)?)
    }

    /// The weights at an earlier version.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not there.
    pub fn older(&self, layout: &Layout, version: usize) -> Result<Tensor> {
        let mut named = layout.clone();
        named
            .entries
            .iter_mut()
            .for_each(|entry| entry.parameter.name = older(&entry.parameter.name, version));
        self.flat(&ShardKind::Older, &named)
    }

    /// A replica's part of a step of the tied table's gradient.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not there.
    pub fn part(&self, layout: &Layout, step: usize, replica: usize) -> Result<Tensor> {
        let mut named = layout.clone();
        named
            .entries
            .iter_mut()
            .for_each(|entry| entry.parameter.name = part(&entry.parameter.name, step, replica));
        self.flat(&ShardKind::Parts, &named)
    }

    /// The steps of which parts of the tied table's gradient were saved, in order.
    pub fn steps_of_parts(&self) -> BTreeSet<usize> {
        let parts = self.manifest.shards.iter().filter(|shard| shard.kind == ShardKind::Parts);
        let step = |name: &String| name.rsplit_once('@')?.1.split_once('/')?.0.parse().ok();
        parts.flat_map(|shard| shard.tensors.iter().filter_map(step)).collect()
    }

    /// A flat buffer of saved values of one kind.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one is missing or has another shape.
    pub fn flat(&self, kind: &ShardKind, layout: &Layout) -> Result<Tensor> {
        // Before memory is taken: what the files do not have may be of any size.
        self.visit(kind, layout, |file, entry| {
            let parameter = &entry.parameter;
            match file.shape(&parameter.name)? {
                shape if shape == parameter.shape => Ok(()),
                shape => Err(format!(
                    "{} is {shape:?}, the config asks for {:?}",
                    parameter.name, parameter.shape
                )),
            }
        })?;

        let mut flat = zeros(layout.len, Device::Cpu)?;
        let values = slice_mut(&mut flat);
        self.visit(kind, layout, |file, entry| {
            let found = file.read(&entry.parameter.name)?;
            values[entry.offset..entry.offset + found.len()].copy_from_slice(&found);
            Ok(())
        })?;

        Ok(flat)
    }

    /// Goes through the tensors of a layout, each with the file that has it.
    fn visit(
        &self,
        kind: &ShardKind,
        layout: &Layout,
        mut look: impl FnMut(&mut Tensors, &Entry) -> std::result::Result<(), String>,
    ) -> Result<()> {
        let places = index(&self.manifest.shards, kind);
        let mut open: Option<(&str, Tensors)> = None;
        for entry in &layout.entries {
            let name = &entry.parameter.name;
            let shard = places.get(name.as_str()).ok_or_else(|| {
                let of = match kind {
                    ShardKind::State(name) => format!("optimizer state `{name}` of"),
                    _ => "parameter".to_owned(),
                };

                Error::checkpoint(&self.path, format!("no {of} {name}"))
            })?;

            let path = self.path.join(&shard.file);
            let file = match &mut open {
                Some((of, file)) if *of == shard.file => file,
                other => &mut other.insert((&shard.file, Tensors::open(&path)?)).1,
            };

            look(file, entry).map_err(|problem| Error::checkpoint(&path, problem))?;
        }

        Ok(())
    }

    /// What a layer remembers of some rows of the batch, [rows, tokens, D]; none if it remembers
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if rows are missing.
    pub fn memory(&self, layer: &str, rows: Range<usize>) -> Result<Option<Tensor>> {
        let mut pieces = Vec::new();
        for shard in self.manifest.shards.iter().filter(|shard| shard.kind == ShardKind::Memory) {
            let starts =
                shard.tensors.iter().filter_map(|name| name.strip_prefix(layer)?.strip_prefix('/'));
            let path = self.path.join(&shard.file);
            for start in starts.filter_map(|start| start.parse::<usize>().ok()) {
                let wrong = |error: String| Error::checkpoint(&path, error);
                let (mut file, name) = (Tensors::open(&path)?, format!("{layer}/{start}"));
                let shape = file.shape(&name).map_err(wrong)?;
                let [count, _, width] = shape[..] else {
                    return Err(wrong(format!("{name} is {shape:?}, not rows, tokens and values")));
                };

                if width != self.manifest.config.model.d_model as i64 {
                    return Err(wrong(format!(
                        "{name} is {shape:?}, which is not as wide as the model"
                    )));
                }

                let have = start..start.saturating_add(count as usize);
                let common = have.start.max(rows.start)..have.end.min(rows.end);
                if !common.is_empty() {
                    let values = file.read(&name).map_err(wrong)?;
                    let piece = Tensor::f_from_slice(&values)?.f_view(&shape[..])?;
                    let piece =
                        piece.f_narrow(0, (common.start - start) as i64, common.len() as i64)?;
                    pieces.push((common.start, piece));
                }
            }
        }

        pieces.sort_by_key(|(start, _)| *start);
        let pieces: Vec<Tensor> = pieces.into_iter().map(|(_, piece)| piece).collect();
        match pieces.iter().map(|piece| piece.size()[0] as usize).sum::<usize>() {
            0 => Ok(None),
            found if found == rows.len() => Ok(Some(Tensor::f_cat(&pieces, 0)?)),
            found => {
                let problem = format!(
                    "{layer} remembers {found} of the rows {} to {}",
                    rows.start,
                    rows.end - 1
                );

                Err(Error::checkpoint(&self.path, problem))
            }
        }
    }
}

fn nothing(path: &Path) -> Error {
    Error::checkpoint(path, "no saved weights here (a folder with manifest.json)")
}

/// The vocabulary that stands beside the weights.
fn vocabulary(path: &Path, manifest: &Manifest) -> Result<Vocabulary> {
    let unit = manifest.unit();
    if unit == Unit::Bytes {
        return Ok(Vocabulary::bytes());
    }

    let file = path.join(VOCABULARY);
    let wrong = |file: &Path, error: &dyn Display| Error::checkpoint(file, error);
    let text = files::read(&file).map_err(|error| wrong(&file, &error))?;
    let listed: Listed = serde_json::from_slice(&text).map_err(|error| wrong(&file, &error))?;
    if listed.unit != unit {
        let (found, said) = (listed.unit.word(), unit.word());
        return Err(wrong(&file, &format!("of tokenizer `{found}`, the manifest says `{said}`")));
    }

    let digest = listed.subword.as_ref().map(|facts| &facts.digest);
    let said = manifest.tokenizer.as_ref().and_then(|tokenizer| tokenizer.digest.as_ref());
    if digest != said {
        return Err(wrong(&file, &"of another tokenizer than the manifest says"));
    }

    let tokenizer = path.join(TOKENIZER);
    let json = digest.map(|_| files::read(&tokenizer)).transpose();
    let json = json.map_err(|error| wrong(&tokenizer, &error))?;
    Vocabulary::of(listed, json).map_err(|problem| wrong(&file, &problem))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tch::Kind;

    use super::super::{Pipeline, Snapshot, complete};
    use super::*;
    use crate::data::Corpus;
    use crate::grid::Place;
    use crate::model::{Init, Role};
    use crate::optim::{Optimizer, UpdateScalars};
    use crate::params::{UpdateBuffers, slice};

    fn parameter(name: &str, shape: &[i64]) -> Parameter {
        Parameter {
            name: name.into(),
            shape: shape.into(),
            init: Init::Normal(1.0),
            role: Role::Matrix,
            tied: false,
            fused: 1,
        }
    }

    /// Of a model that is 4 wide.
    fn config() -> Config {
        Config::parse("[model]\nd_model = 4", &[]).unwrap()
    }

    fn layout(stage: usize) -> Layout {
        Layout::new(&[
            parameter(&format!("layer.{stage}.a"), &[3, 2]),
            parameter(&format!("layer.{stage}.b"), &[5]),
        ])
    }

    /// An optimizer that has made an update, so that its state is not zeros.
    fn optimizer(config: &Config, layout: &Layout) -> Optimizer {
        let mut optimizer =
            Optimizer::new(&config.optimizer, layout, 0, config.precision, 1, Device::Cpu).unwrap();
        let (mut new, mut gradient) = (layout.initial(2).unwrap(), layout.initial(3).unwrap());
        let norm = crate::number::Number::Known(1.0);
        let buffers =
            UpdateBuffers { old: None, new: &mut new, published: None, gradient: &mut gradient };
        optimizer.update(buffers, &UpdateScalars { lr: 0.1, mean: 1.0, norm: &norm }).unwrap();
        optimizer
    }

    /// Saves what two stages of two replicas hold after `step` updates, the older versions of the
    /// first stage too.
    fn save(out: &Path, step: usize, config: &Config) -> PathBuf {
        let mut shards = Vec::new();
        for (stage, replica) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let layout = layout(stage);
            let weights = layout.initial(step as u64).unwrap();
            let mut snapshot = Snapshot::new(Place { stage, replica }, step, 2);
            snapshot.add(&layout, &weights, &optimizer(config, &layout)).unwrap();
            if stage == 0 {
                let older = layout.initial(99).unwrap();
                snapshot.add_older(&layout, [(step - 1, &older)].into_iter()).unwrap();
            }
            let states =
                Tensor::full([2, 3, 4], (10 * stage + replica) as f64, (Kind::Float, Device::Cpu));
            snapshot.remember(2 * replica, vec![(format!("layers.{stage}"), &states)]).unwrap();
            shards.extend(snapshot.write(out, Duration::ZERO).unwrap().shards);
        }
        let pipeline = Pipeline { since: step - 1, delays: vec![1, 0], layers: vec![1, 1] };
        let corpus = Corpus::open(&config.data, 1, 8, None).unwrap();
        let manifest =
            Manifest::new(config, Some(corpus.fingerprint().clone()), 22, step, pipeline, shards);
        complete(out, &manifest, &Vocabulary::bytes()).unwrap()
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let (out, config) = (tempfile::tempdir().unwrap(), config());
        let path = save(out.path(), 7, &config);
        let saved = Checkpoint::open(&path).unwrap();
        assert_eq!((saved.step(), saved.manifest.pipeline.since), (7, 6));
        for stage in [0, 1] {
            let layout = layout(stage);
            let weights = saved.flat(&ShardKind::Weights, &layout).unwrap();
            assert_eq!(slice(&weights), slice(&layout.initial(7).unwrap()));
            for buffer in optimizer(&config, &layout).state() {
                let state = saved.flat(&ShardKind::State(buffer.name.into()), &layout).unwrap();
                assert_eq!(slice(&state), slice(&buffer.values), "{}", buffer.name);
            }
        }
        // Both stages at once, as a grid of one stage reads them.
        let both = Layout::new(&[parameter("layer.1.b", &[5]), parameter("layer.0.a", &[3, 2])]);
        let first = layout(1).views(&layout(1).initial(7).unwrap()).unwrap()[1].shallow_clone();
        let found = both.views(&saved.flat(&ShardKind::Weights, &both).unwrap()).unwrap();
        assert_eq!(found[0], first);

        let older = saved.older(&layout(0), 6).unwrap();
        assert_eq!(slice(&older), slice(&layout(0).initial(99).unwrap()));
        assert!(saved.older(&layout(0), 5).unwrap_err().to_string().contains("layer.0.a@5"));
        let missing =
            saved.flat(&ShardKind::State("third".into()), &layout(0)).unwrap_err().to_string();
        assert!(missing.contains("optimizer state `third` of layer.0.a"), "{missing}");
    }

    /// Rows of two replicas, read by a grid that cuts them in another way.
    #[test]
    fn memories_are_read_by_rows() {
        let (out, config) = (tempfile::tempdir().unwrap(), config());
        let saved = Checkpoint::open(&save(out.path(), 7, &config)).unwrap();
        let rows = saved.memory("layers.1", 1..4).unwrap().unwrap();
        assert_eq!(rows.size(), [3, 3, 4]);
        let first: Vec<f64> =
            Vec::try_from(rows.select(2, 0).select(1, 0).to_kind(Kind::Double)).unwrap();
        assert_eq!(first, [10.0, 11.0, 11.0]);
        assert!(saved.memory("layers.7", 0..4).unwrap().is_none());
        assert!(
            saved
                .memory("layers.1", 3..5)
                .unwrap_err()
                .to_string()
                .contains("remembers 1 of the rows 3 to 4")
        );
    }

    /// Every byte of a file counts; an older state is taken instead, and what was passed over is an
    /// error if it is asked for.
    #[test]
    fn a_damaged_state_is_passed_over() {
        let (out, config) = (tempfile::tempdir().unwrap(), config());
        let older = save(out.path(), 7, &config);
        let newer = save(out.path(), 9, &config);
        assert_eq!(Checkpoint::open(out.path()).unwrap().path, newer);

        let file = newer.join("stage-1.safetensors");
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        fs::write(&file, &bad).unwrap();
        assert_eq!(Checkpoint::open(out.path()).unwrap().path, older);
        let error = Checkpoint::open(&newer).unwrap_err().to_string();
        assert!(error.contains("stage-1.safetensors: its digest is"), "{error}");

        fs::write(&file, &good[1..]).unwrap();
        let error = Checkpoint::open(&newer).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{} bytes instead of {}", good.len() - 1, good.len())),
            "{error}"
        );

        fs::write(&file, &good).unwrap();
        let manifest = newer.join(MANIFEST);
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text.replace("\"format\": 4", "\"format\": 3")).unwrap();
        let error = Checkpoint::open(&newer).unwrap_err().to_string();
        assert!(error.contains("format 3 is not known to this version, which reads 4"), "{error}");
        fs::remove_file(&manifest).unwrap();
        assert!(Checkpoint::open(&newer).unwrap_err().to_string().contains("is missing"));
        assert!(Checkpoint::newest(&out.path().join("nothing")).unwrap().is_none());
    }

    #[test]
    fn what_would_be_another_run_is_named() {
        let (out, config) = (tempfile::tempdir().unwrap(), config());
        let saved = Checkpoint::open(&save(out.path(), 7, &config)).unwrap();
        assert!(saved.fits(&config).is_ok());
        for (set, setting) in [
            ("model.d_model=64", "`model.d_model`: found 64"),
            ("model.tie=none", "`model.tie`"),
            ("optimizer.kind=sgd", "`optimizer.kind`"),
            ("batch=64", "`batch`: found 64"),
            ("seed=2", "`seed`: found 2"),
            ("steps=6", "`steps`: found 6"),
        ] {
            let other = Config::parse(&config.to_toml(), &[set.to_owned()]).unwrap();
            let error = saved.fits(&other).unwrap_err().to_string();
            assert!(error.contains(setting), "{set}: {error}");
        }
        for set in [
            "grid.stages=2",
            "model.dropout=0.3",
            "model.tie=fresh",
            "microbatches=2",
            "optimizer.lr=0.5",
        ] {
            let other = Config::parse(&config.to_toml(), &[set.to_owned()]).unwrap();
            assert!(saved.fits(&other).is_ok(), "{set}");
        }
    }
}
