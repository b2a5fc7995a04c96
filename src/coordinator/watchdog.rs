//! When nothing moves any more: who is everybody waiting for?
//!
//! Rank 0 asks all ranks for their heartbeats when no report has come for a while. Nothing moves if
//! no rank has begun anything new for `stall_seconds`. Then the culprit is, in this order: a rank
//! that does not respond; one that waits for nobody; the sender of a message that somebody waits
//! for although it was sent; a rank that all wait for in a circle.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::awake::Awake;
use crate::control::{Activity, Control, Controls, HeartbeatReport};
use crate::error::Error;
use crate::grid::Grid;
use crate::schedule::{Action, Op};

/// Watches over the ranks of a grid.
#[derive(Debug)]
pub struct Watchdog {
    grid: Grid,
    stall: Duration,
    /// When something was last seen to move, and when it was last asked.
    moved: Awake,
    asked: Awake,
    /// What each rank told last, and when.
    beats: BTreeMap<usize, (HeartbeatReport, Awake)>,
}

impl Watchdog {
    pub fn new(grid: Grid, stall_seconds: f64) -> Watchdog {
        let now = Awake::now();
        let stall = Duration::from_secs_f64(stall_seconds);
        Watchdog { grid, stall, moved: now, asked: now, beats: BTreeMap::new() }
    }

    /// Something was reported.
    pub fn moved(&mut self) {
        self.moved = Awake::now();
    }

    /// A rank has answered.
    pub fn heard(&mut self, rank: usize, beat: HeartbeatReport) {
        if self.beats.get(&rank).is_none_or(|(last, _)| last.count != beat.count) {
            self.moved = Awake::now();
        }
        self.beats.insert(rank, (beat, Awake::now()));
    }

    /// Asks if it is time; the error, if nothing moves. Its table has been printed.
    pub fn look(&mut self, controls: &Controls) -> Option<Error> {
        let pause = self.stall / 4;
        if self.moved.elapsed() >= pause && self.asked.elapsed() >= pause {
            self.asked = Awake::now();
            controls.send(Control::Ask);
        }

        if self.moved.elapsed() < self.stall {
            return None;
        }
        complain!("{}", self.table());
        let (rank, what) = self.verdict();
        let host = self.beats.get(&rank).map_or("an unknown host", |(beat, _)| &beat.host);
        let place = format!("{} (rank {rank} on {host})", self.grid.name(rank));
        Some(Error::Hang { seconds: self.stall.as_secs_f64(), place, what })
    }

    /// Whether a rank has answered the last questions.
    fn answers(&self, rank: usize) -> bool {
        self.beats.get(&rank).is_some_and(|(_, heard)| heard.elapsed() < self.stall * 3 / 5)
    }

    /// The ranks that a rank waits for.
    fn waits_for(&self, rank: usize) -> Vec<usize> {
        let Some((beat, _)) = self.beats.get(&rank) else { return Vec::new() };
        if matches!(beat.doing, Activity::Gate(_)) {
            return vec![0];
        }

        let Some(action) = beat.action() else { return Vec::new() };
        let Some(place) =
            self.grid.held(rank).into_iter().find(|place| place.stage == action.stage)
        else {
            return Vec::new();
        };

        let peer = match action.op {
            Op::RecvActivation | Op::SendGradient => self.grid.upstream(place),
            Op::RecvGradient | Op::SendActivation => self.grid.downstream(place),
            Op::RecvPart | Op::RecvTable => self.grid.twin(place),
            Op::Update | Op::UpdateTable | Op::SendTable => {
                let others = self.grid.group(place.stage).filter(|other| *other != place);
                return others
                    .map(|other| self.grid.rank(other))
                    .filter(|other| !self.reduces(*other, action))
                    .collect();
            }
            _ => None,
        };

        peer.map(|peer| self.grid.rank(peer)).filter(|peer| *peer != rank).into_iter().collect()
    }

    /// Whether a rank waits for the same sum too, or for that of a later step, and so has given its
    /// part.
    fn reduces(&self, rank: usize, of: Action) -> bool {
        let action = self.beats.get(&rank).and_then(|(beat, _)| beat.action());
        action.is_some_and(|action| action.op == of.op && action.step >= of.step)
    }

