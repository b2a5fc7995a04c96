//! What ranks say to each other: headers, reports, controls.

use std::path::Path;

use ouroboros::comm::Header;
use ouroboros::control::{Control, Report};

use super::{Parts, Target};

struct Messages;

pub fn messages(_: &Path) -> Box<dyn Target> {
    Box::new(Messages)
}

impl Target for Messages {
    fn seeds(&self) -> Vec<Parts> {
        // Words of a header: the first one tells it from stray bytes.
        let header = |words: [i64; 9]| {
            let magic = 0x6f75_726f_0004i64;
            let bytes = std::iter::once(magic).chain(words).flat_map(i64::to_le_bytes);
            bytes.collect::<Vec<u8>>()
        };
        let headers = [[0, 0, 7, 3, 4, 64, 128, 0, 0], [3, 1, 1, 0, 1, 1, 9000, 1, 1]].map(header);
        let reports = [
            r#"{"Loss":{"replica":1,"step":7,"loss":2.5}}"#,
            r#"{"Eval":{"replica":0,"step":4,"loss_sum":null,"tokens":100}}"#,
            r#"{"Saved":{"place":{"stage":1,"replica":0},"step":8,"written":{"shards":[{"file":"a","kind":"weights","stage":1,"bytes":10,"digest":"00","tensors":["a"]}],"copy_s":0.1,"write_s":0.2}}}"#,
            r#"{"Failed":{"origin":"rank 1","error":{"Internal":"a panic"}}}"#,
            r#"{"Limit":9}"#,
            r#""Ask""#,
        ];
        let pairs = reports.iter().enumerate();
        pairs.map(|(i, report)| vec![headers[i % 2].clone(), report.as_bytes().to_vec()]).collect()
    }

    fn words(&self) -> Vec<&'static str> {
        vec![
            "null",
            "{",
            "[",
            "\"Stop\"",
            "\"Digest\":",
            "\"Done\":",
            "\"Busy\":",
            "\"Heartbeat\":",
            "1e999",
            "-1",
        ]
    }

    fn read(&mut self, parts: &[Vec<u8>]) -> Result<(), String> {
        let mut words = [0i64; Header::WORDS];
        for (word, bytes) in words.iter_mut().zip(parts[0].chunks_exact(8)) {
            *word = i64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        if let Some(header) = Header::decode(words) {
            if header.encode() != words {
                return Err(format!("{header} is another on its way back"));
            }
            let values = header.shape.iter().map(|n| *n as u128).product::<u128>();
            if header.values().is_some_and(|found| found as u128 != values) {
                return Err(format!("{header} tells of {:?} values", header.values()));
            }
        }

        if let Ok(report) = serde_json::from_slice::<Report>(&parts[1]) {
            let again = serde_json::to_vec(&report).map_err(|error| error.to_string())?;
            serde_json::from_slice::<Report>(&again)
                .map_err(|error| format!("{report:?} is not read back: {error}"))?;
        }
        if let Ok(control) = serde_json::from_slice::<Control>(&parts[1]) {
            let again = serde_json::to_vec(&control).map_err(|error| error.to_string())?;
            let read =
                serde_json::from_slice::<Control>(&again).map_err(|error| error.to_string())?;
            if read != control {
                return Err(format!("{control:?} is read back as {read:?}"));
            }
        }
        Ok(())
    }
}
