//! The heap of the whole process, libtorch's tensors included.
//!
//! A training step gives back what it took, again and again, in the same sizes. The C library's
//! heap answers with holes (a resident peak of 1.2 to 1.3 times what is in use) or, when told to
//! map every block by itself, with page faults (a fifth of the speed). jemalloc that never gives
//! pages back has neither, if it may cut any of its free space: by default it cuts no piece that is
//! more than 64 times what is asked for, so that free pieces which have grown together are used for
//! nothing small any more, and the process grows at every step.

use std::ffi::c_char;

#[global_allocator]
static HEAP: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// jemalloc's settings: freed pages are kept, and a piece of any length may be cut; tensors have an
/// arena of their own, where nothing small cuts their space into pieces; and no more address space
/// is taken than is used, so that a limit of it means what it says.
// SAFETY: the name and the type, a pointer to a C string or none, are those that jemalloc looks
// for.
#[unsafe(export_name = "malloc_conf")]
pub static SETTINGS: Option<&'static c_char> = {
    const TEXT: &std::ffi::CStr =
        c"dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:64,retain:false,oversize_threshold:65536";
    // SAFETY: a C string has at least its end.
    Some(unsafe { &*TEXT.as_ptr() })
};

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    /// Bytes of this process that are in memory.
    fn resident() -> usize {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    /// Free space that has grown together is used again for what is small. In a process of its own:
    /// others measure memory too.
    #[test]
    fn steps_of_many_sizes_need_no_more_from_one_to_the_next() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        alone.args([
            "--exact",
            "--ignored",
            "allocator::tests::steps_of_many_sizes_in_this_process",
        ]);
        let output = alone.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    #[test]
    #[ignore = "run by the test above"]
    fn steps_of_many_sizes_in_this_process() {
        const MIB: usize = 1 << 20;
        let step = |sizes: &[usize]| {
            let blocks: Vec<Vec<u8>> = sizes.iter().map(|size| vec![1; *size]).collect();
            black_box(&blocks);
        };
        step(&[16 * MIB; 24]);
        let sizes: Vec<usize> = (1..=24).map(|i| i * MIB / 16).collect();
        step(&sizes);

        let before = resident();
        (0..200).for_each(|_| step(&sizes));
        let grown = resident().saturating_sub(before);
        assert!(grown < 64 * MIB, "{} MiB more", grown / MIB);
    }
}
