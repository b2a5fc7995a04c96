//! A study as its file has it, and the runs that it calls for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::times::{StepTimes, TimeConfig};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::files;
use crate::setup::plan::schedule;

/// A study: `studies/*.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Names the study and its files.
    pub name: String,
    /// The config that all variants change, relative to the study's folder.
    pub base: PathBuf,
    /// Keys over the base in every variant, as `--set` takes them.
    #[serde(default)]
    pub set: Vec<String>,
    /// Learning rates that each variant chooses its best of, at the first seed.
    pub rates: Vec<f64>,
    /// Paired: the same weights and data in every variant.
    pub seeds: Vec<u64>,
    /// Shares of the steps at which the references are run too, each with its whole own rate
    /// schedule: what a token is worth.
    #[serde(default = "default_shares")]
    pub shares: Vec<f64>,
    /// A document, relative to the study's folder, that quotes the table of findings between `<!--
    /// study NAME -->` and `<!-- end -->`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quoted: Option<PathBuf>,
    /// What a step takes.
    #[serde(default)]
    pub time: TimeConfig,
    #[serde(rename = "variant")]
    pub list: Vec<Variant>,
    /// Where the file lies.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// One way to run the base.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    pub name: String,
    #[serde(default)]
    pub set: Vec<String>,
    /// Learning rates of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<Vec<f64>>,
    /// The variant without delay that this one is compared with; none: it is such a reference
    /// itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<String>,
    /// What an update of a stage takes, where it is not that of `[time]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update: Option<f64>,
    /// Another variant, whose losses are subtracted seed by seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beside: Option<String>,
    /// The largest token tax that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal_tax: Option<f64>,
    /// The least speed-up over 1F1B to a loss that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goal_speed_up: Option<f64>,
    /// Whether its losses may not be above those of `beside` by more than the interval.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub goal_not_worse: bool,
}

/// One training.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// The name of its folder.
    pub id: String,
    pub sets: Vec<String>,
}

fn default_shares() -> Vec<f64> {
    vec![0.7, 0.85, 1.0, 1.15]
}

impl Variant {
    /// Whether others are compared with it.
    pub fn is_reference(&self) -> bool {
        self.against.is_none()
    }

    /// Its name as a part of a folder's.
    pub fn folder(&self) -> String {
        self.name.replace(|c: char| !c.is_alphanumeric(), "_")
    }
}

impl Plan {
    /// Reads and checks a study.
    ///
    /// # Errors
    /// [`Error::Config`] about `STUDY` or a key of it.
    pub fn load(path: &Path) -> Result<Plan> {
        let wrong = |problem: String| Error::config("STUDY", path.display(), problem);
        let text = std::fs::read_to_string(path)
            .map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let mut plan: Plan =
            toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
        plan.folder = path.parent().unwrap_or(Path::new(".")).to_owned();
        plan.base = plan.folder.join(&plan.base);
        plan.check()?;
        Ok(plan)
    }

    /// All variants, in their order.
    pub fn variants(&self) -> impl Iterator<Item = &Variant> {
        self.list.iter()
    }

    /// The rates that a variant is searched over.
    pub fn rates_of<'a>(&'a self, variant: &'a Variant) -> &'a [f64] {
        variant.rates.as_deref().unwrap_or(&self.rates)
    }

    /// Whether a rate is the lowest or the highest of those that a variant was searched over, if it
    /// was searched.
    pub fn at_edge(&self, variant: &Variant, rate: f64) -> bool {
        let rates = self.rates_of(variant);
        let inside =
            rates.iter().any(|other| *other < rate) && rates.iter().any(|other| *other > rate);
        rates.len() > 1 && !inside
    }

    /// What a step of a variant takes.
    ///
    /// # Errors
    /// As [`Plan::config`], and [`Error::Config`] about `time` or the variant's update.
    pub fn times_of(&self, variant: &Variant) -> Result<StepTimes> {
        let update = variant.update.unwrap_or(self.time.update);
        let time = TimeConfig { update, ..self.time.clone() };
        StepTimes::new(&time, &self.folder, &self.config(variant)?)
    }

