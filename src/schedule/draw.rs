//! Draws a schedule as a table, time down, one column a stage, and sums it up for `ouroboros
//! schedule`.

use std::fmt::Write as _;

use super::simulate::BEFORE_DRAIN;
use super::{Action, Costs, Op, Schedule, Span, TableEnd, Tie, Violation, ideal, simulate};

/// Delays, versions and activations held, utilisation of every device, and the speed-up in the
/// steady state.
///
/// # Errors
/// As [`simulate()`].
pub fn summary(schedule: &Schedule, replicas: usize, costs: Costs) -> Result<String, Violation> {
    let ideal = ideal(schedule, costs)?;
    let grid = schedule.grid(replicas);
    let mut out = String::new();
    let list =
        |values: Vec<usize>| values.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    let stages = || 0..schedule.stages;
    let _ = writeln!(
        out,
        "schedule {}, grid {grid}, microbatches {}; forward : backward : message = {} : {} : {}",
        word(&schedule.kind),
        schedule.microbatches,
        costs.forward,
        costs.backward,
        costs.message
    );

    let tie = word(&schedule.tie);
    let _ = writeln!(out, "placement {}, tie {tie}\n", word(&schedule.placement));
    let _ = writeln!(out, "stages            {}", list(stages().collect()));
    if grid.devices() < grid.stages {
        let _ =
            writeln!(out, "devices           {}", list(stages().map(|k| grid.device(k)).collect()));
    }

    let _ = writeln!(out, "delays            {}", list(schedule.delays.clone()));
    let _ = writeln!(
        out,
        "versions held     {}",
        list(stages().map(|k| schedule.versions_held(k)).collect())
    );

    let _ = writeln!(
        out,
        "activations held  {}",
        list(stages().map(|k| schedule.activations_held(k)).collect())
    );

    out.push_str(&table_delays(schedule));
    let shares: Vec<String> = ideal.utilization.iter().map(|u| format!("{u:.2}")).collect();
    let _ = writeln!(out, "utilisation       {}", shares.join(" "));
    let _ = writeln!(out, "ideal speed-up    {:.2} of {} devices", ideal.speed_up, grid.devices());
    let _ = writeln!(
        out,
        "before a drain    {:.2} over the {BEFORE_DRAIN} steps up to a sync point",
        ideal.before_drain
    );

    if replicas > 1 {
        let _ = writeln!(
            out,
            "with replicas     {:.2} of {}",
            ideal.speed_up * replicas as f64,
            grid.size()
        );
    }

    Ok(out)
}

/// The line about a tied table's delays; nothing without a tie.
fn table_delays(schedule: &Schedule) -> String {
    let input = schedule.table_delay(TableEnd::Input);
    let head = schedule.table_delay(TableEnd::Output);
    match schedule.tie {
        Tie::Untied => String::new(),
        Tie::Head => {
            let applied = input + schedule.delays[0];
            let uses = format!("head {head}, embedding {input}");
            format!("table's delay     {uses}; its part is applied {applied} updates old\n")
        }
        _ => format!("table's delay     {input}\n"),
    }
}

/// A setting's value as it is written in a config.
pub fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default().trim_matches('"').to_owned()
}

