//! Non-blocking MPI calls that own their buffers. The only file that calls MPI by its C names.
//!
//! Every call here must be made on the thread that initialised MPI (`Threading::Funneled`); the
//! types are not `Send`.

use std::ffi::{c_char, c_int, c_void};

use mpi::ffi;
use mpi::raw::AsRaw;
use mpi::topology::SimpleCommunicator;
use tch::{Kind, Tensor};

use crate::comm::Header;

/// An MPI error as text.
pub type MpiResult<T> = Result<T, String>;

/// An operation under way and the buffer that it reads or writes; the buffer comes back when it is
/// complete.
pub struct Pending<B> {
    request: ffi::MPI_Request,
    buffer: Option<B>,
}

impl<B> Pending<B> {
    /// The buffer, once, if the operation is complete; never waits.
    pub fn test(&mut self) -> MpiResult<Option<B>> {
        let mut flag: c_int = 0;
        // SAFETY: a request of this thread; a completed one is set to MPI_REQUEST_NULL by the call.
        ok(unsafe { ffi::MPI_Test(&mut self.request, &mut flag, ffi::RSMPI_STATUS_IGNORE) })?;
        Ok(if flag != 0 { self.buffer.take() } else { None })
    }

    /// Takes back a receive that nothing will match any more.
    pub fn cancel(mut self) -> MpiResult<()> {
        // SAFETY: a live receive request of this thread, cancelled and then completed.
        unsafe {
            ok(ffi::MPI_Cancel(&mut self.request))?;
            ok(ffi::MPI_Wait(&mut self.request, ffi::RSMPI_STATUS_IGNORE))?;
        }
        self.buffer = None;
        Ok(())
    }
}

impl<B> Drop for Pending<B> {
    fn drop(&mut self) {
        // MPI may still write there: better lost than freed. Happens only when the run is being
        // ended by an error.
        std::mem::forget(self.buffer.take());
    }
}

/// Whom to talk to.
#[derive(Clone, Copy)]
pub struct Address<'a> {
    pub comm: &'a SimpleCommunicator,
    pub rank: usize,
    pub tag: c_int,
}

/// Makes errors of this communicator come back as values instead of ending the process.
pub fn return_errors(comm: &SimpleCommunicator) -> MpiResult<()> {
    // SAFETY: a valid communicator and a predefined handler.
    ok(unsafe { ffi::MPI_Comm_set_errhandler(comm.as_raw(), ffi::RSMPI_ERRORS_RETURN) })
}

/// Sends a header.
pub fn send_header(to: Address, header: &Header) -> MpiResult<Pending<Box<[i64; Header::WORDS]>>> {
    let buffer = Box::new(header.encode());
    let data = buffer.as_ptr().cast::<c_void>();
    // SAFETY: `buffer` holds WORDS i64 and lives in the Pending until the send is complete.
    let request = unsafe { isend(to, data, Header::WORDS, ffi::RSMPI_INT64_T)? };
    Ok(Pending { request, buffer: Some(buffer) })
}

/// Sends bytes.
pub fn send_bytes(to: Address, buffer: Vec<u8>) -> MpiResult<Pending<Vec<u8>>> {
    // SAFETY: the heap block of `buffer` does not move with the Vec and lives until the send is
    // complete.
    let request = unsafe { isend(to, buffer.as_ptr().cast(), buffer.len(), ffi::RSMPI_UINT8_T)? };
    Ok(Pending { request, buffer: Some(buffer) })
}

/// Sends the values of a contiguous tensor on the CPU, f32 or bf16.
pub fn send(to: Address, tensor: Tensor) -> MpiResult<Pending<Tensor>> {
    let tensor = tensor.f_contiguous().map_err(|error| error.to_string())?;
    let kind = datatype(&tensor)?;
    // SAFETY: contiguous, so `numel` values lie at `data_ptr`; the handle in the Pending keeps the
    // storage alive.
    let request = unsafe { isend(to, tensor.data_ptr(), tensor.numel(), kind)? };
    Ok(Pending { request, buffer: Some(tensor) })
}

/// Posts the receive of a header.
pub fn receive_header(from: Address) -> MpiResult<Pending<Box<[i64; Header::WORDS]>>> {
    let mut buffer = Box::new([0i64; Header::WORDS]);
    let data = buffer.as_mut_ptr().cast::<c_void>();
    // SAFETY: room for WORDS i64, kept in the Pending until the receive is complete.
    let request = unsafe { irecv(from, data, Header::WORDS, ffi::RSMPI_INT64_T)? };
    Ok(Pending { request, buffer: Some(buffer) })
}

