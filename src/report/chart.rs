//! The charts of a report, as SVG that takes its ink from the page around it, each with the numbers
//! that it shows.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Serialize;

use crate::palette::COLORS;

/// Width and height of a chart with axes, in units of its own.
const SIZE: (u32, u32) = (760, 380);

/// Points of a curve that are ringed.
const RINGS: usize = 30;

/// Of a group of bars with its name.
const GROUP: u32 = 140;

/// Ink that the page chooses: it stands nowhere else.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_AS_TEXT: &str = "#010203";

/// More colours for many runs, that can be told apart on light and on dark ground.
const MORE: [RGBColor; 4] = [
    RGBColor(148, 103, 189),
    RGBColor(160, 100, 80),
    RGBColor(127, 127, 127),
    RGBColor(160, 160, 30),
];

/// Losses of the first part of a run would flatten the rest: one part of so many is not looked at.
const FIRST: usize = 10;

type Drawn<'a> = DrawingAreaErrorKind<std::io::Error>;

/// A curve.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    #[serde(skip)]
    pub color: usize,
    #[serde(skip)]
    pub form: Form,
}

/// How a curve is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Line,
    /// Thin and pale, behind a line.
    Pale,
    /// Points that are ringed, on a thin line.
    Dots,
}

/// What a page needs of a chart.
#[derive(Debug)]
pub struct Chart {
    pub svg: String,
    /// For the values on hover and the table.
    pub data: serde_json::Value,
}

/// The colour of a curve or bar.
fn color(number: usize) -> RGBColor {
    let number = number % (COLORS.len() + MORE.len());
    COLORS.get(number).copied().unwrap_or_else(|| MORE[number - COLORS.len()])
}

/// The same as CSS has it.
pub fn css(number: usize) -> String {
    let RGBColor(r, g, b) = color(number);
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// What is shown of the y axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// All from 0 on; all there is; all but the peaks of the first steps.
    FromZero,
    All,
    Losses,
}

/// Curves over one x. None without a point.
pub fn lines(x: &str, y: &str, series: &[Series], shown: Shown) -> Option<Chart> {
    let points = || series.iter().flat_map(|series| series.points.iter().copied());
    let (low, high) = range(series, shown)?;
    let (first, last) = extent(points().map(|(x, _)| x))?;
    let last = if last > first { last } else { first + 1.0 };

    let (mut svg, mut frame) = (String::new(), (0..0, 0..0));
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        frame = draw_curves(&area, (x, y), series, (first..last, low..high)).ok().unwrap_or(frame);
    }

    let curves: Vec<serde_json::Value> = series
        .iter()
        .map(|series| serde_json::json!({"name": series.name, "color": css(series.color), "points": series.points}))
        .collect();
    let data = serde_json::json!({
        "x": {"name": x, "from": first, "to": last, "left": frame.0.start, "right": frame.0.end},
        "y": {"name": y, "from": low, "to": high, "top": frame.1.start, "bottom": frame.1.end},
        "series": curves,
    });
    Some(Chart { svg: inked(&svg), data })
}

/// Pixels, of x and of y.
type Frame = (std::ops::Range<i32>, std::ops::Range<i32>);

fn draw_curves<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    (x, y): (&str, &str),
    series: &[Series],
    (xs, ys): (std::ops::Range<f64>, std::ops::Range<f64>),
) -> Result<Frame, Drawn<'a>> {
    let label = ("sans-serif", 15).into_font().color(&INK);
    let high = ys.end;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(46)
        .y_label_area_size(96)
        .build_cartesian_2d(xs, ys)?;
    chart
        .configure_mesh()
        .axis_style(INK.mix(0.5))
        .bold_line_style(INK.mix(0.12))
        .light_line_style(INK.mix(0.0))
        .max_light_lines(0)
        .label_style(label)
        .x_desc(x)
        .y_desc(y)
        .x_labels(7)
        .y_labels(7)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .draw()?;

    for series in series {
        let color = color(series.color);
        // What is above the frame is drawn on its edge.
        let shown = series.points.iter().map(|(x, y)| (*x, y.min(high)));
        match series.form {
            Form::Line => {
                chart.draw_series(LineSeries::new(shown, color.stroke_width(2)))?;
            }
            Form::Pale => {
                chart.draw_series(LineSeries::new(shown, color.mix(0.3).stroke_width(1)))?;
            }
            Form::Dots => {
                // Of many points some are ringed, the last among them.
                let apart = series.points.len().div_ceil(RINGS).max(1);
                let last = series.points.len().saturating_sub(1) % apart;
                let ringed: Vec<(f64, f64)> = shown.clone().skip(last).step_by(apart).collect();
                chart.draw_series(LineSeries::new(shown, color.stroke_width(1)))?;
                let dot = |at: &(f64, f64)| Circle::new(*at, 3, color.filled());
                chart.draw_series(ringed.iter().map(dot))?;
                let ring = |at: &(f64, f64)| Circle::new(*at, 3, INK.stroke_width(1));
                chart.draw_series(ringed.iter().map(ring))?;
            }
        }
    }

    area.present()?;
    let (xs, ys) = chart.plotting_area().get_pixel_range();
    Ok((xs, ys))
}

