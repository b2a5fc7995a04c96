//! The grid as threads of one process: channels for links, a star of channels around replica 0 for a replica group.
//!
//! A thread that ends drops its ends of the channels, so whoever waits for it wakes with an error at once.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};

use tch::Tensor;

use super::{Ends, Header, Link, Reduction, ReplicaGroup, Reporter, checked};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place};
use crate::metrics::Report;
use crate::params::{slice, slice_mut};

type Message = (Header, Tensor);

/// The ends of all places, in the order of their ranks. `capacity` bounds the messages under way on a link.
pub fn connect(grid: Grid, capacity: usize, reports: &Sender<Report>) -> Vec<Ends> {
    let mut ends: Vec<Ends> = grid
        .places()
        .map(|place| {
            let reports = reports.clone();
            let gone = move |_| Error::Lost { peer: grid.place(0), doing: format!("{place} reports") };
            let reporter = Reporter::new(move |report| reports.send(report).map_err(gone));
            Ends { upstream: None, downstream: None, group: None, reports: reporter }
        })
        .collect();
    for place in grid.places() {
        if let Some(next) = grid.downstream(place) {
            let (down, from_above) = sync_channel(capacity);
            let (up, from_below) = sync_channel(capacity);
            let above = LocalLink { me: place, peer: next, sender: down, receiver: from_below };
            let below = LocalLink { me: next, peer: place, sender: up, receiver: from_above };
            ends[grid.rank(place)].downstream = Some(Box::new(above));
            ends[grid.rank(next)].upstream = Some(Box::new(below));
        }
    }
    if grid.replicas > 1 {
        for stage in 0..grid.stages {
            for (place, group) in grid.group(stage).zip(groups(grid, stage)) {
                ends[grid.rank(place)].group = Some(group);
            }
        }
    }
    ends
}

struct LocalLink {
    me: Place,
    peer: Place,
    sender: SyncSender<Message>,
    receiver: Receiver<Message>,
}

impl Link for LocalLink {
    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        let lost = |_| Error::Lost { peer: self.peer, doing: format!("{} sends {header}", self.me) };
        self.sender.send((header, tensor)).map_err(lost)
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        let lost = |_| Error::Lost { peer: self.peer, doing: format!("{} waits for {expected}", self.me) };
        let (found, tensor) = self.receiver.recv().map_err(lost)?;
        checked(self.peer, self.me, expected, found)?;
        Ok(tensor)
    }
}

/// Replica 0 adds up, in the order of the replicas, so the sum is the same for every run and every R.
struct Leader {
    stage: usize,
    members: Arc<Mutex<Vec<Member>>>,
}

/// Replica 0's ends towards another replica.
struct Member {
    receiver: Receiver<Vec<f32>>,
    sender: Sender<Arc<Vec<f32>>>,
}

struct Follower {
    place: Place,
    sender: Sender<Vec<f32>>,
    receiver: Arc<Mutex<Receiver<Arc<Vec<f32>>>>>,
}

fn groups(grid: Grid, stage: usize) -> Vec<Box<dyn ReplicaGroup>> {
    let mut members = Vec::new();
    let mut followers: Vec<Box<dyn ReplicaGroup>> = Vec::new();
    for place in grid.group(stage).skip(1) {
        let (to_leader, receiver) = channel();
        let (sender, from_leader) = channel();
        members.push(Member { receiver, sender });
        let receiver = Arc::new(Mutex::new(from_leader));
        followers.push(Box::new(Follower { place, sender: to_leader, receiver }));
    }
    let leader: Box<dyn ReplicaGroup> = Box::new(Leader { stage, members: Arc::new(Mutex::new(members)) });
    std::iter::once(leader).chain(followers).collect()
}

impl ReplicaGroup for Leader {
    fn all_reduce(&mut self, step: usize, mut flat: Tensor) -> Result<Reduction> {
        let (members, stage) = (Arc::clone(&self.members), self.stage);
        let lost = move |replica| Error::Lost {
            peer: Place { stage, replica },
            doing: format!("the gradient of step {step} is reduced"),
        };
        Ok(Reduction::new(move || {
            let members = members.lock().map_err(|_| lost(0))?;
            let sum = slice_mut(&mut flat);
            for (i, member) in members.iter().enumerate() {
                let gradient = member.receiver.recv().map_err(|_| lost(i + 1))?;
                sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += g);
            }
            let sum = Arc::new(sum.to_vec());
            for (i, member) in members.iter().enumerate() {
                member.sender.send(Arc::clone(&sum)).map_err(|_| lost(i + 1))?;
            }
            Ok(())
        }))
    }
}

impl ReplicaGroup for Follower {
    fn all_reduce(&mut self, step: usize, mut flat: Tensor) -> Result<Reduction> {
        let peer = Place { replica: 0, ..self.place };
        let lost = move || Error::Lost { peer, doing: format!("the gradient of step {step} is reduced") };
        self.sender.send(slice(&flat).to_vec()).map_err(|_| lost())?;
        let receiver = Arc::clone(&self.receiver);
        Ok(Reduction::new(move || {
            let sum = receiver.lock().map_err(|_| lost())?.recv().map_err(|_| lost())?;
            slice_mut(&mut flat).copy_from_slice(&sum);
            Ok(())
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Content;
    use super::*;
    use crate::params::zeros;
    use crate::schedule::Pass;

    fn header(step: usize) -> Header {
        Header { content: Content::Activation, pass: Pass::Train, step, microbatch: 0, shape: [1, 1, 2] }
    }

    #[test]
    fn a_link_carries_and_checks() {
        let grid = Grid { stages: 2, replicas: 1 };
        let mut ends = connect(grid, 2, &channel().0);
        let mut below = ends.pop().unwrap().upstream.unwrap();
        let mut above = ends.pop().unwrap().downstream.unwrap();
        above.send(header(3), Tensor::from_slice(&[1f32, 2.0])).unwrap();
        assert_eq!(below.receive(header(3)).unwrap(), Tensor::from_slice(&[1f32, 2.0]));
        above.send(header(4), Tensor::from_slice(&[1f32, 2.0])).unwrap();
        assert_eq!(
            below.receive(header(5)).unwrap_err().to_string(),
            "wrong message from stage 0, replica 0 to stage 1, replica 0: expected activation 5.0 f32 [1, 1, 2], found \
             activation 4.0 f32 [1, 1, 2]; do all ranks run the same program and config?"
        );
        drop(above);
        assert!(matches!(below.receive(header(5)), Err(Error::Lost { .. })));
    }

    #[test]
    fn a_group_adds_in_the_order_of_the_replicas() {
        let grid = Grid { stages: 1, replicas: 3 };
        let values = [1e8f32, 1.0, -1e8];
        let threads: Vec<_> = connect(grid, 2, &channel().0)
            .into_iter()
            .zip(values)
            .map(|(ends, value)| {
                std::thread::spawn(move || {
                    let mut flat = zeros(4).unwrap();
                    slice_mut(&mut flat).fill(value);
                    let mut group = ends.group.unwrap();
                    group.all_reduce(0, flat.shallow_clone()).unwrap().wait().unwrap();
                    slice(&flat)[3]
                })
            })
            .collect();
        let expected = (values[0] + values[1]) + values[2];
        for thread in threads {
            assert_eq!(thread.join().unwrap(), expected);
        }
    }
}
