//! The measured peak of a rank's memory.

use std::fs;

use tch::Device;

use crate::comm::mpi::SHARED_NAME;
use crate::device::queues::CudaQueues;
use crate::error::Result;

/// Measures how far the memory of this process rises above where it stood: its resident memory, or
/// what is taken of its GPU.
pub enum Gauge {
    /// `shared` bytes are this process's where replicas see each other's gradients; what it has
    /// touched of the others' is not.
    Host {
        start: u64,
        shared: u64,
    },
    Gpu {
        queues: CudaQueues,
        start: u64,
        most: u64,
    },
}

impl Gauge {
    /// Begins here, on the host: the kernel's mark of the highest resident memory is put back to
    /// the present.
    pub fn start() -> Option<Gauge> {
        // 5 resets VmHWM (proc(5)); where that is not allowed the mark may come from before the
        // start.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Some(Gauge::Host { start: status("VmRSS:")?, shared: 0 })
    }

    /// Begins here, on a device.
    pub fn for_device(device: Device) -> Result<Option<Gauge>> {
        let Device::Cuda(index) = device else { return Ok(Gauge::start()) };
        let queues = CudaQueues::new(index)?;
        let start = queues.taken()?;
        Ok(Some(Gauge::Gpu { queues, start, most: start }))
    }

    /// So many bytes more of memory that replicas share are this process's.
    pub fn exclude_shared(&mut self, bytes: u64) {
        if let Gauge::Host { shared, .. } = self {
            *shared += bytes;
        }
    }

    /// Looks: of a GPU only what is there when it is looked at is seen. libtorch keeps what it has
    /// taken once.
    pub fn look(&mut self) -> Result<()> {
        if let Gauge::Gpu { queues, most, .. } = self {
            *most = queues.taken()?.max(*most);
        }
        Ok(())
    }

    /// Bytes that are taken now: resident on the host, or of the GPU since the start, when it was last looked
    /// at.
    pub fn present(&self) -> Option<u64> {
        match self {
            Gauge::Host { .. } => resident(),
            Gauge::Gpu { start, most, .. } => Some(most.saturating_sub(*start)),
        }
    }

    /// The peak so far, where it is known without looking at all mappings of the process.
    pub fn peak_so_far(&self) -> Option<u64> {
        match self {
            Gauge::Host { shared: 1.., .. } => None,
            _ => self.peak(),
        }
    }

    /// Bytes between the start and the highest mark since.
    pub fn peak(&self) -> Option<u64> {
        match self {
            Gauge::Host { start, shared } => {
                let smaps = if *shared > 0 {
                    fs::read_to_string("/proc/self/smaps").ok()?
                } else {
                    String::new()
                };

                let of_others = touched(&smaps, SHARED_NAME).saturating_sub(*shared);
                Some(status("VmHWM:")?.saturating_sub(start + of_others))
            }

            Gauge::Gpu { start, most, .. } => Some(most.saturating_sub(*start)),
        }
    }
}

/// Resident bytes of the mappings whose name contains a text, of what /proc/self/smaps says: a line of addresses and a name, then
/// lines such as "Rss:   48 kB".
fn touched(smaps: &str, name: &str) -> u64 {
    let (mut counts, mut sum) = (false, 0);
    for line in smaps.lines() {
        match line
            .strip_prefix("Rss:")
            .map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>())
        {
            Some(Ok(kib)) if counts => sum += kib << 10,
            None if line.split_once(' ').is_some_and(|(first, _)| first.contains('-')) => {
                counts = line.contains(name)
            }
            _ => {}
        }
    }
    sum
}

/// Resident bytes of this process (proc(5), `statm`).
pub fn resident() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// A line of this process's status, in bytes.
pub(super) fn status(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_pages_of_named_mappings() {
        let smaps = "7f00-7f10 rw-s 00000000 00:01 7      /memfd:ouroboros-gradient-5 (deleted)\nSize: 64 kB\nRss:    48 kB\nPss: 24 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0\nRss:   1000 kB\nVmFlags: rd wr mr-e\n\
                     7f40-7f50 rw-s 00000000 00:01 8      /memfd:ouroboros-gradient-6 (deleted)\nRss:    4 kB\n";
        assert_eq!(touched(smaps, SHARED_NAME), 52 << 10);
        assert_eq!(touched("", SHARED_NAME), 0);
    }

    #[test]
    fn the_gauge_sees_what_is_touched() {
        let gauge = Gauge::start().unwrap();
        let block = vec![1u8; 256 << 20];
        assert!(block.iter().map(|b| u64::from(*b)).sum::<u64>() == 256 << 20);
        // Other tests of this process may give memory back meanwhile.
        assert!(gauge.peak().unwrap() >= 160 << 20);
    }
}
