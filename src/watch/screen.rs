//! The page of a run on a terminal.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, Borders, Cell, Chart, Dataset, Gauge, GraphType, Paragraph, Row, Table,
};

use super::state::{State, doing};
use crate::metrics::{PlaceRecord, clock, thousands};
use crate::report::Phase;

/// Blocks of the bar that shows where a place's time goes, at least and at most.
const BAR: (u16, u16) = (8, 48);

/// What stands beside the bar in a place's row, with the gaps between.
const BESIDE: u16 = 24 + 22 + 8 + 8 + 4;

/// The kinds of time that the bar shows, each with its colour; what is left is waiting for something
/// else.
const KINDS: [(&str, Color); 9] = [
    ("compute", Color::Green),
    ("upstream", Color::Yellow),
    ("downstream", Color::Red),
    ("reduce", Color::Magenta),
    ("update", Color::Cyan),
    ("copies", Color::Blue),
    ("table", Color::White),
    ("evaluation", Color::LightMagenta),
    ("save", Color::LightBlue),
];

/// Draws a look at a run, the places from the `first` on; how many there are that have no room.
pub fn draw(frame: &mut Frame, state: &State, first: usize) -> usize {
    // The keys and what tells of the run have room before anything else.
    let [page, foot] =
        Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(frame.area());
    let places = state.places.len() as u16 + 3;
    let events = (state.events.len() as u16 + 2).clamp(3, 8);
    let [head, chart, grid, events] = Layout::vertical([
        Constraint::Length(4),
        Constraint::Fill(1),
        Constraint::Length(places.min((page.height / 3).max(4))),
        Constraint::Length(events.min((page.height / 5).max(2))),
    ])
    .areas(page);

    draw_head(frame, head, state);
    draw_losses(frame, chart, state);
    let left = draw_grid(frame, grid, state, first);
    draw_events(frame, events, state);
    draw_foot(frame, foot, state);
    left
}

/// The keys, and the colours of the kinds of time that there are.
fn draw_foot(frame: &mut Frame, area: Rect, state: &State) {
    let there = |kind: &str| state.places.iter().any(|place| place.recent.share(kind) > 0.005);
    let colors = KINDS.iter().filter(|(kind, _)| there(kind)).flat_map(|(kind, color)| {
        [Span::styled("█ ", Style::new().fg(*color)), Span::raw(format!("{kind}  "))]
    });
    let keys = std::iter::once(Span::raw("q quits   "));
    frame.render_widget(Line::from_iter(keys.chain(colors)), area);
}

fn draw_head(frame: &mut Frame, area: Rect, state: &State) {
    let color = match state.phase {
        Phase::Running | Phase::Ended => Color::Green,
        Phase::Stopped | Phase::Silent(_) => Color::Yellow,
        Phase::Failed => Color::Red,
    };
    let mut words = vec![
        Span::styled(state.phase.text(), Style::new().fg(color).add_modifier(Modifier::BOLD)),
        Span::raw(format!("   loss {:.4}", state.loss)),
    ];
    words.extend(state.eval_loss.map(|loss| Span::raw(format!("   held-out {loss:.4}"))));
    let rate = state.tokens_per_s.filter(|rate| rate.is_finite());
    words.extend(rate.map(|rate| Span::raw(format!("   {} tokens/s", thousands(rate as u64)))));
    words.extend(state.left.map(|left| Span::raw(format!("   {} left", clock(left)))));

    let block = Block::new().borders(Borders::TOP);
    let block = block.title(format!(" {}   grid {} ", state.name, state.grid));
    let [first, second] =
        Layout::vertical([Constraint::Length(1), Constraint::Length(1)]).areas(block.inner(area));
    frame.render_widget(block, area);
    frame.render_widget(Line::from(words), first);
    let steps = state.steps.map_or("?".to_owned(), |steps| steps.to_string());
    let gauge = Gauge::default()
        .gauge_style(Style::new().fg(Color::Blue))
        .label(format!("step {} of {steps}", state.step))
        .ratio(state.done());
    frame.render_widget(gauge, second);
}

fn draw_losses(frame: &mut Frame, area: Rect, state: &State) {
    let block = Block::new().borders(Borders::TOP).title(" loss, nats per token ");
    let mut losses: Vec<f64> = state.curve.iter().map(|(_, loss)| *loss).collect();
    losses.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (losses.first(), losses.last()) else {
        frame.render_widget(Paragraph::new("no step yet").block(block), area);
        return;
    };

    // The first steps would flatten the rest.
    let middle = losses[losses.len() / 2];
    let high = most.min(middle + 1.6 * (middle - least)).max(least + 1e-3);
    let (first, last) = (state.curve[0].0, state.curve[state.curve.len() - 1].0.max(1.0));
    let shown = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().copied().filter(|(_, loss)| *loss <= high).collect()
    };
    let (curve, evals) = (shown(&state.curve), shown(&state.evals));
    let line = Dataset::default()
        .name("training")
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(Color::Cyan))
        .data(&curve);
    let dots = Dataset::default()
        .name("held out")
        .marker(Marker::Dot)
        .style(Style::new().fg(Color::Yellow))
        .data(&evals);
    let sets = if evals.is_empty() { vec![line] } else { vec![line, dots] };
    let chart = Chart::new(sets)
        .block(block)
        .x_axis(
            Axis::default()
                .bounds([first, last.max(first + 1.0)])
                .labels([format!("{first:.0}"), format!("{last:.0}")]),
        )
        .y_axis(
            Axis::default()
                .bounds([*least, high])
                .labels([format!("{least:.3}"), format!("{high:.3}")]),
        );
    frame.render_widget(chart, area);
}

