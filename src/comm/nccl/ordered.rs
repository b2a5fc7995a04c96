//! A sum over a group in the order of its members, as the oracle makes it, of which NCCL only
//! carries the values: its own sums of more than two have an order that depends on the topology,
//! and round bf16 after every addition.
//!
//! ```text
//! member 1 of 3     buffer  [ slice 0 | slice 1 | slice 2 ]
//! exchange          slice 0 to member 0, slice 2 to member 2; theirs of slice 1 to the scratch
//! sum               slice 1 = (scratch[0] + slice 1) + scratch[1], in f32, rounded once        ordered.cu
//! share             slice 1 to all; slices 0 and 2 from their owners
//! ```
//!
//! As many bytes as NCCL's own all-reduce in a ring.

use std::ffi::c_void;
use std::ops::Range;

use cudarc::driver::sys::CUstream;
use tch::{Kind, Tensor};

use crate::device::compiler::Source;
use crate::device::kernels::kept;
use crate::error::{Error, Result};

const SOURCE: Source = Source {
    name: "ordered.cu",
    text: concat!(include_str!("../../device/bf16.cu"), include_str!("ordered.cu")),
};
/// Slices begin at multiples of so many values: 256 bytes of bf16, as NCCL likes it.
pub const ALIGN: usize = 128;

/// The slice of a buffer of `len` values that a member owns.
pub fn slice(len: usize, member: usize, members: usize) -> Range<usize> {
    let each = len.div_ceil(members).next_multiple_of(ALIGN);
    (member * each).min(len)..((member + 1) * each).min(len)
}

/// Values of the scratch that a member needs.
pub fn scratch(len: usize, member: usize, members: usize) -> usize {
    slice(len, member, members).len() * (members - 1)
}

/// Where the values of `other` lie in the scratch of `me`, whose slice has `len` values.
pub fn place(len: usize, other: usize, me: usize) -> usize {
    len * (other - usize::from(other > me))
}

/// Puts the sum of this member's slice on a stream.
pub fn sum(
    buffer: &Tensor,
    scratch: &Tensor,
    me: usize,
    members: usize,
    index: usize,
    stream: CUstream,
) -> Result<()> {
    let own = slice(buffer.numel(), me, members);
    if own.is_empty() {
        return Ok(());
    }

    let entry = match buffer.kind() {
        Kind::Float => "sum_f32",
        Kind::BFloat16 => "sum_bf16",
        other => return Err(Error::Internal(format!("a sum of {other:?}"))),
    };

    let kernel = kept(index, &SOURCE, entry)?;

    let mut own_at =
        buffer.data_ptr() as u64 + (own.start * buffer.kind().elt_size_in_bytes()) as u64;
    let (mut others, mut count) = (scratch.data_ptr() as u64, own.len() as u64);
    let (mut me, mut members) = (me as u32, members as u32);
    let arguments: &mut [*mut c_void] = &mut [
        (&raw mut own_at).cast(),
        (&raw mut others).cast(),
        (&raw mut me).cast(),
        (&raw mut members).cast(),
        (&raw mut count).cast(),
    ];

    // SAFETY: the arguments are those of the kernel's declaration. The slice lies in the buffer;
    // the scratch has `count` values of every other member (`scratch`), of the same kind. Both are
    // held until the stream has come past this, and follow what is put on it before.
    unsafe { kernel.launch(count, stream, arguments) }
}

#[cfg(test)]
mod tests {
    use libloading::os::unix::Symbol;
    use tch::Device;

    use super::*;
    use crate::device::kernels::tests::{compiles_for_gpus_of_today, for_processor};

    #[test]
    fn the_sums_compile_for_gpus_of_today() {
        compiles_for_gpus_of_today(&SOURCE, &["sum_f32", "sum_bf16"]);
    }

    #[test]
    fn slices_cover_a_buffer() {
        for (len, members) in [(1, 3), (128, 3), (1000, 3), (4096, 4), (5, 8), (0, 2)] {
            let slices: Vec<_> = (0..members).map(|member| slice(len, member, members)).collect();
            assert_eq!(slices.iter().map(|slice| slice.len()).sum::<usize>(), len);
            assert!(slices.windows(2).all(|pair| pair[0].end == pair[1].start), "{slices:?}");
        }
        assert_eq!(scratch(1000, 0, 3), 2 * 384);
        assert_eq!([0, 2, 3].map(|other| place(10, other, 1)), [0, 10, 20]);
    }

    /// A group as NCCL would serve it, with the kernel compiled for the processor: the bits of sums
    /// in the order of the members, on all of them.
    #[test]
    fn sums_have_the_order_of_the_members() {
        type Sum = unsafe extern "C" fn(*mut c_void, *const c_void, u32, u32, u64);
        let folder = tempfile::tempdir().unwrap();
        let library = for_processor(&SOURCE, folder.path());
        for (kind, entry, len) in
            [(Kind::Float, "sum_f32", 1000), (Kind::BFloat16, "sum_bf16", 517)]
        {
            // SAFETY: the type is that of the source's declaration, whatever the values are.
            let kernel: Symbol<Sum> = unsafe { library.get(entry.as_bytes()) }.unwrap();
            let members = 3;
            let wave = |member: usize| {
                let at = Tensor::arange(len, (Kind::Float, Device::Cpu)) * (0.37 + member as f64);
                at.sin().to_kind(kind)
            };
            let before: Vec<Tensor> = (0..members).map(wave).collect();
            let expected = before[1..]
                .iter()
                .fold(before[0].to_kind(Kind::Float), |sum, part| sum + part.to_kind(Kind::Float));

            let mut slices = Vec::new();
            for me in 0..members {
                let own = slice(len as usize, me, members);
                let of = |member: usize| {
                    before[member].narrow(0, own.start as i64, own.len() as i64).contiguous().copy()
                };
                let mine = of(me);
                let scratch =
                    Tensor::zeros([scratch(len as usize, me, members) as i64], (kind, Device::Cpu));
                for other in (0..members).filter(|other| *other != me) {
                    let at = place(own.len(), other, me) as i64;
                    scratch.narrow(0, at, own.len() as i64).copy_(&of(other));
                }
                let (pointer, count) = (mine.data_ptr().cast(), own.len() as u64);
                // SAFETY: the slice has `count` values, the scratch as many of every other member.
                unsafe {
                    kernel(pointer, scratch.data_ptr().cast(), me as u32, members as u32, count)
                };
                slices.push(mine);
            }
            assert_eq!(Tensor::cat(&slices, 0), expected.to_kind(kind), "{entry}");
        }
    }
}
