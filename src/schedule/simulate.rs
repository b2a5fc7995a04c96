//! An event simulation of action lists: who waits for whom, how long a step takes. It runs the very lists that the
//! workers run, so a schedule that it finds free of deadlock and mismatch is so.

use std::collections::{HashMap, VecDeque};
use std::fmt;

use super::{Action, Op, Schedule};
use crate::grid::{Grid, Place};

/// Times of one microbatch on one stage, in any unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    pub forward: f64,
    pub backward: f64,
    /// From the end of a forward or backward to the arrival at the neighbour.
    pub message: f64,
}

/// What is wrong with a set of action lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault(pub String);

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// When an action of a place ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub action: Action,
    pub start: f64,
    pub end: f64,
}

struct Message {
    action: Action,
    arrives: f64,
}

/// The state of a running simulation.
struct World<'a> {
    grid: Grid,
    lists: &'a [Vec<Action>],
    costs: Costs,
    clock: Vec<f64>,
    next: Vec<usize>,
    /// (from, to) -> messages under way, in order.
    links: HashMap<(usize, usize), VecDeque<Message>>,
    /// (stage, step) -> when each member started its all-reduce.
    reduces: HashMap<(usize, usize), Vec<f64>>,
    spans: Vec<Vec<Span>>,
}

