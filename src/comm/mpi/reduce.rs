//! The all-reduce of a replica group, and its halves. Every member owns one range of a gradient and
//! adds it up, in the order of the replicas, so the sum is the same for every run, every R and
//! every transport; and it moves as few bytes as any all-reduce can. Several chunks are under way
//! at once, each a slice of every range:
//!
//! ```text
//! gradient   [ range of replica 0 | range of 1 | range of 2 ]        chunk n: slice n of each
//!
//!                    R = 3, seen from replica 1
//! reduce   scatter   slice 0 --> replica 0     slice 2 --> replica 2     their slices 1 --> here
//!          sum       slice 1 = (g_0 + g_1) + g_2
//! gather             slice 1 --> replicas 0 and 2              slice 0 <-- replica 0     slice 2 <-- replica 2
//! ```
//!
//! On one host the gradients lie in memory that all members see (`shared`): the messages are empty
//! then, and say the same. The first is "this chunk is complete here, and may be written", the
//! second "your values are read, and mine are in your buffer".
//!
//! With `wire = "bf16"` slices travel in half the bytes: the sum is `round(round(g_0) + round(g_1)
//! + ...)`, added in f32, and every member holds the rounded one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::Sender;

use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;
use tch::{Kind, Tensor};

use super::in_flight::address;
use super::raw::{self, MpiResult, Pending};
use super::shared_memory::Shared;
use crate::trace::{Event, Moment, Span, Tracer};
use crate::wire::Wire;

/// Values of a gradient that an all-reduce works on at once, 2 MiB of f32, and how many such chunks
/// are under way: what comes from the other replicas is kept beside the gradient, and must not be a
/// second one. Several, because a chunk crosses the link twice, and on a busy link each crossing
/// begins with a wait.
pub const CHUNK: usize = 1 << 19;
pub const CHUNKS_UNDER_WAY: usize = 4;

/// Values that are added up at once where all members see them, so that the sum is written out of
/// the cache.
const BLOCK: usize = 1 << 15;

/// The all-reduces of one replica group, one after the other, chunk by chunk; all members cut them
/// alike.
pub struct Reducer {
    group: SimpleCommunicator,
    /// Whose it is.
    stage: usize,
    replicas: usize,
    me: usize,
    wire: Wire,
    shared: Option<Shared>,
    jobs: VecDeque<SumJob>,
    /// Jobs that are over and no longer in `jobs`.
    over: usize,
    chunks: VecDeque<Chunk>,
    /// Chunks that have been started; its number modulo those under way gives a chunk its tags.
    started: usize,
    /// Buffers of finished chunks, each for the largest slice, to be used again.
    spare: Vec<Tensor>,
}

/// What is asked of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Reduce,
    Gather,
    /// The all-reduce.
    Both,
}

/// One gradient, or a bucket of one.
struct SumJob {
    flat: Tensor,
    work: Work,
    /// Where it lies in the memory that all members see.
    shared: Option<usize>,
    /// Its chunks: all, those that have been started, those that are over.
    chunks: usize,
    started: usize,
    over: usize,
    reply: Sender<MpiResult<()>>,
    /// Of a trace: the step that it belongs to, and when it was taken on.
    traced: Option<(usize, Moment)>,
}

/// A chunk under way.
struct Chunk {
    number: usize,
    job: usize,
    /// The slice of each replica's range.
    slices: Vec<Range<usize>>,
    tags: [i32; 2],
    /// What is on its way out; what the other replicas have of the slice of this one, while it
    /// comes in and afterwards.
    sends: VecDeque<Pending<Tensor>>,
    receives: VecDeque<(usize, Pending<Tensor>)>,
    arrived: Vec<Option<Tensor>>,
    /// The buffers that these are in.
    buffers: Vec<Tensor>,
    gathering: bool,
}

