//! What an imported run keeps of the folder that it came from.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Checkpoint, SOURCE};
use crate::error::{Error, Result};
use crate::files;

impl Checkpoint {
    /// What its run keeps of an import.
    pub fn source(&self) -> Option<PathBuf> {
        let path = fs::canonicalize(&self.path).ok()?;
        let states = path.parent().filter(|states| states.ends_with("checkpoints"))?;
        Some(states.parent()?.join(SOURCE)).filter(|source| source.is_dir())
    }

    /// Gives the folder of another run what its run keeps of an import, and no more of another.
    ///
    /// # Errors
    /// [`Error::Unwritten`].
    pub fn carry_source(&self, out: &Path) -> Result<()> {
        let to = out.join(SOURCE);
        let from = self.source();
        let same = |from: &PathBuf| fs::canonicalize(&to).is_ok_and(|to| to == *from);
        if from.as_ref().is_some_and(same) {
            return Ok(());
        }

        let tmp = files::temporary(&to);
        let copied = || -> std::io::Result<()> {
            for old in [&to, &tmp] {
                if old.exists() {
                    fs::remove_dir_all(old)?;
                }
            }

            let Some(from) = &from else { return Ok(()) };
            fs::create_dir_all(&tmp)?;
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                files::write(&tmp.join(entry.file_name()), &files::read(&entry.path())?)?;
            }
            fs::rename(&tmp, &to)
        };
        copied().map_err(|error| Error::unwritten(&to, error))
    }
}