/// Runs the action lists of all places (in the order of their ranks).
///
/// # Errors
/// A receive that meets another message than its own, messages left over at the end, or a deadlock (with what every
/// stuck place waits for).
pub fn simulate(grid: Grid, lists: &[Vec<Action>], costs: Costs) -> Result<Vec<Vec<Span>>, Fault> {
    let n = grid.size();
    let mut world = World {
        grid,
        lists,
        costs,
        clock: vec![0.0; n],
        next: vec![0; n],
        links: HashMap::new(),
        reduces: HashMap::new(),
        spans: vec![Vec::new(); n],
    };
    loop {
        let mut moved = false;
        for (rank, list) in lists.iter().enumerate() {
            while let Some(action) = list.get(world.next[rank]) {
                let Some(end) = world.run(rank, *action)? else { break };
                let start = world.clock[rank];
                world.spans[rank].push(Span { action: *action, start, end });
                world.clock[rank] = end;
                world.next[rank] += 1;
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    world.finish()
}

impl World<'_> {
    /// The end time of `action` if it can run now.
    fn run(&mut self, rank: usize, action: Action) -> Result<Option<f64>, Fault> {
        let (now, place) = (self.clock[rank], self.grid.place(rank));
        Ok(match action.op {
            Op::Load => Some(now),
            Op::Forward => Some(now + self.costs.forward),
            Op::Backward => Some(now + self.costs.backward),
            Op::SendActivation => Some(self.send(rank, self.grid.downstream(place), action)?),
            Op::SendGradient => Some(self.send(rank, self.grid.upstream(place), action)?),
            Op::RecvActivation => self.receive(rank, self.grid.upstream(place), action)?,
            Op::RecvGradient => self.receive(rank, self.grid.downstream(place), action)?,
            Op::Reduce => {
                self.reduces.entry((place.stage, action.step)).or_default().push(now);
                Some(now)
            }
            Op::Update => {
                let started = self.reduces.get(&(place.stage, action.step)).map_or(&[][..], |s| s.as_slice());
                (started.len() == self.grid.replicas).then(|| started.iter().copied().fold(now, f64::max))
            }
        })
    }

    fn send(&mut self, rank: usize, to: Option<Place>, action: Action) -> Result<f64, Fault> {
        let to = to.ok_or_else(|| Fault(format!("{action} has nobody to send to")))?;
        let arrives = self.clock[rank] + self.costs.message;
        self.links.entry((rank, self.grid.rank(to))).or_default().push_back(Message { action, arrives });
        Ok(self.clock[rank])
    }

    fn receive(&mut self, rank: usize, from: Option<Place>, action: Action) -> Result<Option<f64>, Fault> {
        let from = from.ok_or_else(|| Fault(format!("{action} has nobody to receive from")))?;
        let link = self.links.entry((self.grid.rank(from), rank)).or_default();
        let Some(message) = link.pop_front() else { return Ok(None) };
        let sent = match action.op {
            Op::RecvActivation => Op::SendActivation,
            _ => Op::SendGradient,
        };
        if message.action != (Action { stage: from.stage, op: sent, ..action }) {
            return Err(Fault(format!("{action} meets the message of {}", message.action)));
        }
        Ok(Some(self.clock[rank].max(message.arrives)))
    }

    fn finish(self) -> Result<Vec<Vec<Span>>, Fault> {
        let stuck: Vec<String> = (0..self.lists.len())
            .filter_map(|rank| {
                let action = self.lists[rank].get(self.next[rank])?;
                Some(format!("{} waits at {action}", self.grid.place(rank)))
            })
            .collect();
        if !stuck.is_empty() {
            return Err(Fault(format!("deadlock: {}", stuck.join("; "))));
        }
        if let Some(message) = self.links.values().find_map(|link| link.front()) {
            return Err(Fault(format!("nobody receives {}", message.action)));
        }
        Ok(self.spans)
    }
}

/// The steady state of a schedule under given times.
#[derive(Debug, Clone, PartialEq)]
pub struct Ideal {
    /// Over one device that holds the whole model: K stages' work per step over the time between two steps.
    pub speed_up: f64,
    /// Share of its time that each stage computes.
    pub utilization: Vec<f64>,
}

/// Simulates long enough for fill and drain not to count.
///
/// # Errors
/// As [`simulate`].
pub fn ideal(schedule: &Schedule, costs: Costs) -> Result<Ideal, Fault> {
    let (k, m) = (schedule.stages, schedule.microbatches);
    let fill = (2 * schedule.link_capacity() + 2 * k).div_ceil(m);
    // Whole runs of K steps average out a pattern that repeats only after several steps.
    let (from, steps) = (2 * fill, 2 * fill + 8 * k + fill);
    let mut long = schedule.clone();
    long.sync.steps = steps;
    long.sync.warm_up = 0;
    long.sync.periods.clear();
    long.sync.at.clear();
    long.evals = None;
    let lists: Vec<Vec<Action>> = (0..k).map(|stage| long.actions(stage).collect()).collect();
    let spans = simulate(Grid { stages: k, replicas: 1 }, &lists, costs)?;
    let to = from + 8 * k;
    // Between the ends of two backwards at the same place of the pattern.
    let end_of = |stage: usize, step: usize| {
        let last = |s: &&Span| s.action.op == Op::Backward && s.action.step == step && s.action.microbatch == m - 1;
        spans[stage].iter().find(last).map_or(0.0, |s| s.end)
    };
    let work = (costs.forward + costs.backward) * (m * (to - from)) as f64;
    let period = |stage: usize| end_of(stage, to) - end_of(stage, from);
    let utilization: Vec<f64> = (0..k).map(|stage| work / period(stage)).collect();
    Ok(Ideal { speed_up: utilization.iter().sum(), utilization })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::Kind;

    fn action(text: &str) -> Action {
        text.parse().unwrap()
    }

    const FREE: Costs = Costs { forward: 1.0, backward: 2.0, message: 0.0 };

    fn speed_up(kind: Kind, stages: usize, m: usize, slack: usize, costs: Costs) -> f64 {
        ideal(&Schedule::new(kind, stages, m, slack, SyncPoints::ends(1)), costs).unwrap().speed_up
    }

    #[test]
    fn speed_ups_of_the_design() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 0.005, "{a} is not {b}");
        close(speed_up(Kind::Decoupled, 4, 1, 1, FREE), 4.0);
        close(speed_up(Kind::OneForwardOneBackward, 4, 1, 1, FREE), 1.0);
        close(speed_up(Kind::Decoupled, 4, 4, 1, FREE), 4.0);
        close(speed_up(Kind::OneForwardOneBackward, 4, 4, 1, FREE), 2.29);
        close(speed_up(Kind::Gpipe, 4, 4, 1, FREE), 2.29);
        close(speed_up(Kind::Sequential, 4, 4, 1, FREE), 1.0);
        close(speed_up(Kind::Decoupled, 11, 8, 1, FREE), 11.0);
        close(speed_up(Kind::OneForwardOneBackward, 11, 8, 1, FREE), 4.89);
        let slow = Costs { message: 0.3, ..FREE };
        close(speed_up(Kind::Decoupled, 4, 1, 2, slow) / 4.0, 1.0);
        close(speed_up(Kind::Decoupled, 4, 1, 1, slow) / 4.0, 0.87);
    }

    #[test]
    fn a_missing_send_is_a_deadlock_that_names_the_waiting_place() {
        let grid = Grid { stages: 2, replicas: 1 };
        let lists = vec![vec![action("0F0.0")], vec![action("1RA0.0"), action("1F0.0")]];
        let fault = simulate(grid, &lists, FREE).unwrap_err();
        assert_eq!(fault.0, "deadlock: stage 1, replica 0 waits at 1RA0.0");
    }

    #[test]
    fn a_message_out_of_order_or_left_over_is_a_fault() {
        let grid = Grid { stages: 2, replicas: 1 };
        let swapped = vec![vec![action("0SA0.1")], vec![action("1RA0.0")]];
        assert_eq!(simulate(grid, &swapped, FREE).unwrap_err().0, "1RA0.0 meets the message of 0SA0.1");
        let left = vec![vec![action("0SA0.0")], vec![]];
        assert_eq!(simulate(grid, &left, FREE).unwrap_err().0, "nobody receives 0SA0.0");
    }

    #[test]
    fn an_update_waits_for_the_whole_group() {
        let grid = Grid { stages: 1, replicas: 2 };
        let lists = vec![
            vec![action("0F0.0"), action("0R0"), action("0U0")],
            vec![action("0F0.0"), action("0F0.1"), action("0R0"), action("0U0")],
        ];
        let spans = simulate(grid, &lists, FREE).unwrap();
        assert_eq!(spans[0].last().unwrap().end, 2.0);
    }
}
