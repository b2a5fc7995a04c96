//! What a trace is made of.

use serde::{Deserialize, Serialize};

use super::Moment;
use crate::schedule::{Action, Op, Pass, Schedule};

/// The lanes of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    Compute,
    Link,
    Group,
    Writer,
}

impl Lane {
    /// All of them, with their names.
    pub const ALL: [(Lane, &'static str); 4] = [
        (Lane::Compute, "compute"),
        (Lane::Link, "link"),
        (Lane::Group, "group"),
        (Lane::Writer, "writer"),
    ];
}

/// From when to when.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Span {
    pub begin: Moment,
    pub end: Moment,
}

/// What a place waits for between two actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wait {
    /// Nothing: this program's own work between them.
    Between,
    /// Rank 0 lets it begin a step.
    Gate,
    /// The device, which it shares, works for another stage.
    Elsewhere,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Count {
    /// Versions of the stage's weights from the oldest that a forward under way used to the newest.
    Versions,
    /// Microbatches whose activations wait for their backward.
    Activations,
    /// Resident bytes of the process.
    Memory,
}

/// One entry of a trace, of a place of the rank that writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// An action, or a part of one that was a wait.
    Action {
        #[serde(with = "as_text")]
        action: Action,
        waits: bool,
        span: Span,
    },
    /// Between two actions of a stage.
    Wait { stage: usize, wait: Wait, span: Span },
    /// What the action has handed over travels.
    Transfer {
        #[serde(with = "as_text")]
        action: Action,
        bytes: u64,
        span: Span,
    },
    /// A sum over the replicas of a stage, or a bucket of it.
    Sum { stage: usize, step: usize, bytes: u64, span: Span },
    /// The state at a step boundary is written.
    Write { stage: usize, step: usize, span: Span },
    /// How many there are from here on.
    Count { stage: usize, count: Count, value: u64, at: Moment },
}

impl Event {
    /// The same at other moments; a count is of the last of them.
    pub fn at(mut self, at_span: Span) -> Event {
        match &mut self {
            Event::Action { span, .. }
            | Event::Wait { span, .. }
            | Event::Transfer { span, .. }
            | Event::Sum { span, .. }
            | Event::Write { span, .. } => *span = at_span,
            Event::Count { at, .. } => *at = at_span.end,
        }
        self
    }

    /// When it was over.
    pub fn end(&self) -> Moment {
        match self {
            Event::Action { span, .. }
            | Event::Wait { span, .. }
            | Event::Transfer { span, .. }
            | Event::Sum { span, .. }
            | Event::Write { span, .. } => span.end,
            Event::Count { at, .. } => *at,
        }
    }
}

/// A message between two places of a replica, by the action that takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Message(Action);

impl Message {
    /// The message that an action sends, and whether it does or takes it; none of another action.
    pub fn of(action: &Action, schedule: &Schedule) -> Option<(Message, bool)> {
        let joiner = schedule.joiner();
        let other = if joiner == 0 { schedule.stages - 1 } else { 0 };
        let taken = |stage: usize, op: Op| Some((Message(Action { stage, op, ..*action }), true));
        match action.op {
            Op::SendActivation => taken(action.stage + 1, Op::RecvActivation),
            Op::SendGradient => taken(action.stage.checked_sub(1)?, Op::RecvGradient),
            Op::Part if action.stage != joiner => taken(joiner, Op::RecvPart),
            Op::SendTable => taken(other, Op::RecvTable),
            Op::RecvActivation | Op::RecvGradient | Op::RecvPart | Op::RecvTable => {
                Some((Message(*action), false))
            }
            _ => None,
        }
    }

    /// What it carries.
    pub fn name(self) -> &'static str {
        match (self.0.op, self.0.pass) {
            (Op::RecvActivation, Pass::Train) => "activation",
            (Op::RecvActivation, Pass::Eval) => "activation of evaluation",
            (Op::RecvGradient, _) => "gradient",
            (Op::RecvPart, _) => "part of the table's gradient",
            _ => "gradient of the table",
        }
    }
}

/// Actions in their printed form.
mod as_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::schedule::Action;

    pub fn serialize<S: Serializer>(action: &Action, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(action)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Action, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::{ScheduleKind, Tie};

    #[test]
    fn both_ends_of_a_message_name_it_alike() {
        for tie in [Tie::Aligned, Tie::Head] {
            let mut schedule = Schedule::new(ScheduleKind::Decoupled, 3, 2, 1, SyncPoints::ends(6));
            schedule.tie = tie;
            let (mut sent, mut taken) = (Vec::new(), Vec::new());
            for action in (0..3).flat_map(|stage| schedule.actions(stage)) {
                match Message::of(&action, &schedule) {
                    Some((message, true)) => sent.push(message),
                    Some((message, false)) => taken.push(message),
                    None => {}
                }
            }
            let in_order =
                |messages: &mut Vec<Message>| messages.sort_by_key(|of| of.0.to_string());
            in_order(&mut sent);
            in_order(&mut taken);
            assert!(sent == taken && sent.len() > 6 * 2 * 2 * 2, "{tie:?}: {sent:?} {taken:?}");
        }
    }

    #[test]
    fn events_are_written_and_read() {
        let span = Span { begin: Moment(5), end: Moment(7) };
        let action = Event::Action { action: "2F5.0".parse().unwrap(), waits: true, span };
        let text = serde_json::to_string(&action).unwrap();
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), action);
        assert_eq!(action.end(), Moment(7));
        assert!(serde_json::from_str::<Event>(&text.replace("2F5.0", "2X5.0")).is_err());
    }
}
