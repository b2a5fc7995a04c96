//! The heap of the whole process, libtorch's tensors included.
//!
//! A training step gives back what it took, again and again, in the same sizes. The C library's heap answers with holes (a
//! resident peak of 1.2 to 1.3 times what is in use) or, when told to map every block by itself, with page faults (a fifth
//! of the speed). jemalloc that keeps freed pages has no page faults; its own, smaller holes are given back where they make the
//! process larger than its work was predicted to be ([`Expected`], [`settle`]).

use std::ffi::c_char;
use std::fs;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

#[global_allocator]
static HEAP: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc's settings: freed pages are kept; tensors have an arena of their own, where nothing small cuts their space into
/// pieces; and no more address space is taken than is used, so that a limit of it means what it says.
// SAFETY: the name and the type, a pointer to a C string or none, are those that jemalloc looks for.
#[unsafe(export_name = "malloc_conf")]
pub static SETTINGS: Option<&'static c_char> = {
    const TEXT: &std::ffi::CStr = c"dirty_decay_ms:-1,muzzy_decay_ms:-1,retain:false,oversize_threshold:65536";
    // SAFETY: a C string has at least its end.
    Some(unsafe { &*TEXT.as_ptr() })
};

/// What all work of this process expects to hold, in bytes, and where it stood before the first of it began.
static EXPECTED: AtomicU64 = AtomicU64::new(0);
static START: OnceLock<u64> = OnceLock::new();

/// Memory that some work expects to hold, until this is dropped.
#[derive(Debug)]
pub struct Expected(u64);

impl Expected {
    /// Announces `bytes` on top of what is resident now.
    pub fn new(bytes: u64) -> Expected {
        START.get_or_init(|| status("VmRSS:").unwrap_or(u64::MAX / 2));
        EXPECTED.fetch_add(bytes, Ordering::Relaxed);
        Expected(bytes)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        EXPECTED.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// Gives freed pages back if they make this process larger than expected by more than `percent`. They come again with page
/// faults: it is best asked where few are free, before a backward.
pub fn settle(percent: u64) {
    let expected = EXPECTED.load(Ordering::Relaxed);
    let Some(start) = START.get().filter(|_| expected > 0) else { return };
    if status("VmRSS:").is_some_and(|now| now > start + expected + expected * percent / 100) {
        // 4096 stands for all arenas (MALLCTL_ARENAS_ALL of jemalloc.h).
        let name = c"arena.4096.purge";
        // SAFETY: a name that ends in a zero, and no pointers for values, as this control wants it.
        unsafe { tikv_jemalloc_sys::mallctl(name.as_ptr(), ptr::null_mut(), ptr::null_mut(), ptr::null_mut(), 0) };
    }
}

/// A line of this process's status, in bytes.
pub fn status(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