impl Reducer {
    /// The reducer of a stage's group, whose ranks are numbered by replica, with memory for a gradient
    /// of so many values if all can see it. All members must call this.
    pub fn new(
        group: SimpleCommunicator,
        wire: Wire,
        values: usize,
        stage: usize,
    ) -> MpiResult<Reducer> {
        let (replicas, me) = (group.size() as usize, group.rank() as usize);
        let (jobs, chunks, spare) = (VecDeque::new(), VecDeque::new(), Vec::new());
        let shared = match wire {
            Wire::F32 if replicas > 1 => Shared::new(&group, values)?,
            Wire::F32 => None,
            Wire::Bf16 => {
                tracing::info!("wire = \"bf16\": gradients travel");
                None
            }
        };

        Ok(Reducer {
            group,
            stage,
            replicas,
            me,
            wire,
            shared,
            jobs,
            over: 0,
            chunks,
            started: 0,
            spare,
        })
    }

    /// This member's part of the memory that all see.
    pub fn memory(&self) -> Option<Tensor> {
        self.shared.as_ref().map(Shared::own)
    }

    /// Takes another sum on; `traced` is its step and this moment, where that is wanted.
    pub fn push(
        &mut self,
        flat: Tensor,
        work: Work,
        reply: Sender<MpiResult<()>>,
        traced: Option<(usize, Moment)>,
    ) {
        let shared = self.shared.as_ref().and_then(|shared| shared.offset(&flat));
        let chunks = chunks_of(flat.numel(), self.replicas);
        self.jobs.push_back(SumJob {
            flat,
            work,
            shared,
            chunks,
            started: 0,
            over: 0,
            reply,
            traced,
        });
    }

    /// Whether a sum is being made.
    pub fn busy(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Tells everybody who waits that no sum will come any more.
    pub fn fail(&mut self, error: &str) {
        self.chunks.clear();
        for job in self.jobs.drain(..) {
            let _ = job.reply.send(Err(error.to_owned()));
        }
    }

    /// True if anything moved. Sums that end are told to the tracer.
    pub fn advance(&mut self, tracer: Option<&Tracer>) -> MpiResult<bool> {
        let mut moved = false;
        let mut i = 0;
        while i < self.chunks.len() {
            moved |= self.advance_part(i)?;
            let chunk = &self.chunks[i];
            if chunk.gathering && chunk.sends.is_empty() && chunk.receives.is_empty() {
                self.finish_part(i)?;
            } else {
                i += 1;
            }
        }

        while may_start(self.chunks.front().map(|chunk| chunk.number), self.started)
            && self.start_part()?
        {
            moved = true;
        }

        while self.jobs.front().is_some_and(|job| job.over == job.chunks) {
            if let Some(job) = self.jobs.pop_front() {
                // Before the reply: whoever has it may end the trace.
                if let Some(((step, begin), tracer)) = job.traced.zip(tracer) {
                    let bytes = (job.flat.numel() * self.wire.bytes()) as u64;
                    let span = Span { begin, end: Moment::now() };
                    tracer.add(Event::Sum { stage: self.stage, step, bytes, span });
                }
                let _ = job.reply.send(Ok(()));

                self.over += 1;
                moved = true;
            }
        }

        Ok(moved)
    }

    /// Begins the next chunk, if there is one.
    fn start_part(&mut self) -> MpiResult<bool> {
        let Some(number) = self.jobs.iter().position(|job| job.started < job.chunks) else {
            return Ok(false);
        };

        let job = &mut self.jobs[number];
        let slices = slices_of(job.flat.numel(), job.started, self.replicas);
        job.started += 1;
        let (flat, shared) = (job.flat.shallow_clone(), job.shared.is_some());
        // Where all see it, it must be complete everywhere before it is read or written.
        let scatters = job.work != Work::Gather || shared;
        let number_of_chunk = self.started;
        let turn = (number_of_chunk % CHUNKS_UNDER_WAY) as i32;
        self.started += 1;
        let (sends, receives) = (VecDeque::new(), VecDeque::new());
        let mut chunk = Chunk {
            number: number_of_chunk,
            job: self.over + number,
            slices,
            tags: [2 * turn, 2 * turn + 1],
            sends,
            receives,
            arrived: (0..self.replicas).map(|_| None).collect(),
            buffers: Vec::new(),
            gathering: false,
        };

        let mine = chunk.slices[self.me].clone();
        for other in self.others().filter(|_| scatters) {
            if !mine.is_empty() {
                let room =
                    if shared { nothing()? } else { self.room(mine.len(), &mut chunk.buffers)? };
                chunk.receives.push_back((
                    other,
                    raw::receive(address(&self.group, other, chunk.tags[0]), room)?,
                ));
            }
        }

        fence(Ordering::Release);
        for other in self.others().filter(|_| scatters) {
            let slice = chunk.slices[other].clone();
            if !slice.is_empty() {
                let out = if shared { nothing()? } else { self.packed(&view(&flat, &slice)?)? };
                chunk.sends.push_back(raw::send(address(&self.group, other, chunk.tags[0]), out)?);
            }
        }

        self.chunks.push_back(chunk);
        Ok(true)
    }

    /// Everybody but this replica, the next one first, so that not all begin with the same.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (me, replicas) = (self.me, self.replicas);
        (1..replicas).map(move |i| (me + i) % replicas)
    }

