//! `ouroboros report`: what runs have left in their folders, as one page that explains itself. Nothing
//! in the folders is changed but the page.
//!
//! ```text
//! RUN/metrics.jsonl, events.jsonl, places.json, config.toml --> history --> figures --> page --> report.html
//!                                                                             |  proof: other schedules with these times
//!                                                                             |  compare: runs beside each other
//! ```

mod history;
mod phase;
mod processes;
mod thin;
mod proof;
mod figures;
mod compare;
mod chart;
mod page;

use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::json;

pub use figures::Figures;
pub use history::{History, StepPoint};
pub use phase::Phase;
pub use thin::thin;

use crate::error::{Error, Result};
use crate::files;
use compare::Comparison;

/// Files of a run that no page may replace.
const WRITTEN: [&str; 8] = [
    "metrics.jsonl",
    "metrics.previous.jsonl",
    "events.jsonl",
    "places.json",
    "config.toml",
    "metrics.prom",
    "bench.json",
    "lock",
];

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub runs: Vec<PathBuf>,
    /// The page; none: report.html in the first run's folder.
    pub out: Option<PathBuf>,
    /// Print the figures instead.
    pub json: bool,
}

/// Makes the page, or prints the figures.
///
/// # Errors
/// [`Error::Data`] for a folder that is no run's, [`Error::Config`] about `-o`.
pub fn report(request: &Request) -> Result<()> {
    let mut runs: Vec<Figures> =
        request.runs.par_iter().map(|folder| Figures::read(folder)).collect::<Result<_>>()?;
    rename_twins(&mut runs);
    let comparison = Comparison::new(&runs);
    if request.json {
        let text =
            serde_json::to_string(&json!({"version": 1, "runs": runs, "comparison": comparison}))
                .map_err(|error| Error::Internal(error.to_string()))?;
        say!("{text}");
        return Ok(());
    }

    let page = page::page(&runs, &comparison);
    let name = request.out.as_ref().and_then(|path| path.file_name());
    if let Some(name) = name.and_then(|name| name.to_str()).filter(|name| WRITTEN.contains(name)) {
        let remedy = "a run writes files of this name; choose another";
        return Err(Error::config("-o", name, remedy));
    }

    // The folder may have come from elsewhere, with a link of that name.
    let path = request.out.clone().unwrap_or_else(|| request.runs[0].join("report.html"));
    let written = match request.out {
        Some(_) => files::put(&path, page.as_bytes()),
        None => files::replace(&path, page.as_bytes()).map(|()| true),
    };
    let apart = written.map_err(|error| {
        Error::config(
            "-o",
            path.display(),
            format!("cannot be written ({error}); choose another file"),
        )
    })?;
    if apart {
        say!("{}: {} KiB, opens in a browser", path.display(), page.len().div_ceil(1024));
    }
    runs.iter().flat_map(|run| &run.notes).for_each(|note| complain!("note: {note}"));
    Ok(())
}

/// Runs of one name get their folders' instead.
fn rename_twins(runs: &mut [Figures]) {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for run in runs {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name.clone_from(&run.folder);
        }
    }
}