/// The forwards, backwards and updates of one replica over time; every row is one `unit` of time,
/// at most `rows` rows. A `|` is the rest of a longer action, a `.` is an idle device; `*` marks
/// the update that follows a backward.
///
/// # Errors
/// As [`simulate()`].
pub fn draw(
    schedule: &Schedule,
    costs: Costs,
    unit: f64,
    rows: usize,
) -> Result<String, Violation> {
    let grid = schedule.grid(1);
    let lists: Vec<Vec<Action>> =
        (0..grid.devices()).map(|device| schedule.device_actions(device).collect()).collect();
    let spans = simulate(schedule, &lists, costs)?;

    let end = spans.iter().flatten().map(|s| s.end).fold(0.0, f64::max);
    let of =
        |stage: usize| spans[grid.device(stage)].iter().filter(move |s| s.action.stage == stage);
    let count = (end / unit).round() as usize;
    let shown = count.min(rows);
    let columns: Vec<Vec<String>> = (0..schedule.stages)
        .map(|stage| column(&of(stage).copied().collect::<Vec<_>>(), unit, shown))
        .collect();

    let width = columns.iter().flatten().map(String::len).max().unwrap_or(1).max(3);
    let mut out = String::from("  time ");
    for stage in 0..schedule.stages {
        let _ = write!(out, " {:>width$}", format!("k={stage}"));
    }

    for row in 0..shown {
        let _ = write!(out, "\n{:>6} ", (row as f64 * unit * 1000.0).round() / 1000.0);
        for column in &columns {
            let _ = write!(out, " {:>width$}", column[row]);
        }
    }

    if count > rows {
        let _ = write!(out, "\n   ...  ({} more rows)", count - rows);
    }

    out.push('\n');
    Ok(out)
}