/// Bars in groups: a name and a value of every series each.
pub fn bars(y: &str, names: &[String], groups: &[(String, Vec<Option<f64>>)]) -> Option<Chart> {
    let most = extent(groups.iter().flat_map(|(_, values)| values.iter().flatten().copied()))?.1;
    let most = if most > 0.0 { most * 1.08 } else { 1.0 };
    // Wide enough for the names of the groups.
    let size = (SIZE.0.max(90 + GROUP * groups.len() as u32), SIZE.1);
    let mut svg = String::new();
    let mut marks = Vec::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        marks = draw_bars(&area, y, names, groups, most).ok().unwrap_or(marks);
    }

    let rows: Vec<serde_json::Value> = groups
        .iter()
        .map(|(name, values)| serde_json::json!({"name": name, "values": values}))
        .collect();
    let data = serde_json::json!({"columns": names, "rows": rows, "unit": y, "marks": marks});
    Some(Chart { svg: inked(&svg), data })
}

fn draw_bars<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    y: &str,
    names: &[String],
    groups: &[(String, Vec<Option<f64>>)],
    most: f64,
) -> Result<Vec<serde_json::Value>, Drawn<'a>> {
    let label = ("sans-serif", 15).into_font().color(&INK);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(46)
        .y_label_area_size(96)
        .build_cartesian_2d(0.0..groups.len() as f64, 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .axis_style(INK.mix(0.5))
        .bold_line_style(INK.mix(0.12))
        .light_line_style(INK.mix(0.0))
        .max_light_lines(0)
        .label_style(label.clone())
        .x_labels(0)
        .y_desc(y)
        .y_labels(7)
        .y_label_formatter(&|value| short(*value))
        .draw()?;

    let mut marks = Vec::new();
    let width = 0.8 / names.len().max(1) as f64;
    for (group, (name, values)) in groups.iter().enumerate() {
        for (i, value) in values.iter().enumerate() {
            let Some(value) = value else { continue };
            let from = group as f64 + 0.1 + i as f64 * width;
            let color = color(i);
            let corners = [(from, 0.0), (from + width * 0.92, *value)];
            chart.draw_series(std::iter::once(Rectangle::new(corners, color.mix(0.9).filled())))?;
            let [a, b] = corners.map(|corner| chart.backend_coord(&corner));
            marks.push(serde_json::json!({
                "box": [a.0, b.1, b.0, a.1], "text": format!("{name}, {}: {}", names[i], short(*value))
            }));
        }

        let under = chart.backend_coord(&(group as f64 + 0.5, 0.0));
        let style = label.pos(Pos::new(HPos::Center, VPos::Top));
        area.draw(&Text::new(name.clone(), (under.0, under.1 + 8), style))?;
    }

    area.present()?;
    Ok(marks)
}

