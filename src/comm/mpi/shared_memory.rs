//! The gradients of a replica group whose members are all on one host, in memory that all of them
//! see: a sum is made where it belongs, and nothing travels.
//!
//! ```text
//!                 replica 0        replica 1          each has its own buffer, and sees all others
//! slice 0       [ g_0 ........ ] [ g_1 ........ ]     replica 0 writes g_0 + g_1 into both
//! slice 1       [ g_0 ........ ] [ g_1 ........ ]     replica 1 writes g_0 + g_1 into both
//! ```
//!
//! Who may touch a slice, and when, is said by messages; see `reduce`. The memory has no name in
//! any file system: a member finds another's through its process. Where that fails (another host,
//! another container, too little address space) there is none, and the values travel.

use std::ffi::CString;
use std::fs::{File, OpenOptions, read_link};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use memmap2::{MmapMut, MmapOptions};
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::process::{Resource, getrlimit};
use tch::{Device, Kind, Tensor};

use super::raw::MpiResult;

/// How the memory of gradients is called, in /proc too.
pub const SHARED_NAME: &str = "ouroboros-gradient-";

/// f32.
const VALUE: usize = size_of::<f32>();

/// The buffers of a group, by replica.
pub struct Shared {
    me: usize,
    buffers: Vec<Tensor>,
}

impl Shared {
    /// Room for as many values of every member, zeros; none if not all of them can see it. All
    /// members must call this.
    pub fn new(group: &SimpleCommunicator, values: usize) -> MpiResult<Option<Shared>> {
        let (me, replicas) = (group.rank() as usize, group.size() as usize);
        if values == 0 {
            return Ok(None);
        }

        if group.split_shared(group.rank()).size() != group.size() {
            tracing::info!("the replicas of a stage are on several hosts: gradients travel");
            return Ok(None);
        }

        // A file that may not be so long ends the process; address space is needed for more than
        // the others' gradients.
        let limits = [Resource::As, Resource::Fsize].map(|resource| getrlimit(resource).current);
        let token = token(me);
        let own =
            limits.iter().all(Option::is_none).then(|| memory(values * VALUE, token)).flatten();
        let number = own.as_ref().map_or(-1, |file| i64::from(file.as_raw_fd()));
        let mut cards = vec![0i64; CARD * replicas];
        group.all_gather_into(&[i64::from(std::process::id()), number, token][..], &mut cards[..]);
        let maps: Option<Vec<MmapMut>> =
            cards.chunks(CARD).map(|card| seen(card, values * VALUE)).collect();
        let (mut all, mine) = (false, maps.is_some());
        group.all_reduce_into(&mine, &mut all, SystemOperation::logical_and());
        let Some(maps) = maps.filter(|_| all) else {
            tracing::info!(
                "the replicas of a stage do not see each other's memory: gradients travel"
            );

            return Ok(None);
        };

        tracing::info!(replicas, "gradients are added up in shared memory");
        let buffers = maps.into_iter().map(|map| tensor(map, values)).collect::<MpiResult<_>>()?;
        Ok(Some(Shared { me, buffers }))
    }

    /// This member's number.
    pub fn me(&self) -> usize {
        self.me
    }

    /// This member's own buffer.
    pub fn own(&self) -> Tensor {
        self.buffers[self.me].shallow_clone()
    }

    /// Where a tensor begins in this member's buffer, if it lies there.
    pub fn offset(&self, flat: &Tensor) -> Option<usize> {
        let (own, bytes) =
            (self.buffers[self.me].data_ptr().addr(), self.buffers[self.me].numel() * VALUE);
        let offset = flat.data_ptr().addr().checked_sub(own).filter(|offset| *offset < bytes)?;
        Some(offset / VALUE)
    }

    /// The same values of every member, by replica.
    pub fn views(&self, start: usize, length: usize) -> MpiResult<Vec<Tensor>> {
        let view = |buffer: &Tensor| {
            buffer.f_narrow(0, start as i64, length as i64).map_err(|e| e.to_string())
        };
        self.buffers.iter().map(view).collect()
    }
}

/// What a member tells of its memory: process, number of the file there, and a token that is in the
/// file's name.
const CARD: usize = 3;

