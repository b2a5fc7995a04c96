//! NCCL's functions, out of the library that was found, with the types of its binding; and
//! communicators made of them.
//!
//! The binding's own loader does not know the name that Python's package gives the library, so the
//! functions are looked up here. Result codes are read as numbers: a newer library may have more of
//! them than the binding.

use std::ffi::{CStr, c_char, c_int, c_void};

use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::os::unix::Symbol;

use crate::device::libraries;
use crate::error::{Error, Result};

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// The head of `ncclConfig_t`, which is as old as what is used here (2.17); NCCL takes any older
/// form by its size.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

/// `NCCL_CONFIG_UNDEF_INT` and the marks of `NCCL_CONFIG_INITIALIZER`, nccl.h.
const UNDEFINED: c_int = c_int::MIN;
const MAGIC: u32 = 0xcafe_beef;
const CONFIG_VERSION: u32 = 21700;

type Move =
    unsafe extern "C" fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, CUstream) -> c_int;

/// The functions, as nccl.h declares them.
pub struct Api {
    get_unique_id: Symbol<unsafe extern "C" fn(*mut ncclUniqueId) -> c_int>,
    init: Symbol<
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut Config) -> c_int,
    >,
    async_error: Symbol<unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int>,
    send: Symbol<Move>,
    receive: Symbol<Move>,
    all_reduce: Symbol<
        unsafe extern "C" fn(
            *const c_void,
            *mut c_void,
            usize,
            ncclDataType_t,
            ncclRedOp_t,
            ncclComm_t,
            CUstream,
        ) -> c_int,
    >,
    group_start: Symbol<unsafe extern "C" fn() -> c_int>,
    group_end: Symbol<unsafe extern "C" fn() -> c_int>,
    error_string: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    last_error: Symbol<unsafe extern "C" fn(ncclComm_t) -> *const c_char>,
}