fn draw_grid(frame: &mut Frame, area: Rect, state: &State, first: usize) -> usize {
    // Beside the frame's line and the head.
    let room = usize::from(area.height).saturating_sub(2);
    let shown = match state.places.len() <= room {
        true => room,
        false => room.saturating_sub(1),
    };
    let left = state.places.len().saturating_sub(shown);
    let more = || Row::new(vec![Cell::from(format!("and {left} more, by ↑ ↓"))]);
    let more = (left > 0).then(more);
    let bar_width = area.width.saturating_sub(BESIDE).clamp(BAR.0, BAR.1);
    let rows = state.places.iter().skip(first.min(left)).take(shown).map(|place| {
        let memory =
            place.memory.map_or("-".to_owned(), |bytes| format!("{} MiB", bytes.div_ceil(1 << 20)));
        Row::new(vec![
            Cell::from(place.name.clone()),
            Cell::from(doing(place)),
            Cell::from(format!("{:>5.1} %", 100.0 * place.recent.share("compute"))),
            Cell::from(bar(place, usize::from(bar_width))),
            Cell::from(memory),
        ])
    });
    let widths = [
        Constraint::Length(24),
        Constraint::Length(22),
        Constraint::Length(8),
        Constraint::Length(bar_width),
        Constraint::Min(8),
    ];
    let head = Row::new(["place", "lately", "compute", "time", "memory"])
        .style(Style::new().add_modifier(Modifier::DIM));
    let block = Block::new().borders(Borders::TOP).title(" grid ");
    frame.render_widget(Table::new(rows.chain(more), widths).header(head).block(block), area);
    left
}

/// Where a place's time went lately, a block for as much of it.
fn bar(place: &PlaceRecord, width: usize) -> Line<'static> {
    let (mut spans, mut drawn, mut sum) = (Vec::new(), 0, 0.0);
    for (kind, color) in KINDS {
        sum += place.recent.share(kind);
        let end = ((sum * width as f64).round() as usize).clamp(drawn, width);
        spans.push(Span::styled("█".repeat(end - drawn), Style::new().fg(color)));
        drawn = end;
    }
    spans.push(Span::styled("░".repeat(width - drawn), Style::new().add_modifier(Modifier::DIM)));
    Line::from(spans)
}

fn draw_events(frame: &mut Frame, area: Rect, state: &State) {
    let lines: Vec<Line> = state
        .events
        .iter()
        .map(|event| Line::from(format!("{:>7}  {}", event.step, event.text.trim())))
        .collect();
    let block = Block::new().borders(Borders::TOP).title(" events, the newest first ");
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::metrics::Spent;
    use crate::report::History;

    #[test]
    fn a_page_has_room_for_everything() {
        let folder = tempfile::tempdir().unwrap();
        let step = |step: usize| {
            format!(
                "{{\"step\":{step},\"loss\":{},\"lr\":0.1,\"tokens\":{},\"step_s\":0.5,\"tokens_per_s\":8.0}}\n",
                9.0 / step as f64,
                4 * step
            )
        };
        std::fs::write(folder.path().join("metrics.jsonl"), (1..=40).map(step).collect::<String>())
            .unwrap();
        std::fs::write(
            folder.path().join("events.jsonl"),
            r#"{"time":1,"step":0,"kind":"start","text":"started","facts":{"grid":"1x1","steps":100}}"#.to_owned() + "\n",
        )
        .unwrap();
        let mut history = History::new(folder.path());
        history.read().unwrap();
        let mut state = State::new(&history);
        let place = |number: usize| PlaceRecord {
            name: format!("stage {number}, replica 0"),
            replica: 0,
            stages: vec![number],
            step: 40,
            at: 1.0,
            recent: Spent {
                seconds: 2.0,
                kinds: [("compute".to_owned(), 1.0), ("update".to_owned(), 1.0)].into(),
                ..Spent::default()
            },
            total: Spent::default(),
            memory: None,
            peak: None,
            predicted: 0,
        };
        state.places = (0..24).map(place).collect();
        for (width, height) in [(100, 30), (80, 24), (60, 12), (40, 12), (20, 5), (200, 60)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            let mut left = 0;
            terminal.draw(|frame| left = draw(frame, &state, 3)).unwrap();
            let text: String =
                terminal.backend().buffer().content().iter().map(|cell| cell.symbol()).collect();
            assert!(text.contains("q quits"), "{text}");
            if width < 60 {
                continue;
            }

            assert!(text.contains("running") && text.contains("step 40 of 100"), "{text}");
            assert!(text.contains("started"), "{text}");
            let shown = |i: &usize| text.contains(&format!("stage {i},"));
            let count = (0..24).filter(shown).count();
            assert!(text.contains(&format!("and {left} more")) && count > 0, "{text}");
            assert_eq!(left, 24 - count, "{text}");
            // The fourth place is the first, and its bar has as much of both kinds.
            assert!(!shown(&0) && shown(&3), "{text}");
            let blocks = text.matches('█').count();
            let bar = usize::from(width.saturating_sub(BESIDE).clamp(BAR.0, BAR.1));
            let whole = blocks >= bar * count && !text.contains('░');
            assert!(width < 80 || whole, "{text}");
            assert!(text.contains("█ compute") && text.contains("█ update"), "{text}");
            assert!(!text.contains("█ table"), "{text}");
        }
    }
}