/// A number by which a process of this host, with its own number, is told from those of other
/// containers.
fn token(me: usize) -> i64 {
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    (now.as_nanos() as i64).wrapping_mul(1 << 8) ^ me as i64
}

fn name(token: i64) -> String {
    format!("{SHARED_NAME}{token:x}")
}

/// Memory of this process that others can find.
fn memory(bytes: usize, token: i64) -> Option<File> {
    let file =
        memfd_create(CString::new(name(token)).ok()?, MemfdFlags::CLOEXEC).ok().map(File::from)?;
    // All of it at once, so that there is no lack of memory later, where no error could tell it.
    fallocate(&file, FallocateFlags::empty(), 0, bytes as u64).ok()?;
    Some(file)
}

/// The memory of the member with this card.
fn seen(card: &[i64], bytes: usize) -> Option<MmapMut> {
    let path = PathBuf::from(format!("/proc/{}/fd/{}", card[0], card[1]));
    // In another container the same numbers may mean something else.
    let target = read_link(&path).ok()?;
    let file = OpenOptions::new().read(true).write(true).open(&path).ok()?;
    if target.to_str() != Some(&format!("/memfd:{} (deleted)", name(card[2])))
        || file.metadata().ok()?.len() != bytes as u64
    {
        return None;
    }

    // SAFETY: the file has this length, and nobody cuts it: it has no name, and the members only
    // map it.
    unsafe { MmapOptions::new().len(bytes).map_mut(&file).ok() }
}

/// A flat buffer over mapped memory, which stays until the process ends: nobody can tell when the
/// last tensor over it does.
fn tensor(map: MmapMut, values: usize) -> MpiResult<Tensor> {
    let bytes = Box::leak(Box::new(map));
    // SAFETY: the mapping has `values` f32 at a page's begin and is never given back. All members
    // write into it, but never the same values at once: `reduce` lets one replica have a slice at a
    // time.
    let tensor = unsafe {
        Tensor::f_from_blob(bytes.as_ptr(), &[values as i64], &[1], Kind::Float, Device::Cpu)
    };
    tensor.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{slice, slice_mut};

    impl Shared {
        /// What member `me` has of buffers of a process's own.
        pub fn of(me: usize, buffers: Vec<Tensor>) -> Shared {
            Shared { me, buffers }
        }
    }

    #[test]
    fn memory_is_found_through_its_process() {
        let token = token(3);
        let own = memory(16, token).unwrap();
        let card = [i64::from(std::process::id()), i64::from(own.as_raw_fd()), token];
        let maps = [seen(&card, 16).unwrap(), seen(&card, 16).unwrap()];
        drop(own);
        let mut buffers = maps.map(|map| tensor(map, 4).unwrap());
        slice_mut(&mut buffers[0])[2] = 7.0;
        assert_eq!(slice(&buffers[1]), [0.0, 0.0, 7.0, 0.0]);
    }

    #[test]
    fn another_file_of_the_same_number_is_not_taken_for_it() {
        let own = memory(16, 5).unwrap();
        let number = i64::from(own.as_raw_fd());
        let process = i64::from(std::process::id());
        assert!(seen(&[process, number, 6], 16).is_none(), "another token");
        assert!(seen(&[process, number, 5], 32).is_none(), "another length");
        assert!(seen(&[process, -1, 5], 16).is_none(), "no file");
    }

    #[test]
    fn a_tensor_knows_where_it_lies() {
        let maps = [1, 2].map(|token| {
            let own = memory(32, token).unwrap();
            seen(&[i64::from(std::process::id()), i64::from(own.as_raw_fd()), token], 32).unwrap()
        });
        let shared = Shared { me: 1, buffers: maps.map(|map| tensor(map, 8).unwrap()).into() };
        assert_eq!(shared.offset(&shared.own().narrow(0, 3, 2)), Some(3));
        assert_eq!(shared.offset(&shared.buffers[0]), None);
        assert_eq!(shared.offset(&Tensor::from_slice(&[1.0f32])), None);
        let views = shared.views(3, 2).unwrap();
        assert_eq!(views[1].data_ptr(), shared.own().narrow(0, 3, 2).data_ptr());
    }
}
