//! Draws schedules below each other as a picture (SVG): time to the right, a row for every device, so
//! that they can be compared.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Action, Costs, Op, Schedule, Span, Violation, ideal, simulate, word};
use crate::palette::COLORS;

/// Pixels: of the whole picture, of what stands left of the rows, of a row, a title, a gap.
const WIDTH: u32 = 1120;
const LEFT: i32 = 84;
const RIGHT: i32 = 16;
const ROW: i32 = 26;
const TITLE: i32 = 30;
const GAP: i32 = 18;
const AXIS: i32 = 40;

/// Blocks narrower than so many pixels have no text, and no frame, which would be most of them.
const LABELLED: i32 = 22;
const FRAMED: i32 = 6;

/// Height of the line under the blocks of a device's further stage.
const FOOT: i32 = 3;

/// One schedule, as it is drawn.
struct Panel {
    title: String,
    /// The blocks of every device.
    rows: Vec<Vec<Span>>,
    end: f64,
}

/// The picture of schedules of one model and costs.
///
/// # Errors
/// As [`simulate()`].
pub fn picture(schedules: &[Schedule], costs: Costs) -> Result<String, Violation> {
    let panels: Vec<Panel> =
        schedules.iter().map(|schedule| panel(schedule, costs)).collect::<Result<_, _>>()?;
    let end = panels.iter().map(|panel| panel.end).fold(0.0, f64::max);
    let height: i32 =
        panels.iter().map(|panel| TITLE + panel.rows.len() as i32 * ROW + GAP).sum::<i32>() + AXIS;

    let mut text = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut text, (WIDTH, height as u32)).into_drawing_area();
        draw(&area, &panels, end)
    };
    drawn.map_err(|error| Violation(error.to_string()))?;
    Ok(text)
}

fn panel(schedule: &Schedule, costs: Costs) -> Result<Panel, Violation> {
    let grid = schedule.grid(1);
    let lists: Vec<Vec<Action>> =
        (0..grid.devices()).map(|device| schedule.device_actions(device).collect()).collect();
    let mut rows = simulate(schedule, &lists, costs)?;
    rows.iter_mut().for_each(|row| row.retain(|span| span.action.op.computes()));

    let end = rows.iter().flatten().map(|span| span.end).fold(0.0, f64::max);
    let steady = ideal(schedule, costs)?;
    let idle = 100.0 * (1.0 - steady.speed_up / grid.devices() as f64);
    let m = schedule.microbatches;
    let title = format!(
        "{}, {} microbatch{} a step: idle {idle:.0} % of the time in the steady state",
        word(&schedule.kind),
        m,
        if m == 1 { "" } else { "es" }
    );
    Ok(Panel { title, rows, end })
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    area: &Area,
    panels: &[Panel],
    end: f64,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    area.fill(&WHITE)?;
    let scale = f64::from(WIDTH as i32 - LEFT - RIGHT) / end.max(f64::MIN_POSITIVE);
    let x = |time: f64| LEFT + (time * scale).round() as i32;
    let title = ("sans-serif", 16).into_font().color(&BLACK);
    let small = ("sans-serif", 13).into_font();
    let beside = small.color(&BLACK).pos(Pos::new(HPos::Right, VPos::Center));

    let mut top = 0;
    for panel in panels {
        area.draw(&Text::new(panel.title.clone(), (LEFT, top + 10), title.clone()))?;
        top += TITLE;
        for (device, row) in panel.rows.iter().enumerate() {
            let middle = top + ROW / 2;
            area.draw(&Text::new(format!("device {device}"), (LEFT - 8, middle), beside.clone()))?;
            let ground = [(LEFT, top + 1), (x(panel.end), top + ROW - 1)];
            area.draw(&Rectangle::new(ground, RGBColor(238, 238, 238).filled()))?;
            let first = row.iter().map(|span| span.action.stage).min();
            for span in row {
                let corners = [(x(span.start), top + 1), (x(span.end), top + ROW - 1)];
                block(area, span, corners)?;
                if first != Some(span.action.stage) {
                    let foot = [(corners[0].0, corners[1].1 - FOOT), corners[1]];
                    area.draw(&Rectangle::new(foot, BLACK.filled()))?;
                }
            }
            top += ROW;
        }
        top += GAP;
    }

    let ring = panels
        .iter()
        .flat_map(|panel| &panel.rows)
        .any(|row| row.windows(2).any(|pair| pair[0].action.stage != pair[1].action.stage));
    let legend = format!(
        "time, left to right; forwards pale, backwards full, a colour for every step; step.microbatch; grey: idle{}",
        if ring { "; underlined: the device's last stage" } else { "" }
    );
    area.draw(&Text::new(legend, (LEFT, top + 6), small.color(&BLACK)))?;
    area.present()
}

/// A forward, pale, or a backward; a colour for every step in turn.
fn block(
    area: &Area,
    span: &Span,
    [from, to]: [(i32, i32); 2],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let color = COLORS[span.action.step % COLORS.len()];
    let forward = span.action.op == Op::Forward;
    let strength = if forward { 0.35 } else { 0.95 };
    area.draw(&Rectangle::new([from, to], color.mix(strength).filled()))?;
    if to.0 - from.0 >= FRAMED {
        area.draw(&Rectangle::new([from, to], WHITE.stroke_width(1)))?;
    }
    if to.0 - from.0 < LABELLED {
        return Ok(());
    }

    let ink = if forward { BLACK } else { WHITE };
    let style = ("sans-serif", 12).into_font().color(&ink);
    let style = style.pos(Pos::new(HPos::Center, VPos::Center));
    let label = format!("{}.{}", span.action.step, span.action.microbatch);
    area.draw(&Text::new(label, ((from.0 + to.0) / 2, (from.1 + to.1) / 2), style))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::ScheduleKind;

    #[test]
    fn every_forward_and_backward_is_a_block() {
        let kinds = [ScheduleKind::Decoupled, ScheduleKind::Gpipe];
        let of = |kind| Schedule::new(kind, 3, 2, 1, SyncPoints::ends(4));
        let costs = Costs { forward: 1.0, backward: 2.0, message: 0.0 };
        let text = picture(&kinds.map(of), costs).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        // Of each schedule: every block filled and framed, and a ground for every device.
        let blocks = 2 * 3 * 4 * 2 * 2;
        assert_eq!(text.matches("<rect").count(), 1 + 2 * blocks + 2 * 3);
        assert!(text.contains("decoupled, 2 microbatches a step: idle 0 %"));
        assert!(text.contains("gpipe, 2 microbatches a step: idle 50 %"), "{text}");
    }
}