/// A heat map: rows of shares from 0 to 1, under columns, each with its colour.
pub fn heat(columns: &[(String, usize)], rows: &[(String, Vec<f64>)]) -> Option<Chart> {
    const LEFT: i32 = 190;
    const TOP: i32 = 30;
    const CELL: (i32, i32) = (78, 26);
    if rows.is_empty() || columns.is_empty() {
        return None;
    }

    let size = (
        (LEFT + CELL.0 * columns.len() as i32 + 8) as u32,
        (TOP + CELL.1 * rows.len() as i32 + 8) as u32,
    );
    let (mut svg, mut marks) = (String::new(), Vec::new());
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let mut cells = || -> Result<(), Drawn> {
            let font = ("sans-serif", 14).into_font().color(&INK);
            let centred = font.pos(Pos::new(HPos::Center, VPos::Center));
            let beside = font.pos(Pos::new(HPos::Right, VPos::Center));
            for (i, column) in columns.iter().enumerate() {
                let x = LEFT + CELL.0 * i as i32 + CELL.0 / 2;
                area.draw(&Text::new(column.0.clone(), (x, TOP / 2), centred.clone()))?;
            }

            for (j, (name, shares)) in rows.iter().enumerate() {
                let top = TOP + CELL.1 * j as i32;
                area.draw(&Text::new(name.clone(), (LEFT - 8, top + CELL.1 / 2), beside.clone()))?;
                for (i, share) in shares.iter().enumerate() {
                    let left = LEFT + CELL.0 * i as i32;
                    let cell = [(left + 1, top + 1), (left + CELL.0 - 1, top + CELL.1 - 1)];
                    let color = color(columns[i].1);
                    let strength = 0.06 + 0.74 * share.clamp(0.0, 1.0);
                    area.draw(&Rectangle::new(cell, color.mix(strength).filled()))?;
                    let text = format!("{:.1} %", 100.0 * share);
                    let middle = (left + CELL.0 / 2, top + CELL.1 / 2);
                    area.draw(&Text::new(text.clone(), middle, centred.clone()))?;
                    marks.push(serde_json::json!({
                        "box": [cell[0].0, cell[0].1, cell[1].0, cell[1].1],
                        "text": format!("{name}, {}: {text}", columns[i].0)
                    }));
                }
            }
            area.present()
        };
        cells().ok()?;
    }

    let table: Vec<serde_json::Value> = rows
        .iter()
        .map(|(name, shares)| serde_json::json!({"name": name, "values": shares}))
        .collect();
    let names: Vec<&String> = columns.iter().map(|(name, _)| name).collect();
    let data = serde_json::json!({"columns": names, "rows": table, "unit": "share of the time", "marks": marks});
    Some(Chart { svg: inked(&svg), data })
}

/// The least and the most number.
fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|value| value.is_finite()).fold(None, |range, value| {
        let (low, high) = range.unwrap_or((value, value));
        Some((f64::min(low, value), f64::max(high, value)))
    })
}

/// From where to where a y axis goes.
fn range(series: &[Series], shown: Shown) -> Option<(f64, f64)> {
    let all = || series.iter().flat_map(|series| &series.points).map(|(_, y)| *y);
    let (least, most) = extent(all())?;
    if !(most - least).is_finite() {
        return None; // Nothing can be drawn to such a scale.
    }

    let most = match shown {
        Shown::FromZero => return Some((0.0, if most > 0.0 { most * 1.05 } else { 1.0 })),
        Shown::All => most,
        Shown::Losses => {
            let later = |series: &'_ Series| series.points.len().div_ceil(FIRST);
            let values = series.iter().flat_map(|of| &of.points[later(of).min(of.points.len())..]);
            extent(values.map(|(_, y)| *y)).map_or(most, |(_, most)| most)
        }
    };

    let margin = (most - least) * 0.05;
    let margin = if margin > 0.0 { margin } else { least.abs().max(1e-12) * 0.05 };
    Some((least - margin, most + margin))
}

/// A number in few letters.
pub fn short(value: f64) -> String {
    let size = value.abs();
    let trimmed = |text: String| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    match size {
        0.0 => "0".to_owned(),
        1e9.. => format!("{}G", trimmed(format!("{:.2}", value / 1e9))),
        1e6.. => format!("{}M", trimmed(format!("{:.2}", value / 1e6))),
        1e4.. => format!("{}k", trimmed(format!("{:.1}", value / 1e3))),
        100.0.. => trimmed(format!("{value:.1}")),
        1.0.. => trimmed(format!("{value:.3}")),
        1e-3.. => trimmed(format!("{value:.5}")),
        _ => format!("{value:.2e}"),
    }
}