    /// Room for what comes from another replica, in a buffer that joins `buffers`.
    fn room(&mut self, count: usize, buffers: &mut Vec<Tensor>) -> MpiResult<Tensor> {
        let largest = slice_len(self.replicas) as i64;
        let whole = match self.spare.pop() {
            Some(whole) => whole,
            None => {
                Tensor::f_empty([largest], (self.wire.kind(), tch::Device::Cpu)).map_err(text)?
            }
        };

        let room = whole.f_narrow(0, 0, count as i64).map_err(text)?;
        buffers.push(whole);
        Ok(room)
    }

    /// Values as they travel.
    fn packed(&self, values: &Tensor) -> MpiResult<Tensor> {
        match self.wire {
            Wire::F32 => Ok(values.shallow_clone()),
            Wire::Bf16 => self.wire.pack(values).map_err(text),
        }
    }

    fn advance_part(&mut self, i: usize) -> MpiResult<bool> {
        let chunk = &mut self.chunks[i];
        let mut moved = false;
        // Only the oldest of each: every question lets MPI look everywhere, and the answers come
        // about in order.
        while let Some(send) = chunk.sends.front_mut() {
            if send.test()?.is_none() {
                break;
            }

            chunk.sends.pop_front();
            moved = true;
        }

        while let Some((other, receive)) = chunk.receives.front_mut() {
            let Some(values) = receive.test()? else { break };
            chunk.arrived[*other] = Some(values);
            chunk.receives.pop_front();
            moved = true;
        }

        // A slice must have left before its sum is written over it.
        if !chunk.gathering && chunk.sends.is_empty() && chunk.receives.is_empty() {
            self.gather(i)?;
            moved = true;
        }

        Ok(moved)
    }

    /// Adds up this replica's slice and exchanges the sums, as far as that is asked for.
    fn gather(&mut self, i: usize) -> MpiResult<()> {
        let job = &self.jobs[self.chunks[i].job - self.over];
        let (flat, shared, work) = (job.flat.shallow_clone(), job.shared, job.work);
        let chunk = &mut self.chunks[i];
        chunk.gathering = true;
        let mine = chunk.slices[self.me].clone();
        let arrived = std::mem::take(&mut chunk.arrived);
        chunk.arrived = (0..self.replicas).map(|_| None).collect();
        let out = match shared {
            Some(offset) => {
                let slice = offset + mine.start..offset + mine.end;
                self.shared
                    .iter()
                    .try_for_each(|shared| work_in_place(shared, slice.clone(), work))?;
                nothing()?
            }
            None => {
                let mut sum = view(&flat, &mine)?;
                match work {
                    // What the others get, this replica has too.
                    Work::Gather => self.wire.round(&mut sum).map_err(text)?,
                    _ => add_in_order(&sum, self.me, &arrived, self.wire).map_err(text)?,
                }

                if work == Work::Reduce { nothing()? } else { self.packed(&sum)? }
            }
        };

        drop(arrived);
        let mut buffers = Vec::new();
        self.spare.append(&mut self.chunks[i].buffers);
        // Where all see it, nobody may go on before everybody has read it.
        if work == Work::Reduce && shared.is_none() {
            return Ok(());
        }

        for other in self.others() {
            let slice = self.chunks[i].slices[other].clone();
            if slice.is_empty() {
                continue;
            }

            let into = match self.wire {
                _ if shared.is_some() => nothing()?,
                Wire::F32 => view(&flat, &slice)?,
                Wire::Bf16 => self.room(slice.len(), &mut buffers)?,
            };

            let from = address(&self.group, other, self.chunks[i].tags[1]);
            let receive = raw::receive(from, into)?;
            self.chunks[i].receives.push_back((other, receive));
        }

        self.chunks[i].buffers = buffers;
        for other in self.others().filter(|_| !mine.is_empty()) {
            let send = raw::send(
                address(&self.group, other, self.chunks[i].tags[1]),
                out.shallow_clone(),
            )?;
            self.chunks[i].sends.push_back(send);
        }

        Ok(())
    }

