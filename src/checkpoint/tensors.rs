//! A file of tensors, of which only those that are asked for are read. What its header says is held
//! against the file before anything is believed: a damaged length must not ask for memory that no
//! machine has.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::values::{is_known, to_f32};
use crate::error::{Error, Result};
use crate::files;

/// An open file.
pub struct Tensors {
    file: File,
    /// Where the values begin, and the tensors by their names.
    values: u64,
    infos: HashMap<String, TensorInfo>,
}

impl Tensors {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is no file of tensors, or its header does not fit the file.
    pub fn open(path: &Path) -> Result<Tensors> {
        let wrong = |problem: &dyn std::fmt::Display| Error::checkpoint(path, problem);
        let mut file = files::open(path).map_err(|error| wrong(&error))?;
        let size = file.metadata().map_err(|error| wrong(&error))?.len();

        let mut length = [0u8; 8];
        file.read_exact(&mut length).map_err(|error| wrong(&error))?;
        let length = u64::from_le_bytes(length);
        let Some(room) = length.checked_add(8).and_then(|values| size.checked_sub(values)) else {
            return Err(wrong(&"its header is longer than the file"));
        };

        let mut header = vec![0u8; length as usize];
        file.read_exact(&mut header).map_err(|error| wrong(&error))?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| wrong(&format!("its header: {error}")))?;
        let infos: HashMap<String, TensorInfo> =
            metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        check(&infos, room).map_err(|problem| wrong(&problem))?;
        Ok(Tensors { file, values: 8 + length, infos })
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.infos.keys().map(String::as_str)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(Dtype, &[usize])> {
        self.infos.get(name).map(|info| (info.dtype, &info.shape[..]))
    }

    /// Fills `bytes` with those of a tensor, from its `from`-th on.
    ///
    /// # Errors
    /// What is wrong with it, or what the file system reports.
    pub fn fill(
        &mut self,
        name: &str,
        from: usize,
        bytes: &mut [u8],
    ) -> std::result::Result<(), String> {
        let count = bytes.len();
        let info = self.infos.get(name).ok_or_else(|| format!("no tensor {name}"))?;
        let (start, end) = info.data_offsets;
        if from.checked_add(count).is_none_or(|to| to > end - start) {
            return Err(format!("{name} has {} bytes, not {count} from {from} on", end - start));
        }

        let at = SeekFrom::Start(self.values + (start + from) as u64);
        let read = self.file.seek(at).and_then(|_| self.file.read_exact(bytes));
        read.map_err(|error| error.to_string())
    }

    /// The shape of a tensor of weights: f32, of an import also bf16 or f16.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn shape(&self, name: &str) -> std::result::Result<Vec<i64>, String> {
        let info = self.infos.get(name).ok_or_else(|| format!("no tensor {name}"))?;
        if !is_known(info.dtype) {
            return Err(format!("{name} holds {:?}, not f32, f16 or bf16", info.dtype));
        }
        Ok(info.shape.iter().map(|n| *n as i64).collect())
    }

    /// The values of such a tensor, in f32.
    ///
    /// # Errors
    /// What is wrong with it, or what the file system reports.
    pub fn read(&mut self, name: &str) -> std::result::Result<Vec<f32>, String> {
        self.shape(name)?;
        let TensorInfo { dtype, data_offsets: (start, end), .. } = self.infos[name];
        let mut bytes = vec![0; end - start];
        self.fill(name, 0, &mut bytes)?;
        Ok(to_f32(dtype, &bytes))
    }
}

/// Whether the tensors lie one behind the other, each as long as its shape says, and are all of the
/// file's `room` bytes.
fn check(infos: &HashMap<String, TensorInfo>, room: u64) -> std::result::Result<(), String> {
    let mut infos: Vec<_> = infos.iter().collect();
    infos.sort_by_key(|(_, info)| info.data_offsets);

    let mut end = 0;
    for (name, info) in infos {
        let values = info.shape.iter().try_fold(1usize, |values, n| values.checked_mul(*n));
        let bytes = values.and_then(|values| values.checked_mul(info.dtype.size()));
        let (from, to) = info.data_offsets;
        if from != end || bytes.and_then(|bytes| from.checked_add(bytes)) != Some(to) {
            return Err(format!(
                "{name}: bytes {from} to {to} of {:?} values of {:?}, after byte {end}",
                info.shape, info.dtype
            ));
        }

        end = to;
    }

    match end as u64 == room {
        true => Ok(()),
        false => Err(format!("its header tells of {end} bytes of values, there are {room}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header, and so many bytes of values.
    fn opened(header: &str, room: usize) -> std::result::Result<Tensors, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(file.path(), [&length[..], header.as_bytes(), &vec![0; room]].concat())
            .unwrap();
        Tensors::open(file.path()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_header_that_does_not_fit_its_file_is_refused() {
        let tensor = |name: &str, shape: &str, from: usize, to: usize| {
            format!(
                "\"{name}\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}"
            )
        };
        let (a, b) = (tensor("a", "[2]", 0, 8), tensor("b", "[3,1]", 8, 20));
        let mut good = opened(&format!("{{{b},{a}}}"), 20).unwrap();
        assert_eq!(
            (good.shape("b").unwrap(), good.read("a").unwrap()),
            (vec![3, 1], vec![0.0, 0.0])
        );
        assert!(good.read("c").unwrap_err().contains("no tensor c"));

        let overlapping = tensor("b", "[3,1]", 4, 16);
        let huge = tensor("b", "[4294967296,4294967296]", 8, 20);
        let beyond = tensor("b", "[1152921504606846976]", 8, 4611686018427387912);
        for (header, room, problem) in [
            (format!("{{{a},{overlapping}}}"), 16, "b: bytes 4 to 16"),
            (format!("{{{a},{huge}}}"), 20, "b: bytes 8 to 20"),
            (format!("{{{a},{beyond}}}"), 20, "bytes of values, there are 20"),
            (format!("{{{a},{b}}}"), 19, "its header tells of 20 bytes of values, there are 19"),
            (format!("{{{a},{b}"), 20, "its header: "),
        ] {
            let found = opened(&header, room).err().unwrap();
            assert!(
                found.contains(problem),
                "{header}\n  gives     {found}\n  expected  {problem}"
            );
        }
    }

    #[test]
    fn a_length_that_asks_for_all_of_memory_is_refused() {
        for length in [17, 1 << 40, u64::MAX - 7, u64::MAX] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), [&length.to_le_bytes()[..], &[b' '; 16]].concat()).unwrap();
            let error = Tensors::open(file.path()).err().unwrap().to_string();
            assert!(error.contains("its header is longer than the file"), "{length}: {error}");
        }
    }
}
