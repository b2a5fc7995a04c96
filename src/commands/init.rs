//! `ouroboros init`: the weights that a training begins with.

use std::path::Path;
use std::time::Duration;

use crate::checkpoint::{self, Manifest, Snapshot};
use crate::cli::InitArgs;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::lock::FolderLock;
use crate::model;
use crate::params::Layout;
use crate::setup::Setup;

/// Writes `checkpoints/step-0` of a config's run: one file with every parameter, whatever the grid.
///
/// # Errors
/// A config that cannot be used, or a file that cannot be written.
pub fn init(args: &InitArgs) -> Result<()> {
    let setup = Setup::new(Config::load(&args.config, &args.set, None)?)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("runs").join(&setup.config.name));
    let unwritten =
        |error| Error::config("--out", out.display(), format!("cannot be made ({error})"));
    std::fs::create_dir_all(&out).map_err(unwritten)?;
    let _lock = FolderLock::take(&out)?;

    let layout = Layout::new(&model::parameters(&setup.dimensions));
    let weights = layout.initial(setup.config.seed)?;
    let mut snapshot = Snapshot::new(Place { stage: 0, replica: 0 }, 0, 1);
    snapshot.add_weights(&layout, &weights)?;
    let shards = snapshot.write(&out, Duration::ZERO)?.shards;
    let manifest = Manifest::new(
        &setup.config,
        Some(setup.corpus.fingerprint().clone()),
        setup.parameters(),
        0,
        setup.pipeline(0),
        shards,
    );

    say!("{}", checkpoint::complete(&out, &manifest, &setup.corpus.vocabulary)?.display());
    Ok(())
}
