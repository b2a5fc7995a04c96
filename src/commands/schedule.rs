//! `ouroboros schedule`: delays, memory and ideal speed-up of a schedule, and its drawing.

use std::path::Path;

use clap::ValueEnum;

use crate::cli::ScheduleArgs;
use crate::delay::SyncPoints;
use crate::error::{Error, Result};
use crate::files;
use crate::schedule::{Costs, Schedule, ScheduleKind, draw, picture, summary};

/// Prints the summary and the drawing.
///
/// # Errors
/// [`Error::Config`] for numbers that make no schedule.
pub fn schedule(args: &ScheduleArgs) -> Result<()> {
    let costs = times(&args.times)?;
    for (name, value, least, most) in [
        ("--microbatches", args.microbatches, 1, 1 << 12),
        ("--slack", args.slack, 1, 1 << 12),
        ("--steps", args.steps, 0, 1 << 12),
        ("--rows", args.rows, 0, 1 << 16),
        ("the stages of --grid", args.grid.stages, 1, 1 << 9),
    ] {
        if !(least..=most).contains(&value) {
            return Err(Error::config(
                name,
                value,
                format!("what can be drawn is from {least} to {most}"),
            ));
        }
    }

    let ends = SyncPoints::ends(args.steps);
    args.placement
        .check(args.grid.stages)
        .map_err(|found| Error::config("--placement", "ring", found))?;
    let mut schedule =
        Schedule::new(args.schedule, args.grid.stages, args.microbatches, args.slack, ends);
    (schedule.placement, schedule.tie) = (args.placement, args.tie);
    if let Some(path) = args.svg.as_ref().filter(|path| files::is_stdout(path)) {
        return write_picture(&schedule, args, costs, path);
    }

    let fault = |fault: crate::schedule::Violation| Error::Internal(format!("schedule: {fault}"));
    put!("{}", summary(&schedule, args.grid.replicas, costs).map_err(fault)?);
    if args.steps > 0 {
        // A row is the shortest action; messages move between rows.
        let shares = (0..args.grid.stages).map(|stage| schedule.device_fraction(stage));
        let unit = costs.forward.min(costs.backward) * shares.fold(1.0, f64::min);
        say!(
            "\nF = forward, B = backward, step.microbatch; * = followed by the update; . = idle\n"
        );

        put!("{}", draw(&schedule, costs, unit, args.rows).map_err(fault)?);
    }

    match &args.svg {
        Some(path) => write_picture(&schedule, args, costs, path),
        None => Ok(()),
    }
}

/// Draws the schedule and below it the others of the same grid.
fn write_picture(
    schedule: &Schedule,
    args: &ScheduleArgs,
    costs: Costs,
    path: &Path,
) -> Result<()> {
    if args.steps == 0 {
        return Err(Error::config("--steps", 0, "a picture needs a step at least"));
    }

    // One stage at a time takes so long that the others could not be read beside it.
    let shown =
        |kind: &&ScheduleKind| **kind != args.schedule && **kind != ScheduleKind::Sequential;
    let others = ScheduleKind::value_variants().iter().filter(shown);
    let of = |kind: &ScheduleKind| {
        let ends = SyncPoints::ends(args.steps);
        let mut other = Schedule::new(*kind, args.grid.stages, args.microbatches, args.slack, ends);
        (other.placement, other.tie) = (args.placement, args.tie);
        other
    };

    let all: Vec<Schedule> = std::iter::once(schedule.clone()).chain(others.map(of)).collect();
    let text =
        picture(&all, costs).map_err(|fault| Error::Internal(format!("schedule: {fault}")))?;
    let apart = files::put(path, text.as_bytes()).map_err(|error| {
        Error::config("--svg", path.display(), format!("cannot be written ({error})"))
    })?;
    if apart {
        say!("\npicture: {}", path.display());
    }
    Ok(())
}

fn times(text: &str) -> Result<Costs> {
    let wrong = || {
        Error::config(
            "--times",
            format!("`{text}`"),
            "write forward:backward:message, as in 1:2:0.1",
        )
    };

    let numbers: Vec<f64> =
        text.split(':').map(|n| n.parse().map_err(|_| wrong())).collect::<Result<_>>()?;
    match numbers[..] {
        [forward, backward, message]
            if forward > 0.0
                && backward > 0.0
                && message >= 0.0
                && numbers.iter().all(|n| n.is_finite()) =>
        {
            Ok(Costs { forward, backward, message })
        }
        _ => Err(wrong()),
    }
}