/// With the ink of the page, and as wide as it has room.
fn inked(svg: &str) -> String {
    let ink = svg.replace(INK_AS_TEXT, "currentColor");
    let width = ink.split("width=\"").nth(1).and_then(|text| text.split('"').next());
    let wide = width.and_then(|width| width.parse::<u32>().ok()).filter(|width| *width > SIZE.0);
    let style = wide.map_or(String::new(), |width| format!("style=\"min-width:{width}px\" "));
    ink.replacen("<svg ", &format!("<svg role=\"img\" {style}"), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_have_their_marks_and_numbers() {
        let series = |name: &str, color, form| Series {
            name: name.to_owned(),
            points: (1..=9).map(|x| (f64::from(x), 9.0 / f64::from(x))).collect(),
            color,
            form,
        };
        let chart = lines(
            "step",
            "loss",
            &[series("a", 0, Form::Pale), series("b", 1, Form::Dots)],
            Shown::Losses,
        )
        .unwrap();
        assert!(chart.svg.contains("<polyline") && chart.svg.contains("<circle"));
        assert!(!chart.svg.contains(INK_AS_TEXT) && chart.svg.contains("currentColor"));
        let x = &chart.data["x"];
        assert!(x["left"].as_i64().unwrap() > 0 && x["right"].as_i64().unwrap() < 760, "{x}");
        assert_eq!(chart.data["series"][1]["points"][2], serde_json::json!([3.0, 3.0]));
        assert!(lines("step", "loss", &[], Shown::All).is_none());
        // Of two stages one is a step old: it is shown.
        let of = |values: &[f64]| Series {
            name: "a".to_owned(),
            points: values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect(),
            color: 0,
            form: Form::Line,
        };
        let high = |series: &[Series], shown| range(series, shown).unwrap().1;
        assert_eq!(high(&[of(&[0.0, 0.0]), of(&[1.0, 1.0])], Shown::FromZero), 1.05);
        // The first losses are above the frame, a late peak and a worse run are in it.
        let falls = of(&[9.0, 1.0, 1.1, 1.0]);
        assert!(high(std::slice::from_ref(&falls), Shown::Losses) < 2.0);
        assert!(high(&[falls.clone(), of(&[9.0, 6.0, 6.0, 6.0])], Shown::Losses) > 6.0);
        assert!(high(&[of(&[3.0, 2.0, 1.0, 7.0, 1.0])], Shown::Losses) > 7.0);
        let (low, most) = range(&[of(&[-0.5, 0.9])], Shown::All).unwrap();
        assert!(low < -0.5 && most > 0.9);
        assert!(high(&[of(&[1e-5, 2e-5])], Shown::All) < 3e-5);

        let names = ["idle".to_owned()];
        let groups = [("gpipe".to_owned(), vec![Some(0.5)]), ("decoupled".to_owned(), vec![None])];
        let chart = bars("%", &names, &groups).unwrap();
        assert_eq!(chart.data["marks"].as_array().unwrap().len(), 1);
        let rows = [("stage 0".to_owned(), vec![0.75, 0.25])];
        let chart = heat(&[("compute".to_owned(), 0), ("idle".to_owned(), 1)], &rows).unwrap();
        assert!(
            chart.svg.contains("75.0 %")
                && chart.data["marks"][1]["text"] == "stage 0, idle: 25.0 %"
        );
    }

    #[test]
    fn numbers_are_short() {
        let table = [
            (0.0, "0"),
            (1234567.0, "1.23M"),
            (25_000.0, "25k"),
            (2.5, "2.5"),
            (0.05, "0.05"),
            (4e-5, "4.00e-5"),
        ];
        for (value, text) in table {
            assert_eq!(short(value), text);
        }
    }

    /// A damaged file's numbers, to whose scale nothing can be drawn.
    #[test]
    fn a_scale_without_end_is_none() {
        let series = |values: &[f64]| {
            let points = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            [Series { name: "a".into(), points, color: 0, form: Form::Line }]
        };
        assert_eq!(range(&series(&[1e307, -1e308, 1e308]), Shown::All), None);
        assert!(range(&series(&[1e300, -1e300]), Shown::All).is_some());
    }
}