/// A group of devices that talk to each other, as one of them has it. It is never taken down: at
/// the end of a good run all its work is done, and at the end of a bad one taking it down in order
/// could wait for ever.
pub struct Communicator {
    raw: ncclComm_t,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time; the owner is behind a lock.
unsafe impl Send for Communicator {}

/// Memory on the device: where, how many values of which type.
#[derive(Debug, Clone, Copy)]
pub struct DeviceMemory {
    pub address: *mut c_void,
    pub count: usize,
    pub kind: ncclDataType_t,
}

/// What is done with memory: sent to a member, filled from one, or added up over all in place.
#[derive(Debug, Clone, Copy)]
pub enum Transfer {
    To(usize),
    From(usize),
    Sum,
}

impl Api {
    /// Looks the functions up.
    ///
    /// # Errors
    /// Why there is no NCCL that can be used.
    pub fn load() -> std::result::Result<Api, String> {
        let library = &libraries::nccl()?.library;
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types of the fields are those of nccl.h.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|error| format!("NCCL has no {} ({error})", $name))?
            };
        }

        Ok(Api {
            get_unique_id: function!("ncclGetUniqueId"),
            init: function!("ncclCommInitRankConfig"),
            async_error: function!("ncclCommGetAsyncError"),
            send: function!("ncclSend"),
            receive: function!("ncclRecv"),
            all_reduce: function!("ncclAllReduce"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            error_string: function!("ncclGetErrorString"),
            last_error: function!("ncclGetLastError"),
        })
    }

    /// A name for a communicator to be, for its members.
    pub fn unique_id(&self) -> Result<Vec<u8>> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: room for one id.
        let code = unsafe { (self.get_unique_id)(&raw mut id) };
        self.checked(code, None, "ncclGetUniqueId")?;
        Ok(id.internal.iter().map(|byte| *byte as u8).collect())
    }

    /// Joins a communicator, and waits until all its members have; `most_ctas` of its kernels take
    /// part of the device at most.
    ///
    /// Its calls come back when they are made, by themselves: one that does not block starts a
    /// thread of NCCL's for each.
    pub fn join(
        &self,
        id: &[u8],
        me: usize,
        members: usize,
        most_ctas: i32,
    ) -> Result<Communicator> {
        let mut unique = ncclUniqueId { internal: [0; 128] };
        if id.len() != unique.internal.len() {
            return Err(Error::Internal(format!("an id of NCCL has {} bytes", id.len())));
        }

        unique.internal.iter_mut().zip(id).for_each(|(to, from)| *to = *from as c_char);
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 1,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: most_ctas,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        };

        let mut raw: ncclComm_t = std::ptr::null_mut();
        // SAFETY: room for one communicator; NCCL copies the id and the config before it returns.
        let code = unsafe {
            (self.init)(&raw mut raw, members as c_int, unique, me as c_int, &raw mut config)
        };

        let communicator = Communicator { raw };
        self.checked(code, Some(&communicator), "ncclCommInitRankConfig")?;
        Ok(communicator)
    }

    /// What has gone wrong with a communicator meanwhile.
    pub fn check(&self, communicator: &Communicator) -> Result<()> {
        match self.state(communicator)? {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => self.checked(code, Some(communicator), "an operation under way"),
        }
    }

    fn state(&self, communicator: &Communicator) -> Result<c_int> {
        let mut state: c_int = SUCCESS;
        // SAFETY: the communicator was made by `join`; room for one code.
        let code = unsafe { (self.async_error)(communicator.raw, &raw mut state) };
        self.checked(code, Some(communicator), "ncclCommGetAsyncError")?;
        Ok(state)
    }

    fn checked(&self, code: c_int, communicator: Option<&Communicator>, call: &str) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }

        let raw = communicator.map_or(std::ptr::null_mut(), |communicator| communicator.raw);
        // SAFETY: both give strings of their own that end with a zero; the second takes a null
        // communicator.
        let (what, last) = unsafe { ((self.error_string)(code), (self.last_error)(raw)) };
        let text = |string: *const c_char| match string.is_null() {
            true => String::new(),
            // SAFETY: as above.
            false => unsafe { CStr::from_ptr(string) }.to_string_lossy().trim().to_owned(),
        };

        Err(Error::Device(format!("NCCL answers {call} with \"{}\" {}", text(what), text(last))))
    }

    /// Makes all transfers that `put` asks for one operation, which then has no order of its own.
    ///
    /// # Errors
    /// What NCCL reports, and those of `put`.
    pub fn grouped(&self, on: &Communicator, put: impl FnOnce() -> Result<()>) -> Result<()> {
        // SAFETY: a group is open on this thread until its end, which is reached whatever `put`
        // comes to.
        let code = unsafe { (self.group_start)() };
        self.checked(code, Some(on), "ncclGroupStart")?;
        let result = put();
        // SAFETY: as above.
        let code = unsafe { (self.group_end)() };
        result?;
        self.checked(code, Some(on), "ncclGroupEnd")
    }

    /// Puts a transfer on a stream.
    ///
    /// # Safety
    /// It must be memory of the communicator's device that stays until the stream has come past
    /// this; and unless it is only sent nobody else may touch it before.
    pub unsafe fn put(
        &self,
        transfer: Transfer,
        memory: DeviceMemory,
        on: &Communicator,
        stream: CUstream,
    ) -> Result<()> {
        let DeviceMemory { address, count, kind } = memory;
        // SAFETY: the caller's.
        let (code, call) = unsafe {
            match transfer {
                Transfer::To(member) => {
                    ((self.send)(address, count, kind, member as c_int, on.raw, stream), "ncclSend")
                }
                Transfer::From(member) => (
                    (self.receive)(address, count, kind, member as c_int, on.raw, stream),
                    "ncclRecv",
                ),
                Transfer::Sum => {
                    let sum = ncclRedOp_t::ncclSum;
                    (
                        (self.all_reduce)(address, address, count, kind, sum, on.raw, stream),
                        "ncclAllReduce",
                    )
                }
            }
        };

        self.checked(code, Some(on), call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_functions_are_there() {
        if libraries::nccl().is_err() {
            return; // A libtorch of one's own without NCCL.
        }
        let api = Api::load().unwrap();
        let error = api.checked(4, None, "a test").unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(
            error.to_string().contains("NCCL answers a test with \"invalid argument"),
            "{error}"
        );
        assert_eq!(size_of::<Config>(), 48);
    }
}