/// Posts a receive into a contiguous tensor on the CPU, f32 or bf16, that nobody else touches until
/// it is complete.
pub fn receive(from: Address, tensor: Tensor) -> MpiResult<Pending<Tensor>> {
    if !tensor.is_contiguous() {
        return Err("a receive into a tensor with holes".to_owned());
    }

    let kind = datatype(&tensor)?;
    // SAFETY: contiguous, with room for `numel` values at `data_ptr`; the handle in the Pending
    // keeps the storage alive, and the caller keeps others off it: it is fresh, or a slice of a
    // gradient that is being reduced, which the schedule guards.
    let request = unsafe { irecv(from, tensor.data_ptr(), tensor.numel(), kind)? };
    Ok(Pending { request, buffer: Some(tensor) })
}

/// How MPI calls a tensor's values; it has no bf16, but never looks into a message.
fn datatype(tensor: &Tensor) -> MpiResult<ffi::MPI_Datatype> {
    match tensor.kind() {
        // SAFETY: a constant of the MPI library.
        Kind::Float => Ok(unsafe { ffi::RSMPI_FLOAT }),
        // SAFETY: as above.
        Kind::BFloat16 => Ok(unsafe { ffi::RSMPI_UINT16_T }),
        other => Err(format!("values of type {other:?} cannot be sent")),
    }
}

/// A message of bytes with this tag from anybody, if one is there.
pub fn poll_bytes(comm: &SimpleCommunicator, tag: c_int) -> MpiResult<Option<Vec<u8>>> {
    let (mut flag, mut count): (c_int, c_int) = (0, 0);
    // SAFETY: every out-parameter is a live local; the matched message is received at once, with
    // the length that MPI gives for it.
    unsafe {
        let mut message: ffi::MPI_Message = std::mem::zeroed();
        let mut status: ffi::MPI_Status = std::mem::zeroed();
        let any = ffi::RSMPI_ANY_SOURCE;
        ok(ffi::MPI_Improbe(any, tag, comm.as_raw(), &mut flag, &mut message, &mut status))?;
        if flag == 0 {
            return Ok(None);
        }

        ok(ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut count))?;
        let mut bytes = vec![0u8; count as usize];
        let data = bytes.as_mut_ptr().cast::<c_void>();
        ok(ffi::MPI_Mrecv(
            data,
            count,
            ffi::RSMPI_UINT8_T,
            &mut message,
            ffi::RSMPI_STATUS_IGNORE,
        ))?;

        Ok(Some(bytes))
    }
}

/// SAFETY for the caller: `count` values of `kind` lie at `data` until the request is complete.
unsafe fn isend(
    to: Address,
    data: *const c_void,
    count: usize,
    kind: ffi::MPI_Datatype,
) -> MpiResult<ffi::MPI_Request> {
    let (mut request, count) = (null(), c_count(count)?);
    // SAFETY: the caller's promise.
    let code = unsafe {
        ffi::MPI_Isend(data, count, kind, to.rank as c_int, to.tag, to.comm.as_raw(), &mut request)
    };

    ok(code).map(|()| request)
}

/// SAFETY for the caller: there is room for `count` values of `kind` at `data` until the request is
/// complete.
unsafe fn irecv(
    from: Address,
    data: *mut c_void,
    count: usize,
    kind: ffi::MPI_Datatype,
) -> MpiResult<ffi::MPI_Request> {
    let (mut request, count) = (null(), c_count(count)?);
    // SAFETY: the caller's promise.
    let code = unsafe {
        ffi::MPI_Irecv(
            data,
            count,
            kind,
            from.rank as c_int,
            from.tag,
            from.comm.as_raw(),
            &mut request,
        )
    };

    ok(code).map(|()| request)
}

fn c_count(count: usize) -> MpiResult<c_int> {
    c_int::try_from(count)
        .map_err(|_| format!("a message of {count} values, more than MPI can count"))
}

fn null() -> ffi::MPI_Request {
    // SAFETY: a constant of the MPI library.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

fn ok(code: c_int) -> MpiResult<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; 512]; // MPI_MAX_ERROR_STRING is 256 in Open MPI, 512 in MPICH.
    let mut length: c_int = 0;
    // SAFETY: room for the longest error text of either library.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    Err(String::from_utf8_lossy(&text[..(length.max(0) as usize).min(text.len())]).into_owned())
}