    /// The runs of a variant's search at one seed.
    ///
    /// # Errors
    /// As [`Plan::config`].
    pub fn searched(&self, variant: &Variant, seed: u64) -> Result<Vec<Run>> {
        self.rates_of(variant).iter().map(|rate| self.run(variant, *rate, seed, 1.0)).collect()
    }

    /// The best of a variant's rates by the losses of its search.
    ///
    /// # Errors
    /// As `loss`, and [`Error::Config`] if the variant has diverged at every rate.
    pub fn best_of(
        &self,
        variant: &Variant,
        loss: impl Fn(&Run) -> Result<f64>,
        seed: u64,
    ) -> Result<f64> {
        let mut best = None;
        let mut least = f64::INFINITY;
        for rate in self.rates_of(variant) {
            let loss = loss(&self.run(variant, *rate, seed, 1.0)?)?;
            if loss < least {
                (least, best) = (loss, Some(*rate));
            }
        }

        let setting = format!("variant.{}", variant.name);
        best.ok_or_else(|| {
            Error::config(
                setting,
                "a loss that diverges at each of its rates",
                "add smaller `rates`",
            )
        })
    }

    /// One training of a variant, over a share of the steps and of the warm-up.
    ///
    /// # Errors
    /// As [`Plan::config`].
    pub fn run(&self, variant: &Variant, rate: f64, seed: u64, share: f64) -> Result<Run> {
        let id = format!("{}-lr{rate:?}-seed{seed}-x{share}", variant.folder());
        let mut sets: Vec<String> = self.set.iter().chain(&variant.set).cloned().collect();
        sets.push(format!("optimizer.lr={rate:?}"));
        sets.push(format!("seed={seed}"));
        if share != 1.0 {
            let config = self.config(variant)?;
            let of = |steps: usize| (steps as f64 * share).round() as usize;
            sets.push(format!("steps={}", of(config.steps).max(1)));
            sets.push(format!("optimizer.warmup={}", of(config.optimizer.common.warmup)));
        }

        Ok(Run { id, sets })
    }

    /// The config of a variant.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be read.
    pub fn config(&self, variant: &Variant) -> Result<Config> {
        let sets: Vec<String> = self.set.iter().chain(&variant.set).cloned().collect();
        Config::load(&self.base, &sets, None)
    }

    fn check(&self) -> Result<()> {
        if !files::is_plain_name(&self.name) {
            let found = format!("`{}`", self.name.escape_debug());
            return Err(Error::config(
                "name",
                found,
                "files of this name are written: write a plain name",
            ));
        }

        check_list("rates", &self.rates)?;
        check_list("seeds", &self.seeds)?;
        check_list("shares", &self.shares)?;
        if self.list.is_empty() {
            return Err(Error::config("variant", "an empty list", "a study needs at least one"));
        }

        if let Some(share) = self.shares.iter().find(|share| !(**share > 0.0 && **share <= 4.0)) {
            return Err(Error::config("shares", share, "must be above 0 and at most 4"));
        }

        self.time.check()?;

        if self.config(&self.list[0])?.eval.is_none() {
            return Err(Error::config(
                "eval",
                "none",
                "a study compares held-out losses; set eval.every in its `set`",
            ));
        }

        for (i, variant) in self.list.iter().enumerate() {
            let setting = format!("variant.{}", variant.name);
            if self.list[..i].iter().any(|before| before.folder() == variant.folder()) {
                return Err(Error::config(
                    setting,
                    "twice",
                    "every variant needs a name of its own",
                ));
            }

            let reference = variant.against.as_ref().map(|name| self.reference(name)).transpose();
            reference.map_err(|remedy| {
                Error::config(format!("{setting}.against"), "no reference", remedy)
            })?;

            check_list(&format!("{setting}.rates"), self.rates_of(variant))?;
            self.check_goals(variant, &setting)?;
            self.check_comparable(variant)?;
            self.check_reference(variant, &setting)?;
            self.check_update(variant, &setting)?;
            self.times_of(variant)?;
        }

        Ok(())
    }

