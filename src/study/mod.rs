//! `ouroboros study`: what delay costs, measured: variants of one run beside each other, each at
//! its best learning rate, over paired seeds (the same weights, the same data).
//!
//! ```text
//! search   every variant x every rate, at the first seed               -> the best rate of each variant
//! seeds    every variant at its best rate x the other seeds            -> losses, paired differences
//! tax      each reference at its best rate, at shares of the steps     -> the tokens to a loss
//! ```
//!
//! Every run is the oracle in a process of its own, so a study needs no more devices than there are
//! cores; what is done is kept in the study's folder, and a study that was killed does the rest.

mod curves;
mod times;
mod plan;
mod runs;
mod statistics;
mod findings;
mod report;
mod quotes;

use std::path::{Path, PathBuf};

pub use plan::{Plan, Variant};

use crate::error::{Error, Result};
use findings::Findings;
use plan::Run;
use quotes::Quoted;
use runs::Runs;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub study: PathBuf,
    /// [default: runs/NAME-study].
    pub out: Option<PathBuf>,
    /// Runs at once; none: one a core.
    pub jobs: Option<usize>,
    /// Whether a goal that is missed is a failure.
    pub check: bool,
}

/// The exit code of a study whose goals are missed.
const MISSED: u8 = 1;

/// Makes all runs of a study that are not made yet, and writes what comes of them; the exit code.
///
/// # Errors
/// A study that cannot be used, a run that fails, a folder that cannot be written.
pub fn study(request: &Request) -> Result<u8> {
    let plan = Plan::load(&request.study)?;
    let out = request
        .out
        .clone()
        .unwrap_or_else(|| Path::new("runs").join(format!("{}-study", plan.name)));
    let jobs = match request.jobs {
        Some(0) => return Err(Error::config("--jobs", 0, "must be at least 1")),
        Some(jobs) => jobs,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };

    let document = plan.quoted.as_ref().filter(|_| request.check);
    let quoted = document
        .map(|document| Quoted::read(&plan.folder.join(document), &plan.name))
        .transpose()?;

    let mut runs = Runs::open(&out, &plan, jobs)?;
    runs.estimate(&plan)?;
    let first = plan.seeds[0];

    let search: Vec<Vec<Run>> =
        plan.variants().map(|variant| plan.searched(variant, first)).collect::<Result<_>>()?;
    runs.make(&search.concat())?;
    let best: Vec<f64> = plan
        .variants()
        .map(|variant| runs.best_rate(&plan, variant, first))
        .collect::<Result<_>>()?;

    let mut rest = Vec::new();
    for (variant, rate) in plan.variants().zip(&best) {
        for seed in &plan.seeds {
            let shares =
                plan.shares.iter().filter(|share| variant.is_reference() && **share != 1.0);
            for share in shares.chain([&1.0]) {
                rest.push(plan.run(variant, *rate, *seed, *share)?);
            }
        }
    }

    runs.make(&rest)?;

    let findings = Findings::new(&plan, &best, &runs)?;
    findings.write(&out)?;
    put!("{}", findings.table());
    let mut missed = findings.missed();
    missed.extend(quoted.iter().flat_map(|quoted| quoted.missed(&findings)));
    missed.iter().for_each(|text| say!("missed: {text}"));
    Ok(if request.check && !missed.is_empty() { MISSED } else { 0 })
}