    /// The rank that everybody waits for, and what is wrong with it.
    fn verdict(&self) -> (usize, String) {
        let ranks = 0..self.grid.size();
        if let Some(silent) = ranks.clone().find(|rank| !self.answers(*rank)) {
            return (
                silent,
                "does not respond: its process is suspended, or its node is lost".into(),
            );
        }

        let working = |rank: &usize| {
            let finishing =
                self.beats.get(rank).is_some_and(|(beat, _)| beat.doing == Activity::Finishing);
            self.waits_for(*rank).is_empty() && !finishing
        };

        let since = |rank: &usize| self.beats.get(rank).map_or(0.0, |(beat, _)| beat.since);
        let oldest = ranks.clone().filter(working).max_by(|a, b| since(a).total_cmp(&since(b)));
        if let Some(rank) = oldest {
            return (
                rank,
                format!("is stuck in {}, and all other ranks are waiting for it", self.doing(rank)),
            );
        }

        for rank in ranks {
            let Some((beat, _)) = self.beats.get(&rank) else { continue };
            let waits = self.waits_for(rank);
            let (Some(action), [from]) = (beat.action(), &waits[..]) else { continue };
            let send = match action.op {
                Op::RecvActivation => Op::SendActivation,
                Op::RecvGradient => Op::SendGradient,
                _ => continue,
            };

            let sent = |(beat, _): &(HeartbeatReport, Awake)| {
                let at_least = |made: Action| {
                    (made.step, made.microbatch) >= (action.step, action.microbatch)
                        && Some(made) != beat.action()
                };

                beat.made(send).any(at_least)
            };

            if self.beats.get(from).is_some_and(sent) {
                let to = self.grid.name(rank);
                return (
                    *from,
                    format!(
                        "has sent a message that has not arrived: {to} waits in {action} for it"
                    ),
                );
            }
        }

        (0, "waits, as everybody does: a circle".into())
    }

    fn doing(&self, rank: usize) -> String {
        self.beats.get(&rank).map_or("unknown".into(), |(beat, _)| beat.text())
    }

    /// Everybody: place, host, what it does, for whom it waits, since when.
    fn table(&self) -> String {
        let mut out = format!(
            "timed out: no progress for {:.0} s:\n{:<26} {:<16} {:<22} {:>7}  {:<12} last actions",
            self.stall.as_secs_f64(),
            "place",
            "host",
            "doing",
            "since",
            "waits for"
        );

        for rank in 0..self.grid.size() {
            let name = format!("{} [{rank}]", self.grid.name(rank));
            let (host, since, last) = match self.beats.get(&rank) {
                Some((beat, heard)) => (
                    beat.host.clone(),
                    beat.since + heard.elapsed().as_secs_f64(),
                    beat.actions.join(" "),
                ),
                None => ("?".into(), f64::NAN, String::new()),
            };

            let waits: Vec<String> =
                self.waits_for(rank).iter().map(|rank| format!("rank {rank}")).collect();
            let doing = if self.answers(rank) {
                self.doing(rank)
            } else {
                format!("{}, silent", self.doing(rank))
            };

            let waits = if waits.is_empty() { "-".to_owned() } else { waits.join(", ") };
            out.push_str(&format!(
                "\n{name:<26} {host:<16} {doing:<22} {since:>5.1} s  {waits:<12} {last}"
            ));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watchdog(beats: &[&str]) -> Watchdog {
        let mut watchdog = Watchdog::new(Grid::line(2, 2), 10.0);
        for (rank, actions) in beats.iter().enumerate() {
            let actions: Vec<String> = actions.split_whitespace().map(str::to_owned).collect();
            let doing = if actions.is_empty() { Activity::Starting } else { Activity::Action };
            let beat = HeartbeatReport {
                host: "node".into(),
                count: 1,
                doing,
                since: 3.0 + rank as f64,
                actions,
            };
            watchdog.heard(rank, beat);
        }
        watchdog
    }

    #[test]
    fn the_one_that_all_wait_for_is_named() {
        let table: [(&[&str], usize, &str); 7] = [
            (
                &["0SA4.0 0RG3.0", "1RA4.0 1F4.0", "0SA4.0 0RG3.0", "1R3 1U3"],
                1,
                "is stuck in 1F4.0",
            ),
            (&["0RG3.0", "1U3", "0F4.0", "1RA4.0"], 2, "is stuck in 0F4.0"),
            // The other has its sum of that step, and waits for the next.
            (&["0ST7", "1U7", "0RG7.0", "1U6"], 3, "is stuck in 1U6"),
            (&["0ST7", "1U6", "0RG7.0", "1U7"], 1, "is stuck in 1U6"),
            (
                &["0SA4.0 0RG4.0", "1RA4.0", "0SA4.0 0RG4.0", "1R3 1U3"],
                0,
                "a message that has not arrived: stage 1, replica 0",
            ),
            (
                &["0SA4.0 0RG4.0", "1B4.0 1SG4.0 1RA5.0", "0RG4.0", "1U4"],
                1,
                "a message that has not arrived: stage 0, replica 0",
            ),
            (&["0RG3.0", "1RA4.0", "0RG3.0"], 3, "does not respond"),
        ];
        for (beats, rank, what) in table {
            let (found, text) = watchdog(beats).verdict();
            assert!(found == rank && text.contains(what), "{beats:?}: rank {found} {text}");
        }
        let text = watchdog(&["0RG3.0", "1F4.0", "0RG3.0", "1U3"]).table();
        assert!(text.contains("stage 0, replica 0 [0]") && text.contains("rank 1 "), "{text}");
    }
}
