//! Errors that all ranks must hear of before the training starts.

use crate::comm::mpi::{self, World};
use crate::error::{Error, Result};
use crate::failure::{caught, show};

/// Shows an error that all ranks have found, once, and leaves; under mpirun all ranks must come
/// here.
pub fn refuse(error: &Error) -> u8 {
    if mpi::launched().is_some_and(|(size, _)| size > 1)
        && let Ok(world) = World::start()
    {
        let _ = agree(&world, Some(error));
        world.finish();
    } else {
        show(None, error);
    }

    error.exit_code()
}

/// Does `work` on every rank, then tells all ranks whether it went well on all of them.
pub(super) fn together<T>(
    world: &World,
    work: impl FnOnce() -> Result<T>,
) -> std::result::Result<T, u8> {
    let result = caught(work);
    let code = agree(world, result.as_ref().err());
    result.map_err(|error| error.exit_code()).and_then(|value| code.map_or(Ok(value), Err))
}

/// Tells all ranks of each other's errors; rank 0 shows the first, once. The exit code, if there is
/// an error.
fn agree(world: &World, error: Option<&Error>) -> Option<u8> {
    let mine = error.map(|error| (error.exit_code(), error.to_string()));
    let bytes = serde_json::to_vec(&mine).unwrap_or_default();
    let all = match world.all_gather(bytes) {
        Ok(all) => all,
        Err(error) => {
            show(None, &error);
            return Some(error.exit_code());
        }
    };

    let errors: Vec<Option<(u8, String)>> =
        all.iter().map(|bytes| serde_json::from_slice(bytes).unwrap_or(None)).collect();
    let first = errors.iter().flatten().next()?;
    if world.identity.rank == 0 {
        // What other ranks say besides is most often the same thing seen from there.
        let everywhere =
            errors.iter().all(|error| error.as_ref().is_some_and(|(_, text)| *text == first.1));
        let rank = errors.iter().position(Option::is_some).unwrap_or(0);
        let origin = if everywhere || rank == 0 { String::new() } else { format!("rank {rank}: ") };
        complain!("error: {origin}{}", first.1);
    }

    Some(first.0)
}