/// The first cells of one stage, a unit of time each.
fn column(spans: &[Span], unit: f64, cells: usize) -> Vec<String> {
    let mut cells = vec![".".to_owned(); cells];
    for (i, span) in spans.iter().enumerate() {
        if !matches!(span.action.op, Op::Forward | Op::Backward) {
            continue;
        }

        let (first, past) =
            ((span.start / unit).round() as usize, (span.end / unit).round() as usize);
        let (op, action) = (span.action.op.code(), span.action);
        // The update may stand later in the list, but always before the stage's next forward or
        // backward that needs it.
        let updates = spans[i + 1..]
            .iter()
            .take_while(|s| !matches!(s.action.op, Op::Forward | Op::Backward))
            .any(|s| s.action.op == Op::Update);
        let mark = if updates { "*" } else { "" };
        for cell in cells.iter_mut().take(past).skip(first) {
            *cell = "|".to_owned();
        }

        if let Some(cell) = cells.get_mut(first) {
            *cell = format!("{op}{}.{}{mark}", action.step, action.microbatch);
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::ScheduleKind;

    const TIMES: Costs = Costs { forward: 1.0, backward: 1.0, message: 0.0 };

    fn drawn(kind: ScheduleKind, stages: usize, m: usize, steps: usize) -> String {
        draw(&Schedule::new(kind, stages, m, 1, SyncPoints::ends(steps)), TIMES, 1.0, 100).unwrap()
    }

    #[test]
    fn one_stage_is_plain_training() {
        insta::assert_snapshot!(drawn(ScheduleKind::Decoupled, 1, 2, 2), @r"
        time    k=0
           0   F0.0
           1   B0.0
           2   F0.1
           3  B0.1*
           4   F1.0
           5   B1.0
           6   F1.1
           7  B1.1*
        ");
    }

    #[test]
    fn two_stages_decoupled() {
        insta::assert_snapshot!(drawn(ScheduleKind::Decoupled, 2, 2, 3), @r"
        time    k=0   k=1
           0   F0.0     .
           1   F0.1  F0.0
           2      .  B0.0
           3   B0.0  F0.1
           4   F1.0 B0.1*
           5   B0.1  F1.0
           6  F1.1*  B1.0
           7   B1.0  F1.1
           8   F2.0 B1.1*
           9   B1.1  F2.0
          10  F2.1*  B2.0
          11   B2.0  F2.1
          12      . B2.1*
          13  B2.1*     .
        ");
    }

    #[test]
    fn three_stages_decoupled() {
        insta::assert_snapshot!(drawn(ScheduleKind::Decoupled, 3, 1, 5), @r"
        time    k=0   k=1   k=2
           0   F0.0     .     .
           1   F1.0  F0.0     .
           2   F2.0  F1.0  F0.0
           3      .     . B0.0*
           4      . B0.0*  F1.0
           5  B0.0*  F2.0 B1.0*
           6   F3.0 B1.0*  F2.0
           7  B1.0*  F3.0 B2.0*
           8   F4.0 B2.0*  F3.0
           9  B2.0*  F4.0 B3.0*
          10      . B3.0*  F4.0
          11  B3.0*     . B4.0*
          12      . B4.0*     .
          13  B4.0*     .     .
        ");
    }

    #[test]
    fn four_stages_of_the_four_schedules() {
        insta::assert_snapshot!(drawn(ScheduleKind::Decoupled, 4, 1, 6), @r"
        time    k=0   k=1   k=2   k=3
           0   F0.0     .     .     .
           1   F1.0  F0.0     .     .
           2   F2.0  F1.0  F0.0     .
           3   F3.0  F2.0  F1.0  F0.0
           4      .     .     . B0.0*
           5      .     . B0.0*  F1.0
           6      . B0.0*  F2.0 B1.0*
           7  B0.0*  F3.0 B1.0*  F2.0
           8   F4.0 B1.0*  F3.0 B2.0*
           9  B1.0*  F4.0 B2.0*  F3.0
          10   F5.0 B2.0*  F4.0 B3.0*
          11  B2.0*  F5.0 B3.0*  F4.0
          12      . B3.0*  F5.0 B4.0*
          13  B3.0*     . B4.0*  F5.0
          14      . B4.0*     . B5.0*
          15  B4.0*     . B5.0*     .
          16      . B5.0*     .     .
          17  B5.0*     .     .     .
        ");
        insta::assert_snapshot!(drawn(ScheduleKind::OneForwardOneBackward, 4, 4, 1), @r"
        time    k=0   k=1   k=2   k=3
           0   F0.0     .     .     .
           1   F0.1  F0.0     .     .
           2   F0.2  F0.1  F0.0     .
           3   F0.3  F0.2  F0.1  F0.0
           4      .     .     .  B0.0
           5      .     .  B0.0  F0.1
           6      .  B0.0  F0.2  B0.1
           7   B0.0  F0.3  B0.1  F0.2
           8      .  B0.1  F0.3  B0.2
           9   B0.1     .  B0.2  F0.3
          10      .  B0.2     . B0.3*
          11   B0.2     . B0.3*     .
          12      . B0.3*     .     .
          13  B0.3*     .     .     .
        ");
        insta::assert_snapshot!(drawn(ScheduleKind::Gpipe, 4, 3, 1), @r"
        time    k=0   k=1   k=2   k=3
           0   F0.0     .     .     .
           1   F0.1  F0.0     .     .
           2   F0.2  F0.1  F0.0     .
           3      .  F0.2  F0.1  F0.0
           4      .     .  F0.2  F0.1
           5      .     .     .  F0.2
           6      .     .     .  B0.0
           7      .     .  B0.0  B0.1
           8      .  B0.0  B0.1 B0.2*
           9   B0.0  B0.1 B0.2*     .
          10   B0.1 B0.2*     .     .
          11  B0.2*     .     .     .
        ");
        insta::assert_snapshot!(drawn(ScheduleKind::Sequential, 4, 2, 1), @r"
        time    k=0   k=1   k=2   k=3
           0   F0.0     .     .     .
           1      .  F0.0     .     .
           2      .     .  F0.0     .
           3      .     .     .  F0.0
           4      .     .     .  B0.0
           5      .     .  B0.0     .
           6      .  B0.0     .     .
           7   B0.0     .     .     .
           8   F0.1     .     .     .
           9      .  F0.1     .     .
          10      .     .  F0.1     .
          11      .     .     .  F0.1
          12      .     .     . B0.1*
          13      .     . B0.1*     .
          14      . B0.1*     .     .
          15  B0.1*     .     .     .
        ");
    }

    #[test]
    fn the_summary_shows_delays_and_speed_up() {
        let schedule = Schedule::new(ScheduleKind::Decoupled, 11, 8, 1, SyncPoints::ends(1));
        let text = summary(&schedule, 1, Costs { backward: 2.0, ..TIMES }).unwrap();
        assert!(text.contains("delays            2 2 1 1 1 1 1 1 1 1 0"), "{text}");
        assert!(text.contains("ideal speed-up    11.00 of 11"), "{text}");
    }
}