    /// Whether a variant's own time of an update is one, beside times that are given.
    fn check_update(&self, variant: &Variant, setting: &str) -> Result<()> {
        let Some(update) = variant.update else { return Ok(()) };
        let setting = format!("{setting}.update");
        Error::unless(update >= 0.0, &setting, update, "must be 0 or more")?;
        let remedy = "`time.profile` has the times of updates; leave one of them out";
        Error::unless(self.time.profile.is_none(), &setting, update, remedy)
    }

    /// Whether a variant without `against` has no delays.
    fn check_reference(&self, variant: &Variant, setting: &str) -> Result<()> {
        let delays = schedule(&self.config(variant)?)?.delays;
        if !variant.is_reference() || delays.iter().all(|delay| *delay == 0) {
            return Ok(());
        }

        let found = format!("none, and delays {delays:?}");
        Err(Error::config(
            format!("{setting}.against"),
            found,
            "name a variant without delay that it is compared with",
        ))
    }

    fn check_goals(&self, variant: &Variant, setting: &str) -> Result<()> {
        let compared = variant.goal_tax.is_some() || variant.goal_speed_up.is_some();
        if compared && variant.is_reference() {
            let remedy =
                "a token tax is told against a variant without delay; name one in `against`";
            return Err(Error::config(format!("{setting}.against"), "none, and a goal", remedy));
        }

        let Some(beside) = &variant.beside else {
            let goal = format!("{setting}.goal_not_worse");
            return match variant.goal_not_worse {
                true => {
                    Err(Error::config(goal, true, "than what? name another variant in `beside`"))
                }
                false => Ok(()),
            };
        };

        match self.list.iter().any(|other| other.name == *beside && other.name != variant.name) {
            true => Ok(()),
            false => Err(Error::config(
                format!("{setting}.beside"),
                beside,
                "name another variant of the study",
            )),
        }
    }

    /// The reference of this name; what to do if there is none.
    pub fn reference(&self, name: &str) -> std::result::Result<&Variant, String> {
        let found = self.list.iter().find(|other| other.name == name && other.is_reference());
        found.ok_or_else(|| format!("name a variant without `against`, as `{name}` is not"))
    }

    /// Whether a variant reads the same tokens as the first one, and is evaluated on the same.
    fn check_comparable(&self, variant: &Variant) -> Result<()> {
        let (first, other) = (self.config(&self.list[0])?, self.config(variant)?);
        other.check()?;
        let differs = [
            ("steps", first.steps != other.steps),
            ("batch", first.batch != other.batch),
            ("data", first.data != other.data),
            ("eval", first.eval != other.eval),
            ("seed", first.seed != other.seed),
        ];

        match differs.into_iter().find(|(_, differs)| *differs) {
            None => Ok(()),
            Some((key, _)) => {
                let found = format!("another {key} than variant {}", self.list[0].name);
                let remedy =
                    "variants of a study read and are evaluated on the same tokens; set it for all";
                Err(Error::config(format!("variant.{}", variant.name), found, remedy))
            }
        }
    }
}

/// A list of a study has values, none of them twice.
fn check_list<T: PartialEq + std::fmt::Debug>(setting: &str, values: &[T]) -> Result<()> {
    if values.is_empty() {
        return Err(Error::config(setting, "an empty list", "a study needs at least one"));
    }
    let twice = values.iter().enumerate().find(|(i, value)| values[..*i].contains(value));
    twice.map_or(Ok(()), |(_, value)| {
        Err(Error::config(setting, format!("{value:?} twice"), "give each value once"))
    })
}