    fn finish_part(&mut self, i: usize) -> MpiResult<()> {
        let Some(mut chunk) = self.chunks.remove(i) else { return Ok(()) };
        fence(Ordering::Acquire);
        let job = &mut self.jobs[chunk.job - self.over];
        job.over += 1;
        if self.wire == Wire::Bf16 {
            for (other, values) in chunk.arrived.drain(..).enumerate() {
                let Some(values) = values else { continue };
                view(&job.flat, &chunk.slices[other])?.f_copy_(&values).map_err(text)?;
            }

            self.spare.append(&mut chunk.buffers);
        }

        Ok(())
    }
}

/// Whether chunk `next` may start beside those under way, of which `oldest` is the first. Chunks
/// may end out of order, so their count says nothing: two with the same tags must never meet, or a
/// rank could take the sums of one for the other's.
fn may_start(oldest: Option<usize>, next: usize) -> bool {
    oldest.is_none_or(|oldest| next - oldest < CHUNKS_UNDER_WAY)
}

/// The values of a buffer that a replica owns.
pub fn owned(len: usize, replica: usize, replicas: usize) -> Range<usize> {
    let cut = |i: usize| len * i / replicas;
    cut(replica)..cut(replica + 1)
}

/// Values of a chunk in the range of one replica.
fn slice_len(replicas: usize) -> usize {
    CHUNK.div_ceil(replicas)
}

/// How many chunks a buffer has: as many as its longest range has slices.
fn chunks_of(len: usize, replicas: usize) -> usize {
    len.div_ceil(replicas).div_ceil(slice_len(replicas))
}

/// A chunk of a buffer: a slice of every replica's range, of which the last ones may be shorter, or
/// empty.
fn slices_of(len: usize, chunk: usize, replicas: usize) -> Vec<Range<usize>> {
    let slice = |replica| {
        let range = owned(len, replica, replicas);
        let start = range.end.min(range.start + chunk * slice_len(replicas));
        start..range.end.min(start + slice_len(replicas))
    };
    (0..replicas).map(slice).collect()
}

/// What an empty message carries.
fn nothing() -> MpiResult<Tensor> {
    Tensor::f_empty([0], (Kind::Float, tch::Device::Cpu)).map_err(text)
}

fn view(flat: &Tensor, slice: &Range<usize>) -> MpiResult<Tensor> {
    flat.f_narrow(0, slice.start as i64, slice.len() as i64).map_err(text)
}

/// Adds up the members' values of one's slice where they lie, and writes the sum to all of them; or
/// one of both.
fn work_in_place(shared: &Shared, values: Range<usize>, work: Work) -> MpiResult<()> {
    fence(Ordering::Acquire);
    for start in values.clone().step_by(BLOCK) {
        let length = BLOCK.min(values.end - start);
        let mut views: Vec<Option<Tensor>> =
            shared.views(start, length)?.into_iter().map(Some).collect();
        let Some(sum) = views[shared.me()].take() else { continue };
        if work != Work::Gather {
            add_in_order(&sum, shared.me(), &views, Wire::F32).map_err(text)?;
        }

        if work != Work::Reduce {
            views.iter_mut().flatten().try_for_each(|other| other.f_copy_(&sum)).map_err(text)?;
        }
    }

    fence(Ordering::Release);
    Ok(())
}

