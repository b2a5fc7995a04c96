//! The losses of a study's variants over their tokens, as a picture.

use std::path::Path;

use plotters::prelude::*;

use crate::palette::COLORS;

/// A variant's mean held-out losses, nats a token, after so many tokens.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (900, 540);
const FONT: (&str, u32) = ("sans-serif", 15);
/// Losses above the middle one by more than so many times the way from it to the least are of the
/// first steps, and would flatten the rest.
const HEADROOM: f64 = 1.6;

/// Draws the curves as an SVG file.
///
/// # Errors
/// What the file system reports.
pub fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<(), String> {
    let points = || curves.iter().flat_map(|curve| curve.points.iter().copied());
    let mut losses: Vec<f64> = points().map(|(_, loss)| loss).collect();
    losses.sort_by(f64::total_cmp);
    let tokens = points().map(|(tokens, _)| tokens).fold(0.0, f64::max);
    let (Some(least), Some(middle)) = (losses.first(), losses.get(losses.len() / 2)) else {
        return Ok(());
    };

    let most = losses.last().copied().unwrap_or(*middle).min(middle + HEADROOM * (middle - least));
    let margin = ((most - least) * 0.05).max(1e-3);

    let picture = || -> Result<(), DrawingAreaErrorKind<_>> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..tokens, least - margin..most + margin)?;
        let style = |value: &f64| format!("{value:.2}");
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .label_style(FONT)
            .x_desc("tokens")
            .y_desc("held-out loss, nats a token")
            .x_label_formatter(&|tokens| {
                if *tokens < 1e4 { format!("{tokens:.0}") } else { format!("{:.0}k", tokens / 1e3) }
            })
            .y_label_formatter(&style)
            .draw()?;

        for (i, curve) in curves.iter().enumerate() {
            let color = COLORS[i % COLORS.len()];
            let shown = curve.points.iter().copied().filter(|(_, loss)| *loss <= most);
            chart
                .draw_series(LineSeries::new(shown, color.stroke_width(2)).point_size(2))?
                .label(curve.name.clone())
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .label_font(FONT)
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        area.present()
    };

    picture().map_err(|error| error.to_string())
}
