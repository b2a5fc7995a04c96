//! The heap of the whole process, libtorch's tensors included.
//!
//! A training step gives back what it took, again and again, in the same sizes. The C library's heap answers with holes (a
//! resident peak of 1.2 to 1.3 times what is in use) or, when told to map every block by itself, with page faults (a fifth
//! of the speed). jemalloc that never gives pages back has neither.

use std::ffi::c_char;

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