/// `own = ((g_0 + g_1) + ...)`, where g_me is `own` and the others have arrived.
fn add_in_order(
    own: &Tensor,
    me: usize,
    arrived: &[Option<Tensor>],
    wire: Wire,
) -> Result<(), tch::TchError> {
    let mut own = own.shallow_clone();
    wire.round(&mut own)?;
    let mut before: Option<Tensor> = None;
    for values in arrived[..me].iter().flatten() {
        before = Some(match before {
            None => values.f_to_kind(Kind::Float)?,
            Some(sum) => sum.f_add(&values.f_to_kind(Kind::Float)?)?,
        });
    }

    if let Some(before) = before {
        let _ = own.f_add_(&before)?;
    }

    for values in arrived[me..].iter().flatten() {
        let _ = own.f_add_(&values.f_to_kind(Kind::Float)?)?;
    }

    wire.round(&mut own)
}

fn text(error: tch::TchError) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_with_the_same_tags_never_meet() {
        let next = 7 + CHUNKS_UNDER_WAY;
        assert!(may_start(None, 7) && may_start(Some(7), next - 1));
        // Those between have ended before chunk 7: the next one has the tags of 7 and must wait.
        assert!(!may_start(Some(7), next));
    }

    /// The chunks' slices of a replica are the range that it owns, and the ranges are the buffer.
    #[test]
    fn slices_cover_what_a_replica_owns() {
        for (len, replicas) in
            [(10, 3), (1, 4), (0, 2), (1000, 44), (5 * CHUNK + 7, 3), (2 * CHUNK, 2)]
        {
            let mut end = 0;
            for replica in 0..replicas {
                let range = owned(len, replica, replicas);
                assert_eq!(range.start, end);
                for chunk in 0..chunks_of(len, replicas) {
                    let slice = slices_of(len, chunk, replicas)[replica].clone();
                    assert!(
                        slice.start == end && slice.len() <= slice_len(replicas),
                        "{len} {chunk} {slice:?}"
                    );
                    end = slice.end;
                }
                assert_eq!(range.end, end, "{len} values, replica {replica} of {replicas}");
            }
            assert_eq!(end, len);
        }
    }

    /// Several blocks, in the middle of the buffers: the sum stands in all of them, and nothing
    /// else has changed; of the first half alone in that of its owner.
    #[test]
    fn sums_are_written_to_all_members() {
        for halves in [&[Work::Both][..], &[Work::Reduce, Work::Gather], &[Work::Reduce]] {
            sums_are_written(halves);
        }
    }

    fn sums_are_written(halves: &[Work]) {
        let values = [1e8f32, 1.0, -1e8];
        let (length, slice) = (3 * BLOCK, 7..2 * BLOCK + 12);
        let buffers: Vec<Tensor> = values
            .iter()
            .map(|value| {
                Tensor::from_slice(
                    &(0..length).map(|i| value * (1.0 + i as f32)).collect::<Vec<_>>(),
                )
            })
            .collect();
        let before: Vec<Vec<f32>> =
            buffers.iter().map(|buffer| Vec::try_from(buffer).unwrap()).collect();
        let shared = Shared::of(1, buffers.iter().map(Tensor::shallow_clone).collect());
        halves.iter().for_each(|work| work_in_place(&shared, slice.clone(), *work).unwrap());
        for (member, (buffer, before_here)) in buffers.iter().zip(&before).enumerate() {
            let written = halves.last() != Some(&Work::Reduce) || member == 1;
            let after = Vec::<f32>::try_from(buffer).unwrap();
            for i in 0..length {
                let sum = (before[0][i] + before[1][i]) + before[2][i];
                let expected = if written && slice.contains(&i) { sum } else { before_here[i] };
                assert_eq!(after[i], expected, "value {i} of member {member}: {halves:?}");
            }
        }
    }

    #[test]
    fn every_member_adds_in_the_order_of_the_replicas() {
        let values = [1e8f32, 1.0, -1e8, 0.5];
        let expected = ((values[0] + values[1]) + values[2]) + values[3];
        for me in 0..4 {
            let arrived: Vec<_> =
                (0..4).map(|r| (r != me).then(|| Tensor::from_slice(&[values[r]]))).collect();
            let own = Tensor::from_slice(&[values[me]]);
            add_in_order(&own, me, &arrived, Wire::F32).unwrap();
            assert_eq!(own, Tensor::from_slice(&[expected]), "replica {me}");
        }
    }
}
